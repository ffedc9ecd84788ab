"""The one table of failure classes: how each is named, alerted, budgeted, blamed and explained.

Policy, alerts, advice, the ledgers, capacity, the replay and the chronicle read this table; no other list of classes
exists. `FailureClass` values are the words of journals and playbooks (docs/formats.md), so they never change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from opt_ops.core.failures import cause_text, grounds
from opt_ops.core.failures.cause_text import Raised
from opt_ops.core.failures.grounds import Confidence, Evidence, Grounds
from opt_ops.core.text import printable
from opt_ops.core.values import Severity


class FailureClass(StrEnum):
    """What an incident is, and what a playbook can be triggered by."""

    LOSS_SPIKE = "loss_spike"
    LOSS_DRIFT = "loss_drift"
    NON_FINITE_LOSS = "non_finite_loss"
    LOSS_SCALE_FLOOR = "loss_scale_floor"
    LOSS_TOO_LOW = "loss_too_low"
    BAD_RESTORE = "bad_restore"
    UNPLANNED_LR = "unplanned_lr"
    UNDECLARED_CHANGE = "undeclared_change"
    BAD_GPU = "bad_gpu"
    GPU_ERROR = "gpu_error"
    SILENT_NODE = "silent_node"
    SILENT_DATA_CORRUPTION = "silent_data_corruption"
    STRAGGLER = "straggler"
    THROUGHPUT_DROP = "throughput_drop"
    HANG = "hang"
    PROCESS_DEATH = "process_death"
    OUT_OF_MEMORY = "out_of_memory"
    COMMUNICATION = "communication"
    UNKNOWN = "unknown"
    CHECKPOINT_REFUSED = "checkpoint_refused"
    LAST_CHECKPOINT = "last_checkpoint"
    STORAGE = "storage"
    USER_ERROR = "user_error"
    ALLOCATION_LOST = "allocation_lost"
    TIME_LIMIT = "time_limit"
    PREEMPTION = "preemption"
    SUSPENDED = "suspended"
    NODES_RETURNED = "nodes_returned"
    JOB_CANCELLED = "job_cancelled"
    DAEMON_RESTART = "daemon_restart"
    OPERATOR = "operator"


class AlertSignal(StrEnum):
    """Signals that are reported only: no incident follows, no playbook is triggered."""

    GRADIENT_NORM = "gradient_norm"
    LOSS_PLATEAU = "loss_plateau"
    LOSS_SCALE_FALLING = "loss_scale_falling"
    ACTIVATION_NORM = "activation_norm"
    UPDATE_NORM = "update_norm"
    OFF_FORECAST = "off_forecast"
    SAVE_FAILED = "save_failed"


class Domain(StrEnum):
    """What kind of thing has failed."""

    LOSS = "loss"
    HARDWARE = "hardware"
    PERFORMANCE = "performance"
    PROCESS = "process"
    STORAGE = "storage"
    PLATFORM = "platform"  # the scheduler
    SETTINGS = "settings"
    SUPERVISION = "supervision"
    OPERATOR = "operator"


class Nature(StrEnum):
    """Whether it is a failure at all. Only a fault counts in failures and in MTBF."""

    FAULT = "fault"
    MOVE = "move"  # a healthy attempt goes to other nodes, as planned
    REQUEST = "request"  # somebody asked for it
    SUPERVISION = "supervision"  # of the daemon; training continued


class Spends(StrEnum):
    """Which retry budgets an action spends: the playbook's own, and the one over all playbooks."""

    NOTHING = "nothing"
    OWN = "own"
    OWN_AND_OVERALL = "own_and_overall"


