"""What a lineage's state says of its checkpoints, and of their evaluations."""

from __future__ import annotations

from dataclasses import dataclass

from opt_ops.core.events import EvaluationIntended
from opt_ops.core.values import Checkpoint, EvaluationEnd


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCheckpoint:
    """A committed checkpoint, and what its examination gave: None while it lasts."""

    checkpoint: Checkpoint
    seen_at: float
    verified: bool | None = None
    healthy: bool = False
    why: str = ""

    @property
    def good(self) -> bool:
        """Whether training may go on from it."""
        return self.verified is True and self.healthy


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluation that the daemon has ordered; `end` is None while it runs."""

    intended: EvaluationIntended
    at: float
    epoch: int
    end: EvaluationEnd | None = None
    ended_at: float | None = None
    why: str = ""

    @property
    def name(self) -> str:
        """Such as 12-ev001."""
        return self.intended.evaluation

    @property
    def checkpoint(self) -> str:
        """What is evaluated, as commands name it: such as 12.01/61000."""
        return f"{self.intended.checkpoint.run}/{self.intended.checkpoint.step}"
