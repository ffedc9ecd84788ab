"""The model card: how a model was trained, what went wrong, what it cost, and what is not known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chronicles.evaluations import ScoreReport, measured_by
from chronicles.kept_curve import kept_points
from chronicles.ledger.conventional import Conventional
from chronicles.logbook.drawing.markup import code, plain, table
from chronicles.logbook.entries import schedule_words
from chronicles.record import LineageRecord
from chronicles.report.model import LineageReport, RunReport
from chronicles.wording import count, duration, hours, names, percent, rate, score, short, whole
from opt_ops.core.decide.proof import baseline
from opt_ops.core.failures.classes import title

_OF_HARM = ("crows_pairs", "toxigen", "realtoxicityprompts", "bbq", "winogender")
"""Beginnings of the names of lm-eval's tasks that test bias or toxicity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The model that is given away."""

    name: str
    run: str
    step: int
    dtype: str
    licence: str  # its SPDX identifier, or `other`
    digest: str  # SHA-256 of the checkpoint's manifest


def card(record: LineageRecord, report: LineageReport, released: Released) -> str:
    """`README.md` of the release: YAML that hubs read, then sections."""
    parts = [
        _head(released),
        _what(report, released),
        _training(record, report, released),
        _evaluations(_scores(report, released)),
        _incidents(report),
        _cost(report),
        _unknown(report, _scores(report, released)),
        _files(),
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(released: Released) -> Iterator[str]:
    yield "---"
    yield f"license: {released.licence}"
    yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    yield "tags:"
    yield "- opt"
    yield "- opt-ops"
    yield "---"
    yield ""


def _what(report: LineageReport, released: Released) -> Iterator[str]:
    yield f"# {plain(released.name)}"
    yield ""
    yield (
        f"Weights of run {plain(released.run)} at step {whole(released.step)}, in {released.dtype}. "
        f"The lineage's state is {report.status}. `logbook.html` tells the whole training."
    )
    yield ""
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield 'model = AutoModelForCausalLM.from_pretrained("."); tokenizer = AutoTokenizer.from_pretrained(".")'
    yield "```"
    yield ""


def _training(record: LineageRecord, report: LineageReport, released: Released) -> Iterator[str]:
    yield "## Training"
    yield ""
    rows = [["Recipe", code(" ".join((report.recipe or "", *report.settings)))]]
    if known := baseline(record.state):
        schedule, optimizer = known
        rows.append(["Schedule", schedule_words.in_words(schedule, report.total_steps)])
        decay, clip = optimizer.weight_decay, optimizer.clip_norm
        betas = names(optimizer.betas)
        rows.append(["Optimizer", f"Betas {betas}, weight decay {decay:g}, gradients clipped at {clip:g}"])
    points = [point for _, point in kept_points(record.curves) if point.step <= released.step]
    rows.append(["Steps", whole(released.step)])
    if points and points[-1].tokens:  # telemetry counts them from the beginning of training
        gap = "" if points[-1].step == released.step else f" up to step {whole(points[-1].step)}"
        rows.append(["Tokens", f"{whole(points[-1].tokens)} trained on{gap}"])
    losses = [point.loss for point in points[-50:] if point.loss is not None]
    if losses:
        rows.append(["Loss", f"{sum(losses) / len(losses):.4f}, mean of the last {len(losses)} updates"])
    rows += [
        [f"Validation loss, {plain(corpus.corpus)}", f"{corpus.loss:.4f} at step {whole(corpus.step)}"]
        for corpus in report.validation
        if corpus.loss is not None
    ]
    attempt = next((each for each in reversed(report.attempts) if each.layout), None)
    if attempt is not None:
        rows.append(["Layout", plain(", ".join(f"{key} {value}" for key, value in (attempt.layout or {}).items()))])
        rows.append(["Versions", plain(", ".join(f"{key} {value}" for key, value in (attempt.versions or {}).items()))])
    yield from table(["What", "Value"], [[what, value] for what, value in rows])
    yield ""
    yield from _changes(report.runs)


def _changes(runs: Sequence[RunReport]) -> Iterator[str]:
    """Every change of the learning rate, of settings and of the data, by run."""
    if len(runs) < 2:
        yield "The learning rate, the settings and the data were never changed."
        yield ""
        return
    yield "Changes of the learning rate, of settings and of the data. Each run goes on from its parent's step:"
    yield ""
    rows = [
        [
            plain(run.run),
            whole(run.from_step),
            f"× {run.lr_scale:.3g}",
            plain(" ".join(run.settings)) or "–",
            plain("; ".join(f"{what} after {whole(step)}" for step, what in run.data_changes)) or "–",
            ", ".join(f"{whole(first)} to {whole(last)}" for first, last in run.skips) or "–",
            plain(run.cause),
        ]
        for run in runs
    ]
    yield from table(["Run", ">From step", ">Learning rate", "Settings", "Data", "Batches left out", "Cause"], rows)
    yield ""


def _scores(report: LineageReport, released: Released) -> list[ScoreReport]:
    """What was measured on the checkpoint that is given away."""
    return [each for each in report.evaluations if each.digest == released.digest]


def _evaluations(scores: Sequence[ScoreReport]) -> Iterator[str]:
    if not scores:
        return
    yield "## Evaluations"
    yield ""
    yield "Measured on the checkpoint itself, before it was converted to the number format of these files."
    yield ""
    rows = [
        [
            plain(short(each.task, 80)),
            plain(short(each.metric, 80)),
            score(each.value, each.stderr),
            whole(each.n),
            whole(each.shots),
            plain(short(measured_by(each), 120)),
            "not known" if each.contaminated is None else f"{whole(each.contaminated)} removed",
        ]
        for each in scores
    ]
    heads = ["Task", "Metric", ">Score", ">Documents", ">Shots", "Harness", "Training documents that share its text"]
    yield from table(heads, rows)
    yield ""


def _incidents(report: LineageReport) -> Iterator[str]:
    spent = report.ledger
    yield "## What went wrong"
    yield ""
    if not report.incidents:
        yield "Nothing is in the journal."
        yield ""
        return
    lost = {kind.kind: kind.seconds for kind in spent.lost_by_kind}
    number = Counter(row.kind for row in report.incidents)
    drills = Counter(row.kind for row in report.incidents if row.drill is not None)
    kinds = sorted(number, key=lambda kind: (-lost.get(kind, 0.0), kind))
    rows = [[title(kind), str(number[kind]), str(drills[kind]), duration(lost.get(kind, 0.0))] for kind in kinds]
    yield from table(["Class", ">Incidents", ">Of them drills", ">Time lost"], rows)
    yield ""
    yield (
        f"{whole(spent.steps_discarded)} steps were discarded. On-call was paged "
        f"{count(spent.involvement.pages, 'time')}. Goodput {percent(spent.goodput)}."
    )
    yield ""


def _cost(report: LineageReport) -> Iterator[str]:
    resources = report.ledger.resources
    yield "## What it cost"
    yield ""
    rows = [
        ["Wall clock", duration(report.ledger.wall_seconds)],
        ["Node-hours", hours(resources.node_hours)],
        ["GPU-hours", hours(resources.gpu_hours)],
        ["Energy, by the GPUs' counters × PUE", "–" if resources.kwh is None else f"{resources.kwh:,.1f} kWh"],
        ["CO2e of that energy", "–" if resources.tco2e is None else f"{resources.tco2e:,.3f} t"],
        ["CO2e, conventional figure", _conventional(resources.conventional)],
    ]
    yield from table(["What", "Value"], rows)
    yield ""
    yield "All of it counts: discarded steps, waiting, spare nodes and failed attempts. Other lineages do not."
    yield ""


def _conventional(figure: Conventional | None) -> str:
    if figure is None or figure.tco2e is None:
        return "–"
    year = f", {figure.factor_year}" if figure.factor_year else ""
    source = plain(figure.factor_source or "")  # never empty: without a source there are no tonnes
    return (
        f"{figure.tco2e:,.3f} t: {whole(round(figure.gpu_hours))} GPU-hours × {figure.tdp_watts:g} W × PUE "
        f"{figure.pue:g} × {figure.kg_co2e_per_kwh:g} kg per kWh ({source}{year})"
    )


def _unknown(report: LineageReport, scores: Sequence[ScoreReport]) -> Iterator[str]:
    resources = report.ledger.resources
    missing: list[str] = []
    if not scores:
        missing.append("- The model was not evaluated by opt-ops: no benchmark, no test of bias or toxicity.")
    elif not any(each.task.startswith(_OF_HARM) for each in scores):
        missing.append("- Bias and toxicity were not tested by opt-ops.")
    missing += ["- What was filtered from the data before it was given to the trainer is not in the journal."]
    if resources.kwh is None:
        missing.append("- Energy was not metered.")
    elif resources.metered_seconds < report.ledger.wall_seconds:
        gap = duration(report.ledger.wall_seconds - resources.metered_seconds)
        missing.append(f"- Energy was not metered for {gap} of the wall clock. It is not estimated.")
    if resources.tco2e is None and resources.conventional is None:
        missing.append("- No carbon figure: the site has set no factor.")
    unexplained = sum(row.is_failure and row.drill is None and row.confidence == "low" for row in report.incidents)
    if unexplained:
        missing.append(f"- The cause of {count(unexplained, 'incident')} is not known.")
    changed = [run for run in report.runs if run.lr_scale != 1]
    if changed:
        missing.append(f"- Whether the learning rate × {rate(changed[-1].lr_scale)} was needed is not proven.")
    yield "## What is not known"
    yield ""
    yield from missing
    yield ""


def _files() -> Iterator[str]:
    yield "## Files"
    yield ""
    rows = [
        ["`model*.safetensors`, `config.json`, `tokenizer.json`", "weights, model and tokenizer for transformers"],
        ["`data.json`", "the corpora: shares, digests, numbers. No text"],
        ["`provenance.json`", "run, step, digests of checkpoint, code and journal"],
        ["`logbook.html`, `logbook.md`, `report.json`", "the redacted logbook and its numbers"],
        ["`SHA256SUMS`", "of every other file: `sha256sum -c SHA256SUMS`"],
    ]
    yield from table(["File", "What"], rows)


def is_name(text: str) -> bool:
    """Whether the text can be the name of a model on a hub."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", text) is not None
