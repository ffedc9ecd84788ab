"""The logs of a job together: what is new in them, in the format that they have, as readings in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opt_ops.core.failures.cause_lines import CauseLines
from opt_ops.watch_job.attempts import Ordered, StepOrder
from opt_ops.watch_job.line_formats import Format, Reader
from opt_ops.watch_job.log_follower import LogFollower, Segment
from opt_ops.watch_job.reading import Reading
from opt_ops.watch_job.recognition import TRIED_LINES, Labels, LogLine, Recognised, Recognition


@dataclass(slots=True)
class _Log:
    follower: LogFollower
    labels: Labels
    error: str = ""


class JobLogs:
    """Reads all logs of a job, each once. `on_reading` is called for each reading that counts."""

    def __init__(
        self,
        paths: Sequence[Path],
        formats: Sequence[Format],
        every: int | None,
        on_reading: Callable[[Ordered], None],
        say: Callable[[str], None],
    ) -> None:
        """`every`: updates between two lines, where they have no step. `say` gets remarks for people."""
        self._logs = [_Log(LogFollower(path), Labels(place)) for place, path in enumerate(dict.fromkeys(paths))]
        self._formats = formats
        self._every = every
        self._on_reading = on_reading
        self._say = say
        self._recognition = Recognition(formats)
        self._recognised: Recognised | None = None
        self._reader: Reader | None = None
        self._order = StepOrder()
        self._to_tell = TRIED_LINES  # lines without a recognised one, after which that is said
        self.causes = CauseLines()
        """The lines that name a cause, of all ranks."""

    @property
    def size(self) -> int:
        """Bytes that were read of all logs."""
        return sum(log.follower.size for log in self._logs)

    @property
    def behind(self) -> bool:
        """Whether more of the logs is there to be read at once."""
        return any(log.follower.behind for log in self._logs)

    def read(self) -> int:
        """Read what is new in all logs. Returns its bytes."""
        before = self.size
        for log in self._logs:
            try:
                for segment in log.follower.read():
                    self._take_segment(log, segment)
            except OSError as error:
                log.error = f"{log.follower.path} cannot be read: {error.strerror or error}"
            else:
                log.error = ""
        size = self.size - before
        if not self.behind:
            self._idle(size)
        return size

    def end(self) -> None:
        """Nobody writes to the logs any more: take what was held back."""
        for log in self._logs:
            for segment in log.follower.finish():
                self._take_segment(log, segment)
        if self._reader is None:
            self._recognise()
        if self._reader is not None:
            self._take_readings(self._reader.end())
        self._count(self._order.end())
        for log in self._logs:
            log.follower.close()

    @property
    def unreadable(self) -> str:
        """Why nothing is seen in the logs; empty: something is, or nothing can be expected yet."""
        if errors := [log.error for log in self._logs if log.error]:
            return "; ".join(errors)
        if self._order.mixed:
            return "steps fall again and again: the log mixes several runs or ranks, and restarts are not told any more"
        return ""

    @property
    def missing(self) -> str:
        """The files, if none of them is there; empty: one is."""
        if any(log.follower.exists for log in self._logs):
            return ""
        return f"{', '.join(str(log.follower.path) for log in self._logs)} is not there"

    @property
    def unrecognised(self) -> str:
        """That no format reads any line, which were tried, and the likeliest lines; empty: one does."""
        if self._reader is not None or not self._recognition.tried:
            return ""
        return f"no format reads any of {self._recognition.tried:,} lines; {self.tried}"

    @property
    def tried(self) -> str:
        """Which formats were tried, and the lines that look most like a training line."""
        liked = "".join(f"\n    {line}" for line in self._recognition.liked)
        names = ", ".join(each.name for each in self._formats)
        return f"tried: {names}" + (f"; the likeliest lines:{liked}" if liked else "")

    def _take_segment(self, log: _Log, segment: Segment) -> None:
        line = log.labels.take(segment.text, segment.starts_line)
        if self._reader is not None:
            self._take_line(line)
            return
        self._recognition.take(line)
        if line.text:
            self.causes.add(line.text)
        if self._recognition.enough:
            self._recognise()

    def _idle(self, size: int) -> None:
        """All that is there by now was read."""
        if self._reader is None and self._recognition.found is None and self._recognition.tried >= self._to_tell:
            self._to_tell *= 10
            self._say(f"No line is recognised yet, of {self._recognition.tried:,}.")
        if self._reader is None:
            found = self._recognition.found
            if found is not None and (found.lines >= 3 or not size):
                self._recognise()
        if self._reader is not None and not size:
            self._take_readings(self._reader.idle())

    def _recognise(self) -> None:
        """Take the best format, and read with it what was kept."""
        found = self._recognition.found
        if found is None:
            return
        self._recognised = found
        self._reader = found.format.reader(self._every)
        rank = "" if found.rank is None else f", rank {found.rank}"
        self._say(f"Format: {found.format.name}{rank} ({found.lines:,} of {found.of:,} lines so far).")
        if found.format.remark:
            self._say(f"  note: {found.format.remark}.")
        self.causes = CauseLines()  # the kept lines come again, now with their steps
        for line in self._recognition.kept():
            self._take_line(line)

    def _take_line(self, line: LogLine) -> None:
        assert self._reader is not None
        assert self._recognised is not None
        readings: Sequence[Reading] = ()
        if line.rank is None or self._recognised.rank is None or line.rank == self._recognised.rank:
            readings = self._reader.take(line.text, line.source)
            self._take_readings(readings)
        if line.text and not readings:
            self.causes.add(line.text)

    def _take_readings(self, readings: Sequence[Reading]) -> None:
        for reading in readings:
            self._count(self._order.take(reading))

    def _count(self, ordered: Sequence[Ordered]) -> None:
        for each in ordered:
            self.causes.add(f"step {each.reading.step}")  # what stands before it in the log did not end training
            self._on_reading(each)
