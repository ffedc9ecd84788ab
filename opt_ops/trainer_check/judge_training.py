"""Promises that losses witness: resumes, learning-rate factors, skip windows, another number of ranks."""

from __future__ import annotations

import math

from opt_ops.contract.exit_codes import ExitCode
from opt_ops.core.schedule import batch_of
from opt_ops.trainer_check.comparing import compared, differ, first_difference, pair
from opt_ops.trainer_check.findings import Finding, broken, kept, on_ranks, unknown
from opt_ops.trainer_check.records import Ran
from opt_ops.trainer_check.seen import EARLY, FACTOR, FROZEN, LAST, Seen, as_skips, late_windows

_OTHER_LAYOUT = 1e-5
_TOLD = 1e-9
_FROZEN_NEAR = 1e-7  # what remains of weights that move by 1e-9 of their usual updates
_NO_SAVE = "there is no committed checkpoint to resume from"


def resume_step(seen: Seen, _: float) -> Finding:
    """The first update after `--resume step-C` is C + 1."""
    judged: list[str] = []
    for world in seen.ranks:
        ran, middle = seen.runs.get(f"resume_{world}"), seen.middle_of(world)
        if ran is None:
            continue
        if not ran.telemetry.steps:
            return broken(f"{on_ranks(world)}: --resume of step {middle} made no update: {ran.how()}")
        if (first := ran.telemetry.steps[0]) != middle + 1:
            return broken(
                f"{on_ranks(world)}: the first update after --resume of step {middle} is {first}, not {middle + 1}"
            )
        judged.append(f"{middle + 1} after step {middle} on {on_ranks(world)}")
    return kept(f"the first update is {', '.join(judged)}") if judged else unknown(_NO_SAVE)


def resume_data(seen: Seen, tolerance: float) -> Finding:
    """Losses and data position after a resume are those of the attempt without interruption."""
    total, found = 0, 0
    for world in seen.ranks:
        ran, base = seen.runs.get(f"resume_{world}"), seen.base(world)
        if ran is None or base is None:
            continue
        found += 1
        middle, shift = seen.middle_of(world), _shift(seen, world)
        steps = range(middle + 1, LAST + 1)
        if at := first_difference(ran, base, steps, tolerance, shift=shift):
            return broken(
                f"{on_ranks(world)}: resumed at step {middle}, the loss of update {at} is "
                f"{pair(ran, at + shift, base, at)} without an interruption"
            )
        if at := first_difference(ran, base, steps, 0.0, "data_position", shift=shift):
            told = pair(ran, at + shift, base, at, "data_position")
            return broken(f"{on_ranks(world)}: resumed at step {middle}, `data_position` of update {at} is {told}")
        total += compared(ran, base, steps, shift=shift)
    if not found:
        return unknown(_NO_SAVE)
    return kept(f"{total} losses after a resume are the same") if total else unknown("no loss after a resume was told")


def _shift(seen: Seen, world: int) -> int:
    """How far a resumed attempt counts its steps away from what they are: `resume_step` judges that."""
    ran = seen.runs.get(f"resume_{world}")
    steps = ran.telemetry.steps if ran else []
    shift = steps[0] - (seen.middle_of(world) + 1) if steps else 0
    return shift if abs(shift) <= 1 else 0


def _resumes_well(seen: Seen, tolerance: float) -> bool:
    """Whether a resume on the most ranks, without anything else, is right. If not, other resumes differ as well."""
    world = seen.most
    ran, base = seen.runs.get(f"resume_{world}"), seen.base(world)
    if ran is None or base is None or _shift(seen, world):
        return False
    steps = range(seen.middle_of(world) + 1, LAST + 1)
    told = first_difference(ran, base, steps, 0.0, "data_position")
    return bool(compared(ran, base, steps)) and told is None and first_difference(ran, base, steps, tolerance) is None


def lr_factor(seen: Seen, tolerance: float) -> Finding:
    """`--lr-factor S:0.5` is in force from update S + 1; losses differ from update S + 2 on, and not before."""
    base, ran, after = seen.base(seen.most), seen.runs.get("lr_factor"), seen.middle_of(seen.most)
    if base is None or ran is None or len(ran.telemetry.steps) < after:
        return _not_trained("lr_factor", ran)
    if (why := _not_repeatable(seen, tolerance)) is not None:
        return unknown(why)
    if at := first_difference(ran, base, range(1, after + 2), tolerance):
        return broken(
            f"--lr-factor {after}:{FACTOR} changed the loss of update {at}: {pair(ran, at, base, at)}; "
            f"the first update with it is {after + 1}, so the first other loss is that of update {after + 2}"
        )
    if told := _told_factor(ran, base, after):
        return broken(told)
    late = [at for at in range(after + 2, LAST + 1) if differ(ran, at, base, at, tolerance) is not None]
    first = next((at for at in late if differ(ran, at, base, at, tolerance)), None)
    if first is None:
        if tolerance:
            return unknown(
                f"with --lr-factor {after}:{FACTOR} no loss differs by more than the tolerance {tolerance:g}"
            )
        return broken(f"with --lr-factor {after}:{FACTOR} every loss is the same as without it: it was not used")
    if first != late[0] and not tolerance:
        return broken(f"with --lr-factor {after}:{FACTOR} losses differ from update {first} on, not from {late[0]}")
    return kept(f"--lr-factor {after}:{FACTOR}: learning rate half from update {after + 1}, losses differ from {first}")


