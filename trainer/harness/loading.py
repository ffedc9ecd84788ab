"""Loads weights and tokenizer, in fp32, onto the GPUs that this process may use, or onto the CPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_MEMORY = Path("/proc/meminfo")  # proc(5)
_ROOM = 0.7  # of a GPU's memory for the weights: activations and logits need the rest


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to compute."""

    model: Any  # transformers' classes have no types that pyright could check
    tokenizer: Any

    @property
    def positions(self) -> int:
        """The longest sequence."""
        return self.model.config.max_position_embeddings


class NoRoom(Exception):
    """The memory that is free cannot hold the model."""


def load(folder: Path) -> Loaded:
    """Load a model. It is divided over several GPUs only if one cannot hold it.

    Raises:
        NoRoom: the CPU would compute, and has too little memory. The kernel would end other processes, too.
        OSError: the folder holds no model.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    where: Any = {"": "cpu"}
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        fits = size < _ROOM * torch.cuda.get_device_properties(0).total_memory
        where = {"": 0} if fits else "auto"
    elif size > (free := _free()):
        raise NoRoom(f"the weights have {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free here")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=where, local_files_only=True)
    return Loaded(model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True))


def _free() -> int:
    """Bytes of memory that processes can get without swapping."""
    line = next(line for line in _MEMORY.read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024
