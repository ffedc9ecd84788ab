"""Leaves the results of an evaluation to the daemon, one request for each task and metric, and waits for a moment."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from opt_ops.cli.ckpt.evaluation_results import arguments
from opt_ops.cli.shared.options import watch_now
from opt_ops.cli.shared.output import say
from opt_ops.core.events import CheckpointEvaluated, CheckpointSampled, RequestRefused
from opt_ops.core.events.evaluation import score_key
from opt_ops.errors import OptOpsError, Unavailable
from opt_ops.runfolder import lineages

_PATIENCE = 10.0  # seconds in which the daemon takes none of them


def post(
    lineage: Path,
    author: str,
    scores: Sequence[CheckpointEvaluated],
    completed: CheckpointSampled | None,
    *,
    quiet: bool,
) -> OptOpsError | None:
    """Leave a request for each result that is not in the journal. Returns why one was not taken.

    The name of a request comes from what is measured, so asking twice is asking once.
    """
    state = lineages.state(lineage)
    new = {_named(score): score for score in scores if score_key(score) not in state.scores}
    for name, score in new.items():
        lineages.ask(lineage, author, "evaluated", arguments(score), time.time(), identifier=name)
    names = list(new)
    if completed is not None and completed.digest not in state.samples:
        names.append(f"sampled-{completed.digest[:40]}")
        lineages.ask(lineage, author, "sampled", arguments(completed), time.time(), identifier=names[-1])
    return _answer(lineage, names, quiet) if names else None


def _named(score: CheckpointEvaluated) -> str:
    return f"evaluated-{hashlib.sha256(score_key(score).encode()).hexdigest()[:40]}"


def _answer(lineage: Path, names: Sequence[str], quiet: bool) -> OptOpsError | None:
    """Wait while the daemon takes requests. Without a daemon they wait for the next one, which is no failure."""
    inbox, waiting, since = lineage / "inbox", len(names), time.monotonic()
    while left := sum((inbox / f"{name}.json").exists() for name in names):
        watch = watch_now()
        if not watch.takes_requests(lineage.name):
            nobody = watch.over(lineage.name)
            say(f"No daemon is running: the next one puts {left} results into the journal.", quiet)
            say(f"  {nobody.why}\n  next: {nobody.next}", quiet)
            return None
        if left < waiting:
            waiting, since = left, time.monotonic()
        if time.monotonic() - since > _PATIENCE:
            why = f"the daemon has taken none of {left} results for {_PATIENCE:.0f} s; they wait in {inbox}"
            return Unavailable(why, "opt-ops daemon status")
        time.sleep(0.1)
    return _refusal(lineage, set(names))


def _refusal(lineage: Path, names: set[str]) -> OptOpsError | None:
    refused = [
        entry.event
        for entry in lineages.entries(lineage)
        if isinstance(entry.event, RequestRefused) and entry.event.request in names
    ]
    if refused:
        return OptOpsError(f"the daemon refused {len(refused)} results: {refused[0].why}", "opt-ops events -n 20")
    return None
