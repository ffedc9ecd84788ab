"""Events: evaluations of checkpoints, and texts that they complete."""

from __future__ import annotations

import re
from dataclasses import dataclass

from opt_ops.core.values import Checkpoint, Completion, EvaluationEnd

_LIMITED = re.compile(r".* first (?P<limit>\d{1,12})", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationIntended:
    """Intent: evaluate a checkpoint in a process of its own. Settled by `EvaluationEnded`.

    `node` is an idle spare node; None: the host of the daemon.
    """

    evaluation: str  # such as 12-ev001
    checkpoint: Checkpoint
    node: str | None
    tasks: tuple[str, ...]
    samples: bool = False  # the fixed prompts are completed, too


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationEnded:
    """Outcome of `EvaluationIntended`."""

    evaluation: str
    end: EvaluationEnd
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEvaluated:
    """Observation: one metric of one task, measured on a checkpoint. Once for each `score_key`."""

    request: str
    author: str
    run: str
    step: int
    digest: str  # SHA-256 of the checkpoint's manifest
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int  # documents of the task that were scored
    shots: int
    harness: str  # such as lm-eval 0.4.13
    task_version: str
    file: str  # the harness's own results, in the lineage's folder
    sha256: str
    bos: bool | None = None  # whether the tokenizer put a `</s>` before each text; None: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSampled:
    """Observation: the fixed prompts, as a checkpoint completes them. Untrusted texts."""

    request: str
    author: str
    run: str
    step: int
    digest: str  # SHA-256 of the checkpoint's manifest
    completions: tuple[Completion, ...]
    tokens: int  # at most so many in a completion
    seed: int  # of the drawn ones
    file: str
    sha256: str


def score_key(event: CheckpointEvaluated) -> str:
    """What is measured only once: checkpoint, task, metric, shots, versions of task and harness."""
    return "|".join(
        (event.digest, event.task, event.task_version, str(event.shots), event.metric, event.harness)
    )  # names hold no `|`: `operator_requests` refuses it


def limited(task_version: str, limit: int | None) -> str:
    """The version of a task of which only the first documents are scored: `1.0`, 200 → `1.0 first 200`."""
    return f"{task_version} first {limit}" if limit else task_version


def limit_of(task_version: str) -> int | None:
    """Of how many documents at most a score is, by the version of its task; None: of all."""
    found = _LIMITED.fullmatch(task_version)
    return int(found["limit"]) if found is not None else None


def apart(shots: int, task_version: str) -> tuple[str, ...]:
    """What sets a score apart from the zero-shot one of all documents: `5-shot`, `first-200`."""
    limit = limit_of(task_version)
    return (*((f"{shots}-shot",) if shots else ()), *((f"first-{limit}",) if limit is not None else ()))
