"""`opt-ops daemon …`: run the daemon, check it, keep it running."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli.daemon import log as daemon_log
from opt_ops.cli.daemon.units import Form, unit
from opt_ops.cli.shared.options import NO_SITE_HINT, FormatOption, QuietOption, no_site, settings
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.config import FILE, locate
from opt_ops.contract.files import open_append
from opt_ops.core.text import age, clock, iso, printable
from opt_ops.core.values import Severity
from opt_ops.errors import NotDelivered, OptOpsError, Refused, Unavailable, UsageError
from opt_ops.ports import Alert
from opt_ops.runfolder import lineages
from opt_ops.runfolder.liveness import (
    LOCK,
    OLD_SECONDS,
    Sign,
    Watch,
    lives,
    lock_held,
    look,
    may_live_elsewhere,
    signs_in,
)
from opt_ops.runfolder.liveness import is_daemon as _is_daemon

_START_SECONDS = 180.0  # of a busy machine; who ends is told at once
_END_SECONDS = 30.0  # a tick may be waiting for the scheduler

# Slurm sets the first for a job; the second name the cluster itself.
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")

daemon = typer.Typer(no_args_is_help=True, help="Run, check and stop the daemon that watches and recovers.")


@daemon.command("run")
def run_(
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Exit when every lineage is finished.")] = False,
) -> None:
    """Watch and recover every lineage, in the foreground. Ctrl-C ends the daemon, not training.

    Example: opt-ops daemon run
    """
    from opt_ops.supervise.daemon import Daemon

    _drop_job_environment()
    daemon_log.start()
    try:
        Daemon(settings.config, settings.config_path).run(until_idle=until_idle)
    except OptOpsError:
        raise
    except Exception:
        logging.getLogger(__name__).exception("the daemon ends")  # the log must say why: --debug comes too late
        raise


def _drop_job_environment() -> None:
    """If the daemon runs in a Slurm job: the variables of that job must not reach the jobs that it submits."""
    if "SLURM_JOB_ID" not in os.environ:
        return
    for name in list(os.environ):
        if name.startswith(_OF_A_JOB) and name not in _OF_THE_CLUSTER:
            del os.environ[name]


@daemon.command()
def status(output: FormatOption = Format.TABLE) -> None:
    """Show which daemon runs, and what it watches or cannot watch.

    The exit code is 75 if none is running, and 5 if one is running and does not watch a lineage: it was fenced, or it
    cannot read the journal.

    Example: opt-ops daemon status -o json
    """
    runs = settings.config.runs
    watch = look(runs, time.time())
    if watch.last is None:
        raise Unavailable(f"no daemon has ever run for {runs}", "opt-ops daemon ensure")
    rows = [_row(sign, watch) for sign in watch.living or (watch.last,)]
    columns = [Column(name.upper(), name) for name in ("alive", "host", "pid", "age", "lineages", "policy", "version")]
    columns.insert(5, Column("NOT WATCHED", "not_watched"))
    show("opt-ops/daemon-status/1", rows, columns, output)
    if not watch.living:
        say(f"No daemon is running: {watch.why}. Training continues, not watched.")
        say("  next: opt-ops daemon ensure")
        raise typer.Exit(75)
    lost = [line for sign in watch.living for line in _not_watched(sign, watch)]
    for line in [*lost, *(_problem(each) for sign in watch.living for each in sign.problems)]:
        say(printable(line))
    if lost:
        raise typer.Exit(5)


def _row(sign: Sign, watch: Watch) -> dict[str, Any]:
    return {
        "alive": sign in watch.living,
        "host": sign.host,
        "pid": sign.pid,
        "version": sign.version,
        "policy": sign.policy,
        "lineages": list(sign.lineages),
        "fenced": list(sign.fenced),
        "unwatched": dict(sign.unwatched),
        "not_watched": [*sign.fenced, *sign.unwatched],
        "problems": [dict(problem) for problem in sign.problems],
        "left_at": iso(sign.left_at),
        "why": watch.why,
        "last_sign": iso(sign.ts),
        "age": age(watch.now - sign.ts),
    }


def _not_watched(sign: Sign, watch: Watch) -> Iterator[str]:
    for lineage in sign.fenced:
        other = watch.over(lineage)
        now = f"{other.sign.name} watches it" if other.sign else "no living daemon watches it"
        yield f"Lineage {lineage}: {sign.name} was fenced, a newer daemon process has taken it over; {now}."
    for lineage, why in sign.unwatched.items():
        yield f"Lineage {lineage}: {sign.name} does not watch it: {why}"


def _problem(problem: Mapping[str, Any]) -> str:
    of = f"lineage {problem['lineage']}: " if problem.get("lineage") else ""
    return f"Problem: {of}{problem['what']}: {problem.get('why', '')}"


@daemon.command()
def ensure(quiet: QuietOption = False) -> None:
    """Start a daemon in the background if none is running.

    Then wait until it watches.

    It logs to daemon.log in the runs folder. On one host a lock prevents a second daemon; docs/daemon.md says what
    holds across hosts. If no daemon ran for a while, [alerts] are notified. Without a configuration, and without
    lineages, it starts none: this would be another folder than the one that is meant.

    Example: opt-ops daemon ensure
    """
    runs = settings.config.runs
    before = _newest_sign(runs)
    if before is not None and _is_alive(runs, before):
        say(f"A daemon watches {runs}: {before.name}.", quiet)
        return
    if locate(settings.config_path) is None and not lineages.folders(runs):
        nothing = f"there is no {FILE} in {Path.cwd()}, and no lineage in {runs}: a daemon would watch nothing"
        raise UsageError(no_site() or nothing, NO_SITE_HINT)
    began = time.time()
    process = _start(runs)
    sign = _wait_for_liveness(runs, process, began)
    say(f"A daemon watches {runs} now: {sign.name}, log in {runs / 'daemon.log'}.", quiet)
    if "SLURM_JOB_ID" in os.environ:
        say(f"  It ends with Slurm job {os.environ['SLURM_JOB_ID']}.\n  next: opt-ops daemon unit slurm", quiet)
    if before is not None and sign.pid == process.pid:
        _report_gap(before, sign, quiet)


def _newest_sign(runs: Path) -> Sign | None:
    return max(signs_in(runs), key=lambda sign: sign.ts, default=None)


def _is_alive(runs: Path, sign: Sign) -> bool:
    """Whether a daemon must be assumed to run."""
    now = time.time()
    return may_live_elsewhere(sign, now) or lives(sign, now, lock_held(runs))


def _start(runs: Path) -> subprocess.Popen[bytes]:
    """Start a daemon in a session of its own, so that it outlives the caller and its terminal."""
    file = locate(settings.config_path)
    option = ["-c", str(file)] if file else []
    runs.mkdir(parents=True, exist_ok=True)
    with open_append(runs / "daemon.log") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "opt_ops", *option, "daemon", "run"],
            cwd=file.parent if file else None,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_for_liveness(runs: Path, process: subprocess.Popen[bytes], began: float) -> Sign:
    """The first liveness file of the daemon that was started, or of another one that was faster.

    Raises:
        Unavailable: the daemon ended, or it wrote no liveness file in time.
    """
    log = runs / "daemon.log"
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        sign = _newest_sign(runs)
        if sign is not None and sign.ts >= began and sign.left_at is None:
            return sign
        if process.poll() not in (None, Refused.exit_code):
            raise Unavailable(f"the daemon ended with exit code {process.returncode}", f"tail {log}")
        time.sleep(0.1)
    if process.returncode is None:
        raise Unavailable(
            f"pid {process.pid} was started, and has written no {runs / 'daemon.json'} yet", f"tail {log}"
        )
    sign = _newest_sign(runs) or Sign(pid=0, host="an unknown host", ts=began)
    silent = age(time.time() - sign.ts)
    raise Unavailable(
        f"the daemon that holds {runs / LOCK} has written no liveness file for {silent}: it hangs",
        f"on {sign.host}: kill -9 {sign.pid or 'its pid'} (training continues), then opt-ops daemon ensure",
    )


def _report_gap(before: Sign, sign: Sign, quiet: bool) -> None:
    """Send a warning if lineages were not watched for longer than a restart takes."""
    gone = sign.ts - before.ts
    if gone < OLD_SECONDS or not before.lineages:
        return
    from opt_ops.adapters.notify import UrlNotifier

    config = settings.config
    body = (
        f"No daemon watched {config.runs} from {clock(before.ts)} to {clock(sign.ts)}. The last one was {before.name}, "
        f"with lineages {', '.join(before.lineages)}. Pid {sign.pid} on {sign.host} watches now, and continues from "
        "the journal."
    )
    title = f"no daemon was running for {age(gone)}"
    say(title, quiet)
    alert = Alert(id=f"daemon-gone-{before.ts:.0f}", severity=Severity.WARNING, title=title, body=body)
    try:
        UrlNotifier(config.alerts.urls, config.alerts.least).send(alert)
    except NotDelivered as error:  # the daemon watches: the command has done its work
        say(f"opt-ops: {error}")


@daemon.command()
def stop(quiet: QuietOption = False) -> None:
    """End the daemon of this host with SIGTERM.

    Then wait for its end. Training continues, not watched.

    Example: opt-ops daemon stop
    """
    runs = settings.config.runs
    signs = sorted(signs_in(runs), key=lambda sign: sign.ts, reverse=True)
    here = [sign for sign in signs if sign.host == socket.gethostname() and _is_daemon(sign.pid)]
    elsewhere = [sign for sign in signs if may_live_elsewhere(sign, time.time())]
    if not here and not elsewhere:
        say("No daemon is running here.", quiet)
        return
    if not here:
        other = elsewhere[0]
        raise Refused(f"the daemon runs on {other.host}, pid {other.pid}", f"on {other.host}: opt-ops daemon stop")
    pid = here[0].pid
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError as error:
        raise Refused(
            f"pid {pid} is the daemon of another user",
            f"ps -o user= -p {pid} names its owner, who can stop it, as root can",
        ) from error
    deadline = time.monotonic() + _END_SECONDS
    while _is_daemon(pid):
        if time.monotonic() > deadline:
            raise Unavailable(f"pid {pid} has not ended yet", f"kill -9 {pid} (safe: the journal survives it)")
        time.sleep(0.1)
    say(f"Pid {pid} has ended. Training continues, not watched.", quiet)
    say("  systemd, cron or Slurm may start the next daemon: to prevent that, stop them first", quiet)


@daemon.command("unit")
def unit_(
    form: Annotated[Form, typer.Argument(metavar="FORM", help="systemd, crontab, scrontab or slurm.")],
    partition: Annotated[
        str | None, typer.Option(help="Partition of the daemon's own job.", show_default="that of [slurm]")
    ] = None,
) -> None:
    """Print a file that keeps a daemon running at this site. Its first lines say how to install it.

    docs/daemon.md compares the four forms.

    Example: opt-ops daemon unit slurm --partition cpu
    """
    print(unit(form, settings.config, locate(settings.config_path), partition), end="")
