"""What watching costs the trainer: monitors beside a step without them; evaluation, saving and logging in a run.

    PYTHONPATH=. python benchmarks/overheads.py --rounds 20 --steps 200

Norms: one process takes the same step over and over, in turn with each variant of what is measured of gradients and
parameters before the update. CPU time of the process counts, because the machine may be shared; a GPU's kernels are
waited for, and its wall time counts. Variants:

- clip: the global norm alone, by `torch.nn.utils.get_total_norm`. Clipping needs it; this is the base;
- blocks: the norms of the gradients of each block, from which the global one follows: every step of the trainer;
- parameters: those of the parameters as well;
- updates: those of the last update as well: every `log_every`-th step;
- one by one: a norm of each tensor's gradient and one of its values, each brought to the host, as metaseq does.

Attention logits: the sample that every `log_every`-th step takes in its forward pass, all layers together.

A run: `python -m trainer` with telemetry, evaluation and checkpoints; what it tells of itself is added up.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from opt_ops.contract.environment import Place
from trainer import recipes
from trainer.data.samples import Samples
from trainer.model.opt import DecoderLayer
from trainer.parallel import mesh
from trainer.parallel.build import build
from trainer.parallel.engine import Engine
from trainer.recipes import Recipe
from trainer.step.attention_logits import sampling
from trainer.step.measured import Progress
from trainer.step.norms import BlockNorms
from trainer.step.step import advanced, forward_backward

# opt-tiny, a million parameters. As in OPT-125M, an evaluation takes as many sequences as a batch has.
SHAPE = ("data.global_batch=16", "data.micro_batch=16", "evaluate_sequences=16")


def clip(engine: Engine, norms: BlockNorms) -> float:
    """The base."""
    return get_total_norm(engine.gradients()).item()


def blocks(engine: Engine, norms: BlockNorms) -> float:
    """As in every step."""
    return math.sqrt(sum(norms.shares(engine.gradients()).tolist()))


def parameters(engine: Engine, norms: BlockNorms) -> float:
    """Without the norms of updates."""
    return math.sqrt(sum(torch.cat([norms.shares(engine.gradients()), norms.shares(engine.parameters())]).tolist()))


def updates(engine: Engine, norms: BlockNorms) -> float:
    """As in every `log_every`-th step."""
    shares = [norms.shares(engine.gradients()), norms.shares(engine.parameters()), norms.update_shares()]
    return math.sqrt(sum(torch.cat(shares).tolist()))


def one_by_one(engine: Engine, norms: BlockNorms) -> float:
    """As metaseq's log has it."""
    return sum(tensor.norm().item() for tensor in (*engine.gradients(), *engine.parameters()))


VARIANTS: dict[str, Callable[[Engine, BlockNorms], float]] = {
    "clip": clip,
    "blocks": blocks,
    "parameters": parameters,
    "updates": updates,
    "one by one": one_by_one,
}


def clock() -> float:
    """Seconds: of the GPU's wall clock once it has finished, else of this process's CPU time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def norms_beside_a_step(recipe: Recipe, engine: Engine, data: Samples, rounds: int) -> dict[str, tuple[float, float]]:
    """By variant: median seconds of the norms, and of a whole step with them."""
    norms, progress = BlockNorms(engine), Progress()
    divisor = forward_backward(engine, data, recipe, progress).divisor
    engine.update(1.0, 1e-4, divisor)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for turn in range(rounds + 2):
        for name, measure in VARIANTS.items():
            begin = clock()
            forward_backward(engine, data, recipe, progress)
            before = clock()
            measure(engine, norms)
            after = clock()
            engine.update(1.0, 1e-4, divisor)
            progress = advanced(progress, recipe)
            if turn >= 2:  # the first steps allocate
                taken[name].append((after - before, clock() - begin))
    return {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in taken.items()}


def sample_in_a_step(recipe: Recipe, engine: Engine, data: Samples, rounds: int) -> float:
    """Median seconds of the sample of attention logits, over all layers of a forward pass."""
    inputs, targets = data.batch(0, recipe.data.micro_batch)
    taken = []
    for _ in range(rounds + 2):
        seconds = 0.0
        with sampling(engine, wanted=True):
            sample = engine.model.before_layer
            assert sample

            def timed(
                layer: DecoderLayer, stream: Tensor, branch: Tensor | None, sample: Callable[..., None] = sample
            ) -> None:
                nonlocal seconds
                engine.gather(layer)  # the forward pass has this to do in any case
                begin = clock()
                sample(layer, stream, branch)
                seconds += clock() - begin

            engine.model.before_layer = timed
            engine.loss(inputs.to(engine.layout.device), targets.to(engine.layout.device))
        taken.append(seconds)
    return statistics.median(taken[2:])


def run(folder: Path, steps: int) -> list[dict[str, float]]:
    """The telemetry of one run that evaluates and saves every hundred updates and logs every ten."""
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in topics.values()))
    settings = [*SHAPE, f"steps={steps}", "checkpoint_every=100", "evaluate_every=100", "log_every=10"]
    command = [
        *(sys.executable, "-m", "trainer", "--recipe", "opt-tiny", "--data", str(text), "--valid", f"manual={text}"),
        *("--run-dir", str(folder / "a1"), "--checkpoint-dir", str(folder / "checkpoints")),
        *(word for pair in settings for word in ("--set", pair)),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "a1" / "telemetry.jsonl").read_text().splitlines()]


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    recipe = recipes.build("opt-tiny", SHAPE)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, {device}; {arguments.rounds} rounds, {arguments.steps} steps\n")
    engine = build(recipe, mesh.start(Place(0, 1, 0), 1, 1))
    ids = np.random.RandomState(0).randint(4, recipe.model.vocab_size, 100_000).astype(np.uint16)
    data = Samples(ids, recipe.data.seq_len, recipe.seed)
    found = norms_beside_a_step(recipe, engine, data, arguments.rounds)
    sample = sample_in_a_step(recipe, engine, data, arguments.rounds)
    base = found["clip"][0]
    whole = found["clip"][1]
    print("| norms | ms | more than clip, ms | share of a step |\n| --- | ---: | ---: | ---: |")
    for name, (seconds, _) in found.items():
        print(f"| {name} | {1e3 * seconds:.2f} | {1e3 * (seconds - base):.2f} | {(seconds - base) / whole:.2%} |")
    print(f"| attention logits | {1e3 * sample:.2f} | {1e3 * sample:.2f} | {sample / whole:.2%} |")
    print(f"\nA step with clip alone: {1e3 * whole:.1f} ms.\n")
    with tempfile.TemporaryDirectory() as folder:
        lines = run(Path(folder), arguments.steps)
    wall = sum(line["step_seconds"] + line["eval_seconds"] for line in lines[1:])
    print("| part | s | share of the time |\n| --- | ---: | ---: |")
    total = 0.0
    for name in ("eval_seconds", "save_seconds", "log_seconds"):
        seconds = sum(line[name] for line in lines[1:])
        total += seconds
        print(f"| `{name}` | {seconds:.3f} | {seconds / wall:.2%} |")
    print(f"| together | {total:.3f} | {total / wall:.2%} |\n\nThe run: {wall:.1f} s after its first step.")


if __name__ == "__main__":
    main()
