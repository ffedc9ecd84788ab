"""`opt-ops doctor`: what is wrong with a site."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from opt_ops.cli.common import FormatOption, daemon_alive, settings
from opt_ops.config import Config
from opt_ops.errors import OptOpsError
from opt_ops.render import Column, Format, show


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
    yield _alerts(config)
    alive = daemon_alive(config.runs)
    yield _finding("daemon", alive, "watches" if alive else "nobody watches", "opt-ops daemon ensure")


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


def _alerts(config: Config) -> dict[str, Any]:
    from opt_ops.adapters.notify import expanded, masked

    urls = [*config.alerts.urls, *([config.alerts.heartbeat_url] if config.alerts.heartbeat_url else [])]
    for url in urls:
        try:
            expanded(url)
        except ValueError as error:
            return _finding("alerts", False, str(error), "set it where the daemon is started, or correct [alerts]")
    found = ", ".join(masked(url) for url in urls) or "none: nobody is told when a human is needed"
    return _finding("alerts", True, found)
