"""The watch over one job, or over a log alone: reads what is new, journals what it means, says what was found.

The law of it: a blind watcher must not look healthy. A controller that does not answer, a file that cannot be read and
lines that no format reads are journaled and said, as long as they last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opt_ops.adapters.slurm.states import Job
from opt_ops.core.detect.hang import HangRule
from opt_ops.core.events import LineageCancelled, LineageCompleted, LineageHalted, SignalRaised
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Outcome, Tier
from opt_ops.runfolder.fields import BadField
from opt_ops.watch_job.attempts import Ordered
from opt_ops.watch_job.ends import SUSPENDED_SECONDS, suspended, why_job_ended, why_log_ends
from opt_ops.watch_job.job import JobRecord
from opt_ops.watch_job.job_poll import JobPoll
from opt_ops.watch_job.line_formats import FORMATS, Format
from opt_ops.watch_job.lineage import ShadowLineage
from opt_ops.watch_job.logs import JobLogs
from opt_ops.watch_job.reading import Reading
from opt_ops.watch_job.remarks import OwnWords
from opt_ops.watch_job.silence import Silence
from opt_ops.watch_job.telemetry_line import Pace, telemetry_of

LOG_PART = "the watch over the log"
JOB_PART = "the watch over the job"
_AT_ONCE = 512  # points between two rounds of decisions
_LATE_SECONDS = 60.0  # that a log of a running job may be missing before that is said
_SETTLED_LOOKS = 2  # without a new byte after the job's end, until the log is taken for whole


@dataclass(slots=True, kw_only=True)
class Subject:
    """What is watched.

    Attributes:
        logs: The files, each once.
        poll: Asks for the job; None: a log alone.
        follow: Of a log alone: whether to wait for more lines at its end.
        formats: That are tried.
        every: Updates between two lines, where lines have no step; None: not given.
    """

    logs: Sequence[Path]
    poll: JobPoll | None = None
    follow: bool = False
    formats: Sequence[Format] = FORMATS
    every: int | None = None


class JobWatch:
    """The watch. `step` does one round; `over` says when nothing more can come; `end` journals how it ended."""

    def __init__(
        self,
        subject: Subject,
        lineage: ShadowLineage,
        hang: HangRule,
        say: Callable[[str], None],
        blind: Callable[[str], None],
    ) -> None:
        """`say` gets remarks for people; `blind` gets what the watch cannot see, when that begins."""
        self._subject = subject
        self._lineage = lineage
        self._say = say
        self._blind = blind
        self._logs = JobLogs(subject.logs, subject.formats, subject.every, self._take, say)
        now = time.monotonic()
        self._began = now
        self._hang = hang
        self._silence = Silence(hang, now)
        self._caught_up = False  # whether everything from before the watch began is read
        self._silent = False  # whether a hang is open
        self._words = OwnWords()
        self._pace = Pace()
        self._scaled = False  # whether the loss scale was ever another than 1
        self._pending = 0
        self._word = ""
        self._suspended_at: float | None = None
        self._settled = 0
        self.readings = 0
        """Lines that were read and count."""

    # ---- one round

    def step(self) -> None:
        """Ask for the job, read the logs, and conclude."""
        self._lineage.show_life()
        poll = self._subject.poll
        if poll is not None:
            poll.look()
            self._look_at_job(poll)
        size = self._logs.read()
        self._observe()
        now = time.monotonic()
        if not self._logs.behind and not self._caught_up:
            self._catch_up(now)
        elif size:
            self._silence.heard(now, size)
            self._heard_again()
        self._conclude(now)
        self._settled = 0 if size or self._logs.behind else self._settled + 1

    def _take(self, ordered: Ordered) -> None:
        if ordered.begins and self.readings:
            self._begin_again(ordered.reading)
        self._add(ordered.reading)

    def _begin_again(self, reading: Reading) -> None:
        assert reading.step is not None
        self._observe()
        last = self._lineage.last
        self._lineage.begin_again(reading.step)
        self._pace = Pace()
        self._say(f"The job began again at step {reading.step:,}{f', after step {last.step:,}' if last else ''}.")

    def _add(self, reading: Reading) -> None:
        """Write the telemetry of a reading, and tell what the trainer itself says of it."""
        assert reading.step is not None
        self._scaled = self._scaled or reading.loss_scale not in (None, 1.0)
        seconds = self._pace.seconds(reading, time.time() if self._caught_up else None)
        try:
            point = self._lineage.add(telemetry_of(reading, time.time(), seconds, scaled=self._scaled))
        except BadField as error:
            self._say(f"A line of step {reading.step:,} was left out: {error}.")
            return
        self.readings += 1
        words = self._words.take(reading, point)
        self._pending += 1
        if words or self._pending >= _AT_ONCE:
            self._observe()
            self._lineage.found(words)
            self._lineage.decide()

    def _observe(self) -> None:
        if self._pending:
            self._pending = 0
            self._lineage.observe()

    # ---- the job

    def _look_at_job(self, poll: JobPoll) -> None:
        now = time.monotonic()
        self._tell_blind(JOB_PART, poll.blind(now))
        record = poll.record
        if record is None:
            return
        if record.word != self._word:
            if not self._word:
                where = f" on {record.nodes}" if record.nodes else f": {record.reason}" if record.reason else ""
                self._say(f"Job {record.number} is {record.word}{where}.")
            else:
                self._say(f"Job {record.number} is {record.word}{f': {record.reason}' if record.reason else ''}.")
            self._word = record.word
        if record.meaning is not Job.SUSPENDED:
            self._suspended_at = None
        elif self._suspended_at is None:
            self._suspended_at = now
        elif now - self._suspended_at >= SUSPENDED_SECONDS:
            self._lineage.raised(suspended(self._lineage.attempt, record, now - self._suspended_at))
            self._lineage.decide()

    def _catch_up(self, now: float) -> None:
        """Everything from before the watch began is read. What it tells of gaps is a first guess."""
        self._caught_up = True
        self._silence.rest(now)
        if (slowest := self._pace.slowest) is not None and self.readings:
            self._silence.expect(slowest, self._logs.size / self.readings)

    def _heard_again(self) -> None:
        if self._silent:
            self._silent = False
            self._say("Lines come again.")

    def _conclude(self, now: float) -> None:
        """A silence that is too long, and what cannot be read."""
        poll = self._subject.poll
        self._tell_blind(LOG_PART, self._unreadable(now))
        if poll is not None and not poll.running:
            self._silence.rest(now)  # it waits, is suspended, has ended, or that is not known: nothing follows
        elif self._subject.follow or poll is not None:
            patience = self._silence.patience if self.readings else self._hang.startup_seconds
            if not self._silent and self._silence.seconds(now) > max(patience, self._silence.patience):
                self._hung(now)

    def _hung(self, now: float) -> None:
        self._silent = True
        last, seconds = self._lineage.last, self._silence.seconds(now)
        poll = self._subject.poll
        state = f"and job {poll.number} is RUNNING" if poll is not None else "and whether the job runs is not known"
        line = next((each.line.text for each in reversed(self._logs.causes.found) if not each.line.stale), "")
        self._lineage.raised(
            SignalRaised(
                signal=FailureClass.HANG,
                tier=Tier.ACT,
                attempt=self._lineage.attempt.name,
                step=last.step if last else None,
                onset_step=last.step if last else None,
                at=time.time() - seconds,
                rule=f"no line for {self._hang.multiple:g} × the longest gap of the last 64 "
                f"(at least {self._hang.floor_seconds:g} s)",
                evidence={
                    "seconds": seconds,
                    "patience": self._silence.patience,
                    "phase": "training" if last else "start",
                    "log": state,
                    "line": line,
                },
            )
        )
        self._lineage.decide()

    def _unreadable(self, now: float) -> str:
        """Why nothing is seen in the logs; empty: something is, or nothing can be expected yet."""
        running = self._subject.poll is None or self._subject.poll.running
        seconds = now - self._began if running else 0.0
        why = self._logs.unreadable
        if not why and seconds > _LATE_SECONDS:
            why = self._logs.missing
        if not why and seconds > self._hang.startup_seconds:
            why = self._logs.unrecognised  # before that, a job may still be starting
        return why

    def _tell_blind(self, part: str, why: str) -> None:
        if self._lineage.tell_blind(part, why):
            self._lineage.decide()
            if why:
                self._blind(f"{part} sees nothing: {why}")
            else:
                self._say(f"{part.capitalize()} sees again.")

    @property
    def blind(self) -> bool:
        """Whether a part of the watch sees nothing now."""
        return any(part in self._lineage.state.failing for part in (LOG_PART, JOB_PART))

    # ---- the end

    @property
    def behind(self) -> bool:
        """Whether more of the logs is there to be read at once."""
        return self._logs.behind

    @property
    def tried(self) -> str:
        """Which formats were tried, and the lines that look most like a training line."""
        return self._logs.tried

    @property
    def over(self) -> bool:
        """Whether nothing more can come: the job has ended, or the log alone was read to its end."""
        if self._logs.behind:
            return False
        poll = self._subject.poll
        if poll is None:
            return not self._subject.follow
        return poll.over and self._settled >= _SETTLED_LOOKS

    def end(self, stopped_by: str = "") -> None:
        """Read what is left, and journal how the job or the watch ended.

        `stopped_by`: who ended the watch before that; empty: nobody did.
        """
        self._logs.end()
        self._observe()
        if unrecognised := self._logs.unrecognised:
            self._tell_blind(LOG_PART, unrecognised)
        self._lineage.observe()
        last = self._lineage.last
        where = f" at step {last.step:,}" if last else ""
        poll = self._subject.poll
        if stopped_by:
            self._lineage.report_progress()
            self._close(Outcome.STOPPED)
            going = f"; job {poll.number} was not touched" if poll is not None else ""
            self._lineage.record(LineageCancelled(request="", why=f"{stopped_by} ended the watch{where}{going}"))
        elif poll is None:
            self._end_log(where)
        else:
            self._end_job(poll, where)
        self._lineage.decide()

    def _close(self, outcome: Outcome) -> None:
        self._lineage.end_attempt(outcome)

    def _end_log(self, where: str) -> None:
        raised = why_log_ends(self._lineage.attempt, self._lineage.last, self._logs.causes)
        if raised is not None:
            self._lineage.raised(raised)
            self._lineage.decide()
        self._close(Outcome.LOST if raised is not None else Outcome.STOPPED)
        why = f"the log was read to its end{where}; what became of the job is not known"
        step = self._lineage.attempt.last_step or 0
        self._lineage.record(LineageCompleted(step=step, why=why))

    def _end_job(self, poll: JobPoll, where: str) -> None:
        record = poll.record or JobRecord(number=poll.number, word="FORGOTTEN", meaning=None)
        raised = why_job_ended(self._lineage.attempt, self._lineage.last, record, poll.gone, self._logs.causes)
        step = self._lineage.attempt.last_step or (self._lineage.last.step if self._lineage.last else 0)
        why = f"job {record.number} {'ended' if poll.gone else record.word}{where}"
        if raised is None:
            self._close(Outcome.COMPLETED)
            self._lineage.record(LineageCompleted(step=step, why=why))
            return
        self._lineage.raised(raised)
        self._lineage.decide()
        self._close(Outcome.FAILED if raised.signal == FailureClass.PROCESS_DEATH else Outcome.LOST)
        if raised.signal == FailureClass.JOB_CANCELLED:
            self._lineage.record(LineageCancelled(request="", why=why))
        else:
            self._lineage.record(LineageHalted(why=f"{why}; opt-ops only watches, and starts nothing", incident=None))
