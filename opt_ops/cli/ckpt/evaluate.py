"""What `opt-ops ckpt evaluate` does: verify, convert, score in a process of its own, and tell the daemon."""

from __future__ import annotations

import getpass
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_ops.cli.ckpt import checkpoints, evaluation_answers, evaluation_results, evaluation_samples, harness
from opt_ops.cli.ckpt.checkpoints import Named
from opt_ops.cli.ckpt.conversions import converted
from opt_ops.cli.ckpt.evaluation_results import Found
from opt_ops.cli.ckpt.evaluation_samples import Prompts
from opt_ops.cli.ckpt.evaluation_tasks import REMARKS, Wanted, wanted
from opt_ops.cli.shared.options import settings
from opt_ops.cli.shared.output import Column, Format, say, show, signs_of_life
from opt_ops.config import Config
from opt_ops.core.events.evaluation import score_key
from opt_ops.core.state.model import State
from opt_ops.errors import OptOpsError, UsageError
from opt_ops.runfolder import lineages
from opt_ops.runfolder.permissions import group_of, private


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the command is asked for. What is left out, the configuration says."""

    tasks: Sequence[str]
    shots: int | None
    limit: int | None
    prompts: Path | None
    tokens: int | None
    again: bool
    quiet: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What there is in the end. `failure` is the error to end with, after the items are printed."""

    items: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    failure: OptOpsError | None


def evaluate(text: str, wishes: Wishes) -> Outcome:
    """Evaluate the checkpoint that `text` names, unless it was done before.

    Raises:
        UsageError: an option means nothing, or the harness is not installed.
        NotFound: there is no such checkpoint, folder or task.
        Unavailable: the environment of the harness cannot be started.
        Exit: 65, the checkpoint is damaged.
        OptOpsError: it could not be converted.
    """
    config = settings.config
    tasks, prompts = _asked(config, wishes)
    chosen = checkpoints.named(text)
    with signs_of_life("reading the checkpoint", quiet=wishes.quiet):
        checkpoints.require_sound(chosen)
    with_harness = harness.probe(config.evaluate.python)
    with private(group_of(chosen.lineage.path)):
        folder = evaluation_results.folder_of(chosen)
        with evaluation_results.alone(folder, lambda who: say(f"waiting for {who}, which evaluates it", wishes.quiet)):
            return _evaluated(chosen, folder, config, with_harness, tasks, prompts, wishes)


def _asked(config: Config, wishes: Wishes) -> tuple[list[Wanted], Prompts | None]:
    """What is asked for, by the options, else by the configuration."""
    words, file = list(wishes.tasks), wishes.prompts
    if not words and file is None:
        words, file = list(config.evaluate.tasks), config.samples.prompts
    if not words and file is None:
        raise UsageError(
            "neither tasks nor prompts are given", "--tasks NAME[,NAME...]|DIR, --prompts FILE, or [evaluate] tasks"
        )
    for group in (word for word in words if word in REMARKS):
        say(REMARKS[group], wishes.quiet)
    shots = config.evaluate.shots if wishes.shots is None else wishes.shots
    limit = config.evaluate.limit if wishes.limit is None else wishes.limit
    prompts = evaluation_samples.read(file, wishes.tokens or config.samples.tokens) if file else None
    return wanted(words, shots, limit), prompts


def _evaluated(
    chosen: Named,
    folder: Path,
    config: Config,
    version: str,
    tasks: Sequence[Wanted],
    prompts: Prompts | None,
    wishes: Wishes,
) -> Outcome:
    """Find what is there, score what is missing, leave requests, and wait for the answer for a moment."""
    path = chosen.lineage.path
    state = lineages.state(path)  # it may have waited for the lock
    there = {} if wishes.again else _there(chosen, folder, state, tasks, version)
    completed = None if prompts is None or wishes.again else evaluation_samples.find(chosen, folder, state, prompts)
    missing: dict[Wanted, Path] = {}
    for task in (each for each in tasks if each not in there):
        missing[task] = evaluation_results.free_file(folder, task.stem, missing.values())
    if prompts is not None and completed is not None and not evaluation_samples.is_of(completed, prompts):
        say(
            "other prompts were completed before; --again completes these, but the journal keeps the others",
            wishes.quiet,
        )
    failure, target = None, None
    if prompts is not None and completed is None:
        target = evaluation_results.free_file(folder, prompts.stem)
    if missing or target is not None:
        weights = converted(chosen, config.trainer, "fp32", lambda line: say(f"  {line}", wishes.quiet))
        failure = harness.run(
            config.evaluate.python,
            harness.Work(
                weights=weights,
                about={"digest": chosen.digest, "run": chosen.checkpoint.run, "step": chosen.checkpoint.step},
                tasks=missing,
                documents=path / evaluation_results.FOLDER / evaluation_results.DOCUMENTS,
                prompts=prompts,
                completions=target,
            ),
            lambda line: say(f"  {line}", wishes.quiet),
        )
    ran = {
        task: found
        for task, file in missing.items()
        if file.exists() and (found := evaluation_results.scores_in(chosen, file, task)) is not None
    }
    if target is not None and target.exists():
        completed = evaluation_samples.completed_in(chosen, target)
    scores = [score for found in (there | ran).values() for score in found.scores]
    refusal = evaluation_answers.post(path, getpass.getuser(), scores, completed, quiet=wishes.quiet)
    for metric in (each for found in ran.values() for each in found.left_out):
        say(f"left out: {metric}, which is no finite number", wishes.quiet)
    items = {  # by key: a group has the scores of its tasks, too
        score_key(score): evaluation_results.item(chosen, score, ran=task in ran)
        for task in tasks
        if (found := ran.get(task) or there.get(task)) is not None
        for score in found.scores
    }
    samples = evaluation_samples.items(chosen, completed, ran=target is not None) if completed else []
    return Outcome(items=list(items.values()), samples=samples, failure=failure or refusal)


def _there(chosen: Named, folder: Path, state: State, tasks: Sequence[Wanted], version: str) -> dict[Wanted, Found]:
    found = {task: evaluation_results.find(chosen, folder, state, task, version) for task in tasks}
    return {task: scores for task, scores in found.items() if scores is not None}


def show_outcome(found: Outcome, output: Format, *, header: bool) -> None:
    """Print the results: `items` are scores, and `samples` beside them are completed prompts."""
    columns = [
        Column("TASK", "task"),
        Column("METRIC", "metric"),
        Column("VALUE", "value", right=True),
        Column("STDERR", "stderr", right=True),
        Column("N", "n", right=True),
        Column("SHOTS", "shots", right=True),
        Column("RAN", "ran"),
        Column("RUN", "run", wide=True),
        Column("STEP", "step", right=True, wide=True),
        Column("HARNESS", "harness", wide=True),
        Column("FILE", "file", wide=True),
    ]
    beside = {"samples": found.samples} if found.samples else {}
    if found.items or output in (Format.JSON, Format.JSONL):
        show("opt-ops/ckpt-evaluate/1", found.items, columns, output, header=header, beside=beside)
    if found.samples and output in (Format.TABLE, Format.WIDE):
        columns = [Column("PROMPT", "prompt"), Column("GREEDY", "greedy"), Column("DRAWN", "drawn")]
        show("opt-ops/ckpt-evaluate/1", found.samples, columns, output, header=header)
