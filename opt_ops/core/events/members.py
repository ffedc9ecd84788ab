"""Events: ranks that are replaced while the others keep running."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MembersIntended:
    """Intent: the attempt goes on with these nodes, and `new` ranks start there. Settled by `MembersJoined` or
    `MembersFailed`, or by the next one of the same attempt.

    The generation is a fencing token: a rank of an older one takes part in nothing any more. An attempt begins with
    generation 1.
    """

    attempt: str
    generation: int
    nodes: tuple[str, ...]  # of the attempt from now on; a rank's place in it stays
    new: tuple[int, ...]  # the ranks that are replaced
    incident: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MembersJoined:
    """Observation: all ranks of the generation hold the state of `step` and go on from there.

    `repeated`: steps that some rank had made beyond it and that are made again, at most.
    """

    attempt: str
    generation: int
    step: int
    at: float
    repeated: int = 0
    kept: int | None = None  # ranks that were not replaced and whose process is the same as before; None: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class MembersFailed:
    """Decision: the generation did not come together, and will not. Another rung of the playbook follows.

    It is the next generation if none was ordered for the incident yet.
    """

    attempt: str
    generation: int
    why: str
    incident: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbySeen:
    """Observation: how many warm ranks wait on a node. Written when it changes."""

    node: str
    ready: int
