"""What detectors take in and give out: telemetry points, findings, and windows with a robust median and spread.

A detector is streaming and deterministic, with a bounded amount of work and memory for every telemetry line. Its
findings have one of two tiers: an *alert* is shown and changes nothing; *act* asks the finding's playbook what to do.
docs/signals.md says what each detector looks for, and why its numbers are what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One telemetry line. `loss` and `gnorm` are None when they were not finite; then `finite` is False.

    `gnorm` is also None where the trainer has none. `wps` and `step_seconds` are 0 where they are not known.
    """

    step: int
    ts: float
    loss: float | None
    gnorm: float | None
    lr: float
    betas: tuple[float, ...]
    weight_decay: float
    clip_norm: float
    step_seconds: float
    tokens: int
    wps: float
    finite: bool
    save_seconds: float = 0.0
    save_error: str | None = None  # what the newest save failed of; untrusted
    loss_scale: float | None = None  # of fp16
    skip: str | None = None  # why the trainer did not apply this update: overflow, out_of_band
    bad_module: str | None = None  # where numbers first ceased to be finite, in an update that ended training
    actv_norm: float | None = None  # of what enters the last layer norm
    busy: Busy | None = None
    checksums: ChecksumComparison | None = None  # in steps in which ranks compared what they hold alike
    valid: Mapping[str, float | None] | None = None  # the loss on each validation corpus that was due; untrusted names
    batch: int | None = None  # sequences of the global batch
    batch_tokens: int | None = None  # tokens of the global batch
    stage: str | None = None  # of the data; untrusted
    data_position: int | None = None  # samples used before and including this batch
    block_gnorms: Mapping[str, float] | None = None  # norm of the gradient by block; untrusted names
    block_pnorms: Mapping[str, float] | None = None  # of the parameters, every `log_every` updates
    block_unorms: Mapping[str, float] | None = None  # of the applied update, every `log_every` updates
    base_lr: float | None = None  # what the schedule alone gave for this update
    attn_logits: tuple[float, ...] | None = None  # the largest of a sample, by layer, every `log_every` updates

    def __deepcopy__(self, memo: object) -> Point:
        """The point itself: nobody changes one, and copies of detectors hold many."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """How long ranks worked on a step without waiting for others, in seconds: the usual one, and the slowest."""

    median: float
    max: float
    rank: int


@dataclass(frozen=True, slots=True)
class ChecksumComparison:
    """What ranks found when they compared what they should hold alike: the ranks whose data is corrupt, if any.

    Not `certain`: as many hold one thing as hold another, and the ranks are all of these.
    """

    ranks: tuple[int, ...] = ()
    certain: bool = True
    what: str = ""
