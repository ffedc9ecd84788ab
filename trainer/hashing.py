"""Pseudo-random numbers as a function of their purpose, not of how many were drawn before.

Data order and dropout use them. So neither depends on the number of ranks, on restarts, or on the generator of a
library.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF

# Two rounds of xor-shift and multiply, with the constants of least bias from C. Wellons' hash-prospector. Both are
# below 2³¹, so products of 64-bit signed integers never overflow, and every backend gives the same bits.
_FIRST = 0x21F0AAAD
_SECOND = 0x735A2D97

# :func:`key` adds this to each word, because mix(0) is 0.
ODD = 0x9E3779B9


def mix(x: int) -> int:
    """A bijection of [0, 2³²). Each bit of ``x`` changes each bit of the result with a probability near ½."""
    x = ((x ^ (x >> 16)) * _FIRST) & MASK
    x = ((x ^ (x >> 15)) * _SECOND) & MASK
    return x ^ (x >> 15)


def mix_(x: Tensor) -> Tensor:
    """Apply :func:`mix` to each element of an int64 tensor, in place: allocation would cost more than arithmetic."""
    shifted = x >> 16
    x.bitwise_xor_(shifted).mul_(_FIRST).bitwise_and_(MASK)
    x.bitwise_xor_(torch.bitwise_right_shift(x, 15, out=shifted)).mul_(_SECOND).bitwise_and_(MASK)
    return x.bitwise_xor_(torch.bitwise_right_shift(x, 15, out=shifted))


def mix32_(x: Tensor) -> Tensor:
    """The same bits for an int32 tensor, in place. Half the memory traffic, so activations use it.

    Multiplication wraps. The shift of a signed integer copies its sign, so the copies are masked away.
    """
    shifted = (x >> 16).bitwise_and_(0xFFFF)
    x.bitwise_xor_(shifted).mul_(_FIRST)
    x.bitwise_xor_(torch.bitwise_right_shift(x, 15, out=shifted).bitwise_and_(0x1FFFF)).mul_(_SECOND)
    return x.bitwise_xor_(torch.bitwise_right_shift(x, 15, out=shifted).bitwise_and_(0x1FFFF))


def key(*words: int) -> int:
    """One number in [0, 2³²) for a sequence of integers. Their order matters."""
    state = 0
    for word in words:
        state = mix((state + word + ODD) & MASK)
    return state
