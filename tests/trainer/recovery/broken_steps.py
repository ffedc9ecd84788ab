"""Training that is broken off and goes on in place, on one rank of a group."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from opt_ops.contract.environment import place_from_environment
from opt_ops.contract.options import Options
from opt_ops.contract.outside import Outside
from opt_ops.contract.signals import Signals
from tests.trainer.test_parallel import samples
from trainer.checkpoint.schedule import SaveSchedules
from trainer.model import sharded
from trainer.parallel import mesh
from trainer.parallel.build import build
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import Layout, Meeting
from trainer.recipes import Recipe
from trainer.recovery import rebuild
from trainer.recovery.connections import Connections
from trainer.step.checksums import Checksums
from trainer.step.guard import Guard
from trainer.step.measured import Progress
from trainer.step.rank_inputs import RankInputs
from trainer.step.step import Steps

_NAMES = ("all_reduce", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single")


@dataclass(frozen=True, slots=True)
class Break:
    """Where a rank loses its connections in a step: before or after the collective of this number.

    Where it is ``replaced``, it goes on with a new engine.
    """

    victim: int
    collective: int
    afterwards: bool = False
    replaced: bool = False


class Broken(RuntimeError):
    """What the collective of a test raises: gloo's words for a connection that was cut."""

    def __init__(self) -> None:
        super().__init__("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [test]")


class Collectives:
    """Counts the collectives of a rank, and breaks some of them off.

    Attributes:
        seen: how many there were since the last call of :meth:`count_anew`.
    """

    def __init__(self) -> None:
        self.seen, self._break, self._inside = 0, Break(0, -1), False
        self._cut: Callable[[], None] = lambda: None

    def count_anew(self, at: "Break | None", cut: Callable[[], None]) -> None:
        """Count from 0 on, and cut the connections and raise where ``at`` says."""
        self.seen, self._break, self._cut = 0, at or Break(0, -1), cut

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
            breaks = self.seen == self._break.collective + 1
            if breaks and not self._break.afterwards:
                self._cut()
                raise Broken
            self._inside = True
            try:
                result = call(*args, **named)
            finally:
                self._inside = False
            if breaks:
                self._cut()
                raise Broken
            return result

        return counted


class Trainee:
    """One rank: its engine, and two versions of its state.

    Attributes:
        history: by step, the loss and the gradient norm.
        connections: of its groups.
    """

    def __init__(self, recipe: Recipe, ports: list[int]) -> None:
        self.recipe, self._ports, self._generation = recipe, ports, 0
        self._use(build(recipe, self._form_groups()))
        self.progress = Progress()
        self.history: dict[int, tuple[float, float]] = {}
        self._versions: dict[int, tuple[list[Tensor], Any, Progress]] = {}
        self._keep()

    def _form_groups(self) -> Layout:
        place, recipe = place_from_environment(os.environ), self.recipe
        meeting = Meeting("127.0.0.1", self._ports[self._generation % len(self._ports)], self._generation)
        self.connections = Connections()
        layout = mesh.start(place, *mesh.check_layout(recipe, place.world), recipe.parallel.replicas, meeting)
        self.connections.opened()
        return layout

    def _use(self, engine: Engine) -> None:
        recipe, layout = self.recipe, engine.layout
        self.engine, self.layout, self.guard = engine, layout, Guard(recipe)
        inputs = RankInputs(Outside(Options(), layout.rank, Signals()), layout, SaveSchedules(recipe, snapshots=False))
        checksums = Checksums(engine.model, engine.optimizer, layout, recipe.checksum_every)
        self._steps = Steps(recipe, (), (), engine, samples(recipe), self.guard, inputs, checksums)

    def step(self) -> None:
        outcome = self._steps.take(self.progress, closely=self.progress.step % 2 == 0)
        assert outcome.fault is None
        self.progress = outcome.progress
        self.history[self.progress.step] = outcome.measured.loss, outcome.measured.gnorm
        self._keep()

    def recover(self, *, anew: bool = False) -> int:
        """New groups, and the newest state that all ranks have. Returns its step.

        Args:
            anew: with a new engine, as in a process that replaces this one.
        """
        self.connections.cut()
        rebuild.abort()
        self._generation += 1
        layout = self._form_groups()
        if anew:
            self._use(build(self.recipe, layout))
        else:
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


