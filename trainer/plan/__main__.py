"""``python -m trainer.plan --size 175b --gpu a100-80 --nodes 124``: what fits, how, how fast, before a node is booked.

Memory is arithmetic over what the trainer keeps with its own engine, FSDP2 × tensor parallelism. Speed is an estimate:
a sum of times for arithmetic, for what tensor parallelism exchanges, for the part of FSDP's traffic that nothing hides,
and for the optimizer, with numbers taken from published runs (:mod:`trainer.plan.hardware`, :data:`EXPOSED`). On those
runs it is within a fifth of what was reported; tests/trainer/test_plan.py lists them. None of it was measured on this
project's own runs.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from trainer import recipes
from trainer.console import say
from trainer.errors import UserError
from trainer.model import cost
from trainer.plan.hardware import GPUS, Gpu
from trainer.recipes import Recipe

GIB = 2**30

# The part of FSDP's traffic that computation does not hide: fitted to OPT-175B on 992 A100 (arXiv 2205.01068).
EXPOSED = 0.25

# What CUDA, NCCL and the allocator's fragments take, of the GPU's memory. An assumption.
OVERHEAD = 0.08

_MASTER, _MOMENTS, _GRADIENT, _HALF = 4, 8, 4, 2  # bytes per parameter: fp32, 2 × fp32, fp32, bf16 or fp16


PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a recipe is spread: what ``--set`` would say."""

    nodes: int
    dp: int
    tp: int
    micro_batch: int
    checkpoint_activations: bool
    offload: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """GiB on each GPU, and on each host where parameters and optimizer are offloaded."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    host: float

    @property
    def gpu(self) -> float:
        """All parts that lie on the GPU."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """An estimate. ``mfu`` counts causal attention and no recomputation; ``tflops`` counts both as people report it."""

    step_seconds: float
    tokens_per_second: float
    tflops: float
    mfu: float
    mfu_full: float
    days: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One layout with what it needs and gives."""

    layout: Layout
    memory: Memory
    speed: Speed


def memory(recipe: Recipe, gpu: Gpu, layout: Layout) -> Memory:
    """What the trainer keeps, by part.

    With P parameters on S = dp ranks that share them, t = tp: fp32 master weights 4·P/(t·S), moments 8·P/(t·S), fp32
    gradients 4·P/(t·S). Where several micro-batches make an update and memory is not short (no recomputation, no
    offload), the gradients of all P/t are kept in fp32 until the last of them, which saves traffic.

    Buffers are two layers gathered in half precision, one being prefetched; the gradient of one in half precision and,
    for its reduction, in fp32; the embeddings gathered throughout; and the logits: :func:`logits`.
    """
    model, tp = recipe.model, layout.tp
    parameters = cost.parameters(model)
    share = parameters / (tp * layout.dp)
    on_gpu = 0 if layout.offload else 1
    kept_whole = _micro_steps(recipe, layout) > 1 and not _reduces_each(layout)
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


def activations(recipe: Recipe, layout: Layout) -> float:
    """Bytes that the backward pass needs of the layers, for one micro-batch.

    Each token and layer keeps 28·d bytes in half precision: two inputs of norms and two outputs (8), queries, keys and
    values (6), attention's output (2), ReLU's output (8), two masks of dropout (4). Tensor with sequence parallelism
    divides them, but of the norms' outputs it keeps the gathered sequence besides (4·d). With recomputation, each layer
    keeps its input (2·d), and one layer at a time has all. The formula is tested against what autograd saves.
    """
    model = recipe.model
    tokens = layout.micro_batch * recipe.data.seq_len
    layer = 28 * model.hidden_size / layout.tp + (4 * model.hidden_size if layout.tp > 1 else 0)
    if layout.checkpoint_activations:
        return tokens * (model.num_layers * 2 * model.hidden_size / layout.tp + layer)
    return tokens * model.num_layers * layer


def logits(recipe: Recipe, tokens: int) -> float:
    """Bytes of the output layer: per token and word, the logits, hidden padding, fp32, log-softmax and its gradient."""
    return tokens * recipe.model.padded_vocab_size * (2 * _HALF + 3 * 4)


