"""Events of probes: short runs on idle nodes that tell causes of trouble with the loss apart."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from opt_ops.core.failures.causes import Suspicion
from opt_ops.core.names import probe_name
from opt_ops.core.values import Checkpoint, LrFactor, Skip


class ProbeKind(StrEnum):
    """What a probe changes. These words are those of journals and folders, so they never change."""

    SAME_DATA = "same_data"  # nothing
    OTHER_DATA = "other_data"  # the batches around the onset are skipped
    LOWER_LR = "lower_lr"  # the learning rate is lower, by the first cut of the playbook's ladder


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One short run on one node, under settings of its own."""

    kind: ProbeKind
    node: str
    lr_factors: tuple[LrFactor, ...]
    settings: tuple[str, ...]
    skips: tuple[Skip, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbesIntended:
    """Intent: before an incident is decided, these probes train from `checkpoint` past the onset, to `last_step`.

    A probe whose loss goes above `limit` from `onset_step` on has spiked; None: only a loss that is not finite counts.
    """

    incident: str
    attempt: str  # whose trouble it is; a newer attempt ends the probes
    checkpoint: Checkpoint
    onset_step: int
    last_step: int
    limit: float | None
    at: float
    deadline_seconds: float  # after which the decision waits no more
    probes: tuple[Probe, ...]
    why: str

    def name(self, probe: Probe) -> str:
        """The name of a probe, such as `12-i003-same_data`."""
        return probe_name(self.incident, probe.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeEnded:
    """Observation: what a probe showed. `spiked` is None where it showed nothing: its processes ended before."""

    incident: str
    probe: ProbeKind
    spiked: bool | None
    step: int | None  # its newest one
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbesJudged:
    """Decision: the wait for probes is over. The incident's causes are now these."""

    incident: str
    causes: tuple[Suspicion, ...]
    why: str