class Blames(StrEnum):
    """What the failure is held against in the ledger of nodes and GPUs."""

    NOTHING = "nothing"
    NODE = "node"
    NODE_AND_GPU = "node_and_gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRow:
    """How one failure class is treated everywhere.

    Attributes:
        title: For people, on every surface.
        domain: What kind of thing has failed.
        confidence: How sure the cause is, from the incident's evidence.
        playbook: The page that ships with opt-ops; its `trigger` names the class. None: no playbook decides.
        nature: Whether it is a failure, a planned move, a request, or of supervision only.
        unnoticed: Its nature where the scheduler gave no notice: the finding came from an end, not from a rule of ours.
        severity: Of its first alert. The actions `tell` and `halt` raise it to a page. Info is *quiet*.
        spends: Which retry budgets its actions spend.
        blames: What it is held against in the ledger of nodes and GPUs.
        secondary: Whether a rank reports it because another rank has gone.
        cause: The sentence that names who or what, where, since when; from the finding's own numbers.
    """

    title: str
    domain: Domain
    confidence: Callable[[Evidence], Grounds]
    playbook: str | None
    nature: Nature = Nature.FAULT
    unnoticed: Nature | None = None
    severity: Severity = Severity.WARNING
    spends: Spends = Spends.OWN_AND_OVERALL
    blames: Blames = Blames.NOTHING
    secondary: bool = False
    cause: Callable[[Raised], str] = cause_text.by_rule

    @property
    def quiet(self) -> bool:
        """Whether its first alert is for information only."""
        return self.severity is Severity.INFO


def row(kind: str) -> FailureRow:
    """The row of a failure class. A word that a newer version journaled is treated as unexplained."""
    return ROWS[FailureClass(kind)] if kind in _WORDS else ROWS[FailureClass.UNKNOWN]


def title(kind: str) -> str:
    """A failure class or an alert's signal for people; a word of another version as it is written."""
    return ROWS[FailureClass(kind)].title if kind in _WORDS else kind.replace("_", " ").capitalize()


def cause(raised: Raised) -> str:
    """The cause of the incident that a finding opens, in one line. It may quote a program's log: untrusted text."""
    return printable(row(raised.signal).cause(raised))


def nature(kind: str, signal: str | None) -> Nature:
    """What an incident is: `signal` is the finding behind it, None where a rule of ours saw it coming."""
    known = row(kind)
    return known.unnoticed if known.unnoticed is not None and signal is not None else known.nature


def confidence(kind: str, evidence: Evidence, drill: bool) -> Grounds:
    """How sure an incident's cause is, and what that rests on."""
    return (Confidence.CERTAIN, "a drill injected it") if drill else row(kind).confidence(evidence)


