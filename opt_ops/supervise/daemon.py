"""The loop: a supervisor for every lineage that is alive, and the projections drawn by processes of their own.

The daemon may be killed at any moment; training goes on, and the next daemon goes on where this one was. A fault in one
lineage's supervisor ends that supervisor, not the daemon: it is begun anew after a pause, as after a crash.
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
from opt_ops.errors import OptOpsError, Refused
from opt_ops.node import agent
from opt_ops.ports import Alert, Ports, Scheduler
from opt_ops.runfolder import lineages
from opt_ops.runfolder.checkpoints import FileCheckpoints
from opt_ops.runfolder.files import read_json, write_json
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.runfolder.journal import Fenced, JournalError
from opt_ops.runfolder.node_files import FileAgents
from opt_ops.runfolder.trainer_files import FileTrainer
from opt_ops.supervise.executor import Site
from opt_ops.supervise.projections import Projection
from opt_ops.supervise.supervisor import Life, Supervisor

_FAILURES = 3  # of a lineage's supervisor in a row, before a human is called
_PAUSE_SECONDS = 10.0  # before a supervisor that failed is begun anew
_SIGN_SECONDS = 2.0  # between signs of life

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
        self._config = config
        self._config_path = config_path
        alerts = config.alerts
        self._policy, _ = playbook_loader.load(
            config.playbooks or playbook_loader.folder(),
            expected_gpus=config.health.gpus_per_node,
            least_alert=Severity(alerts.least) if alerts.urls else None,
        )
        self._alerts = UrlNotifier(alerts.urls, alerts.least)
        self._alive = DeadManSwitch(alerts.heartbeat_url, alerts.heartbeat_seconds)
        self._outbox = Outbox(self._alerts.send)
        self._failures: dict[Path, int] = {}  # in a row
        self._supervisors: dict[Path, Supervisor] = {}
        self._projections: dict[Path, list[Projection]] = {}
        self._not_before: dict[Path, float] = {}
        self._finished: set[Path] = set()
        self._last_sign: float | None = None
        self._signed_at = 0.0
        self._stopping = False

    def run(self, until_idle: bool = False) -> None:
        """Until SIGTERM or SIGINT; with `until_idle`, until no lineage is alive.

        Raises:
            Refused: another daemon of this host has the runs folder.
        """
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        runs = self._config.runs
        try:
            runs.mkdir(parents=True, exist_ok=True)
            lock = (runs / "daemon.lock").open("a")
        except OSError as error:
            raise OptOpsError(f"{runs} cannot be written: {error}", "opt-ops doctor looks at the site") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Refused(f"a daemon runs already for {runs}", "opt-ops daemon status says which") from error
            except OSError as error:  # Lustre mounted without flock; the journal's epochs fence all the same
                log.warning("%s cannot be locked: %s. Two daemons here would take turns", runs, error)
            previous = read_json(runs / "daemon.json")
            self._last_sign = previous["ts"] if previous else None
            log.info("daemon %s watches %s, policy %s", __version__, runs, self._policy.version)
            if self._config.mlflow.enabled and not is_installed("mlflow"):
                log.info("MLflow is not installed, so lineages are not mirrored: pip install 'opt-ops[mlflow]'")
            while not self._stopping:
                began = time.monotonic()
                self._step()
                if (
                    until_idle
                    and not self._supervisors
                    and all(p.idle for ps in self._projections.values() for p in ps)
                ):
                    break
                time.sleep(max(0.0, self._config.tick_seconds - (time.monotonic() - began)))

    def _stop(self, number: int, _: object) -> None:
        log.info("signal %d: leaving; training goes on", number)
        self._stopping = True

    def _step(self) -> None:
        for path in lineages.folders(self._config.runs):
            if path not in self._supervisors and time.monotonic() >= self._not_before.get(path, 0.0):
                self._guard(path, self._take_over)
        for path in list(self._supervisors):
            self._guard(path, self._tick)
        for path, projections in self._projections.items():
            for projection in projections:
                projection.step(now=path not in self._supervisors)
        for alert, why in self._outbox.delivered():
            if why:
                log.error("%s was not delivered: %s", alert, why)
        self._sign()
        self._alive.step()

    def _guard(self, path: Path, work: Callable[[Path], None]) -> None:
        """One lineage's fault must not end the watch over the others."""
        try:
            work(path)
        except (Fenced, JournalError, IllegalTransition) as error:
            log.error("lineage %s is not watched by this daemon any more: %s. %s", path.name, error, _hint(error))
            self._let_go(path, pause=float("inf"))
            if not isinstance(error, Fenced):  # else another daemon watches it
                self._page(path, f"{error}\n{_hint(error)}")
        except Exception as error:
            log.exception("lineage %s: begun anew in %g s", path.name, _PAUSE_SECONDS)
            self._let_go(path, pause=_PAUSE_SECONDS)
            self._failures[path] = self._failures.get(path, 0) + 1
            if self._failures[path] == _FAILURES:
                self._page(path, f"{_FAILURES} times in a row: {error!r}")

    def _page(self, path: Path, why: str) -> None:
        """Nobody watches it, and its journal cannot say so."""
        title = f"opt-ops {path.name}: not watched, a human is needed"
        body = f"{why}\nTraining goes on, unwatched. Next: the daemon's log, and opt-ops daemon status"
        self._outbox.send(Alert(f"{path.name}/unwatched/{time.time():.0f}", Severity.PAGE, title, body))

    def _take_over(self, path: Path) -> None:
        if not FileInbox(path).requests():
            if path in self._finished:
                return
            state = lineages.state(path)
            if state.settled or state.lineage is None:
                self._finished.add(path)
                return
        clock = SystemClock()
        ports = Ports(
            clock=clock,
            scheduler=self._scheduler(path),
            agents=FileAgents(path),
            trainer=FileTrainer(path),
            checkpoints=FileCheckpoints(path),
            inbox=FileInbox(path),
            notifier=Outbox(self._alerts.send),
        )
        trainer = self._config.trainer
        site = Site(
            folder=str(path),
            trainer=tuple(trainer.command),
            environment=trainer.environment,
            burn_in_seconds=self._config.health.burn_in_seconds,
            snapshot_dir=trainer.snapshot_dir.rstrip("/"),
            checkpoint_copy=trainer.checkpoint_copy.rstrip("/"),
        )
        life = Life(host=socket.gethostname(), pid=os.getpid(), last_sign=self._last_sign)
        supervisor = Supervisor(path, ports, self._policy, site, life)
        for note in supervisor.notes:
            log.warning("lineage %s: journal: %s", path.name, note)
        log.info("lineage %s: epoch %d, %s", path.name, supervisor.state.epoch, supervisor.state.status)
        self._supervisors[path] = supervisor
        self._projections.setdefault(path, self._new_projections(path))

    def _tick(self, path: Path) -> None:
        supervisor = self._supervisors[path]
        status = supervisor.state.status
        news = supervisor.tick()
        self._failures.pop(path, None)
        if news:
            for projection in self._projections[path]:
                projection.due = True
        if supervisor.state.status is not status:
            log.info("lineage %s: %s → %s %s", path.name, status, supervisor.state.status, supervisor.state.why)
        if supervisor.state.settled:
            self._let_go(path, pause=0.0)

    def _let_go(self, path: Path, pause: float) -> None:
        supervisor = self._supervisors.pop(path, None)
        if supervisor is not None:
            supervisor.close()
        self._not_before[path] = time.monotonic() + pause

    def _scheduler(self, path: Path) -> Scheduler:
        config = self._config
        if config.scheduler == "local":
            return LocalScheduler(path, config.local.nodes)
        from opt_ops.adapters.slurm import SlurmOptions, SlurmScheduler

        return SlurmScheduler(path, SlurmOptions(**config.slurm.model_dump()), agent.main)

    def _new_projections(self, path: Path) -> list[Projection]:
        config = self._config
        option = ("-c", str(self._config_path)) if self._config_path else ()
        drawn = [Projection((*option, "logbook", "render", path.name, "-q"), config.chronicle.every_seconds)]
        if config.mlflow.enabled and is_installed("mlflow"):
            drawn.append(Projection((*option, "mlflow", "sync", path.name, "-q"), config.mlflow.every_seconds))
        return drawn

    def _sign(self) -> None:
        if time.monotonic() - self._signed_at < _SIGN_SECONDS:
            return
        self._signed_at = time.monotonic()
        self._last_sign = time.time()
        sign = {
            "v": 1,
            "ts": self._last_sign,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": __version__,
            "policy": self._policy.version,
            "lineages": sorted(path.name for path in self._supervisors),
        }
        try:
            write_json(self._config.runs / "daemon.json", sign)
        except OSError as error:  # a full disk must not end the watch over lineages whose disk has room
            log.error("no sign of life: %s", error)


def _hint(error: Exception) -> str:
    return getattr(error, "hint", "") or "please report this: opt-ops made an event that cannot follow"