def speed(recipe: Recipe, gpu: Gpu, layout: Layout) -> Speed:
    """Seconds of one update, and what follows from them.

    Arithmetic: 6 operations per weight and token and attention's (:func:`trainer.model.cost.flops_per_token`), a third
    more with recomputation, at the GPU's efficiency. Tensor parallelism: in each layer two gathers and two scatters of
    [micro-batch, sequence, hidden] in the forward pass, as many in the backward pass, and in the recomputed one
    (Megatron, arXiv 2205.05198), which nothing hides. FSDP: the weights in half precision twice per micro-batch, and
    the gradients in fp32 once, or once per micro-batch where memory is short; :data:`EXPOSED` of it is not hidden. The
    optimizer: 28 bytes per parameter, at the memory bandwidth of the GPU, which is nothing, or of the host.
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
    micro_steps = _micro_steps(recipe, layout)
    reductions = micro_steps if _reduces_each(layout) else 1
    traffic = (2 * _HALF * micro_steps + _GRADIENT * reductions) * parameters / layout.tp
    bandwidth = gpu.network if layout.nodes > 1 else gpu.link
    fsdp = EXPOSED * traffic * (layout.dp - 1) / layout.dp / (bandwidth * 1e9)
    optimizer = 28 * parameters / layout.nodes / (gpu.host_bandwidth * 1e9) if layout.offload else 0
    seconds = arithmetic + exchanged / (gpu.link * 1e9) + fsdp + optimizer
    attention = 6 * model.num_layers * model.hidden_size * recipe.data.seq_len  # the half that the mask leaves out
    done = tokens / seconds / world / 1e12
    return Speed(
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        tflops=(flops + attention) * (4 / 3 if layout.checkpoint_activations else 1) * done,
        mfu=flops * done / gpu.peak,
        mfu_full=(flops + attention) * done / gpu.peak,
        days=recipe.steps * seconds / 86400,
    )


def best(recipe: Recipe, gpu: Gpu, nodes: int, host_memory: float) -> Plan | None:
    """The fastest layout that fits, on the host's memory only where no other does; None where nothing fits."""
    fitting = [plan for plan in _plans(recipe, gpu, nodes) if _fits(plan, gpu, host_memory)]
    return min(fitting, key=lambda plan: (plan.layout.offload, plan.speed.step_seconds), default=None)


def nearest(recipe: Recipe, gpu: Gpu, nodes: int, *, offload: bool) -> Plan:
    """The layout that needs the least memory, whether it fits or not."""
    plans = [plan for plan in _plans(recipe, gpu, nodes) if plan.layout.offload == offload]
    return min(plans, key=lambda plan: (plan.memory.gpu, plan.memory.host))


def _fits(plan: Plan, gpu: Gpu, host_memory: float) -> bool:
    # A tenth of the host is the operating system's, the data's and the checkpoints'.
    return plan.memory.gpu <= gpu.memory and plan.memory.host * GIB <= 0.9 * host_memory * 1e9


def _plans(recipe: Recipe, gpu: Gpu, nodes: int) -> Iterator[Plan]:
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
                    layout = Layout(
                        nodes=nodes,
                        dp=dp,
                        tp=tp,
                        micro_batch=micro_batch,
                        checkpoint_activations=recompute,
                        offload=offload,
                    )
                    yield Plan(layout=layout, memory=memory(recipe, gpu, layout), speed=speed(recipe, gpu, layout))


def _micro_steps(recipe: Recipe, layout: Layout) -> int:
    return ceil(ceil(recipe.data.global_batch / layout.dp) / layout.micro_batch)


def _reduces_each(layout: Layout) -> bool:
    """Whether gradients are reduced after each micro-batch; see :class:`trainer.parallel.fsdp2.Fsdp2Engine`."""
    return layout.checkpoint_activations or layout.offload


