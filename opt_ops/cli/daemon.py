"""`opt-ops daemon …`: run the daemon, check it, keep it running."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli.daemon_units import Form, unit
from opt_ops.cli.options import FormatOption, QuietOption, daemon_alive, settings
from opt_ops.cli.output import Column, Format, say, show
from opt_ops.config import locate
from opt_ops.core.text import age, clock, iso
from opt_ops.core.values import Severity
from opt_ops.errors import NotDelivered, OptOpsError, Refused, Unavailable
from opt_ops.ports import Alert
from opt_ops.runfolder.files import read_json

_OLD_SECONDS = 30.0  # of the liveness file of a daemon on this host, which writes it every two seconds
_OLD_ELSEWHERE_SECONDS = 90.0  # an NFS client may show a replaced file for up to acdirmax, 60 s (nfs(5))
_START_SECONDS = 30.0
_END_SECONDS = 30.0  # a tick may be waiting for the scheduler

# Slurm sets the first for a job; the second name the cluster itself.
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")

daemon = typer.Typer(no_args_is_help=True, help="Run, check and stop the daemon that watches and recovers.")


@daemon.command("run")
def run_(
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Exit when every lineage is finished.")] = False,
) -> None:
    """Watch and recover every lineage of the runs folder, in the foreground. Ctrl-C ends the daemon, not training.

    Example: opt-ops daemon run
    """
    from opt_ops.supervise.daemon import Daemon

    _drop_job_environment()
    logging.Formatter.converter = time.gmtime
    form = "%(asctime)sZ %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stderr)
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
    """Show which daemon is running, and the age of its liveness file. The exit code is 75 if none is running.

    Example: opt-ops daemon status -o json
    """
    runs = settings.config.runs
    sign = read_json(runs / "daemon.json")
    if sign is None:
        raise Unavailable(f"no daemon has ever run for {runs}", "opt-ops daemon ensure")
    silent = time.time() - sign["ts"]
    row: dict[str, Any] = {
        "alive": daemon_alive(runs),
        "host": sign["host"],
        "pid": sign["pid"],
        "version": sign["version"],
        "policy": sign["policy"],
        "lineages": sign["lineages"],
        "last_sign": iso(sign["ts"]),
        "age": age(silent),
    }
    columns = [Column(name.upper(), name) for name in ("alive", "host", "pid", "age", "lineages", "policy", "version")]
    show("opt-ops/daemon-status/1", [row], columns, output)
    if not row["alive"]:
        say(f"No daemon is running: the liveness file is {age(silent)} old. Training continues, not watched.")
        say("  next: opt-ops daemon ensure")
        raise typer.Exit(75)


@daemon.command()
def ensure(quiet: QuietOption = False) -> None:
    """Start a daemon in the background if none is running, and wait until it watches.

    It logs to daemon.log in the runs folder. On one host a lock prevents a second daemon; docs/daemon.md says what
    holds across hosts. If no daemon ran for a while, [alerts] are notified.

    Example: opt-ops daemon ensure
    """
    runs = settings.config.runs
    before = read_json(runs / "daemon.json")
    if before is not None and _is_alive(before):
        say(f"A daemon watches {runs}: pid {before['pid']} on {before['host']}.", quiet)
        return
    began = time.time()
    process = _start(runs)
    sign = _wait_for_liveness(runs, process, began)
    say(f"A daemon watches {runs} now: pid {sign['pid']} on {sign['host']}, log in {runs / 'daemon.log'}.", quiet)
    if "SLURM_JOB_ID" in os.environ:
        say(f"  It ends with Slurm job {os.environ['SLURM_JOB_ID']}.\n  next: opt-ops daemon unit slurm", quiet)
    if before is not None and sign["pid"] == process.pid:
        _report_gap(before, sign, quiet)


def _is_alive(sign: dict[str, Any]) -> bool:
    silent = time.time() - sign["ts"]
    if sign["host"] == socket.gethostname():
        return silent < _OLD_SECONDS and _is_daemon(sign["pid"])
    return silent < _OLD_ELSEWHERE_SECONDS


def _is_daemon(pid: int) -> bool:
    """Whether this pid of this host is a running daemon: not a zombie, not another process with a reused pid."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    ours = any(word.endswith((b"opt_ops", b"opt-ops", b"opt_ops/__main__.py")) for word in words)
    return ours and (b"daemon", b"run") in itertools.pairwise(words)


