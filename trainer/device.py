"""Every setting of the device, and of the process for it. No other module of the trainer sets one."""

import gc
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from trainer.errors import UserError

_COLLECT_EVERY = 50  # updates


@dataclass(frozen=True, slots=True)
class Device:
    """Where this process computes: the device as torch names it, and the backend of the group for tensors on it."""

    torch_device: torch.device
    backend: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.torch_device.type == "cuda"


def prepare(run_dir: Path, *, deterministic: bool, replaceable: bool = False) -> None:
    """Make the settings that must come before the first call to CUDA. Values in the environment have precedence.

    If ``deterministic``, two runs agree bit by bit. Where a collective times out, torch writes the last ones of each
    rank to ``run_dir``. If ranks are ``replaceable``, torch's watch of NCCL must not end those that could go on.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a rank has a socket for each other rank
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if replaceable:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    for older_name, name, value in (
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE", "2000"),  # collectives
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE", f"{run_dir.absolute()}/collectives-rank-"),
    ):
        if older_name not in os.environ:
            os.environ.setdefault(name, value)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # compiled layers as well


def select(local_rank: int) -> Device:
    """Select the device of this process: a GPU if the host has one, else the CPU. Order the GPU's attention kernels.

    Where the processes of a host outnumber its GPUs, they share them by their ``local_rank``.
    """
    if not torch.cuda.is_available():
        if torch.version.cuda and Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise UserError("there is an NVIDIA driver here, but torch finds no GPU: look at nvidia-smi on this node.")
        return Device(torch.device("cpu"), "gloo")
    found = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(found)
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # as torch has it
    # cuDNN is 1.7 to 2.3 times as fast as flash on Hopper, slower on A100 and Blackwell (transformers#48163).
    on_hopper = torch.cuda.get_device_capability(found)[0] == 9
    order.insert(0 if on_hopper else len(order), SDPBackend.CUDNN_ATTENTION)
    torch._C._set_sdp_priority_order([kernel.value for kernel in order])  # noqa: SLF001  sdpa_kernel() does not last
    return Device(found, "nccl")


def about(query: torch.Tensor, dropout: float) -> dict[str, Any]:
    """What computes here, for config.json. Torch chooses the attention kernel by the queries of a layer.

    Args:
        query: [batch, heads, sequence, head width], as in training; its values do not matter.
        dropout: of the attention weights.
    """
    choice = torch._fused_sdp_choice(query, query, query, None, dropout, True)  # pyright: ignore # noqa: SLF001, PGH003
    return {
        "name": torch.cuda.get_device_name(query.device) if query.is_cuda else "cpu",
        "attention": SDPBackend(choice).name.removesuffix("_ATTENTION").lower(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def collect_garbage(step: int) -> None:
    """Collect garbage where it is due after ``step``: at the same steps on all ranks, also on a CPU.

    An automatic collection comes on each rank at another step, and all other ranks wait for it. So the first call ends
    these, and exempts what exists by then.
    """
    if gc.isenabled():
        gc.collect()
        gc.freeze()
        gc.disable()
    if step % _COLLECT_EVERY == 0:
        gc.collect()


def hide_gpus() -> None:
    """Let this process see no GPU. Otherwise torch may open a context: half a gigabyte; refused in exclusive mode."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def use_one_cpu_thread() -> None:
    """Make results independent of the number of cores. A forked process needs it, too: it has no threads of OpenMP."""
    torch.set_num_threads(1)


def sum_bf16_products_in_fp32() -> None:
    """Forbid matrix products in bf16 whose partial sums are rounded to bf16."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def raise_communication_errors() -> None:
    """Raise an error where an NCCL communicator fails, and wait in each collective: for tests, not for training."""
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # before the first group
