"""Which causes are behind trouble with the loss, each with its confidence and the evidence for and against it.

Each piece of evidence moves the weight of some causes: the logarithm of how much likelier it is under that cause than
under others. The weights are set by hand, in four sizes, from what incidents of public chronicles show
(docs/signals.md, "Causes and cures"). Confidence is a cause's share of all weights, beside a cause that nobody thought
of. So weak evidence alone never makes a cause sure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from opt_ops.core.decide.evidence import Board
from opt_ops.core.decide.trouble import Data, about_loss, changes_state, data_of, described, newest_onset, onset_of
from opt_ops.core.events import SignalRaised
from opt_ops.core.failures.causes import Cause, Suspicion
from opt_ops.core.failures.classes import AlertSignal, FailureClass
from opt_ops.core.state.model import Incident, State
from opt_ops.core.values import Fault, Verdict

_WEAK, _FAIR, _STRONG, _PROOF = 0.75, 1.5, 3.0, 6.0

_AT_ONCE = 0.5  # of the rise in the first point: a jump
_GRADUAL = 0.3  # of the rise in the first point: it grew
_STANDS_OUT = 4.0  # times the noise, or the spread, of the points before
_GREW = (1.25, 4.0)  # ratio and standard errors: a norm has grown before the onset
_RESTORED_STEPS = 20  # after a restore: moments that are not those that were saved take some updates to show
_BLOCK_ALONE = 0.02  # of its norm, at least: what a block of weights changes alone and at once
_PLANNED_STEPS = 64  # after a planned change: what begins here may belong to it


def suspicions(
    state: State, raised: SignalRaised, tries: Sequence[Incident], probes: Mapping[str, bool] | None = None
) -> tuple[Suspicion, ...]:
    """The causes for which there is evidence, the likeliest first.

    Args:
        state: The lineage.
        raised: The finding.
        tries: What was tried before for the same trouble.
        probes: What short runs from before the onset showed: whether the loss spiked with `same_data`, with
            `other_data`, with a `lower_lr`.
    """
    if not about_loss(raised.signal) and raised.signal != FailureClass.UNDECLARED_CHANGE:
        return ()
    board, onset = Board(), raised.onset or newest_onset(state, raised.attempt, raised.step)
    _signal(board, raised)
    _restore(board, onset)
    _learning_rate(board, onset)
    _shape(board, onset)
    _growth(board, onset, state, raised)
    _optimizer(board, onset)
    _loss_scale(board, onset)
    _weights(board, onset, state, raised)
    _changes(board, onset)
    _history(board, onset, state, tries)
    _probes(board, probes or {})
    return board.suspicions()


def of_drill(state: State, drill: str) -> tuple[Suspicion, ...]:
    """The cause that a drill rehearses; it is known."""
    known = {Fault.LR: Cause.UNPLANNED_LR, Fault.FLIP_BIT: Cause.CORRUPTED_WEIGHTS}
    fault = state.drills[drill].fault
    if fault not in known:
        return ()
    return (Suspicion(cause=known[fault], confidence=1.0, evidence_for=(f"the drill {drill} injected {fault}",)),)


def _signal(board: Board, raised: SignalRaised) -> None:
    """What the detector says by itself."""
    match raised.signal:
        case FailureClass.BAD_RESTORE:
            board.add(Cause.BAD_RESTORE, _STRONG + _FAIR, f"{raised.rule}, at step {raised.step}")
        case FailureClass.UNPLANNED_LR:
            board.add(Cause.UNPLANNED_LR, _PROOF, f"{raised.rule}, at step {raised.step}")
        case FailureClass.UNDECLARED_CHANGE:
            board.add(Cause.PLANNED_CHANGE, _STRONG, f"{raised.rule}, at step {raised.step}")
        case FailureClass.LOSS_SCALE_FLOOR:
            board.add(Cause.FP16_SCALE, _STRONG, f"the loss scale no longer recovers at step {raised.step}")
        case FailureClass.SILENT_DATA_CORRUPTION:
            board.add(Cause.CORRUPTED_WEIGHTS, _PROOF, "checksums of what ranks must hold alike differ")
        case FailureClass.LOSS_TOO_LOW:
            board.add(Cause.BAD_DATA, _FAIR, "the loss fell at once: data that was seen before, or that is too easy")
        case _:
            pass


def _restore(board: Board, onset: Mapping[str, Any]) -> None:
    place = onset.get("attempt")
    if place is None:
        return
    if "restored_from" not in place:
        board.add(Cause.BAD_RESTORE, -_PROOF, "the attempt began from scratch")
        return
    start, steps_in, due = place["restored_from"], place["steps_in"], place.get("due")
    if due is not None:
        z = due["apart"] / (max(due["noise"], 1e-9) * math.sqrt(2 / due["points"]))
        far = f"the first {due['points']} steps after the restore are {due['apart']:+.3f} from the loss that was due"
        noisy = f"{far} (noise {due['noise']:.3f})"
        board.add_if(z >= 2 * _STANDS_OUT, Cause.BAD_RESTORE, _STRONG, noisy)
        board.add_if(abs(z) < _STANDS_OUT and due["points"] >= 4, Cause.BAD_RESTORE, -_STRONG, noisy)
    where = f"it began {steps_in} steps after the attempt's first one, which was restored from step {start}"
    if steps_in <= 1:
        board.add(Cause.BAD_RESTORE, _FAIR + _WEAK, where)
        for cause in (Cause.CORRUPTED_WEIGHTS, Cause.BAD_DATA):
            board.add(cause, -_FAIR, where)
    else:
        board.add(Cause.BAD_RESTORE, _FAIR if steps_in <= _RESTORED_STEPS else -_STRONG, where)


def _learning_rate(board: Board, onset: Mapping[str, Any]) -> None:
    lr = onset.get("lr")
    if lr is None:
        return
    if "off_since" in lr:
        ratio = lr["value"] / lr["expected"] if lr["expected"] else 0.0
        why = (
            f"lr {lr['value']:.4g} since step {lr['off_since']}, the schedule says {lr['expected']:.4g} (× {ratio:.3g})"
        )
        board.add(Cause.UNPLANNED_LR, _PROOF, why)
    elif "expected" in lr:
        board.add(Cause.UNPLANNED_LR, -_PROOF, f"lr {lr['value']:.4g} is that of the schedule")
    elif not 1 / 1.5 < lr.get("step", 1.0) < 1.5:
        why = f"lr × {lr['step']:.3g} from one line to the next; the schedule is not known"
        board.add(Cause.UNPLANNED_LR, _FAIR, why)
        board.add_if(lr["step"] < 1, Cause.PLANNED_CHANGE, _FAIR, why)


def _shape(board: Board, onset: Mapping[str, Any]) -> None:
    """Whether it came at once, with the gradient norm of the same batch, or grew."""
    loss, gnorm = onset.get("loss", {}), onset.get("gnorm", {})
    if not loss.get("finite", True) and "before" in loss:
        board.add(Cause.BAD_DATA, _WEAK, f"not finite at once, from a loss of {loss['before']:.3f}")
    if "at_once" in loss:
        share, jump = loss["at_once"], (loss["first"] - loss["before"]) / max(loss["noise"], 1e-9)
        why = f"{min(max(share, 0.0), 1.0):.0%} of the rise in its first step ({jump:.0f} times the noise)"
        if share >= _AT_ONCE and jump >= _STANDS_OUT:
            board.add(Cause.BAD_DATA, _FAIR, why)
            board.add(Cause.CORRUPTED_WEIGHTS, _WEAK, why)
            board.add(Cause.LR_TOO_HIGH, -_FAIR, why)
        elif share < _GRADUAL:
            board.add(Cause.LR_TOO_HIGH, _FAIR, why)
            board.add(Cause.BETA2, _WEAK, why)
            for cause in (Cause.BAD_DATA, Cause.CORRUPTED_WEIGHTS, Cause.PLANNED_CHANGE):
                board.add(cause, -_FAIR, why)
        board.add_if(loss["returned"] >= 0.9, Cause.NONE, _FAIR, f"{loss['returned']:.0%} of the rise has healed")
    if "first" in gnorm:
        _gradient(board, gnorm, loss.get("at_once", 0.0) >= _AT_ONCE)


def _gradient(board: Board, gnorm: Mapping[str, Any], at_once: bool) -> None:
    far = max(_STANDS_OUT * gnorm["spread"], math.log(1.5))
    why = f"gradient norm × {gnorm['first']:.2f} in the same step, from {gnorm['before']:.3g}"
    if math.log(gnorm["first"]) >= far:
        board.add_if(at_once, Cause.BAD_DATA, _FAIR, why)
        board.add(Cause.PLANNED_CHANGE, -_FAIR, why)
    elif math.log(gnorm.get("top", gnorm["first"])) < far:
        board.add_if(at_once, Cause.PLANNED_CHANGE, _FAIR, f"the gradient norm stays usual, × {gnorm['top']:.2f}")
        board.add_if(at_once, Cause.BAD_DATA, -_FAIR, f"the gradient norm stays usual, × {gnorm['top']:.2f}")
    if math.log(gnorm.get("lead", 1.0)) >= max(_STANDS_OUT * gnorm["spread"] / 2, math.log(1.3)):
        why = f"gradient norm × {gnorm['lead']:.2f} in the lines before the onset"
        board.add(Cause.LR_TOO_HIGH, _WEAK, why)
        board.add(Cause.BAD_DATA, -_FAIR, why)


def _growth(board: Board, onset: Mapping[str, Any], state: State, raised: SignalRaised) -> None:
    """Norms that grow for hundreds of steps before: the edge of stability."""
    growth = onset.get("growth", {})
    grown = {name: each for name, each in growth.items() if name != "steps" and _has_grown(each)}
    for number, (name, each) in enumerate(grown.items()):
        why = f"{name} × {each['ratio']:.2f} before the onset ({each['errors']:.0f} standard errors)"
        board.add(Cause.LR_TOO_HIGH, _WEAK if number else _FAIR, why)
        board.add_if(not number, Cause.BAD_DATA, -_WEAK, why)
    if growth and not grown:
        span = growth["steps"]
        why = f"no norm grew in steps {span['first']} to {span['last']}"
        board.add(Cause.LR_TOO_HIGH, -_WEAK, why)
    begun = onset.get("step", raised.onset_step)
    for each in state.signals.values():
        if each.attempt != raised.attempt or each.step is None or begun is None or each.step >= begun:
            continue
        why = f"the alert {each.signal} at step {each.step}, before the loss"
        if each.signal == AlertSignal.ACTIVATION_NORM:
            board.add(Cause.LR_TOO_HIGH, _WEAK, why)
        elif each.signal == AlertSignal.UPDATE_NORM:
            board.add(Cause.BETA2, _WEAK, why)
            board.add(Cause.LR_TOO_HIGH, _WEAK, why)


def _has_grown(each: Mapping[str, Any]) -> bool:
    return each["ratio"] >= _GREW[0] and each["errors"] >= _GREW[1]


def _optimizer(board: Board, onset: Mapping[str, Any]) -> None:
    used = onset.get("optimizer")
    if used is None:
        return
    if "asked_betas" in used:
        board.add(
            Cause.BETA2, _PROOF, f"the optimizer uses betas {used['betas']}, asked for were {used['asked_betas']}"
        )
    beta2 = used["betas"][1] if len(used["betas"]) > 1 else None
    if beta2 is not None and beta2 >= 0.99:
        steps = 1 / max(1 - beta2, 1e-9)
        board.add(
            Cause.BETA2,
            _STRONG if beta2 >= 0.999 else _FAIR,
            f"beta2 {beta2:g}: the second moment lags by {steps:.0f} steps",
        )
    elif beta2 is not None:
        board.add(Cause.BETA2, -_WEAK, f"beta2 {beta2:g} follows within {1 / max(1 - beta2, 1e-9):.0f} steps")
    update, gnorm = onset.get("blocks", {}).get("unorm"), onset.get("gnorm", {})
    if update is not None and update["ratio"] is not None and update["ratio"] >= 2 and "lead" in gnorm:
        why = f"update norm of {update['block']} × {update['ratio']:.2f}, gradient norm × {gnorm['lead']:.2f} before it"
        board.add_if(gnorm["lead"] < 1.5, Cause.BETA2, _FAIR, why)


def _loss_scale(board: Board, onset: Mapping[str, Any]) -> None:
    scale = onset.get("loss_scale")
    if scale is None:
        return
    why = f"{scale['overflows']} overflows in {scale['lines']} lines; scale {scale['last']:g}, was {scale['highest']:g}"
    collapsed = scale["last"] * 64 <= scale["highest"] and scale["lines_since_rise"] >= 10
    board.add_if(scale["overflows"] >= 8 or collapsed, Cause.FP16_SCALE, _STRONG, why)
    board.add_if(scale["overflows"] == 0 and not collapsed, Cause.FP16_SCALE, -_STRONG, why)


def _weights(board: Board, onset: Mapping[str, Any], state: State, raised: SignalRaised) -> None:
    """A block that changes alone, and nodes that something else speaks against."""
    blocks = onset.get("blocks", {})
    if (odd := blocks.get("pnorm")) is not None:
        change = math.inf if odd["ratio"] is None else abs(math.log(odd["ratio"]))
        alone = change >= max(3 * math.log(odd["others"]), 3 * math.log(odd["usual"]), _BLOCK_ALONE)
        size = "is no number any more" if odd["ratio"] is None else f"× {odd['ratio']:.3f}"
        why = f"norm of the weights of {odd['block']} {size}, of the other blocks × {odd['others']:.3f}"
        board.add(Cause.CORRUPTED_WEIGHTS, _STRONG + _FAIR if alone else -_FAIR, why)
        board.add_if(alone, Cause.BAD_DATA, -_FAIR, why)
    if (odd := blocks.get("gnorm")) is not None and odd["ratio"] is not None and odd["ratio"] >= 3:
        change = math.log(odd["ratio"])
        why = f"gradient norm of {odd['block']} × {odd['ratio']:.2f}, of the other blocks × {odd['others']:.2f}"
        alone = change >= 3 * math.log(odd["others"]) and change >= 2 * math.log(odd["usual"])
        board.add_if(alone, Cause.CORRUPTED_WEIGHTS, _WEAK, why)
    attempt = state.attempts.get(raised.attempt)
    for name in attempt.nodes if attempt else ():
        node = state.nodes.get(name)
        if node is not None and node.verdict in (Verdict.SUSPECT, Verdict.BAD):
            board.add(Cause.CORRUPTED_WEIGHTS, _FAIR, f"node {name} is {node.verdict}: {node.reason}")


def _changes(board: Board, onset: Mapping[str, Any]) -> None:
    """What else changed at the line of the onset."""
    changed = onset.get("changed", {})
    for name in ("batch", "batch_tokens"):
        if (change := changed.get(name)) is not None:
            why = f"{name} went from {change['before']} to {change['after']} at step {change['step']}"
            board.add(Cause.BATCH_SIZE, _FAIR if name == "batch" else _WEAK, why)
            board.add_if(name == "batch", Cause.PLANNED_CHANGE, _WEAK, why)
            board.add_if(name == "batch", Cause.BAD_DATA, -_FAIR, why)
            _asked(board, change)
    if "stage" in changed:
        board.add(
            Cause.PLANNED_CHANGE, _STRONG + _WEAK, f"another stage of the data since step {changed['stage']['step']}"
        )
    if "betas" in changed:
        board.add(Cause.BETA2, _STRONG, f"betas became {changed['betas']['after']} at step {changed['betas']['step']}")
    planned, step = onset.get("planned"), onset.get("step")
    if planned is not None and step is not None and step - planned <= _PLANNED_STEPS:
        board.add(Cause.PLANNED_CHANGE, _STRONG + _WEAK, f"a change was planned for step {planned}; it began at {step}")
    elif not changed and "data" in onset:
        board.add(Cause.PLANNED_CHANGE, -_WEAK, "batch, tokens and stage are as before, and nothing was planned")


def _asked(board: Board, batch: Mapping[str, Any]) -> None:
    """Whether the batch is the one that was asked for: then somebody changed it, else nobody did."""
    if "asked" not in batch:
        return
    why, sign = f"the batch has {batch['after']} sequences, asked for are {batch['asked']}", 1
    if batch["after"] == batch["asked"]:
        sign = -1
    board.add(Cause.BATCH_SIZE, sign * _PROOF, why)
    board.add(Cause.PLANNED_CHANGE, -sign * _STRONG, why)


def _history(board: Board, onset: Mapping[str, Any], state: State, tries: Sequence[Incident]) -> None:
    """What came of what was tried before."""
    for tried in tries:
        decision = tried.decision
        if decision is None:
            continue
        data = data_of(onset_of(state, tried), decision, onset)
        where = f" on {data} data" if data is not None else ""
        why = f"{tried.name} tried: {described(decision)}; it came again{where}"
        match data:
            case Data.SAME if changes_state(decision):
                board.add(Cause.BAD_DATA, _STRONG, why)
                board.add(Cause.LR_TOO_HIGH, -_FAIR, why)
            case Data.NEXT:
                board.add(Cause.BAD_DATA, _FAIR, why)
            case Data.OTHER:
                board.add(Cause.LR_TOO_HIGH, _FAIR, why)
                board.add(Cause.BAD_DATA, -_FAIR, why)
            case _:
                pass
        if decision.cause is not None and data is not Data.NEXT:
            board.add(decision.cause, -_STRONG, why)
        elif decision.lr_factor is not None:
            board.add(Cause.LR_TOO_HIGH, -_WEAK, why)


def _probes(board: Board, probes: Mapping[str, bool]) -> None:
    same, other, lower = (probes.get(name) for name in ("same_data", "other_data", "lower_lr"))
    if same and other is False:
        board.add(Cause.BAD_DATA, _STRONG + _WEAK, "a probe with the same data spiked, one with other data did not")
    if same is None and other is False:
        board.add(Cause.BAD_DATA, _FAIR, "a probe with other data did not spike")
    if other:
        board.add(Cause.LR_TOO_HIGH, _STRONG, "a probe with other data spiked, too")
        board.add(Cause.BAD_DATA, -_STRONG, "a probe with other data spiked, too")
    if other and lower is False:
        board.add(Cause.LR_TOO_HIGH, _FAIR, "a probe with a lower learning rate did not spike")
    if same is False:
        board.add(Cause.NONE, _STRONG, "a probe with the same data did not spike")
