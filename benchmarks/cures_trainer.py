"""The real trainer with one thing broken, for `benchmarks.cures`. A drill: nothing of the product imports this.

    python benchmarks/cures_trainer.py --inject FILE … (the options of python -m trainer)

FILE holds what to break, as JSON. What happens once only is noted beside it, so that the next attempt knows.
"""

# ruff: noqa: SLF001  it reaches into the trainer, as no option of the trainer could

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opt_ops.contract.signals import Signals


class Once:
    """What has happened already, in any attempt: a file beside the orders."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_suffix(".done")

    def done(self) -> dict[str, Any] | None:
        """What was noted; None before."""
        return json.loads(self._path.read_text()) if self._path.exists() else None

    def note(self, **what: Any) -> None:
        """Note that it has happened."""
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(what))
        new.replace(self._path)


def _before_steps(act: Callable[[Any, int], None]) -> None:
    """Call `act` with the steps and the number of the next step, before each."""
    from trainer.step.step import Steps

    take = Steps.take

    @wraps(take)
    def taken(self: Any, progress: Any, **options: Any) -> Any:
        act(self, progress.step + 1)
        return take(self, progress, **options)

    Steps.take = taken


def _after_updates(act: Callable[[Any, int], None]) -> None:
    """Call `act` with the engine and the number of the update, after each: before checksums are taken."""
    from trainer.parallel.engine import Engine

    update = Engine.update
    now = [0]

    @wraps(update)
    def updated(self: Any, *values: Any, **options: Any) -> None:
        update(self, *values, **options)
        act(self, now[0])

    def note(_: Any, step: int) -> None:
        now[0] = step

    _before_steps(note)
    Engine.update = updated


def garbage(orders: dict[str, Any], _: Once) -> None:
    """The samples `first` to `last` are random tokens, whenever they are read."""
    import numpy as np

    from trainer.data.samples import Mixture

    batch = Mixture.batch

    @wraps(batch)
    def read(self: Any, first: int, count: int) -> Any:
        inputs, targets = batch(self, first, count)
        for row in range(count):
            if orders["first"] <= first + row <= orders["last"]:
                chance = np.random.default_rng([orders["salt"], first + row])
                ids = inputs.new_tensor(chance.integers(4, 256, inputs.shape[1] + 1))
                inputs[row], targets[row] = ids[:-1], ids[1:]
        return inputs, targets

    Mixture.batch = read


def moments(orders: dict[str, Any], once: Once) -> None:
    """After update `step` the second moments shrink, once: the next updates are too large."""

    def act(engine: Any, step: int) -> None:
        if step == orders["step"] and not once.done():
            once.note(step=step)
            _shrink(engine.optimizer, 1.0, orders["factor"])

    _after_updates(act)


def quiet(orders: dict[str, Any], _: Once) -> None:
    """From update `first` to `last` gradients are usual and quiet by turns, with a period of `every` updates.

    Both moments are then as after gradients that were smaller by `factor`. A second moment that follows quickly is as
    usual some updates later. A slow one stays too small.
    """

    def act(engine: Any, step: int) -> None:
        if orders["first"] <= step <= orders["last"] and (step - orders["first"]) % orders["every"] == 0:
            _shrink(engine.optimizer, orders["first_moment"], orders["factor"])

    _after_updates(act)


def _shrink(optimizer: Any, first: float, second: float) -> None:
    """Moments as of gradients that are smaller by these factors."""
    import torch

    with torch.no_grad():
        for state in optimizer.state.values():
            state["exp_avg"].mul_(first)
            state["exp_avg_sq"].mul_(second**2)


def restore(orders: dict[str, Any], once: Once) -> None:
    """At `step` this rank dies, once. What is restored then has random numbers in one block of the weights.

    Only that checkpoint is restored badly: an older one is fine.
    """
    from trainer.checkpoint import Checkpointer

    load = Checkpointer.load

    def act(_: Any, step: int) -> None:
        if step == orders["step"] and not once.done():
            once.note(step=step)
            os.kill(os.getpid(), signal.SIGKILL)

    @wraps(load)
    def loaded(self: Any, path: Path) -> Any:
        found = load(self, path)
        done = once.done()
        if done is not None and done.setdefault("path", str(path)) == str(path):
            once.note(**done)
            _randomize(self._state["model"], orders["block"])
        return found

    _before_steps(act)
    Checkpointer.load = loaded


def _randomize(model: dict[str, Any], block: str) -> None:
    """Random numbers of the same size as the weights of a block."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.items():
            if block in name and name.endswith("weight"):
                local = _local(tensor)
                local.copy_(torch.randn(local.shape, generator=generator) * local.std() + local.mean())


