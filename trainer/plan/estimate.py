"""Estimate the memory and the speed of a recipe on given GPUs, and search for the best layout.

Memory is arithmetic over what the trainer keeps with FSDP2 and tensor parallelism. Speed is an estimate, the sum of
four times: for arithmetic, for the traffic of tensor parallelism, for the traffic of FSDP that nothing hides, and for
the optimizer. Its numbers come from published runs (:mod:`trainer.plan.hardware`, :data:`EXPOSED`). On those runs the
estimate is within a fifth of what was reported; tests/trainer/test_plan.py lists them. None of it was measured on runs
of this project.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from trainer.model import cost
from trainer.plan.hardware import GpuModel
from trainer.recipes import Recipe

GIB = 2**30

# The share of FSDP's traffic that computation does not hide: fitted to OPT-175B on 992 A100 (arXiv 2205.01068).
EXPOSED = 0.25

# The share of a GPU's memory for CUDA, NCCL and the fragments of the allocator. An assumption.
OVERHEAD = 0.08

_MASTER, _MOMENTS, _GRADIENT, _HALF = 4, 8, 4, 2  # bytes per parameter: fp32, 2 × fp32, fp32, bf16 or fp16

PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedLayout:
    """How a recipe is spread over nodes and GPUs."""

    nodes: int
    dp: int
    tp: int
    micro_batch: int
    checkpoint_activations: bool
    offload: bool

    @property
    def reduces_each(self) -> bool:
        """Whether gradients are reduced after each micro-batch (:class:`trainer.parallel.fsdp2.Fsdp2Engine`)."""
        return self.checkpoint_activations or self.offload

    def micro_steps(self, recipe: Recipe) -> int:
        """Number of micro-batches in an update."""
        return ceil(ceil(recipe.data.global_batch / self.dp) / self.micro_batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """GiB on each GPU. With offload, ``host`` is GiB on each host."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    host: float

    @property
    def gpu(self) -> float:
        """The sum of all parts on the GPU."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """An estimate of the speed.

    Attributes:
        step_seconds: seconds of an update.
        tokens_per_second: over all GPUs.
        tflops: per GPU, with full attention and recomputation, as runs are usually reported.
        mfu: share of the GPU's peak, with causal attention and without recomputation.
        mfu_full: the same with full attention.
        days: of training, without interruptions.
    """

    step_seconds: float
    tokens_per_second: float
    tflops: float
    mfu: float
    mfu_full: float
    days: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One layout, the memory that it needs and its speed."""

    layout: PlannedLayout
    memory: Memory
    speed: Speed


def memory(recipe: Recipe, gpu: GpuModel, layout: PlannedLayout) -> Memory:
    """The memory that the trainer needs, by part.

    P is the number of parameters, S = dp and t = tp. A rank keeps fp32 master weights of 4·P/(t·S) bytes, moments of
    8·P/(t·S) and fp32 gradients of 4·P/(t·S). Recomputation and offload show that memory is short. Without them, an
    update of several micro-batches keeps the gradients of all P/t in fp32 until the last one. That saves traffic.

    Buffers hold:

    - two layers, gathered in half precision; one of them is prefetched;
    - the gradient of one layer in half precision, and in fp32 for its reduction;
    - the embeddings, which stay gathered;
    - the logits (:func:`logits`).
    """
    model, tp = recipe.model, layout.tp
    parameters = cost.parameters(model)
    share = parameters / (tp * layout.dp)
    on_gpu = 0 if layout.offload else 1
    kept_whole = layout.micro_steps(recipe) > 1 and not layout.reduces_each
    layer, outside = cost.layer_parameters(model), parameters - model.num_layers * cost.layer_parameters(model)
    tokens = layout.micro_batch * recipe.data.seq_len
    gathered = (2 * _HALF * layer + (_HALF + _GRADIENT) * layer + (_HALF + _HALF + _GRADIENT) * outside) / tp
    return Memory(
        parameters=on_gpu * _MASTER * share / GIB,
        gradients=(on_gpu * _GRADIENT * share + (_GRADIENT * parameters / tp if kept_whole else 0)) / GIB,
        optimizer=on_gpu * _MOMENTS * share / GIB,
        activations=activations(recipe, layout) / GIB,
        buffers=(gathered + logits(recipe, tokens) / tp) / GIB + OVERHEAD * gpu.memory,
        host=(_MASTER + _GRADIENT + _MOMENTS) * share * gpu.per_node / GIB if layout.offload else 0,
    )


def activations(recipe: Recipe, layout: PlannedLayout) -> float:
    """Bytes that the layers keep for the backward pass of one micro-batch.

    Each token and layer keeps 28·d bytes in half precision:

    - two inputs and two outputs of norms: 8·d;
    - queries, keys and values: 6·d;
    - the output of attention: 2·d;
    - the output of ReLU: 8·d;
    - two dropout masks: 4·d.

    Tensor and sequence parallelism divide them, but the gathered outputs of the norms are kept as well (4·d). With
    recomputation each layer keeps only its input (2·d), and one layer at a time has everything. A test compares this
    with what autograd saves.
    """
    model = recipe.model
    tokens = layout.micro_batch * recipe.data.seq_len
    layer = 28 * model.hidden_size / layout.tp + (4 * model.hidden_size if layout.tp > 1 else 0)
    if layout.checkpoint_activations:
        return tokens * (model.num_layers * 2 * model.hidden_size / layout.tp + layer)
    return tokens * model.num_layers * layer


