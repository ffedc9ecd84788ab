"""The daemon: one supervisor for each lineage that is not finished, and the projections of their journals.

The daemon may be killed at any moment. Training continues, and the next daemon process continues the watch from the
journal. An error in the supervisor of one lineage ends that supervisor only. The daemon starts it again after a pause,
as after a crash.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from opt_ops import __version__, playbook_loader
from opt_ops.adapters.local import LocalScheduler
from opt_ops.adapters.notify import DeadManSwitch, UrlNotifier
from opt_ops.adapters.outbox import Outbox
from opt_ops.config import Config, is_installed
from opt_ops.core.state.status import IllegalTransition
from opt_ops.core.values import Severity
from opt_ops.core.waiting import Backoff, Retries
from opt_ops.errors import OptOpsError, Refused
from opt_ops.node import agent
from opt_ops.ports import Alert, Ports, Scheduler
from opt_ops.runfolder import lineages
from opt_ops.runfolder.checkpoints import FileCheckpoints
from opt_ops.runfolder.files import read_json, write_json
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.runfolder.journal import Fenced, JournalError
from opt_ops.runfolder.node_files import FileAgents
from opt_ops.runfolder.owner import OwnerWatch
from opt_ops.runfolder.trainer_files import FileTrainer
from opt_ops.supervise.executor import Site
from opt_ops.supervise.projections import Projection
from opt_ops.supervise.supervisor import DaemonIdentity, Supervisor

_PAGE_AT_FAILURES = 3  # in a row, of one lineage's supervisor
_RESTART_BACKOFF = Backoff(first=10.0)
_LIVENESS_SECONDS = 2.0  # between two writes of the liveness file

log = logging.getLogger(__name__)


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never jump."""
        return time.monotonic()


