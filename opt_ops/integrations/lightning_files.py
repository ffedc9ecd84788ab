"""The files of a Lightning checkpoint under supervision: what every update changes lies apart from the rest."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO  # public under the name of its subclasses only

from opt_ops.contract import UserError

_PARTS = {"state_dict": "model.pt", "optimizer_states": "optimizer.pt"}
_REST = "lightning.pt"


def write_parts(checkpoint: Mapping[str, Any], path: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Write what Lightning would save in one file. Returns all names, and those that every update changes.

    Raises:
        UserError: a resume could not read it.
    """
    rest = {name: value for name, value in checkpoint.items() if name not in _PARTS}
    parts = {file: checkpoint.get(name) for name, file in _PARTS.items()}
    for name, value in {**parts, _REST: rest}.items():
        with (path / name).open("wb") as file:
            torch.save(value, file)
    # An optimizer without moments has settings only, and these may stay the same.
    moments = any(state["state"] for state in checkpoint["optimizer_states"])
    return frozenset({_REST, *parts}), frozenset({"model.pt", *(["optimizer.pt"] if moments else [])})


def require_readable(path: Path) -> None:
    """Refuse a checkpoint that a resume could not read: better at the first save than after the first fault.

    Raises:
        UserError: it has objects that only ``pickle`` can read.
    """
    try:
        torch.load(path / _REST, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            "the checkpoint has objects that a resume may not read, from save_hyperparameters or a callback: keep "
            f"numbers, text, lists and dicts there, or call trainer.fit(..., weights_only=False). {reason}"
        ) from None


class Files(_WrappingCheckpointIO):
    """Reads the checkpoint to resume. What the script saves and loads itself is left to Lightning.

    Args:
        original: of the trainer.
        resume: folder of the checkpoint to resume.
        change: called with the state of the loops, before Lightning reads it.
    """

    def __init__(self, original: CheckpointIO, resume: Path | None, change: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(original)
        self._resume, self._change = resume, change

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None, **others: Any
    ) -> dict[str, Any]:
        """Read the folder ``path``, or the file of somebody else.

        Raises:
            UserError: the checkpoint is not of this adapter.
        """
        if Path(path) != self._resume:
            return super().load_checkpoint(path, map_location, weights_only, **others)
        where = map_location or (lambda storage, _: storage)
        try:
            whole = torch.load(Path(path) / _REST, where, weights_only=weights_only is not False)
            for name, file in _PARTS.items():
                whole[name] = torch.load(Path(path) / file, where, weights_only=True)
        except FileNotFoundError as error:
            raise UserError(f"{path} was saved by another trainer: it has no {Path(error.filename).name}.") from None
        self._change(whole["loops"]["fit_loop"])
        return whole
