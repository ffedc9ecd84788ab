"""The memory that a size needs to be served, and how many GPUs have it."""

from dataclasses import dataclass

from trainer.model import cost
from trainer.parallel.memory import GIB, HALF
from trainer.plan.hardware import GpuModel
from trainer.recipes import ModelConfig

# The share of a GPU's memory that vLLM takes unless --gpu-memory-utilization says otherwise (0.32: config/cache.py).
USED = 0.92


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingMemory:
    """GiB over all GPUs.

    Attributes:
        weights: 2 bytes for each parameter.
        token: keys and values of one token.
        request: keys and values of one request that fills all positions.
        requests: of all requests at once.
    """

    weights: float
    token: float
    request: float
    requests: float

    @property
    def total(self) -> float:
        """The sum, without activations, which are small for one token at a time."""
        return self.weights + self.requests


def serving_memory(model: ModelConfig, requests: int) -> ServingMemory:
    """The memory for weights and for the KV cache, in 16-bit numbers.

    A token keeps a key and a value in each layer: 2 · L · d numbers. A request keeps those of up to T positions. So
    requests need 2 · L · d · T · 2 bytes each. Source: Kwon and others, arXiv 2309.06180, section 3: 800 KB for a token
    of OPT-13B, and up to 1.6 GB for a request. A GPU engine reserves it, or as much of it as its requests use.

    Args:
        model: its shape.
        requests: that are answered at once.
    """
    token = 2 * model.num_layers * model.hidden_size * HALF / GIB
    return ServingMemory(
        weights=HALF * cost.parameters(model) / GIB,
        token=token,
        request=token * model.max_positions,
        requests=token * model.max_positions * requests,
    )


def gpus_needed(memory: ServingMemory, gpu: GpuModel, heads: int) -> int | None:
    """The least number of GPUs of a node that hold it. Tensor parallelism shares the heads, so it divides them.

    None: a node is not enough.
    """
    shares = (count for count in range(1, gpu.per_node + 1) if heads % count == 0)
    return next((count for count in shares if memory.total <= USED * gpu.memory * count), None)
