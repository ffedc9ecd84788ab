"""What `opt-ops watch` shows: a lineage's state, its newest events and telemetry, read again as they grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from opt_ops.cli.shared import views
from opt_ops.cli.shared.output import text
from opt_ops.core.detect.point import Point
from opt_ops.core.events import kind_of
from opt_ops.core.names import attempt_folder
from opt_ops.core.state import in_place
from opt_ops.core.state.fold import replay
from opt_ops.core.state.model import State
from opt_ops.core.text import age
from opt_ops.runfolder import lineages
from opt_ops.runfolder.fields import BadField
from opt_ops.runfolder.files import Tail
from opt_ops.runfolder.liveness import look
from opt_ops.runfolder.telemetry import point_of

_EVENTS = 60  # newest ones that are kept
_TOLD = 400  # of the journal's last entries: the newest events are among them
_POINTS = 600  # of telemetry that the curve is drawn from
_ATTEMPTS = 3  # newest ones of which it is drawn
_QUIET = frozenset({"attempt_progressed", "energy_metered", "checkpoint_seen", "alert_intended"})


class Watched:
    """A lineage that is looked at again and again.

    Attributes:
        path: Its folder.
        state: As its journal tells it.
        news: Rows of its newest events, oldest first.
        points: Its newest telemetry, in the order in which it was made: a rollback repeats steps.
        valid: The newest validation losses, by corpus.
        row: Its row of `opt-ops q`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = State()
        self.news: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self.points: deque[Point] = deque(maxlen=_POINTS)
        self.valid: Mapping[str, float | None] = {}
        self.row: Mapping[str, Any] = {}
        self._size = -1
        self._attempt = ""
        self._tail = Tail(path)
        self._rows = views.EventRows()

    def look(self, now: float) -> None:
        """Read what is new."""
        size = sum(file.stat().st_size for file in (self.path / "journal").glob("*.jsonl"))
        if size != self._size:
            self._size = size
            self._read_journal()
        known = list(self.state.attempts)[-_ATTEMPTS:]
        for name in known[known.index(self._attempt) + 1 :] if self._attempt in known else known:
            self._follow(name)
        self._take()
        self.row = views.lineage_row(self.path, self.state, look(self.path.parent, now))

    def _read_journal(self) -> None:
        seen = self._rows.seq
        entries = lineages.entries_after(self.path, seen) if seen else lineages.entries(self.path)
        newest = entries[-1].seq - _TOLD if entries else 0
        self.news.extend(
            self._rows.of(entries, lambda entry: entry.seq > newest and kind_of(entry.event) not in _QUIET)
        )
        self.state = self._rows.state or replay(lineages.entries(self.path))

    def _follow(self, attempt: str) -> None:
        """Read what is left of the attempt before, and go on with this one."""
        self._take()
        self._attempt = attempt
        self._tail = Tail(self.path / attempt_folder(attempt) / "telemetry.jsonl")
        with suppress(OSError):
            self._tail.skip_to_last(_POINTS * 1024)
        self.valid = {}
        self._take()

    def _take(self) -> None:
        if not self._attempt:
            return
        for line in self._tail.read():
            with suppress(BadField):  # another trainer writes these lines; the view shows the others
                self.points.append(point := point_of(line))
                self.valid = point.valid or self.valid

    def left(self) -> str:
        """The time to its last step at the pace of the newest ones; empty if that is not known."""
        step, steps = self.row["step"], self.row["steps"]
        recent = list(self.points)[-50:]
        if not steps or step is None or steps <= step or len(recent) < 2 or recent[-1].step <= recent[0].step:
            return ""
        seconds = (recent[-1].ts - recent[0].ts) / (recent[-1].step - recent[0].step)
        return f"{age((steps - step) * seconds)} at this pace" if seconds > 0 else ""

    def where(self) -> str:
        """Run, attempt, job, nodes."""
        row = self.row
        where = (("run", row["run"]), ("attempt", self._attempt), ("job", row["job"]), ("nodes", row["nodes"]))
        known = [f"{name} {text(value)}" for name, value in where]
        if row["standby"] is not None:
            known += [f"generation {row['generation']}", in_place.standby(row["standby"])]
        if row["evaluates"] is not None:
            known += [f"evaluates {row['evaluates']}"]
        return "   ".join(known)

    def progress(self, width: int) -> str:
        """A bar of `width` characters, the step and the time that is left; empty if the last step is not known."""
        step, steps = self.row["step"], self.row["steps"]
        if not steps or step is None:
            return ""
        share = min(1.0, step / steps)
        full = round(width * share)
        left = f", {self.left()}" if self.left() else ""
        return f"{'█' * full}{'░' * (width - full)} {100 * share:.1f} %   step {step:,} of {steps:,}{left}"

    def numbers(self) -> Iterator[str]:
        """Loss, rate, pace, newest good checkpoint, restarts, and how old the newest step is."""
        for name in ("loss", "lr", "wps", "checkpoint", "restarts"):
            yield f"{name} {text(self.row[name])}"
        if self.row["step_age"]:
            yield f"last step {self.row['step_age']} ago"
