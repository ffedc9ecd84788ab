"""The sections of the judge: which cases, what counts as right, and the goal."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil, floor
from time import process_time

from benchmarks.signals_changes import bad_resumes, declared, fault_after_change, good_resumes, undeclared
from benchmarks.signals_curves import NOISES, Look, Rows, draw, healthy, to_points
from benchmarks.signals_diverged import divergences
from benchmarks.signals_events import FAULTS, HARMLESS, HEALED, SLOW_HEALERS, TOO_LOW, put
from benchmarks.signals_rates import collapses, healthy_scales, off_schedule
from benchmarks.signals_rules import ALERTS_ONLY, OURS, PUBLISHED, Case, Found, alarms, answers, policy
from opt_ops.core.detect.loss import LossDetector


@dataclass
class Figure:
    """One row of the report: how many of how many, for each rule, and those of opt-ops that came out wrong."""

    name: str
    goal: str
    tried: int = 0
    counts: dict[str, float] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)
    met: bool = True
    kinds: dict[str, list[int]] = field(default_factory=dict)  # of each kind, how many came out wrong, of how many
    unit: str = ""  # of a rate; empty for a count
    delays: dict[str, list[int]] = field(default_factory=dict)  # lines from the onset to the finding that counts

    def add(self, kind: str, wrong: bool) -> None:
        """One more case of that kind."""
        count = self.kinds.setdefault(kind, [0, 0])
        count[0], count[1] = count[0] + wrong, count[1] + 1


@dataclass(frozen=True)
class Run:
    """What is judged, and how much of it."""

    real: Mapping[str, Rows]
    resumed: Mapping[str, tuple[Rows, list[str]]]
    seed: int
    scale: float  # 1: as many cases as section 1 of the goals has
    rules: tuple[str, ...]

    def rng(self, section: str) -> random.Random:
        """The section's own: sections do not disturb each other."""
        return random.Random(f"{self.seed} {section}")

    def many(self, count: int) -> int:
        """As many cases, scaled."""
        return max(6, round(count * self.scale))


Right = Callable[[list[Found], Case], bool]


def rolled_back(found: list[Found], case: Case) -> bool:
    """Whether anything was rolled back."""
    return any(f.rolls_back for f in found)


def noticed(found: list[Found], case: Case) -> bool:
    """Whether anybody was notified."""
    return bool(found)


def _text(found: list[Found]) -> str:
    return "; ".join(f"{f.signal} {f.action} at {f.step}" for f in found[:3]) or "nothing"


@dataclass
class Tally:
    """Counts the answers of all rules to cases."""

    run: Run
    inside: Figure = field(default_factory=lambda: Figure("rollback target inside the fault", "0"))
    strict: Figure = field(default_factory=lambda: Figure("… from its first sign on, below half an sd", "–"))

    def figure(self, name: str, cases: list[Case], right: Right, least: float | None, most: float | None) -> Figure:
        """How many cases are counted by `right`; the goal is a share: at least, or at most."""
        asked, allowed = (ceil((least or 0.0) * len(cases) - 1e-9), floor((most or 0.0) * len(cases) + 1e-9))
        goal = f"≥ {asked}" if least is not None else f"≤ {allowed}"
        figure = Figure(name, goal, len(cases), dict.fromkeys(self.run.rules, 0))
        for case in cases:
            for rule in self.run.rules:
                found = answers(rule, case)
                yes = right(found, case)
                figure.counts[rule] += yes
                if yes and least is not None:
                    first = next(f.step for f in found if right([f], case))
                    lines = sum(case.onset <= row.step <= first for row in case.rows)
                    figure.delays.setdefault(rule, []).append(lines)
                if rule == OURS:
                    wrong = yes != (least is not None)
                    figure.add(case.kind, wrong)
                    if wrong:
                        figure.misses.append(f"{case.kind} | {case.name} | onset {case.onset}: {_text(found)}")
                    if least is not None and case.harmed is not None:
                        self._target(case, found)
            case.forget()
        count = figure.counts[OURS]
        figure.met = count >= asked if least is not None else count <= allowed
        return figure

    def _target(self, case: Case, found: list[Found]) -> None:
        first = next((f for f in found if f.rolls_back), None)
        if first is None or first.target is None or case.harmed is None:
            return
        about = f"{first.signal} at {first.step}, onset {first.onset}, target {first.target}"
        for figure, begin in ((self.inside, case.harmed), (self.strict, case.onset)):
            figure.tried += 1
            if first.target >= begin:
                figure.misses.append(f"{case.kind} | {case.name} | onset {case.onset}, harm {case.harmed}: {about}")
            figure.counts[OURS] = len(figure.misses)
        self.inside.met = not self.inside.misses


