"""By how much the monitors lead the loss: tiny models that are made to diverge, beside healthy ones of the same kind.

    python -m benchmarks.leads --seed 1 --count 16 --healthy 8 -o json

Each case trains a model of some thirty thousand parameters in this process, on CPU, through the trainer's own step. It
learns a text for a while. Then one thing leaves its usual value a little more with every update, until the model
forgets what it has learned:

- lr: the learning rate grows;
- beta2: the same, and 0.9999 makes the second moment slow from the start;
- epsilon: begins so large that it decides the size of the updates, and shrinks;
- init: the weights begin too large, and the learning rate warms up for the whole run.

Every detector sees the same points. The lead is the step of the loss detector's first finding less that of the
monitor's first one after the fault began. A monitor that has found nothing by the end of the run did not lead. Findings
before a fault, and all of those of healthy runs, are false alerts. These are drills, on models far smaller than those
that the monitors are for.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opt_ops.contract.environment import Place
from opt_ops.core.detect.activations import ActivationDetector
from opt_ops.core.detect.growth import Growths
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.detect.point import Point
from opt_ops.core.detect.update_norm import UpdateNormDetector
from opt_ops.core.failures.classes import FailureClass
from trainer import optim, recipes
from trainer.data.samples import Samples
from trainer.model.opt import OPT
from trainer.parallel import mesh
from trainer.parallel.engine import Engine, Shard
from trainer.parallel.mesh import Layout
from trainer.recipes import Recipe
from trainer.step.measured import Progress, StepMeasurements
from trainer.step.norms import BlockNorms
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import advanced, forward_backward, measure

SCHEMA = "opt-ops/leads/1"
KINDS = ("lr", "beta2", "epsilon", "init")
OF_THE_LOSS = (
    FailureClass.LOSS_SPIKE,
    FailureClass.LOSS_DRIFT,
    FailureClass.UNDECLARED_CHANGE,
    FailureClass.NON_FINITE_LOSS,
)
"""What the loss detector finds in the loss itself. A learning rate that leaves its path it tells at once, too."""
STEPS = 700
LOG_EVERY = 2
WARM_UP = 60
EPSILON = 0.1  # at first, where it decides; as large as the largest gradients
SHAPE = (
    "model.vocab_size=256",
    "model.max_positions=32",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.dropout=0.0",
    "data.seq_len=32",
    "data.global_batch=32",
    "data.micro_batch=32",
)


class AttentionLogits:
    """A monitor that was tried: the largest attention logit of a layer, by the same sum of evidence as update norms.

    Growth up to 10 is taken for harmless: e to that power is about the number of keys that compete for attention.
    """

    def __init__(self) -> None:
        self._growths = Growths(harmless=math.log(10.0))

    def observe(self, point: Point) -> list[Point]:
        """Take in the next line; the points at which a layer's logits are found to grow."""
        logits = enumerate(point.attn_logits or ())
        grown = self._growths.observe(point, {f"layers.{i}": math.log(max(1.0, each)) for i, each in logits})
        return [point] if grown else []


MONITORS: dict[str, Callable[[], Any]] = {
    "update_norm": UpdateNormDetector,
    "attention_logit": AttentionLogits,
    "activation_norm": ActivationDetector,
}


class PlainEngine(Engine):
    """One process with plain tensors: sharding costs more than the computation of so small a model."""

    def __init__(self, recipe: Recipe, layout: Layout) -> None:
        self.model, self.layout = OPT(recipe.model, recipe.seed), layout
        self.optimizer = optim.build(self.model.parameters(), recipe.optim)
        self.shards = [Shard(name, parameter, 1) for name, parameter in self.model.named_parameters()]

    def zero_grad(self) -> None:
        """See the base class."""
        self.model.zero_grad()

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """See the base class."""
        return nullcontext()

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        logits, activation_norm = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), activation_norm

    def first_position(self, seq_len: int) -> int:  # noqa: ARG002
        """See the base class."""
        return 0

    def local(self, tensor: Tensor) -> Tensor:
        """See the base class."""
        return tensor

    def state(self) -> dict[str, dict[str, Any]]:
        """See the base class."""
        return {"model": dict(self.model.named_parameters()), "optimizer": {}}


