"""Alerts of the daemon itself: about lineages that it does not watch, whose journals cannot carry them.

A lineage that nobody watches is a page. It is repeated every hour until the lineage is watched, or until an operator
answers it with any request, such as a note. A lineage that another daemon has taken over is a warning, and a page only
if no daemon watches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opt_ops.core.values import Severity
from opt_ops.ports import Alert, Clock, Notifier
from opt_ops.supervise.deliveries import Deliveries

_AGAIN_SECONDS = 3600.0  # between two pages about one lineage
_ELSEWHERE_SECONDS = 90.0  # until the liveness file of another host is seen; see runfolder.liveness
_NEXT = "Training continues, but no daemon watches it. Next: the daemon's log, and opt-ops daemon status"


@dataclass(slots=True)
class _Open:
    alert: Alert
    at: float  # wall clock


@dataclass(slots=True)
class _Unwatched:
    why: str
    page_at: float  # monotonic; when the next page is due
    page: _Open | None = None
    told_at: float | None = None  # wall clock; when the last page was written that was delivered


class WatchAlerts:
    """Sends them, and sends them again."""

    def __init__(
        self,
        notifier: Notifier,
        clock: Clock,
        answered: Callable[[str, float], bool],
        paged: Mapping[str, float] | None = None,
    ) -> None:
        """Begin with what the daemon process before has sent.

        Args:
            notifier: Delivers in the background.
            clock: The clocks.
            answered: Whether an operator has made a request to a lineage since a time (seconds since the epoch).
            paged: When the daemon process before this one last paged for a lineage.
        """
        self._notifier = notifier
        self._clock = clock
        self._answered = answered
        self._deliveries = Deliveries()
        self._unwatched: dict[str, _Unwatched] = {}
        self._warnings: dict[str, _Open] = {}
        self._outcomes: dict[str, str] = {}
        self.paged = dict(paged or {})
        """When the last page about a lineage was delivered."""
        self.problems: dict[str, str] = {}
        """Why alerts are not delivered, by alert."""

    def unwatched(self, lineage: str, why: str) -> None:
        """Nobody watches a lineage from now on."""
        self._begin(lineage, why, 0.0).why = why

    def fenced(self, lineage: str, why: str) -> None:
        """Another daemon process has taken over a lineage. It must show soon that it watches."""
        now = self._clock.now()
        title = f"opt-ops {lineage}: this daemon was fenced"
        body = f"{why}\nThis daemon does not watch it any more. Next: opt-ops daemon status"
        alert = Alert(f"{lineage}/fenced/{now:.0f}", Severity.WARNING, title, body)
        self._warnings[alert.id] = _Open(alert, now)
        self.unwatched_elsewhere(lineage)

    def warn(self, alert: Alert) -> str | None:
        """Send a warning that is not about the watch, until it is delivered or given up.

        Returns None until then; then once what is wrong, or "" if it was delivered.
        """
        if alert.id not in self._outcomes and alert.id not in self._warnings:
            self._warnings[alert.id] = _Open(alert, self._clock.now())
        return self._outcomes.pop(alert.id, None)

    def unwatched_elsewhere(self, lineage: str) -> None:
        """No living daemon names a lineage that this one has lost."""
        self._begin(lineage, "this daemon was fenced, and no living daemon watches the lineage", _ELSEWHERE_SECONDS)

    def _begin(self, lineage: str, why: str, pause: float) -> _Unwatched:
        again = self.paged.get(lineage, 0.0) + _AGAIN_SECONDS - self._clock.now()
        pause = max(pause, min(again, _AGAIN_SECONDS))
        return self._unwatched.setdefault(lineage, _Unwatched(why, self._clock.monotonic() + pause))

    def watched(self, lineage: str) -> None:
        """The lineage is watched again."""
        self._unwatched.pop(lineage, None)

    def got_through(self) -> None:
        """Another message was delivered: pages that wait are sent again at once."""
        self._deliveries.got_through()

    def step(self) -> None:
        """Take note of what was delivered, and send what is due."""
        outcomes = dict(self._notifier.delivered())
        for name, why in outcomes.items():
            self.problems.pop(name, None)
            if why:
                self.problems[name] = why
        if "" in outcomes.values():
            self._deliveries.got_through()
        for name, warning in list(self._warnings.items()):
            late = self._deliveries.given_up(Severity.WARNING, self._clock.now() - warning.at)
            if outcomes.get(name) == "" or (name in outcomes and late):
                del self._warnings[name]
                self._outcomes[name] = outcomes[name]
            else:
                self._send(warning.alert)
        for lineage, each in list(self._unwatched.items()):
            self._page(lineage, each, outcomes)

    def _page(self, lineage: str, each: _Unwatched, outcomes: Mapping[str, str]) -> None:
        now = self._clock.now()
        if each.page is not None and outcomes.get(each.page.alert.id) == "":
            self.paged[lineage], each.told_at = now, each.page.at
            each.page, each.page_at = None, self._clock.monotonic() + _AGAIN_SECONDS
        if each.page is None and self._clock.monotonic() >= each.page_at:
            since = self.paged.get(lineage) if each.told_at is None else each.told_at
            if since is not None and self._answered(lineage, since):
                return
            title = f"opt-ops {lineage}: not watched, an operator is needed"
            alert = Alert(f"{lineage}/unwatched/{now:.0f}", Severity.PAGE, title, f"{each.why}\n{_NEXT}")
            each.page = _Open(alert, now)
        if each.page is not None:
            self._send(each.page.alert)

    def _send(self, alert: Alert) -> None:
        now = self._clock.monotonic()
        if self._deliveries.due(alert.id, alert.severity, now):
            self._deliveries.tried(alert.id, alert.severity, now)
            self._notifier.send(alert)
