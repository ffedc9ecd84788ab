"""Values of a campaign's events."""

from __future__ import annotations

from dataclasses import dataclass

from opt_ops.core.values import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """L(N, D) = E + A/N^α + B/D^β, in nats per token; N counts parameters, D tokens."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss that the law gives."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """The settled loss that is expected after so many tokens, and the band that it should stay in."""

    tokens: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One size of a campaign: what its lineage is started with."""

    recipe: str
    parameters: int
    tokens: int  # that it is planned to see
    settings: tuple[str, ...]
    shape: Shape
