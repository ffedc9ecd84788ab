"""`opt-ops run watch` and `opt-ops run logs`: live views of a lineage."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Annotated

import typer

from opt_ops.cli.run.commands import app
from opt_ops.cli.shared.options import IdArgument, QuietOption, find_lineage, lineage_folder
from opt_ops.cli.shared.output import say, text
from opt_ops.cli.shared.text_curve import sparkline
from opt_ops.cli.shared.watched import Watched
from opt_ops.core.names import attempt_folder
from opt_ops.core.text import printable
from opt_ops.errors import NotFound

_SHOWN = 8  # of the newest events


@app.command()
def watch(
    identifier: IdArgument,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two updates.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print once and exit. The default if stdout is no terminal.")
    ] = False,
) -> None:
    """Watch a lineage live: loss curve, nodes, incidents, events.

    q or Ctrl-C ends the view; training goes on. A pipe gets it once.

    Example: opt-ops run watch 12
    """
    watched = Watched(lineage_folder(identifier))
    watched.look(time.time())
    terminal = sys.stdout.isatty()
    if terminal and not once and not watched.state.settled:
        from opt_ops.cli.run import dashboard

        dashboard.show(watched, every)
    if once or not terminal or watched.state.settled:
        _print_once(watched, None if terminal else 100)
    if terminal and watched.state.settled:
        say(f"Lineage {watched.path.name} is {watched.state.status}.\n  next: opt-ops logbook open {watched.path.name}")


def _print_once(watched: Watched, width: int | None) -> None:
    """Progress, findings and newest events, one below the other."""
    from rich.console import Console, Group
    from rich.rule import Rule
    from rich.text import Text

    row = watched.row
    first = f"lineage {row['lineage']}  {row['shown']} for {row['age'] or '-'}   {row['recipe'] or ''}  {row['reason']}"
    lines = [first, watched.where(), watched.progress(40), "   ".join(watched.numbers())]
    if watched.valid:
        lines.append("validation   " + "   ".join(f"{name} {text(loss)}" for name, loss in watched.valid.items()))
    losses = [point.loss for point in watched.points]
    if len(losses) > 1:
        lines.append(f"loss, last {len(losses)} steps  {sparkline(losses, 60)}")
    wrong = [f"{each['finding']}  {each['why']}" for each in row["findings"]] or ["nothing is wrong"]
    told = [f"{each['ts'][11:19]}  {each['text']}" for each in list(watched.news)[-_SHOWN:]]
    news = [Text(line, no_wrap=True, overflow="ellipsis") for line in told]
    above = [Text(printable(line)) for line in lines if line]
    open_ = [Text(printable(line)) for line in wrong]
    Console(no_color=True, width=width).print(Group(*above, Rule("OPEN"), *open_, Rule("NEWEST"), *news))


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
