"""Drives a supervisor through virtual time: in short steps while something happens, in long steps otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from opt_ops.core.state.model import State
from opt_ops.laboratory.simulated.world import World


@dataclass(frozen=True, slots=True)
class Pace:
    """Time between two ticks of the supervisor, in virtual seconds."""

    tick: float = 5.0  # right after an event in the world
    stride: float = 300.0  # at most, while training runs
    settle: float = 180.0  # of training without an event, before the strides begin
    idle: float = 30.0  # at most, while nothing is trained


_LATE = 12.0  # a timeout is seen late by at most 1/12 of its length


class Supervised(Protocol):
    """A supervisor that can be driven."""

    @property
    def state(self) -> State:
        """The state of the lineage."""
        ...

    def tick(self) -> bool:
        """Observe, decide and act once. Returns whether anything was journaled."""
        ...


def run(world: World, supervisor: Supervised, until: float, pace: Pace | None = None) -> State:
    """Let the supervisor tick until the lineage is finished, or until virtual time `until` (seconds).

    An exception of a tick ends the run and leaves the world as it is.
    """
    while not supervisor.state.finished and world.now < until:
        supervisor.tick()
        pass_time(world, until, pace)
    return supervisor.state


def pass_time(world: World, until: float, pace: Pace | None = None) -> None:
    """Let time pass until the next tick of the supervisor.

    An event in the world (silence, a death, a divergence, a request) is seen as early as by a supervisor that ticks all
    the time. A timeout, which only time makes true, may be seen late by a twelfth of its length.
    """
    pace = pace or Pace()
    if world.calm > pace.settle:
        wait = pace.stride
    else:
        wait = max(pace.tick, min(pace.idle, (world.now - world.timeline.disturbed_at) / _LATE))
    if wait <= pace.tick:
        world.advance(min(world.now + pace.tick, until))
        return
    began = world.now
    world.advance(min(began + wait, until), pausing=True)
    ticks = math.ceil((world.now - began) / pace.tick)
    world.advance(min(began + ticks * pace.tick, until))
