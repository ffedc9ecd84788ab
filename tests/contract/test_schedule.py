"""The learning rate of an update, by the contract."""

from __future__ import annotations

import math
from typing import Any

import pytest

from opt_ops.contract import batch_of, lr_of, next_sample

BASE = {"peak_lr": 2.0, "warmup_steps": 4, "total_steps": 12}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"final_fraction": 0.5}, {1: 0.5, 4: 2.0, 8: 1.5, 12: 1.0, 99: 1.0}),
        ({"kind": "linear", "delay": 1}, {1: 0.0, 5: 2.0, 9: 1.0, 13: 0.0}),
        ({"kind": "cosine", "final_fraction": 0.1}, {2: 1.0, 8: 1.1, 12: 0.2, 50: 0.2}),
        ({"kind": "cosine", "cycles": 1.0}, {8: 0.0, 12: 2.0}),
        ({"kind": "polynomial", "power": 2.0}, {8: 0.5, 12: 0.0}),
        ({"kind": "constant", "total_steps": None, "warmup_from": 0.5}, {2: 1.5, 400: 2.0}),
        ({"kind": "wsd", "decay_steps": 4}, {8: 2.0, 10: 1.0, 12: 0.0, 20: 0.0}),
        ({"kind": "wsd", "decay_steps": 4, "decay": "cosine"}, {10: 1.0, 12: 0.0}),
        ({"kind": "wsd", "decay_steps": 4, "decay": "sqrt"}, {9: 1.0, 12: 0.0}),
        ({"kind": "wsd", "decay_steps": 0, "final_fraction": 0.5}, {12: 2.0, 13: 1.0}),
        ({"kind": "table", "knots": [[2, 1.0], [6, 3.0]]}, {1: 1.0, 4: 2.0, 9: 3.0}),
    ],
)
def test_kinds(schedule: dict[str, Any], expected: dict[int, float]) -> None:
    found = {step: lr_of(BASE | schedule, (), step) for step in expected}
    assert found == pytest.approx(expected, abs=1e-12)


def test_factors_and_unknown_kinds() -> None:
    factors = [(8, 0.5), (10, 0.5)]
    assert [lr_of(BASE | {"kind": "constant"}, factors, step) for step in (8, 9, 11)] == [2.0, 1.0, 0.5]
    assert lr_of({"kind": "plateau"}, factors, 9) is None
    with pytest.raises(ValueError, match="'wsd' needs the field 'decay_steps'"):
        lr_of(BASE | {"kind": "wsd"}, (), 9)
    with pytest.raises(ValueError, match="cannot be computed"):
        lr_of(BASE | {"peak_lr": "2"}, (), 2.5)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"kind": "wsd", "decay_steps": 4, "decay": "sudden"}, "the decay 'sudden' is unknown; linear, cosine, sqrt"),
        ({"kind": "wsd", "decay_steps": 4, "decay": []}, "cannot be computed"),
        ({"kind": "table", "knots": []}, "cannot be computed"),
        ({"kind": "table", "knots": [[1]]}, "cannot be computed"),
        ({"kind": "polynomial", "power": -1}, "cannot be computed"),
        ({"kind": "constant", "peak_lr": math.nan}, "update 12 is nan"),
        ({"kind": "cosine", "total_steps": None}, "cannot be computed"),
    ],
)
def test_what_cannot_be_computed_is_one_kind_of_error(schedule: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lr_of(BASE | schedule, (), 12)


@pytest.mark.parametrize("skips", [(), ((1, 2),), ((3, 4), (4, 6), (9, 9)), ((2, 9), (3, 4), (10, 11))])
def test_batches_are_those_of_the_walk_over_samples(skips: tuple[tuple[int, int], ...]) -> None:
    position = 0
    for step in range(1, 15):
        position = next_sample(position, 8, skips) + 8
        assert batch_of(step, skips) == position // 8
