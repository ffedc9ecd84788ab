"""What a ``transformers.Trainer`` saves: its own files, by its own functions, into a folder of the contract."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState

from opt_ops.integrations.checkpoints import Written

_WEIGHTS = ("model", "pytorch_model", "adapter_model")
_OPTIMIZER = ("optimizer",)


def write(trainer: Any, path: Path, rank: int, *, weights_moved: bool) -> Written:
    """Write the part of this rank into the checkpoint ``path``.

    Each rank writes into a folder of its own, and then moves its files to where ``--resume`` looks for them. So each
    rank knows which files it wrote, whatever the trainer is made of: those of DDP, of FSDP, of DeepSpeed.

    Args:
        trainer: the trainer.
        path: the folder of the checkpoint, the same for all ranks.
        rank: of this process.
        weights_moved: whether the last update had a learning rate above 0. Otherwise weights may be as before.

    Raises:
        OSError: a file cannot be written.
    """
    own = path / f".rank-{rank:04d}"
    try:
        own.mkdir()
        _save(trainer, own)
        files = [file for file in own.rglob("*") if file.is_file()]
        names = frozenset(str(file.relative_to(own)) for file in files)
        for file in files:
            target = path / file.relative_to(own)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
        shutil.rmtree(own)
    except Exception as error:  # torch and safetensors report a full disk by errors of their own kinds
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error
    return Written(names, state=frozenset(_state(trainer, path, names, weights_moved=weights_moved)))


def _save(trainer: Any, folder: Path) -> None:
    """What ``Trainer._save_checkpoint`` saves, by the same functions."""
    trainer.store_flos()
    trainer.save_model(str(folder), _internal_call=True)
    trainer._save_optimizer_and_scheduler(str(folder))
    trainer._save_scaler(str(folder))
    trainer._save_rng_state(str(folder))
    if trainer.args.should_save:
        kept = trainer.state.stateful_callbacks
        for each in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(each, ExportableState):
                kept[type(each).__name__] = each.state()
        trainer.state.save_to_json(str(folder / "trainer_state.json"))


def _state(trainer: Any, path: Path, names: frozenset[str], *, weights_moved: bool) -> set[str]:
    """The files that every applied update changes: those with weights that are trained, and the optimizer's."""
    trained = {name for name, each in trainer.model.named_parameters() if each.requires_grad and _is_here(each)}
    found: set[str] = set()
    for name in names:
        first, last = name.split("/")[0], name.split("/")[-1]
        if first.startswith(_OPTIMIZER) or last.endswith("optim_states.pt"):
            changes = _optimizer_has_state(trainer)
        elif last.endswith((".safetensors", "model_states.pt")) or first.startswith(_WEIGHTS):
            changes = weights_moved and bool(trained) and _holds(path, name, trained)
        else:
            changes = False
        if changes:
            found.add(name)
    return {name for name in found if not name.endswith((".metadata", ".json"))}


def _is_here(parameter: Any) -> bool:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel() > 0


def _optimizer_has_state(trainer: Any) -> bool:
    """An optimizer without moments, such as plain SGD, saves the same file each time."""
    try:
        return any(len(each) > 0 for each in trainer.optimizer.state.values())
    except (AttributeError, TypeError):
        return False


def _holds(path: Path, name: str, trained: set[str]) -> bool:
    """Whether the file has a weight that is trained. Of several files with weights, an index tells which has which."""
    for index in path.glob("*.index.json"):
        where = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        if name in where.values():
            return any(file == name and weight in trained for weight, file in where.items())
    return True
