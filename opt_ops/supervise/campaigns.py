"""The campaigns of a site: each size becomes a lineage when its turn comes; forecasts and alerts are journaled.

A campaign never touches a lineage that has begun: it requests each one as an operator would, and then only reads.
What computes (the fit, the bands, the logbook) runs in processes of its own, which leave requests in the inbox.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from opt_ops.core.campaign import events as e
from opt_ops.core.campaign.state import CampaignState, Member, fold, next_size
from opt_ops.core.campaign.values import Size
from opt_ops.core.state.model import State
from opt_ops.core.values import Severity
from opt_ops.core.waiting import Backoff, Retries
from opt_ops.errors import OptOpsError
from opt_ops.ports import Alert, Clock
from opt_ops.runfolder import campaigns, lineages
from opt_ops.runfolder.files import names_in
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.runfolder.journal import Fenced, Journal, NotJournalable
from opt_ops.runfolder.owner import OwnerWatch
from opt_ops.supervise.campaign_arguments import event_of
from opt_ops.supervise.projections import Projection
from opt_ops.supervise.request_arguments import MOST_AT_ONCE

_STEP_SECONDS = 1.0
_RETRY_SECONDS = 10.0
_FORECAST_SECONDS = 600.0  # a fit takes seconds; reading the telemetry of months takes a minute
_LEAST_SIZES = 3  # of a forecast; chronicles.campaign.law says why

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteOfCampaigns:
    """What a campaign asks of the daemon."""

    runs: Path
    group: str
    clock: Clock
    lineage: Callable[[str], State]
    """The state of a lineage; that of none if there is no such lineage."""
    free_nodes: Callable[[], int | None]
    """Nodes that nobody holds. None: the scheduler's queue decides who gets them."""
    projection: Callable[[tuple[str, ...]], Projection]
    """A command that runs beside the daemon."""
    warn: Callable[[Alert], str | None]
    """Send an alert. None: it is under way; "": it was delivered; else why it was given up."""


class Campaigns:
    """Advances every campaign of one runs folder. What is wrong with one holds up no other."""

    def __init__(self, site: SiteOfCampaigns) -> None:
        self._site = site
        self._open: dict[Path, _Campaign] = {}
        self._drawn: dict[Path, Projection] = {}
        self._fenced: dict[Path, tuple[OwnerWatch, str]] = {}
        """Campaigns of another daemon process, with what it said. Once it is dead, they are advanced again."""
        self._failing: dict[Path, str] = {}
        """Campaigns that could not be advanced, with the reason; tried again after a pause."""
        self._retries = Retries(Backoff(first=_RETRY_SECONDS))
        self._over: set[Path] = set()
        self._known: set[Path] | None = None
        """The campaigns that there are; None: the folder cannot be read, or was not yet."""
        self._at = -_STEP_SECONDS

    @property
    def due(self) -> bool:
        """Whether it is time for the next step."""
        return self._site.clock.monotonic() - self._at >= _STEP_SECONDS

    def step(self) -> None:
        """Advance each campaign.

        Raises:
            OptOpsError: one of them cannot be advanced. The others were.
        """
        now = self._site.clock.monotonic()
        self._at, self._known = now, None
        known = campaigns.folders(self._site.runs)
        self._known = set(known)
        self._forget({*self._open, *self._drawn, *self._fenced, *self._failing, *self._over}.difference(known))
        for path in known:
            if self._may_advance(path, now):
                self._isolated(path, now)
        problems = self._failing | {path: why for path, (_, why) in self._fenced.items()}
        if problems:
            raise OptOpsError("; ".join(f"campaign {path.name}: {why}" for path, why in problems.items()))

    def _may_advance(self, path: Path, now: float) -> bool:
        if path in self._fenced:
            try:
                if not self._fenced[path][0].dead(now):
                    return False
            except OSError:
                return False
            del self._fenced[path]
        return self._retries.due(path, now)

    def _isolated(self, path: Path, now: float) -> None:
        """Advance a campaign. The guard is broad on purpose, as that of `Daemon` over its lineages is."""
        try:
            self._advance(path)
        except Fenced as error:
            log.error("campaign %s: fenced: %s", path.name, error)
            self._close(path)
            self._fenced[path] = OwnerWatch(path / "journal", now), str(error)
        except Exception as error:
            self._close(path)  # the next try reads what was written
            found = str(error) if isinstance(error, OptOpsError) else f"{type(error).__name__}: {error}"
            self._retries.tried(path, now)
            if found != self._failing.get(path):
                log.exception("campaign %s cannot be advanced; it is tried again every few seconds", path.name)
            self._failing[path] = found
        else:
            self._retries.succeeded(path)
            self._failing.pop(path, None)

    def _advance(self, path: Path) -> None:
        if path in self._over and not names_in(path / "inbox", ".json"):
            if path in self._drawn:
                self._draw(path, now=True)
            return
        campaign = self._open.get(path) or self._begin(path)
        over = campaign.step()
        if campaign.state.started is not None:
            self._draw(path, now=over, stale=campaign.trains or campaign.changed)
        campaign.changed = False
        if over:
            self._over.add(path)
            self._close(path)

    def _begin(self, path: Path) -> _Campaign:
        self._over.discard(path)
        self._open[path] = campaign = _Campaign(path, self._site)
        return campaign

    def _draw(self, path: Path, now: bool, stale: bool = False) -> None:
        if path not in self._drawn:
            self._drawn[path] = self._site.projection(("campaign", "render", path.name, "-q"))
        self._drawn[path].stale |= stale
        self._drawn[path].step(now)

    def _close(self, path: Path) -> None:
        campaign = self._open.pop(path, None)
        if campaign is not None:
            with suppress(OSError):
                campaign.close()

    def _forget(self, gone: Iterable[Path]) -> None:
        """Let go of campaigns whose folders were deleted."""
        for path in gone:
            self._close(path)
            if path in self._drawn:
                self._drawn.pop(path).close()
            self._fenced.pop(path, None)
            self._failing.pop(path, None)
            self._retries.succeeded(path)
            self._over.discard(path)

    @property
    def idle(self) -> bool:
        """Whether every campaign that this process can advance is over, and drawn."""
        if self._known is None:
            return False
        mine = self._known - self._fenced.keys() - self._failing.keys()
        return mine <= self._over and all(each.idle for each in self._drawn.values())

    def close(self) -> None:
        """Leave all campaigns to the next daemon process."""
        for path in list(self._open):
            self._close(path)
        for projection in self._drawn.values():
            projection.close()


