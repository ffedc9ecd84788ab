"""The daemon: one supervisor for each lineage that is not finished, and the projections of their journals.

The daemon may be killed at any moment. Training continues, and the next daemon process continues the watch from the
journal. An error in the supervisor of one lineage ends that supervisor only. The daemon starts it again after a pause,
as after a crash. What fails for all of them (a folder that cannot be listed, a process that cannot be started) is
logged and told in the liveness file, and the loop goes on.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from opt_ops import __version__
from opt_ops.adapters.notify import DeadManSwitch, UrlNotifier
from opt_ops.adapters.outbox import Outbox
from opt_ops.config import Config, is_installed
from opt_ops.contract.files import open_append
from opt_ops.core.decide.evaluation import to_come
from opt_ops.core.state.model import State
from opt_ops.core.state.status import IllegalTransition
from opt_ops.core.values import Severity
from opt_ops.core.waiting import Backoff, Retries
from opt_ops.errors import OptOpsError, Refused
from opt_ops.ports import Ports
from opt_ops.runfolder import lineages
from opt_ops.runfolder.checkpoints import FileCheckpoints
from opt_ops.runfolder.files import names_in
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.runfolder.journal import Fenced, JournalError
from opt_ops.runfolder.left_out import LeftOutCounter
from opt_ops.runfolder.liveness import JOB_WATCH_FILE, LOCK, look, signs_in, take_lock
from opt_ops.runfolder.node_files import FileAgents
from opt_ops.runfolder.owner import OwnerWatch
from opt_ops.runfolder.permissions import check_trusted, keep_private
from opt_ops.runfolder.trainer_files import FileTrainer
from opt_ops.supervise.beside import BesideDaemon, Place
from opt_ops.supervise.campaigns import Campaigns, SiteOfCampaigns
from opt_ops.supervise.first_look import FirstLook
from opt_ops.supervise.own_sign import OwnSign, Watching
from opt_ops.supervise.projections import Projection
from opt_ops.supervise.site import SystemClock, nodes_taken, projection_of, projections_of, scheduler_of, site_of
from opt_ops.supervise.site_policy import site_policy
from opt_ops.supervise.states_read import StatesRead
from opt_ops.supervise.supervisor import DaemonIdentity, Supervisor
from opt_ops.supervise.watch_alerts import WatchAlerts

_PAGE_AT_FAILURES = 3  # in a row, of one lineage's supervisor
_RESTART_BACKOFF = Backoff(first=10.0)
_LIVENESS_SECONDS = 2.0  # between two looks at the liveness files of other daemons
_SEARCH = "the search for lineages"

log = logging.getLogger(__name__)


class Daemon:
    """Supervises every lineage of one runs folder."""

    def __init__(self, config: Config, config_path: Path | None = None) -> None:
        """`config_path` is passed on to the processes that draw projections."""
        self._config = config
        self._config_path = config_path
        alerts = config.alerts
        self._policy = replace(site_policy(config), least_alert=Severity(alerts.least) if alerts.urls else None)
        self._alerts = UrlNotifier(alerts.urls, alerts.least)
        self._dead_man_switch = DeadManSwitch(alerts.heartbeat_url, alerts.heartbeat_seconds)
        self._outbox = Outbox(self._alerts.send, self._got_through)
        self._watch_alerts = WatchAlerts(self._outbox, SystemClock(), self._was_answered)
        self._sign = OwnSign(config.runs, self._policy.version)
        self._supervisors: dict[Path, Supervisor] = {}
        self._background: dict[Path, tuple[Outbox, FileCheckpoints, BesideDaemon]] = {}
        """What works in threads and processes for a supervised lineage."""
        self._place = Place()
        self._projections: dict[Path, list[Projection]] = {}
        self._restarts = Retries(_RESTART_BACKOFF)
        self._finished: set[Path] = set()
        self._inboxes: dict[Path, FileInbox] = {}
        """Of lineages that are not supervised. An inbox remembers the files that it must not look at again."""
        self._abandoned: dict[Path, _Abandoned] = {}
        """Lineages that this daemon must not or cannot watch now."""
        self._failing: dict[Path, str] = {}
        """Lineages whose supervisor failed, with the reason; tried again after a pause."""
        self._problems: dict[str, tuple[str, float]] = {}
        """What fails for all lineages, by its name: why, and since when."""
        self._states_read = StatesRead(SystemClock())
        self._campaigns = Campaigns(self._site_of_campaigns())
        self._looked_at = 0.0
        self._first_look = FirstLook()
        self._last_liveness: float | None = None
        self._stopping = False

    def run(self, until_idle: bool = False) -> None:
        """Supervise until SIGTERM or SIGINT; with `until_idle`, until every lineage is finished.

        Raises:
            OptOpsError: the runs folder cannot be written.
            Refused: another daemon of this host has the runs folder, or everybody may write it.
        """
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        runs = self._config.runs
        keep_private(self._config.group)
        try:
            runs.mkdir(parents=True, exist_ok=True)
            if warning := check_trusted(runs):
                log.warning("%s", warning)
            lock = open_append(runs / LOCK)
        except OSError as error:
            raise OptOpsError(f"{runs} cannot be written: {error}", "opt-ops doctor checks the site") from error
        with lock:
            try:
                take_lock(lock)
            except BlockingIOError as error:
                raise Refused(f"a daemon already runs for {runs}", "opt-ops daemon status shows it") from error
            except OSError as error:  # Lustre mounted without flock; the journal's epochs fence all the same
                log.warning("%s cannot be locked: %s. Do not start a second daemon for this folder", runs, error)
            self._first_look.learn(signs_in(runs))
            self._watch_alerts.paged |= self._first_look.before.paged if self._first_look.before else {}
            log.info("daemon %s watches %s, policy %s", __version__, runs, self._policy.version)
            if self._config.mlflow.enabled and not is_installed("mlflow"):
                log.info("MLflow is not installed, so lineages are not mirrored: pip install 'opt-ops[mlflow]'")
            while not self._stopping:
                began = time.monotonic()
                self._step()
                if until_idle and self._idle():
                    break
                time.sleep(max(0.0, self._config.tick_seconds - (time.monotonic() - began)))
            self._leave()

    def _stop(self, number: int, _: object) -> None:
        log.info("signal %d: the daemon stops; training continues", number)
        self._stopping = True

    def _leave(self) -> None:
        """Tell that nobody watches any more, and wait for nothing: the next daemon continues all of it."""
        self._sign.write(self._watching(), left=True)
        for path in list(self._background):
            self._close_background(path)
        for supervisor in self._supervisors.values():
            supervisor.close()
        self._campaigns.close()
        self._outbox.close()
        for drawn in self._projections.values():
            for projection in drawn:
                projection.close()

    def _idle(self) -> bool:
        """Whether every lineage has ended and was drawn, and every page was tried. The journal keeps open pages."""
        if _SEARCH in self._problems or self._first_look.left != 0:
            return False
        settled = all(supervisor.settled for supervisor in self._supervisors.values())
        sending = self._outbox.busy or any(outbox.busy for outbox, *_ in self._background.values())
        drawn = all(each.idle for drawn in self._projections.values() for each in drawn)
        return settled and drawn and not sending and self._campaigns.idle

    def _step(self) -> None:
        self._guarded(_SEARCH, self._take_over_all)
        for path in list(self._supervisors):
            self._isolated(path, self._tick)
        for path in list(self._projections):
            self._guarded(f"the projections of lineage {path.name}", lambda path=path: self._project(path))
        if self._campaigns.due and self._first_look.left == 0:  # else it would not know which nodes are taken
            self._guarded("campaigns", self._campaigns.step)
        self._guarded("alerts about the watch", self._tell_who_watches)
        self._guarded("the liveness file", self._write_sign)
        self._guarded("the heartbeat", self._dead_man_switch.step)

    def _guarded(self, what: str, work: Callable[[], None]) -> None:
        """Do a part of the loop that is not one lineage's. An error in it is reported, and the watch goes on.

        The guard is broad on purpose: a file system that does not answer, a process or thread that cannot be started
        and a mistake of ours must cost this part of this round, and nothing else.
        """
        try:
            work()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            before, since = self._problems.get(what, ("", time.time()))
            if why != before:
                log.exception("%s failed; the watch goes on", what)
            self._problems[what] = why, since
        else:
            if self._problems.pop(what, None) is not None:
                log.info("%s: works again", what)

    def _take_over_all(self) -> None:
        may = [path for path in lineages.folders(self._config.runs) if self._may_take_over(path)]
        for path in self._first_look.due(may):
            self._isolated(path, self._take_over)

    def _may_take_over(self, path: Path) -> bool:
        known = path in self._supervisors or not self._reconsidered(path)
        if not known and (path / JOB_WATCH_FILE).exists():
            return False  # `opt-ops run watch-job` writes it, and nobody else ever does
        return not known and self._restarts.due(path, time.monotonic())

    def _reconsidered(self, path: Path) -> bool:
        """Whether nothing speaks against watching the lineage: its other owner is dead, or its journal was repaired."""
        if path in self._abandoned:
            each = self._abandoned[path]
            try:
                if not (each.watch.dead(time.monotonic()) if each.fenced else each.watch.changed()):
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
        except Fenced as error:
            log.error("lineage %s: fenced: %s. This daemon does not watch it any more", path.name, error)
            self._release_lineage(path)
            self._abandon(path, str(error), fenced=True)
            self._watch_alerts.fenced(path.name, str(error))
        except (JournalError, IllegalTransition) as error:
            log.error("lineage %s is not watched by this daemon any more: %s. %s", path.name, error, _hint(error))
            self._release_lineage(path)
            self._abandon(path, str(error), fenced=False)
            self._watch_alerts.unwatched(path.name, f"{error}\n{_hint(error)}")
        except Exception as error:
            self._release_lineage(path)
            failures = self._restarts.tried(path, time.monotonic())
            found = f"{type(error).__name__}: {error}"
            self._failing[path] = f"its supervisor failed {failures} times in a row: {found}"
            log.exception(
                "lineage %s: supervisor failed (%s); restarting in %g s (failure %d; on-call is paged at %d)",
                *(path.name, found, _RESTART_BACKOFF.pause(failures), failures, _PAGE_AT_FAILURES),
            )
            if failures >= _PAGE_AT_FAILURES:
                self._watch_alerts.unwatched(path.name, self._failing[path])

    def _abandon(self, path: Path, why: str, fenced: bool) -> None:
        self._abandoned[path] = _Abandoned(OwnerWatch(path / "journal", time.monotonic()), fenced, why)

    def _fenced(self) -> list[Path]:
        return [path for path, each in self._abandoned.items() if each.fenced]

    def _take_over(self, path: Path) -> None:
        if not self._inboxes.setdefault(path, FileInbox(path)).requests():
            if path in self._finished:
                return
            state = lineages.state(path, keep=True)
            over = state.finished and not to_come(state, time.time(), self._policy)
            if over or state.lineage is None:
                self._finished.add(path)
                return
        outbox, checkpoints = Outbox(self._alerts.send, self._got_through), FileCheckpoints(path)
        evaluations = BesideDaemon(path, self._place)
        left_out = LeftOutCounter(path)
        ports = Ports(
            clock=SystemClock(),
            scheduler=scheduler_of(self._config, path),
            agents=FileAgents(path, left_out),
            trainer=FileTrainer(path, left_out),
            checkpoints=checkpoints,
            inbox=FileInbox(path, left_out),
            notifier=outbox,
            evaluations=evaluations,
            inputs=left_out,
        )
        before = self._first_look.before
        if path in self._projections or path in self._finished:  # this process has looked after it
            last_liveness = self._last_liveness
        else:  # its own sign does not say that anybody watched this lineage
            last_liveness = before.ts if before else None
        identity = DaemonIdentity(host=socket.gethostname(), pid=os.getpid(), last_liveness=last_liveness)
        supervisor = Supervisor(path, ports, self._policy, site_of(self._config, self._config_path, path), identity)
        for note in supervisor.notes:
            log.warning("lineage %s: journal: %s", path.name, note)
        log.info("lineage %s: epoch %d, %s", path.name, supervisor.state.epoch, supervisor.state.status)
        self._supervisors[path] = supervisor
        self._background[path] = outbox, checkpoints, evaluations
        self._projections.setdefault(path, projections_of(self._config, self._config_path, path.name))

    def _tick(self, path: Path) -> None:
        supervisor = self._supervisors[path]
        status = supervisor.state.status
        changed = supervisor.tick()
        self._restarts.succeeded(path)
        self._failing.pop(path, None)
        self._watch_alerts.watched(path.name)
        if changed:
            for projection in self._projections[path]:
                projection.stale = True
        if supervisor.state.status is not status:
            log.info("lineage %s: %s → %s %s", path.name, status, supervisor.state.status, supervisor.state.why)
        if supervisor.finished:
            self._release_lineage(path)

    def _release_lineage(self, path: Path) -> None:
        self._close_background(path)
        supervisor = self._supervisors.pop(path, None)
        if supervisor is not None:
            with suppress(OSError):  # a network file system may report here what it lost
                supervisor.close()

    def _close_background(self, path: Path) -> None:
        for each in self._background.pop(path, ()):
            each.close()

    def _got_through(self) -> None:
        """A message was delivered, so the way is open: pages of all lineages that wait are sent again."""
        self._watch_alerts.got_through()
        for supervisor in self._supervisors.values():
            supervisor.retry_pages()

    def _was_answered(self, lineage: str, since: float) -> bool:
        """Whether an operator has left a request for a lineage since then; nobody reads it, but somebody is there."""
        inbox = self._config.runs / lineage / "inbox"
        return any((inbox / name).stat().st_mtime > since for name in names_in(inbox, ".json"))

    def _tell_who_watches(self) -> None:
        """Send the alerts about lineages that this daemon does not watch, unless another daemon does."""
        fenced = self._fenced()
        if fenced and time.monotonic() - self._looked_at >= _LIVENESS_SECONDS:
            self._looked_at = time.monotonic()
            watch = look(self._config.runs, time.time())
            for path in fenced:
                if watch.over(path.name).watched:
                    self._watch_alerts.watched(path.name)
                else:
                    self._watch_alerts.unwatched_elsewhere(path.name)
        self._watch_alerts.step()

    def _site_of_campaigns(self) -> SiteOfCampaigns:
        config, path = self._config, self._config_path
        every = config.chronicle.every_seconds
        return SiteOfCampaigns(
            runs=config.runs,
            group=config.group,
            clock=SystemClock(),
            lineage=self._lineage_state,
            free_nodes=self._free_nodes,
            projection=lambda words: projection_of(path, words, every),
            warn=self._watch_alerts.warn,
        )

    def _lineage_state(self, name: str) -> State:
        """The state of a lineage. That of none if its journal cannot be trusted: the watch over it has told that."""
        path = self._config.runs / name
        if path in self._supervisors:
            self._states_read.forget(path)
            return self._supervisors[path].state
        distrusted = path in self._abandoned and not self._abandoned[path].fenced
        return State() if distrusted else self._states_read.of(path)

    def _free_nodes(self) -> int | None:
        """The nodes of this machine that no lineage holds or waits for; None where Slurm's queue decides that."""
        if self._config.scheduler != "local":
            return None
        taken = sum(nodes_taken(supervisor.state) for supervisor in self._supervisors.values())
        return len(self._config.local.nodes) - taken

    def _project(self, path: Path) -> None:
        supervisor = self._supervisors.get(path)
        for projection in self._projections[path]:
            projection.step(now=supervisor is None or supervisor.settled)

    def _watching(self) -> Watching:
        projections = [(path.name, each) for path, drawn in self._projections.items() for each in drawn if each.why]
        unwatched = {path.name: each.why for path, each in self._abandoned.items() if not each.fenced}
        return Watching(
            lineages=[path.name for path in self._supervisors],
            fenced=[path.name for path in self._fenced()],
            unwatched=unwatched | {path.name: why for path, why in self._failing.items()},
            paged=self._watch_alerts.paged,
            problems=[
                *({"what": what, "why": why, "since": since} for what, (why, since) in self._problems.items()),
                *({"what": each.name, "why": each.why, "lineage": lineage} for lineage, each in projections),
                *({"what": f"alert {name}", "why": why} for name, why in self._watch_alerts.problems.items()),
            ],
        )

    def _write_sign(self) -> None:
        self._last_liveness = self._sign.write(self._watching()) or self._last_liveness


@dataclass(frozen=True, slots=True)
class _Abandoned:
    """A lineage that this daemon does not watch now: it was fenced, or it cannot read the journal."""

    watch: OwnerWatch
    fenced: bool
    why: str


def _hint(error: Exception) -> str:
    return getattr(error, "hint", "") or "This is an error in opt-ops: it made an impossible event. Please report it"
