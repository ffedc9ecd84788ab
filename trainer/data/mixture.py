"""The order in which several corpora take turns, so that each has its share at all times."""

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from trainer.errors import UserError

# The longest period. Every process holds a table with two numbers per turn.
LONGEST = 1 << 16


def whole_parts(weights: Sequence[Fraction]) -> list[int]:
    """``weights`` as the smallest whole numbers in the same ratio.

    Raises:
        UserError: their sum is above ``LONGEST``.
    """
    denominator = lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * denominator) for weight in weights]
    parts = [part // gcd(*whole) for part in whole]
    if sum(parts) > LONGEST:
        raise UserError(
            f"the weights of --data add up to {sum(parts)} parts, more than {LONGEST}: use fewer digits, "
            "for example 0.35 and 0.65."
        )
    return parts


def turns(parts: Sequence[int]) -> np.ndarray:
    """The corpus of each turn: a sequence of sum(``parts``) turns, to be repeated without end.

    The exact share of corpus *c* after *n* turns is *n* · parts[c] / sum(parts). The number of its turns is always that
    share, rounded up or down. This is the quota method (Balinski and Young 1975). A turn goes to a corpus whose share
    is not used up; of several, to the one that needs its next turn first.

    Returns:
        One-dimensional array of indices into ``parts``.
    """
    period = sum(parts)
    given = [0] * len(parts)
    order = np.empty(period, np.int16)
    for turn in range(1, period + 1):
        owed = [c for c, part in enumerate(parts) if given[c] * period < part * turn]
        chosen = min(owed, key=lambda c: ((given[c] + 1) / parts[c], c))  # exact: distinct ratios differ by 2⁻³²
        order[turn - 1] = chosen
        given[chosen] += 1
    return order
