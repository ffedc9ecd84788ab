"""`opt-ops doctor`: check a site."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli.shared.extras import trainer_problem
from opt_ops.cli.shared.options import (
    FormatOption,
    OptionalIdArgument,
    YesOption,
    daemon_alive,
    lineage_folder,
    settings,
)
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.config import Config, is_installed
from opt_ops.core.text import printable
from opt_ops.errors import OptOpsError
from opt_ops.runfolder import lineages


def doctor(
    identifier: OptionalIdArgument = "",
    repair: Annotated[
        bool, typer.Option("--repair", help="Set aside what comes after the last good line of a damaged journal.")
    ] = False,
    yes: YesOption = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Check this site, and say how to repair what is wrong. The exit code is 5 if anything is.

    Examples:
      opt-ops doctor
      opt-ops doctor --repair 12
    """
    if repair:
        _repair([lineage_folder(identifier)] if identifier else lineages.folders(settings.config.runs), yes)
        return
    rows = list(_findings())
    columns = [Column("CHECK", "check"), Column("OK", "ok"), Column("FOUND", "found"), Column("NEXT", "next")]
    show("opt-ops/doctor/1", rows, columns, output)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(5)


def _repair(folders: list[Path], yes: bool) -> None:
    """Repair journals that cannot be trusted, each after a question."""
    from getpass import getuser

    from opt_ops.cli.shared.requests import confirm
    from opt_ops.runfolder import repair

    for folder in folders:
        damage = repair.find(folder)
        if damage is None:
            say(f"Lineage {folder.name}: the journal can be trusted. Nothing is repaired.")
            continue
        print(printable(f"lineage {folder.name}: {damage}."))
        confirm(f"Set them aside, and continue lineage {folder.name} in epoch {damage.epoch}?", yes)
        aside = repair.repair(folder, damage, getuser())
        print(f"lineage {folder.name}: continued after seq {damage.good.seq}; what was cut is in {aside}")
        say(f"  next: opt-ops run show {folder.name}, then opt-ops daemon ensure")


def _findings() -> Iterator[dict[str, Any]]:
    try:
        config = settings.config
        yield _finding("configuration", True, f"runs in {config.runs}, scheduler {config.scheduler}")
    except OptOpsError as error:
        yield _finding("configuration", False, str(error), error.hint)
        return
    yield _playbooks(config)
    folder = _runs_folder(config.runs)
    yield folder
    if folder["ok"]:
        yield from _file_system(config)
        yield _journals(config.runs)
        yield _permissions(config.runs)
    yield from _scheduler(config)
    yield _nvml(config)
    yield _trainer(config)
    yield _harness(config)
    yield from _engines(config)
    yield _alerts(config)
    yield from _mlflow(config)
    if folder["ok"]:
        alive = daemon_alive(config.runs)
        yield _finding("daemon", alive, "is running" if alive else "no daemon is running", "opt-ops daemon ensure")


def _finding(check: str, ok: bool, found: str, hint: str = "") -> dict[str, Any]:
    return {"check": check, "ok": ok, "found": found, "next": "" if ok else hint}


def _playbooks(config: Config) -> dict[str, Any]:
    from opt_ops import playbook_loader

    folder = config.playbooks or playbook_loader.folder()
    try:
        policy, pages = playbook_loader.load(folder)
    except OptOpsError as error:
        return _finding("playbooks", False, str(error), error.hint)
    return _finding("playbooks", True, f"{len(pages)} in {folder}, policy {policy.version}")


def _runs_folder(runs: Path) -> dict[str, Any]:
    from opt_ops.runfolder.files import write_text

    probe = runs / ".doctor"
    try:
        write_text(probe, "")
        probe.unlink()
        free = shutil.disk_usage(runs).free / 2**30
    except OSError as error:
        hint = f"let this user write to {runs}, or set `runs` to another folder"
        return _finding("runs folder", False, f"{runs} cannot be written: {error.strerror}", hint)
    return _finding("runs folder", free > 5, f"{runs} can be written; {free:.0f} GiB free", "free some space")


_LOCAL_KINDS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "f2fs"})
_SKEW_SECONDS = 5.0


def _file_system(config: Config) -> Iterator[dict[str, Any]]:
    """Whether other nodes can see the runs folder, and whether its server has the time of this host."""
    if config.scheduler == "slurm" and (kind := _kind_of_mount(config.runs)) in _LOCAL_KINDS:
        found = f"{config.runs} is on {kind}, which other nodes cannot see"
        yield _finding("shared", False, found, "set runs to a folder on a file system that all nodes share")
    probe = config.runs / ".doctor"
    try:
        probe.touch()
        skew = probe.stat().st_mtime - time.time()
        probe.unlink()
    except OSError:
        return  # the finding `runs folder` says so
    hint = "run NTP or chrony on this host and on the file server"
    yield _finding(
        "clock",
        abs(skew) < _SKEW_SECONDS,
        f"{abs(skew):.1f} s away from the file system's (limit {_SKEW_SECONDS:g} s)",
        hint,
    )


def _kind_of_mount(path: Path) -> str:
    """The type of the file system that holds the path; empty if Linux does not say."""
    try:
        rows = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    mounts = [(row[1], row[2]) for row in rows if path.absolute().is_relative_to(row[1])]
    return max(mounts, key=lambda mount: len(mount[0]), default=("", ""))[1]


def _journals(runs: Path) -> dict[str, Any]:
    from opt_ops.runfolder.journal import read

    folders = lineages.folders(runs)
    for folder in folders:
        try:
            read(folder / "journal")
        except OptOpsError as error:
            return _finding("journals", False, str(error), error.hint)
    return _finding("journals", True, f"{len(folders)} can be read")


