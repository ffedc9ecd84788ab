"""The schedules of transformers in the words of config.json, against transformers' own schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import SchedulerType, TrainingArguments
from transformers.optimization import get_scheduler

from opt_ops.contract import lr_of
from opt_ops.integrations.transformers_schedule import schedule_of

STEPS, WARMUP, PEAK = 60, 10, 0.004

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("linear", {}, "linear"),
    ("cosine", {}, "cosine"),
    ("cosine", {"num_cycles": 1.5}, "cosine"),
    ("cosine_with_restarts", {"num_cycles": 3}, "table"),
    ("polynomial", {}, "polynomial"),
    ("polynomial", {"power": 2.0, "lr_end": 0.001}, "polynomial"),
    ("constant", {}, "constant"),
    ("constant_with_warmup", {}, "constant"),
    ("inverse_sqrt", {}, "table"),
    ("inverse_sqrt", {"timescale": 40}, "table"),
    ("cosine_with_min_lr", {"min_lr": 0.001}, "cosine"),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2}, "cosine"),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.2}, "cosine"),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.2, "warmup_lr_rate": 0.1}, "table"),
    ("warmup_stable_decay", {"num_decay_steps": 20, "min_lr_ratio": 0.1}, "wsd"),
    ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "linear"}, "wsd"),
    ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}, "wsd"),
    ("warmup_stable_decay", {"num_decay_steps": 20, "warmup_type": "cosine"}, "table"),
]


@pytest.mark.parametrize(("name", "words", "kind"), CASES)
def test_every_rate_is_that_of_the_scheduler(name: str, words: dict[str, Any], kind: str) -> None:
    args = TrainingArguments(use_cpu=True, report_to=[], lr_scheduler_type=name, warmup_steps=WARMUP)
    args.lr_scheduler_kwargs = words
    schedule = schedule_of(args, PEAK, STEPS, STEPS)
    assert schedule["kind"] == kind
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler: Any = get_scheduler(name, optimizer, WARMUP, STEPS, words)
    for step in range(1, STEPS + 1):
        assert lr_of(schedule, (), step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_scheduler_that_follows_a_metric_is_of_an_unknown_kind(name: str) -> None:
    args = TrainingArguments(use_cpu=True, report_to=[], warmup_steps=WARMUP)
    args.lr_scheduler_type = SchedulerType(name)
    assert schedule_of(args, PEAK, STEPS, STEPS) == {"kind": "other", "name": name}


def test_all_kinds_of_the_library_are_here() -> None:
    assert {name for name, _, _ in CASES} | {"reduce_lr_on_plateau", "greedy"} == {each.value for each in SchedulerType}


def test_a_formula_that_a_later_version_changes_becomes_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import optimization

    changed = lambda step, **_: 1.0 / (1 + step)  # noqa: E731
    monkeypatch.setattr(optimization, "_get_linear_schedule_with_warmup_lr_lambda", changed)
    args = TrainingArguments(use_cpu=True, report_to=[], lr_scheduler_type="linear", warmup_steps=WARMUP)
    schedule = schedule_of(args, PEAK, STEPS, STEPS)
    assert schedule["kind"] == "table"
    assert lr_of(schedule, (), 5) == pytest.approx(PEAK / 5)