def _told_factor(ran: Ran, base: Ran, after: int) -> str:
    """Where telemetry tells another learning rate than that of the attempt without a factor, times the factor."""
    for step in range(1, LAST + 1):
        lr, plain = ran.telemetry.all(step, "lr"), base.telemetry.all(step, "lr")
        due = [each * (FACTOR if step > after else 1.0) for each in plain]
        if lr and due and not any(math.isclose(a, b, rel_tol=_TOLD) for a in lr for b in due):
            return (
                f"--lr-factor {after}:{FACTOR}: telemetry says learning rate {lr[0]!r} at update {step}, not {due[0]!r}"
            )
    return ""


def _not_repeatable(seen: Seen, tolerance: float) -> str | None:
    """Why attempts cannot be compared: the very first loss is not the same in each."""
    base, world = seen.base(seen.most), seen.most
    for name in ("lr_factor", "skip_batches"):
        ran = seen.runs.get(name)
        if base is not None and ran is not None and differ(ran, 1, base, 1, tolerance):
            told = pair(ran, 1, base, 1)
            return f"two attempts from scratch on {on_ranks(world)} differ in the first loss ({told}): see --tolerance"
    return None


def lr_restored(seen: Seen, tolerance: float) -> Finding:
    """After a resume with a new factor, no learning rate that was saved wins."""
    world, after = seen.most, seen.middle_of(seen.most)
    ran, plain = seen.runs.get("lr_factor_resume"), seen.runs.get(f"resume_{world}")
    scratch, base = seen.runs.get("lr_factor"), seen.base(world)
    if base is None or ran is None or plain is None or scratch is None:
        return unknown(_NO_SAVE)
    if not ran.telemetry.steps or not plain.telemetry.steps:
        return _not_trained("lr_factor_resume", ran if not ran.telemetry.steps else plain)
    what = f"resumed at step {after} with --lr-factor {after}:{FACTOR}"
    steps = range(after + 1, LAST + 1)
    # Where the factor itself is wrong before the checkpoint, the attempt from scratch is no reference.
    comparable = first_difference(scratch, base, range(1, after + 2), tolerance) is None
    if not _shift(seen, world) and (at := first_difference(ran, scratch, steps, _TOLD * 1e-3, "lr")):
        told = pair(ran, at, scratch, at, "lr")
        return broken(f"{what}: telemetry says that the learning rate of update {at} is {told} from scratch")
    factor_works = first_difference(scratch, base, steps, tolerance) is not None
    if comparable and _resumes_well(seen, tolerance):
        if at := first_difference(ran, scratch, steps, tolerance):
            return broken(
                f"{what}: the loss of update {at} is {pair(ran, at, scratch, at)} from scratch with this factor"
            )
        return kept(f"{what}: {compared(ran, scratch, steps)} losses are those from scratch with this factor")
    # The resume or the factor itself is not right: another promise. It must still change what is trained.
    shift = _shift(seen, world)
    changed = first_difference(ran, plain, [at + shift for at in steps], tolerance) is not None
    if factor_works and not changed:
        return broken(f"{what}: every loss is that of a resume without it: the learning rate that was saved won")
    return (
        kept(f"{what}: losses differ from those of a resume without it")
        if changed
        else unknown("the factor has no effect")
    )


def skip_batches(seen: Seen, tolerance: float) -> Finding:
    """Overlapping windows, from scratch and across a resume."""
    world = seen.most
    base, ran, middle = seen.base(world), seen.runs.get("skip_batches"), seen.middle_of(world)
    if base is None or ran is None or len(ran.telemetry.steps) < EARLY[0][0]:
        return _not_trained("skip_batches", ran)
    if (why := _not_repeatable(seen, tolerance)) is not None:
        return unknown(why)
    windows = (*EARLY, *late_windows(middle))
    first = EARLY[0][0]
    if at := first_difference(ran, base, range(1, first), tolerance):
        return broken(f"windows from batch {first} on changed the loss of update {at}: {pair(ran, at, base, at)}")
    if differ(ran, first, base, first, tolerance) is False:
        return broken(
            f"the loss of update {first}, the first after a window, is that without windows: they are not used"
        )
    if told := _told_position(ran, base, windows, range(1, LAST + 1)):
        return broken(told)
    if other := _other_batch(seen, windows, tolerance):
        return broken(other)
    resumed = seen.runs.get("skip_batches_resume")
    if resumed is None or not resumed.telemetry.steps:
        return kept(f"from scratch with windows {_words(windows)}; no resume could be judged")
    steps = range(middle + 1, LAST + 1)
    if not _resumes_well(seen, tolerance):
        return kept(f"windows {_words(windows)} from scratch; not judged across a resume, since any resume differs")
    if told := _told_position(resumed, base, windows, steps):
        return broken(f"resumed at step {middle}: {told}")
    if at := first_difference(resumed, ran, steps, tolerance):
        return broken(
            f"resumed at step {middle}, with the same windows {_words(windows)} given without overlap, "
            f"the loss of update {at} is {pair(resumed, at, ran, at)} in one attempt"
        )
    return kept(
        f"windows {_words(windows)}: `data_position` and losses are right, also across a resume at step {middle}"
    )