def settings(plan: Plan, gpu: Gpu) -> list[str]:
    """What to give to ``--set`` for this plan."""
    layout = plan.layout
    return [
        f"parallel.tp={layout.tp}",
        f"data.micro_batch={layout.micro_batch}",
        f"checkpoint_activations={str(layout.checkpoint_activations).lower()}",
        f"parallel.offload={str(layout.offload).lower()}",
        f"precision={gpu.precision}",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the plan; exit code 0 when it fits, 78 when nothing does or the question is no question."""
    options = _parser().parse_args(arguments)
    try:
        name = f"opt-{options.size.lower().removeprefix('opt-')}"
        recipe = recipes.build(name, options.set)
        gpu = replace(GPUS[options.gpu], per_node=options.gpus_per_node)
        _require_possible(recipe, gpu, options.nodes)
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 78
    host_memory = options.host_memory or gpu.host_memory
    found = best(recipe, gpu, options.nodes, host_memory)
    if options.output == "json":
        say(json.dumps(_as_json(name, gpu, options, found, recipe), indent=1))
    else:
        say("\n".join(_as_text(name, gpu, options.nodes, host_memory, found, recipe)))
    return 0 if found else 78


def _require_possible(recipe: Recipe, gpu: Gpu, nodes: int) -> None:
    if nodes < 1 or gpu.per_node < 1:
        raise UserError("--nodes, --gpus-per-node: at least one of each is needed.")
    if not any(True for _ in _plans(recipe, gpu, nodes)):
        raise UserError(
            f"{nodes * gpu.per_node} GPUs cannot share the {recipe.data.global_batch} sequences of a batch: take fewer."
        )


def _as_json(name: str, gpu: Gpu, options: argparse.Namespace, found: Plan | None, recipe: Recipe) -> dict[str, Any]:
    shown = found or nearest(recipe, gpu, options.nodes, offload=False)
    return {
        "recipe": name,
        "gpu": asdict(gpu),
        "nodes": options.nodes,
        "fits": found is not None,
        "layout": asdict(shown.layout),
        "settings": settings(shown, gpu),
        "memory_gib": asdict(shown.memory) | {"gpu": shown.memory.gpu},
        "speed": asdict(shown.speed) if found else None,
    }


def _as_text(name: str, gpu: Gpu, nodes: int, host_memory: float, found: Plan | None, recipe: Recipe) -> Iterator[str]:
    world = nodes * gpu.per_node
    yield (
        f"{name}: {cost.parameters(recipe.model) / 1e9:.3g}B parameters, "
        f"{recipe.data.global_batch * recipe.data.seq_len:,} tokens per update, {recipe.steps:,} updates"
    )
    yield f"on {world} {gpu.name} ({nodes} × {gpu.per_node}), {gpu.precision}"
    yield ""
    if found is None:
        plain, offloaded = (nearest(recipe, gpu, nodes, offload=offload) for offload in (False, True))
        yield "Nothing fits."
        yield f"  in GPU memory    {plain.memory.gpu:,.1f} GiB on each of {gpu.memory:g} GiB, at least"
        yield from _memory_lines(plain.memory)
        yield (
            f"  with offload     {offloaded.memory.gpu:,.1f} GiB on each GPU of {gpu.memory:g} GiB, and on each host "
            f"{offloaded.memory.host * GIB / 1e9:,.0f} GB of {0.9 * host_memory:,.0f} GB (--host-memory, less a tenth)"
        )
        if more := _enough_nodes(recipe, gpu, nodes, host_memory):
            yield f"  {more} nodes would do."
        return
    speed = found.speed
    yield f"It fits{', with parameters and optimizer in host memory' if found.layout.offload else ''}."
    yield f"  memory per GPU   {found.memory.gpu:,.1f} of {gpu.memory:g} GiB"
    yield from _memory_lines(found.memory)
    if found.layout.offload:
        yield f"  memory per host  {found.memory.host * GIB / 1e9:,.0f} of {host_memory:,.0f} GB"
    yield f"  layout           dp {found.layout.dp} × tp {found.layout.tp}"
    yield f"  settings         {' '.join('--set ' + setting for setting in settings(found, gpu))}"
    yield "Expected, as an estimate within about a fifth:"
    yield f"  update           {speed.step_seconds:,.2f} s, {speed.tokens_per_second:,.0f} tokens/s"
    yield f"  MFU              {speed.mfu:.0%} (attention causal), {speed.mfu_full:.0%} (full)"
    yield f"  per GPU          {speed.tflops:.0f} TFLOP/s with full attention{_recomputed(found)}"
    billions = recipe.steps * recipe.data.global_batch * recipe.data.seq_len / 1e9
    yield f"  {f'{billions:,.0f}B tokens':<17}{speed.days:,.1f} days of training, if nothing breaks"


def _recomputed(plan: Plan) -> str:
    return " and recomputation" if plan.layout.checkpoint_activations else ""


def _memory_lines(memory: Memory) -> Iterator[str]:
    for part in PARTS:
        yield f"    {part:<15}{getattr(memory, part):10,.2f}"


def _enough_nodes(recipe: Recipe, gpu: Gpu, nodes: int, host_memory: float) -> int | None:
    """The smallest number of nodes, in steps of a half more, on which something fits."""
    while nodes * gpu.per_node <= 8 * recipe.data.global_batch:
        nodes = ceil(nodes * 1.5)
        if best(recipe, gpu, nodes, host_memory):
            return nodes
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.plan",
        description="Say whether an OPT fits on given GPUs, how, and about how long its training takes.",
        allow_abbrev=False,
    )
    sizes = [name.removeprefix("opt-") for name in recipes.RECIPES]
    parser.add_argument("--size", required=True, help="one of " + ", ".join(sizes))
    parser.add_argument("--gpu", required=True, choices=GPUS, help="what each node has")
    parser.add_argument("--nodes", required=True, type=int, help="how many nodes")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs in each (default: 8)")
    parser.add_argument("--host-memory", type=float, metavar="GB", help="of a node (default: that of NVIDIA's DGX)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change the recipe; repeatable")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
