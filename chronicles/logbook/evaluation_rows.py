"""What the front page says of evaluations, as rows of plain text: HTML and Markdown show the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from chronicles.evaluations import CompletionsReport, ScoreReport, Series, called, measured_by, series
from chronicles.golden_scores import Golden, golden
from chronicles.report.model import LineageReport
from chronicles.wording import count, score, short, whole
from opt_ops.core.decide.scores import errors_between

_NAME = 60  # characters of a task, a metric or a harness
_BEGIN = 240  # characters of a text that are not folded
_WHOLE = 4_000  # characters of a text that are shown at all
_STEPS = 12  # checkpoints whose completions are shown for a prompt
_SETTLED = "SE: standard errors of the difference. An evaluation of a step that a rollback took back is not settled."


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """The newest score of what was measured in one way, beside the one before."""

    task: str
    metric: str
    newest: str
    step: str
    previous: str
    change: str
    worse: bool  # by more than chance explains
    golden: str
    contaminated: str
    n: str
    shots: str
    harness: str
    taken_back: bool  # by a rollback: no score is settled


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenBackRow:
    """The scores of a checkpoint whose steps a rollback took back."""

    run: str
    step: str
    scores: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """An untrusted text: what stands on the page, and all of it, folded."""

    begin: str
    whole: str  # empty where the beginning is all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRow:
    """How a checkpoint goes on with a prompt."""

    run: str
    step: str
    taken_back: bool
    greedy: Text
    drawn: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRows:
    """A fixed prompt, and its completions by step."""

    prompt: Text
    rows: Sequence[CompletionRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluations:
    """Everything that the page shows of evaluations."""

    rows: Sequence[EvaluationRow]
    golden: str  # the head of its column; empty where there is none
    contamination: bool  # whether anything is known of it
    about_scores: str
    taken_back: Sequence[TakenBackRow]
    prompts: Sequence[PromptRows]
    about_prompts: str


def evaluations(report: LineageReport) -> Evaluations:
    """What the front page says of evaluations; empty where there is none."""
    released = golden(report.recipe, report.settings)
    known = series(report.evaluations)
    rows = [_row(each, released) for each in known]
    shown = any(row.golden for row in rows)
    return Evaluations(
        rows=rows,
        golden=released.name if released and shown else "",
        contamination=any(each.newest.contaminated is not None for each in known),
        about_scores=f"{_SETTLED} Released model: {released.source}." if released and shown else _SETTLED,
        taken_back=_taken_back(report.evaluations),
        prompts=_prompts(report.completions),
        about_prompts=_about(report.completions),
    )


def golden_value(score: ScoreReport, released: Golden | None) -> float | None:
    """What the released model of the same size scores, zero-shot; None where that is not comparable or not known."""
    if released is None or score.shots or score.limit is not None:
        return None
    return released.values.get((score.task, score.metric.partition(",")[0]))


def _row(each: Series, released: Golden | None) -> EvaluationRow:
    newest, previous = each.newest, each.previous
    beside = golden_value(newest, released)
    return EvaluationRow(
        task=short(newest.task, _NAME),
        metric=short(newest.metric, _NAME),
        newest=score(newest.value, newest.stderr),
        step=whole(newest.step),
        previous=f"{score(previous.value)} at {whole(previous.step)}" if previous else "–",
        change=_change(previous, newest) if previous else "–",
        worse=newest.fell,
        golden="" if beside is None else score(beside),
        contaminated=_contaminated(newest.contaminated),
        n=whole(newest.n),
        shots=whole(newest.shots),
        harness=short(measured_by(newest), _NAME),
        taken_back=not newest.settled,
    )


def _change(previous: ScoreReport, newest: ScoreReport) -> str:
    difference, errors = newest.value - previous.value, errors_between(previous, newest)
    shown = f"{'+' if difference >= 0 else '−'}{score(abs(difference))}"
    told = "" if errors is None or abs(errors) == float("inf") else f" ({abs(errors):.1f} SE)"
    return f"{shown}{told}"


def _contaminated(number: int | None) -> str:
    if number is None:
        return "not known"
    return f"{count(number, 'document')} removed" if number else "none found"


def _taken_back(found: Iterable[ScoreReport]) -> list[TakenBackRow]:
    by_checkpoint: dict[tuple[int, str], list[str]] = {}
    for each in found:
        if not each.settled:
            told = f"{called(each)} {score(each.value, each.stderr)}"
            by_checkpoint.setdefault((each.step, each.run), []).append(told)
    return [
        TakenBackRow(run=run, step=whole(step), scores="; ".join(told))
        for (step, run), told in sorted(by_checkpoint.items())
    ]


# ---- completed prompts


def _prompts(found: Sequence[CompletionsReport]) -> list[PromptRows]:
    """By prompt, in the order in which they were first completed; below each other by step."""
    prompts: dict[str, list[CompletionRow]] = {}
    for each in found:
        for text in each.prompts:
            row = CompletionRow(
                run=each.run,
                step=whole(each.step),
                taken_back=not each.settled,
                greedy=_text(text.greedy),
                drawn=_text(text.drawn),
            )
            prompts.setdefault(text.prompt, []).append(row)
    return [PromptRows(prompt=_text(prompt), rows=_spread(rows)) for prompt, rows in prompts.items()]


def _spread(rows: Sequence[CompletionRow]) -> list[CompletionRow]:
    """Of many checkpoints some, evenly spread: the first and the newest are among them."""
    if len(rows) <= _STEPS:
        return list(rows)
    return [rows[i * (len(rows) - 1) // (_STEPS - 1)] for i in range(_STEPS)]


def _text(text: str) -> Text:
    if len(text) <= _BEGIN:
        return Text(begin=text or "(nothing)", whole="")
    left = len(text) - _WHOLE
    more = f"… ({whole(left)} more characters in report.json)" if left > 0 else ""
    return Text(begin=f"{text[:_BEGIN].rstrip()}…", whole=f"{text[:_WHOLE]}{more}")


def _about(found: Sequence[CompletionsReport]) -> str:
    if not found:
        return ""
    newest = found[-1]
    shown = f" {_STEPS} of {count(len(found), 'checkpoint')} are shown." if len(found) > _STEPS else ""
    return (
        f"Greedy takes the likeliest token each time. Drawn uses the seed {newest.seed}. "
        f"At most {count(newest.tokens, 'token')} each.{shown}"
    )
