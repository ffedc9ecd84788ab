"""What a site is to the daemon: its clocks, its schedulers, how attempts are launched, and its projections."""

from __future__ import annotations

import time
from pathlib import Path

from opt_ops.adapters.local import LocalScheduler
from opt_ops.config import Config, is_installed
from opt_ops.core.state.model import State
from opt_ops.core.values import Status
from opt_ops.node import agent
from opt_ops.ports import Scheduler
from opt_ops.supervise.executor import Site
from opt_ops.supervise.projections import Projection
from opt_ops.supervise.site_policy import evaluation_command


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never jump."""
        return time.monotonic()

    def boot(self) -> str:
        """The kernel's id of this boot."""
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return ""


def scheduler_of(config: Config, lineage: Path) -> Scheduler:
    """What holds nodes for a lineage."""
    if config.scheduler == "local":
        return LocalScheduler(lineage, config.local.nodes)
    from opt_ops.adapters.slurm import SlurmOptions, SlurmScheduler

    return SlurmScheduler(lineage, SlurmOptions(**config.slurm.model_dump()), agent.main)


def site_of(config: Config, config_path: Path | None, lineage: Path) -> Site:
    """How the attempts of a lineage are launched."""
    trainer = config.trainer
    return Site(
        folder=str(lineage),
        trainer=tuple(trainer.command),
        environment=trainer.environment,
        burn_in_seconds=config.health.burn_in_seconds,
        snapshot_dir=trainer.snapshot_dir.rstrip("/"),
        checkpoint_copy=trainer.checkpoint_copy.rstrip("/"),
        in_place=config.recovery.in_place,
        standby=config.recovery.standby,
        evaluate=evaluation_command(config, config_path),
    )


def projection_of(config_path: Path | None, words: tuple[str, ...], every: float) -> Projection:
    """A command that draws a journal, with the configuration of this daemon."""
    option = ("-c", str(config_path)) if config_path else ()
    return Projection((*option, *words), every)


def projections_of(config: Config, config_path: Path | None, lineage: str) -> list[Projection]:
    """The projections of a lineage."""
    drawn = [projection_of(config_path, ("logbook", "render", lineage, "-q"), config.chronicle.every_seconds)]
    if config.mlflow.enabled and is_installed("mlflow"):
        drawn.append(projection_of(config_path, ("mlflow", "sync", lineage, "-q"), config.mlflow.every_seconds))
    return drawn


def nodes_taken(state: State) -> int:
    """The nodes that a lineage holds or waits for."""
    held = len(state.held)
    if state.lineage is None or state.ended or state.status is Status.PAUSED:
        return held
    return max(held, state.wanted_nodes + state.shape.spares)
