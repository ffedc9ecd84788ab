"""`opt-ops daemon …`: the service itself, and what keeps it alive."""

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

_OLD_SECONDS = 30.0  # a sign of this host's daemon, who gives one every two seconds
_OLD_ELSEWHERE_SECONDS = 90.0  # an NFS client may show a replaced file for up to acdirmax, 60 s (nfs(5))
_FIRST_SIGN_SECONDS = 30.0
_LEAVING_SECONDS = 30.0  # a tick may be waiting for the scheduler

# What Slurm sets in a job belongs to that job; these lead to the cluster itself.
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")

daemon = typer.Typer(no_args_is_help=True, help="The daemon that watches and recovers.")


@daemon.command("run")
def run_(
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Leave when no lineage is alive any more.")] = False,
) -> None:
    """Watch every lineage of the runs folder, in the foreground. Ctrl-C ends the watch, not the training.

    Example: opt-ops daemon run
    """
    from opt_ops.supervise.daemon import Daemon

    _forget_the_job()
    logging.Formatter.converter = time.gmtime
    form = "%(asctime)sZ %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stderr)
    try:
        Daemon(settings.config, settings.config_path).run(until_idle=until_idle)
    except OptOpsError:
        raise
    except Exception:
        logging.getLogger(__name__).exception("the daemon ends")  # whoever reads the log cannot run it again
        raise


def _forget_the_job() -> None:
    """Where the daemon itself runs in a Slurm job: what that job was given must not reach the jobs that it submits."""
    if "SLURM_JOB_ID" not in os.environ:
        return
    for name in list(os.environ):
        if name.startswith(_OF_A_JOB) and name not in _OF_THE_CLUSTER:
            del os.environ[name]


@daemon.command()
def status(output: FormatOption = Format.TABLE) -> None:
    """Who watches now, and since when it has given no sign. Leaves with 75 when nobody does.

    Example: opt-ops daemon status -o json
    """
    runs = settings.config.runs
    sign = read_json(runs / "daemon.json")
    if sign is None:
        raise Unavailable(f"no daemon has ever watched {runs}", "opt-ops daemon run")
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
        say(f"the last sign is {age(silent)} old; training, if any, goes on unwatched\n  next: opt-ops daemon run")
        raise typer.Exit(75)


@daemon.command()
def ensure(quiet: QuietOption = False) -> None:
    """See to it that a daemon watches: start one in the background unless one lives, and wait for its first sign.

    Its log is daemon.log in the runs folder. Never two: on one host a lock decides; docs/daemon.md says what holds
    across hosts. When the one before had been gone for a while, [alerts] are told.

    Example: opt-ops daemon ensure
    """
    runs = settings.config.runs
    before = read_json(runs / "daemon.json")
    if before is not None and _lives(before):
        say(f"a daemon watches {runs}: pid {before['pid']} on {before['host']}", quiet)
        return
    began = time.time()
    process = _start(runs)
    sign = _first_sign(runs, process, began)
    say(f"a daemon watches {runs} now: pid {sign['pid']} on {sign['host']}, log in {runs / 'daemon.log'}", quiet)
    if "SLURM_JOB_ID" in os.environ:
        say(f"  it ends with Slurm job {os.environ['SLURM_JOB_ID']}; opt-ops daemon unit slurm", quiet)
    if before is not None and sign["pid"] == process.pid:
        _tell_of_the_gap(before, sign, quiet)


def _lives(sign: dict[str, Any]) -> bool:
    silent = time.time() - sign["ts"]
    if sign["host"] == socket.gethostname():
        return silent < _OLD_SECONDS and _is_daemon(sign["pid"])
    return silent < _OLD_ELSEWHERE_SECONDS


