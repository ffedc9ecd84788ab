"""Learning-rate factors, as the command line has them and as training uses them."""

import pytest

from opt_ops.contract.learning_rate import parse_lr_factor, total_lr_factor
from opt_ops.core.schedule import expected_lr
from opt_ops.core.values import LrFactor, Schedule

FLAT = Schedule(peak_lr=1.0, warmup_steps=0, total_steps=1000, final_fraction=1.0)


def test_the_words_of_the_command_line_are_parsed_or_explained() -> None:
    assert parse_lr_factor("450:0.75") == (450, 0.75)
    for text in ("450", "450:0", "450:-1", "450:inf", "450:nan", "x:1", ""):
        with pytest.raises(ValueError, match="expected STEP:FACTOR"):
            parse_lr_factor(text)


@pytest.mark.parametrize("step", [1, 20, 21, 60, 61, 200])
def test_the_check_of_the_supervisor_comes_to_the_same(step: int) -> None:
    pairs = [(60, 0.5), (20, 0.75)]
    theirs = expected_lr(FLAT, [LrFactor(step=after, factor=factor) for after, factor in pairs], step)
    assert total_lr_factor(step, pairs) == pytest.approx(theirs, rel=1e-15)
