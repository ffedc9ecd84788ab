"""What `benchmarks.cures` injects: causes, steps and strengths, all of them drawn from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_ops.core.failures.causes import Cause

STEPS = 800
BATCH = 16
SEQ_LEN = 64

BASE = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_heads=2",
    "model.vocab_size=262",
    "model.dropout=0",
    f"data.global_batch={BATCH}",
    f"data.micro_batch={BATCH}",
    f"steps={STEPS}",
    f"optim.total_steps={STEPS}",
    "optim.warmup_steps=50",
    "optim.peak_lr=0.005",
    "checkpoint_every=25",
    "evaluate_every=1000000",
    "log_every=5",
)
"""Two layers on some characters: an update takes about 20 ms on one core, and the loss is near its end after 800."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One case: what is injected into one run, and how its undisturbed twin trains.

    Attributes:
        id: Unique in the benchmark, and stable for a seed.
        injected: The cause.
        seed: Of the recipe. Cases with the same settings and the same seed share a twin.
        settings: Of the disturbed run and of its twin, on top of `BASE`.
        declared: Settings of the disturbed run alone, such as a learning rate that is too high.
        inject: What `benchmarks/cures_trainer.py` does; empty if the fault is in `declared`.
        nodes: With one rank each.
        options: Of `run start`, for the disturbed run.
        planned: Whether the twin has what is injected, too. It then trains without a supervisor.
    """

    id: str
    injected: Cause
    seed: int
    settings: tuple[str, ...] = ()
    declared: tuple[str, ...] = ()
    inject: Mapping[str, Any] = field(default_factory=dict[str, Any])
    nodes: int = 1
    options: tuple[str, ...] = ()
    planned: bool = False

    @property
    def twin(self) -> str:
        """What makes a twin: equal for cases that share one."""
        return json.dumps([self.seed, self.settings, self.inject if self.planned else None])


def draws(seed: int, count: int) -> list[Draw]:
    """The cases of a seed.

    The causes come in shuffled rounds of all ten. So eight cases have eight causes.
    """
    chance = random.Random(f"cures {seed}")
    found: list[Draw] = []
    while len(found) < count:
        causes = list(_DRAWN)
        chance.shuffle(causes)
        for cause in causes[: count - len(found)]:
            own = random.Random(f"cures {seed} {len(found)}")
            kept: dict[str, Any] = {"seed": 100 * (seed % 10_000) + 1 + len(found) % 2}
            found.append(Draw(id=f"{seed}-{len(found):02d}-{cause}", injected=cause, **{**kept, **_DRAWN[cause](own)}))
    return found


def _garbage(chance: random.Random, batches: int) -> dict[str, Any]:
    first = BATCH * chance.randint(350, 500)
    return {"what": "garbage", "first": first, "last": first + BATCH * batches - 1, "salt": chance.getrandbits(32)}


def _bad_data(chance: random.Random) -> dict[str, Any]:
    """A part of a shard is random tokens: longer than a spike gets to heal."""
    return {"inject": _garbage(chance, chance.randint(60, 90))}


def _none(chance: random.Random) -> dict[str, Any]:
    """A few odd batches, or moments disturbed once: both heal."""
    if chance.random() < 0.5:
        return {"inject": _garbage(chance, chance.randint(3, 6))}
    step = chance.randint(350, 500)
    return {"inject": {"what": "moments", "step": step, "factor": 10.0 ** -chance.randint(2, 3)}}


def _bad_restore(chance: random.Random) -> dict[str, Any]:
    """A rank dies, and what is restored is not what was saved."""
    block = chance.choice(["layers.", "embed_tokens"])
    return {"inject": {"what": "restore", "step": chance.randint(350, 500), "block": block}}


def _unplanned_lr(chance: random.Random) -> dict[str, Any]:
    """A bug of the scheduler, in one attempt."""
    order = {"what": "rate", "step": chance.randint(350, 500), "factor": chance.uniform(3, 10)}
    return {"inject": {**order, "stuck": chance.random() < 0.25}}


def _batch_size(chance: random.Random) -> dict[str, Any]:
    """One attempt takes smaller batches from a step on."""
    return {"inject": {"what": "batch", "step": chance.randint(350, 500), "sequences": chance.choice([2, 4])}}


def _corrupted_weights(chance: random.Random) -> dict[str, Any]:
    """The weights of one rank in one block, with checksums or without."""
    order = {"what": "flip", "step": chance.randint(350, 500), "rank": 1, "factor": 2.0 ** chance.randint(3, 5)}
    block = "embed_tokens"  # a layer of two is learned again within some updates
    return {
        "inject": {**order, "block": block},
        "declared": (f"checksum_every={chance.choice([0, 1])}",),
        "nodes": 2,
    }


def _planned_change(chance: random.Random) -> dict[str, Any]:
    """Other data from a step on: declared at the start, or only visible in telemetry, as a stage.

    The twin gets them, too, and no supervisor.
    """
    batches, declared = chance.randint(350, 450), chance.random() < 0.5
    order = {"what": "mix", "first": BATCH * batches, "of_16": chance.randint(2, 4), "salt": chance.getrandbits(32)}
    options = (f"--planned={batches + 1}:other data",) if declared else ()
    return {"inject": {**order, "stage": not declared}, "planned": True, "options": options}


def _lr_too_high(chance: random.Random) -> dict[str, Any]:
    """The planned learning rate is more than one mode of the model can bear, for a while."""
    first = chance.randint(300, 400)
    order = {"what": "edge", "first": first, "last": first + 300, "excess": chance.uniform(1.02, 1.04)}
    return {"inject": {**order, "blocks": [f"layers.{chance.randint(0, 1)}.self_attn.q_proj", "final_layer_norm"]}}


def _beta2(chance: random.Random) -> dict[str, Any]:
    """A second moment that is too slow after quiet stretches. The twin has the usual one, and no such stretch."""
    first = chance.randint(350, 450)
    order = {"what": "quiet", "first": first, "last": first + 150, "every": chance.randint(11, 14)}
    return {"inject": {**order, "first_moment": 0.3, "factor": 1e-3}, "declared": ("optim.betas=0.9,0.9999",)}


def _fp16_scale(chance: random.Random) -> dict[str, Any]:
    """Activations leave the range of fp16. The twin is in fp32."""
    order = {"what": "overflow", "step": chance.randint(350, 500), "bearable": 2.0**-8}
    return {"inject": order, "declared": ("precision=fp16",)}


_DRAWN = {
    Cause.LR_TOO_HIGH: _lr_too_high,
    Cause.BETA2: _beta2,
    Cause.FP16_SCALE: _fp16_scale,
    Cause.BAD_RESTORE: _bad_restore,
    Cause.UNPLANNED_LR: _unplanned_lr,
    Cause.BATCH_SIZE: _batch_size,
    Cause.CORRUPTED_WEIGHTS: _corrupted_weights,
    Cause.PLANNED_CHANGE: _planned_change,
    Cause.BAD_DATA: _bad_data,
    Cause.NONE: _none,
}
