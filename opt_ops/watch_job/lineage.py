"""The lineage that a watch writes: journal, telemetry, decisions as advice, alerts. It is in the site's `runs` folder.

The same detectors, the same `decide` and the same journal as under the daemon. The driver is `shadow`, so every
decision is advice, and nothing here carries out any intent but alerts.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_ops import __version__
from opt_ops.adapters.outbox import Outbox
from opt_ops.contract.telemetry import LineFile
from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.rules import decide
from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.events import (
    AlertSettled,
    AttemptEnded,
    AttemptIntended,
    DaemonStarted,
    Event,
    LineageStarted,
    SignalRaised,
    WatcherFailed,
    WatcherRecovered,
)
from opt_ops.core.names import attempt_folder, attempt_name
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.text import clean
from opt_ops.core.values import Checkpoint, Driver, Outcome, Shape
from opt_ops.ports import Alert, Clock, Rejoined, TrainerConfig, TrainerPhase
from opt_ops.runfolder import lineages
from opt_ops.runfolder.files import write_json
from opt_ops.runfolder.journal import Fenced, Journal, JournalError
from opt_ops.runfolder.liveness import JOB_WATCH_FILE
from opt_ops.runfolder.telemetry import point_of
from opt_ops.supervise.deliveries import Deliveries
from opt_ops.supervise.guard import Guard
from opt_ops.supervise.training_signals import signal_of
from opt_ops.supervise.watch_training import TrainingWatch

_SIGN_SECONDS = 5.0  # between two writes of the liveness file
_ROUNDS = 50  # of decisions at once
_LONGEST_WHY = 500

log = logging.getLogger(__name__)


class _LogTrainer:
    """The trainer's files of a watched job: the points that its log tells, and nothing else."""

    def __init__(self) -> None:
        self.new: deque[Point] = deque()

    def config(self, attempt: str) -> TrainerConfig | None:  # noqa: ARG002
        """A log has no settings."""
        return None

    def points(self, attempt: str) -> Sequence[Point]:  # noqa: ARG002
        """The points since the last call."""
        found = tuple(self.new)
        self.new.clear()
        return found

    def phases(self, attempt: str) -> Sequence[TrainerPhase]:  # noqa: ARG002
        """A log has no phases."""
        return ()

    def members(self, attempt: str) -> Sequence[Rejoined]:  # noqa: ARG002
        """Nobody replaces ranks of a job that is only watched."""
        return ()

    def inject(self, attempt: str, drills: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: the job is not touched."""


class _NoCheckpoints:
    """The checkpoints of a watched job are not known."""

    def committed(self, run: str) -> Sequence[Checkpoint]:  # noqa: ARG002
        """None."""
        return ()

    def examine(self, checkpoint: Checkpoint) -> None:
        """Nothing."""

    def written(self, checkpoint: Checkpoint) -> int:  # noqa: ARG002
        """None is there."""
        return 0

    def pin(self, checkpoint: Checkpoint, holder: str = "") -> None:
        """Nothing: the job is not touched."""

    def unpin(self, checkpoint: Checkpoint, holder: str) -> None:
        """Nothing: the job is not touched."""

    def examined(self) -> Sequence[tuple[Checkpoint, str]]:
        """None."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What is watched, for the lineage's first entry: `recipe` names it in the logbook."""

    recipe: str
    settings: tuple[str, ...]
    author: str
    job: str  # empty: a log alone


class ShadowLineage:
    """A new lineage that this process alone writes."""

    def __init__(
        self,
        runs: Path,
        group: str,
        watched: Watched,
        policy: Policy,
        clock: Clock,
        outbox: Outbox,
        on_signal: Callable[[SignalRaised], None],
    ) -> None:
        """Make the lineage's folder and journal. `on_signal` is called for each finding that is new.

        Raises:
            OptOpsError, OSError: the runs folder cannot be written.
        """
        self.path = lineages.create(runs, group)
        self._job = watched.job
        self._sign_at = -_SIGN_SECONDS
        self._clock = clock
        self.show_life()  # before anything else: the daemon leaves such a folder alone
        self._policy = policy
        self._outbox = outbox
        self._on_signal = on_signal
        self._journal = Journal(self.path / "journal")
        self.state = State()
        self._guard = Guard(clock, (Fenced, JournalError))
        self._trainer = _LogTrainer()
        self._training = TrainingWatch(policy, self._trainer, _NoCheckpoints(), clock, self._guard)
        self._deliveries = Deliveries()
        self._telemetry: LineFile | None = None
        self.record(
            DaemonStarted(
                host=socket.gethostname(),
                pid=os.getpid(),
                version=__version__,
                policy=policy.version,
                blind_seconds=None,
            )
        )
        self.record(
            LineageStarted(
                request=str(uuid.uuid4()),
                author=watched.author,
                lineage=self.path.name,
                recipe=watched.recipe,
                settings=watched.settings,
                shape=Shape(nodes=1, spares=0, ranks_per_node=1),
                driver=Driver.SHADOW,
            )
        )
        self.decide()

    @property
    def attempt(self) -> Attempt:
        """The newest attempt. The first one is there from the beginning."""
        attempt = self.state.attempt
        assert attempt is not None
        return attempt

    @property
    def last(self) -> Point | None:
        """The newest point of the newest attempt."""
        return self._training.last(self.attempt)

    # ---- what is written

    def record(self, event: Event) -> None:
        """Journal an event and fold it. A finding that is known already is left out.

        Raises:
            Fenced, OSError: the journal cannot be written.
        """
        if isinstance(event, SignalRaised) and event.key in self.state.signals:
            return
        entry = self._journal.stamp(event, self._clock.now())
        state = fold(self.state, entry)
        self._journal.append(entry)
        self.state = state
        if isinstance(event, SignalRaised):
            self._on_signal(event)

    def add(self, line: Mapping[str, Any]) -> Point:
        """Write a line of telemetry, as docs/formats.md says. Returns its point, for the detectors.

        Raises:
            BadField: the line is not as promised.
            OSError: the file cannot be written.
        """
        point = point_of(line)
        if self._telemetry is None:
            folder = self.path / attempt_folder(self.attempt.name)
            folder.mkdir(parents=True, exist_ok=True)
            self._telemetry = LineFile(folder / "telemetry.jsonl")
        self._telemetry.write(line)
        self._trainer.new.append(point)
        return point

    def begin_again(self, step: int) -> None:
        """The job began again, and its first line is of this step: the next attempt of the run."""
        self.observe()
        self.end_attempt(Outcome.LOST)
        run = self.attempt.run
        number = sum(each.run == run for each in self.state.attempts.values())
        checkpoint = Checkpoint(run=run, step=max(0, step - 1), path="not known: the log shows the step only")
        self.record(
            AttemptIntended(
                attempt=attempt_name(run, number),
                run=run,
                nodes=(),
                ranks_per_node=0,
                checkpoint=checkpoint if step > 1 else None,
                incident=None,
            )
        )
        self._telemetry = None

    def end_attempt(self, outcome: Outcome) -> None:
        """The newest attempt's processes are gone."""
        attempt, last = self.attempt, self.last
        if not attempt.live:
            return
        self.report_progress()
        self.record(
            AttemptEnded(
                attempt=attempt.name,
                outcome=outcome,
                last_step=last.step if last else attempt.last_step,
                last_step_at=last.ts if last else attempt.last_step_at,
                exits=(),
            )
        )

    def report_progress(self) -> None:
        """Journal how far telemetry has come."""
        for event in self._training.report_progress(self.attempt):
            self.record(event)

    # ---- what is concluded

    def observe(self) -> None:
        """Run the detectors over the new points, and decide."""
        self._take(self._training.observe(self.state))
        self.decide()

    def found(self, findings: Iterable[Finding]) -> None:
        """Journal findings that are none of the detectors'."""
        for finding in findings:
            self.raised(signal_of(self.attempt, finding))

    def raised(self, signal: SignalRaised) -> None:
        """Journal a finding, after the progress that it is judged by."""
        if signal.key not in self.state.signals:
            self.report_progress()
            self.record(signal)

    def decide(self) -> None:
        """Decide until nothing is left to decide. All of it is advice."""
        for _ in range(_ROUNDS):
            event = self._guard.call("decisions", lambda: decide(self.state, self._clock.now(), self._policy), None)
            if event is None:
                return
            self.record(event)

    def _take(self, events: Iterable[Event]) -> None:
        for event in events:
            self.record(event)

    def tell_blind(self, part: str, why: str) -> bool:
        """Journal that a part of the watch sees nothing, or (empty `why`) that it sees again. Returns what is new."""
        failing = self.state.failing.get(part)
        if why and failing is None:
            self.record(WatcherFailed(watcher=part, why=clean(why, _LONGEST_WHY)))
        elif not why and failing is not None:
            self.record(WatcherRecovered(watcher=part))
        else:
            return False
        return True

    # ---- the process itself

    def show_life(self, *, left: bool = False) -> None:
        """Let commands see that somebody watches, every few seconds; `left`: this process ends now."""
        now = time.monotonic()
        if not left and now - self._sign_at < _SIGN_SECONDS:
            return
        self._sign_at = now
        at = self._clock.now()
        sign: dict[str, Any] = {"v": 1, "host": socket.gethostname(), "pid": os.getpid(), "ts": at, "job": self._job}
        try:
            write_json(self.path / JOB_WATCH_FILE, sign | ({"left_at": at} if left else {}))
        except OSError as error:  # a full disk: the journal tells of it, too
            log.error("the liveness file of lineage %s cannot be written: %s", self.path.name, error)

    def deliver_alerts(self) -> bool:
        """Hand open alerts to the notifier, and note what became of them. Returns whether any is under way."""
        now = self._clock.monotonic()
        for name, problem in self._outbox.delivered():
            alert = self.state.alerts.get(name)
            if alert is None or alert.delivered is not None:
                continue
            given_up = self._deliveries.given_up(alert.told.severity, self._clock.now() - alert.at)
            if not problem or given_up:
                self.record(AlertSettled(alert=name, delivered=not problem, why=problem))
        for name, alert in self.state.alerts.items():
            told = alert.told
            if alert.delivered is None and self._deliveries.due(name, told.severity, now):
                self._deliveries.tried(name, told.severity, now)
                self._outbox.send(Alert(told.alert, told.severity, told.title, told.body))
        return self._outbox.busy

    def close(self) -> None:
        """Close the journal, leave a snapshot for commands, and say that nobody watches any more."""
        self.show_life(left=True)
        self._journal.save_snapshot(self.state)
        self._journal.close()
        self._outbox.close()
