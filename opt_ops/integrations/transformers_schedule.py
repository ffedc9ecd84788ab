"""The schedule of a ``transformers.Trainer`` in the words of ``config.json``.

LambdaLR counts from 0, so update *s* gets the factor of *s* − 1: ``delay`` is 1. One kind adds 1 itself.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.optimization import get_scheduler

from opt_ops.contract import lr_of

UNKNOWN = "other"
"""The kind of a schedule that nobody can compute beforehand. Each update then gives its ``base_lr``."""

_MOST_KNOTS = 50_000  # the supervisor takes a table of 65,536, and a config.json of 4 MiB
_NOT_COMPUTED = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_DECAYS = {"linear": "linear", "cosine": "cosine", "1-sqrt": "sqrt"}


def unknown(name: str) -> dict[str, Any]:
    """The schedule of a scheduler object that a script made itself, or that follows a metric.

    Args:
        name: of the scheduler, for the reader.
    """
    return {"kind": UNKNOWN, "name": name}


def schedule_of(args: TrainingArguments, peak_lr: float, total_steps: int, steps: int) -> dict[str, Any]:
    """The schedule that ``lr_scheduler_type`` and its arguments describe.

    Each formula is compared with the library's own. Where they differ, the schedule is a table of the library's own
    rates: a version of transformers may change a formula, and a table is always right. A table that would be too long
    for ``config.json`` is an unknown kind.

    Args:
        args: with ``lr_scheduler_type``, ``lr_scheduler_kwargs`` and the warm-up.
        peak_lr: the largest rate, in the optimizer.
        total_steps: the update at which the decay ends.
        steps: the last update; a table needs no more.

    Raises:
        ValueError, TypeError: transformers refuses the arguments.
    """
    kind = SchedulerType(args.lr_scheduler_type)
    if kind in _NOT_COMPUTED:
        return unknown(kind.value)
    warmup = args.get_warmup_steps(total_steps)
    theirs = _their_rates(args, peak_lr, warmup, total_steps)
    found = _FORMULAS.get(kind, _table)(_words_of(args), peak_lr, warmup, total_steps)
    last = min(steps, total_steps)
    looked_at = {1, 2, warmup, warmup + 1, warmup + 2, last, *(last * part // 64 for part in range(1, 64))}
    if found is None or not all(
        math.isclose(theirs(step - 1), lr_of(found, (), step) or 0.0, rel_tol=1e-9, abs_tol=1e-9 * peak_lr)
        for step in looked_at
        if 1 <= step <= last
    ):
        if steps > _MOST_KNOTS:
            return unknown(kind.value)
        return {"kind": "table", "delay": 1, "knots": [[update, theirs(update)] for update in range(max(2, steps))]}
    return found


def _their_rates(args: TrainingArguments, peak_lr: float, warmup: int, total_steps: int):
    """The rate after so many steps of the scheduler, by the library's own function."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak_lr)
    scheduler: Any = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=_words_of(args),
    )
    factor = scheduler.lr_lambdas[0]
    return lambda update: peak_lr * float(factor(update))


def _words_of(args: Any) -> dict[str, Any]:
    return dict(args.lr_scheduler_kwargs or {})


def _common(kind: str, peak_lr: float, warmup: int, total: int, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "peak_lr": peak_lr, "warmup_steps": warmup, "total_steps": total, "delay": 1, **fields}


def _constant(_words: Mapping[str, Any], peak_lr: float, _warmup: int, _total: int) -> dict[str, Any]:
    return {"kind": "constant", "peak_lr": peak_lr, "warmup_steps": 0, "delay": 1}


def _constant_with_warmup(_words: Mapping[str, Any], peak_lr: float, warmup: int, _total: int) -> dict[str, Any]:
    return {"kind": "constant", "peak_lr": peak_lr, "warmup_steps": warmup, "delay": 1}


def _linear(_words: Mapping[str, Any], peak_lr: float, warmup: int, total: int) -> dict[str, Any]:
    return _common("linear", peak_lr, warmup, total, final_fraction=0.0)


def _cosine(words: Mapping[str, Any], peak_lr: float, warmup: int, total: int) -> dict[str, Any]:
    final = words.get("min_lr_rate")
    if final is None:
        final = (words.get("min_lr") or 0.0) / peak_lr if peak_lr else 0.0
    cycles = float(words.get("num_cycles", 0.5))
    return _common("cosine", peak_lr, warmup, total, final_fraction=float(final), cycles=cycles)


def _cosine_that_adds_1(words: Mapping[str, Any], peak_lr: float, warmup: int, total: int) -> dict[str, Any] | None:
    return None if words.get("warmup_lr_rate") is not None else _cosine(words, peak_lr, warmup, total) | {"delay": 0}


def _polynomial(words: Mapping[str, Any], peak_lr: float, warmup: int, total: int) -> dict[str, Any]:
    final = float(words.get("lr_end", 1e-7)) / peak_lr
    power = float(words.get("power", 1.0))
    return _common("polynomial", peak_lr, warmup, total, final_fraction=final, power=power)


def _wsd(words: Mapping[str, Any], peak_lr: float, warmup: int, total: int) -> dict[str, Any] | None:
    decay = words.get("decay_type", "cosine")
    if words.get("warmup_type", "linear") != "linear" or (decay == "cosine" and words.get("num_cycles", 0.5) != 0.5):
        return None
    final, steps = float(words.get("min_lr_ratio", 0.0)), int(words["num_decay_steps"])
    if words.get("num_stable_steps") is not None:
        total = warmup + int(words["num_stable_steps"]) + steps
    fields = {"final_fraction": final, "warmup_from": final, "decay_steps": steps, "decay": _DECAYS[decay]}
    return _common("wsd", peak_lr, warmup, total, **fields)


def _table(_words: Mapping[str, Any], _peak_lr: float, _warmup: int, _total: int) -> None:
    return None


_FORMULAS = {
    SchedulerType.LINEAR: _linear,
    SchedulerType.COSINE: _cosine,
    SchedulerType.COSINE_WITH_MIN_LR: _cosine,
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: _cosine_that_adds_1,
    SchedulerType.POLYNOMIAL: _polynomial,
    SchedulerType.CONSTANT: _constant,
    SchedulerType.CONSTANT_WITH_WARMUP: _constant_with_warmup,
    SchedulerType.WARMUP_STABLE_DECAY: _wsd,
}
