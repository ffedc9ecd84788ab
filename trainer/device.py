"""Every setting of the device, and of the process for it. No other module of the trainer sets one.

The settings of a GPU's kernels are torch's defaults, except where a function below changes one.
"""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Device:
    """Where this process computes.

    Attributes:
        torch_device: the device as torch names it.
        backend: communication backends for a process group on this device.
    """

    torch_device: torch.device
    backend: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.torch_device.type == "cuda"


def select(local_rank: int) -> Device:
    """Select the device of this process: a GPU if the host has one, else the CPU.

    Args:
        local_rank: number of this process on its host. Where processes outnumber GPUs, they share them.
    """
    if not torch.cuda.is_available():
        return Device(torch.device("cpu"), "gloo")
    found = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(found)
    return Device(found, "cpu:gloo,cuda:nccl")


def hide_gpus() -> None:
    """Let this process see no GPU. Call it in a process that computes nothing, before its first call to CUDA.

    Otherwise a library that finds a GPU may open a context there: half a gigabyte, and an error in exclusive mode.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def use_one_cpu_thread() -> None:
    """Let torch compute with one CPU thread in this process.

    The order of a sum decides how it rounds. With one thread the results do not depend on the number of cores. A forked
    process needs it as well, because the threads of OpenMP do not survive a fork.
    """
    torch.set_num_threads(1)


def sum_bf16_products_in_fp32() -> None:
    """Forbid matrix products in bf16 whose partial sums are rounded to bf16."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def raise_communication_errors() -> None:
    """Let a failed NCCL communicator raise an error instead of ending the process. Call it before the first group.

    A value in the environment has precedence.
    """
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
