"""Entries about evaluated checkpoints: one for each, however many tasks were scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from chronicles.evaluations import ScoreReport, called
from chronicles.logbook.entries.entry import Fact, LogEntry, entry_of
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport
from chronicles.wording import count, score, short, whole
from opt_ops.core import events as e

_TITLED = 2  # scores in a title
_LISTED = 40  # scores in the evidence


def first_results(record: LineageRecord) -> Mapping[int, tuple[str, int]]:
    """By entry of the journal: run and step of the checkpoint of which it is the first result."""
    found: dict[tuple[str, int], int] = {}
    for entry in record.entries:
        if isinstance(entry.event, e.CheckpointEvaluated | e.CheckpointSampled):
            found.setdefault((entry.event.run, entry.event.step), entry.seq)
    return {seq: checkpoint for checkpoint, seq in found.items()}


def entry(record: LineageRecord, report: LineageReport, first: e.Entry, run: str, step: int) -> LogEntry:
    """The entry about a checkpoint. `first` is the journal's first result of it."""
    scores = [each for each in report.evaluations if (each.run, each.step) == (run, step)]
    prompts = sum(len(each.prompts) for each in report.completions if (each.run, each.step) == (run, step))
    fell = [each for each in scores if each.fell]
    settled = any(each.settled for each in (*scores, *report.completions) if (each.run, each.step) == (run, step))
    return entry_of(
        record,
        first,
        _title(step, scores, prompts, fell),
        run=run,
        facts=tuple(_facts(scores, prompts, fell, settled=settled)),
        notable=bool(fell),
    )


def _title(step: int, scores: Sequence[ScoreReport], prompts: int, fell: Sequence[ScoreReport]) -> str:
    if not scores:
        return f"completed {count(prompts, 'fixed prompt') if prompts else 'fixed prompts'} at step {whole(step)}"
    if fell:
        return f"evaluated at step {whole(step)}, worse than before: {_some(fell)}"
    return f"evaluated at step {whole(step)}: {_some(scores)}"


def _some(scores: Sequence[ScoreReport]) -> str:
    named = ", ".join(f"{called(each)} {score(each.value)}" for each in scores[:_TITLED])
    return f"{named} and {whole(len(scores) - _TITLED)} more" if len(scores) > _TITLED else named


def _facts(
    scores: Sequence[ScoreReport], prompts: int, fell: Sequence[ScoreReport], *, settled: bool
) -> Iterator[Fact]:
    if not settled:
        yield Fact(label="Settled", text="No: a rollback took this step back, so it is not on the settled curves.")
    if fell:
        named = "; ".join(called(each) for each in fell[:_LISTED])
        yield Fact(label="Worse", text=f"By more than three standard errors of the difference: {named}.")
    if scores:
        told = [f"{called(x)} {score(x.value, x.stderr)}" for x in scores[:_LISTED]]
        more = f"; {whole(len(scores) - _LISTED)} more in report.json" if len(scores) > _LISTED else ""
        yield Fact(label="Scores", text=f"{'; '.join(told)}{more}.")
        yield Fact(label="Harness", text=f"{', '.join(dict.fromkeys(short(each.harness, 60) for each in scores))}.")
    if prompts:
        yield Fact(label="Prompts", text=f"{count(prompts, 'fixed prompt')} completed; see Completed prompts.")
