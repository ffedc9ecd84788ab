"""Guards each part of the watch by itself: a part that fails is skipped for this time, and the others go on.

That a part fails is journaled and paged, so that nobody takes a blind part for one that sees nothing. Only the journal
ends a supervisor: what cannot be written cannot be watched.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from opt_ops.core.events import Event, WatcherFailed, WatcherRecovered
from opt_ops.core.state.model import State
from opt_ops.core.text import clean, printable
from opt_ops.ports import Clock

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_QUIET_SECONDS = 60.0  # without a failure until a part counts as recovered
_LONGEST_QUIET = 3600.0  # the same after many failures: a part that fails now and then must not flood the journal
_LONGEST_WHY = 500
_PARTS = 64  # with a name of their own


@dataclass
class _Failing:
    why: str
    at: float  # monotonic, of the last failure
    told: str = ""  # what the journal knows
    told_at: float = 0.0
    quiet: float = _QUIET_SECONDS


class Guard:
    """What of one lineage's watch fails in this daemon process."""

    def __init__(self, clock: Clock, fatal: tuple[type[Exception], ...] = ()) -> None:
        """`fatal` are the errors that end a supervisor."""
        self._clock = clock
        self._fatal = fatal
        self._began = clock.monotonic()
        self._failing: dict[str, _Failing] = {}

    def call(self, part: str, work: Callable[[], _T], default: _T) -> _T:
        """Return what `work` returns; `default` if it fails."""
        try:
            return work()
        except self._fatal:
            raise
        except Exception as error:  # noqa: BLE001 - no fault of one part may end or blind the others
            self.failed(part, error)
            return default

    def each(self, part: str, found: Callable[[], Iterable[_T]]) -> Iterator[_T]:
        """Yield what `found` yields, until it fails. Errors of the consumer are not caught."""
        try:
            yield from found()
        except self._fatal:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            self.failed(part, error)

    def failed(self, part: str, error: Exception) -> None:
        """A part has failed: log it, with the traceback if the reason is new."""
        why = _reason(error)
        known = self._failing.get(part)
        if known is None and len(self._failing) >= _PARTS:
            part, known = "other parts", self._failing.get("other parts")
        if known is None:
            known = self._failing[part] = _Failing(why, 0.0)
        if known.why != why or known.at == 0.0:
            log.error("%s failed and was skipped: %s", part, why, exc_info=error)
        known.why, known.at = why, self._clock.monotonic()

    def news(self, state: State) -> Iterator[Event]:
        """Yield an event for each part that fails for a new reason, and for each that has recovered."""
        now = self._clock.monotonic()
        for part, each in self._failing.items():
            quiet = now - each.at >= each.quiet
            if not quiet and each.told != each.why and (not each.told or now - each.told_at >= each.quiet):
                each.told, each.told_at = each.why, now
                if part not in state.failing or state.failing[part].why != each.why:
                    yield WatcherFailed(watcher=part, why=each.why)
            elif quiet and each.told:
                each.told, each.quiet = "", min(2 * each.quiet, _LONGEST_QUIET)
        for part in state.failing:
            known = self._failing.get(part)
            told = known is not None and known.told
            if not told and now - (known.at if known else self._began) >= _QUIET_SECONDS:
                yield WatcherRecovered(watcher=part)


def _reason(error: Exception) -> str:
    """The error and where it was raised, as one line that the journal can hold."""
    last = next(reversed(traceback.extract_tb(error.__traceback__)), None)
    place = f" ({Path(last.filename).name}:{last.lineno})" if last else ""
    try:
        said = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - an error whose text cannot be made must not fail its report
        said = type(error).__name__
    return printable(clean(said, _LONGEST_WHY)) + place
