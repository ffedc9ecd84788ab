"""Recipes: all that decides what a run computes, as frozen dataclasses, and ``--set key=value`` on top of them."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from trainer.errors import UserError
from trainer.settings import changed, did_you_mean, settings_of

_MAY_BE_ZERO = frozenset(
    {
        "seed",
        "parallel.dp",
        "model.embed_size",
        "data.max_corrupt_lines",
        "checksum_every",
        "checkpoint_every",
        "checkpoint.snapshot_every",
        "checkpoint.keep",
    }
)

# Matrix products are fastest on multiples of 128, and every usual degree of tensor parallelism divides 50,304.
_VOCAB_MULTIPLE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of an OPT model. Its feed-forward layers are four times as wide as the hidden size, as in all.

    ``norm`` says where each residual branch has its layer norm: before it, or, as in OPT-350M alone, after the
    addition, and then there is none before the output layer. ``embed_size`` is the width of the token embeddings where
    it is not the hidden size (0): two projections join them.
    """

    vocab_size: int
    max_positions: int
    num_layers: int
    hidden_size: int
    num_heads: int
    dropout: float
    init_std: float = 0.006
    norm: Literal["pre", "post"] = "pre"
    embed_size: int = 0

    @property
    def embedding_width(self) -> int:
        """Width of a token's embedding."""
        return self.embed_size or self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix. Those from ``vocab_size`` on stay zero and are never predicted."""
        return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Tokens per sequence, sequences per update over all ranks, and at most how many of them a rank runs at once.

    Of each corpus, up to ``max_corrupt_lines`` lines that are no documents are left out.
    """

    seq_len: int
    global_batch: int
    micro_batch: int
    max_corrupt_lines: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up to ``peak_lr``, then linear decay to ``final_fraction`` of it."""

    peak_lr: float
    warmup_steps: int
    total_steps: int
    final_fraction: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Ranks that share a batch (``dp``; 0: all that ``tp`` leaves) times ranks that share each layer (``tp``).

    ``replicas`` copies of the parameters are kept among the ``dp`` ranks, each spread over ``dp`` / ``replicas`` of
    them: on many nodes, the parameters are then gathered within a node or a few. ``offload`` keeps parameters and
    optimizer in the memory of the host.
    """

    dp: int = 0
    tp: int = 1
    replicas: int = 1
    offload: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LossScaleConfig:
    """fp16's dynamic loss scale, with metaseq's numbers; :mod:`trainer.step.loss_scale` says how they act.

    ``patience`` overflows in a row at the floor end the attempt.
    """

    initial: float = 4.0
    window: int = 256
    tolerance: float = 0.0
    floor: float = 2.0**-5
    patience: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """When one update is skipped: loss and gradient norm both more than ``deviations`` standard deviations above the
    mean of the last ``window`` updates, of which there are at least ``warm``. ``deviations`` of 0 turn it off."""

    deviations: float = 6.0
    window: int = 128
    warm: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """How often there is a snapshot, and which checkpoints are kept; docs/trainer.md says more.

    ``snapshot_every`` updates there is a snapshot (0: as often as pays, by ``failure_hours`` between two failures that
    leave snapshots intact; ``disaster_hours`` between two that do not tell the same of durable ones). The newest
    ``keep_snapshots`` are kept, and of older ones one of every ``span_minutes`` for ``snapshot_hours``; of durable ones
    the newest ``keep`` (0: all).
    """

    snapshot_every: int = 0
    failure_hours: float = 10.0  # as OPT-175B's: 2.4 a day
    disaster_hours: float = 240.0
    keep_snapshots: int = 6
    span_minutes: float = 15.0
    snapshot_hours: float = 4.0
    keep: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One training run.

    It ends after ``steps`` updates; the schedule has a length of its own, so that a run can be stopped early or be
    extended without another learning rate.

    ``precision`` is that of parameters and activations in forward and backward pass; master weights, the optimizer and
    sums over ranks are always fp32. ``engine`` is what spreads the model over ranks. ``checkpoint_activations`` keeps
    of each layer only its input and computes the rest again; ``compile`` compiles each layer. Ranks compare what they
    should hold alike after every ``checksum_every`` updates (0: never). A durable checkpoint is saved after every
    ``checkpoint_every`` updates (0: as often as pays).
    """

    steps: int
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    engine: Literal["fsdp2", "fairscale"] = "fsdp2"
    checkpoint_activations: bool = False
    compile: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loss_scale: LossScaleConfig = LossScaleConfig()
    guard: GuardConfig = GuardConfig()
    seed: int = 1
    checkpoint_every: int
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate_every: int = 2000  # updates, as metaseq did
    evaluate_sequences: int = 256  # at most, of each validation corpus
    log_every: int = 10
    checksum_every: int = 100


def opt_tiny() -> Recipe:
    """OPT with a million parameters, which learns to spell English in minutes on a laptop."""
    return Recipe(
        steps=600,
        model=ModelConfig(
            vocab_size=2048, max_positions=64, num_layers=4, hidden_size=128, num_heads=4, dropout=0.1, init_std=0.02
        ),
        data=DataConfig(seq_len=64, global_batch=8, micro_batch=8),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=60, total_steps=600),
        checkpoint_every=50,
        evaluate_every=100,
    )


def opt_125m() -> Recipe:
    """OPT-125M (arXiv 2205.01068, table 1)."""
    return _opt(num_layers=12, hidden_size=768, num_heads=12, peak_lr=6e-4, batch_tokens=_M // 2, micro_batch=8)


def opt_350m() -> Recipe:
    """OPT-350M (table 1), the odd one out: layer norms after the branches, embeddings of 512 with projections."""
    recipe = _opt(num_layers=24, hidden_size=1024, num_heads=16, peak_lr=3e-4, batch_tokens=_M // 2, micro_batch=8)
    return replace(recipe, model=replace(recipe.model, norm="post", embed_size=512))


def opt_1_3b() -> Recipe:
    """OPT-1.3B (table 1)."""
    return _opt(num_layers=24, hidden_size=2048, num_heads=32, peak_lr=2e-4, batch_tokens=_M, micro_batch=8)


def opt_2_7b() -> Recipe:
    """OPT-2.7B (table 1)."""
    return _opt(num_layers=32, hidden_size=2560, num_heads=32, peak_lr=1.6e-4, batch_tokens=_M, micro_batch=4)


def opt_6_7b() -> Recipe:
    """OPT-6.7B (table 1)."""
    return _opt(num_layers=32, hidden_size=4096, num_heads=32, peak_lr=1.2e-4, batch_tokens=2 * _M, micro_batch=2)


def opt_13b() -> Recipe:
    """OPT-13B (table 1)."""
    return _opt(num_layers=40, hidden_size=5120, num_heads=40, peak_lr=1e-4, batch_tokens=4 * _M, micro_batch=2)


def opt_30b() -> Recipe:
    """OPT-30B (table 1)."""
    return _opt(num_layers=48, hidden_size=7168, num_heads=56, peak_lr=1e-4, batch_tokens=4 * _M, tp=2)


def opt_66b() -> Recipe:
    """OPT-66B (table 1), each layer shared by the eight GPUs of a node, as it was trained."""
    return _opt(num_layers=64, hidden_size=9216, num_heads=72, peak_lr=0.8e-4, batch_tokens=2 * _M, tp=8)


def opt_175b() -> Recipe:
    """OPT-175B (table 1), each layer shared by the eight GPUs of a node, as it was trained.

    Warm-up is 2000 updates. In its first stretch OPT-175B was clipped to 0.3 instead of 1 (section 2.5).
    """
    recipe = _opt(num_layers=96, hidden_size=12288, num_heads=96, peak_lr=1.2e-4, batch_tokens=2 * _M, tp=8)
    return replace(recipe, optim=replace(recipe.optim, warmup_steps=2000))


# The paper rounds; metaseq's launcher has these powers of two.
_M = 2**20


def _opt(
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    peak_lr: float,
    batch_tokens: int,
    micro_batch: int = 1,
    tp: int = 1,
) -> Recipe:
    """What all sizes have in common: 300B tokens in sequences of 2048, warm-up over 375M of them, decay to a tenth."""
    seq_len = 2048
    steps = -(-300_000_000_000 // batch_tokens)
    return Recipe(
        steps=steps,
        model=ModelConfig(
            vocab_size=50272,
            max_positions=2048,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            dropout=0.1,
        ),
        data=DataConfig(seq_len=seq_len, global_batch=batch_tokens // seq_len, micro_batch=micro_batch),
        optim=OptimConfig(peak_lr=peak_lr, warmup_steps=375_000_000 // batch_tokens, total_steps=steps),
        parallel=ParallelConfig(tp=tp),
        checkpoint_activations=hidden_size >= 5120,  # from 13B on: metaseq did so for all sizes
        precision="bf16",
        checkpoint_every=500,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "opt-tiny": opt_tiny,
    "opt-125m": opt_125m,
    "opt-350m": opt_350m,
    "opt-1.3b": opt_1_3b,
    "opt-2.7b": opt_2_7b,
    "opt-6.7b": opt_6_7b,
    "opt-13b": opt_13b,
    "opt-30b": opt_30b,
    "opt-66b": opt_66b,
    "opt-175b": opt_175b,
}


def build(name: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe ``name`` with each ``key=value`` of ``settings`` applied in turn, and checked.

    Raises:
        UserError: no such recipe or setting, or a value that cannot work.
    """
    if name not in RECIPES:
        raise UserError(f"no recipe is called {name!r}.{did_you_mean(name, RECIPES)} Recipes: {', '.join(RECIPES)}.")
    recipe = RECIPES[name]()
    for setting in settings:
        recipe = changed(recipe, setting)
    _check(recipe)
    return recipe


