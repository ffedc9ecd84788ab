"""`opt-ops ledger`: goodput, downtime, node-hours and energy of a lineage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ops.cli.ledger import total as ledger_total
from opt_ops.cli.shared.options import (
    FormatOption,
    HeaderOption,
    OptionalIdArgument,
    QuietOption,
    leave_if_unreadable,
    lineage_folder,
    seconds_of,
    settings,
    site_lineages,
)
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.cli.shared.views import UNREADABLE, by_lineage
from opt_ops.core.text import age
from opt_ops.errors import UsageError
from opt_ops.runfolder.files import write_text

if TYPE_CHECKING:
    from chronicles.ledger.summary import LedgerSummary
    from chronicles.ledger.total import LedgerTotal


def ledger(
    identifier: OptionalIdArgument = "",
    prometheus: Annotated[
        bool, typer.Option("--prometheus", help="Print all numbers in Prometheus' text format.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="With --prometheus: write to this file, atomically.")
    ] = None,
    total: Annotated[bool, typer.Option("--total", "--all", help="Print the sums over all lineages.")] = False,
    since: Annotated[
        str, typer.Option("--since", metavar="SPAN", help="With --total: lineages that ran within, such as 30d.")
    ] = "",
    carbon: Annotated[bool, typer.Option("--conventional", help="Print the carbon figure as papers give it.")] = False,
    names: Annotated[
        bool, typer.Option("--names/--no-names", help="With --total: say who made how many requests.")
    ] = True,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Show goodput, lost time by cause, node-hours and energy.

    ETTR, MTTR and MTBF too.

    docs/ledger.md defines every number. Without ID, one line for each lineage and one for all. The exit code is 5 if
    one of them cannot be read: its line has the reason.

    Examples:
      opt-ops ledger 12
      opt-ops ledger 12 -o json
      opt-ops ledger --total --since 30d
      opt-ops ledger 12 --conventional
      opt-ops ledger --prometheus --write /var/lib/node_exporter/textfile/opt-ops.prom
    """
    from chronicles.ledger.total import account
    from chronicles.ledger.total import total as sum_up
    from chronicles.record import load
    from chronicles.report.encode import encode

    if total or since:
        _total(identifier, since, names, output, header)
        return
    rates = settings.config.ledger
    folders = [lineage_folder(identifier)] if identifier else site_lineages()
    if identifier:  # an error is that of the command
        done, unreadable = [(folders[0].name, account(load(folders[0], telemetry=False), rates))], {}
    else:
        done, unreadable = by_lineage(folders, lambda path: (path.name, account(load(path, telemetry=False), rates)))
    summaries = {name: each.summary for name, each in done}
    rows = [{"lineage": name, **encode(summary)} for name, summary in summaries.items()]
    if prometheus:
        _prometheus(summaries, write, quiet)
    elif carbon:
        ledger_total.conventional(rows, output, header=header)
    elif identifier and output in (Format.TABLE, Format.WIDE):
        _one(rows[0], output, header)
    else:
        listed = [row | _short(row) for row in rows]
        listed += [{"lineage": name, "state": UNREADABLE, "reason": why} for name, why in unreadable.items()]
        columns = [*_LINEAGES, Column("REASON", "reason")] if unreadable else _LINEAGES
        listed.sort(key=lambda row: int(row["lineage"]))
        if output in (Format.TABLE, Format.WIDE) and len(done) > 1:
            listed.append(_all(sum_up([each for _, each in done], rates)))
        show("opt-ops/ledger/1", listed, columns, output, header=header)
    leave_if_unreadable(unreadable)


def _prometheus(summaries: Mapping[str, LedgerSummary], write: Path | None, quiet: bool) -> None:
    from chronicles.ledger.prometheus import text

    if write is None:
        print(text(summaries), end="")
    else:
        write_text(write, text(summaries))
        say(f"Wrote {len(summaries)} lineages to {write}.", quiet)


def _total(identifier: str, since: str, names: bool, output: Format, header: bool) -> None:
    from chronicles.ledger.total import account
    from chronicles.ledger.total import total as sum_up
    from chronicles.record import load
    from chronicles.report.encode import encode

    if identifier:
        raise UsageError(f"--total sums over all lineages: leave out {identifier}", "opt-ops ledger --total")
    rates = settings.config.ledger
    begin = time.time() - seconds_of("--since", since) if since else None
    folders = site_lineages()
    done, unreadable = by_lineage(folders, lambda path: account(load(path, telemetry=False), rates))
    item = encode(sum_up(done, rates, begin, names=names))
    if output in (Format.TABLE, Format.WIDE):
        ledger_total.tables(item, output, header)
    else:
        show("opt-ops/ledger-total/1", [item], [Column("LINEAGES", "lineages")], output, header=header)
    leave_if_unreadable(unreadable)


