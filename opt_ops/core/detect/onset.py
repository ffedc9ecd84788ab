"""What telemetry shows around the onset of trouble with the loss: the digest that causes are distinguished by.

The digest is a small plain object of numbers, which the finding's signal carries in its field `onset`. It says what was
measured and judges nothing; `opt_ops/core/decide/causes.py` does. docs/formats.md lists its keys. A key is absent where
telemetry does not have what it needs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from opt_ops.core.detect.point import Point
from opt_ops.core.values import Optimizer

_BEFORE = 256  # points before the onset that say what is usual
_GAP = 4  # points right before the onset that belong to neither side: the gradient norm often leads
_REACH = 8  # points around the stated onset in which the jump is looked for
_JUMP = 4.0  # times the noise: a step of the loss that is more than its noise
_TREND = 512  # points before the onset in which norms may have grown
_BLOCK_LINES = 8  # lines with norms by block before the onset that say what is usual
_OFF_SCHEDULE = 1e-4  # relative; telemetry may round to five digits
_DUE = 32  # first points of an attempt that are compared with what was due there
_OVERFLOWS = 64  # points in which overflows are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the attempt stands, and what was asked of it.

    Attributes:
        first_step: The first step of the attempt; None: it made none.
        restored_from: The step of the checkpoint that it began from; None: from scratch.
        expected_lr: The learning rate that an update must use; None: the schedule is not known.
        optimizer: The settings that were asked for; None: not known.
        batch: The sequences of a batch that were asked for; None: not known.
        due: The discarded points after the checkpoint, from the attempt before: the loss that they show is due again.
        planned: Steps from which something was planned.
    """

    first_step: int | None = None
    restored_from: int | None = None
    expected_lr: Callable[[int], float | None] | None = None
    optimizer: Optimizer | None = None
    batch: int | None = None
    due: Sequence[Point] = ()
    planned: Sequence[int] = ()


def onset_digest(points: Sequence[Point], onset_step: int, place: Place) -> dict[str, Any]:
    """The digest of an onset.

    Args:
        points: The kept telemetry in step order, up to the newest line.
        onset_step: Where the finding says that it began.
        place: Where the attempt stands.
    """
    if not points:
        return {}
    stated = min(bisect_left(points, onset_step, key=lambda each: each.step), len(points) - 1)
    before = _usual(points[max(0, stated - _BEFORE - _GAP) : max(0, stated - _GAP)])
    at = _jump_at(points, stated, before)
    found: dict[str, Any] = {"step": points[at].step, "points_before": len(before)}
    if at:
        found["interval"] = max(1, points[at].step - points[at - 1].step)
    parts = {
        "loss": _loss(points, at, before),
        "gnorm": _gnorm(points, at, before),
        "lr": _lr(points, at, place),
        "changed": _changed(points, at, place),
        "data": _data(points, at, before),
        "loss_scale": _loss_scale(points, at),
        "blocks": _blocks(points, at),
        "growth": _growth(points, at),
        "optimizer": _optimizer(points[at], place),
        "attempt": _attempt(points, at, place),
    }
    found |= {name: part for name, part in parts.items() if part}
    if planned := [step for step in place.planned if step <= points[at].step]:
        found["planned"] = max(planned)
    return found


def _usual(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.finite and point.loss is not None and point.skip is None]


def _jump_at(points: Sequence[Point], stated: int, before: Sequence[Point]) -> int:
    """Where the loss steps up near the stated onset, which may be some points off; where it does not, the stated one.

    The first point whose step is at least half of the largest one: the points after a jump stand out, too.
    """
    noise = _noise(_losses(before))
    steps: dict[int, float] = {}
    for i in range(max(1, stated - _REACH), min(len(points), stated + _REACH + 1)):
        if points[i].loss is None or not points[i].finite:
            steps[i] = math.inf
            break
        recent = _losses(points[max(0, i - 5) : i])
        steps[i] = (points[i].loss or 0.0) - median(recent) if recent else 0.0
    largest = max(steps.values(), default=0.0)
    if largest <= _JUMP * noise:
        return stated
    return next(i for i, step in steps.items() if step >= largest / 2)


