"""`opt-ops daemon …` and `opt-ops doctor`: the service itself, and what is wrong with a site."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli.common import FormatOption, daemon_alive, settings
from opt_ops.config import Config
from opt_ops.errors import OptOpsError, Unavailable
from opt_ops.files import read_json
from opt_ops.render import Column, Format, age, iso, say, show

daemon = typer.Typer(no_args_is_help=True, help="The daemon that watches and recovers.")


@daemon.command("run")
def run_(
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Leave when no lineage is alive any more.")] = False,
) -> None:
    """Watch every lineage of the runs folder, in the foreground. Ctrl-C ends the watch, not the training.

    Example: opt-ops daemon run
    """
    from opt_ops.daemon import Daemon

    logging.Formatter.converter = time.gmtime
    form = "%(asctime)sZ %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stderr)
    Daemon(settings.config, settings.config_path).run(until_idle=until_idle)


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


def doctor(output: FormatOption = Format.TABLE) -> None:
    """Look for what is wrong with this site, and say how to mend it. Leaves with 5 when something is.

    Example: opt-ops doctor
    """
    rows = list(_findings())
    columns = [Column("CHECK", "check"), Column("OK", "ok"), Column("FOUND", "found"), Column("NEXT", "next")]
    show("opt-ops/doctor/1", rows, columns, output)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(5)


def _findings() -> Iterator[dict[str, Any]]:
    try:
        config = settings.config
        yield _finding("configuration", True, f"runs in {config.runs}, scheduler {config.scheduler}")
    except OptOpsError as error:
        yield _finding("configuration", False, str(error), error.hint)
        return
    yield _playbooks(config)
    yield _runs_folder(config.runs)
    yield from _scheduler(config)
    yield _nvml(config)
    yield _trainer(config)
    alive = daemon_alive(config.runs)
    yield _finding("daemon", alive, "watches" if alive else "nobody watches", "opt-ops daemon run")


def _finding(check: str, ok: bool, found: str, hint: str = "") -> dict[str, Any]:
    return {"check": check, "ok": ok, "found": found, "next": "" if ok else hint}


def _playbooks(config: Config) -> dict[str, Any]:
    from playbooks import loader

    folder = config.playbooks or loader.folder()
    try:
        policy, pages = loader.load(folder)
    except OptOpsError as error:
        return _finding("playbooks", False, str(error), error.hint)
    return _finding("playbooks", True, f"{len(pages)} in {folder}, policy {policy.version}")


def _runs_folder(runs: Path) -> dict[str, Any]:
    from opt_ops.files import write_text

    probe = runs / ".doctor"
    try:
        write_text(probe, "")
        probe.unlink()
        free = shutil.disk_usage(runs).free / 2**30
    except OSError as error:
        return _finding("runs folder", False, str(error), f"make {runs} writable for this user")
    return _finding("runs folder", free > 5, f"{runs} can be written; {free:.0f} GiB free", "free some space")


def _scheduler(config: Config) -> Iterator[dict[str, Any]]:
    if config.scheduler == "local":
        yield _finding("scheduler", True, f"this machine as {', '.join(config.local.nodes)}")
        return
    for command in ("sbatch", "srun", "squeue", "sacct", "sinfo", "scontrol", "scancel"):
        if shutil.which(command) is None:
            yield _finding(command, False, "not on the PATH", "load Slurm's environment")
            return
    from opt_ops.adapters.slurm import nodes_by_state

    try:
        states = nodes_by_state(config.slurm.partition)
    except OptOpsError as error:
        yield _finding("slurm", False, str(error), error.hint or "scontrol ping")
        return
    found = ", ".join(f"{count} {state}" for state, count in states.items())
    wanted = config.shape.nodes + config.shape.spares
    enough = sum(states.values()) >= wanted
    yield _finding("slurm", enough, f"nodes: {found}", f"[shape] wants {wanted} nodes; choose another partition")


def _nvml(config: Config) -> dict[str, Any]:
    from opt_ops.adapters.nvml import Reader

    reading, expected = Reader().read(), config.health.gpus_per_node
    found = f"{reading['nvml']}, {len(reading['gpus'])} GPUs here, {expected} expected on nodes"
    here_is_no_node = config.scheduler == "slurm"
    return _finding("nvml", here_is_no_node or len(reading["gpus"]) >= expected, found, "set health.gpus_per_node")


def _trainer(config: Config) -> dict[str, Any]:
    program = config.trainer.command[0]
    return _finding(
        "trainer", shutil.which(program) is not None, " ".join(config.trainer.command), "set [trainer] command"
    )
