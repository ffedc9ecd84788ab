"""Playbooks as data, and the three questions that a decision asks of them: which rung, is there budget, which
checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opt_ops.core.detect.hang import HangRule
from opt_ops.core.detect.loss_level import DriftRule
from opt_ops.core.detect.loss_scale import LossScaleRule
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.detect.straggler import StragglerRule
from opt_ops.core.detect.throughput import ThroughputRule
from opt_ops.core.failures.causes import Cause
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Action, AskDefault, Severity

SCRATCH_STEPS = 2000
"""As long as no more would be lost, training may start over from scratch without being asked: about the warm-up. Beyond
it, that no checkpoint is left is for a person to judge. The same holds where none is as far before an onset as it
should be, and the oldest one is further before it than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One step of a playbook's ladder."""

    action: Action
    lr_factor: float | None = None  # of a rollback
    margin_steps: int = 0  # of a rollback: how far before the onset, at least
    exclude: bool = False  # whether the incident's nodes are excluded
    skip_data: bool = False  # of a rollback: whether the batches from the checkpoint to the failure are skipped
    save_first: bool = False  # of a restart: the attempt is healthy and leaves after one more checkpoint
    cause: Cause | None = None  # it is only for trouble with this cause
    skip_onset: bool = False  # of a rollback: whether the batches around the onset are skipped
    older: bool = False  # of a rollback: from a checkpoint before the attempt's own, which is never chosen again
    settings: tuple[str, ...] = ()  # of a rollback: `key=value` for the next run
    deadline_seconds: float | None = None  # of a replacement of ranks, until all have joined; None: as the site says


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How often a playbook may act before on-call is paged. Drills do not spend it."""

    actions: int
    hours: float
    settle_steps: (
        int | None
    )  # training this far past a failure restarts the ladder; None: every incident starts at rung 1
    refill_steps: int | None = None  # training this far past a failure gives back what it spent


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlaceBudget:
    """How often a playbook may replace ranks before it restarts instead. Restarts do not spend it."""

    actions: int = 20
    hours: float = 24.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRule:
    """Whether short runs on idle nodes may tell causes apart before a decision, and for how long it waits for them."""

    steps: int  # from the onset on
    deadline_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AskRule:
    """How a person is asked before a playbook acts, where the driver is `ask`.

    A page whose default is `wait` is for failures that training survives. All others stop training, and go first.
    """

    default: AskDefault = AskDefault.ACT  # what happens when nobody has answered
    seconds: float = 600.0  # from the proposal to its deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Playbook:
    """A playbook page as data: its triggers, its ladder, its retry budget, and what proves that it took effect."""

    name: str
    version: int
    title: str
    triggers: tuple[str, ...]
    ladder: tuple[Rung, ...]
    cures: tuple[Rung, ...] = ()  # the rungs that are for one cause each
    budget: Budget
    proof_steps: int
    probe: ProbeRule | None = None  # None: no probes
    in_place: InPlaceBudget = InPlaceBudget()
    ask: AskRule = AskRule()

    @property
    def in_place_rungs(self) -> int:
        """How many rungs at the beginning of the ladder replace ranks in place: none, or one."""
        return int(self.ladder[0].action is Action.REPLACE_RANKS)

    @property
    def first_restart(self) -> Rung:
        """The first rung for a trainer that cannot replace ranks."""
        return self.ladder[self.in_place_rungs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What holds for all playbooks together."""

    actions: int  # in `hours`, of all playbooks
    hours: float
    refill_steps: int | None
    cordon_per_hour: int  # nodes that may be excluded: a wrong rule must not empty a cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How long to wait for missing nodes, in seconds."""

    shrink_seconds: float  # without a full set, before training goes on with fewer nodes
    grow_seconds: float  # of training with fewer, before it is interrupted for more
    top_up_seconds: float  # between tries to replace a node that is not needed at once
    successor_seconds: float  # before a time limit, when the next allocation is asked for
    last_call_seconds: float  # before a time limit, when the attempt must save and leave
    leave_seconds: float  # that a leaving attempt gets for its checkpoint
    page_seconds: float  # of waiting for nodes, before on-call is paged


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRule:
    """Which checkpoints are evaluated without being asked, and where. Steps; 0: none."""

    every: int = 0  # by the tasks
    tasks: tuple[str, ...] = ()
    samples_every: int = 0  # by the fixed prompts
    on_spares: bool = True  # on an idle spare node; False: beside the daemon


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The numbers of all playbooks together, and of the site: what `decide` and the watchers use."""

    version: str  # digest of the playbooks
    playbooks: Mapping[str, Playbook]  # by trigger
    spike: SpikeRule
    drift: DriftRule
    hang: HangRule
    silent_seconds: float
    straggler: StragglerRule
    throughput: ThroughputRule
    loss_scale: LossScaleRule
    limits: Limits
    capacity: Capacity
    dump_seconds: float = 10.0  # that hung ranks get to say where they are
    least_alert: Severity | None = None  # lowest severity that is sent; None: no alert is
    join_seconds: float = 5.0  # for the last held nodes to report, once enough have
    preflight_seconds: float = 120.0  # for held nodes that have not been heard
    unfit_seconds: float = 15.0  # when all were heard and too few are fit
    spare_seconds: float = 120.0  # in the queue for spares, before nodes are asked for without them
    examine_seconds: float = 60.0  # that a launch waits for a newer checkpoint's examination
    final_examine_seconds: float = 1200.0  # that the end of a lineage waits for the last checkpoint's examination
    submit_tries: int = 5
    submit_wait_seconds: float = 30.0
    expected_gpus: int = 0  # per node, as the site says
    in_place: bool = True  # whether lost ranks are replaced while the others keep running, as the site says
    in_place_seconds: float = 120.0  # from the first order until all ranks have joined
    evaluation: EvaluationRule = EvaluationRule()

    def playbook_for(self, kind: str) -> Playbook | None:
        """The playbook that a failure class triggers; for one that triggers none, that of unknown failures."""
        return self.playbooks.get(kind) or self.playbooks.get(FailureClass.UNKNOWN)
