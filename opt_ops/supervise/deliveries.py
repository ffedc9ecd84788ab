"""When an alert is sent, and when it is sent again.

A page is tried until it is delivered: after one minute, then after twice the pause before, at most every ten minutes.
As soon as another message gets through, it is tried again at once. Other alerts are tried once a minute for an hour.
"""

from __future__ import annotations

from opt_ops.core.values import Severity
from opt_ops.core.waiting import Backoff, Retries

_PAGE_BACKOFF = Backoff(first=60.0, factor=2.0, most=600.0)
_OTHER_BACKOFF = Backoff(first=60.0)
_GIVE_UP_SECONDS = 3600.0  # of an alert that is no page


class Deliveries:
    """The tries of one sender, by the id of the alert. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._pages = Retries(_PAGE_BACKOFF)
        self._others = Retries(_OTHER_BACKOFF)

    def due(self, alert: str, severity: Severity, now: float) -> bool:
        """Whether the alert is to be sent now."""
        return self._of(severity).due(alert, now)

    def tried(self, alert: str, severity: Severity, now: float) -> None:
        """The alert was handed to the notifier."""
        self._of(severity).tried(alert, now)

    def got_through(self) -> None:
        """A message was delivered: pages that wait are due at once."""
        self._pages = Retries(_PAGE_BACKOFF)

    def given_up(self, severity: Severity, seconds: float) -> bool:
        """Whether an alert that was not delivered for so many seconds is not tried any more. A page always is."""
        return severity is not Severity.PAGE and seconds > _GIVE_UP_SECONDS

    def _of(self, severity: Severity) -> Retries:
        return self._pages if severity is Severity.PAGE else self._others