def rate(orders: dict[str, Any], once: Once) -> None:
    """From `step` on the learning rate of this attempt is multiplied by `factor`, or stays as it is (`stuck`)."""
    from trainer import optim

    planned = optim.learning_rate
    me = _attempt()

    @wraps(planned)
    def computed(step: int, *settings: Any) -> float:
        if step >= orders["step"] and once.done() is None:
            once.note(attempt=me)
        if step < orders["step"] or once.done() != {"attempt": me}:
            return planned(step, *settings)
        return planned(orders["step"], *settings) if orders["stuck"] else planned(step, *settings) * orders["factor"]

    optim.learning_rate = computed


def batch(orders: dict[str, Any], once: Once) -> None:
    """From `step` on this attempt takes `sequences` for a batch."""
    from trainer.telemetry import Telemetry

    record = Telemetry.record
    me = _attempt()

    def act(steps: Any, step: int) -> None:
        if step >= orders["step"] and once.done() is None:
            once.note(attempt=me)
        if step >= orders["step"] and once.done() == {"attempt": me}:
            recipe = steps._recipe
            steps._recipe = replace(recipe, data=replace(recipe.data, global_batch=orders["sequences"]))

    @wraps(record)
    def recorded(self: Any, step: int, *more: Any) -> Any:
        if step >= orders["step"] and once.done() == {"attempt": me} and self._sequences != orders["sequences"]:
            self._tokens = self._tokens * orders["sequences"] // self._sequences
            self._sequences = orders["sequences"]
        return record(self, step, *more)

    _before_steps(act)
    Telemetry.record = recorded


def flip(orders: dict[str, Any], once: Once) -> None:
    """Before update `step` one rank's part of a block grows by `factor`, once: an exponent bit of many weights."""
    import torch

    def act(steps: Any, step: int) -> None:
        if step == orders["step"] and os.environ.get("RANK", "0") == str(orders["rank"]) and not once.done():
            once.note(step=step)
            with torch.no_grad():
                for shard in steps._engine.shards:
                    if orders["block"] in shard.name and shard.name.endswith("weight"):
                        steps._engine.local(shard.parameter).mul_(orders["factor"])

    _before_steps(act)


def mix(orders: dict[str, Any], _: Once) -> None:
    """From sample `first` on a share of the samples is in another spelling: each symbol stands for another.

    With `stage`, telemetry names the stage of the data, as a trainer with stages would.
    """
    import torch

    from trainer.data.samples import Mixture

    taken = Mixture.batch
    generator = torch.Generator().manual_seed(orders["salt"])
    spelling = torch.cat([torch.arange(4), 4 + torch.randperm(258, generator=generator)])

    @wraps(taken)
    def read(self: Any, first: int, count: int) -> Any:
        inputs, targets = taken(self, first, count)
        for row in range(count):
            if first + row >= orders["first"] and (first + row) % 16 < orders["of_16"]:
                inputs[row], targets[row] = spelling[inputs[row]], spelling[targets[row]]
        return inputs, targets

    Mixture.batch = read
    if orders["stage"]:
        _tell_stage(orders["first"])


