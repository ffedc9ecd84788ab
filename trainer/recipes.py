"""Recipes: everything that decides what a run computes, as frozen dataclasses. ``--set key=value`` changes them."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from trainer import optim_config
from trainer.errors import UserError
from trainer.optim_config import OptimConfig
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
        "optim.decay_steps",
    }
)

# Matrix products are fastest on multiples of 128, and every usual degree of tensor parallelism divides 50,304.
_VOCAB_MULTIPLE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of an OPT model. As in all OPT models, feed-forward layers are four times as wide as the hidden size.

    ``norm`` is the place of the layer norm of each residual branch. With ``pre`` it is before the branch. With
    ``post``, as only in OPT-350M, it is after the addition, and the output layer has no norm. ``embed_size`` is the
    width of the token embeddings, if it is not the hidden size (0). Then two projections connect them.

    ``attention_dropout`` is the dropout of attention probabilities. OPT's launcher had 0.1. Its masks come from torch's
    generator, so they depend on the layout of ranks. After a restart in the same layout they are the same.
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
    attention_dropout: float = 0.0

    @property
    def embedding_width(self) -> int:
        """Width of a token's embedding."""
        return self.embed_size or self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix. The rows from ``vocab_size`` on stay zero and are never predicted."""
        return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The sizes of sequence and batch.

    A sequence has ``seq_len`` tokens. An update has ``global_batch`` sequences over all ranks; a rank runs up to
    ``micro_batch`` of them at once. Of each corpus, up to ``max_corrupt_lines`` bad lines are skipped.
    """

    seq_len: int
    global_batch: int
    micro_batch: int
    max_corrupt_lines: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the work.

    ``dp`` ranks share a batch, and ``tp`` ranks share each layer. With ``dp`` 0 it is the number of ranks divided by
    ``tp``. The ``dp`` ranks hold ``replicas`` copies of the parameters, each spread over ``dp`` / ``replicas`` ranks.
    On many nodes, parameters are then gathered within one node or a few. ``offload`` keeps parameters and optimizer in
    the memory of the host.
    """

    dp: int = 0
    tp: int = 1
    replicas: int = 1
    offload: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LossScaleConfig:
    """The dynamic loss scale of fp16, with metaseq's numbers. :mod:`trainer.step.loss_scale` explains the rule.

    ``patience`` overflows in a row with the scale at its floor end the attempt.
    """

    initial: float = 4.0
    window: int = 256
    tolerance: float = 0.0
    floor: float = 2.0**-5
    patience: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """When an update is skipped.

    Loss and gradient norm must both be more than ``deviations`` standard deviations above their mean over the last
    ``window`` updates. At least ``warm`` updates must have been made. ``deviations`` 0 turns it off.
    """

    deviations: float = 6.0
    window: int = 128
    warm: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """How often snapshots are made, and which checkpoints are kept. docs/trainer.md says more.

    A snapshot is made every ``snapshot_every`` updates. With 0 the interval is the one that costs the least, if
    failures that leave snapshots intact come every ``failure_hours``. Where snapshots are made, the interval of durable
    checkpoints follows from ``disaster_hours``, the time between failures that destroy snapshots.

    The newest ``keep_snapshots`` snapshots are kept, and for ``snapshot_hours`` one of each ``span_minutes`` before. Of
    durable checkpoints the newest ``keep`` are kept (0: all).
    """

    snapshot_every: int = 0
    failure_hours: float = 10.0  # as OPT-175B's: 2.4 a day
    disaster_hours: float = 240.0
    keep_snapshots: int = 6
    span_minutes: float = 15.0
    snapshot_hours: float = 4.0
    keep: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerCopiesConfig:
    """How often each rank's state is copied into the memory of another node. docs/trainer.md says more.

    A copy is made after every ``every`` updates (0: never). With -1 the ranks choose it, so that a copy takes at most
    half of the time between two. ``versions`` is 2, or 1 where host memory is short. With 1, a rank that is lost while
    a copy is made costs a restart.
    """

    every: int = -1
    versions: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One training run.

    It ends after ``steps`` updates. The schedule has a length of its own. So a run can end earlier or later without a
    change of the learning rate.

    ``precision`` is the format of parameters and activations in forward and backward pass. Master weights, the
    optimizer and sums over ranks are always fp32. ``engine`` spreads the model over ranks. ``checkpoint_activations``
    keeps only the input of each layer and computes the rest again. ``compile`` compiles each layer; ``auto`` does it on
    GPUs in half precision. ``kernels`` says which ops run as kernels of this project (:mod:`trainer.kernels.choice`).
    ``deterministic`` makes a resumed run bit-identical on GPUs, too, and costs speed.

    Every ``checksum_every`` updates, ranks compare the data that they must hold alike (0: never). A durable checkpoint
    is saved every ``checkpoint_every`` updates (0: at the interval that costs the least). ``peer_copies`` lets a lost
    rank be replaced while the others keep running.
    """

    steps: int
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    engine: Literal["fsdp2", "fairscale"] = "fsdp2"
    checkpoint_activations: bool = False
    compile: Literal["auto", "true", "false"] = "auto"
    kernels: Literal["auto", "on", "off"] = "auto"
    deterministic: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loss_scale: LossScaleConfig = LossScaleConfig()
    guard: GuardConfig = GuardConfig()
    seed: int = 1
    checkpoint_every: int
    checkpoint: CheckpointConfig = CheckpointConfig()
    peer_copies: PeerCopiesConfig = PeerCopiesConfig()
    evaluate_every: int = 2000  # updates, as metaseq did
    evaluate_sequences: int = 256  # at most, of each validation corpus
    log_every: int = 10
    checksum_every: int = 100

    def compiles(self, *, on_gpu: bool) -> bool:
        """Whether layers are compiled."""
        automatic = on_gpu and self.precision != "fp32" and self.engine == "fsdp2"
        return automatic if self.compile == "auto" else self.compile == "true"


