"""What must hold before training, as far as it can be told without torch. ``--check`` and training both ask here."""

import sys
from importlib.util import find_spec
from pathlib import Path

from opt_ops.contract.manifest import Manifest
from opt_ops.contract.run_folder import require_new_run_folder, require_no_checkpoints
from trainer.errors import UserError
from trainer.recipes import Recipe

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "fsspec")


def require_packages() -> None:
    """Check that the packages of the trainer can be imported. They are not imported.

    Raises:
        UserError: one is not installed.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed for {sys.executable}: "
            f"{sys.executable} -m pip install 'opt-ops[trainer]'."
        )


def check_layout(recipe: Recipe, world: int) -> tuple[int, int]:
    """The (dp, tp) that ``world`` processes form with the recipe.

    Raises:
        UserError: the recipe asks for another number of processes. Or tp does not divide heads, vocabulary or sequence.
            Or there are more data-parallel ranks than sequences in the batch.
    """
    tp = recipe.parallel.tp
    dp = recipe.parallel.dp or max(1, world // tp)
    if dp * tp != world:
        raise UserError(
            f"{world} {'process' if world == 1 else 'processes'} cannot form "
            f"parallel.dp={recipe.parallel.dp} × parallel.tp={tp}: "
            "start dp × tp processes, or set dp to 0 and start a multiple of tp."
        )
    for name, value in (
        ("model.num_heads", recipe.model.num_heads),
        ("the padded model.vocab_size", recipe.model.padded_vocab_size),
        ("data.seq_len", recipe.data.seq_len),
    ):
        if value % tp:
            raise UserError(f"{name}={value} is not a multiple of parallel.tp={tp}, so ranks cannot share it evenly.")
    if recipe.data.global_batch < dp:
        raise UserError(
            f"data.global_batch={recipe.data.global_batch} leaves some of {dp} data-parallel ranks without a sequence: "
            "start fewer processes, or raise parallel.tp."
        )
    return dp, tp


def check_engine(recipe: Recipe, *, on_gpu: bool | None = None) -> None:
    """Check that the recipe's engine has what the recipe asks for. That of PyTorch has everything.

    Args:
        recipe: names the engine.
        on_gpu: whether the ranks have GPUs; None if that is not known here.

    Raises:
        UserError: fairscale is not installed, or does not support a setting.
    """
    if recipe.engine != "fairscale":
        return
    if find_spec("fairscale") is None:
        raise UserError(
            "engine=fairscale needs the package fairscale, which is not installed: install opt-ops[fairscale], or use "
            "engine=fsdp2."
        )
    wide = "parallel.replicas above 1: it spreads parameters over all data-parallel ranks"
    for asked, refused, instead in (
        (
            on_gpu is False and recipe.precision != "fp32",
            f"precision={recipe.precision} on CPU: its FSDP needs a GPU",
            "precision=fp32",
        ),
        (recipe.parallel.replicas > 1, wide, "parallel.replicas=1"),
        (
            recipe.parallel.offload,
            "parallel.offload=true: it keeps parameters and optimizer in the memory of the device that computes",
            "parallel.offload=false (more ranks, or a larger parallel.tp, leave less on each device)",
        ),
        (
            recipe.compile == "true",
            "compile=true: its hooks move the memory of parameters behind the compiler's back",
            "compile=auto",
        ),
    ):
        if asked:
            raise UserError(f"engine=fairscale does not support {refused}. Use engine=fsdp2, or set {instead}.")


def require_own_folders(run_dir: Path, checkpoint_dir: Path, *, may_hold_checkpoints: bool) -> None:
    """Check that an attempt may use its folders.

    Raises:
        UserError: the run folder holds the telemetry of another attempt. Or the checkpoint folder holds a checkpoint,
            and neither --resume nor --from-scratch was given.
    """
    require_new_run_folder(run_dir)
    if not may_hold_checkpoints:
        require_no_checkpoints(checkpoint_dir)


def require_same_shape(found: Manifest, recipe: Recipe, path: Path) -> None:
    """Compare the settings of the model that the shapes of parameters do not show.

    Raises:
        UserError: the checkpoint holds another model.
    """
    _compare(found, recipe, path, "vocab_size", "num_heads", "norm")


def require_same_size(found: Manifest, recipe: Recipe, path: Path) -> None:
    """Compare the settings that the shapes of parameters do show, where there are no parameters yet.

    Raises:
        UserError: the checkpoint holds another model.
    """
    _compare(found, recipe, path, "num_layers", "hidden_size", "max_positions", "embed_size")


def _compare(found: Manifest, recipe: Recipe, path: Path, *names: str) -> None:
    for name in names:
        theirs, ours = (found.model or {}).get(name), getattr(recipe.model, name)
        if theirs not in {None, ours}:
            raise UserError(
                f"{path} holds another model: its {name} is {theirs}, not {ours}. Add --set model.{name}={theirs}."
            )