def _losses(points: Sequence[Point]) -> list[float]:
    return [point.loss for point in points if point.loss is not None and point.finite]


def _noise(values: Sequence[float]) -> float:
    """The standard deviation of neighbours' difference by √2, robust: a slope does not count as noise."""
    steps = [abs(later - earlier) for earlier, later in pairwise(values)]
    return 1.4826 * median(steps) / math.sqrt(2) if steps else 0.0


def _loss(points: Sequence[Point], at: int, before: Sequence[Point]) -> dict[str, Any]:
    """The level and noise before, the first point, the highest level since, and how much of the rise came at once.

    `at_once` is the share of the rise that the first point made. `returned` is the share that has healed by now.
    """
    usual, after = _losses(before), _losses(points[at:])
    found: dict[str, Any] = {"finite": points[at].finite and points[at].loss is not None}
    if len(usual) < 3 or not after:
        return found
    level = median(usual[-32:])
    top = max(_smooth(after))
    found |= {"before": level, "noise": _noise(usual), "first": after[0], "top": top, "last": median(after[-5:])}
    if top > level:
        jump = after[0] - median(_losses(points[max(0, at - 5) : at]) or [level])
        found |= {"at_once": jump / (top - level), "returned": (top - found["last"]) / (top - level)}
    return found


def _smooth(values: Sequence[float]) -> list[float]:
    return [median(values[i : i + 3]) for i in range(max(1, len(values) - 2))]


def _gnorm(points: Sequence[Point], at: int, before: Sequence[Point]) -> dict[str, Any]:
    """The gradient norm at the onset, right before it and since, against its usual value and spread (of logarithms)."""
    usual = [math.log(point.gnorm) for point in before if point.gnorm]
    if len(usual) < 3:
        return {}
    level = median(usual)
    spread = 1.4826 * median(abs(each - level) for each in usual)
    found: dict[str, Any] = {"before": math.exp(level), "spread": spread}
    lead = [math.log(each.gnorm) for each in points[max(0, at - _GAP) : at] if each.gnorm]
    since = [math.log(each.gnorm) for each in points[at : at + _REACH] if each.gnorm]
    if lead:
        found["lead"] = math.exp(median(lead) - level)
    if since:
        found |= {"first": math.exp(since[0] - level), "top": math.exp(max(since) - level)}
    return found


def _lr(points: Sequence[Point], at: int, place: Place) -> dict[str, Any]:
    """The learning rate of the onset beside the expected one, and since when the two differ without a break."""
    found: dict[str, Any] = {"value": points[at].lr}
    if at and points[at - 1].lr:
        near = [later.lr / earlier.lr for earlier, later in pairwise(points[max(0, at - _GAP) : at + 2]) if earlier.lr]
        found["step"] = max(near, key=lambda ratio: abs(math.log(ratio)) if ratio > 0 else 0.0, default=1.0)
    if place.expected_lr is None or (planned := place.expected_lr(points[at].step)) is None:
        return found
    found["expected"] = planned
    if since := _off_since(points, at, place.expected_lr):
        found["off_since"] = since
    return found


def _off_since(points: Sequence[Point], at: int, expected: Callable[[int], float | None]) -> int | None:
    """The step since which the learning rate is not the expected one, seen from the onset or a few points later."""
    since = None
    for i in range(min(len(points) - 1, at + _GAP), -1, -1):
        planned = expected(points[i].step)
        if planned is None or math.isclose(points[i].lr, planned, rel_tol=_OFF_SCHEDULE, abs_tol=1e-12):
            if i < at:
                break
        else:
            since = points[i].step
    return since


