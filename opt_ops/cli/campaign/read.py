"""`opt-ops campaign status|forecast|render`: what is known of a campaign, and what its law expects."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ops.cli.campaign.commands import NameArgument, app
from opt_ops.cli.shared.extras import require
from opt_ops.cli.shared.options import FormatOption, HeaderOption, QuietOption, settings
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.core.text import iso
from opt_ops.errors import NotFound, Refused, UsageError
from opt_ops.runfolder import campaigns, lineages

if TYPE_CHECKING:
    from chronicles.campaign.sizes import CampaignRecord, SizeRecord

_DAEMON = "opt-ops"  # the author of requests that are no person's


@app.command()
def status(
    name: NameArgument, output: FormatOption = Format.TABLE, header: HeaderOption = True, quiet: QuietOption = False
) -> None:
    """Show the sizes of a campaign: state, loss, forecast, alerts.

    Example: opt-ops campaign status sizes
    """
    campaign = _load(name)
    rows = list(map(_row, campaign.sizes))
    alerts = campaign.state.alerts.values()
    for row in rows:
        row["alerts"] = [str(each.what) for each in alerts if each.recipe == row["recipe"]]
    columns = [
        Column("RECIPE", "recipe"),
        Column("PARAMETERS", "parameters", right=True),
        Column("LINEAGE", "lineage"),
        Column("STATE", "status"),
        Column("TOKENS", "tokens_seen", right=True),
        Column("OF", "tokens", right=True, wide=True),
        Column("LOSS", "shown_loss", right=True),
        Column("FORECAST", "shown_forecast", right=True),
        Column("BAND", "shown_band", right=True),
        Column("REACHED", "shown_reached", right=True),
        Column("ALERTS", "alerts"),
    ]
    if output not in (Format.TABLE, Format.WIDE):
        show("opt-ops/campaign-status/1", rows, columns, output, header=header)
        return
    shown = [{**row, **_for_people(row)} for row in rows]
    show("", shown, columns, output, header=header)
    for each in alerts:
        say(f"Alert, {each.recipe} (lineage {each.lineage}): {each.why}", quiet)
    state = campaign.state
    if state.stopped is not None:
        say(f"{state.stopped.author} has stopped the campaign: no further size begins.", quiet)
    if state.started is None:
        say("The daemon has not started it yet.\n  next: opt-ops daemon status", quiet)
    page = campaign.folder / "logbook" / "logbook.html"
    say(f"Logbook: {page}" if page.exists() else f"  next: opt-ops campaign render {name}", quiet)


@app.command()
def forecast(
    name: NameArgument,
    recipe: Annotated[str, typer.Option(metavar="NAME", help="Only this size.")] = "",
    journal: Annotated[
        bool, typer.Option("--journal", help="Have the daemon journal it. It does so before it starts a size.")
    ] = False,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Show what each size is expected to reach, and reached.

    A forecast that was journaled before its size began has the time when it was MADE, and never changes. For a size
    that has not begun, it is computed from the losses so far, and not kept.

    Examples:
      opt-ops campaign forecast sizes
      opt-ops campaign forecast sizes --recipe opt-6.7b -o json
    """
    require("scipy", "SciPy", "campaign")
    campaign = _load(name)
    sizes = [size for size in campaign.sizes if recipe in ("", size.size.recipe)]
    if recipe and not sizes:
        raise NotFound(f"campaign {name} has no size {recipe}", f"opt-ops campaign status {name}")
    if journal:
        _journal(campaign, sizes, recipe)
        return
    rows = [row for size in sizes if (row := _forecast_row(campaign, size)) is not None]
    if not rows:
        begun = all(size.member is not None for size in sizes)
        had_none = "the sizes began without one, and the logbook says why"
        why = had_none if begun else "the settled curves of three sizes are needed, and are not there"
        raise Refused(f"campaign {name}: there is no forecast: {why}", f"opt-ops campaign status {name}")
    columns = [
        Column("RECIPE", "recipe"),
        Column("TOKENS", "tokens", right=True),
        Column("LOSS", "shown_loss", right=True),
        Column("BAND", "shown_band", right=True),
        Column("REACHED", "shown_reached", right=True),
        Column("POINTS", "points", right=True),
        Column("MADE", "made"),
        Column("LAW", "law", wide=True),
    ]
    if output in (Format.TABLE, Format.WIDE):
        rows = [row | _shown(row["loss"], row["low"], row["high"], row["reached"]) | {"law": _law(row)} for row in rows]
    show("opt-ops/campaign-forecast/1", rows, columns, output, header=header)


