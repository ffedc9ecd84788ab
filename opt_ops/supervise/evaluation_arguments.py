"""Results of evaluations: `ckpt evaluate` leaves them in the inbox, one request for each task and metric."""

from __future__ import annotations

import math
import re

from opt_ops.core.events import CheckpointEvaluated, CheckpointSampled, Event
from opt_ops.core.events.evaluation import score_key
from opt_ops.core.state.model import State
from opt_ops.core.text import clean
from opt_ops.core.values import Completion
from opt_ops.ports import Request
from opt_ops.supervise.request_arguments import LONGEST_REASON, MOST_STEPS, Arguments, InvalidRequest

MOST_PROMPTS = 64
LONGEST_COMPLETION = 8192  # characters

_NAME = re.compile(r"[^\x00-\x1f|]{1,255}")  # of tasks, metrics, versions: `score_key` joins them with `|`
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 1e300  # the perplexity of a model that has diverged has no other bound


def evaluated(state: State, request: Request) -> Event:
    """One metric of one task, measured on a checkpoint of this lineage."""
    given = Arguments(request.arguments)
    event = CheckpointEvaluated(
        request=request.request,
        author=request.author,
        run=_run(state, given),
        step=given.whole("step", 0, MOST_STEPS),
        digest=_digest(given, "digest"),
        task=_name(given, "task"),
        metric=_name(given, "metric"),
        value=_finite(request, "value"),
        stderr=None if request.arguments.get("stderr") is None else _finite(request, "stderr"),
        n=given.whole("n", 0, 10**12),
        shots=given.whole("shots", 0, 10_000),
        harness=_name(given, "harness"),
        task_version=_name(given, "task_version"),
        file=given.text("file", LONGEST_REASON),
        sha256=_digest(given, "sha256"),
        bos=given.flag("bos") if given.has("bos") else None,
    )
    if score_key(event) in state.scores:
        raise InvalidRequest(f"{event.task} {event.metric} of {event.run} at step {event.step} is in the journal")
    return event


def sampled(state: State, request: Request) -> Event:
    """The fixed prompts, as a checkpoint of this lineage completes them."""
    given = Arguments(request.arguments)
    digest, parts = _digest(given, "digest"), given.parts("completions")
    if digest in state.samples:
        raise InvalidRequest("the completions of this checkpoint are in the journal")
    if not 0 < len(parts) <= MOST_PROMPTS:
        raise InvalidRequest(f"completions has {len(parts)} prompts; from 1 to {MOST_PROMPTS} are taken")
    return CheckpointSampled(
        request=request.request,
        author=request.author,
        run=_run(state, given),
        step=given.whole("step", 0, MOST_STEPS),
        digest=digest,
        completions=tuple(
            Completion(prompt=_text(each, "prompt"), greedy=_text(each, "greedy"), drawn=_text(each, "drawn"))
            for each in parts
        ),
        tokens=given.whole("tokens", 1, 100_000),
        seed=given.whole("seed", 0, 2**53),
        file=given.text("file", LONGEST_REASON),
        sha256=_digest(given, "sha256"),
    )


def _run(state: State, given: Arguments) -> str:
    run = given.text("run")
    if run not in state.runs:
        raise InvalidRequest(f"there is no run {run!r} in this lineage")
    return run


def _digest(given: Arguments, name: str) -> str:
    text = given.text(name)
    if not _SHA256.fullmatch(text):
        raise InvalidRequest(f"{name} is no SHA-256 in hexadecimal digits")
    return text


def _name(given: Arguments, name: str) -> str:
    text = given.text(name)
    if not _NAME.fullmatch(text):
        raise InvalidRequest(f"{name} is empty, or holds `|` or a control character")
    return text


def _text(given: Arguments, name: str) -> str:
    return clean(given.text(name, LONGEST_COMPLETION), LONGEST_COMPLETION)


def _finite(request: Request, name: str) -> float:
    value = request.arguments[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > _MOST:
        raise InvalidRequest(f"{name} is not a finite number of at most {_MOST:g}")
    return float(value)