def broken_run(recipe: Recipe, ports: list[int], breaks: dict[int, Break], steps: int) -> dict[str, Any]:
    """What becomes of a run on this rank, and the same of an undisturbed one, in the same process.

    Args:
        recipe: what to train.
        ports: where the generations of the membership meet, in turn. Groups that are still kept hold theirs.
        breaks: by step, where its first try is broken off.
        steps: to make.
    """
    collectives, left = Collectives(), dict(breaks)
    with collectives.watched():
        trainee, errors, repeated, most = Trainee(recipe, ports[:-1]), [], 0, 0
        while trainee.progress.step < steps:
            at = left.pop(trainee.progress.step + 1, None)
            own = at if at and at.victim == trainee.layout.rank else None
            collectives.count_anew(own, trainee.connections.cut)
            if error := attempt(trainee):
                before = trainee.progress.step
                collectives.count_anew(None, trainee.connections.cut)
                errors.append(error)
                repeated += before - trainee.recover(anew=own is not None and own.replaced)
            else:
                most = max(most, collectives.seen)
    history, state = trainee.history, [each.clone() for each in trainee.state()]
    dist.destroy_process_group()
    twin = Trainee(recipe, ports[-1:])
    for _ in range(steps):
        twin.step()
    return {
        "collectives": most,
        "errors": errors,
        "repeated": repeated,
        "history": history == twin.history,
        "state": all(map(torch.equal, state, twin.state())),
    }


def attempt(trainee: Trainee) -> str | None:
    """Run a step. Returns what was raised if a peer was lost: nothing here keeps the error or its traceback."""
    try:
        trainee.step()
    except RuntimeError as error:
        if not rebuild.is_lost_peer(error):
            raise
        return str(error)
    return None


def compiled_run(recipe: Recipe, ports: list[int], backend: str) -> dict[str, Any]:
    """Layers that are compiled once: how many graphs there are after each of three recoveries; and an unbroken run."""
    from torch._dynamo.utils import counters

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
        trainee = Trainee(recipe, ports[:-1])
        for _ in range(2):
            trainee.step()
        graphs = [counters["stats"]["unique_graphs"]]
        for _ in range(3):
            trainee.recover()
            trainee.step()
            graphs.append(counters["stats"]["unique_graphs"])
        history, state = trainee.history, [each.clone() for each in trainee.state()]
        dist.destroy_process_group()
        twin = Trainee(recipe, ports[-1:])
        for _ in range(len(history)):
            twin.step()
    same = history == twin.history and all(map(torch.equal, state, twin.state()))
    return {"graphs": graphs, "same": same}


def recovered_often(recipe: Recipe, ports: list[int], times: int) -> dict[str, list[int]]:
    """Descriptors, threads and known groups of this process after each of so many recoveries."""
    trainee = Trainee(recipe, ports)
    found: dict[str, list[int]] = {"descriptors": [], "threads": [], "groups": []}
    for _ in range(times):
        trainee.step()
        trainee.recover()
        found["descriptors"].append(_count("fd"))
        found["threads"].append(_count("task"))
        found["groups"].append(dist.get_pg_count())
    return found


def groups_kept(recipe: Recipe, ports: list[int]) -> tuple[int, int]:
    """How many groups the engine keeps after a recovery, and how many of them torch no longer knows."""
    trainee = Trainee(recipe, ports)
    trainee.step()
    trainee.recover()
    kept, known = _reachable_groups(trainee.engine), distributed_c10d._world.pg_names
    return len(kept), sum(group not in known for group in kept)


def _count(what: str) -> int:
    """Of this process: ``fd`` for its descriptors, ``task`` for its threads."""
    return len(list(Path(f"/proc/self/{what}").iterdir()))


def _reachable_groups(root: object) -> list[dist.ProcessGroup]:
    """The groups that ``root`` keeps, wherever: in attributes, hooks, partials, closures and meshes."""
    seen: set[int] = set()
    found: list[dist.ProcessGroup] = []
    left: list[Any] = [root]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | ModuleType):
            continue
        seen.add(id(one))
        if isinstance(one, dist.ProcessGroup):
            found.append(one)
        elif isinstance(one, FunctionType):  # what it closes over, but not the globals of its module
            left += [one.__closure__, one.__defaults__]
        else:
            left += gc.get_referents(one)
    return found