class Daemon:
    """Supervises every lineage of one runs folder."""

    def __init__(self, config: Config, config_path: Path | None = None) -> None:
        """`config_path` is passed on to the processes that draw projections."""
        self._config = config
        self._config_path = config_path
        alerts = config.alerts
        self._policy, _ = playbook_loader.load(
            config.playbooks or playbook_loader.folder(),
            expected_gpus=config.health.gpus_per_node,
            least_alert=Severity(alerts.least) if alerts.urls else None,
        )
        self._alerts = UrlNotifier(alerts.urls, alerts.least)
        self._dead_man_switch = DeadManSwitch(alerts.heartbeat_url, alerts.heartbeat_seconds)
        self._outbox = Outbox(self._alerts.send)
        self._supervisors: dict[Path, Supervisor] = {}
        self._projections: dict[Path, list[Projection]] = {}
        self._restarts = Retries(_RESTART_BACKOFF)
        self._finished: set[Path] = set()
        self._abandoned: dict[Path, tuple[OwnerWatch, bool]] = {}
        """Lineages that this daemon must not or cannot watch now; and whether it was fenced, or cannot read them."""
        self._last_liveness: float | None = None
        self._liveness_at = 0.0
        self._stopping = False

    def run(self, until_idle: bool = False) -> None:
        """Supervise until SIGTERM or SIGINT; with `until_idle`, until every lineage is finished.

        Raises:
            OptOpsError: the runs folder cannot be written.
            Refused: another daemon of this host has the runs folder.
        """
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        runs = self._config.runs
        try:
            runs.mkdir(parents=True, exist_ok=True)
            lock = (runs / "daemon.lock").open("a")
        except OSError as error:
            raise OptOpsError(f"{runs} cannot be written: {error}", "opt-ops doctor checks the site") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Refused(f"a daemon already runs for {runs}", "opt-ops daemon status shows it") from error
            except OSError as error:  # Lustre mounted without flock; the journal's epochs fence all the same
                log.warning("%s cannot be locked: %s. Do not start a second daemon for this folder", runs, error)
            previous = read_json(runs / "daemon.json")
            self._last_liveness = previous["ts"] if previous else None
            log.info("daemon %s watches %s, policy %s", __version__, runs, self._policy.version)
            if self._config.mlflow.enabled and not is_installed("mlflow"):
                log.info("MLflow is not installed, so lineages are not mirrored: pip install 'opt-ops[mlflow]'")
            while not self._stopping:
                began = time.monotonic()
                self._step()
                if until_idle and self._idle():
                    break
                time.sleep(max(0.0, self._config.tick_seconds - (time.monotonic() - began)))

    def _stop(self, number: int, _: object) -> None:
        log.info("signal %d: the daemon stops; training continues", number)
        self._stopping = True

    def _idle(self) -> bool:
        return not self._supervisors and all(each.idle for drawn in self._projections.values() for each in drawn)

    def _step(self) -> None:
        for path in lineages.folders(self._config.runs):
            if self._may_take_over(path):
                self._isolated(path, self._take_over)
        for path in list(self._supervisors):
            self._isolated(path, self._tick)
        for path, projections in self._projections.items():
            for projection in projections:
                projection.step(now=path not in self._supervisors)
        for alert, problem in self._outbox.delivered():
            if problem:
                log.error("alert %s was not delivered: %s", alert, problem)
        self._write_liveness()
        self._dead_man_switch.step()

    def _may_take_over(self, path: Path) -> bool:
        known = path in self._supervisors or not self._reconsidered(path)
        return not known and self._restarts.due(path, time.monotonic())

    def _reconsidered(self, path: Path) -> bool:
        """Whether nothing speaks against watching the lineage: its other owner is dead, or its journal was repaired."""
        if path in self._abandoned:
            watch, fenced = self._abandoned[path]
            try:
                if not (watch.dead(time.monotonic()) if fenced else watch.changed()):
                    return False
            except OSError:
                return False
            log.info("lineage %s is watched by this daemon again", path.name)
            del self._abandoned[path]
        return True

    def _isolated(self, path: Path, work: Callable[[Path], None]) -> None:
        """Do one lineage's work. An error in it must not end the watch over the other lineages."""
        try:
            work(path)
        except (Fenced, JournalError, IllegalTransition) as error:
            log.error("lineage %s is not watched by this daemon any more: %s. %s", path.name, error, _hint(error))
            self._release_lineage(path)
            watch = OwnerWatch(path / "journal", time.monotonic())
            self._abandoned[path] = watch, isinstance(error, Fenced)
            if not isinstance(error, Fenced):  # a fenced lineage is watched by another daemon
                self._page(path, f"{error}\n{_hint(error)}")
        except Exception as error:
            self._release_lineage(path)
            failures = self._restarts.tried(path, time.monotonic())
            found = f"{type(error).__name__}: {error}"
            log.exception(
                "lineage %s: supervisor failed (%s); restarting in %g s (failure %d; on-call is paged at %d)",
                *(path.name, found, _RESTART_BACKOFF.pause(failures), failures, _PAGE_AT_FAILURES),
            )
            if failures == _PAGE_AT_FAILURES:
                self._page(path, f"its supervisor failed {failures} times in a row: {found}")

    def _take_over(self, path: Path) -> None:
        if not FileInbox(path).requests():
            if path in self._finished:
                return
            state = lineages.state(path)
            if state.finished or state.lineage is None:
                self._finished.add(path)
                return
        ports = Ports(
            clock=SystemClock(),
            scheduler=self._scheduler(path),
            agents=FileAgents(path),
            trainer=FileTrainer(path),
            checkpoints=FileCheckpoints(path),
            inbox=FileInbox(path),
            notifier=Outbox(self._alerts.send),
        )
        identity = DaemonIdentity(host=socket.gethostname(), pid=os.getpid(), last_liveness=self._last_liveness)
        supervisor = Supervisor(path, ports, self._policy, self._site(path), identity)
        for note in supervisor.notes:
            log.warning("lineage %s: journal: %s", path.name, note)
        log.info("lineage %s: epoch %d, %s", path.name, supervisor.state.epoch, supervisor.state.status)
        self._supervisors[path] = supervisor
        self._projections.setdefault(path, self._new_projections(path))

    def _tick(self, path: Path) -> None:
        supervisor = self._supervisors[path]
        status = supervisor.state.status
        changed = supervisor.tick()
        self._restarts.succeeded(path)
        if changed:
            for projection in self._projections[path]:
                projection.stale = True
        if supervisor.state.status is not status:
            log.info("lineage %s: %s → %s %s", path.name, status, supervisor.state.status, supervisor.state.why)
        if supervisor.settled:
            self._release_lineage(path)

    def _release_lineage(self, path: Path) -> None:
        supervisor = self._supervisors.pop(path, None)
        if supervisor is not None:
            supervisor.close()

    def _page(self, path: Path, why: str) -> None:
        """Page on-call for a lineage that is not watched: its journal cannot carry this alert."""
        title = f"opt-ops {path.name}: not watched, an operator is needed"
        body = f"{why}\nTraining continues, but no daemon watches it. Next: the daemon's log, and opt-ops daemon status"
        self._outbox.send(Alert(f"{path.name}/unwatched/{time.time():.0f}", Severity.PAGE, title, body))

    def _scheduler(self, path: Path) -> Scheduler:
        config = self._config
        if config.scheduler == "local":
            return LocalScheduler(path, config.local.nodes)
        from opt_ops.adapters.slurm import SlurmOptions, SlurmScheduler

        return SlurmScheduler(path, SlurmOptions(**config.slurm.model_dump()), agent.main)

    def _site(self, path: Path) -> Site:
        trainer = self._config.trainer
        return Site(
            folder=str(path),
            trainer=tuple(trainer.command),
            environment=trainer.environment,
            burn_in_seconds=self._config.health.burn_in_seconds,
            snapshot_dir=trainer.snapshot_dir.rstrip("/"),
            checkpoint_copy=trainer.checkpoint_copy.rstrip("/"),
        )

    def _new_projections(self, path: Path) -> list[Projection]:
        config = self._config
        option = ("-c", str(self._config_path)) if self._config_path else ()
        drawn = [Projection((*option, "logbook", "render", path.name, "-q"), config.chronicle.every_seconds)]
        if config.mlflow.enabled and is_installed("mlflow"):
            drawn.append(Projection((*option, "mlflow", "sync", path.name, "-q"), config.mlflow.every_seconds))
        return drawn

    def _write_liveness(self) -> None:
        if time.monotonic() - self._liveness_at < _LIVENESS_SECONDS:
            return
        self._liveness_at = time.monotonic()
        self._last_liveness = time.time()
        liveness = {
            "v": 1,
            "ts": self._last_liveness,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": __version__,
            "policy": self._policy.version,
            "lineages": sorted(path.name for path in self._supervisors),
        }
        try:
            write_json(self._config.runs / "daemon.json", liveness)
        except OSError as error:  # a full disk must not end the watch over lineages whose disk has room
            log.error("the liveness file cannot be written: %s", error)


def _hint(error: Exception) -> str:
    return getattr(error, "hint", "") or "This is an error in opt-ops: it made an impossible event. Please report it"
