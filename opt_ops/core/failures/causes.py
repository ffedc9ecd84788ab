"""What can be behind trouble with the loss: the causes that are distinguished, and how sure one of them is.

A failure class says what was seen (`loss_spike`); a cause says why. The words are those of journals, playbooks and
`benchmarks/cures.py`, so they never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """Why the loss is in trouble."""

    BAD_RESTORE = "bad_restore"  # weights, moments or data position are not those that were saved
    UNPLANNED_LR = "unplanned_lr"  # the learning rate left its schedule
    BAD_DATA = "bad_data"  # a batch or a shard
    LR_TOO_HIGH = "lr_too_high"  # the edge of stability
    BETA2 = "beta2"  # the second moment is too slow, or epsilon too small
    FP16_SCALE = "fp16_scale"  # the loss scale no longer recovers
    CORRUPTED_WEIGHTS = "corrupted_weights"  # of one rank, or one block
    BATCH_SIZE = "batch_size"  # the batch changed
    PLANNED_CHANGE = "planned_change"  # another loss, stage or mix of data: nothing is wrong
    NONE = "none"  # it heals by itself


CAUSES: Mapping[Cause, str] = {
    Cause.BAD_RESTORE: "weights or data were not restored as they were saved",
    Cause.UNPLANNED_LR: "the learning rate left its schedule",
    Cause.BAD_DATA: "bad data",
    Cause.LR_TOO_HIGH: "the learning rate is too high",
    Cause.BETA2: "beta2 is too slow",
    Cause.FP16_SCALE: "the loss scale does not recover",
    Cause.CORRUPTED_WEIGHTS: "corrupted weights",
    Cause.BATCH_SIZE: "the batch size changed",
    Cause.PLANNED_CHANGE: "a planned change",
    Cause.NONE: "nothing, it heals by itself",
}
"""Causes in words, within a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """A cause of an incident with its confidence, from 0 to 1, and the evidence for and against it, with numbers."""

    cause: Cause
    confidence: float
    evidence_for: tuple[str, ...] = ()
    evidence_against: tuple[str, ...] = ()