def _told_position(ran: Ran, base: Ran, windows: tuple[tuple[int, int], ...], steps: range) -> str:
    batch = base.telemetry.one(1, "data_position")
    for step in steps:
        told = ran.telemetry.all(step, "data_position")
        due = batch_of(step, as_skips(*windows))
        if batch and told and not any(each == due * batch for each in told):
            return (
                f"windows {_words(windows)}: `data_position` of update {step} is {told[0]:.0f}, not {due * batch:.0f}"
            )
    return ""


def _other_batch(seen: Seen, windows: tuple[tuple[int, int], ...], tolerance: float) -> str:
    """What was trained in place of the batch that is due, while the weights stay what they are.

    Then a loss tells its batch. Only a loss that is the one of a wrong batch proves anything: with dropout, or where
    the factor is not used, it is that of none.
    """
    plain, ran, base = seen.runs.get("frozen"), seen.runs.get("frozen_windows"), seen.base(seen.most)
    if plain is None or ran is None or base is None:
        return ""
    near = max(tolerance, _FROZEN_NEAR)
    if differ(plain, LAST, base, LAST, near) is False:
        return ""  # the factor has no effect
    for step in range(windows[0][0], LAST + 1):
        due = batch_of(step, as_skips(*windows))
        if due > LAST or differ(ran, step, plain, due, near) is not True:
            continue
        found = next((batch for batch in plain.telemetry.steps if differ(ran, step, plain, batch, near) is False), None)
        if found is not None:
            return (
                f"windows {_words(windows)}, with --lr-factor 0:{FROZEN:g} so that a loss tells its batch: "
                f"update {step} has the loss of batch {found}, not of batch {due}"
            )
    return ""


def _words(windows: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{first}:{last}" for first, last in windows)


def save_on_request(seen: Seen, tolerance: float) -> Finding:
    """What was seen when saves were asked for, and what a resume of the last of them trains."""
    finding = seen.acts.get("save_on_request", unknown("no attempt was made"))
    asked, resumed = seen.runs.get("asked"), seen.runs.get("asked_resume")
    if not finding.ok or asked is None or resumed is None or not _resumes_well(seen, tolerance):
        return finding
    if not resumed.telemetry.steps:
        return broken(f"a checkpoint that was asked for cannot be resumed: {resumed.how()}")
    if at := first_difference(resumed, asked, resumed.telemetry.steps, tolerance):
        return broken(
            f"resumed from a checkpoint that was asked for, the loss of update {at} is {pair(resumed, at, asked, at)} "
            "in the attempt that saved it: it does not hold the state of one step"
        )
    return finding


def layout(seen: Seen, tolerance: float) -> Finding:
    """Saved on the most ranks, resumed on the fewest: losses stay within 1e-5."""
    most, least, ran = seen.most, seen.least, seen.runs.get("layout")
    base, middle = seen.base(most), seen.middle_of(most)
    if most == least:
        return unknown("needs two numbers of ranks: --ranks 1,2")
    if base is None or ran is None:
        return unknown(_NO_SAVE)
    what = f"saved on {most} ranks, resumed on {least}"
    same = seen.runs.get(f"resume_{most}")
    if not ran.telemetry.steps:
        if same is not None and not same.telemetry.steps:
            return unknown(f"{what}: no resume works")
        if set(ran.codes) == {ExitCode.USER_ERROR}:
            return unknown(f"{what}: refused with 78, which is allowed")
        return broken(f"{what}: no update: {ran.how()}")
    # Compared with a resume on the ranks that saved: a resume that is wrong in itself is another promise.
    reference = same if same is not None and same.telemetry.steps else base
    first = reference.telemetry.steps[0] if reference is same else middle + 1
    shift = ran.telemetry.steps[0] - first
    shift = shift if abs(shift) <= 1 else 0
    steps = range(first, LAST + 1)
    if at := first_difference(ran, reference, steps, max(tolerance, _OTHER_LAYOUT), shift=shift):
        return broken(f"{what}: the loss of update {at} is {pair(ran, at + shift, reference, at)}")
    number = compared(ran, reference, steps, shift=shift)
    return (
        kept(f"{what}: {number} losses within {_OTHER_LAYOUT:g}") if number else unknown(f"{what}: no loss to compare")
    )


def _not_trained(name: str, ran: Ran | None) -> Finding:
    return unknown(
        "the attempt for it was not made" if ran is None else f"the attempt {name} did not train: {ran.how()}"
    )
