"""Every fact that the journal can hold, as a frozen dataclass, and the table of their kinds.

An event is one of three things, and its docstring says which: an *observation* (the world was seen to be so), a
*decision* (what was chosen, with its evidence and rule), or an *intent* (what is about to be done to the world, with an
id of ours). Intents are settled by a later observation or outcome.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

from opt_ops.core.events.evaluation import (
    CheckpointEvaluated,
    CheckpointSampled,
    EvaluationEnded,
    EvaluationIntended,
)
from opt_ops.core.events.execution import (
    AllocationChanged,
    AllocationFailed,
    AllocationIntended,
    AllocationSubmitted,
    AttemptConfigured,
    AttemptEnded,
    AttemptIntended,
    AttemptProgressed,
    AttemptStarted,
    CheckpointRefused,
    CheckpointSeen,
    CheckpointsGone,
    CheckpointVerified,
    EnergyMetered,
    LeaveIntended,
    LineagePaused,
    ReleaseIntended,
    RunPlanned,
    SizeDecided,
    StacksIntended,
    StacksTaken,
    StopIntended,
    StrayCancelled,
    StrayFound,
)
from opt_ops.core.events.incidents import (
    AfterthoughtAdded,
    AlertIntended,
    AlertSettled,
    DrainIntended,
    IncidentClosed,
    IncidentOpened,
    LineageCancelled,
    LineageCompleted,
    LineageHalted,
    NodeDrained,
    NodeExcluded,
    NodeJudged,
    RecoveryDecided,
    SignalRaised,
)
from opt_ops.core.events.members import MembersFailed, MembersIntended, MembersJoined, StandbySeen
from opt_ops.core.events.operator import (
    ChangeRequested,
    ChangesDeclared,
    DaemonStarted,
    DrillDone,
    DrillRequested,
    DriverChanged,
    LineageStarted,
    NodeAllowed,
    NoteAdded,
    PauseRequested,
    RequestRefused,
    ResumeRequested,
    StopRequested,
)
from opt_ops.core.events.probes import ProbeEnded, ProbesIntended, ProbesJudged
from opt_ops.core.events.proposals import ProposalAnswered, ProposalMade
from opt_ops.core.events.watch import InputLeftOut, WatcherFailed, WatcherRecovered

_E = TypeVar("_E")

Event = (
    DaemonStarted
    | LineageStarted
    | StopRequested
    | PauseRequested
    | ResumeRequested
    | ChangeRequested
    | ChangesDeclared
    | DriverChanged
    | NodeAllowed
    | NoteAdded
    | DrillRequested
    | DrillDone
    | RequestRefused
    | RunPlanned
    | AllocationIntended
    | AllocationSubmitted
    | AllocationFailed
    | AllocationChanged
    | StrayFound
    | StrayCancelled
    | SizeDecided
    | LineagePaused
    | ReleaseIntended
    | AttemptIntended
    | AttemptStarted
    | AttemptConfigured
    | AttemptProgressed
    | EnergyMetered
    | LeaveIntended
    | StacksIntended
    | StacksTaken
    | StopIntended
    | AttemptEnded
    | MembersIntended
    | MembersJoined
    | MembersFailed
    | StandbySeen
    | CheckpointSeen
    | CheckpointVerified
    | CheckpointRefused
    | CheckpointsGone
    | EvaluationIntended
    | EvaluationEnded
    | CheckpointEvaluated
    | CheckpointSampled
    | SignalRaised
    | NodeJudged
    | IncidentOpened
    | ProbesIntended
    | ProbeEnded
    | ProbesJudged
    | ProposalMade
    | ProposalAnswered
    | RecoveryDecided
    | NodeExcluded
    | DrainIntended
    | NodeDrained
    | IncidentClosed
    | AfterthoughtAdded
    | LineageCompleted
    | LineageHalted
    | LineageCancelled
    | AlertIntended
    | AlertSettled
    | InputLeftOut
    | WatcherFailed
    | WatcherRecovered
)


def kinds_of(*classes: type[_E]) -> dict[str, type[_E]]:
    """The classes by the names that they have in journals: `RunPlanned` is `run_planned`."""
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower(): cls for cls in classes}


KINDS: dict[str, type[Event]] = kinds_of(*Event.__args__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An event with its place in the journal."""

    seq: int
    epoch: int
    ts: float
    event: Event


def kind_of(event: Event) -> str:
    """The event's name in the journal, such as `run_planned`."""
    return _NAMES[type(event)]


_NAMES = {cls: name for name, cls in KINDS.items()}
