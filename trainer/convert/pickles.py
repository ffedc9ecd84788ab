"""Files that ``torch.save`` wrote, from anybody: they may hold tensors and plain data, and never run code."""

import pickle
from pathlib import Path
from typing import Any, Self

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from trainer.errors import UserError

# Where metaseq's files have their settings from. None of it is needed: objects of these modules become placeholders.
_SETTINGS = ("argparse", "collections", "enum", "fairseq", "metaseq", "numpy", "omegaconf", "pathlib", "typing")


class _Placeholder:
    """Stands for an object of another library, and takes whatever a pickle wants to put into it."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def load(path: Path) -> Any:
    """The content of ``path`` with tensors on the CPU, mapped into memory rather than read where the file allows it.

    Raises:
        UserError: the file is damaged, or wants more than tensors, plain data and settings.
    """
    try:
        zipped = _is_zip(path)
        unknown = get_unsafe_globals_in_checkpoint(path) if zipped else []
        if foreign := sorted(name for name in unknown if name.partition(".")[0] not in _SETTINGS):
            raise UserError(
                f"{path} wants to call {', '.join(foreign)}, which weights have no use for. It was not loaded. "
                "Take the file from a source you trust, or as safetensors."
            )
        with safe_globals([(_Placeholder, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as weights: {str(error).partition(chr(10))[0]}") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