def logits(recipe: Recipe, tokens: int) -> float:
    """Bytes of the output layer. Per token and word: logits, masked padding, fp32, log-softmax and its gradient."""
    return tokens * recipe.model.padded_vocab_size * (2 * _HALF + 3 * 4)


def speed(recipe: Recipe, gpu: GpuModel, layout: PlannedLayout) -> Speed:
    """Seconds of one update, and what follows from them.

    - Arithmetic: 6 operations per weight and token, and attention (:func:`trainer.model.cost.flops_per_token`), a third
      more with recomputation, at the GPU's efficiency.
    - Tensor parallelism: each pass over a layer makes two gathers and two scatters of [micro-batch, sequence, hidden].
      There are a forward and a backward pass, and perhaps a recomputed one (Megatron, arXiv 2205.05198). Nothing hides
      this traffic.
    - FSDP: the weights in half precision, twice per micro-batch. The gradients in fp32, once per update, or once per
      micro-batch where memory is short. :data:`EXPOSED` of this is not hidden.
    - Optimizer: 28 bytes per parameter at the memory bandwidth. That takes no time on a GPU, but counts on a host.
    """
    model, world = recipe.model, layout.dp * layout.tp
    tokens = recipe.data.global_batch * recipe.data.seq_len
    flops = cost.flops_per_token(recipe)
    worked = flops * (4 / 3 if layout.checkpoint_activations else 1)
    # The slowest rank has the most sequences.
    on_rank = ceil(recipe.data.global_batch / layout.dp) * recipe.data.seq_len
    arithmetic = worked * on_rank / layout.tp / (gpu.peak * 1e12 * gpu.efficiency)
    passes = 3 if layout.checkpoint_activations else 2
    exchanged = 4 * passes * model.num_layers * on_rank * model.hidden_size * _HALF * (layout.tp - 1) / layout.tp
    parameters = cost.parameters(model)
    micro_steps = layout.micro_steps(recipe)
    reductions = micro_steps if layout.reduces_each else 1
    traffic = (2 * _HALF * micro_steps + _GRADIENT * reductions) * parameters / layout.tp
    bandwidth = gpu.network if layout.nodes > 1 else gpu.link
    fsdp = EXPOSED * traffic * (layout.dp - 1) / layout.dp / (bandwidth * 1e9)
    optimizer = 28 * parameters / layout.nodes / (gpu.host_bandwidth * 1e9) if layout.offload else 0
    seconds = arithmetic + exchanged / (gpu.link * 1e9) + fsdp + optimizer
    attention = 6 * model.num_layers * model.hidden_size * recipe.data.seq_len  # the half that the causal mask removes
    done = tokens / seconds / world / 1e12
    return Speed(
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        tflops=(flops + attention) * (4 / 3 if layout.checkpoint_activations else 1) * done,
        mfu=flops * done / gpu.peak,
        mfu_full=(flops + attention) * done / gpu.peak,
        days=recipe.steps * seconds / 86400,
    )


def best(recipe: Recipe, gpu: GpuModel, nodes: int, host_memory: float) -> Plan | None:
    """The fastest layout that fits. Offload is used only if nothing fits without it. None if nothing fits.

    Args:
        recipe: what to train.
        gpu: the GPUs.
        nodes: number of nodes.
        host_memory: GB of each node.
    """
    fitting = [plan for plan in plans(recipe, gpu, nodes) if _fits(plan, gpu, host_memory)]
    return min(fitting, key=lambda plan: (plan.layout.offload, plan.speed.step_seconds), default=None)


def smallest(recipe: Recipe, gpu: GpuModel, nodes: int, *, offload: bool) -> Plan:
    """The layout that needs the least memory, whether it fits or not."""
    found = [plan for plan in plans(recipe, gpu, nodes) if plan.layout.offload == offload]
    return min(found, key=lambda plan: (plan.memory.gpu, plan.memory.host))


def enough_nodes(recipe: Recipe, gpu: GpuModel, nodes: int, host_memory: float) -> int | None:
    """A number of nodes above ``nodes`` on which something fits, in steps of a half. None if the batch is too small."""
    while nodes * gpu.per_node <= 8 * recipe.data.global_batch:
        nodes = ceil(nodes * 1.5)
        if best(recipe, gpu, nodes, host_memory):
            return nodes
    return None


def plans(recipe: Recipe, gpu: GpuModel, nodes: int) -> Iterator[Plan]:
    """All layouts that the recipe allows on these GPUs, whether they fit or not."""
    world = nodes * gpu.per_node
    model = recipe.model
    for tp in (1, 2, 4, 8):
        dp = world // tp
        divides = not (model.num_heads % tp or model.padded_vocab_size % tp or recipe.data.seq_len % tp)
        if gpu.per_node % tp or not divides or dp > recipe.data.global_batch:
            continue
        most = ceil(recipe.data.global_batch / dp)
        for micro_batch in sorted({most} | {2**i for i in range(most.bit_length()) if 2**i <= most}):
            for recompute in (False, True):
                for offload in (False, True):
                    layout = PlannedLayout(
                        nodes=nodes,
                        dp=dp,
                        tp=tp,
                        micro_batch=micro_batch,
                        checkpoint_activations=recompute,
                        offload=offload,
                    )
                    yield Plan(layout=layout, memory=memory(recipe, gpu, layout), speed=speed(recipe, gpu, layout))


def _fits(plan: Plan, gpu: GpuModel, host_memory: float) -> bool:
    # A tenth of the host's memory is left for the operating system, the data and the checkpoints.
    return plan.memory.gpu <= gpu.memory and plan.memory.host * GIB <= 0.9 * host_memory * 1e9