def _about(look: Look) -> str:
    habits = "".join(f", {habit}" for habit in look.habits)
    return f"{look.schedule}, sd {look.sd:.3f}, every {look.every}, from {look.start}{habits}"


def healthy_section(run: Run) -> Iterator[Figure]:
    """False rollbacks and alerts per 100,000 healthy lines."""
    rng = run.rng("healthy")
    drawn = {
        f"drawn, {noise}": [
            (_about(look), to_points(healthy(rng, look, points)))
            for look in (draw(rng, noises=(noise,)) for _ in range(run.many(12)))
            for points in (rng.choice((1500, 4000, 8000)),)
        ]
        for noise in NOISES
    }
    groups = {**{f"real, {name}": [(name, to_points(rows))] for name, rows in run.real.items()}, **drawn}
    lines = sum(len(rows) for curves in groups.values() for _, rows in curves)
    back = Figure("false rollbacks in 100,000 healthy lines", "≤ 1", lines, unit="/100k")
    told = Figure("alerts in 100,000 healthy lines", "–", lines, unit="/100k")
    for rule in run.rules:
        rollbacks = alerts = 0
        for group, curves in groups.items():
            for name, rows in curves:
                found = alarms(rule, rows)
                wrong = [f for f in found if f.rolls_back]
                rest = [f for f in found if not f.rolls_back]
                rollbacks, alerts = rollbacks + len(wrong), alerts + len(rest)
                if rule == OURS:
                    back.misses += [f"{group} | {name}: {_text([f])}" for f in wrong]
                    told.misses += [f"{group} | {name}: {_text([f])}" for f in rest]
        back.counts[rule] = 1e5 * rollbacks / lines
        told.counts[rule] = 1e5 * (rollbacks if rule in PUBLISHED and rule not in ALERTS_ONLY else alerts) / lines
    back.met = back.counts[OURS] <= 1
    yield back
    yield told


def diverged_section(run: Run, tally: Tally) -> Iterator[Figure]:
    """Divergences."""
    cases = divergences(run.many(65), run.rng("diverged"))
    yield tally.figure("drawn divergences acted on", cases, rolled_back, 30 / 32, None)


def faults_section(run: Run, tally: Tally) -> Iterator[Figure]:
    """Faults put into healthy curves."""
    cases = put(FAULTS, run.many(180), run.real, run.rng("faults"))
    yield tally.figure("faults put in, acted on", cases, rolled_back, 165 / 180, None)


def harmless_section(run: Run, tally: Tally) -> Iterator[Figure]:
    """What heals or does no harm."""
    cases = put(HEALED, run.many(67), run.real, run.rng("healed"))
    yield tally.figure("healed spikes rolled back", cases, rolled_back, None, 3 / 67)
    cases = put(HARMLESS, run.many(156), run.real, run.rng("harmless"))
    yield tally.figure("harmless events rolled back", cases, rolled_back, None, 8 / 156)
    cases = put(SLOW_HEALERS, run.many(24), run.real, run.rng("slow"))
    yield tally.figure("slow healers rolled back", cases, rolled_back, None, 6 / 24)


def low_section(run: Run, tally: Tally) -> Iterator[Figure]:
    """Too low a loss."""
    cases = put(TOO_LOW, run.many(36), run.real, run.rng("low"))
    for case in cases:  # a target counts for faults only
        case.harmed = None
    yield tally.figure("too low a loss noticed", cases, noticed, 30 / 36, None)
    yield tally.figure("too low a loss rolled back", cases, rolled_back, None, 0.0)


