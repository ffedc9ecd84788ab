"""`opt-ops run watch` and `opt-ops run logs`: live views of a lineage."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ops.cli import views
from opt_ops.cli.options import IdArgument, QuietOption, find_lineage, lineage_folder
from opt_ops.cli.output import say, text
from opt_ops.cli.run import app
from opt_ops.core.detect.point import Point
from opt_ops.core.events import kind_of
from opt_ops.core.names import attempt_folder
from opt_ops.core.state import in_place
from opt_ops.core.state.fold import replay
from opt_ops.core.state.model import State
from opt_ops.core.text import age, printable
from opt_ops.errors import NotFound
from opt_ops.runfolder import lineages
from opt_ops.runfolder.fields import BadField
from opt_ops.runfolder.files import Tail
from opt_ops.runfolder.liveness import look
from opt_ops.runfolder.telemetry import point_of

if TYPE_CHECKING:
    from rich.console import Group

_SHOWN = 8  # of the newest events
_POINTS = 600  # of telemetry that the curve is drawn from
_BARS = "▁▂▃▄▅▆▇█"
_QUIET = frozenset({"attempt_progressed", "energy_metered", "checkpoint_seen", "alert_intended"})


@app.command()
def watch(
    identifier: IdArgument,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two updates.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print once and exit. The default if stdout is no terminal.")
    ] = False,
) -> None:
    """Watch a lineage live: progress, loss, findings, events. Ctrl-C ends the view only.

    Example: opt-ops run watch 12
    """
    view = _View(lineage_folder(identifier))
    if once or not sys.stdout.isatty():
        from rich.console import Console

        Console(no_color=True, width=None if sys.stdout.isatty() else 100).print(view.frame())
        return
    from rich.live import Live

    with Live(view.frame(), auto_refresh=False, screen=True) as live:
        while not view.state.settled:
            time.sleep(every)
            live.update(view.frame(), refresh=True)
    say(f"Lineage {view.path.name} is {view.state.status}.\n  next: opt-ops logbook open {view.path.name}")


class _View:
    """The view. It reads the journal again when it has grown, and the new lines of the telemetry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = State()
        self._news: deque[dict[str, Any]] = deque(maxlen=_SHOWN)
        self._size = -1
        self._attempt = ""
        self._tail = Tail(path)
        self._points: deque[Point] = deque(maxlen=_POINTS)
        self._valid: Mapping[str, float | None] = {}

    def frame(self) -> Group:
        """The whole screen, as of now."""
        from rich.console import Group
        from rich.rule import Rule
        from rich.text import Text

        self._read()
        lines = [Text(printable(line)) for line in self._head(time.time())]
        rows = [Text(f"{row['ts'][11:19]}  {row['text']}", no_wrap=True, overflow="ellipsis") for row in self._news]
        return Group(*lines, Rule("OPEN"), *map(Text, self._open()), Rule("NEWEST"), *rows)

    def _read(self) -> None:
        size = sum(file.stat().st_size for file in (self.path / "journal").glob("*.jsonl"))
        if size != self._size:
            self._size, entries = size, lineages.entries(self.path)
            rows = views.EventRows()
            self._news = deque(rows.of(entries, lambda entry: kind_of(entry.event) not in _QUIET), maxlen=_SHOWN)
            self.state = replay(entries)
        attempt = self.state.attempt
        if attempt is not None and attempt.name != self._attempt:
            self._attempt = attempt.name
            self._tail = Tail(self.path / attempt_folder(attempt.name) / "telemetry.jsonl")
            self._tail.skip_to_last(_POINTS * 1024)
            self._points.clear()
            self._valid = {}
        for line in self._tail.read():
            with suppress(BadField):  # another trainer writes these lines; the view shows the others
                self._points.append(point := point_of(line))
                self._valid = point.valid or self._valid

    def _head(self, now: float) -> Iterator[str]:
        row = views.lineage_row(self.path, self.state, look(self.path.parent, now))
        since = f"{row['shown']} for {row['age'] or '-'}"
        yield f"lineage {row['lineage']}  {since}   {row['recipe'] or ''}  {row['reason']}"
        where = (("run", row["run"]), ("attempt", self._attempt), ("job", row["job"]), ("nodes", row["nodes"]))
        known = [f"{name} {text(value)}" for name, value in where]
        if row["standby"] is not None:
            known += [f"generation {row['generation']}", in_place.standby(row["standby"])]
        yield "   ".join(known)
        step, steps = row["step"], row["steps"]
        if steps and step is not None:
            share = min(1.0, step / steps)
            left = self._left(steps - step)
            full = round(40 * share)
            yield f"{'█' * full}{'░' * (40 - full)} {100 * share:.1f} %   step {step:,} of {steps:,}{left}"
        numbers = ("loss", "lr", "wps", "checkpoint", "restarts")
        last = f"   last step {row['step_age']} ago" if row["step_age"] else ""
        yield "   ".join(f"{name} {text(row[name])}" for name in numbers) + last
        if self._valid:
            yield "validation   " + "   ".join(f"{name} {text(loss)}" for name, loss in self._valid.items())
        losses = [point.loss for point in self._points]
        if len(losses) > 1:
            yield f"loss, last {len(losses)} steps  {sparkline(losses, 60)}"

    def _left(self, steps: int) -> str:
        recent = list(self._points)[-50:]
        if len(recent) < 2 or recent[-1].step <= recent[0].step or steps <= 0:
            return ""
        seconds = (recent[-1].ts - recent[0].ts) / (recent[-1].step - recent[0].step)
        return f", {age(steps * seconds)} at this pace"

    def _open(self) -> list[str]:
        found = views.findings(self.path, self.state, look(self.path.parent, time.time()))
        return [printable(f"{each['finding']}  {each['why']}") for each in found] or ["nothing is wrong"]


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw values as one line of bars. A value that is not finite is a cross."""
    per = max(1, len(values) // width)
    groups = [values[start : start + per] for start in range(0, len(values), per)][-width:]
    tops = [max((v for v in group if v is not None), default=None) if None not in group else None for group in groups]
    known = [top for top in tops if top is not None]
    if not known:
        return "×" * len(tops)
    low, high = min(known), max(known)
    scale = (len(_BARS) - 1) / ((high - low) or 1.0)
    return "".join("×" if top is None else _BARS[round((top - low) * scale)] for top in tops)


@app.command()
def logs(
    identifier: IdArgument,
    rank: Annotated[int, typer.Option(min=0, help="Number of the rank.")] = 0,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="Number of last lines.")] = 50,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing new lines until Ctrl-C.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Print the log of a rank.

    It is that of the attempt that is named, or of the newest one.

    Examples:
      opt-ops run logs 12 -f
      opt-ops run logs 12.01-a3 --rank 17 -n 200
    """
    lineage = find_lineage(identifier)
    path = lineage.path
    attempts = [name for name in lineage.state.attempts if identifier in (path.name, name, name.split("-")[0])]
    if not attempts:
        raise NotFound(f"{identifier} has no attempt yet", f"opt-ops run show {path.name}")
    file = path / attempt_folder(attempts[-1]) / "logs" / f"rank-{rank:04d}.log"
    if not file.exists():
        there = ", ".join(str(int(p.stem.partition("-")[2])) for p in sorted(file.parent.glob("rank-*.log"))) or "none"
        raise NotFound(f"there is no {file}", f"ranks with a log: {there}")
    say(str(file), quiet)
    with file.open("rb") as stream:
        _print(_last(stream.read(), lines))
        while follow:
            time.sleep(0.5)
            _print(stream.readlines())


def _last(content: bytes, lines: int) -> list[bytes]:
    return content.splitlines()[-lines:]


def _print(lines: Iterable[bytes]) -> None:
    for line in lines:
        print(printable(line.decode("utf-8", "replace").rstrip("\r\n").expandtabs(4)))
    sys.stdout.flush()
