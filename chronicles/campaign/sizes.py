"""The sizes of a campaign as their journals and their telemetry record them: settled curves, states, incidents."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from chronicles.kept_curve import kept_points
from chronicles.record import LineageRecord, load, newest_config
from opt_ops.core.campaign.state import CampaignState, Forecast, Member
from opt_ops.core.campaign.values import Size
from opt_ops.errors import OptOpsError
from opt_ops.runfolder import campaigns

SHARES = tuple(round(float(24 ** (k / 23 - 1)), 6) for k in range(24))
"""Of the planned tokens, at which settled losses are taken: from 1/24 to 1, each 15 % above the one before."""
_WIDTH, _LEAST_WIDTH = 0.02, 0.005
"""A settled loss is the level of the last steps: 2 % of those so far, and half a percent of the plan."""
_LEAST_POINTS = 5  # or over as many steps, if that is more
WARM_UPS = 3  # so many warm-ups on, a loss counts: before, it says more of the learning rate than of the size
LEAST_KNOTS = 4  # of a curve that counts for the law: from about two thirds of the tokens on there are as many


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A settled step: the update, the tokens seen with it, its loss."""

    step: int
    tokens: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Knot:
    """The settled loss at a share of the planned tokens."""

    share: float
    tokens: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRecord:
    """One size. `record` is None before its lineage has begun, or where it cannot be read (`problem`)."""

    size: Size
    member: Member | None
    forecast: Forecast | None
    record: LineageRecord | None
    problem: str
    config: Mapping[str, Any]
    settled: Sequence[Settled]
    knots: Sequence[Knot]

    @property
    def reached(self) -> float | None:
        """The settled loss at the end of the planned tokens; None: it was not reached."""
        return self.knots[-1].loss if self.knots and self.knots[-1].share == SHARES[-1] else None

    @property
    def status(self) -> str:
        """What the lineage is doing, or `waiting`."""
        if self.record is None or self.record.state.lineage is None:
            return "not readable" if self.problem else "queued" if self.member else "waiting"
        return str(self.record.state.status)

    @property
    def incidents(self) -> Mapping[str, int]:
        """How often what has happened, by failure class."""
        found = self.record.state.incidents.values() if self.record else ()
        return dict(Counter(str(each.kind) for each in found).most_common())


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignRecord:
    """A campaign, with all of its sizes."""

    name: str
    folder: Path
    state: CampaignState
    sizes: Sequence[SizeRecord]


def load_campaign(folder: Path) -> CampaignRecord:
    """Read a campaign and the lineages of its sizes.

    Raises:
        JournalError: the journal of the campaign cannot be trusted. A lineage that cannot be read is told as a problem.
    """
    state = campaigns.state(folder)
    sizes = state.started.sizes if state.started else ()
    runs = folder.parent.parent
    return CampaignRecord(
        name=folder.name, folder=folder, state=state, sizes=[_size(runs, state, size) for size in sizes]
    )


def _size(runs: Path, state: CampaignState, size: Size) -> SizeRecord:
    member, record, problem, config = state.members.get(size.recipe), None, "", {}
    if member is not None and not (runs / member.lineage).is_dir():
        problem = "" if not member.asked else f"the folder of lineage {member.lineage} is gone"
    elif member is not None:
        try:
            record = load(runs / member.lineage)
            config = newest_config(runs / member.lineage, record) or {}
            started = record.state.lineage
            if started is not None and started.request != member.request:
                record, problem, config = None, f"lineage {member.lineage} was deleted; another one has its number", {}
        except (OptOpsError, OSError) as error:
            record, problem = None, str(error)
    settled = settled_steps(record) if record else []
    return SizeRecord(
        size=size,
        member=member,
        forecast=state.forecasts.get(size.recipe),
        record=record,
        problem=problem,
        config=config,
        settled=settled,
        knots=knots(settled, size.tokens, first_share(config)),
    )


def settled_steps(record: LineageRecord) -> list[Settled]:
    """The steps that are part of the present weights, each once."""
    return [
        Settled(step=point.step, tokens=point.tokens, loss=point.loss)
        for _, point in kept_points(record.curves)
        if point.loss is not None and point.loss > 0 and point.tokens
    ]


def knots(settled: Sequence[Settled], planned: int, first: float) -> list[Knot]:
    """The settled losses at `SHARES` of the planned tokens, from the share `first` on."""
    found: list[Knot] = []
    for share in SHARES:
        end = share * planned
        if share < first or not settled or settled[-1].tokens < end * (1 - 1e-9):
            continue
        last = bisect_right(settled, end * (1 + 1e-9), key=_tokens)
        begin = bisect_right(settled, end - (_WIDTH * share + _LEAST_WIDTH) * planned, key=_tokens)
        window = settled[max(0, min(begin, last - _LEAST_POINTS)) : last]
        if len(window) >= _LEAST_POINTS:
            tokens, loss = fmean(map(_tokens, window)), level(window)
            found.append(Knot(share=share, tokens=tokens, loss=loss))
    return found


def level(window: Sequence[Settled]) -> float:
    """The mean loss without the tenth on either side: a spike does not move it, and unlike a median it does not jump
    where losses come from sources of text with levels of their own."""
    return middle([each.loss for each in window])


def middle(values: Sequence[float]) -> float:
    """The mean without the tenth on either side."""
    ordered, left_out = sorted(values), len(values) // 10
    return fmean(ordered[left_out : len(ordered) - left_out])


def _tokens(of: Settled) -> int:
    return of.tokens


def first_share(config: Mapping[str, Any]) -> float:
    """The share of the plan from which on a loss counts, by the warm-up that a config.json states."""
    schedule = config.get("schedule")
    warmup = schedule.get("warmup_steps") if isinstance(schedule, Mapping) else None
    steps = config.get("steps")
    if not isinstance(warmup, int) or not isinstance(steps, int) or steps <= 0:
        return 0.0
    return WARM_UPS * warmup / steps
