"""Xid 74 of a Hopper GPU: what its registers say of an NVLink.

The line ends with seven registers, of which the first, third, fourth and fifth count. Their bits are those of NVIDIA's
WORKFLOW_NVLINK_ERR, as NVSentinel states it (docs/designs/019-workflow-nvlink-err.md, 2025).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

_LINE = re.compile(r"link (?P<link>\d+) ?\((?P<registers>0x[0-9a-fA-F]+(?:, ?0x[0-9a-fA-F]+){6})\)")
_HOPPER = ("H100", "H200", "H800", "H20", "GH100", "GH200")


class Cause(StrEnum):
    """What a bit stands for, the one that decides first."""

    CONNECTION = "check the link's connectors, reseat, field diagnostic"
    SIGNAL = "marginal signal: check the link's connectors, field diagnostic"
    FABRIC = "secondary, but the fabric needs a reset"
    PARITY = "ECC or parity error: a hardware fault if it recurs on the link"
    UNLISTED = "unexpected or undocumented: report it if it recurs"
    SECONDARY = "a consequence: handle the error that it came with"
    THRESHOLD = "corrected errors over a threshold: continue"
    HARMLESS = "no consequence"


def _bits(causes: Mapping[Cause, tuple[int, ...]]) -> Mapping[int, Cause]:
    return {bit: cause for cause, bits in causes.items() for bit in bits}


REGISTERS: Mapping[int, Mapping[int, Cause]] = {
    0: _bits(
        {
            Cause.HARMLESS: (0, 23, 30),
            Cause.SECONDARY: (1, 20),
            Cause.PARITY: (4, 5),
            Cause.CONNECTION: (8, 9, 12, 16, 17, 24, 28),
            Cause.SIGNAL: (21, 22),
            Cause.UNLISTED: (27, 29),
        }
    ),
    2: _bits({Cause.PARITY: (0, 1, 2, 6), Cause.UNLISTED: (13, 16, 17, 18, 19)}),
    3: _bits({Cause.SECONDARY: (16, 17), Cause.FABRIC: (18,)}),
    4: _bits({Cause.PARITY: (18, 19, 21, 22, 24, 25, 27, 28), Cause.THRESHOLD: (20, 23, 26, 29)}),
}
"""By register, counted from 0, and bit."""


@dataclass(frozen=True, slots=True)
class LinkError:
    """A decoded line."""

    link: int
    causes: tuple[Cause, ...]
    """The one that decides first."""


def decoded(line: str, card: str | None) -> LinkError | None:
    """What a line about Xid 74 says; None without registers, or where the card is not known to be a Hopper."""
    found = _LINE.search(line)
    if found is None or card is None or not any(name in card for name in _HOPPER):
        return None
    registers = [int(word, 16) for word in found["registers"].split(",")]
    causes = {
        known.get(bit, Cause.UNLISTED)
        for register, known in REGISTERS.items()
        for bit in range(32)
        if registers[register] >> bit & 1
    }
    return LinkError(int(found["link"]), tuple(cause for cause in Cause if cause in causes))