def _permissions(runs: Path) -> dict[str, Any]:
    from opt_ops.runfolder.permissions import in_words, writable_by_others

    found = writable_by_others(runs)
    said = f"others may write {in_words(found)}" if found else f"only their owner may write {runs} and its lineages"
    return _finding("permissions", not found, said, f"chmod -R go-w {runs}")


def _mlflow(config: Config) -> Iterator[dict[str, Any]]:
    """Whether MLflow is installed, and whether its server answers. A database is not looked at."""
    import urllib.error
    import urllib.request

    uri = config.tracking_uri
    if not config.mlflow.enabled:
        return
    if not is_installed("mlflow"):
        wanted = config.mlflow.tracking_uri is not None
        hint = "pip install 'opt-ops[mlflow]', or set [mlflow] enabled = false"
        yield _finding("mlflow", not wanted, "not installed: lineages are not mirrored", hint)
        return
    if not uri.startswith(("http://", "https://")):
        return
    shown = re.sub(r"(?<=://)[^/@\s]+@", "", uri)
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:  # noqa: S310  (http or https: see above)
            code = answer.status
    except urllib.error.HTTPError as error:
        code = error.code
    except (OSError, ValueError) as error:
        yield _finding("mlflow", False, f"{shown}: {error}", "start the server, or correct [mlflow] tracking_uri")
        return
    refused = code in (401, 403) and not ({"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN"} & os.environ.keys())
    hint = "set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN, where the daemon is started"
    yield _finding("mlflow", not refused and code < 500, f"{shown} answers with {code}", hint)


def _scheduler(config: Config) -> Iterator[dict[str, Any]]:
    if config.scheduler == "local":
        yield _finding("scheduler", True, f"this machine, as nodes {', '.join(config.local.nodes)}")
        return
    for command in ("sbatch", "srun", "squeue", "sacct", "sinfo", "scontrol", "scancel"):
        if shutil.which(command) is None:
            yield _finding(command, False, "not on the PATH", "load Slurm's environment, such as module load slurm")
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
    yield _finding(
        "slurm", enough, f"nodes: {found}", f"[shape] needs {wanted} nodes: choose another partition, or fewer nodes"
    )


def _nvml(config: Config) -> dict[str, Any]:
    from opt_ops.node.nvml import GpuReader

    reading, expected = GpuReader().read(), config.expected_gpus
    found = f"{reading['nvml']}, {len(reading['gpus'])} GPUs here, {expected} expected on nodes"
    here_is_no_node = config.scheduler == "slurm"
    return _finding("nvml", here_is_no_node or len(reading["gpus"]) >= expected, found, "set health.gpus_per_node")


def _trainer(config: Config) -> dict[str, Any]:
    command = config.trainer.command
    if shutil.which(command[0]) is None:
        return _finding("trainer", False, f"{command[0]} is not on the PATH", "set [trainer] command")
    problem = trainer_problem(config.trainer)
    return _finding("trainer", False, *problem) if problem else _finding("trainer", True, " ".join(command))


def _harness(config: Config) -> dict[str, Any]:
    """Whether checkpoints can be evaluated. That is wrong only where the configuration asks for it."""
    from opt_ops.cli.ckpt import harness

    evaluate, prompts = config.evaluate, config.samples.prompts
    wanted = bool(evaluate.tasks or evaluate.every or prompts) or evaluate.python != sys.executable
    if evaluate.every and not evaluate.tasks:
        return _finding("harness", False, "[evaluate] every is set, and tasks is empty", 'set tasks = ["hellaswag"]')
    if (evaluate.every or prompts) and evaluate.where == "spare" and not config.shape.spares:
        nowhere = 'no checkpoint is evaluated before the end: [evaluate] where is "spare", and [shape] spares is 0'
        return _finding("harness", False, nowhere, 'set spares, or where = "daemon"')
    try:
        return _finding("harness", True, f"{harness.probe(config.evaluate.python)}, for ckpt evaluate")
    except OptOpsError as error:
        return _finding("harness", not wanted, f"checkpoints cannot be evaluated: {error}", error.hint)


def _engines(config: Config) -> Iterator[dict[str, Any]]:
    """Whether checkpoints can be served. That is wrong only where the configuration names the program."""
    from opt_ops.cli.ckpt.engine_programs import engine_program

    named = {"transformers": config.serve.python != sys.executable, "vllm": config.serve.vllm is not None}
    for kind, key in (("transformers", "serve python"), ("vllm", "serve vllm")):
        if kind == "vllm" and not named[kind]:
            continue
        try:
            yield _finding(key, True, f"{engine_program(kind, config.serve)}, for ckpt serve")
        except OptOpsError as error:
            yield _finding(key, not named[kind], f"checkpoints cannot be served: {error}", error.hint)


def _alerts(config: Config) -> dict[str, Any]:
    from opt_ops.adapters.notify import expanded, masked

    urls = [*config.alerts.urls, *([config.alerts.heartbeat_url] if config.alerts.heartbeat_url else [])]
    for url in urls:
        try:
            address = expanded(url)
        except ValueError as error:
            return _finding("alerts", False, str(error), "set it where the daemon is started, or correct [alerts]")
        if not address.startswith(("https://", "http://")) and not is_installed("apprise"):
            return _finding("alerts", False, f"{masked(url)} needs apprise", "pip install 'opt-ops[alerts]'")
    found = ", ".join(masked(url) for url in urls) or "no URLs: nobody is paged"
    return _finding("alerts", True, found)
