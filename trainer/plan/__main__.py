"""The command ``python -m trainer.plan``: say whether a size fits on given GPUs, how, and about how fast it trains.

Example: ``python -m trainer.plan --size 175b --gpu a100-80 --nodes 124``. The formulas are in
:mod:`trainer.plan.estimate`. With ``--serve`` it says what memory a size needs to be served
(:mod:`trainer.plan.serving`).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from opt_ops.contract.exit_codes import ExitCode
from trainer import recipes
from trainer.console import print_line
from trainer.errors import UserError
from trainer.model import cost
from trainer.plan import estimate, serving
from trainer.plan.estimate import GIB, Memory, Plan
from trainer.plan.hardware import GPUS, GpuModel
from trainer.plan.peer_copies import PeerCopyCost, peer_copy_cost
from trainer.recipes import Recipe

_TOO_OLD = "The compilers of the kernels do not support its architecture."


def main(arguments: list[str] | None = None) -> int:
    """Print the plan. Return exit code 0 if it fits, 78 if nothing fits or the question is wrong."""
    options = _parser().parse_args(arguments)
    try:
        name = f"opt-{options.size.lower().removeprefix('opt-')}"
        recipe = recipes.build(name, options.set)
        if options.serve:
            return _serve(name, recipe, options)
        gpu = _gpu(options)
        _require_possible(recipe, gpu, options.nodes)
        ran = _ops(recipe, gpu)
    except UserError as error:
        print_line(f"error: {error}", sys.stderr)
        return ExitCode.USER_ERROR
    gpu = replace(gpu, kernels=tuple(op for op, how in ran.items() if how == "fused"))
    host_memory = options.host_memory or gpu.host_memory
    found = estimate.best(recipe, gpu, options.nodes, host_memory)
    if options.output == "json":
        print_line(json.dumps(_as_json(name, gpu, options, found, recipe) | {"kernels": ran}, indent=1))
    else:
        lines = [*_as_text(name, gpu, options.nodes, host_memory, found, recipe)]
        print_line("\n".join([*lines, *(_kernel_lines(gpu, ran) if found else ())]))
    return ExitCode.DONE if found else ExitCode.USER_ERROR


def _serve(name: str, recipe: Recipe, options: argparse.Namespace) -> int:
    """Print what serving needs. Return 78 if a node of the GPUs that are named is not enough."""
    if options.requests < 1 or options.gpus_per_node < 1:
        raise UserError("--requests and --gpus-per-node must be at least 1.")
    model = recipe.model
    needs = serving.serving_memory(model, options.requests)
    chosen = [GPUS[options.gpu]] if options.gpu else [*GPUS.values()]
    gpus = {
        gpu.name: serving.gpus_needed(needs, replace(gpu, per_node=options.gpus_per_node), model.num_heads)
        for gpu in chosen
    }
    if options.output == "json":
        found = {"recipe": name, "positions": model.max_positions, "requests": options.requests, "gpus": gpus}
        print_line(json.dumps(found | {"memory_gib": asdict(needs) | {"total": needs.total}}, indent=1))
    else:
        print_line("\n".join(_serving_lines(name, recipe, options, needs, gpus)))
    return ExitCode.USER_ERROR if options.gpu and None in gpus.values() else ExitCode.DONE


def _serving_lines(
    name: str,
    recipe: Recipe,
    options: argparse.Namespace,
    needs: serving.ServingMemory,
    gpus: Mapping[str, int | None],
) -> Iterator[str]:
    positions = recipe.model.max_positions
    yield f"{name}, to be served: {cost.parameters(recipe.model) / 1e9:.3g}B parameters, {positions:,} positions"
    yield f"  weights          {needs.weights:,.2f} GiB, 2 bytes per parameter"
    yield (
        f"  KV cache         {needs.requests:,.2f} GiB for {options.requests} requests at once, each of "
        f"{positions:,} tokens: {needs.request:,.3f} GiB, {needs.token * 1024**2:,.0f} KiB per token"
    )
    yield f"  together         {needs.total:,.2f} GiB"
    yield f"GPUs of one node, with {serving.USED:.0%} of their memory in use:"
    for gpu, count in gpus.items():
        yield f"  {gpu:<17}{count or f'more than {options.gpus_per_node}'}"
    yield "The engine transformers answers one request at a time: it needs the cache of one."


def _gpu(options: argparse.Namespace) -> GpuModel:
    if options.gpu is None or options.nodes is None:
        raise UserError("--gpu and --nodes are needed, unless --serve asks about serving.")
    return replace(GPUS[options.gpu], per_node=options.gpus_per_node)


def _require_possible(recipe: Recipe, gpu: GpuModel, nodes: int) -> None:
    if nodes < 1 or gpu.per_node < 1:
        raise UserError("--nodes and --gpus-per-node must be at least 1.")
    if not any(True for _ in estimate.plans(recipe, gpu, nodes)):
        raise UserError(
            f"{nodes * gpu.per_node} GPUs cannot share the {recipe.data.global_batch} sequences of a batch: use fewer."
        )


def _ops(recipe: Recipe, gpu: GpuModel) -> Mapping[str, str]:
    """How each op would run on this GPU: ``fused``, or ``reference`` with the reason."""
    from trainer.kernels.choice import choose  # imports torch, so errors that need no torch are found first
    from trainer.model.precision import DTYPES

    if _too_old(gpu):
        if recipe.kernels == "on":
            raise UserError(f"kernels=on does not work on {gpu.name}. {_TOO_OLD} Use --set kernels=auto.")
        recipe = replace(recipe, kernels="off")
    return choose(recipe.kernels, gpu.architecture, DTYPES[gpu.precision]).ran


def _too_old(gpu: GpuModel) -> bool:
    from trainer.kernels.jit import LEAST_ARCHITECTURE  # imports torch

    return gpu.architecture < LEAST_ARCHITECTURE


def _kernel_lines(gpu: GpuModel, ran: Mapping[str, str]) -> Iterator[str]:
    yield f"Kernels of this project: {', '.join(gpu.kernels) or 'none'}. PyTorch computes the rest."
    if _too_old(gpu):
        yield f"  {gpu.name}: PyTorch computes all ops. {_TOO_OLD}"
        return
    for op, how in ran.items():
        yield f"  {op:<23}{how}"


def _settings(plan: Plan, gpu: GpuModel) -> list[str]:
    """The values of ``--set`` for this plan."""
    layout = plan.layout
    return [
        f"parallel.tp={layout.tp}",
        f"data.micro_batch={layout.micro_batch}",
        f"checkpoint_activations={str(layout.checkpoint_activations).lower()}",
        f"parallel.offload={str(layout.offload).lower()}",
        f"precision={gpu.precision}",
    ]


def _as_json(
    name: str, gpu: GpuModel, options: argparse.Namespace, found: Plan | None, recipe: Recipe
) -> dict[str, Any]:
    shown = found or estimate.smallest(recipe, gpu, options.nodes, offload=False)
    return {
        "recipe": name,
        "gpu": asdict(gpu),
        "nodes": options.nodes,
        "fits": found is not None,
        "layout": asdict(shown.layout),
        "policy": asdict(shown.policy),
        "settings": _settings(shown, gpu),
        "memory_gib": asdict(shown.memory) | {"gpu": shown.memory.gpu},
        "speed": asdict(shown.speed) if found else None,
        "peer_copies": asdict(_copies(shown, gpu, recipe)),
    }


def _as_text(
    name: str, gpu: GpuModel, nodes: int, host_memory: float, found: Plan | None, recipe: Recipe
) -> Iterator[str]:
    world = nodes * gpu.per_node
    yield (
        f"{name}: {cost.parameters(recipe.model) / 1e9:.3g}B parameters, "
        f"{recipe.data.global_batch * recipe.data.seq_len:,} tokens per update, {recipe.steps:,} updates"
    )
    yield f"on {world} {gpu.name} ({nodes} × {gpu.per_node}), {gpu.precision}"
    yield ""
    if found is None:
        yield from _nothing_fits(gpu, nodes, host_memory, recipe)
        return
    speed, recipe_here = found.speed, found.layout.of(recipe, gpu)
    yield f"It fits{', with parameters and optimizer in host memory' if found.layout.offload else ''}."
    yield f"  memory per GPU   {found.memory.gpu:,.1f} of {gpu.memory:g} GiB, at the peak of an update"
    yield from _memory_lines(found.memory)
    held = "parameters, optimizer and " if found.layout.offload else ""
    yield (
        f"  memory per host  {found.memory.host * GIB / 1e9:,.0f} of {host_memory:,.0f} GB, pinned: {held}"
        "the copy of weights and moments for checkpoints"
    )
    yield f"  layout           dp {found.layout.dp} × tp {found.layout.tp}"
    yield f"  settings         {' '.join('--set ' + setting for setting in _settings(found, gpu))}"
    yield f"  FSDP             {_fsdp(found)}"
    yield f"  layers           {'compiled' if recipe_here.compiles(on_gpu=True) else 'not compiled'}"
    yield "Estimated speed, within about a fifth:"
    yield f"  update           {speed.step_seconds:,.2f} s, {speed.tokens_per_second:,.0f} tokens/s"
    yield f"  MFU              {speed.mfu:.0%} (attention causal), {speed.mfu_full:.0%} (full)"
    recomputation = " and recomputation" if found.layout.checkpoint_activations else ""
    yield f"  per GPU          {speed.tflops:.0f} TFLOP/s with full attention{recomputation}"
    billions = recipe.steps * recipe.data.global_batch * recipe.data.seq_len / 1e9
    yield f"  {f'{billions:,.0f}B tokens':<17}{speed.days:,.1f} days of training without interruptions"
    yield from _copy_lines(found, gpu, host_memory, recipe)


def _copies(plan: Plan, gpu: GpuModel, recipe: Recipe) -> PeerCopyCost:
    return peer_copy_cost(recipe, gpu, plan.layout, plan.speed.step_seconds)


def _copy_lines(plan: Plan, gpu: GpuModel, host_memory: float, recipe: Recipe) -> Iterator[str]:
    copies = _copies(plan, gpu, recipe)
    if not copies.every:
        yield "Peer copies: none. If a rank is lost, all ranks must be restarted."
        return
    yield f"Peer copies after every {'update' if copies.every == 1 else f'{copies.every} updates'}, by arithmetic:"
    yield f"  each             {copies.gb_per_gpu:,.2f} GB per GPU, {copies.traffic_share:.1%} of FSDP's traffic"
    yield (
        f"  time             {1000 * copies.to_host_seconds:,.0f} ms from GPU to host, "
        f"{1000 * copies.to_buddy_seconds:,.0f} ms from host to buddy"
    )
    yield f"  memory           {copies.host_gb_per_gpu:,.1f} GB per GPU, {copies.host_gb_per_node:,.0f} GB per host"
    if plan.memory.host * GIB / 1e9 + copies.host_gb_per_node > 0.9 * host_memory:
        yield (
            "  They do not fit into the memory of the host. Use --set peer_copies.versions=1 for half of it, or "
            "--set peer_copies.every=0 for none."
        )


def _fsdp(plan: Plan) -> str:
    weights = "are kept over an update" if plan.policy.keeps_weights else "are gathered for each pass"
    sums = "each micro-batch" if plan.policy.reduces_each else "the last micro-batch"
    return f"weights {weights}; gradients are summed after {sums}"


def _nothing_fits(gpu: GpuModel, nodes: int, host_memory: float, recipe: Recipe) -> Iterator[str]:
    plain, offloaded = (estimate.smallest(recipe, gpu, nodes, offload=offload) for offload in (False, True))
    yield "Nothing fits."
    yield f"  in GPU memory    at least {plain.memory.gpu:,.1f} GiB on each GPU of {gpu.memory:g} GiB"
    yield from _memory_lines(plain.memory)
    yield (
        f"  with offload     {offloaded.memory.gpu:,.1f} GiB on each GPU of {gpu.memory:g} GiB, and on each host "
        f"{offloaded.memory.host * GIB / 1e9:,.0f} GB of {0.9 * host_memory:,.0f} GB (--host-memory minus a tenth)"
    )
    if more := estimate.enough_nodes(recipe, gpu, nodes, host_memory):
        yield f"  {more} nodes are enough."


def _memory_lines(memory: Memory) -> Iterator[str]:
    for part in estimate.PARTS:
        yield f"    {part:<15}{getattr(memory, part):10,.2f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.plan",
        description="Say whether an OPT fits on given GPUs, how, and about how long its training takes.",
        allow_abbrev=False,
    )
    sizes = [name.removeprefix("opt-") for name in recipes.RECIPES]
    parser.add_argument("--size", required=True, help="one of " + ", ".join(sizes))
    parser.add_argument("--gpu", choices=GPUS, help="the GPUs of each node")
    parser.add_argument("--nodes", type=int, help="number of nodes")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs in each node (default: 8)")
    parser.add_argument(
        "--host-memory", type=float, metavar="GB", help="memory of each node (default: that of NVIDIA's DGX)"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="change a setting of the recipe; repeatable"
    )
    parser.add_argument("--serve", action="store_true", help="say what memory is needed to serve it instead")
    parser.add_argument(
        "--requests", type=int, default=8, metavar="N", help="with --serve: requests at once (default: 8)"
    )
    parser.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="form of the answer (default: text)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