@dataclass(frozen=True, slots=True)
class Case:
    """One run. `speed` is by what factor the fault grows with every update, and `begins` its first update."""

    id: str
    kind: str
    seed: int
    layers: int
    lr: float
    begins: int
    speed: float

    def settings(self) -> list[str]:
        """Of the recipe, beside `SHAPE`."""
        epsilon = EPSILON if self.kind == "epsilon" else 1e-8
        std = 0.3 if self.kind == "init" else 0.02
        betas = "0.9,0.9999" if self.kind == "beta2" else "0.9,0.95"
        return [
            f"seed={self.seed}",
            f"model.num_layers={self.layers}",
            f"model.init_std={std}",
            f"optim.eps={epsilon}",
            f"optim.betas={betas}",
        ]

    def lr_at(self, step: int) -> float:
        """The learning rate of an update."""
        if self.kind == "init":
            return self.lr * self.speed ** (step - 200)
        warm = self.lr * min(1.0, step / WARM_UP) * (100 if self.kind == "epsilon" else 1)
        return warm * self.speed ** max(0, step - self.begins) if self.kind in ("lr", "beta2") else warm

    def disturb(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set what else the update uses."""
        group = optimizer.param_groups[0]
        if step >= self.begins and self.kind == "epsilon":
            group["eps"] = EPSILON * self.speed ** (-3 * (step - self.begins))


def draw(seed: int, count: int, healthy: int) -> list[Case]:
    """The cases of a seed: `count` that are made to diverge, of every kind in turn, and healthy ones."""
    dice = random.Random(seed)
    kinds = [KINDS[i % len(KINDS)] for i in range(count)] + ["healthy"] * healthy
    return [
        Case(
            id=f"{i:02d}-{kind}",
            kind=kind,
            seed=dice.randrange(10**6),
            layers=dice.choice([2, 3]),
            lr=dice.uniform(2e-3, 4e-3),
            begins=dice.randrange(300, 400) if kind not in ("init", "healthy") else 1,
            speed=math.exp(dice.uniform(0.02, 0.035)),
        )
        for i, kind in enumerate(kinds)
    ]


def train(case: Case, layout: Layout) -> Iterator[Point]:
    """The telemetry of a run, as the daemon reads it."""
    recipe = recipes.build("opt-tiny", [*SHAPE, *case.settings()])
    engine = PlainEngine(recipe, layout)
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    data = Samples(np.frombuffer(text, np.uint8).astype(np.uint16), recipe.data.seq_len, recipe.seed)
    norms, progress = BlockNorms(engine), Progress()
    for step in range(1, STEPS + 1):
        closely = step % LOG_EVERY == 0
        shares = forward_backward(engine, data, recipe, progress, sample=closely)
        measured = measure(engine, shares, StepInputs(), None, norms, parameter_norms=closely, update_norms=closely)
        yield _point(step, case.lr_at(step), measured, recipe, engine)
        if not measured.finite:
            return
        case.disturb(engine.optimizer, step)
        engine.update(measured.gnorm, case.lr_at(step), measured.divisor)
        progress = advanced(progress, recipe)


def _point(step: int, lr: float, measured: StepMeasurements, recipe: Recipe, engine: Engine) -> Point:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    logits = tuple(measured.attention_logits)
    return Point(
        step=step,
        ts=float(step),
        loss=number(measured.loss),
        gnorm=number(measured.gnorm),
        lr=lr,
        betas=engine.optimizer.param_groups[0]["betas"],
        weight_decay=recipe.optim.weight_decay,
        clip_norm=recipe.optim.clip_norm,
        step_seconds=1.0,
        tokens=step * recipe.data.global_batch * recipe.data.seq_len,
        wps=1.0,
        finite=measured.finite,
        actv_norm=number(measured.activation_norm),
        block_gnorms=dict(measured.block_gnorms) if measured.block_pnorms else None,
        block_pnorms=measured.block_pnorms or None,
        block_unorms=measured.block_unorms or None,
        attn_logits=logits if logits and all(map(math.isfinite, logits)) else None,
    )


def judge(case: Case, points: Sequence[Point]) -> dict[str, Any]:
    """What each detector found first, and what was false."""
    loss = LossDetector(SpikeRule())
    found = [each.step for point in points for each in loss.observe(point) if each.signal in OF_THE_LOSS]
    true = [step for step in found if case.kind != "healthy" and step >= case.begins]
    row: dict[str, Any] = {"id": case.id, "kind": case.kind, "steps": len(points), "loss": true[0] if true else None}
    for name, new in MONITORS.items():
        detector = new()
        steps = [finding.step for point in points for finding in detector.observe(point)]
        false = [step for step in steps if case.kind == "healthy" or step < case.begins]
        first = next((step for step in steps if step not in false), None)
        lead = true[0] - first if true and first is not None else None
        row[name] = {"first": first, "lead": lead, "false": len(false), "healthy_steps": _healthy_steps(case, points)}
    return row


def _healthy_steps(case: Case, points: Sequence[Point]) -> int:
    return len(points) if case.kind == "healthy" else min(len(points), case.begins - 1)


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By monitor: the quartiles of the lead where the loss was found, and false alerts in healthy steps."""
    told: dict[str, Any] = {}
    for name in MONITORS:
        leads = [row[name]["lead"] for row in rows if row["loss"] is not None]
        # One that found nothing before the loss did not lead: it ranks last.
        ranked = sorted(-math.inf if lead is None else lead for lead in leads)
        quarters = [ranked[len(ranked) * k // 4] for k in (1, 2, 3)] if len(ranked) >= 4 else [None] * 3
        told[name] = {
            "cases": len(leads),
            "led": sum(lead is not None and lead > 0 for lead in leads),
            "lead_quartiles": [each if each is None or math.isfinite(each) else None for each in quarters],
            "false_alerts": sum(row[name]["false"] for row in rows),
            "healthy_steps": sum(row[name]["healthy_steps"] for row in rows),
        }
    return told


def main() -> None:
    """Train, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=16, help="runs that are made to diverge")
    parser.add_argument("--healthy", type=int, default=8, help="runs that are not")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    given = parser.parse_args()
    layout = mesh.start(Place(0, 1, 0), 1, 1)
    rows = []
    for case in draw(given.seed, given.count, given.healthy):
        rows.append(judge(case, list(train(case, layout))))
        print(f"{len(rows)} of {given.count + given.healthy}: {rows[-1]}", file=sys.stderr, flush=True)
    whole = {"schema": SCHEMA, "seed": given.seed, "log_every": LOG_EVERY, "cases": rows, "totals": totals(rows)}
    if given.output == "json":
        print(json.dumps(whole, indent=1))
        return
    print("| monitor | leads the loss | lead in steps: quartiles | false alerts |\n| --- | ---: | --- | ---: |")
    for name, each in whole["totals"].items():
        quarters = ", ".join("no lead" if step is None else f"{step:g}" for step in each["lead_quartiles"])
        false = f"{each['false_alerts']} in {each['healthy_steps']:,} steps"
        print(f"| {name} | {each['led']} of {each['cases']} | {quarters} | {false} |")


if __name__ == "__main__":
    main()
