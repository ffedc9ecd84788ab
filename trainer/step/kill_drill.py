"""A drill that kills this rank at a place of a step, as a machine that fails would: without a word to anybody."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from trainer.parallel.engine import Engine


class KillDrill:
    """Where this rank kills itself, if a drill says so.

    The places are those of ``opt_ops.contract.drills.IN_STEP``. Copies are sent by another thread.

    Args:
        rank: this one.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._armed: tuple[str, int] | None = None
        self._first = 0

    def spare_until(self, step: int) -> None:
        """Obey no drill for an earlier step: it was for the process that had this place before."""
        self._first = step

    def hear(self, kill: tuple[int, str] | None, step: int) -> None:
        """Note what all ranks agreed on.

        Args:
            kill: rank and place; None if nobody is killed.
            step: when.
        """
        if kill is not None and kill[0] == self._rank and step >= self._first:
            self._armed = kill[1], step

    def passes(self, place: str, step: int) -> None:
        """Kill this process if this is the place."""
        if self._armed == (place, step):
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def inside(self, engine: Engine, step: int) -> Iterator[None]:
        """Look also in the middle of the forward and of the backward pass, if a drill is for this step."""
        if self._armed is None or self._armed[1] != step:
            yield
            return

        def forward(_module: object, _inputs: object, output: Any) -> None:
            self.passes("forward", step)
            found = output[0] if isinstance(output, tuple) else output
            if isinstance(found, Tensor) and found.requires_grad:
                found.register_hook(lambda _: self.passes("backward", step))

        layers = list(engine.model.layers)
        handle = layers[len(layers) // 2].register_forward_hook(forward)
        try:
            yield
        finally:
            handle.remove()
