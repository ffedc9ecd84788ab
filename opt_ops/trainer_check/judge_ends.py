"""Promises about how an attempt begins and ends: refusals, exit codes, losses that are not finite, the last step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from opt_ops.contract.exit_codes import ExitCode
from opt_ops.trainer_check.comparing import first_difference
from opt_ops.trainer_check.damage import TORN
from opt_ops.trainer_check.findings import Finding, broken, kept, on_ranks, unknown
from opt_ops.trainer_check.records import Ran, ended
from opt_ops.trainer_check.seen import LAST, NAN_AT, UNKNOWN_SETTING, Seen
from opt_ops.trainer_check.slow_motion import younger

_REFUSED = (ExitCode.CHECKPOINT_REFUSED,)
_USER = (ExitCode.USER_ERROR,)
_NO_SAVE = "there is no committed checkpoint to damage"
_FINITE_BELOW = 1e6


def refusal(ran: Ran, what: str, codes: Iterable[int]) -> str:
    """What is wrong with an attempt that should have been refused. Empty if it was."""
    wanted = " or ".join(str(int(code)) for code in codes)
    if ran.telemetry.steps:
        return f"{what}: it trained update {ran.telemetry.steps[0]} in place of leaving with {wanted}"
    if ran.trouble or not set(ran.codes) <= set(codes):
        return f"{what}: {ran.how()}; expected exit code {wanted}"
    return ""


def _refusals(seen: Seen, cases: Mapping[str, tuple[str, tuple[int, ...]]], missing: str) -> Finding:
    """Judge several refusals: by the attempt's name what was wrong, and the codes that are right."""
    judged: list[str] = []
    for name, (what, codes) in cases.items():
        ran = seen.runs.get(name)
        if ran is None:
            continue
        if why := refusal(ran, what, codes):
            return broken(why)
        judged.append(f"{what}: {ended(ran.codes)}")
    return kept("; ".join(judged)) if judged else unknown(missing)


def never_starts_over(seen: Seen, _: float) -> Finding:
    """With a committed checkpoint, neither `--resume` nor `--from-scratch` is refused."""
    what = "a committed checkpoint, and neither --resume nor --from-scratch"
    return _refusals(seen, {"starts_over": (what, (*_REFUSED, *_USER))}, _NO_SAVE)


def refuses_torn(seen: Seen, _: float) -> Finding:
    """A checkpoint without marker, with a file cut, or without a file, is refused."""
    cases = {f"torn_{number}": (what, _REFUSED) for number, what in enumerate(TORN)}
    return _refusals(seen, cases, _NO_SAVE)


def refuses_flipped(seen: Seen, _: float) -> Finding:
    """A checkpoint with one other byte is refused."""
    return _refusals(seen, {"flipped": ("one byte of the largest file changed", _REFUSED)}, _NO_SAVE)


def refuses_stale(seen: Seen, _: float) -> Finding:
    """A checkpoint with the state of the save before is refused."""
    return _refusals(
        seen,
        {"stale": ("the state of the save before under a valid manifest", _REFUSED)},
        "there are no two checkpoints",
    )


def exit_codes(seen: Seen, _: float) -> Finding:
    """The user's mistakes end with 78, a checkpoint that is not there with 65."""
    cases = {
        "unknown_setting": (f"--set {UNKNOWN_SETTING}", _USER),
        "no_run_dir": ("no --run-dir", _USER),
        "no_checkpoint": ("--resume of nothing", _REFUSED),
    }
    return _refusals(seen, cases, "no attempt was made")


def ends_at_last_step(seen: Seen, _: float) -> Finding:
    """The last step is saved and the exit code is 0. A resume of it exits with 0 at once."""
    for world in seen.ranks:
        ran, again = seen.base(world), seen.runs.get(f"resume_last_{world}")
        if ran is None:
            continue
        if not ran.done:
            return broken(
                f"{on_ranks(world)}, steps={LAST}: {ran.how()}, last update {max(ran.telemetry.steps, default=0)}"
            )
        if LAST not in dict(ran.saved):
            saved = ", ".join(str(step) for step, _ in ran.saved) or "none"
            return broken(f"{on_ranks(world)}: the last step, {LAST}, was not saved; saved: {saved}")
        if ran.telemetry.steps and max(ran.telemetry.steps) != LAST:
            return broken(f"{on_ranks(world)}: the last update is {max(ran.telemetry.steps)}, not {LAST}")
        if again is None:
            continue
        if again.telemetry.steps:
            return broken(f"{on_ranks(world)}: --resume of the last step made update {again.telemetry.steps[0]}")
        if not again.done:
            return broken(f"{on_ranks(world)}: --resume of the last step did not end with 0 at once: {again.how()}")
    return kept(f"step {LAST} was saved, exit code 0; --resume of it ended with 0 at once")


