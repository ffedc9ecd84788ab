"""The evaluations of `logbook.md`: scores, and the fixed prompts as checkpoints complete them."""

from __future__ import annotations

from collections.abc import Iterator

from chronicles.logbook.drawing.markup import plain, table
from chronicles.logbook.evaluation_rows import EvaluationRow, Evaluations, PromptRows, Text
from chronicles.wording import short


def evaluations(found: Evaluations) -> Iterator[str]:
    """Both sections; nothing where there is nothing."""
    if found.rows:
        yield from _scores(found)
    if found.prompts:
        yield "## Completed prompts"
        yield ""
        yield found.about_prompts
        yield ""
        for prompt in found.prompts:
            yield from _prompt(prompt)


def _scores(found: Evaluations) -> Iterator[str]:
    yield "## Evaluations"
    yield ""
    heads = ["Task", "Metric", ">Newest", ">Step", ">Previous", ">Change"]
    heads += [f">{found.golden}"] if found.golden else []
    heads += ["Text of the task in the data"] if found.contamination else []
    yield from table([*heads, ">Documents", ">Shots", "Harness"], [_row(row, found) for row in found.rows])
    yield ""
    yield found.about_scores
    yield ""
    if found.taken_back:
        yield "Taken back by a rollback:"
        yield ""
        rows = [[row.run, row.step, plain(short(row.scores, 400))] for row in found.taken_back]
        yield from table(["Run", ">Step", "Scores"], rows)
        yield ""


def _row(row: EvaluationRow, found: Evaluations) -> list[str]:
    newest = f"{row.newest} **TAKEN BACK**" if row.taken_back else row.newest
    cells = [
        plain(row.task),
        plain(row.metric),
        newest,
        row.step,
        row.previous,
        f"{row.change}{' **WORSE**' if row.worse else ''}",
    ]
    cells += [row.golden or "–"] if found.golden else []
    cells += [row.contaminated] if found.contamination else []
    return [*cells, row.n, row.shots, plain(row.harness)]


def _prompt(prompt: PromptRows) -> Iterator[str]:
    yield f"**Prompt:** {_text(prompt.prompt)}"
    yield ""
    rows = [
        [f"{row.step} of {row.run}{' **TAKEN BACK**' if row.taken_back else ''}", _text(row.greedy), _text(row.drawn)]
        for row in prompt.rows
    ]
    yield from table([">Step", "Greedy", "Drawn"], rows)
    yield ""


def _text(text: Text) -> str:
    return plain(text.begin)