def _is_daemon(pid: int) -> bool:
    """Whether this process of this host is a running daemon, not its zombie, nor another who has the number now."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    ours = any(word.endswith((b"opt_ops", b"opt-ops", b"opt_ops/__main__.py")) for word in words)
    return ours and (b"daemon", b"run") in itertools.pairwise(words)


def _start(runs: Path) -> subprocess.Popen[bytes]:
    """A daemon in a session of its own, so that it outlives the caller and its terminal."""
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


def _first_sign(runs: Path, process: subprocess.Popen[bytes], began: float) -> dict[str, Any]:
    """The first sign of the daemon that was started, or of one that was faster.

    Raises:
        Unavailable: it ended, or there is no sign.
    """
    log = runs / "daemon.log"
    deadline = time.monotonic() + _FIRST_SIGN_SECONDS
    while time.monotonic() < deadline:
        sign = read_json(runs / "daemon.json")
        if sign is not None and sign["ts"] >= began:
            return sign
        if process.poll() not in (None, Refused.exit_code):
            raise Unavailable(f"the daemon left with code {process.returncode}", f"the end of {log} says why")
        time.sleep(0.1)
    if process.returncode is None:
        raise Unavailable(f"pid {process.pid} was started, and gives no sign yet", f"look into {log}")
    sign = read_json(runs / "daemon.json") or {"pid": "unknown", "host": "unknown", "ts": began}
    silent = age(time.time() - sign["ts"])
    raise Unavailable(
        f"a daemon holds {runs / 'daemon.lock'} and has given no sign for {silent}: it hangs",
        f"kill -9 {sign['pid']} on {sign['host']} is safe, training goes on; then opt-ops daemon ensure",
    )


def _tell_of_the_gap(before: dict[str, Any], sign: dict[str, Any], quiet: bool) -> None:
    """A warning, when lineages were not watched for longer than a restart takes."""
    gone = sign["ts"] - before["ts"]
    if gone < _OLD_SECONDS or not before["lineages"]:
        return
    from opt_ops.adapters.notify import UrlNotifier

    config = settings.config
    body = (
        f"Nobody watched {config.runs} from {clock(before['ts'])} to {clock(sign['ts'])}. The last one was pid "
        f"{before['pid']} on {before['host']}, with lineages {', '.join(before['lineages'])}. Pid {sign['pid']} on "
        f"{sign['host']} watches now, and goes on from the journal."
    )
    title = f"the daemon was gone for {age(gone)}"
    say(title, quiet)
    alert = Alert(id=f"daemon-gone-{before['ts']:.0f}", severity=Severity.WARNING, title=title, body=body)
    try:
        UrlNotifier(config.alerts.urls, config.alerts.least).send(alert)
    except NotDelivered as error:  # the daemon watches all the same, which is what was asked for
        say(f"opt-ops: {error}")


@daemon.command()
def stop(quiet: QuietOption = False) -> None:
    """End the daemon of this host with SIGTERM, and wait until it has left. Training goes on, unwatched.

    Example: opt-ops daemon stop
    """
    sign = read_json(settings.config.runs / "daemon.json")
    here = sign is not None and sign["host"] == socket.gethostname()
    if sign is None or (here and not _is_daemon(sign["pid"])) or not (here or _lives(sign)):
        say("no daemon runs here", quiet)
        return
    pid = sign["pid"]
    if not here:
        raise Refused(f"the daemon runs on {sign['host']}, pid {pid}", f"on {sign['host']}: opt-ops daemon stop")
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError as error:
        raise Refused(f"pid {pid} is another user's daemon", "ask its owner, or root, to stop it") from error
    deadline = time.monotonic() + _LEAVING_SECONDS
    while _is_daemon(pid):
        if time.monotonic() > deadline:
            raise Unavailable(
                f"pid {pid} has not left yet", f"kill -9 {pid} is safe: the journal is never half written"
            )
        time.sleep(0.1)
    say(f"pid {pid} has left; training, if any, goes on unwatched", quiet)
    say("  what keeps a daemon alive here (systemd, cron, Slurm) starts the next one: stop that first", quiet)


@daemon.command("unit")
def unit_(
    form: Annotated[Form, typer.Argument(metavar="FORM", help="systemd, crontab, scrontab or slurm.")],
    partition: Annotated[
        str | None, typer.Option(help="Of the daemon's own job.", show_default="that of [slurm]")
    ] = None,
) -> None:
    """Print a file that keeps a daemon alive at this site; its first lines say what to do with it. docs/daemon.md
    compares them.

    Example: opt-ops daemon unit slurm --partition cpu
    """
    print(unit(form, settings.config, locate(settings.config_path), partition), end="")