def trajectory_digest(
    recipe: Recipe,
    lr_factors: Sequence[tuple[int, float]],
    skips: Sequence[tuple[int, int]],
    data_digest: str,
    initial_weights: str | None = None,
) -> str:
    """SHA-256 over all that decides the weights after a given step: not the layout, and not how often to save.

    Two runs with the same digest compute the same training, up to rounding.
    """
    decisive = {
        "model": asdict(recipe.model),
        "batch": [recipe.data.seq_len, recipe.data.global_batch],
        "optim": asdict(recipe.optim),
        "precision": recipe.precision,
        "loss_scale": asdict(recipe.loss_scale) if recipe.precision == "fp16" else None,
        "guard": asdict(recipe.guard),
        "seed": recipe.seed,
        "lr_factors": sorted(lr_factors),
        "skips": sorted(skips),
        "data": data_digest,
    }
    if initial_weights:
        decisive["initial_weights"] = initial_weights
    return "sha256:" + hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _check(recipe: Recipe) -> None:
    def require(holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"these settings cannot work: {rule}. Change them with --set.")

    model, data, optim, parallel = recipe.model, recipe.data, recipe.optim, recipe.parallel
    for key, value in settings_of(recipe):
        if isinstance(value, float):
            require(math.isfinite(value), f"{key} must be a finite number")
        if isinstance(value, int) and not isinstance(value, bool) and key not in _MAY_BE_ZERO:
            require(value >= 1, f"{key} must be at least 1")
        elif key in _MAY_BE_ZERO:
            require(value >= 0, f"{key} must not be negative")
    checkpoint = recipe.checkpoint
    require(min(checkpoint.failure_hours, checkpoint.disaster_hours) > 0, "hours between failures must be above 0")
    require(
        checkpoint.span_minutes > 0 and checkpoint.snapshot_hours >= 0,
        "checkpoint.span_minutes must be above 0 and checkpoint.snapshot_hours not below",
    )
    require(model.hidden_size % model.num_heads == 0, "model.hidden_size must be a multiple of model.num_heads")
    require(data.seq_len <= model.max_positions, "data.seq_len must not exceed model.max_positions")
    require(0 <= model.dropout < 1, "model.dropout must be at least 0 and below 1")
    require(
        parallel.dp % parallel.replicas == 0 and (parallel.dp > 0 or parallel.replicas == 1),
        "parallel.dp must be given, as a multiple of parallel.replicas",
    )
    scale, guard = recipe.loss_scale, recipe.guard
    require(0 < scale.floor <= scale.initial, "loss_scale.floor must be above 0 and not above loss_scale.initial")
    require(0 <= scale.tolerance <= 1, "loss_scale.tolerance must be a share, from 0 to 1")
    require(guard.deviations >= 0, "guard.deviations must not be negative")
    require(2 <= guard.warm <= guard.window, "guard.warm must be at least 2 and not above guard.window")
    require(optim.warmup_steps < optim.total_steps, "optim.warmup_steps must be below optim.total_steps")
    require(all(0 <= beta < 1 for beta in optim.betas), "both of optim.betas must be at least 0 and below 1")
    for key, value in (("peak_lr", optim.peak_lr), ("eps", optim.eps), ("clip_norm", optim.clip_norm)):
        require(value > 0, f"optim.{key} must be above 0")
    require(0 <= optim.final_fraction <= 1, "optim.final_fraction must be a share, from 0 to 1")
    require(optim.weight_decay >= 0, "optim.weight_decay must not be negative")
    require(model.init_std >= 0, "model.init_std must not be negative")
