"""Learning-rate factors: each multiplies the schedule in all updates after a step.

An operator or a recovery orders them. A trainer gets each of them as ``--lr-factor STEP:FACTOR``.
"""

import math
from collections.abc import Iterable


def parse_lr_factor(text: str) -> tuple[int, float]:
    """The (step, factor) in ``STEP:FACTOR``.

    Raises:
        ValueError: the text has another form, or the factor is not a finite number above 0.
    """
    step, _, factor = text.partition(":")
    try:
        pair = int(step), float(factor)
    except ValueError:
        pair = 0, 0.0
    if not 0 < pair[1] < math.inf:
        raise ValueError("expected STEP:FACTOR with a factor above 0, for example 450:0.75.")
    return pair


def total_lr_factor(step: int, lr_factors: Iterable[tuple[int, float]]) -> float:
    """What to multiply the schedule by in update ``step``: the product of all factors whose step is below it.

    Args:
        step: number of the update, from 1.
        lr_factors: (step, factor) pairs.
    """
    return math.prod(factor for after, factor in lr_factors if after < step)