def marker_last(seen: Seen, _: float) -> Finding:
    """No file of a checkpoint is younger than its marker, and no marker is there before the checkpoint is whole."""
    watched = seen.acts.get("marker_last", unknown("no attempt was made"))
    if watched.ok is False:
        return watched
    saved = [path for world in seen.ranks if (base := seen.base(world)) for _, path in base.saved]
    if why := younger(saved):
        return broken(why)
    return watched


def non_finite(seen: Seen, tolerance: float) -> Finding:
    """A loss that is not finite: a line that says so, all ranks leave with 82, and nothing of that step is saved."""
    ran = seen.runs.get("nan")
    if ran is None:
        return unknown("no attempt was made")
    if drill_was_read(seen, ran):
        return _left_rightly(ran, f"drill `nan` from step {NAN_AT}")
    huge = seen.runs.get("huge_lr")
    if huge is None:
        return unknown("no attempt was made")
    return _after_huge_lr(seen, huge, tolerance)


def drill_was_read(seen: Seen, ran: Ran) -> bool:
    """Whether the drill `nan` had any effect: another loss or end than in the attempt without it, from its step on."""
    base = seen.base(seen.most)
    last = max(ran.telemetry.steps, default=0)
    if base is None or last < NAN_AT - 1:
        return False  # it did not even come to the step: the drill's kind may be unknown to it
    if set(ran.codes) == {ExitCode.USER_ERROR}:
        return False
    same = first_difference(ran, base, range(NAN_AT, LAST + 1), 1e-6) is None
    missing = any(not ran.telemetry.all(step, "loss") for step in range(NAN_AT, LAST + 1))
    return not (ran.done and same and not missing)


def _left_rightly(ran: Ran, what: str) -> Finding:
    at = next(
        (step for step, lines in ran.telemetry.by_step.items() if any(_is_not_finite(each) for each in lines)), None
    )
    if at is None:
        last = max(ran.telemetry.steps, default=0)
        return broken(f"{what}: no line of telemetry has `finite: false`; last update {last}, {ran.how()}")
    line = next(each for each in ran.telemetry.by_step[at] if _is_not_finite(each))
    if line.get("finite") is not False or line.get("loss", 0) is not None:
        told = f"`finite` is {line.get('finite')!r}, `loss` is {line.get('loss')!r}"
        return broken(f"{what}: at update {at} {told}; they must be false and null")
    if any(code != ExitCode.NOT_FINITE for code in ran.codes):
        return broken(f"{what}: after update {at} not all ranks left with 82: {ran.how()}")
    if late := [step for step, _ in ran.saved if step >= at]:
        return broken(f"{what}: the loss of update {at} was not finite, and step {late[0]} was committed")
    return kept(f"{what}: update {at} has `finite: false`, all ranks left with 82, nothing later was committed")


def _is_not_finite(line: object) -> bool:
    fields = line if isinstance(line, dict) else {}
    loss = fields.get("loss", 0)
    return fields.get("finite") is False or loss is None or str(loss).lower() in ("nan", "inf", "-inf")


def _after_huge_lr(seen: Seen, ran: Ran, tolerance: float) -> Finding:
    """The drill `nan` is not read. A huge learning rate makes the loss not finite in most trainers."""
    what = f"drill `lr` × 1e30 from step {NAN_AT} (`nan` is not read)"
    base = seen.base(seen.most)
    steps = range(NAN_AT, LAST + 1)
    if base is None or not ran.telemetry.steps:
        return unknown(f"{what}: no update: {ran.how()}")
    told = first_difference(ran, base, steps, 1e-6, "lr") is not None
    trained = first_difference(ran, base, steps, max(tolerance, 1e-6)) is not None
    missing = any(_is_not_finite(line) for lines in ran.telemetry.by_step.values() for line in lines)
    if not (told or trained or missing or not ran.done):
        return unknown("neither the drill `nan` nor the drill `lr` is read: no loss can be made not finite")
    largest = max((abs(loss) for step in steps for loss in ran.telemetry.all(step, "loss")), default=0.0)
    if ran.done and not missing and largest > _FINITE_BELOW:
        return unknown(f"{what}: the loss stayed finite, up to {largest:.3g}")
    return _left_rightly(ran, what)
