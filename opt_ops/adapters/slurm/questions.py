"""Questions to Slurm, each in a thread of its own: a slow answer holds up nobody, and no recovery.

Nothing here waits. `Watched` is for what is asked again and again: its newest answer is given until it is too old.
`Once` is for what has an effect, or must not be older than the wish to know it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Generic, TypeVar

from opt_ops.core.text import clock
from opt_ops.errors import NotYet, OptOpsError, SchedulerUnavailable

_T = TypeVar("_T")

POLL_SECONDS = 5.0  # between two questions about one job: slurmctld serves other users, too
STALE_SECONDS = 60.0  # after which an answer says nothing any more: more than three slow answers, one after the other
KEPT_SECONDS = 60.0  # so long the outcome of a `Once` waits to be taken


class Watched(Generic[_T]):
    """A question that is asked every `POLL_SECONDS` while somebody reads the answer."""

    def __init__(self, question: Callable[[], _T]) -> None:
        self._question = question
        self._open: Future[tuple[float, float, _T]] | None = None
        self._first_asked: float | None = None
        self._done_at = 0.0
        self._answer: tuple[float, float, _T] | None = None  # monotonic time, time of day, answer
        self._error: SchedulerUnavailable | None = None

    def read(self) -> _T:
        """Return the newest answer, and ask again if it is time to. Never waits.

        Raises:
            NotYet: there was no answer yet.
            SchedulerUnavailable: the newest answer is older than `STALE_SECONDS`, or there was only an error.
        """
        now = time.monotonic()
        if self._open is not None and self._open.done():
            self._take(self._open, now)
        if self._open is None and (self._first_asked is None or now - self._done_at >= POLL_SECONDS):
            self._first_asked = now if self._first_asked is None else self._first_asked
            self._open = in_thread(partial(_timed, self._question))
        if self._answer is not None and now - self._answer[0] <= STALE_SECONDS:
            return self._answer[2]
        if self._answer is None and self._error is None and now - (self._first_asked or now) <= STALE_SECONDS:
            raise NotYet("Slurm has not answered yet")
        why = str(self._error) if self._error else f"Slurm does not answer for {STALE_SECONDS:g} s"
        last = f"; last answer at {clock(self._answer[1])}" if self._answer else ""
        raise SchedulerUnavailable(why + last)

    def _take(self, done: Future[tuple[float, float, _T]], now: float) -> None:
        self._open, self._done_at = None, now
        try:
            self._answer, self._error = done.result(), None
        except SchedulerUnavailable as error:
            self._error = error


class Once(Generic[_T]):
    """A question whose answer is given once. The next call asks again."""

    def __init__(self, question: Callable[[], _T]) -> None:
        self._question = question
        self._open: Future[tuple[float, float, _T]] | None = None

    def take(self) -> _T:
        """Return the answer to the open question; ask if none is open. Never waits.

        Raises:
            NotYet: there is no answer yet.
            OptOpsError: what the question raised.
        """
        if self._open is not None and self._open.done():
            done, self._open = self._open, None
            answered_at, _, answer = done.result()
            if time.monotonic() - answered_at <= KEPT_SECONDS:
                return answer
        if self._open is None:
            self._open = in_thread(partial(_timed, self._question))
        raise NotYet("Slurm has not answered yet")


def _timed(question: Callable[[], _T]) -> tuple[float, float, _T]:
    """An answer, with the monotonic time and the time of day at which it came."""
    answer = question()
    return time.monotonic(), time.time(), answer


def in_thread(call: Callable[[], _T]) -> Future[_T]:
    """Run a call in a daemon thread, which does not keep the process alive."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except OptOpsError as error:
            future.set_exception(error)
        except Exception as error:  # noqa: BLE001  (whatever Slurm writes, and however the system fails: no answer)
            found = f"{type(error).__name__}: {error}"
            future.set_exception(SchedulerUnavailable(f"what Slurm says could not be read: {found}"))

    try:
        Thread(target=run, daemon=True).start()
    except RuntimeError as error:  # the system has no thread left
        future.set_exception(SchedulerUnavailable(f"Slurm could not be asked: {error}"))
    return future
