"""`opt-ops replay`: replay a record of incidents in virtual time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ops.cli.shared.options import FormatOption, HeaderOption, QuietOption
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.config import is_installed
from opt_ops.core.text import age
from opt_ops.errors import Unavailable, UsageError

if TYPE_CHECKING:
    from opt_ops.laboratory.replay.measure import ReplayResult
    from opt_ops.laboratory.replay.scenario import Scenario
    from opt_ops.laboratory.replay.trace import IncidentTrace


class Recovery(StrEnum):
    """How training goes on after it has lost ranks."""

    IN_PLACE = "in-place"
    RESTART = "restart"


_BESIDE = [
    Column("WHAT", "what"),
    Column("SUPERVISOR", "supervisor"),
    Column("ORACLE", "oracle"),
    Column("PEOPLE", "people"),
]
_INCIDENTS = [
    Column("SEED", "seed", right=True),
    Column("INCIDENT", "incident"),
    Column("KIND", "kind"),
    Column("ACTION", "action"),
    Column("SEEN AFTER", "seen_after", right=True),
    Column("FAILED", "step_failed", right=True),
    Column("RESUMED", "step_resumed", right=True),
    Column("DOWN", "seconds_down", right=True),
    Column("STEPS LOST", "steps_lost", right=True),
    Column("PROVEN", "proven"),
    Column("CAUSE", "cause", wide=True),
]
_VARIED = [
    Column("VARIED", "varied"),
    Column("VALUE", "value", right=True),
    Column("GOODPUT %", "goodput"),
    Column("OF ORACLE %", "of_oracle"),
    Column("CALLS", "calls"),
]


def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(metavar="TRACE.csv", help="Record of incidents. [default: all events are drawn at random]"),
    ] = None,
    scenario: Annotated[
        str, typer.Option("--scenario", metavar="NAME|FILE", help="A shipped scenario, or a TOML file.")
    ] = "opt-175b",
    recovery: Annotated[
        Recovery | None,
        typer.Option(
            "--recovery",
            help="Replace lost ranks in place, or restart all. [default: in-place, if the scenario has its table]",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N|A-B", help="One seed, or a range.")] = "1",
    incidents: Annotated[bool, typer.Option("--incidents", help="Also list how each incident was handled.")] = False,
    vary: Annotated[
        bool, typer.Option("--vary", help="Also vary spares, save interval and detection delay, as the scenario says.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw the results.")] = None,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="FOLDER", help="Keep journal and telemetry of the first seed.")
    ] = None,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Replay a record of incidents in virtual time.

    It compares the supervisor with an oracle and with people.

    The cluster is simulated. The supervisor, its playbooks and its journal are the real ones. What the record does not
    contain is drawn at random, from distributions of the scenario; the output says what was drawn. See docs/replay.md.

    Shipped scenarios: opt-175b, llama-3, bloom, glm-130b, quiet-week, cluster-loss, broken-recipe.

    Examples:
      opt-ops replay incidents.csv --scenario opt-175b --seeds 1-20
      opt-ops replay incidents.csv --recovery restart
      opt-ops replay --scenario broken-recipe --incidents
      opt-ops replay incidents.csv --vary --seeds 1-5 --plot goodput.svg
    """
    from opt_ops.laboratory.replay import report, sweep
    from opt_ops.laboratory.replay import scenario as scenarios
    from opt_ops.laboratory.replay import trace as traces
    from opt_ops.laboratory.replay.fault_plan import sample

    if plot is not None and not is_installed("matplotlib"):
        raise Unavailable("--plot needs matplotlib, which is not installed", "pip install matplotlib")
    chosen = scenarios.load(scenario).by(recovery.value if recovery else None)
    record = traces.read(trace, chosen.trace) if trace is not None else None
    numbers = _seeds(seeds)
    measured = sweep.replay(chosen, record, numbers, progress=_shown(quiet), keep=keep)
    figures = sweep.summary(measured)
    varied = _varied(chosen, record, numbers, quiet) if vary else []
    lost = sweep.lost_by_cause(measured)
    if plot is not None:
        report.write_plot(plot, report.plot(chosen, figures, varied, lost))
    remarks = report.remarks_on(record, sample(chosen, record, numbers[0]), trace)
    if output not in (Format.TABLE, Format.WIDE):
        results = {"figures": figures, "lost_hours": lost, "varied": varied, "remarks": remarks}
        item = _about(chosen) | results | {"replays": [each.plain() for each in measured]}
        show("opt-ops/replay/1", [item], [Column("SCENARIO", "scenario")], output)
        return
    for line in remarks:
        say(line, quiet)
    show("opt-ops/replay/1", report.beside_people(chosen, figures), _BESIDE, output, header=header)
    _tables(measured, varied, incidents, output, header)
    _ends(measured, quiet)


def _about(chosen: Scenario) -> dict[str, Any]:
    return {
        "scenario": chosen.name,
        "simulated": True,
        "recovery": "in-place" if chosen.in_place else "restart",
        "people": chosen.people.model_dump(),
    }


def _varied(chosen: Scenario, record: IncidentTrace | None, seeds: Sequence[int], quiet: bool) -> list[dict[str, Any]]:
    from opt_ops.laboratory.replay import sweep

    varied: list[dict[str, Any]] = []
    for each in sweep.variations(chosen):
        say(f"{each.what} = {each.value:g} …", quiet)
        found = sweep.summary(sweep.replay(each.scenario, record, seeds, each.tick_seconds, _shown(quiet)))
        varied.append({"varied": each.what, "value": each.value, "figures": found})
    return varied


def _shown(quiet: bool) -> Callable[[int, float], None] | None:
    return None if quiet or not sys.stderr.isatty() else _progress


def _tables(
    measured: list[ReplayResult], varied: list[dict[str, Any]], incidents: bool, output: Format, header: bool
) -> None:
    if varied:
        show("opt-ops/replay-varied/1", [_varied_row(row) for row in varied], _VARIED, output, header=header)
    if incidents:
        rows = [_handled(each.seed, row) for each in measured for row in each.incidents]
        show("opt-ops/replay-incidents/1", rows, _INCIDENTS, output, header=header)


def _seeds(given: str) -> list[int]:
    first, _, last = given.partition("-")
    try:
        found = list(range(int(first), int(last or first) + 1))
    except ValueError:
        found = []
    if not found:
        raise UsageError(f"--seeds {given} is neither a number nor a range", "for example 7, or 1-20")
    return found


def _progress(seed: int, share: float) -> None:
    print(f"\rseed {seed}: {share:.0%} ", end="" if share < 1 else "\r", file=sys.stderr, flush=True)


def _varied_row(row: dict[str, Any]) -> dict[str, Any]:
    from opt_ops.laboratory.replay.report import spread

    figures = row["figures"]
    return {
        "varied": row["varied"],
        "value": row["value"],
        "goodput": spread(figures["goodput_percent"]),
        "of_oracle": spread(figures["share_of_oracle_percent"]),
        "calls": spread(figures["human_calls"]),
    }


def _handled(seed: int, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "seed": seed, "seen_after": age(row["seen_after"]), "seconds_down": age(row["seconds_down"])}


def _ends(measured: list[ReplayResult], quiet: bool) -> None:
    for each in measured:
        if each.status != "COMPLETED":
            say(f"Seed {each.seed} ended {each.status}: {each.why}", quiet)
