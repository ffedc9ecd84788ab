"""Load files of ``torch.save`` from untrusted sources: tensors and plain data only, without running code."""

import pickle
from pathlib import Path
from typing import Any, Self

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from trainer.errors import UserError

# The modules of the settings in metaseq's files. The settings are not needed: their objects become placeholders.
_SETTINGS = ("argparse", "collections", "enum", "fairseq", "metaseq", "numpy", "omegaconf", "pathlib", "typing")


class _Placeholder:
    """Stands for an object of another library. It accepts and drops everything that a pickle puts into it."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def load(path: Path) -> Any:
    """The content of ``path``, with tensors on the CPU. Where the format allows it, tensors are memory-mapped.

    Raises:
        UserError: the file is damaged, or needs more than tensors, plain data and settings.
    """
    try:
        zipped = _is_zip(path)
        unknown = get_unsafe_globals_in_checkpoint(path) if zipped else []
        if foreign := sorted(name for name in unknown if name.partition(".")[0] not in _SETTINGS):
            raise UserError(
                f"{path} would call {', '.join(foreign)}, which weights do not need. It was not loaded. "
                "Get the file from a source that you trust, or as safetensors."
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
