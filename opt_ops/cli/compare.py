"""`opt-ops compare`: two lineages side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ops.cli.shared.options import FormatOption, HeaderOption, QuietOption, complete_id, lineage_folder, settings
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.cli.shared.text_curve import bars
from opt_ops.core.names import lineage_of
from opt_ops.core.text import printable
from opt_ops.errors import NotFound, UsageError
from opt_ops.runfolder import lineages
from opt_ops.runfolder.files import write_text

if TYPE_CHECKING:
    from chronicles.comparison.build import Comparison, Curve

_WIDTH = 60  # columns of a sparkline


def compare(
    a: Annotated[str, typer.Argument(metavar="[A]", help="A lineage.", autocompletion=complete_id)] = "",
    b: Annotated[str, typer.Argument(metavar="[B]", help="Another one.", autocompletion=complete_id)] = "",
    to: Annotated[int | None, typer.Option("--to", min=1, metavar="STEP", help="Only steps up to this one.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the comparison as a page. It is one file.")
    ] = None,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="Print only the address of MLflow's comparison.")] = False,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Compare two lineages: curves, scores, settings, cost.

    It says which one has the lower loss, which scores differ by more than noise, and which settings differ.

    Without A and B, the two newest lineages that have a common ancestor. Losses are compared at the same step, or after
    as many tokens where the batch sizes differ, and only behind the common ancestor. A lineage is better if the means
    over the last 50 common steps differ by more than twice the standard error of the difference.

    Examples:
      opt-ops compare 12 13
      opt-ops compare 12 13 --to 64000 --html compare.html
    """
    folders = _folders(a, b)
    if mlflow:
        from chronicles.mlflow_mirror.pages import compare_link
        from opt_ops.cli.logbook.commands import store

        print(compare_link(*folders, store()))
        return
    from chronicles.comparison import build
    from chronicles.comparison.family import family
    from chronicles.report.encode import encode

    compared = build.compare(family(folders[0]), family(folders[1]), settings.config.ledger, to)
    if html is not None:
        from chronicles.comparison.page import page

        write_text(html, page(compared))
        say(f"Wrote {html}.", quiet)
        return
    if output in (Format.TABLE, Format.WIDE):
        _tables(compared, output, header)
    else:
        item = {"name": " ".join(compared.lineages)} if output is Format.NAME else encode(compared)
        show("opt-ops/compare/1", [item], [Column("LINEAGES", "name")], output, header=header)


def _folders(a: str, b: str) -> tuple[Path, Path]:
    """The folders of the two lineages.

    Raises:
        UsageError: only one is given, or both are the same.
        NotFound: there is no such lineage, or no two have a common ancestor.
    """
    if a and b:
        if _lineage_of(a) == _lineage_of(b):
            raise UsageError(f"{a} and {b} are the same lineage", "opt-ops q -a lists all lineages")
        return lineage_folder(a), lineage_folder(b)
    if a:
        raise UsageError(f"one lineage, {a}, is nothing to compare", f"opt-ops compare {a} B; or without any")
    known = lineages.folders(settings.config.runs)[::-1]
    parents = {path.name: lineages.parent(path) for path in known}
    ancestors = {name: _ancestors(name, parents) for name in parents}
    for young, old in combinations(known, 2):
        if ancestors[young.name] & ancestors[old.name]:
            return old, young
    raise NotFound("no two lineages have a common ancestor", "opt-ops compare A B compares any two")


def _lineage_of(identifier: str) -> str:
    """The lineage of an id.

    Raises:
        UsageError: it is no id.
    """
    try:
        return lineage_of(identifier)
    except ValueError as error:
        raise UsageError(str(error), "opt-ops q -a lists all lineages") from error


def _ancestors(name: str, parents: Mapping[str, str | None]) -> set[str]:
    """A lineage and those it was forked from."""
    found: set[str] = set()
    older: str | None = name
    while older is not None and older not in found:  # a folder may be put in the place of another
        found.add(older)
        older = parents.get(older)
    return found


