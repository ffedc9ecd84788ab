"""Times as text: also those that no calendar has."""

from __future__ import annotations

import math

import pytest

from chronicles import wording
from opt_ops.core import text


@pytest.mark.parametrize("ts", [-1e300, -1e11, 0.0, 1795356979.3, 253402300799.0, 1e12, 1e300, math.inf, -math.inf])
def test_no_time_ends_a_display(ts: float):
    for write in (text.to_iso, text.clock, wording.minute, wording.day, wording.second, wording.when):
        assert write(ts)
    assert abs(text.from_iso(text.to_iso(ts)) - max(-62135596800.0, min(ts, 253402214400.0))) < 0.001
