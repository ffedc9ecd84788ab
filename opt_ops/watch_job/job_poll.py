"""Asks Slurm for a job every few seconds, in a thread: a controller that does not answer holds up no log."""

from __future__ import annotations

import time
from concurrent.futures import Future

from opt_ops.adapters.slurm.questions import POLL_SECONDS, in_thread
from opt_ops.errors import NotFound, OptOpsError
from opt_ops.watch_job.job import JobRecord, job_of

BLIND_SECONDS = 30.0
"""Without an answer after which the state of the job counts as not known: more than one slow answer (20 s)."""


class JobPoll:
    """The newest answer about a job, and how long there has been none."""

    def __init__(self, number: str, known: JobRecord | None, now: float) -> None:
        """`known`: the first answer, if there was one. Times are monotonic seconds."""
        self.number = number
        self.record = known
        """The newest answer; None: there was none yet."""
        self.gone = False
        """Whether Slurm knows the job no more, although it did."""
        self.why = ""
        """Why the newest question had no answer; empty: it had one."""
        self._open: Future[JobRecord] | None = None
        self._asked_at = now
        self._answered_at = now

    def look(self) -> None:
        """Take the answer if it is there, and ask again if it is time to. Never waits."""
        now = time.monotonic()
        if self._open is not None and self._open.done():
            self._take(self._open, now)
            self._open = None
        if self._open is None and not self.over and now - self._asked_at >= POLL_SECONDS:
            self._asked_at = now
            self._open = in_thread(lambda: job_of(self.number))

    def _take(self, answer: Future[JobRecord], now: float) -> None:
        try:
            self.record, self.why, self._answered_at = answer.result(), "", now
        except NotFound as error:
            self.gone, self.why, self._answered_at = self.record is not None, str(error), now
        except OptOpsError as error:
            self.why = str(error)

    @property
    def over(self) -> bool:
        """Whether the job has ended, as far as Slurm says."""
        return self.gone or (self.record is not None and self.record.ended)

    def blind(self, now: float) -> str:
        """Why the state of the job is not known now; empty: it is."""
        if self.over or now - self._answered_at < BLIND_SECONDS:
            return ""
        return self.why or f"Slurm does not answer for {now - self._answered_at:.0f} s"

    @property
    def running(self) -> bool:
        """Whether the newest answer says that the job runs, and it is not old."""
        fresh = time.monotonic() - self._answered_at < BLIND_SECONDS
        return fresh and not self.gone and self.record is not None and self.record.running