def opt_tiny() -> Recipe:
    """OPT with a million parameters. It learns to spell English words in minutes on a laptop."""
    return Recipe(
        steps=600,
        model=ModelConfig(
            vocab_size=2048, max_positions=64, num_layers=4, hidden_size=128, num_heads=4, dropout=0.1, init_std=0.02
        ),
        data=DataConfig(seq_len=64, global_batch=8, micro_batch=8),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=60, total_steps=600),
        checkpoint_every=50,
        peer_copies=PeerCopiesConfig(every=1),
        evaluate_every=100,
    )


def opt_200k() -> Recipe:
    """OPT with 0.2 million parameters: the smallest of four sizes whose campaign a laptop trains in some minutes."""
    return _small(num_layers=2, hidden_size=64, peak_lr=2e-3)


def opt_500k() -> Recipe:
    """OPT with 0.5 million parameters, for a campaign on a laptop."""
    return _small(num_layers=3, hidden_size=96, peak_lr=2e-3)


def opt_1m() -> Recipe:
    """OPT with a million parameters, for a campaign on a laptop."""
    return _small(num_layers=4, hidden_size=128, peak_lr=1.5e-3)


def opt_2m() -> Recipe:
    """OPT with two million parameters, for a campaign on a laptop."""
    return _small(num_layers=5, hidden_size=176, peak_lr=1e-3)


def _small(*, num_layers: int, hidden_size: int, peak_lr: float) -> Recipe:
    """What the sizes for a laptop share: 1.5 million tokens in sequences of 64."""
    recipe = opt_tiny()
    return replace(
        recipe,
        steps=1500,
        model=replace(recipe.model, num_layers=num_layers, hidden_size=hidden_size, dropout=0.0),
        data=DataConfig(seq_len=64, global_batch=16, micro_batch=16),
        optim=OptimConfig(peak_lr=peak_lr, warmup_steps=60, total_steps=1500),
        checkpoint_every=250,
    )