def planned_section(run: Run, tally: Tally) -> Iterator[Figure]:
    """What people plan."""
    cases = declared(run.many(67), run.real, run.rng("declared"))
    yield tally.figure("planned changes rolled back, declared", cases, rolled_back, None, 0.0)
    cases = undeclared(run.many(21), run.real, run.rng("undeclared"))
    yield tally.figure("planned changes rolled back, undeclared", cases, rolled_back, None, 1 / 7)
    cases = fault_after_change(run.many(24), run.real, run.rng("after"))
    yield tally.figure("a fault 300 lines after a declared change acted on", cases, rolled_back, 10 / 12, None)


def resumes_section(run: Run, tally: Tally) -> Iterator[Figure]:
    """Attempts that begin again."""
    real_bad, real_good = [], []
    for name, (rows, attempts) in run.resumed.items():
        bad, good = _real_resumes(name, rows, attempts)
        real_bad += bad
        real_good += good
    bad = [*bad_resumes(run.many(27), run.rng("bad")), *real_bad]

    def acted(found: list[Found], case: Case) -> bool:
        return any(f.action in ("rollback", "halt") for f in found)

    def named(found: list[Found], case: Case) -> bool:
        return any(f.signal == "bad_restore" for f in found)

    yield tally.figure("bad resumes acted on", bad, acted, 0.9, None)
    named_tally = Tally(run)  # targets are counted once
    yield named_tally.figure("bad resumes called bad_restore", bad, named, 0.9, None)
    good = [*good_resumes(run.many(24), run.rng("good")), *real_good]

    def disturbed(found: list[Found], case: Case) -> bool:
        return any(f.action != "tell" or f.signal == "bad_restore" for f in found)

    yield tally.figure("good resumes disturbed", good, disturbed, None, 0.0)


def _real_resumes(name: str, rows: Rows, attempts: list[str]) -> tuple[list[Case], list[Case]]:
    """The later attempts of a file with a column `attempt`; more than a nat above what was reached is bad."""
    bad, good, kept = [], [], []
    starts = [n for n in range(1, len(rows)) if attempts[n] != attempts[n - 1]]
    for begin, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        kept = [row for row in kept or rows[:begin] if row.step < rows[begin].step]
        due = [row for row in rows[:begin] if row.step >= rows[begin].step]
        here = rows[begin : min(end, begin + 64)]
        reached = sum(row.loss for row in kept[-5:]) / max(1, len(kept[-5:]))
        case = Case(
            kind="real",
            name=f"{name}, attempt {attempts[begin]}",
            rows=kept + here,
            onset=here[0].step,
            resumes={len(kept): due},
        )
        wrong = here[0].loss > reached + 1
        if wrong:
            bad.append(case)
        elif here[0].loss < reached + 0.3:
            good.append(case)
        kept = kept + ([] if wrong else rows[begin:end])
    return bad, good


def rates_section(run: Run, tally: Tally) -> Iterator[Figure]:
    """The learning rate."""
    cases = off_schedule(run.many(24), run.rng("rates"))
    yield tally.figure("a learning rate off its schedule noticed", cases, noticed, 22 / 24, None)


def scale_section(run: Run, tally: Tally) -> Iterator[Figure]:
    """Fp16's loss scale."""
    cases = collapses(run.many(12), run.rng("collapses"))
    yield tally.figure("a collapsed loss scale acted on", cases, rolled_back, 1.0, None)
    cases = healthy_scales(run.many(12), run.rng("scales"))
    yield tally.figure("a healthy loss scale rolled back", cases, rolled_back, None, 0.0)


def speed(run: Run) -> float:
    """Microseconds that a line costs the loss detector."""
    rng = run.rng("speed")
    points = to_points(healthy(rng, draw(rng, noises=("global batch",), every=1), 20_000))
    detector, begin = LossDetector(policy().spike, policy().drift), process_time()
    for point in points:
        detector.observe(point)
    return 1e6 * (process_time() - begin) / len(points)


SECTIONS: dict[str, Callable[[Run, Tally], Iterator[Figure]]] = {
    "healthy": lambda run, _: healthy_section(run),
    "diverged": diverged_section,
    "faults": faults_section,
    "harmless": harmless_section,
    "low": low_section,
    "planned": planned_section,
    "resumes": resumes_section,
    "rates": rates_section,
    "scale": scale_section,
}