@dataclass(slots=True)
class _Fit:
    """The process that makes the forecast of a size."""

    recipe: str
    process: Projection


@dataclass(slots=True)
class _Campaign:
    """One campaign whose journal this process writes."""

    path: Path
    site: SiteOfCampaigns
    state: CampaignState = field(default_factory=CampaignState)
    changed: bool = True
    fresh: str = ""
    """The request of a member that this process intended in this step: its empty folder would be somebody else's."""
    fit: _Fit | None = None
    journal: Journal = field(init=False)
    inbox: FileInbox = field(init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(self.path / "journal", vocabulary=e.CAMPAIGN)
        try:
            for entry in self.journal.entries:
                self.state = fold(self.state, entry.ts, cast("e.CampaignEvent", entry.event))
        except BaseException:
            self.journal.withdraw()
            raise
        self.journal.entries = []  # the state has all of them
        self.inbox = FileInbox(self.path)

    def close(self) -> None:
        if self.fit is not None:
            self.fit.process.close()
        self.journal.withdraw()  # its file stays if it holds a line

    def step(self) -> bool:
        """Take in requests, start what may start, send alerts. Returns whether the campaign is over."""
        self.journal.check_fence()
        self.journal.show_life(self.site.clock.monotonic())
        fitted = self._fitted()  # before the inbox is read: what a process has left before its end is then taken
        all_taken = self._take_requests()
        if self.state.open is not None:
            self._ask(self.state.open)
        elif all_taken:
            self._start_next(fitted)
        self._send_alerts()
        return self._over

    @property
    def trains(self) -> bool:
        """Whether a size trains, or waits for nodes."""
        return any(self._occupies(member) for member in self.state.members.values())

    @property
    def _over(self) -> bool:
        if self.state.started is None:
            return True  # of a start that was refused, or never asked for, nothing comes
        return not (self.state.waiting or self.state.open or self.state.unsettled or self.trains)

    def _record(self, event: e.CampaignEvent) -> None:
        entry = self.journal.stamp(event, self.site.clock.now())
        state = fold(self.state, entry.ts, cast("e.CampaignEvent", entry.event))
        self.journal.append(entry)
        self.state, self.changed = state, True

    def _take_requests(self) -> bool:
        """Journal the oldest requests. Returns whether none is left for the next step."""
        waiting = self.inbox.requests()
        for request in waiting[:MOST_AT_ONCE]:
            if request.request not in self.state.requests:
                event = event_of(self.path.name, self.state, request)
                try:
                    self._record(event)
                except NotJournalable as error:
                    why = str(error)[:300]
                    self._record(e.CampaignRequestRefused(request=request.request, author="", verb="", why=why))
            self.inbox.done(request.request)
        return len(waiting) <= MOST_AT_ONCE

    # ---- sizes

    def _start_next(self, fitted: str | None) -> None:
        members = self.state.members.values()
        if any(not self._known(member) for member in members):
            return  # a lineage that was requested a moment ago: which nodes it holds is not known yet
        training = sum(map(self._occupies, members))
        size = next_size(self.state, training, self.site.free_nodes())
        if size is not None and (unforecast := self._unforecast(size, fitted)) is not None:
            number = str(lineages.next_number(self.site.runs))
            request = self._request_of(size)
            self._record(
                e.CampaignMemberIntended(recipe=size.recipe, lineage=number, request=request, unforecast=unforecast)
            )
            self.fresh = request
            self._ask(self.state.members[size.recipe])
            self.fresh = ""

    def _request_of(self, size: Size) -> str:
        started = cast("e.CampaignStarted", self.state.started)
        return f"campaign-{self.path.name}-{started.sizes.index(size) + 1}"

    def _unforecast(self, size: Size, fitted: str | None) -> str | None:
        """Why there is no forecast of a size that could begin now; "": there is one; None: it is being made."""
        if size.recipe in self.state.forecasts:
            return ""
        if len(self.state.members) < _LEAST_SIZES:
            return f"{len(self.state.members)} of the {_LEAST_SIZES} sizes that the law needs have begun"
        if self.fit is not None and self.fit.recipe == size.recipe and fitted is not None:
            return fitted or "the sizes so far have too few settled losses after three warm-ups"
        if self.fit is None or self.fit.recipe != size.recipe:
            words = ("campaign", "forecast", self.path.name, "--recipe", size.recipe, "--journal", "-q")
            process = self.site.projection(words)
            process.limit = _FORECAST_SECONDS
            self.fit = _Fit(size.recipe, process)
            process.step(now=True)
        return None

    def _fitted(self) -> str | None:
        """What is wrong with the process that makes the forecast ("": nothing); None: it runs, or there is none."""
        if self.fit is None:
            return None
        self.fit.process.step(now=True)
        return self.fit.process.why if self.fit.process.idle else None

    def _ask(self, member: Member) -> None:
        """Request the lineage of an intended member, unless that was done before a crash. Then it is a member."""
        folder, asked = self.site.runs / member.lineage, True
        if lineages.claim(folder, self.site.group) or self._is_ours(folder, member):
            self._request(member)
        else:
            asked = False  # somebody has taken the number meanwhile; the next step takes another
        self._record(e.CampaignMember(recipe=member.recipe, lineage=member.lineage, asked=asked))
        if asked:
            log.info("campaign %s: lineage %s is %s", self.path.name, member.lineage, member.recipe)

    def _is_ours(self, folder: Path, member: Member) -> bool:
        """Whether a folder that exists is the one that an earlier daemon process created for the member."""
        if (folder / "inbox" / f"{member.request}.json").exists():
            return True
        started = self.site.lineage(member.lineage).lineage
        if started is not None:
            return started.request == member.request
        # It is empty. This process knows that it did not create it; an earlier one may have died before its request.
        return member.request != self.fresh and not any(folder.glob("*/*"))

    def _request(self, member: Member) -> None:
        started = cast("e.CampaignStarted", self.state.started)
        size = next(each for each in started.sizes if each.recipe == member.recipe)
        shape = size.shape
        arguments = {
            "lineage": member.lineage,
            "recipe": size.recipe,
            "settings": list(size.settings),
            "data": list(started.data),
            "valid": list(started.valid),
            "tokenizer": started.tokenizer,
            "shape": {
                "nodes": shape.nodes,
                "spares": shape.spares,
                "ranks_per_node": shape.ranks_per_node,
                "min_nodes": shape.min_nodes,
            },
            "reason": f"campaign {self.path.name}",
        }
        now = self.site.clock.now()
        folder = self.site.runs / member.lineage
        lineages.ask(folder, started.author, "start", arguments, now, identifier=member.request)

    def _lineage(self, member: Member) -> State:
        """The state of a member's lineage; that of none if it was deleted and another lineage has its number."""
        state = self.site.lineage(member.lineage)
        return State() if state.lineage is not None and state.lineage.request != member.request else state

    def _known(self, member: Member) -> bool:
        """Whether the daemon has taken in the request of a member, or there is nothing to take in any more."""
        if self._lineage(member).requests:
            return True
        return not (self.site.runs / member.lineage / "inbox" / f"{member.request}.json").exists()

    def _occupies(self, member: Member) -> bool:
        """Whether a member trains or will: what has ended, has halted, was refused or was deleted holds up nothing."""
        state = self._lineage(member)
        return not self._known(member) or (state.lineage is not None and not state.ended)

    # ---- alerts

    def _send_alerts(self) -> None:
        for name in sorted(self.state.unsettled):
            problem = self.site.warn(alert_of(self.path.name, self.state.alerts[name]))
            if problem is not None:
                self._record(e.CampaignAlertSettled(request=name, problem=problem[:300]))


def alert_of(campaign: str, event: e.CampaignAlert) -> Alert:
    """The message for on-call."""
    title = f"opt-ops campaign {campaign}: {event.recipe} (lineage {event.lineage}): {TITLES[event.what]}"
    body = f"{event.why}\nNothing was done. Next: opt-ops campaign status {campaign}"
    return Alert(f"campaign/{campaign}/{event.request}", Severity.WARNING, title, body)


TITLES = {
    e.AlertKind.ABOVE: "the loss is above its forecast",
    e.AlertKind.BELOW: "the loss is below its forecast",
    e.AlertKind.SETTINGS: "it differs from the other sizes",
}
"""What an alert says, in a few words."""
