"""`logbook.md`: the logbook as text that reads well raw, on a Git host and in MLflow.

Everything that others wrote (notes, causes, node names, log lines) goes through `plain`, `code` or `quote`: it can make
no markup, no HTML, no new line, no new table cell, and no link but a bare web address to itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from chronicles.logbook.entries.entry import LogEntry
from chronicles.wording import duration, minute, percent, rate, whole
from opt_ops.core.text import printable

Row = Mapping[str, Any]


def render(report: Row, front: Row, entries: Sequence[LogEntry]) -> str:
    """The whole file."""
    titles = [_title(entry) for entry in entries]
    parts = [
        _name(report),
        _head(report, front),
        _questions(front),
        _incidents(report, front),
        _runs(report, front),
        _validation(front),
        _time(report, front),
        _worst(front),
        _nodes(front),
        _allocations(front),
        _contents(titles),
    ]
    parts += [_entry(title, entry) for title, entry in zip(titles, entries, strict=True)]
    parts.append(_foot(report, front))
    return "\n".join(line for part in parts for line in part)


def note(report: Row, front: Row, limit: int) -> str:
    """The front page alone, in at most `limit` characters: as many of the newest incidents as there is room for."""
    rows = list(front["incidents"])
    while True:
        shown = {**front, "incidents": rows}
        text = "\n".join([*_head(report, front), *_incidents(report, shown), _FULL])
        if len(text) <= limit or not rows:
            return text[:limit]
        rows = rows[1:]


WORST = (
    "Failures that the node is blamed for, in 28 days, and how many others would have had in its time of use. "
    "`opt-ops node ledger` tells of all lineages."
)
_FULL = "The whole logbook, with curves, is the artifact `chronicle/logbook.html`."


def experiment(lineages: Sequence[Mapping[str, str]], link: Callable[[str], str], limit: int) -> str:
    """The front page of many lineages, in at most `limit` characters: a table, and the newest one's own front page.

    Args:
        lineages: Each one's tags in MLflow, the newest first; `id` is its run's.
        link: Where that run is shown.
        limit: If need be, the oldest rows are left out.
    """
    name = plain(lineages[0]["opt.lineage"])
    first = f"Lineage {name}: {', '.join(f'{what} {plain(text)}'.strip() for what, text in _short(lineages[0]))}."
    newest = [f"## Lineage {name}", "", lineages[0].get("mlflow.note.content", "")]
    rows = [[f"[{plain(tags['opt.lineage'])}]({link(tags['id'])})", *map(plain, _told(tags))] for tags in lineages]
    heads = ["Lineage", "Recipe", "By", "Status", ">Step", ">Goodput", ">Incidents"]
    while True:
        parts = [first, "", *table(heads, rows), "", *newest, "", SIGNED]  # MLflow shows one line until it is opened
        text = "\n".join(parts)
        if len(text) <= limit or not rows:
            return text
        rows = rows[:-1]


def _short(tags: Mapping[str, str]) -> list[tuple[str, str]]:
    keys = (("", "opt.status"), ("step", "opt.step"), ("goodput", "opt.goodput"), ("incidents", "opt.incidents"))
    return [(what, tags[key]) for what, key in keys if key in tags]


def _told(tags: Mapping[str, str]) -> list[str]:
    keys = ("opt.recipe", "mlflow.user", "opt.status", "opt.step", "opt.goodput", "opt.incidents")
    return [tags.get(key, "–") for key in keys]


SIGNED = "*Written by opt-ops mlflow sync. Without this line, it is yours and stays as it is.*"


def plain(text: str) -> str:
    """Untrusted text as one line of Markdown that shows exactly itself."""
    line = printable(" ".join(text.split()))
    line = re.sub(r"([\\`*\[\]<>|~&!#])", r"\\\1", line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)  # within a word it means nothing


def code(text: str) -> str:
    """Untrusted text as a code span, fenced by more backticks than it has in a row."""
    line = printable(" ".join(text.split()))
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def quote(text: str) -> list[str]:
    """Untrusted text of several lines as a block quote."""
    lines = [re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", plain(line)) for line in text.splitlines()]  # no list, no heading
    return [f"> {line}  ".rstrip() if line == lines[-1] else f"> {line}  " for line in lines]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of cells that are Markdown already; a head that begins with `>` is for numbers."""
    rule = ["---:" if head.startswith(">") else "---" for head in heads]
    lines = [[head.removeprefix(">") for head in heads], rule, *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _name(report: Row) -> Iterator[str]:
    yield f"# Lineage {plain(report['lineage'])}: logbook"
    yield ""
    yield "The curves are in `logbook.html`, the numbers in `report.json`, both beside this file."
    yield ""


def _head(report: Row, front: Row) -> Iterator[str]:
    yield f"**{report['status']}.** {plain(front['lead'])}"
    yield ""
    if report["recipe"]:
        yield f"Recipe {code(' '.join((report['recipe'], *report['settings'])))}."
        yield ""
    figures = front["figures"]
    yield from table([item["label"] for item in figures], [[item["value"] for item in figures]])
    yield ""


def _incidents(report: Row, front: Row) -> Iterator[str]:
    if not report["incidents"]:
        return
    yield "## Incidents"
    yield ""
    rows = [
        [
            " ".join((plain(row["incident"]), *_tags(row))),
            _runs_of(row),
            plain(row["cause"]),
            ("would " if row["advice"] else "")
            + plain(row["action"] or "–")
            + (f" × {row['lr_factor']:g}" if row["lr_factor"] else ""),
            whole(row["steps_lost"]),
            duration(row["seconds_down"]),
            "open" if row["closed"] is None else {None: "–", True: "yes", False: "**NO**"}[row["proven"]],
        ]
        for row in front["incidents"]
    ]
    rows.append(["Total", "", "", "", whole(front["steps_lost"]), duration(front["seconds_down"]), ""])
    yield from table(["Incident", "Run", "Cause", "Action", ">Steps lost", ">Down", "Proven"], rows)
    yield ""
    if front["harmless"]:
        yield front["harmless"]
        yield ""


def _tags(row: Row) -> list[str]:
    tags = [f"**DRILL** {plain(row['drill'])}"] if row["drill"] else []
    tags += ["**PLANNED**"] if row["planned"] else []
    tags += ["**ASKED FOR**"] if row["kind"] == "operator" else []
    tags += ["**CORRECTED**"] if row["corrected"] else []
    return [*tags, *(["**ADVICE**"] if row["advice"] else [])]


def _runs_of(row: Row) -> str:
    before, after = row["run_before"], row["run_after"]
    return plain(f"{before} → {after}" if after and after != before else before or "–")


def _runs(report: Row, front: Row) -> Iterator[str]:
    if not report["runs"]:
        return
    yield "## Runs"
    yield ""
    rows = [
        [
            f"{branch['indent'].replace(' ', '&nbsp;')}{plain(branch['row']['run'])}",
            plain(branch["row"]["parent"] or "–"),
            whole(branch["row"]["from_step"]),
            whole(branch["row"]["last_step"]),
            whole(branch["row"]["steps_kept"]),
            f"× {branch['row']['lr_scale']:.3g}",
            plain(branch["row"]["cause"]),
        ]
        for branch in front["tree"]
    ]
    yield from table(["Run", "Parent", ">From step", ">To step", ">Kept", ">Learning rate", "Because of"], rows)
    yield ""


def _time(report: Row, front: Row) -> Iterator[str]:
    if not report["goodput"]["wall_seconds"]:
        return
    yield "## Where the time went"
    yield ""
    yield front["goodput"]
    yield ""
    if front["reliability"]:
        yield front["reliability"]
        yield ""
    rows = [[phase["label"], duration(phase["seconds"]), percent(phase["share"])] for phase in front["phases"]]
    yield from table(["Phase", ">Time", ">Share"], rows)
    yield ""
    if not front["lost"]:
        return
    rows = [
        [
            plain(item["label"]),
            whole(item["number"]),
            duration(item["repeated"]),
            duration(item["down"]),
            duration(item["both"]),
            percent(item["share"]),
        ]
        for item in front["lost"]
    ]
    yield from table(["Lost to", ">Incidents", ">Steps again", ">Standstill", ">Together", ">Of the wall clock"], rows)
    yield ""
    told = ", ".join(f"{duration(row['seconds'])} {row['label']}" for row in front["stages"])
    yield f"Of the lost time: {told}."
    yield ""


def _questions(front: Row) -> Iterator[str]:
    if not front["questions"]:
        return
    yield "## Open questions"
    yield ""
    for question in front["questions"]:
        yield f"- {plain(question)}"
    yield ""


def _validation(front: Row) -> Iterator[str]:
    if not front["validation"]:
        return
    yield "## Validation loss"
    yield ""
    keys = ("loss", "step", "previous", "lowest", "evaluations")
    rows = [
        [plain(f"{row['letter']} {row['corpus']}".strip()), *(row[key] for key in keys)] for row in front["validation"]
    ]
    yield from table(["Corpus", ">Newest", ">After step", ">Before", ">Lowest", ">Evaluations"], rows)
    yield ""


def _worst(front: Row) -> Iterator[str]:
    if not front["worst"]:
        return
    yield "## Worst nodes"
    yield ""
    keys = ("failures", "expected", "what", "parts", "hours", "now", "last")
    rows = [
        [plain(row["node"]) + (f" **{row['tag']}**" if row["tag"] else ""), *(plain(row[key]) for key in keys)]
        for row in front["worst"]
    ]
    heads = ["Node", "Failed", ">Expected", "What", "Parts", ">Node-hours lost", "Now", "Newest"]
    yield from table(heads, rows)
    yield ""
    yield WORST
    yield ""


def _nodes(front: Row) -> Iterator[str]:
    if not front["nodes"] and not front["well"]:
        return
    yield "## Nodes"
    yield ""
    keys = ("node", "verdict", "reason", "source", "excluded_by", "drain")
    rows = [[plain(str(node[key] or "–")) for key in keys] for node in front["nodes"]]
    if rows:
        yield from table(["Node", "Verdict", "Reason", "Who says so", "Excluded by", "Drain"], rows)
        yield ""
    if front["well"]:
        yield f"{front['well']}."
        yield ""


def _allocations(front: Row) -> Iterator[str]:
    if not front["allocations"]:
        return
    yield "## Allocations"
    yield ""
    rows = [[plain(cell) for cell in row.values()] for row in front["allocations"]]
    yield from table(["Allocation", "Job", ">Nodes", "Asked for", "Until", "Why"], rows)
    yield ""
    if front["allocations_before"]:
        yield front["allocations_before"]
        yield ""


def _title(entry: LogEntry) -> str:
    return entry.title + (f" · DRILL {entry.drill}" if entry.drill else "")


def _contents(titles: Sequence[str]) -> Iterator[str]:
    # Without links: MLflow takes one to a place in the file for one to a page of its own, and leaves the logbook.
    yield "## Contents"
    yield ""
    for title in titles:
        yield f"- {plain(title)}"
    if not titles:
        yield "Nothing has happened yet."
    yield ""
    yield "## Log, newest first"
    yield ""


def _entry(title: str, entry: LogEntry) -> Iterator[str]:
    head, author, rest = title.partition(f" [{entry.author}]: ")
    yield f"### {plain(head)}{f' [{plain(entry.author)}]: ' if author else ''}{plain(rest)}"
    yield ""
    if entry.quote:
        yield from quote(entry.quote)
        yield ""
    for fact in entry.facts:
        yield f"**{fact.label}.** {plain(fact.text)}" + (f" Log line: {code(fact.line)}" if fact.line else "")
        yield ""
        if fact.label == "Stacks" and entry.stacks:
            rows = [[f"**{ranks}**" if odd else ranks, plain(where)] for ranks, where, odd in entry.stacks]
            yield from table(["Ranks", "Where they were, innermost first"], rows)
            yield ""
        if fact.label == "Cost" and entry.spans:
            yield ", ".join(f"{duration(seconds)} {label}" for label, seconds in entry.spans) + "."
            yield ""
        if fact.label == "Proof" and entry.readbacks and _worth_reading(entry):
            rows = [
                [whole(item["step"]), rate(item["expected_lr"]), rate(item["lr"]), _loss(item["loss"])]
                for item in entry.readbacks
            ]
            yield from table([">Step", ">Expected", ">Read back", ">Loss"], rows)
            yield ""
    if entry.changes:
        yield "```diff"
        for what, before, after in entry.changes:
            for sign, side in (("-", before), ("+", after)):
                if side:
                    yield f"{sign} {printable(what)}: {printable(side)}"
        yield "```"
        yield ""
    for remark in entry.remarks:
        what = "Correction" if remark.correction else "Note"
        yield f"**{what} by {plain(remark.author)}, {minute(remark.ts)}:**"
        yield ""
        yield from quote(remark.text)
        yield ""


def _worth_reading(entry: LogEntry) -> bool:
    """Where something was to change, or did not as it should; of a mere restart, the sentence says it all."""
    row = entry.incident or {}
    return row.get("lr_before") != row.get("lr_after") or row.get("proven") is not True


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _foot(report: Row, front: Row) -> Iterator[str]:
    journal = report["journal"]
    remarks = "".join(f" {plain(remark)}." for remark in journal["remarks"])
    as_of = f", as of {front['as_of']}" if report["as_of"] else ""
    yield "---"
    yield ""
    drawn = f"Drawn from the journal up to entry {whole(journal['seq'])} and the telemetry{as_of}."
    yield f"{drawn} Times are UTC.{remarks}"
    yield ""
