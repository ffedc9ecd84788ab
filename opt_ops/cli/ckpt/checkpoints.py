"""A checkpoint that a command names, such as `12/61000`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from opt_ops.cli.shared.options import Lineage, find_lineage
from opt_ops.cli.shared.output import say
from opt_ops.contract.exit_codes import ExitCode
from opt_ops.contract.manifest import digest
from opt_ops.core.names import attempt_folder
from opt_ops.core.state.queries import counting
from opt_ops.core.values import Checkpoint
from opt_ops.errors import NotFound, UsageError
from opt_ops.runfolder.checkpoints import problem
from opt_ops.runfolder.files import read_json

_NAMED = re.compile(r"(?P<id>\d+(?:\.\d{2,})?)(?:/(?P<step>\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A checkpoint that a command names."""

    lineage: Lineage
    checkpoint: Checkpoint
    counts: bool  # whether its steps are part of the present weights

    @property
    def digest(self) -> str:
        """SHA-256 of its manifest, which has those of all its files."""
        return digest(Path(self.checkpoint.path))

    @property
    def config(self) -> Mapping[str, Any] | None:
        """config.json of the newest attempt of its run; None if there is none."""
        attempts = [each for each in self.lineage.state.attempts.values() if each.run == self.checkpoint.run]
        files = (self.lineage.path / attempt_folder(each.name) / "config.json" for each in reversed(attempts))
        return next((found for file in files if isinstance(found := read_json(file), dict)), None)


def named(text: str) -> Named:
    """The checkpoint `12/61000` that counts, that of a run `12.01/61000`, or without a step the newest that counts.

    Raises:
        UsageError: the text names none.
        NotFound: there is no such lineage or checkpoint.
    """
    found = _NAMED.fullmatch(text)
    if found is None:
        raise UsageError(
            f"{text}: a lineage or a run and a step are wanted, such as 12/61000 or 12.01/61000", "opt-ops ckpt list"
        )
    lineage = find_lineage(found["id"])
    state, step = lineage.state, found["step"]
    ours = [known for known in state.checkpoints.values() if not known.checkpoint.nodes]  # durable ones
    reachable = counting(state)
    counts = [known for known in ours if known.checkpoint.path in reachable]
    chosen = [known for known in ours if known.checkpoint.run == found["id"]] if "." in found["id"] else counts
    chosen = [known for known in chosen if step is None or known.checkpoint.step == int(step)]
    if step is None:
        chosen = [known for known in chosen if known.good] or chosen
    if not chosen:
        raise NotFound(
            f"{found['id']} has no checkpoint{f' of step {step}' if step else ''}", f"opt-ops ckpt list {lineage.name}"
        )
    newest = max(chosen, key=lambda known: known.checkpoint.step).checkpoint
    return Named(lineage=lineage, checkpoint=newest, counts=newest.path in reachable)


def require_sound(chosen: Named) -> None:
    """Compare every byte with the manifest.

    Raises:
        Exit: 65, the checkpoint is damaged. The reason is printed.
    """
    why = problem(chosen.checkpoint)
    if why:
        say(f"The checkpoint of step {chosen.checkpoint.step} is damaged: {why}")
        say(f"  next: opt-ops ckpt list {chosen.lineage.name}")
        raise typer.Exit(ExitCode.CHECKPOINT_REFUSED)
