"""Training that is broken off and goes on in place, on one rank of a group."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opt_ops.contract.environment import place_from_environment
from opt_ops.contract.options import Options
from opt_ops.contract.outside import Outside
from opt_ops.contract.signals import Signals
from tests.trainer.harness import engine_of
from tests.trainer.test_parallel import samples
from trainer.checkpoint.schedule import SaveSchedules
from trainer.model import sharded
from trainer.parallel import mesh
from trainer.parallel.mesh import Meeting
from trainer.recipes import Recipe
from trainer.recovery import rebuild
from trainer.recovery.connections import Connections
from trainer.step.checksums import Checksums
from trainer.step.guard import Guard
from trainer.step.measured import Progress
from trainer.step.rank_inputs import RankInputs
from trainer.step.step import Steps

_NAMES = ("all_reduce", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single")


class Broken(RuntimeError):
    """What the collective of a test raises: gloo's words for a connection that was cut."""

    def __init__(self) -> None:
        super().__init__("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [test]")


class Collectives:
    """Counts the collectives of a rank, and breaks one of them off.

    Attributes:
        seen: how many there were since the last call of :meth:`count_anew`.
    """

    def __init__(self) -> None:
        self.seen, self._broken, self._inside = 0, -1, False
        self._cut: Callable[[], None] = lambda: None

    def count_anew(self, broken: int = -1, cut: Callable[[], None] = lambda: None) -> None:
        """Count from 0 on. Collective number ``broken`` calls ``cut`` and raises."""
        self.seen, self._broken, self._cut = 0, broken, cut

    @contextmanager
    def watched(self) -> Iterator[None]:
        places = [(dist, name) for name in _NAMES if hasattr(dist, name)]
        places += [(sharded, "_all_gather"), (sharded, "_reduce_scatter")]
        original = [(place, name, getattr(place, name)) for place, name in places]
        try:
            for place, name, call in original:
                setattr(place, name, self._counted(call))
            yield
        finally:
            for place, name, call in original:
                setattr(place, name, call)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            if self._inside:  # one calls another
                return call(*args, **named)
            self.seen += 1
            if self.seen == self._broken + 1:
                self._cut()
                raise Broken
            self._inside = True
            try:
                return call(*args, **named)
            finally:
                self._inside = False

        return counted


class Trainee:
    """One rank: its engine, and two versions of its state.

    Attributes:
        history: by step, the loss and the gradient norm.
        connections: of its groups.
    """

    def __init__(self, recipe: Recipe, ports: list[int]) -> None:
        self.recipe, self._ports, self._generation = recipe, ports, 1
        self.connections = Connections()
        self.engine = engine_of(recipe)
        self.connections.opened()
        self.layout = self.engine.layout
        self.guard, self.progress = Guard(recipe), Progress()
        outside = Outside(Options(), self.layout.rank, Signals())
        inputs = RankInputs(outside, self.layout, SaveSchedules(recipe, snapshots=False))
        checksums = Checksums(self.engine.model, self.engine.optimizer, self.layout, recipe.checksum_every)
        data = samples(recipe)
        self._steps = Steps(recipe, (), (), self.engine, data, self.guard, inputs, checksums)
        self.history: dict[int, tuple[float, float]] = {}
        self._versions: dict[int, tuple[list[Tensor], Any, Progress]] = {}
        self._keep()

    def step(self) -> None:
        outcome = self._steps.take(self.progress, closely=self.progress.step % 2 == 0)
        assert outcome.fault is None
        self.progress = outcome.progress
        self.history[self.progress.step] = outcome.measured.loss, outcome.measured.gnorm
        self._keep()

    def recover(self) -> int:
        """New groups, and the newest state that all ranks have. Returns its step."""
        self.connections.cut()
        rebuild.abort()
        self._generation += 1
        place = place_from_environment(os.environ)
        self.connections = Connections()
        meeting = Meeting("127.0.0.1", self._ports[self._generation % 2], self._generation)
        recipe = self.recipe
        dp, tp = mesh.check_layout(recipe, place.world)
        layout = mesh.start(place, dp, tp, recipe.parallel.replicas, meeting)
        self.connections.opened()
        rebuild.rewire(self.engine, layout)
        rebuild.drop_broken_step(self.engine)
        self.layout = self.engine.layout
        newest = torch.tensor(self.progress.step)
        dist.all_reduce(newest, dist.ReduceOp.MIN)
        self._restore(int(newest))
        return int(newest)

    def state(self) -> list[Tensor]:
        engine, held = self.engine, []
        for shard in engine.shards:
            state = engine.optimizer.state[shard.parameter]
            held += [engine.local(each.detach()) for each in (shard.parameter, state["exp_avg"], state["exp_avg_sq"])]
            held.append(state["step"])
        return held

    def _keep(self) -> None:
        step = self.progress.step
        self._versions[step] = [each.clone() for each in self.state()], self.guard.state(), self.progress
        self._versions.pop(step - 2, None)

    def _restore(self, step: int) -> None:
        tensors, guard, self.progress = self._versions[step]
        for own, copy in zip(self.state(), tensors, strict=True):
            own.copy_(copy)
        self.guard.restore(guard)
        self._steps.restored()
        self._versions = {step: self._versions[step]}


def undisturbed(recipe: Recipe, ports: list[int], steps: int) -> tuple[dict[int, tuple[float, float]], list[Tensor]]:
    """What an unbroken run of so many steps gives: losses and gradient norms, and the state at its end."""
    trainee = Trainee(recipe, ports)
    for _ in range(steps):
        trainee.step()
    history, state = trainee.history, [each.clone() for each in trainee.state()]
    dist.destroy_process_group()
    return history, state


def broken_at_each_collective(recipe: Recipe, ports: list[int], every: int = 1) -> dict[str, Any]:
    """Break step after step off, each at a later collective, and compare with an unbroken run.

    Args:
        recipe: what to train.
        ports: where the generations of the membership meet, in turn.
        every: take every so-manieth collective.
    """
    collectives = Collectives()
    with collectives.watched():
        trainee = Trainee(recipe, ports)
        rank, world = trainee.layout.rank, trainee.layout.world
        broken, most, errors, repeated = 0, 1, [], 0
        while broken < most:
            victim = broken % world == rank
            collectives.count_anew(broken if victim else -1, trainee.connections.cut)
            step = trainee.progress.step
            error = attempt(trainee)
            collectives.count_anew()
            if error:
                errors.append(error)
                repeated += trainee.recover() < step
            trainee.step()
            most = collectives.seen
            broken += every
        history, state = trainee.history, [each.clone() for each in trainee.state()]
        dist.destroy_process_group()
        expected, expected_state = undisturbed(recipe, [], max(history))
    return {
        "collectives": most,
        "errors": errors,
        "repeated": repeated,
        "history": history,
        "expected": expected,
        "state": all(map(torch.equal, state, expected_state)),
    }


def attempt(trainee: Trainee) -> str | None:
    """Run a step that is broken off. Returns what was raised: nothing here keeps the error or its traceback."""
    try:
        trainee.step()
    except RuntimeError as error:
        if not rebuild.is_lost_peer(error):
            raise
        return str(error)
    return None
