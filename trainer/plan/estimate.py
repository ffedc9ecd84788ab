"""Estimate the memory and the speed of a recipe on given GPUs, and search for the best layout.

Memory is arithmetic over what the trainer keeps (:mod:`trainer.parallel.memory`), with the policy that the trainer will
follow (:mod:`trainer.parallel.policy`). Speed is an estimate, the sum of the times for arithmetic, for the traffic of
tensor parallelism, for the traffic of FSDP that nothing hides, for FSDP's copies within a GPU, and for the optimizer.
Its numbers come from published runs (:mod:`trainer.plan.hardware`, :data:`EXPOSED`). On those runs the estimate is
within a fifth of what was reported; tests/trainer/test_plan.py lists them. None of it was measured on runs of this
project.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from trainer.model import cost
from trainer.parallel import memory as bytes_of
from trainer.parallel import policy
from trainer.parallel.memory import GIB, GRADIENT, HALF, OVERHEAD
from trainer.parallel.policy import FsdpPolicy
from trainer.plan.hardware import GpuModel
from trainer.recipes import Recipe

# The share of FSDP's traffic that computation does not hide: fitted to OPT-175B on 992 A100 (arXiv 2205.01068).
EXPOSED = 0.25

# The share of its data sheet's bandwidth that a GPU's memory reaches in long copies. An assumption.
REACHED = 0.9

# Widths of the hidden vector, in bf16, that eager dropout reads and writes for the masks of a layer, per token: half of
# the 232 that were counted when its hash was 64 bits wide. Compiled layers and the kernel make masks in registers.
EAGER_MASKS = 116

# Plans whose speed differs by less than this are equal, and the one that needs less memory is taken. It is far below
# what the estimate can tell apart.
EQUALLY_FAST = 0.01

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

    def of(self, recipe: Recipe, gpu: GpuModel) -> Recipe:
        """The recipe as it runs in this layout."""
        return replace(
            recipe,
            data=replace(recipe.data, micro_batch=self.micro_batch),
            parallel=replace(recipe.parallel, dp=self.dp, tp=self.tp, offload=self.offload),
            checkpoint_activations=self.checkpoint_activations,
            precision=gpu.precision,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """GiB on each GPU at the peak of an update, and ``host``: GiB on each host, pinned."""

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
    """One layout, how FSDP treats it, the memory that it needs and its speed."""

    layout: PlannedLayout
    policy: FsdpPolicy
    memory: Memory
    speed: Speed


def policy_of(recipe: Recipe, gpu: GpuModel, layout: PlannedLayout) -> FsdpPolicy:
    """What the trainer will choose in this layout."""
    return policy.choose(layout.of(recipe, gpu), layout.dp, gpu.memory * GIB, frozenset(gpu.kernels))


def memory(recipe: Recipe, gpu: GpuModel, layout: PlannedLayout) -> Memory:
    """The memory that the trainer needs, by part, at the moment of an update when it is most.

    Args:
        recipe: what to train.
        gpu: for its size, its precision and its kernels.
        layout: the ranks, and how they share the work.
    """
    here, chosen = layout.of(recipe, gpu), policy_of(recipe, gpu, layout)
    needs = bytes_of.on_gpu(
        here,
        layout.dp,
        reduces_each=chosen.reduces_each,
        keeps_weights=chosen.keeps_weights,
        fused=frozenset(gpu.kernels),
    )
    return Memory(
        parameters=needs.parameters / GIB,
        gradients=needs.gradients / GIB,
        optimizer=needs.optimizer / GIB,
        activations=needs.activations / GIB,
        buffers=needs.buffers / GIB + OVERHEAD * gpu.memory,
        host=bytes_of.on_host(here, layout.dp) * gpu.per_node / GIB,
    )


def copied(recipe: Recipe, dp: int, chosen: FsdpPolicy) -> float:
    """Bytes that FSDP2 reads and writes in the memory of one GPU in an update, read from its source (torch 2.13).

    - Gather: 6 bytes for each parameter of the share, for its cast, and 4 for each one gathered. It happens once in an
      update where weights are kept; otherwise twice per micro-batch.
    - Gradients that wait for the last micro-batch: 6 for the cast of the first ones, 10 to add each of the others, and
      8 to copy them into the sum.
    - Gradients that are summed each time: 6 for the copy into the sum, and 12 for the share to add its result.
    - The result of a sum: 8 for the share.
    """
    steps = bytes_of.micro_steps(recipe, dp)
    whole = cost.parameters(recipe.model) / recipe.parallel.tp
    share = whole * recipe.parallel.replicas / dp
    gathers = 1 if chosen.keeps_weights else 2 * steps
    if chosen.reduces_each:
        gradients = 6 * steps * whole + (8 * steps + 12 * (steps - 1)) * share
    else:
        gradients = (6 if steps == 1 else 6 + 10 * (steps - 1) + 8) * whole + 8 * share
    return gathers * (6 * share + 4 * whole) + gradients


def speed(recipe: Recipe, gpu: GpuModel, layout: PlannedLayout) -> Speed:
    """Seconds of one update, and what follows from them.

    - Arithmetic: 6 operations per weight and token, and attention (:func:`trainer.model.cost.flops_per_token`), a third
      more with recomputation, at the GPU's efficiency.
    - Tensor parallelism: each pass over a layer makes two gathers and two scatters of [micro-batch, sequence, hidden].
      There are a forward and a backward pass, and perhaps a recomputed one (Megatron, arXiv 2205.05198). Nothing hides
      this traffic.
    - FSDP over ranks: the weights in half precision, twice per micro-batch or once per update. The gradients in fp32,
      once per update, or once per micro-batch. :data:`EXPOSED` of this is not hidden.
    - Dropout's masks, where neither compilation nor the kernel makes them (:data:`EAGER_MASKS`).
    - FSDP within a GPU: :func:`copied`, at the bandwidth of its memory.
    - Optimizer: 28 bytes per parameter of the share, and 4 for the norm of the gradients, at the bandwidth of the
      memory that holds them.
    """
    model, world = recipe.model, layout.dp * layout.tp
    here, chosen = layout.of(recipe, gpu), policy_of(recipe, gpu, layout)
    tokens = recipe.data.global_batch * recipe.data.seq_len
    flops = cost.flops_per_token(recipe)
    worked = flops * (4 / 3 if layout.checkpoint_activations else 1)
    # The slowest rank has the most sequences.
    on_rank = ceil(recipe.data.global_batch / layout.dp) * recipe.data.seq_len
    arithmetic = worked * on_rank / layout.tp / (gpu.peak * 1e12 * gpu.efficiency)
    passes = 3 if layout.checkpoint_activations else 2
    exchanged = 4 * passes * model.num_layers * on_rank * model.hidden_size * HALF * (layout.tp - 1) / layout.tp
    parameters = cost.parameters(model)
    micro_steps = bytes_of.micro_steps(here, layout.dp)
    gathers = 1 if chosen.keeps_weights else 2 * micro_steps
    reductions = micro_steps if chosen.reduces_each else 1
    traffic = (HALF * gathers + GRADIENT * reductions) * parameters / layout.tp
    bandwidth = gpu.network if layout.nodes > 1 else gpu.link
    fsdp = EXPOSED * traffic * (layout.dp - 1) / layout.dp / (bandwidth * 1e9)
    local = REACHED * gpu.bandwidth * 1e9
    fsdp += copied(here, layout.dp, chosen) / local
    if model.dropout and not here.compiles(on_gpu=True) and "dropout_add_layer_norm" not in gpu.kernels:
        arithmetic += EAGER_MASKS * HALF * model.hidden_size * model.num_layers * on_rank / layout.tp / local
    share = parameters * recipe.parallel.replicas / world
    optimizer = 32 * (parameters / layout.nodes / (gpu.host_bandwidth * 1e9) if layout.offload else share / local)
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
    """The fastest layout that fits; of those within :data:`EQUALLY_FAST`, the one that needs the least memory.

    Offload is used only if nothing fits without it. None if nothing fits.

    Args:
        recipe: what to train.
        gpu: the GPUs.
        nodes: number of nodes.
        host_memory: GB of each node.
    """
    fitting = [plan for plan in plans(recipe, gpu, nodes) if _fits(plan, gpu, host_memory)]
    fitting = [p for p in fitting if not p.layout.offload] or fitting
    fastest = min((plan.speed.step_seconds for plan in fitting), default=0.0)
    equal = [plan for plan in fitting if plan.speed.step_seconds <= (1 + EQUALLY_FAST) * fastest]
    return min(equal, key=lambda plan: plan.memory.gpu, default=None)


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
        if gpu.per_node % tp or not divides or dp > recipe.data.global_batch or dp % recipe.parallel.replicas:
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
                    yield Plan(
                        layout=layout,
                        policy=policy_of(recipe, gpu, layout),
                        memory=memory(recipe, gpu, layout),
                        speed=speed(recipe, gpu, layout),
                    )


def _fits(plan: Plan, gpu: GpuModel, host_memory: float) -> bool:
    # A tenth of the host's memory is left for the operating system, the data and the checkpoints.
    return plan.memory.gpu <= gpu.memory and plan.memory.host * GIB <= 0.9 * host_memory * 1e9