def _changed(points: Sequence[Point], at: int, place: Place) -> dict[str, Any]:
    """What else changed within a few lines of the onset: the batch, its tokens, the stage, the optimizer's settings.

    Of the batch also the size that was `asked` for, where it is known.
    """
    found: dict[str, Any] = {}
    for name in ("batch", "batch_tokens", "stage", "betas", "weight_decay", "clip_norm"):
        for earlier, later in pairwise(points[max(0, at - _REACH) : at + _GAP]):
            was, now = getattr(earlier, name), getattr(later, name)
            if was is not None and now is not None and was != now:
                found[name] = {"before": _plain(was), "after": _plain(now), "step": later.step}
    if "batch" in found and place.batch is not None:
        found["batch"]["asked"] = place.batch
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _batch(point: Point) -> int | None:
    """Which batch of the original order the update trained on; 1 is the first."""
    return point.data_position // point.batch if point.data_position and point.batch else None


def _data(points: Sequence[Point], at: int, before: Sequence[Point]) -> dict[str, Any]:
    """The batches of the trouble: `batch` is that of the onset, `last` the last one with a loss that stands out.

    That is a tenth of the highest rise, and four times the noise: on a shard of odd data the loss falls from its first
    height while the model learns it. `still` says that it stands out up to the newest line.
    """
    batch = _batch(points[at])
    if batch is None:
        return {}
    found: dict[str, Any] = {"batch": batch, "position": points[at].data_position, "last": batch, "still": False}
    usual, after = _losses(before), _losses(points[at:])
    if not usual or not after:
        return found
    level = median(usual[-32:])
    limit = level + max((max(_smooth(after)) - level) / 10, 4 * _noise(usual))
    high = [point for point in points[at:] if point.loss is None or not point.finite or point.loss > limit]
    found["last"] = max([batch, *(each for point in high if (each := _batch(point)) is not None)])
    found["still"] = bool(after) and median(after[-5:]) > limit
    return found


def _loss_scale(points: Sequence[Point], at: int) -> dict[str, Any]:
    """fp16's loss scale: now, the highest before, the overflows of the last lines, and the lines since it last rose."""
    scales = [point.loss_scale for point in points[-_TREND:] if point.loss_scale is not None]
    if not scales:
        return {}
    rises = [i for i, (earlier, later) in enumerate(pairwise(scales), 1) if later > earlier]
    overflows = sum(point.skip == "overflow" for point in points[-_OVERFLOWS:])
    return {
        "last": scales[-1],
        "highest": max(scales),
        "overflows": overflows,
        "lines": min(_OVERFLOWS, len(points)),
        "lines_since_rise": len(scales) - (rises[-1] if rises else 0),
        "loss_usual": points[at].loss,
    }


def _blocks(points: Sequence[Point], at: int) -> dict[str, Any]:
    """Of each kind of norm by block: the block that changed most over the onset, beside the others and the usual."""
    found: dict[str, Any] = {}
    for kind in ("gnorm", "pnorm", "unorm"):
        lines = [(i, norms) for i, point in enumerate(points) if (norms := _norms(point, kind))]
        earlier = [norms for i, norms in lines if i < at][-_BLOCK_LINES:]
        later = [norms for i, norms in lines if i >= at][:1]
        if len(earlier) >= 2 and later and (odd := _odd_block(earlier, later[0])):
            found[kind] = odd
    return found


def _norms(point: Point, kind: str) -> Mapping[str, float] | None:
    return {"gnorm": point.block_gnorms, "pnorm": point.block_pnorms, "unorm": point.block_unorms}[kind]