# ---- for people ----


def _tables(compared: Comparison, output: Format, header: bool) -> None:
    from chronicles.comparison.words import cost_rows, head, plain, score_rows, verdict

    a, b = compared.lineages
    wide = Column("MEASURED BY", "by", wide=True)
    both = [Column(a, "a", right=True), Column(b, "b", right=True)]
    print(head(compared))
    for line in _curves(compared):
        print(line)
    if compared.at:
        tokens = [Column("TOKENS", "tokens", right=True)] if compared.axis == "tokens" else []
        rows = [
            {"step": each.step, "tokens": each.tokens, "a": f"{each.loss[0]:.4f}", "b": f"{each.loss[1]:.4f}"}
            | {"difference": f"{each.difference:+.4f}"}
            for each in compared.at
        ]
        print("\nLOSS")
        columns = [Column("STEP", "step", right=True), *tokens, *both, Column("DIFFERENCE", "difference", right=True)]
        show("", rows, columns, output, header=header)
    if compared.scores:
        print("\nSCORES")
        columns = [Column("TASK AND METRIC", "name"), Column("STEP", "step", right=True), *both]
        columns += [Column("DIFFERENCE", "difference", right=True), Column("JUDGED", "judged")]
        show("", [asdict(row) for row in score_rows(compared)], [*columns, wide], output, header=header)
    if compared.settings:
        print("\nSETTINGS THAT DIFFER")
        rows = [{"key": s.key, "a": plain(s.values[0]), "b": plain(s.values[1])} for s in compared.settings]
        show("", rows, [Column("SETTING", "key"), *both], output, header=header)
    print("\nINCIDENTS")
    show("", list(_incidents(compared)), [Column("KIND", "kind"), *both], output, header=header)
    print("\nCOST")
    costs = [{"what": name, "a": of_a, "b": of_b} for name, of_a, of_b in cost_rows(compared)]
    show("", costs, [Column("WHAT", "what"), *both], output, header=header)
    print(f"\n{printable(verdict(compared))}")


def _incidents(compared: Comparison) -> Iterator[dict[str, Any]]:
    from opt_ops.core.failures.classes import title

    a, b = compared.incidents
    for kind in sorted({*a.by_kind, *b.by_kind}):
        yield {"kind": title(kind), "a": a.by_kind.get(kind, 0), "b": b.by_kind.get(kind, 0)}
    yield {"kind": "all", "a": a.total, "b": b.total}
    yield {"kind": "of these, drills", "a": a.drills, "b": b.drills}


def _curves(compared: Comparison) -> Iterator[str]:
    """The loss of both on one scale, from left to right over the same steps or tokens."""
    places = [curve.tokens if compared.axis == "tokens" else curve.step for curve in compared.curves]
    losses = [loss for curve in compared.curves for loss in curve.loss if loss is not None]
    if not losses:
        return
    first, last = min(p[0] for p in places if p), max(p[-1] for p in places if p)
    low, high = min(losses), max(losses)
    axis = "tokens" if compared.axis == "tokens" else "steps"
    yield f"\nloss over {axis} {first:,} to {last:,}, {low:.3f} to {high:.3f}"
    width = min(_WIDTH, max(map(len, places)))
    for curve, at in zip(compared.curves, places, strict=True):
        yield f"{curve.lineage:>5}  {_sparkline(curve, at, width, (first, last), (low, high))}"


def _sparkline(
    curve: Curve, at: Sequence[int], width: int, across: tuple[int, int], heights: tuple[float, float]
) -> str:
    """The highest loss in each column; a blank where there is none."""
    first, last = across
    columns: list[float | None] = [None] * width
    for place, loss in zip(at, curve.loss, strict=True):
        if loss is not None:
            column = round((width - 1) * (place - first) / max(1, last - first))
            columns[column] = max(loss, columns[column] or loss)
    return bars(columns, *heights).rstrip()