def _all(summed: LedgerTotal) -> dict[str, Any]:
    """The last line of the table of lineages."""
    return {
        "lineage": "all",
        "calls": summed.people.calls,
        "node_hours": summed.all.node_hours,
        "kwh": summed.all.kwh,
    }


_LINEAGES = [
    Column("LINEAGE", "lineage"),
    Column("WALL", "wall", right=True),
    Column("GOODPUT %", "goodput_percent", right=True),
    Column("OF IDEAL %", "ideal_percent", right=True),
    Column("ETTR %", "ettr_percent", right=True, wide=True),
    Column("FAILURES", "failures", right=True),
    Column("MTBF", "mtbf", right=True),
    Column("MTTR", "mttr", right=True),
    Column("CALLS", "calls", right=True),
    Column("NODE-HOURS", "node_hours", right=True),
    Column("KWH", "kwh", right=True, wide=True),
]


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "wall": age(row["wall_seconds"]),
        "goodput_percent": ledger_total.percent(row["goodput"]),
        "ideal_percent": ledger_total.percent(row["share_of_ideal"]),
        "ettr_percent": ledger_total.percent(row["ettr"]),
        "mtbf": _age(row["mtbf_seconds"]),
        "mttr": _age(row["mttr_seconds"]),
    }


def _one(row: Mapping[str, Any], output: Format, header: bool) -> None:
    rows = [{"what": what, "value": value, "meaning": meaning} for what, value, meaning in _told(row)]
    show("", rows, ledger_total.FACTS, output, header=header)
    stages = list(row["seconds_by_stage"])
    lost = [
        {"kind": kind["kind"], "incidents": kind["incidents"] or None, "lost": _age(kind["seconds"])}
        | {stage: _age(kind["seconds_by_stage"][stage] or None) for stage in stages}
        for kind in row["lost_by_kind"]
    ]
    if lost:
        print("\nLOST TIME")
        columns = [Column("CAUSE", "kind"), Column("N", "incidents", right=True), Column("LOST", "lost", right=True)]
        columns += [Column(stage.upper(), stage, right=True) for stage in stages]
        show("", lost, columns, output, header=header)


def _told(row: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    yield "goodput %", ledger_total.percent(row["goodput"]), "kept steps × healthy step ÷ wall clock"
    yield "share of ideal %", ledger_total.percent(row["share_of_ideal"]), "kept steps × ideal step ÷ wall clock"
    yield "ETTR %", ledger_total.percent(row["ettr"]), "time in kept steps ÷ wall clock"
    yield "wall clock", age(row["wall_seconds"]), "from the request to the end, or to the newest journal entry"
    yield "kept steps", row["kept_steps"], "steps that are part of the present weights"
    yield "healthy step s", row["healthy_step_seconds"], "median without saves, plus its share of evaluation"
    yield "ideal step s", row["ideal_step_seconds"], "as configured, or of the fastest 5 % of steps"
    yield "repeated steps", row["steps_repeated"], "steps that were discarded"
    yield "failures", row["failures"], "incidents that ended an attempt, without drills"
    yield "MTBF", _age(row["mtbf_seconds"]), "time in steps ÷ failures"
    yield "MTTR", _age(row["mttr_seconds"]), "mean downtime of a recovery"
    yield "restarts", row["restarts"], "launches after the first"
    for way in ("automatic", "manual", "planned"):
        yield f"  {way}", row[f"restarts_{way}"], ""
    yield "requeues", row["requeues"], "submissions to the scheduler after the first"
    yield "calls", row["calls"], "number of pages to on-call"
    yield "longest hands-off", _age(row["longest_hands_off_seconds"]), "between two calls"
    yield "node-hours", row["node_hours"], "spares included"
    yield "  lost", row["node_hours_lost"], "outside kept steps"
    yield "energy kWh", row["kwh"], "energy counters of the GPUs × PUE"
    yield "tCO2e", row["tco2e"], "energy × factor of the grid"
    yield f"cost {row['currency']}", row["cost"], "from the site's rates"
    if (figure := row["conventional"]) is not None:
        yield "conventional tCO2e", figure["tco2e"], f"GPU-hours × power × PUE; {ledger_total.factor(figure)}"
        yield "  kept updates only", row["conventional_tco2e"], "as papers count"
    yield "people's time", age(row["person_seconds"]), "estimate: from the first request after a page to the last one"
    yield "waited for people", age(row["seconds_waited"]), "from a page to its answer"
    yield "requests", row["requests"], "of people, to steer"


def _age(seconds: float | None) -> str | None:
    return None if seconds is None else age(seconds) if seconds >= 10 else f"{seconds:.1f}s"