def _odd_block(earlier: Sequence[Mapping[str, float]], later: Mapping[str, float]) -> dict[str, Any] | None:
    """`ratio`: of the block that changed most, after to before (None: it is not a number any more). `others`: the
    median of the other blocks. `usual`: the largest ratio of that block between two lines before."""
    names = [name for name in earlier[-1] if earlier[-1][name] > 0]
    lost = [name for name in names if name not in later]
    if lost and len(lost) < len(names):
        return {"block": lost[0], "ratio": None, "others": 1.0, "usual": 1.0}
    logs = {
        name: math.log(later[name] / median(each.get(name, earlier[-1][name]) for each in earlier[-3:]))
        for name in names
        if later.get(name, 0.0) > 0
    }
    if len(logs) < 2:
        return None
    odd = max(logs, key=lambda name: abs(logs[name]))
    others = median(abs(change) for name, change in logs.items() if name != odd)
    steps = [
        abs(math.log(b[odd] / a[odd])) for a, b in pairwise(earlier) if a.get(odd, 0.0) > 0 and b.get(odd, 0.0) > 0
    ]
    return {
        "block": odd,
        "ratio": math.exp(logs[odd]),
        "others": math.exp(others),
        "usual": math.exp(max(steps, default=0.0)),
    }


def _growth(points: Sequence[Point], at: int) -> dict[str, Any]:
    """How norms grew up to the onset: the newest eighth of the points before it, against the older half.

    Each has the `ratio` and how many standard errors that is away from none (`errors`). The update's norm is taken per
    learning rate: in warm-up it grows by plan.
    """
    lines = points[max(0, at - _TREND) : max(0, at - 1)]
    known: dict[str, list[float]] = {
        "gnorm": [each.gnorm for each in lines if each.gnorm],
        "actv_norm": [each.actv_norm for each in lines if each.actv_norm],
        "attn_logit": [max(each.attn_logits) for each in lines if each.attn_logits and max(each.attn_logits) > 0],
        "unorm": [norm / each.lr for each in lines if each.block_unorms and each.lr and (norm := _total(each)) > 0],
    }
    found = {name: grown for name, values in known.items() if (grown := _grown(values))}
    if found:
        found["steps"] = {"first": lines[0].step, "last": lines[-1].step}
    return found


def _total(point: Point) -> float:
    return math.hypot(*(point.block_unorms or {}).values())


def _grown(values: Sequence[float]) -> dict[str, Any] | None:
    """How much larger the newest eighth is than the older half, beyond what the same span before had grown.

    Norms grow in every young run, ever more slowly. At the edge of stability they grow ever faster.
    """
    eighth = max(3, len(values) // 8)
    if len(values) < 4 * eighth:
        return None
    logs = [math.log(each) for each in values]
    older, newest = logs[: len(logs) // 2], logs[-eighth:]
    noise = max(_noise(older), 1e-6)
    usual = max(0.0, median(older[-eighth:]) - median(older[:eighth]))
    change = median(newest) - median(older) - usual
    return {"ratio": math.exp(change), "errors": change / (noise * 1.2533 * math.sqrt(1 / len(older) + 1 / eighth))}


def _optimizer(point: Point, place: Place) -> dict[str, Any]:
    if not point.betas:
        return {}
    found: dict[str, Any] = {"betas": list(point.betas), "clip_norm": point.clip_norm}
    if place.optimizer is not None and place.optimizer.betas and place.optimizer.betas != point.betas:
        found["asked_betas"] = list(place.optimizer.betas)
    return found


def _attempt(points: Sequence[Point], at: int, place: Place) -> dict[str, Any]:
    """Where the onset lies in its attempt, and how far the first points are from the loss that was due there."""
    if place.first_step is None:
        return {}
    found: dict[str, Any] = {"first_step": place.first_step, "steps_in": points[at].step - place.first_step}
    if place.restored_from is not None:
        found["restored_from"] = place.restored_from
    due = {point.step: point.loss for point in place.due if point.loss is not None and point.finite}
    own = [point for point in points if point.step >= place.first_step and point.step in due][:_DUE]
    apart = [point.loss - due[point.step] for point in own if point.loss is not None]
    if apart:
        noise = _noise(_losses(list(place.due)))
        found["due"] = {"points": len(apart), "first": apart[0], "apart": median(apart), "noise": noise}
    return found
