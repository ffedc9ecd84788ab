"""The tables of a campaign's logbook, for the page and for Markdown alike. All texts are plain; who draws escapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chronicles.campaign.sizes import CampaignRecord, SizeRecord
from chronicles.wording import minute
from opt_ops.core.campaign.events import CampaignForecast
from opt_ops.core.campaign.values import Law
from opt_ops.core.failures.classes import title

_PARAMETERS = (("E", "E"), ("A", "A"), ("alpha", "α"), ("B", "B"), ("beta", "β"))


@dataclass(frozen=True, slots=True)
class Cell:
    """A text, and the page that it leads to."""

    text: str
    link: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A section of the logbook: heads (and whether their column is set to the right), rows, remarks below."""

    title: str
    heads: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[Cell]]
    remarks: Sequence[str] = ()


def tables(campaign: CampaignRecord) -> Iterator[Table]:
    """All sizes, forecasts beside what was reached, the law, incidents."""
    yield _sizes(campaign)
    yield _forecasts(campaign)
    law = _newest(campaign)
    if law is not None:
        yield _law(law)
    yield _incidents(campaign)


def _sizes(campaign: CampaignRecord) -> Table:
    rows = [
        [
            Cell(each.size.recipe),
            Cell(f"{each.size.parameters:,}"),
            _lineage(each),
            Cell(each.status),
            Cell(f"{each.settled[-1].tokens:,}" if each.settled else "–"),
            Cell(f"{each.size.tokens:,}"),
            Cell(_loss(each.knots[-1].loss) if each.knots else "–"),
        ]
        for each in campaign.sizes
    ]
    heads = [("Size", False), ("Parameters", True), ("Lineage", False), ("State", False), ("Tokens", True)]
    stopped = campaign.state.stopped
    return Table(
        title="Sizes",
        heads=[*heads, ("Of", True), ("Settled loss", True)],
        rows=rows,
        remarks=[
            *(f"{each.size.recipe} cannot be read: {each.problem}" for each in campaign.sizes if each.problem),
            *([f"{stopped.author} has stopped the campaign: no further size begins."] if stopped else []),
        ],
    )


def _forecasts(campaign: CampaignRecord) -> Table:
    rows: list[list[Cell]] = []
    for each in campaign.sizes:
        if each.forecast is not None:
            known, reached = each.forecast.event, each.reached
            off = "–" if reached is None else f"{reached - known.loss:+.4f}".replace("-", "−")
            inside = "" if reached is None else "yes" if known.low <= reached <= known.high else "no"
            cells = [each.size.recipe, _loss(known.loss), f"{_loss(known.low)} to {_loss(known.high)}"]
            cells += ["–" if reached is None else _loss(reached), off, inside, minute(each.forecast.made)]
            rows.append([Cell(text) for text in cells])
    heads = [("Size", False), ("Forecast", True), ("Band", True), ("Reached", True), ("Difference", True)]
    without = [(each.recipe, each.unforecast) for each in campaign.state.members.values() if each.unforecast]
    return Table(
        title="Forecast and reached",
        heads=[*heads, ("In the band", False), ("Made", False)],
        rows=rows,
        remarks=[f"{recipe} began without a forecast: {why}." for recipe, why in without],
    )


def _newest(campaign: CampaignRecord) -> CampaignForecast | None:
    made = [each.forecast for each in campaign.sizes if each.forecast]
    return max(made, key=lambda each: each.made).event if made else None


def _law(of: CampaignForecast) -> Table:
    def value(law: Law, name: str) -> str:
        return f"{getattr(law, name):.4g}"

    rows = [
        [Cell(shown), Cell(value(of.fit, name)), Cell(f"{value(of.fit_low, name)} to {value(of.fit_high, name)}")]
        for name, shown in _PARAMETERS
    ]
    return Table(
        title="The law",
        heads=[("L(N, D) = E + A/N^α + B/D^β", False), ("Value", True), ("95 % of the draws", True)],
        rows=rows,
        remarks=[f"Fitted to {of.points} settled losses of {', '.join(of.sizes)}, before {of.recipe} began."],
    )


def _incidents(campaign: CampaignRecord) -> Table:
    kinds = sorted({kind for each in campaign.sizes for kind in each.incidents})
    rows = [
        [
            _lineage(each, f"{each.size.recipe} ({each.member.lineage})"),
            *(Cell(str(each.incidents.get(kind, 0))) for kind in kinds),
        ]
        for each in campaign.sizes
        if each.member
    ]
    return Table(title="Incidents", heads=[("Size", False), *((title(kind), True) for kind in kinds)], rows=rows)


def _lineage(each: SizeRecord, text: str = "") -> Cell:
    """The lineage, with a link to its logbook as seen from that of the campaign."""
    if each.member is None:
        return Cell("–")
    number = each.member.lineage
    return Cell(text or number, f"../../../{number}/chronicle/logbook.html")


def _loss(value: float) -> str:
    return f"{value:.4f}"
