"""The promises of a trainer, in the order in which they are printed, and who judges each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from opt_ops.trainer_check import judge_ends, judge_files, judge_training
from opt_ops.trainer_check.findings import Finding, unknown
from opt_ops.trainer_check.seen import Seen

Judge = Callable[[Seen, float], Finding]


def _act(name: str) -> Judge:
    """A promise that was judged while the trainer ran."""
    return lambda seen, _: seen.acts.get(name, unknown("no attempt was made"))


PROMISES: Mapping[str, Judge] = {
    "config": judge_files.config,
    "telemetry": judge_files.telemetry,
    "phases": judge_files.phases,
    "schedule": judge_files.schedule,
    "resume_step": judge_training.resume_step,
    "resume_data": judge_training.resume_data,
    "never_starts_over": judge_ends.never_starts_over,
    "lr_factor": judge_training.lr_factor,
    "lr_restored": judge_training.lr_restored,
    "skip_batches": judge_training.skip_batches,
    "fence": _act("fence"),
    "save_on_request": judge_training.save_on_request,
    "stacks": _act("stacks"),
    "sigterm": _act("sigterm"),
    "sigint": _act("sigint"),
    "non_finite": judge_ends.non_finite,
    "marker_last": judge_ends.marker_last,
    "refuses_torn": judge_ends.refuses_torn,
    "refuses_flipped": judge_ends.refuses_flipped,
    "refuses_stale": judge_ends.refuses_stale,
    "ends_at_last_step": judge_ends.ends_at_last_step,
    "exit_codes": judge_ends.exit_codes,
    "layout": judge_training.layout,
}


def judge_all(seen: Seen, tolerance: float) -> dict[str, Finding]:
    """Judge every promise by what was seen."""
    return {name: judge(seen, tolerance) for name, judge in PROMISES.items()}
