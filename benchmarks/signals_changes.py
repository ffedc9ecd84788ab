"""Cases of what people plan, and of attempts that begin again."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

from benchmarks.signals_curves import PLAIN, Look, Row, Rows, draw, healthy, noise_sd
from benchmarks.signals_events import FAULTS, Here, base, harmed
from benchmarks.signals_rules import Case

# ---- planned changes


def _relax(rng: random.Random, height: float) -> Callable[[int], float]:
    """A jump that is learned away, like a run that begins."""
    pace, power = rng.uniform(40, 300), rng.uniform(0.3, 0.8)
    return lambda n: height * (1 + n / pace) ** -power


def _planned(kind: str, rng: random.Random, sd: float, rows: Rows, at: int, shown: bool) -> None:
    """Change the rows from place `at` on; `shown`: the fields that a trainer logs say so at that line."""
    jump = _relax(rng, rng.uniform(0.1, 1.0) + 5 * sd)
    down, up = rng.uniform(0.05, 0.5), rng.uniform(1.5, 4)
    wide = rng.uniform(0.7, 1.7)
    lr_at, slow = rows[at].lr or 3e-4, max(20, min(300, 1000 // (rows[at].step - rows[at - 1].step)))
    for n, row in enumerate(rows[at:]):
        match kind:
            case "curriculum":
                row.loss += jump(n) - down * min(1.0, n / 200)
            case "other mix":
                row.loss += jump(n)
            case "warm restart":
                row.loss += jump(n) * min(1.0, (n + 1) / 30)
            case "smaller batch":
                row.loss += rng.gauss(0, wide * sd) + sd
            case "larger batch":
                row.loss -= sd * 1.5 * min(1.0, n / 100)
            case "longer sequence":
                row.loss += jump(n) - down
            case "other loss":
                row.loss *= up
            case "gradual mix":
                row.loss += (down + 4 * sd) * min(1.0, n / slow)
            case "annealing":
                row.loss -= down * min(1.0, n / 300)
            case _:  # other tokenizer
                row.loss += jump(n) + down
        if shown:
            _shown(kind, n, row, lr_at)


def _shown(kind: str, n: int, row: Row, lr_at: float) -> None:
    batch, tokens = row.batch or 512, row.tokens or 512 * 2048
    match kind:
        case "smaller batch":
            row.batch, row.tokens = batch // 4, tokens // 4
        case "larger batch":
            row.batch, row.tokens = batch * 4, tokens * 4
        case "longer sequence":
            row.batch, row.tokens = batch, tokens * 4
        case "annealing":
            row.lr = lr_at * max(0.02, 1 - n / 300)
        case "warm restart":
            row.lr = lr_at * max(0.02, min(3.0, 3.0 * n / 100))
        case _:
            row.stage = "two"


PLANNED = (
    "curriculum",
    "other mix",
    "warm restart",
    "smaller batch",
    "larger batch",
    "longer sequence",
    "other loss",
    "other tokenizer",
    "gradual mix",
    "annealing",
)
UNDECLARED = (
    ("warm restart", True),
    ("smaller batch", True),
    ("longer sequence", True),
    ("curriculum", True),
    ("other mix", True),
    ("other mix", False),
    ("other tokenizer", False),
)


def _base(rng: random.Random, real: Mapping[str, Rows], after: int, shown: bool) -> tuple[str, Rows, int]:
    name, rows, at = base(rng, real, after)
    rows = [row.copy() for row in rows]
    if shown:
        for row in rows:
            row.lr, row.stage = row.lr or 3e-4, "one"
            row.batch, row.tokens = row.batch or 512, row.tokens or 512 * 2048
    return name, rows, at


def _change(kind: str, rng: random.Random, real: Mapping[str, Rows], shown: bool, declared: bool) -> Case:
    name, rows, at = _base(rng, real, 1000, shown)
    changed = [row.copy() for row in rows]
    _planned(kind, rng, noise_sd(rows, at), changed, at, shown)
    onset = rows[at - 1].step + 1
    plan = (rng.randrange(onset, rows[at].step + 1),) if declared else ()
    return Case(kind=kind, name=name, rows=changed, onset=onset, quiet=rows, planned=plan)


def declared(count: int, real: Mapping[str, Rows], rng: random.Random) -> list[Case]:
    """Changes that are declared to the detectors; what they look like in the log varies."""
    return [
        _change(PLANNED[k % len(PLANNED)], random.Random(rng.random()), real, shown=k % 3 > 0, declared=True)
        for k in range(count)
    ]


def undeclared(count: int, real: Mapping[str, Rows], rng: random.Random) -> list[Case]:
    """The same, not declared. Two of seven show in nothing but the loss."""
    cases = []
    for k in range(count):
        kind, shown = UNDECLARED[k % len(UNDECLARED)]
        case = _change(kind, random.Random(rng.random()), real, shown, declared=False)
        case.kind += ", visible" if shown else ", not visible"
        cases.append(case)
    return cases


def fault_after_change(count: int, real: Mapping[str, Rows], rng: random.Random) -> list[Case]:
    """A declared change, and 300 points later a fault that calls for a rollback."""
    faults = [f for f in FAULTS if f.watched <= 800 and "3 sd" not in f.name and "0.05" not in f.name]
    cases = []
    for k in range(count):
        own, fault = random.Random(rng.random()), faults[k % len(faults)]
        name, rows, at = _base(own, real, 300 + fault.watched, shown=k % 2 > 0)
        kind, sd = PLANNED[k % len(PLANNED)], noise_sd(rows, at)
        _planned(kind, own, sd, rows, at, shown=k % 2 > 0)
        rows, there = rows[: at + 300 + fault.watched], at + 300
        before, after = rows[there - 32 : there], rows[-32:]
        fall = max(0.0, (sum(r.loss for r in before) - sum(r.loss for r in after)) / 32)
        change = fault.make(Here(own, noise_sd(rows, there, 100), 1, fall, fault.watched))
        changed = [row.copy() for row in rows]
        for n, row in enumerate(changed[there:]):
            change(n, row)
        cases.append(
            Case(
                kind=f"{kind}, then {fault.name}",
                name=name,
                rows=changed,
                onset=rows[there].step,
                planned=(rows[at].step,),
                harmed=harmed(rows, changed, there, rows[there].step),
            )
        )
    return cases


# ---- attempts that begin again

BAD = ("random weights", "half of it lost", "small jump", "moments lost", "without the discarded lines")
GOOD = ("goes on", "data in another order", "small bump", "after a divergence", "without the discarded lines", "twice")


def _resume_base(rng: random.Random) -> tuple[Look, Rows, int, int, Rows]:
    look = draw(rng, noises=PLAIN)
    at = rng.randrange(200, 2000)
    lost = rng.randrange(20, 300)
    rows = healthy(rng, look, at + 800)
    return look, rows, at, lost, [row.copy() for row in rows]


def bad_resumes(count: int, rng: random.Random) -> list[Case]:
    """An attempt does not continue the loss that was reached. It is to be seen within its first 64 lines."""
    cases = []
    for k in range(count):
        own, kind = random.Random(rng.random()), BAD[k % len(BAD)]
        look, rows, at, lost, again = _resume_base(own)
        lost = 0 if kind == "without the discarded lines" else lost
        sd, here = noise_sd(rows, at), rows[at].loss
        height = {
            "random weights": 10.8 - here,
            "half of it lost": own.uniform(0.5, 3),
            "small jump": max(10 * sd, own.uniform(0.15, 0.5)),
            "moments lost": max(10 * sd, own.uniform(0.2, 0.8)),
            "without the discarded lines": max(10 * sd, own.uniform(0.5, 5)),
        }[kind]
        pace = own.uniform(100, 400)
        for n, row in enumerate(again[at:]):
            rise = height * (1 + n / pace) ** -0.4
            row.loss += rise if kind != "moments lost" else rise * math.sin(min(math.pi / 2, (n + 1) / 8))
        first, last = again[at].step, again[at + 63].step
        begun = rows[: at + lost] + again[at:]
        cases.append(
            Case(
                kind=kind,
                name=f"{look.noise} {look.sd:.3f}, every {look.every}",
                rows=begun,
                onset=first,
                until=last,
                resumes={at + lost: rows[at : at + lost]},
                harmed=first,
            )
        )
    return cases


def good_resumes(count: int, rng: random.Random) -> list[Case]:
    """An attempt goes on as it should: nothing is to be disturbed in its first 500 lines."""
    cases = []
    for k in range(count):
        own, kind = random.Random(rng.random()), GOOD[k % len(GOOD)]
        look, rows, at, lost, again = _resume_base(own)
        sd = noise_sd(rows, at)
        discarded = [row.copy() for row in rows[at : at + (0 if kind == "without the discarded lines" else lost)]]
        for n, row in enumerate(again[at:]):
            if kind != "goes on":
                row.loss += own.gauss(0, 0.7 * sd)
            if kind == "small bump":
                row.loss += 2 * sd * 0.5 ** (n / 5)
        if kind == "after a divergence":
            for n, row in enumerate(discarded):
                row.loss += min(5.0, 2 * sd * 2 ** (n / 4))
        begun, resumes = rows[:at] + discarded + again[at : at + 500], {at + len(discarded): discarded}
        if kind == "twice":
            resumes[len(begun)] = again[at + 300 : at + 500]
            begun += [row.copy() for row in again[at + 300 : at + 800]]
        cases.append(
            Case(
                kind=kind,
                name=f"{look.noise} {look.sd:.3f}, every {look.every}",
                rows=begun,
                onset=again[at].step,
                quiet=rows[:at] + discarded,
                resumes=resumes,
            )
        )
    return cases