def _start(runs: Path) -> subprocess.Popen[bytes]:
    """Start a daemon in a session of its own, so that it outlives the caller and its terminal."""
    file = locate(settings.config_path)
    option = ["-c", str(file)] if file else []
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / "daemon.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "opt_ops", *option, "daemon", "run"],
            cwd=file.parent if file else None,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_for_liveness(runs: Path, process: subprocess.Popen[bytes], began: float) -> dict[str, Any]:
    """The first liveness file of the daemon that was started, or of another one that was faster.

    Raises:
        Unavailable: the daemon ended, or it wrote no liveness file in time.
    """
    log = runs / "daemon.log"
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        sign = read_json(runs / "daemon.json")
        if sign is not None and sign["ts"] >= began:
            return sign
        if process.poll() not in (None, Refused.exit_code):
            raise Unavailable(f"the daemon ended with exit code {process.returncode}", f"tail {log}")
        time.sleep(0.1)
    if process.returncode is None:
        raise Unavailable(
            f"pid {process.pid} was started, and has written no {runs / 'daemon.json'} yet", f"tail {log}"
        )
    sign = read_json(runs / "daemon.json") or {"pid": "unknown", "host": "unknown", "ts": began}
    silent = age(time.time() - sign["ts"])
    raise Unavailable(
        f"the daemon that holds {runs / 'daemon.lock'} has written no liveness file for {silent}: it hangs",
        f"on {sign['host']}: kill -9 {sign['pid']} (training continues), then opt-ops daemon ensure",
    )


def _report_gap(before: dict[str, Any], sign: dict[str, Any], quiet: bool) -> None:
    """Send a warning if lineages were not watched for longer than a restart takes."""
    gone = sign["ts"] - before["ts"]
    if gone < _OLD_SECONDS or not before["lineages"]:
        return
    from opt_ops.adapters.notify import UrlNotifier

    config = settings.config
    body = (
        f"No daemon watched {config.runs} from {clock(before['ts'])} to {clock(sign['ts'])}. The last one was pid "
        f"{before['pid']} on {before['host']}, with lineages {', '.join(before['lineages'])}. Pid {sign['pid']} on "
        f"{sign['host']} watches now, and continues from the journal."
    )
    title = f"no daemon was running for {age(gone)}"
    say(title, quiet)
    alert = Alert(id=f"daemon-gone-{before['ts']:.0f}", severity=Severity.WARNING, title=title, body=body)
    try:
        UrlNotifier(config.alerts.urls, config.alerts.least).send(alert)
    except NotDelivered as error:  # the daemon watches: the command has done its work
        say(f"opt-ops: {error}")


@daemon.command()
def stop(quiet: QuietOption = False) -> None:
    """End the daemon of this host with SIGTERM, and wait for its end. Training continues, not watched.

    Example: opt-ops daemon stop
    """
    sign = read_json(settings.config.runs / "daemon.json")
    here = sign is not None and sign["host"] == socket.gethostname()
    if sign is None or (here and not _is_daemon(sign["pid"])) or not (here or _is_alive(sign)):
        say("No daemon is running here.", quiet)
        return
    pid = sign["pid"]
    if not here:
        raise Refused(f"the daemon runs on {sign['host']}, pid {pid}", f"on {sign['host']}: opt-ops daemon stop")
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError as error:
        raise Refused(f"pid {pid} is the daemon of another user", "ask its owner, or root, to stop it") from error
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
