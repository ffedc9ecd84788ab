"""Draws the logbook of a campaign: one page and one Markdown file, in the style of a lineage's logbook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from chronicles.campaign.sizes import CampaignRecord, SizeRecord
from chronicles.campaign.tables import Cell, Table, tables
from chronicles.logbook.drawing import curve_data, figure
from chronicles.logbook.drawing.curves import Line, MeasureCurve
from chronicles.logbook.drawing.figure import Measured
from chronicles.logbook.drawing.html import ours, page_environment, page_part, policy
from chronicles.logbook.drawing.markup import plain, table
from chronicles.logbook.drawing.scale import axis_unit
from opt_ops.runfolder.files import write_text

FOLDER = "logbook"  # below the campaign's folder
_FLOPS = 6
"""For each parameter and token, forward and backward pass together (Kaplan et al. 2020, arXiv 2001.08361)."""


def render(campaign: CampaignRecord) -> list[Path]:
    """Write `logbook.html` and `logbook.md`; return their paths."""
    into = campaign.folder / FOLDER
    paths = [into / "logbook.html", into / "logbook.md"]
    write_text(paths[0], page(campaign))
    write_text(paths[1], markdown(campaign))
    return paths


def page(campaign: CampaignRecord) -> str:
    """The HTML. jinja2 escapes all untrusted text."""
    names = [each.size.recipe for each in campaign.sizes]
    script = page_part("curves.js")
    over_tokens, tokens_axis = _curves(campaign.sizes, lambda _: 1, "tokens")
    over_flops, flops_axis = _curves(campaign.sizes, lambda size: _FLOPS * size.size.parameters, "operations (6·N·D)")
    drawn = figure.draw(over_tokens, [], tokens_axis) if over_tokens.curves else []
    environment = page_environment({name: place for place, name in enumerate(names)})
    return environment.get_template("campaign.html").render(
        name=campaign.name,
        names=names,
        tables=list(tables(campaign)),
        alerts=[(each.recipe, each.lineage, each.why) for each in campaign.state.alerts.values()],
        tokens_axis=tokens_axis,
        flops_axis=flops_axis,
        css=ours(page_part("logbook.css")),
        script=ours(script),
        policy=policy([script]),
        curves=[ours(svg) for svg in drawn],
        flops=[ours(svg) for svg in (figure.draw(over_flops, [], flops_axis) if over_flops.curves else [])],
        data=ours(curve_data.encode_lines(names, [], over_tokens, [], tokens_axis) if drawn else ""),
    )


def markdown(campaign: CampaignRecord) -> str:
    """The Markdown: the same tables, without curves."""
    lines = [f"# Campaign {plain(campaign.name)}", ""]
    for each in campaign.state.alerts.values():
        lines += [f"**Alert, {plain(each.recipe)} (lineage {plain(each.lineage)}).** {plain(each.why)}", ""]
    for each in tables(campaign):
        lines += [f"## {each.title}", ""]
        lines += [*_rows(each), ""] if each.rows else ["None.", ""]
        lines += [*(plain(remark) for remark in each.remarks), *([""] if each.remarks else [])]
    return "\n".join(lines)


def _rows(of: Table) -> list[str]:
    heads = [f">{head}" if right else head for head, right in of.heads]
    return table(heads, [[_cell(cell) for cell in row] for row in of.rows])


def _cell(of: Cell) -> str:
    return f"[{plain(of.text)}]({of.link})" if of.link else plain(of.text)


def _curves(sizes: Sequence[SizeRecord], each_token: Callable[[SizeRecord], int], what: str) -> tuple[Measured, str]:
    """The settled losses of all sizes over one axis, and what the axis counts."""
    factors = list(map(each_token, sizes))
    ends = [size.settled[-1].tokens * factors[place] for place, size in enumerate(sizes) if size.settled]
    unit, axis = axis_unit(max(ends, default=0), what)
    lines = [
        Line(
            run=place,
            kept=True,
            steps=[each.tokens * factors[place] // unit for each in size.settled],
            values=[each.loss for each in size.settled],
        )
        for place, size in enumerate(sizes)
        if size.settled
    ]
    curves = {"loss": MeasureCurve(lines=lines, gaps=[])} if lines else {}
    return Measured(curves=curves, healthy_wps=None), axis
