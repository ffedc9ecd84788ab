"""Watches the processes of the newest attempt by the reports of the node agents: started, a rank died, all ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial

from opt_ops.contract.exit_codes import ExitCode
from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.replacement import is_capable
from opt_ops.core.detect.stacks import group
from opt_ops.core.events import AttemptEnded, AttemptStarted, CheckpointRefused, Event, SignalRaised, StacksTaken
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.failures.classify_exit import Blame, blame
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import Incident, State
from opt_ops.core.values import Outcome, RankExit, Tier
from opt_ops.ports import Agents, Clock, NodeRanksReport
from opt_ops.supervise.exits import evidence_of, failed_ranks, losses_of, places, present
from opt_ops.supervise.guard import Guard
from opt_ops.supervise.watch_nodes import END_REASON_SECONDS, NodeWatch
from opt_ops.supervise.watch_training import TrainingWatch

# When a rank dies, its peers die of it. The report of another node may come later and show an earlier death.
_FIRST_FAILURE_DEBOUNCE_SECONDS = 1.0
_SECOND_LOSS_DEBOUNCE_SECONDS = 0.5
_VICTIMS_DEBOUNCE_SECONDS = 4.0  # while ranks only report a lost peer: the peer may still be writing its stacks

_XIDS_SECONDS = 60.0  # before the end of a rank: Xids of its node that may explain it

_STOP_SIGNALS = frozenset({2, 15})  # SIGINT by an agent that leaves, SIGTERM by the scheduler

_RECENT_HEARTBEAT_SECONDS = 5.0  # two heartbeats and a tick

_EXITS = 64  # that are journaled one by one: one death ends up to 16 thousand ranks, hundreds of times in a run


class AttemptWatch:
    """Follows the processes of the newest attempt."""

    def __init__(
        self,
        policy: Policy,
        agents: Agents,
        nodes: NodeWatch,
        training: TrainingWatch,
        clock: Clock,
        guard: Guard | None = None,
    ) -> None:
        """`guard`: the supervisor's, which tells of parts that fail."""
        self._guard = guard or Guard(clock)
        self._policy = policy
        self._agents = agents
        self._nodes = nodes
        self._training = training
        self._clock = clock
        self._failed_at: dict[tuple[str, int], float] = {}
        """By attempt and generation: when a failed rank was first reported."""
        self._dump_asked_at: dict[str, float] = {}  # by incident

    def observe(self, state: State) -> Iterator[Event]:
        """Yield events for what the agents report that is new."""
        attempt = state.attempt
        if attempt is None or not attempt.live:
            return
        if not attempt.nodes:
            yield from self._foreign(state, attempt)
            return
        each = self._guard.each
        yield from each("stacks", lambda: self._stacks(state, attempt))
        found = self._guard.call("reports on ranks", lambda: self._agents.reports(attempt.name), {})
        reports = {node: present(attempt, found[node]) for node in attempt.nodes if node in found}
        if attempt.started_at is None and reports.keys() >= set(attempt.nodes):
            yield AttemptStarted(attempt=attempt.name, at=max(report.started_at for report in reports.values()))
        over = all(self._is_over(state, attempt, reports.get(node), found.get(node), node) for node in attempt.nodes)
        silent = {x: "" for report in reports.values() for x in report.exits if x.code != 0 or x.signal is not None}
        # Else a lost node may be the cause, or the rank that died: a daemon that was held up sees both at once.
        if not silent and self._nodes.all_reported_within(attempt.nodes, _RECENT_HEARTBEAT_SECONDS):
            yield from each("hangs", lambda: self._training.hang(state, attempt))
        if over:
            # The last telemetry was on disk before the processes ended: read it first.
            yield from self._training.observe(state)
        last = self._training.last(attempt)
        said = partial(failed_ranks, reports.values(), last.ts if last else None)
        failed = self._guard.call("the last words of ranks", said, silent)
        if self._awaits_end_reason(state, attempt, failed):
            return
        yield from self._failed_rank(state, attempt, failed, over)
        if over:
            yield from self._training.report_progress(attempt)
            yield self._ended(state, attempt, reports)

    def _foreign(self, state: State, attempt: Attempt) -> Iterator[Event]:
        """In shadow mode another launcher runs the attempt: its processes are not known, and not touched."""
        if attempt.stop_why is not None:
            yield self._ended(state, attempt, {})
        else:
            yield from self._training.hang(state, attempt)

    def _stacks(self, state: State, attempt: Attempt) -> Iterator[Event]:
        """Yield the stacks once every rank has answered, or the time to answer is over."""
        for incident in state.incidents.values():
            if incident.stacks_at is None or incident.stacks is not None:
                continue
            texts = self._agents.stacks(attempt.name, incident.name)
            waited = self._clock.monotonic() - self._dump_asked_at.setdefault(incident.name, self._clock.monotonic())
            if len(texts) >= attempt.ranks or waited > self._policy.dump_seconds:
                yield _stacks_taken(attempt, incident, texts)

    def _is_over(
        self,
        state: State,
        attempt: Attempt,
        report: NodeRanksReport | None,
        whole: NodeRanksReport | None,
        node: str,
    ) -> bool:
        """Whether no rank runs there, and none will. `report`: what `whole` says of the present generation."""
        if self._is_lost(state, attempt, node) or (report is not None and report.done):
            return True
        # What never started there never will, once the agent has acted on orders after the stop.
        stopped = attempt.stop_seq is not None and self._nodes.orders_seen(node) >= (state.epoch, attempt.stop_seq)
        return stopped and (whole is None or whole.done)

    def _is_lost(self, state: State, attempt: Attempt, node: str) -> bool:
        holder = state.held.get(node)
        if holder is None:
            return True
        # A node that is held again is held by a newer allocation, whose agent does not know the attempt.
        return self._nodes.lost(node) or holder.intended_at > attempt.needed_since(node)

    def _awaits_end_reason(self, state: State, attempt: Attempt, failed: Mapping[RankExit, str]) -> bool:
        """Whether the scheduler seems to end the job: its reason is then the cause, so wait for it.

        The first rank ended by a stop signal that we did not send, and its agent has had notice from the scheduler.
        """
        if not failed or attempt.stop_why is not None or not set(attempt.nodes) <= state.held.keys():
            return False
        first = self._blame(failed).first
        if _STOP_SIGNALS.isdisjoint((first.signal, (first.code or 0) - 128)) or not self._nodes.warned(first.node):
            return False
        since = self._failed_since(attempt)
        return self._clock.monotonic() - since < END_REASON_SECONDS

    def _failed_rank(
        self, state: State, attempt: Attempt, failed: Mapping[RankExit, str], over: bool
    ) -> Iterator[Event]:
        if not failed or attempt.stop_why is not None:
            return
        since = self._failed_since(attempt)
        found = self._blame(failed)
        if not over and self._clock.monotonic() - since < self._debounce(attempt, found, failed):
            return
        raised = self._signal(attempt, found, failed)
        if raised.key in state.signals:
            return
        if raised.signal == FailureClass.CHECKPOINT_REFUSED and attempt.checkpoint is not None:
            yield CheckpointRefused(checkpoint=attempt.checkpoint, why="the trainer refused to resume from it")
        yield from self._training.report_progress(attempt)  # an end after the last step is another one than before it
        yield raised

    def _failed_since(self, attempt: Attempt) -> float:
        """When a rank of the present generation was first found to have failed."""
        return self._failed_at.setdefault((attempt.name, attempt.generation), self._clock.monotonic())

    def _debounce(self, attempt: Attempt, found: Blame, failed: Iterable[RankExit]) -> float:
        """Seconds in which a first failure may still become known. Where peers do not die of it, it is known at once.

        While ranks are being replaced, losses of a moment are one loss: each costs a generation.
        """
        if self._outlives(attempt):
            if any(ended.code == ExitCode.NO_COMMON_STEP for ended in failed):
                return 0.0
            if not found.victim:
                return 0.0 if attempt.rejoining is None else _SECOND_LOSS_DEBOUNCE_SECONDS
        return _VICTIMS_DEBOUNCE_SECONDS if found.victim else _FIRST_FAILURE_DEBOUNCE_SECONDS

    def _outlives(self, attempt: Attempt) -> bool:
        """Whether the ranks of the attempt outlive the death of one of them."""
        return self._policy.in_place and attempt.first_step is not None and is_capable(attempt)

    def _blame(self, failed: Mapping[RankExit, str]) -> Blame:
        """Who failed first, and why. If their words cannot be read, how they ended still can."""
        found = self._guard.call("the reason of an exit", lambda: blame(failed), None)
        return found or blame(dict.fromkeys(failed, ""))

    def _signal(self, attempt: Attempt, found: Blame, failed: Collection[RankExit]) -> SignalRaised:
        last = self._training.last(attempt)
        xids = self._nodes.xids_since(found.first.node, found.first.at - _XIDS_SECONDS)
        evidence = {**evidence_of(found, len(failed)), **({"xids": xids} if xids else {})}
        if self._outlives(attempt):
            evidence |= losses_of(failed)
        return SignalRaised(
            generation=attempt.generation,
            signal=found.kind,
            tier=Tier.ACT,
            attempt=attempt.name,
            step=last.step if last else None,
            onset_step=self._training.agreed if found.kind is FailureClass.SILENT_DATA_CORRUPTION else None,
            at=found.first.at,
            nodes=places(found),
            rule="first rank that ended with a signal or with a code other than 0",
            evidence=evidence,
        )

    def _ended(self, state: State, attempt: Attempt, reports: Mapping[str, NodeRanksReport]) -> AttemptEnded:
        exits = tuple(sorted((x for report in reports.values() for x in report.exits), key=lambda rank: rank.at))
        unreachable = tuple(node for node in attempt.nodes if self._is_lost(state, attempt, node))
        if attempt.ranks and len(exits) == attempt.ranks and all(rank.code == 0 for rank in exits):
            outcome = Outcome.COMPLETED
        elif attempt.stop_why is not None:
            outcome = Outcome.STOPPED
        elif unreachable:
            outcome = Outcome.LOST
        else:
            outcome = Outcome.FAILED
        last = self._training.last(attempt)
        return AttemptEnded(
            attempt=attempt.name,
            outcome=outcome,
            last_step=last.step if last else attempt.last_step,
            last_step_at=last.ts if last else attempt.last_step_at,
            exits=exits[:_EXITS],
            unreachable=unreachable,
            ended=Counter(f"signal {x.signal}" if x.signal is not None else f"code {x.code}" for x in exits),
        )


def _stacks_taken(attempt: Attempt, incident: Incident, texts: Mapping[int, str]) -> StacksTaken:
    found = group(texts, attempt.ranks)
    return StacksTaken(
        attempt=attempt.name,
        incident=incident.name,
        groups=found.groups,
        odd=found.odd,
        silent=found.silent,
        nodes=attempt.nodes_of(found.odd),
    )