def _tell_stage(first: int) -> None:
    from trainer.telemetry import Telemetry

    record = Telemetry.record

    class Staged:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, line: Any) -> Any:
            return self._file.write({**line, "stage": "b" if line["data_position"] > first else "a"})

    @wraps(record)
    def recorded(self: Any, *values: Any) -> Any:
        if not isinstance(self._file, Staged):
            self._file = Staged(self._file)
        return record(self, *values)

    Telemetry.record = recorded


def edge(orders: dict[str, Any], _: Once) -> None:
    """From `first` to `last` the learning rate is `excess` times what one mode of the model can bear.

    The amplitude of a mode at the edge of stability grows by |1 - 2 · excess| with each update, and decays as soon as
    the learning rate is lower. The mode scales the queries of a layer and the last norm: attention logits, the norms
    of parameters and at last the loss rise. It depends on no data, and the amplitude is in the weights. So an attempt
    begins with the amplitude that its checkpoint has.
    """
    import torch

    from trainer import optim
    from trainer.checkpoint import Checkpointer

    planned, load = optim.learning_rate, Checkpointer.load
    kept = Path(sys.argv[sys.argv.index("--checkpoint-dir") + 1]).parents[1] / "amplitudes.json"
    amplitudes: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    now = {"amplitude": _LEAST, "share": 0.0}

    @wraps(load)
    def loaded(self: Any, path: Path) -> Any:
        found = load(self, path)
        now["amplitude"] = amplitudes.get(str(found.step), _LEAST)
        return found

    @wraps(planned)
    def computed(step: int, config: Any, factors: Any = ()) -> float:
        lr = planned(step, config, factors)
        now["share"] = orders["excess"] * lr / planned(step, config)
        return lr

    def act(engine: Any, step: int) -> None:
        before = now["amplitude"]
        if orders["first"] <= step <= orders["last"]:
            now["amplitude"] = min(max(before * abs(1 - 2 * now["share"]), _LEAST), _MOST)
            factor = (1 + now["amplitude"]) / (1 + before)
            with torch.no_grad():
                for shard in engine.shards:
                    if any(shard.name.startswith(name) for name in orders["blocks"]):
                        engine.local(shard.parameter).mul_(factor)
        amplitudes[str(step)] = now["amplitude"]
        if step % 25 == 0:
            kept.write_text(json.dumps(amplitudes))

    _after_updates(act)
    Checkpointer.load = loaded
    optim.learning_rate = computed


_LEAST, _MOST = 1e-3, 8.0  # amplitudes: of rounding and noise, and where a real network would saturate


def overflow(orders: dict[str, Any], _: Once) -> None:
    """From `step` on fp16 overflows in each update until the loss scale is below `bearable`."""
    from trainer.step import step as steps_of_a_step

    forward_backward = steps_of_a_step.forward_backward

    @wraps(forward_backward)
    def run(engine: Any, samples: Any, recipe: Any, progress: Any, scale: float | None = None, **more: Any) -> Any:
        shares = forward_backward(engine, samples, recipe, progress, scale, **more)
        if progress.step + 1 >= orders["step"] and scale is not None and scale >= orders["bearable"]:
            engine.gradients()[0].fill_(float("inf"))
        return shares

    steps_of_a_step.forward_backward = run


def _local(tensor: Any) -> Any:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def _attempt() -> str:
    return sys.argv[sys.argv.index("--attempt") + 1] if "--attempt" in sys.argv else ""


INJECTIONS: dict[str, Callable[[dict[str, Any], Once], None]] = {
    each.__name__: each for each in (garbage, moments, quiet, restore, rate, batch, flip, mix, edge, overflow)
}


def inject(path: Path) -> None:
    """Break what the file says."""
    orders = json.loads(path.read_text())
    if orders:
        INJECTIONS[orders["what"]](orders, Once(path))


def main() -> int:
    """Break the trainer, then run it."""
    from trainer.__main__ import main as train

    at = sys.argv.index("--inject")
    inject(Path(sys.argv[at + 1]))
    del sys.argv[at : at + 2]
    return train(Signals())


if __name__ == "__main__":
    faulthandler.enable()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the trainer does: background threads are not joined
