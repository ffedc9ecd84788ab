"""The screen of `opt-ops watch`: state, loss curve, nodes, incidents and newest events, at any size of the terminal."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.segment import Segment
from rich.text import Text

from opt_ops.cli.shared.output import text
from opt_ops.cli.shared.standing import silent_nodes
from opt_ops.cli.shared.streams import PLAIN
from opt_ops.cli.shared.text_curve import curve
from opt_ops.cli.shared.watched import Watched
from opt_ops.core.state.model import Incident, Node
from opt_ops.core.text import clock, printable
from opt_ops.core.told import words
from opt_ops.core.told.phrase import clean, count, cut, figure
from opt_ops.core.values import Action, Status, Verdict

_POLL_SECONDS = 0.25  # between two looks at the keyboard and the size of the terminal
_FINDINGS = 3  # that are shown above the curve; more are counted
_SMALL = 60  # columns: with fewer, nodes and incidents have no room beside each other
_CURVE_FROM = 9  # lines below the head: with fewer, the newest events alone are shown
_MIDDLE_FROM = 8  # lines below the curve
_HEAD = 4  # lines

_STYLES = {Status.TRAINING: "green", Status.COMPLETED: "green", Status.HALTED: "bold red", Status.CANCELLED: "dim"}
_VERDICTS = {Verdict.BAD: "red", Verdict.SUSPECT: "yellow", Verdict.UNKNOWN: "yellow", Verdict.HEALTHY: "green"}


def show(watched: Watched, every: float) -> None:
    """Show the lineage until a person types q or Ctrl-C, or it has ended and nothing is open."""
    console = Console()
    live = Live(console=console, auto_refresh=False, screen=True)
    with suppress(KeyboardInterrupt), _keys() as pressed, live:
        size, due = console.size, 0.0
        while True:
            if time.monotonic() >= due or console.size != size:
                due, size = time.monotonic() + every, console.size
                watched.look(time.time())
                live.update(screen(watched, size.width, size.height, time.time(), console.encoding), refresh=True)
            if watched.state.settled or pressed(min(_POLL_SECONDS, every)):
                return


@contextmanager
def _keys() -> Iterator[_Pressed]:
    """The keyboard, read key by key; the terminal is as before afterwards."""
    keys = _Pressed()
    before = termios.tcgetattr(sys.stdin) if keys.there else None
    try:
        if before is not None:
            tty.setcbreak(sys.stdin)
        yield keys
    finally:
        if before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class _Pressed:
    """Waits for a key, and says whether it ends the view."""

    def __init__(self) -> None:
        self.there = sys.stdin.isatty()

    def __call__(self, seconds: float) -> bool:
        if not self.there:
            time.sleep(seconds)
            return False
        if not select.select([sys.stdin], [], [], seconds)[0]:
            return False
        typed = os.read(sys.stdin.fileno(), 64)
        return not typed or b"q" in typed.lower()


def screen(watched: Watched, width: int, height: int, now: float, encoding: str = "utf-8") -> RenderableType:
    """The whole screen.

    Args:
        watched: The lineage, as it was looked at last.
        width: Of the terminal, in columns.
        height: In lines.
        now: Seconds since the epoch.
        encoding: Of the terminal.
    """
    wrong = list(_findings(watched, width))
    rest = height - _HEAD - len(wrong) - 1
    parts = [
        Layout(Group(*_head(watched, width)), name="head", size=_HEAD),
        *([Layout(Group(*wrong), name="findings", size=len(wrong))] if wrong else []),
    ]
    high, middle = max(5, min(16, round(0.38 * rest))), max(4, min(12, round(0.3 * rest)))
    if rest >= _CURVE_FROM:
        parts.append(Layout(_curve(watched, width, high), name="curve", size=high))
        rest -= high
    if rest >= _MIDDLE_FROM:
        parts.append(_middle(watched, width, middle, now))
        rest -= middle
    parts.append(
        Layout(Panel(Group(*_news(watched, max(1, rest - 2))), title="NEWEST", title_align="left"), name="log")
    )
    parts.append(Layout(_line(f"q ends the view; training goes on   {clock(now)}", "dim"), name="foot", size=1))
    whole = Layout()
    whole.split_column(*parts)
    return whole if encoding.lower().startswith("utf") else _Ascii(whole)


class _Ascii:
    """What it holds, with a sign of ASCII in place of every other one."""

    def __init__(self, held: RenderableType) -> None:
        self._held = held

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._held, options):
            plain = segment.text.translate(_PLAIN).encode("ascii", "replace").decode()
            yield Segment(plain, segment.style, segment.control)


_PLAIN = {
    **dict.fromkeys(range(0x2801, 0x2900), "*"),  # of the curve
    **str.maketrans({sign: plain[0] for sign, plain in PLAIN.items()} | {"█": "#", "░": "."}),
}


def _line(line: str, style: str = "") -> Text:
    return Text(printable(line), style=style, no_wrap=True, overflow="ellipsis")


def _head(watched: Watched, width: int) -> Iterator[Text]:
    row = watched.row
    doubtful = row["shown"] != row["state"]
    first = Text(no_wrap=True, overflow="ellipsis")
    first.append(f"lineage {row['lineage']}  ", style="bold")
    first.append(row["shown"], style="bold yellow" if doubtful else _STYLES.get(watched.state.status, "yellow"))
    why = f"  {row['reason']}" if watched.state.ended else ""  # else the findings say it
    first.append(printable(f" for {row['age'] or '-'}   {row['recipe'] or ''}{why}"))
    yield first
    yield _line(watched.where())
    yield _line(watched.progress(max(10, min(40, width - 50))), "cyan")
    valid = [f"{name} {text(loss)}" for name, loss in watched.valid.items()]
    yield _line("  ".join([*watched.numbers(), *(["validation", *valid] if valid else [])]))


def _findings(watched: Watched, width: int) -> Iterator[Text]:
    """What is wrong, with the next command."""
    found = watched.row["findings"]
    for each in found[:_FINDINGS]:
        following = f"   next: {each['next']}"
        yield _line(f"! {cut(clean(each['why']), max(20, width - len(following) - 2))}{following}", "bold yellow")
    if len(found) > _FINDINGS:
        yield _line(f"! and {len(found) - _FINDINGS} more: opt-ops run show {watched.path.name}", "bold yellow")


def _curve(watched: Watched, width: int, height: int) -> Panel:
    points = list(watched.points)
    losses = [point.loss for point in points]
    known = [loss for loss in losses if loss is not None]
    if len(known) < 2:
        return Panel(_line("no loss yet", "dim"), title="LOSS", title_align="left")
    high, low = figure(max(known)), figure(min(known))
    margin = max(len(high), len(low))
    rows = height - 2
    drawn = curve(losses, max(1, width - margin - 5), rows)
    labels = [high, *[""] * (rows - 2), low] if rows > 1 else [high]
    lines = [
        Text.assemble((label.rjust(margin), "dim"), " ", (line, "cyan"))
        for label, line in zip(labels, drawn, strict=True)
    ]
    title = f"LOSS of the last {count(len(points), 'update')}, to step {points[-1].step:,}"
    return Panel(Group(*lines), title=title, title_align="left")


def _middle(watched: Watched, width: int, height: int, now: float) -> Layout:
    incidents = Panel(Group(*_incidents(watched, height - 2)), title="INCIDENTS", title_align="left")
    if width < _SMALL:
        return Layout(incidents, name="incidents", size=height)
    nodes = Panel(Group(*_nodes(watched, height - 2, now)), title="NODES", title_align="left")
    middle = Layout(name="middle", size=height)
    middle.split_row(Layout(nodes, name="nodes", ratio=2), Layout(incidents, name="incidents", ratio=3))
    return middle


def _nodes(watched: Watched, lines: int, now: float) -> Iterator[Text]:
    """How many nodes train and wait, then those that need a look, then the others."""
    state = watched.state
    attempt = state.attempt if state.attempt and state.attempt.live else None
    used = set(attempt.nodes) if attempt else set()
    silent = silent_nodes(watched.path, state, now)
    out = [node for node in state.nodes.values() if node.excluded_by is not None]
    spare = set(state.held) - used - {node.name for node in out}
    yield _line(f"{len(used):,} train, {count(len(spare), 'spare')}, {len(out):,} excluded")
    held = [state.nodes.get(name) or Node(name=name) for name in state.held]
    held.sort(key=lambda node: (node.excluded_by is None, node.name not in silent, node.verdict is Verdict.HEALTHY))
    evaluates = {each.intended.node: f"evaluates {each.checkpoint}" for each in [state.evaluation] if each is not None}
    for node in held[: lines - 1]:
        where = "trains" if node.name in used else evaluates.get(node.name, "spare")
        yield _node(node, where, silent.get(node.name))


def _node(node: Node, where: str, silent: float | None) -> Text:
    if node.excluded_by is not None:
        return _line(f"{node.name}  excluded: {words.reason(clean(node.reason))}", "red")
    if silent is not None:
        return _line(f"{node.name}  {where}, silent for {silent:.0f} s", "yellow")
    if node.verdict is Verdict.HEALTHY:
        return _line(f"{node.name}  {where}", _VERDICTS[node.verdict])
    return _line(f"{node.name}  {where}, {node.verdict}: {words.reason(clean(node.reason))}", _VERDICTS[node.verdict])


def _incidents(watched: Watched, lines: int) -> Iterator[Text]:
    """The newest incidents, the newest first; the last line counts the older ones."""
    known = list(watched.state.incidents.values())[::-1]
    if not known:
        yield _line("none", "dim")
    shown = known[: lines if len(known) <= lines else lines - 1]
    for incident in shown:
        yield _incident(incident)
    if len(known) > len(shown):
        yield _line(f"and {len(known) - len(shown):,} before: opt-ops explain {watched.path.name}", "dim")


def _incident(incident: Incident) -> Text:
    drill = f" DRILL {incident.drill}" if incident.drill else ""
    what = words.failure(incident.kind)
    if incident.decision is None:
        return _line(f"{incident.name}  {what}: not decided yet{drill}", "bold yellow")
    done = words.action(incident.decision.action)
    if incident.proven is False:
        return _line(f"{incident.name}  {what}: {done}, NOT PROVEN{drill}", "bold red")
    if incident.closed_at is None:
        style = "bold red" if incident.decision.action is Action.HALT else "yellow"
        return _line(f"{incident.name}  {what}: {done}{drill}", style)
    end = "proven" if incident.proven else "closed"
    return _line(f"{incident.name}  {what}: {done}, {end}{drill}", "green" if incident.proven else "dim")


def _news(watched: Watched, lines: int) -> Iterator[Text]:
    for row in list(watched.news)[-lines:]:
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{row['ts'][11:19]}  ", style="dim")
        line.append(row["text"])
        yield line