def opt_125m() -> Recipe:
    """OPT-125M (arXiv 2205.01068, table 1)."""
    return _opt(num_layers=12, hidden_size=768, num_heads=12, peak_lr=6e-4, batch_tokens=_M // 2, micro_batch=8)


def opt_350m() -> Recipe:
    """OPT-350M (table 1). Only this size has layer norms after the branches, and embeddings of 512 with projections."""
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
    """OPT-66B (table 1). The eight GPUs of a node share each layer, as in the original run."""
    return _opt(num_layers=64, hidden_size=9216, num_heads=72, peak_lr=0.8e-4, batch_tokens=2 * _M, tp=8)


def opt_175b() -> Recipe:
    """OPT-175B (table 1). The eight GPUs of a node share each layer, as in the original run.

    Warm-up is 2000 updates. In its first part the original run was clipped to 0.3 instead of 1 (section 2.5).
    """
    recipe = _opt(num_layers=96, hidden_size=12288, num_heads=96, peak_lr=1.2e-4, batch_tokens=2 * _M, tp=8)
    return replace(recipe, optim=replace(recipe.optim, warmup_steps=2000))


# The paper rounds its batch sizes. metaseq's launcher has these powers of two.
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
    """What all sizes share: 300B tokens in sequences of 2048, warm-up over 375M of them, decay to a tenth."""
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
        checkpoint_activations=hidden_size >= 5120,  # from 13B on; metaseq used it for all sizes
        precision="bf16",
        checkpoint_every=500,
    )


PUBLISHED: dict[str, Callable[[], Recipe]] = {
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
"""The sizes of the paper."""

RECIPES: dict[str, Callable[[], Recipe]] = {
    "opt-tiny": opt_tiny,
    "opt-200k": opt_200k,
    "opt-500k": opt_500k,
    "opt-1m": opt_1m,
    "opt-2m": opt_2m,
    **PUBLISHED,
}


def build(name: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe ``name``, after each ``key=value`` of ``settings`` was applied and the result was checked.

    Raises:
        UserError: there is no such recipe or setting, or a value cannot work.
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
    """SHA-256 over everything that decides the weights after a given step. Layout and save intervals do not count.

    Two runs with the same digest compute the same training, up to rounding.
    """
    model = asdict(recipe.model)
    if not recipe.model.attention_dropout:
        del model["attention_dropout"]  # checkpoints from before there was such a setting keep their digest
    decisive = {
        "model": model,
        "batch": [recipe.data.seq_len, recipe.data.global_batch],
        "optim": optim_config.decisive(recipe.optim),
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
            raise UserError(f"the settings cannot work: {rule}. Change them with --set.")

    model, data, parallel = recipe.model, recipe.data, recipe.parallel
    for key, value in settings_of(recipe):
        if isinstance(value, float):
            require(math.isfinite(value), f"{key} must be a finite number")
        if isinstance(value, int) and not isinstance(value, bool) and key not in {*_MAY_BE_ZERO, "peer_copies.every"}:
            require(value >= 1, f"{key} must be at least 1")
        elif key in _MAY_BE_ZERO:
            require(value >= 0, f"{key} must not be negative")
    copies = recipe.peer_copies
    require(copies.every >= -1 and copies.versions <= 2, "peer_copies.every must be at least -1, versions 1 or 2")
    checkpoint = recipe.checkpoint
    require(min(checkpoint.failure_hours, checkpoint.disaster_hours) > 0, "hours between failures must be above 0")
    require(
        checkpoint.span_minutes > 0 and checkpoint.snapshot_hours >= 0,
        "checkpoint.span_minutes must be above 0 and checkpoint.snapshot_hours at least 0",
    )
    require(model.hidden_size % model.num_heads == 0, "model.hidden_size must be a multiple of model.num_heads")
    require(data.seq_len <= model.max_positions, "data.seq_len must not exceed model.max_positions")
    for key in ("dropout", "attention_dropout"):
        require(0 <= getattr(model, key) < 1, f"model.{key} must be at least 0 and below 1")
    require(
        parallel.dp % parallel.replicas == 0 and (parallel.dp > 0 or parallel.replicas == 1),
        "parallel.dp must be given, as a multiple of parallel.replicas",
    )
    scale, guard = recipe.loss_scale, recipe.guard
    require(0 < scale.floor <= scale.initial, "loss_scale.floor must be above 0 and not above loss_scale.initial")
    require(0 <= scale.tolerance <= 1, "loss_scale.tolerance must be a share, from 0 to 1")
    require(guard.deviations >= 0, "guard.deviations must not be negative")
    require(2 <= guard.warm <= guard.window, "guard.warm must be at least 2 and not above guard.window")
    optim_config.check(recipe.optim, require)
    require(model.init_std >= 0, "model.init_std must not be negative")
