"""`opt-ops q`: the lineages that live, one line each, and how far what is shown can be trusted."""

from __future__ import annotations

import getpass
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli.shared import views
from opt_ops.cli.shared.options import (
    FormatOption,
    HeaderOption,
    leave_if_unreadable,
    settings,
    site_lineages,
    watch_now,
)
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.config import FILE, locate
from opt_ops.core.state.status import Status
from opt_ops.core.text import printable
from opt_ops.errors import OptOpsError, UsageError
from opt_ops.runfolder.files import read_json
from opt_ops.runfolder.liveness import Watch

_LISTED_SECONDS = 86400.0
"""A lineage that was completed or cancelled is listed for so long. A halted one needs an operator, so it stays."""
_REASON_CHARACTERS = 40
_LATE_SECONDS = 2.0  # an age is shown in whole seconds, so a shorter usual step says nothing

_GREEN, _YELLOW, _RED, _GREY = "32", "33", "31", "90"  # SGR, ECMA-48
_COLOURS = {
    str(Status.TRAINING): _GREEN,
    str(Status.COMPLETED): _GREEN,
    str(Status.HALTED): _RED,
    str(Status.CANCELLED): _GREY,
    views.UNREADABLE: _RED,
}


def _state_colour(row: Mapping[str, Any]) -> str:
    """Green is for what is known to be well: a state with a question mark is not."""
    return _COLOURS.get(str(row["shown"]), _YELLOW)


def _age_colour(row: Mapping[str, Any]) -> str:
    usual, since = row.get("usual_step_seconds"), row.get("data_age_seconds")
    if row["state"] != Status.TRAINING or usual is None or since is None:
        return ""
    return _RED if since > max(_LATE_SECONDS, 2 * usual) else ""


_COLUMNS = [
    Column("LINEAGE", "lineage"),
    Column("RUN", "run"),
    Column("STATE", "shown", colour=_state_colour),
    Column("JOB", "job"),
    Column("NODES", "nodes", right=True),
    Column("STEP", "progress", right=True),
    Column("LOSS", "loss", right=True),
    Column("LR", "lr", wide=True, right=True),
    Column("WPS", "wps", wide=True, right=True),
    Column("TFLOPS", "tflops", wide=True, right=True),
    Column("CKPT", "checkpoint", right=True),
    Column("RST", "restarts", right=True),
    Column("GEN", "generation", wide=True, right=True),
    Column("STANDBY", "standby", wide=True, right=True),
    Column("EVALUATES", "evaluates", wide=True),
    Column("SINCE", "age", wide=True, right=True),
    Column("AGE", "step_age", right=True, colour=_age_colour),
    Column("REASON", "reason"),
]


def _complete_state(incomplete: str) -> list[str]:
    return [each for each in Status if each.startswith(incomplete.upper())]


def queue(
    everything: Annotated[bool, typer.Option("-a", "--all", help="Also those that ended more than a day ago.")] = False,
    state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATE",
            help="Only lineages in this state. May be given several times.",
            autocompletion=_complete_state,
        ),
    ] = None,
    mine: Annotated[bool, typer.Option("--mine", help="Only lineages that you started.")] = False,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
) -> None:
    """List the lineages that live, one line each.

    Those that ended within a day are listed too.

    STATE has a question mark where it cannot be trusted; REASON says why, and `opt-ops why` says more. AGE is the age
    of the newest step, SINCE in -o wide that of the state. json, jsonl and name list everything. The exit code is 5 if
    a lineage cannot be read: its row has the reason.

    Examples:
      opt-ops q
      opt-ops q --all --state HALTED --state CANCELLED -o wide
    """
    wanted = {_status(each) for each in state or []}
    runs, watch = settings.config.runs, watch_now()
    rows = views.lineage_rows(site_lineages(), watch)
    chosen = [row for row in rows if not wanted or row["state"] in wanted]
    if mine:
        chosen = [row for row in chosen if row.get("author") == getpass.getuser()]
    people = output in (Format.TABLE, Format.WIDE)
    old = [row for row in chosen if people and not everything and not wanted and _ended_long_ago(row, watch.now)]
    listed = [_listed(row, runs, output) for row in chosen if row not in old]
    if listed or not old:
        show("opt-ops/run-list/1", listed, _COLUMNS, output, header=header)
    if not rows:
        say(f"There is no lineage yet. opt-ops looked in {runs.absolute()}, {_from()}.")
        say("  next: opt-ops run start opt-tiny, or name another configuration with -c")
    if people:  # programs have `watched` and `findings`
        _say_who_watches(listed, watch)
    if old:
        say(f"{len(old)} that ended longer ago: opt-ops q -a")
    leave_if_unreadable({row["lineage"]: row["reason"] for row in chosen if row["state"] == views.UNREADABLE})


def _status(given: str) -> str:
    known = [*map(str, Status), views.UNREADABLE]
    if given.upper() not in known:
        near = get_close_matches(given.upper(), known, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"--state {given}: no such state{meant}", f"the states: {', '.join(known)}")
    return given.upper()


def _ended_long_ago(row: Mapping[str, Any], now: float) -> bool:
    over = row["state"] in (Status.COMPLETED, Status.CANCELLED) and row["ended_at"]
    return bool(over) and now - datetime.fromisoformat(row["ended_at"]).timestamp() > _LISTED_SECONDS


def _listed(row: dict[str, Any], runs: Path, output: Format) -> dict[str, Any]:
    """A row as the format needs it: for programs with its goodput, for people with a short reason."""
    if output in (Format.JSON, Format.JSONL):
        return row | _goodput(runs / row["lineage"])
    return row if output is Format.WIDE else row | {"reason": _brief(row["reason"])}


def _goodput(lineage: Path) -> dict[str, Any]:
    """The goodput of the report as it was drawn last, and the time up to which it counts.

    To replay every journal would take too long for a list; `opt-ops ledger` has the present one.
    """
    try:
        report = read_json(lineage / "chronicle" / "report.json")
    except (OSError, OptOpsError, ValueError):
        report = None
    known: dict[str, Any] = report if isinstance(report, dict) else {}
    ledger = known.get("goodput")
    goodput = ledger.get("goodput") if isinstance(ledger, dict) else None
    return {"goodput": goodput, "goodput_as_of": known.get("as_of") if goodput is not None else None}


def _brief(reason: str) -> str:
    if reason.startswith("nobody watches"):
        reason = reason.partition(":")[0]
    return textwrap.shorten(reason, _REASON_CHARACTERS, placeholder=" ...")


def _say_who_watches(rows: Sequence[Mapping[str, Any]], watch: Watch) -> None:
    """Say on stderr, once for each reason, that nobody watches what is listed."""
    unwatched = [watch.over(row["lineage"]) for row in rows if row.get("watched") is False]
    for why, following in dict.fromkeys((each.why, each.next) for each in unwatched):
        say(printable(why))
        say(f"  next: {following}")


def _from() -> str:
    """Where the runs folder is named."""
    file = locate(settings.config_path)
    return f"as {file} says" if file else f"because there is no {FILE} here"
