"""What the detectors of opt-ops and the published rules say about a case: a curve with something in it, or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from benchmarks.published_rules import Curve, Rule, byterobust, foundry, metaseq, metaseq_double, olmo, zclip
from benchmarks.signals_curves import Rows, to_points
from opt_ops import playbook_loader
from opt_ops.core.decide.policy import Policy
from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.detect.loss_scale import LossScaleDetector
from opt_ops.core.values import Action, Tier

PUBLISHED: dict[str, Rule] = {
    "llm-foundry KillLossSpike": foundry,
    "metaseq EWM × 1.25": metaseq,
    "metaseq EWM × 2": metaseq_double,
    "ByteRobust, 5 ×": byterobust,
    "OLMo-core 6 sd": olmo,
    "ZClip 2.5": zclip,
}
ALERTS_ONLY = ("OLMo-core 6 sd", "ZClip 2.5")
"""Rules that skip or clip one update: as a reason to roll back they would be misjudged, so they count as alerts."""
OURS = "opt-ops"


@dataclass(frozen=True, slots=True)
class Found:
    """A finding, or an alarm of a published rule."""

    step: int
    onset: int
    signal: str
    action: str  # what the page's first rung does; `tell` where nothing is touched
    target: int | None  # the newest step that a rollback may go back to

    @property
    def rolls_back(self) -> bool:
        """Whether it would undo steps."""
        return self.action == "rollback"


@dataclass(kw_only=True)
class Case:
    """Something to be judged. What an untouched curve (`quiet`) calls forth as well is not counted."""

    kind: str
    name: str
    rows: Rows
    onset: int  # the step at which it begins
    until: int | None = None  # the last step at which a finding counts
    quiet: Rows | None = None
    planned: tuple[int, ...] = ()
    resumes: Mapping[int, Rows] = field(default_factory=dict)  # place at which an attempt begins: what was discarded
    harmed: int | None = None  # of a fault: the step from which no checkpoint is healthy

    @cached_property
    def points(self) -> Curve:
        """The rows, as detectors take them in."""
        return to_points(self.rows)

    @cached_property
    def quiet_points(self) -> Curve:
        """The untouched rows, likewise."""
        return to_points(self.quiet or [])

    def forget(self) -> None:
        """The points may go; they are made again when they are asked for."""
        for name in ("points", "quiet_points"):
            self.__dict__.pop(name, None)


@cache
def policy() -> Policy:
    """That of the pages of this checkout."""
    return playbook_loader.load(playbook_loader.folder())[0]


def _found(finding: Finding) -> Found:
    page = policy().playbooks.get(finding.signal)
    if finding.tier is not Tier.ACT or page is None:
        return Found(finding.step, finding.onset_step, str(finding.signal), "tell", None)
    rung = page.ladder[0]
    rollback = rung.action is Action.ROLLBACK
    target = max(0, finding.onset_step - max(rung.margin_steps, finding.margin_steps)) if rollback else None
    return Found(finding.step, finding.onset_step, str(finding.signal), str(rung.action), target)


def _new() -> tuple[LossDetector, LossScaleDetector]:
    return LossDetector(policy().spike, policy().drift), LossScaleDetector(policy().loss_scale)


def ours(points: Curve, planned: Sequence[int] = (), resumes: Mapping[int, Rows] | None = None) -> Iterator[Found]:
    """The findings of opt-ops. An attempt begins as in a supervised run: with detectors that know the kept lines."""
    plans, told = sorted(planned), 0
    kept: Curve = []
    loss, scale = _new()
    for place, point in enumerate(points):
        if resumes and place in resumes:
            kept = [p for p in kept if p.step < point.step]
            loss, scale = _new()
            told = 0
            for earlier in kept:
                while told < len(plans) and plans[told] <= earlier.step:
                    loss.plan(plans[told])
                    told += 1
                loss.observe(earlier)
            loss.begin_attempt(to_points(resumes[place]))
        kept.append(point)
        while told < len(plans) and plans[told] <= point.step:
            loss.plan(plans[told])
            told += 1
        for detector in (loss, scale):
            for finding in detector.observe(point):
                yield _found(finding)


def alarms(rule: str, points: Curve, case: Case | None = None) -> list[Found]:
    """What a rule says about these points; an alarm of a published rule is taken for a rollback, at that very step."""
    if rule == OURS:
        return list(ours(points, case.planned if case else (), case.resumes if case else None))
    action = "tell" if rule in ALERTS_ONLY else "rollback"
    return [Found(step, step, rule, action, step - 1) for step in PUBLISHED[rule](points)]


def answers(rule: str, case: Case) -> list[Found]:
    """What a rule says from the onset on and that it does not say about the untouched curve."""
    found = [f for f in alarms(rule, case.points, case) if f.step >= case.onset]
    if found and case.quiet is not None:
        known = {(f.step, f.signal, f.action) for f in alarms(rule, case.quiet_points)}
        found = [f for f in found if (f.step, f.signal, f.action) not in known]
    return [f for f in found if case.until is None or f.step <= case.until]