@app.command()
def render(name: NameArgument, quiet: QuietOption = False) -> None:
    """Draw the logbook of a campaign, and look for alerts.

    The daemon does so by itself while a size trains. What is found is left for the daemon, which journals and sends it.

    Example: opt-ops campaign render sizes
    """
    from chronicles.campaign.render import render as draw
    from chronicles.campaign.watch import findings

    campaign = _load(name)
    for identifier, arguments in findings(campaign):
        if identifier not in campaign.state.alerts:
            lineages.ask(campaign.folder, _DAEMON, "alert", arguments, time.time(), identifier)
    for path in draw(campaign):
        say(f"Wrote {path}.", quiet)


def _load(name: str) -> CampaignRecord:
    from chronicles.campaign.sizes import load_campaign

    return load_campaign(campaigns.folder(settings.config.runs, name))


def _journal(campaign: CampaignRecord, sizes: list[SizeRecord], recipe: str) -> None:
    """Leave a forecast for the daemon. It refuses one of a size that has begun, and a second one."""
    from chronicles.campaign.forecasts import forecast as made

    if not recipe:
        raise UsageError(
            "--journal needs --recipe", f"opt-ops campaign forecast {campaign.name} --recipe NAME --journal"
        )
    (size,) = sizes
    if size.member is not None or size.forecast is not None:
        raise Refused(
            f"{recipe} has begun, or has a forecast: that does not change", f"opt-ops campaign forecast {campaign.name}"
        )
    arguments = made(campaign, size)
    if arguments is not None:
        lineages.ask(campaign.folder, _DAEMON, "forecast", arguments, time.time(), f"forecast-{_place(campaign, size)}")


def _place(campaign: CampaignRecord, size: SizeRecord) -> int:
    return list(campaign.sizes).index(size) + 1


def _forecast_row(campaign: CampaignRecord, size: SizeRecord) -> dict[str, Any] | None:
    from chronicles.campaign.forecasts import forecast as made
    from opt_ops.core.codec import plain

    kept = size.forecast
    if kept is not None:
        fields = plain(kept.event)
    elif size.member is None:
        fields = made(campaign, size)
    else:
        fields = None  # it has begun without one
    if fields is None:
        return None
    names = ("recipe", "tokens", "loss", "low", "high", "points", "sizes", "fit", "fit_low", "fit_high")
    return {
        **{key: fields[key] for key in names},
        "made": iso(kept.made) if kept else None,
        "reached": size.reached,
    }


def _row(size: SizeRecord) -> dict[str, Any]:
    kept, member = size.forecast, size.member
    last = size.settled[-1] if size.settled else None
    newest = size.knots[-1] if size.knots else None
    return {
        "recipe": size.size.recipe,
        "parameters": size.size.parameters,
        "tokens": size.size.tokens,
        "lineage": member.lineage if member else None,
        "status": size.status,
        "step": last.step if last else None,
        "tokens_seen": last.tokens if last else None,
        "loss": newest.loss if newest else None,
        "forecast": kept.event.loss if kept else None,
        "low": kept.event.low if kept else None,
        "high": kept.event.high if kept else None,
        "reached": size.reached,
        "unforecast": member.unforecast if member and not kept else None,
        "incidents": dict(size.incidents),
        "problem": size.problem or None,
    }


def _for_people(row: dict[str, Any]) -> dict[str, Any]:
    shown = _shown(row["forecast"], row["low"], row["high"], row["reached"])
    return {
        "shown_loss": _number(row["loss"]),
        "shown_forecast": shown["shown_loss"],
        "shown_band": shown["shown_band"],
        "shown_reached": shown["shown_reached"],
        "parameters": f"{row['parameters']:,}",
        "tokens": f"{row['tokens']:,}",
        "tokens_seen": f"{row['tokens_seen']:,}" if row["tokens_seen"] else None,
    }


def _shown(loss: float | None, low: float | None, high: float | None, reached: float | None) -> dict[str, str | None]:
    band = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else None
    return {"shown_loss": _number(loss), "shown_band": band, "shown_reached": _number(reached)}


def _law(row: dict[str, Any]) -> str:
    fit = row["fit"]
    return f"{fit['E']:.3f} + {fit['A']:.4g}/N^{fit['alpha']:.3f} + {fit['B']:.4g}/D^{fit['beta']:.3f}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