ROWS: Mapping[FailureClass, FailureRow] = {
    FailureClass.LOSS_SPIKE: FailureRow(
        title="Loss spike",
        domain=Domain.LOSS,
        confidence=grounds.always(
            Confidence.LOW, "the curve left its band; whether data, learning rate or hardware did it is not known"
        ),
        cause=cause_text.loss_spike,
        playbook="loss_spike",
    ),
    FailureClass.LOSS_DRIFT: FailureRow(
        title="Loss drift",
        domain=Domain.LOSS,
        confidence=grounds.always(
            Confidence.LOW, "the curve drifted; whether data, learning rate or hardware did it is not known"
        ),
        cause=cause_text.loss_drift,
        playbook="loss_drift",
    ),
    FailureClass.NON_FINITE_LOSS: FailureRow(
        title="Loss not finite",
        domain=Domain.LOSS,
        confidence=grounds.always(Confidence.LOW, "a value was not finite; where it arose is not known"),
        cause=cause_text.non_finite_loss,
        playbook="non_finite_loss",
    ),
    FailureClass.LOSS_SCALE_FLOOR: FailureRow(
        title="Loss scale at its floor",
        domain=Domain.LOSS,
        confidence=grounds.always(
            Confidence.LOW, "the scale is at its floor; what made gradients overflow is not known"
        ),
        cause=cause_text.loss_scale_floor,
        playbook="loss_scale_floor",
    ),
    FailureClass.LOSS_TOO_LOW: FailureRow(
        title="Loss too low",
        domain=Domain.LOSS,
        confidence=grounds.always(Confidence.LOW, "the loss fell further than a schedule explains; why is not known"),
        cause=cause_text.loss_too_low,
        playbook="loss_too_low",
    ),
    FailureClass.BAD_RESTORE: FailureRow(
        title="Bad restore",
        domain=Domain.LOSS,
        confidence=grounds.always(
            Confidence.MEDIUM, "the first steps of an attempt do not continue the loss that was reached"
        ),
        playbook="bad_restore",
    ),
    FailureClass.UNPLANNED_LR: FailureRow(
        title="Learning rate off its schedule",
        domain=Domain.SETTINGS,
        confidence=grounds.always(Confidence.HIGH, "the live optimizer uses another learning rate than the schedule"),
        cause=cause_text.unplanned_lr,
        playbook="unplanned_lr",
    ),
    FailureClass.UNDECLARED_CHANGE: FailureRow(
        title="Undeclared change",
        domain=Domain.SETTINGS,
        confidence=grounds.always(Confidence.LOW, "settings or data seem to have changed; nobody declared a change"),
        playbook="undeclared_change",
    ),
    FailureClass.BAD_GPU: FailureRow(
        title="Bad GPU",
        domain=Domain.HARDWARE,
        confidence=grounds.always(Confidence.HIGH, "the driver or the kernel reports it"),
        blames=Blames.NODE_AND_GPU,
        playbook="bad_gpu",
    ),
    FailureClass.GPU_ERROR: FailureRow(
        title="GPU error in a log",
        domain=Domain.HARDWARE,
        confidence=grounds.gpu_error,
        cause=cause_text.rank_ended,
        playbook="bad_gpu",
    ),
    FailureClass.SILENT_NODE: FailureRow(
        title="Node without heartbeat",
        domain=Domain.HARDWARE,
        confidence=grounds.always(
            Confidence.MEDIUM, "its agent sent no heartbeat and no step came; the network may be at fault"
        ),
        blames=Blames.NODE,
        cause=cause_text.silent_node,
        playbook="silent_node",
    ),
    FailureClass.SILENT_DATA_CORRUPTION: FailureRow(
        title="Silent data corruption",
        domain=Domain.HARDWARE,
        confidence=grounds.corruption,
        blames=Blames.NODE,
        cause=cause_text.silent_data_corruption,
        playbook="silent_data_corruption",
    ),
    FailureClass.STRAGGLER: FailureRow(
        title="Slow rank",
        domain=Domain.PERFORMANCE,
        confidence=grounds.always(Confidence.MEDIUM, "one rank was slower than all others; why is not known"),
        blames=Blames.NODE,
        cause=cause_text.straggler,
        playbook="straggler",
    ),
    FailureClass.THROUGHPUT_DROP: FailureRow(
        title="Throughput drop",
        domain=Domain.PERFORMANCE,
        confidence=grounds.always(Confidence.MEDIUM, "one node stands out while all are slower; why is not known"),
        blames=Blames.NODE,
        cause=cause_text.throughput_drop,
        playbook="throughput_drop",
    ),
    FailureClass.HANG: FailureRow(
        title="Hang", domain=Domain.PROCESS, confidence=grounds.hang, cause=cause_text.hang, playbook="hang"
    ),
    FailureClass.PROCESS_DEATH: FailureRow(
        title="Rank died",
        domain=Domain.PROCESS,
        confidence=grounds.process_death,
        cause=cause_text.rank_ended,
        playbook="process_death",
    ),
    FailureClass.OUT_OF_MEMORY: FailureRow(
        title="Out of memory",
        domain=Domain.PROCESS,
        confidence=grounds.PROCESS,
        cause=cause_text.rank_ended,
        playbook="out_of_memory",
    ),
    FailureClass.COMMUNICATION: FailureRow(
        title="Connection between ranks lost",
        domain=Domain.PROCESS,
        confidence=grounds.always(Confidence.LOW, "ranks lost a peer; the first to report it need not be the cause"),
        secondary=True,
        cause=cause_text.rank_ended,
        playbook="communication",
    ),
    FailureClass.UNKNOWN: FailureRow(
        title="Unexplained",
        domain=Domain.PROCESS,
        confidence=grounds.always(Confidence.LOW, "no rule names a cause"),
        playbook="unknown",
    ),
    FailureClass.CHECKPOINT_REFUSED: FailureRow(
        title="Damaged checkpoint",
        domain=Domain.STORAGE,
        confidence=grounds.always(Confidence.HIGH, "its bytes do not agree with its manifest"),
        cause=cause_text.rank_ended,
        playbook="process_death",
    ),
    FailureClass.LAST_CHECKPOINT: FailureRow(
        title="Last checkpoint in doubt",
        domain=Domain.LOSS,
        confidence=grounds.always(Confidence.LOW, "every step is trained; whether the result is good is not known"),
        playbook="last_checkpoint",
    ),
    FailureClass.STORAGE: FailureRow(
        title="Storage failure",
        domain=Domain.STORAGE,
        confidence=grounds.PROCESS,
        cause=cause_text.rank_ended,
        playbook="storage",
    ),
    FailureClass.USER_ERROR: FailureRow(
        title="Settings rejected",
        domain=Domain.SETTINGS,
        confidence=grounds.always(Confidence.HIGH, "the trainer refused its own settings"),
        cause=cause_text.rank_ended,
        playbook="user_error",
    ),
    FailureClass.ALLOCATION_LOST: FailureRow(
        title="Allocation lost",
        domain=Domain.PLATFORM,
        confidence=grounds.always(Confidence.MEDIUM, "the scheduler reports that the job ended, not always why"),
        cause=cause_text.job_ended,
        playbook="process_death",
    ),
    FailureClass.TIME_LIMIT: FailureRow(
        title="Time limit",
        domain=Domain.PLATFORM,
        nature=Nature.MOVE,
        unnoticed=Nature.FAULT,
        severity=Severity.INFO,
        spends=Spends.OWN,
        confidence=grounds.SCHEDULER,
        cause=cause_text.job_ended,
        playbook="time_limit",
    ),
    FailureClass.PREEMPTION: FailureRow(
        title="Preempted",
        domain=Domain.PLATFORM,
        nature=Nature.MOVE,
        severity=Severity.INFO,
        spends=Spends.OWN,
        confidence=grounds.SCHEDULER,
        cause=cause_text.job_ended,
        playbook="preemption",
    ),
    FailureClass.SUSPENDED: FailureRow(
        title="Job suspended",
        domain=Domain.PLATFORM,
        nature=Nature.REQUEST,
        spends=Spends.NOTHING,
        confidence=grounds.SCHEDULER,
        cause=cause_text.suspended,
        playbook="suspended",
    ),
    FailureClass.NODES_RETURNED: FailureRow(
        title="More nodes available",
        domain=Domain.PLATFORM,
        nature=Nature.MOVE,
        severity=Severity.INFO,
        spends=Spends.OWN,
        confidence=grounds.always(Confidence.HIGH, "the nodes report"),
        playbook="capacity",
    ),
    FailureClass.JOB_CANCELLED: FailureRow(
        title="Job cancelled",
        domain=Domain.PLATFORM,
        nature=Nature.REQUEST,
        confidence=grounds.SCHEDULER,
        cause=cause_text.job_ended,
        playbook="job_cancelled",
    ),
    FailureClass.DAEMON_RESTART: FailureRow(
        title="Daemon restarted",
        domain=Domain.SUPERVISION,
        nature=Nature.SUPERVISION,
        severity=Severity.INFO,
        spends=Spends.OWN,
        confidence=grounds.always(Confidence.HIGH, "the journal shows the gap"),
        playbook="daemon_restart",
    ),
    FailureClass.OPERATOR: FailureRow(
        title="Requested by an operator",
        domain=Domain.OPERATOR,
        nature=Nature.REQUEST,
        severity=Severity.INFO,
        spends=Spends.NOTHING,
        confidence=grounds.always(Confidence.CERTAIN, "an operator asked for it"),
        playbook=None,
    ),
}

_WORDS = frozenset(ROWS)
