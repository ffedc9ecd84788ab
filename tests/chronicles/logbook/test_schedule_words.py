"""What the logbook says of a schedule, and of a proof that leaves it open."""

from dataclasses import replace
from typing import Any

import pytest

from chronicles.logbook.entries.schedule_words import in_words
from opt_ops.core.values import Schedule

FALL = Schedule(peak_lr=1e-3, warmup_steps=60, total_steps=600, final_fraction=0.1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "Peak learning rate 1e-3 after 60 warm-up steps, falling to 10 % of it at step 600, where training ends."),
        (
            {"kind": "cosine", "delay": 1, "final_fraction": 0.0},
            (
                "Peak learning rate 1e-3 after 60 warm-up steps, following half a cosine to 0 % of it at step 601; "
                "training ends at step 600. The schedule lags 1 step."
            ),
        ),
        (
            {"kind": "cosine", "cycles": 1.5},
            (
                "Peak learning rate 1e-3 after 60 warm-up steps, following 1.5 cycles of a cosine between it and "
                "10 % of it at step 600, where training ends."
            ),
        ),
        (
            {"kind": "polynomial", "power": 2.0, "warmup_from": 0.1},
            (
                "Peak learning rate 1e-3 after 60 warm-up steps from 10 % of it, falling as a polynomial of power 2 to "
                "10 % of it at step 600, where training ends."
            ),
        ),
        (
            {"kind": "constant", "total_steps": 0, "warmup_steps": 1},
            "Peak learning rate 1e-3 after 1 warm-up step, constant from there on.",
        ),
        (
            {"kind": "wsd", "decay_steps": 100, "decay": "sqrt"},
            (
                "Peak learning rate 1e-3 after 60 warm-up steps, level until step 500, then falling as one minus a "
                "square root to 10 % of it at step 600, where training ends."
            ),
        ),
        (
            {"kind": "table", "knots": ((0.0, 1e-3), (500.0, 1e-5))},
            "Learning rates from a table of 2 points: 1e-3 at step 0, 1e-5 from step 500 on.",
        ),
        ({"kind": "greedy\n"}, "Of the kind greedy, which opt-ops does not compute: only factors can be proven."),
    ],
)
def test_each_kind_has_its_sentence(changed: dict[str, Any], words: str):
    assert in_words(replace(FALL, **changed), 600) == words
