"""GPUs and the machines that they are sold in, with the numbers that a plan needs."""

from dataclasses import dataclass, replace
from typing import Literal

# Dense bf16 peak in TFLOP/s, by a part of the device's name. From NVIDIA's data sheets (V100: fp16).
_PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "V100": 125.0}


def peak_tflops(device_name: str) -> float | None:
    """Dense TFLOP/s of the GPU with this name. None if the GPU is not in the table."""
    return next((peak for model, peak in _PEAKS.items() if model in device_name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuModel:
    """A model of GPU, in the machine that its vendor sells it in.

    Attributes:
        name: for people.
        architecture: compute capability without the dot.
        memory: GiB.
        bandwidth: GB/s of that memory.
        peak: dense TFLOP/s in bf16; in fp16 on V100.
        efficiency: share of ``peak`` that forward and backward pass reach on one GPU, memory-bound operations included.
        link: GB/s from a GPU to others in its node, as collectives reach it (80 % of the data sheet's value).
        network: GB/s from a GPU to other nodes, as collectives reach it.
        per_node: GPUs in a node.
        host_link: GB/s from a GPU to the memory of its host: 80 % of PCIe 3, 4 or 5 with 16 lanes. An assumption.
        host_memory: GB in a node.
        host_bandwidth: GB/s between the processors of a node and their memory. The offloaded optimizer needs it.
        precision: in which it trains.
        kernels: the ops that run on it as kernels of this project (:mod:`trainer.kernels.choice`).
    """

    name: str
    architecture: int
    memory: float
    bandwidth: float
    peak: float
    efficiency: float
    link: float
    network: float
    per_node: int = 8
    host_link: float
    host_memory: float
    host_bandwidth: float
    precision: Literal["bf16", "fp16"] = "bf16"
    kernels: tuple[str, ...] = ()


# Memory and its bandwidth, peaks, links and hosts are from NVIDIA's data sheets of DGX-1, DGX A100, DGX H100 and DGX
# H200. Efficiencies:
# - A100 and H100: llm-foundry's benchmarking README, rows without recomputation. MPT-1b to 7b reach 60 to 64 % and
#   42 to 46 % of peak, attention counted in full.
# - V100: Megatron-LM (arXiv 1909.08053), 39 of 125 TFLOP/s on one GPU.
# - H200: it has the arithmetic of the H100 and more bandwidth. The stas00/ml-engineering book reports 47 % (causal) for
#   Llama-8B on eight of them.
_V100 = GpuModel(
    name="V100 16GB",
    architecture=70,
    memory=16,
    bandwidth=900,
    peak=_PEAKS["V100"],
    efficiency=0.31,
    link=120,
    network=5,
    host_link=12,
    host_memory=512,
    host_bandwidth=100,
    precision="fp16",
)
_H100 = GpuModel(
    name="H100 80GB",
    architecture=90,
    memory=80,
    bandwidth=3350,
    peak=_PEAKS["H100"],
    efficiency=0.44,
    link=360,
    network=40,
    host_link=50,
    host_memory=2000,
    host_bandwidth=400,
)
GPUS: dict[str, GpuModel] = {
    "v100-16": _V100,
    "v100-32": replace(_V100, name="V100 32GB", memory=32),
    "a100-80": GpuModel(
        name="A100 80GB",
        architecture=80,
        memory=80,
        bandwidth=2039,
        peak=_PEAKS["A100"],
        efficiency=0.6,
        link=240,
        network=20,
        host_link=25,
        host_memory=2000,
        host_bandwidth=250,
    ),
    "h100": _H100,
    "h200": replace(_H100, name="H200 141GB", memory=140, bandwidth=4800, efficiency=0.48),
}
