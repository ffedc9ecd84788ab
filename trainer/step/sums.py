"""What all ranks measured in a step, added up in one all-reduce. The device has it first; the host reads it later."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opt_ops.contract.outside import NUMBERS
from trainer.parallel.engine import Engine
from trainer.step.copies import to_device, to_host
from trainer.step.measured import Limits, StepMeasurements
from trainer.step.norms import BlockNorms
from trainer.step.rank_inputs import StepInputs

# The host adds up the norms of the blocks in another order than the device, so their last bits may differ.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Shares:
    """The shares of one rank in the mean loss and in the mean activation norm. The shares of all ranks add up to them.

    Attributes:
        loss: in nats per token.
        activation_norm: of what leaves the last layer.
        divisor: the gradients in the parameters, divided by it, are those of the mean loss over the global batch.
        loss_scale: what the loss was multiplied by, in fp16. It is a part of ``divisor``.
        attention_logits: [tensor-parallel ranks, layers], in passes that sampled them. The ranks that share the first
            part of the batch fill in one row each.
    """

    loss: Tensor
    activation_norm: Tensor
    divisor: float
    loss_scale: float | None = None
    attention_logits: Tensor | None = None


class Sums:
    """The measurements of all ranks, on the device.

    Args:
        parts: the result of the all-reduce, by what it holds.
        shares: of this rank; for what is known without other ranks.
        blocks: names of the blocks of the model, in the order of the norms.
        rows: number of rows of the tables in ``parts``.
    """

    def __init__(self, parts: dict[str, Tensor], shares: Shares, blocks: Sequence[str], rows: dict[str, int]) -> None:
        self._parts, self._shares, self._blocks, self._rows = parts, shares, blocks, rows
        self.gnorm = parts["gradients"].sum().sqrt() / shares.divisor

    def usual(self, limits: Limits | None) -> Tensor:
        """Whether the update may be applied before the host knows what was measured: a boolean scalar on the device.

        False where the host must decide: a value is not finite, the update is out of band or close to it, a drill
        changes the learning rate, or an input of a rank ends training. All ranks have the same sums, so they agree.

        Args:
            limits: of this update; None if none is out of band.
        """
        loss = self._parts["means"][0]
        outside = dict(zip(NUMBERS, self._parts["outside"].unbind(), strict=True))
        usual = loss.isfinite() & self.gnorm.isfinite()
        usual &= (outside["lr_factor"] == 1.0) & (outside["superseded"] == 0.0)
        if limits is not None:
            usual &= (loss <= limits.loss) | (self.gnorm <= limits.gnorm * (1 - _ROUNDING))
        return usual

    def reader(self, usual: Tensor | None = None) -> Callable[[], StepMeasurements]:
        """Start to copy the sums to the host.

        Args:
            usual: the result of :meth:`usual`, if the update is queued on its condition.

        Returns:
            A function that waits for the copy. It does not wait for what is queued after this call.
        """
        parts = dict(self._parts)
        if usual is not None:
            parts["usual"] = usual.double()[None]
        read, lengths = to_host(torch.cat(list(parts.values()))), [len(part) for part in parts.values()]
        return lambda: self._measurements(dict(zip(parts, _lists(read(), lengths), strict=True)))

    def _measurements(self, sums: dict[str, Sequence[float]]) -> StepMeasurements:
        loss, activation_norm = sums["means"]
        save_due, snapshot_due = sums["due"]
        divisor, blocks = self._shares.divisor, self._blocks
        return StepMeasurements(
            loss=loss,
            activation_norm=activation_norm,
            gnorm=math.sqrt(sum(sums["gradients"])) / divisor,
            divisor=divisor,
            loss_scale=self._shares.loss_scale,
            block_gnorms={b: math.sqrt(s) / divisor for b, s in zip(blocks, sums["gradients"], strict=True)},
            block_pnorms={b: math.sqrt(s) for b, s in zip(blocks, sums.get("parameters", ()), strict=False)},
            block_unorms={b: math.sqrt(s) for b, s in zip(blocks, sums.get("updates", ()), strict=False)},
            attention_logits=_largest(self._table("attention", sums)),
            outside=sums["outside"],
            save_due=save_due > 0,
            snapshot_due=snapshot_due > 0,
            busy_seconds=sums.get("busy", ()),
            checksums=self._table("checksums", sums),
            usual=bool(sums.get("usual", (0.0,))[0]),
        )

    def _table(self, name: str, sums: dict[str, Sequence[float]]) -> list[Sequence[float]]:
        values, rows = sums.get(name, ()), self._rows[name]
        return _lists(values, [len(values) // rows] * rows) if values else []


def add_up(
    engine: Engine,
    shares: Shares,
    inputs: StepInputs,
    to_compare: Tensor | None = None,
    norms: BlockNorms | None = None,
    *,
    parameter_norms: bool = False,
    update_norms: bool = False,
) -> Sums:
    """Add up all measurements over all ranks. Apart from the gradients, this is the only all-reduce of a step.

    The host does not wait for the device here.

    Args:
        engine: with its gradients.
        shares: the result of :func:`trainer.step.step.forward_backward`.
        inputs: what this rank has read.
        to_compare: checksums of this rank, in steps that compare them.
        norms: of the engine's shards, if they exist already.
        parameter_norms: whether to measure the norms of the parameters, too.
        update_norms: whether to measure the norms of the last update, which must have been applied.
    """
    norms = norms or BlockNorms(engine)
    device, world, rank = shares.loss.device, dist.get_world_size(), dist.get_rank()
    flags = torch.tensor([*inputs.outside, inputs.save_due, inputs.snapshot_due], dtype=torch.float64)
    outside, due = to_device(flags, device).split([len(inputs.outside), 2])
    parts = {
        "means": torch.stack([shares.loss.double(), shares.activation_norm.double()]),
        "outside": outside,
        "due": due,
        "gradients": norms.shares(engine.gradients()).to(device),
    }
    if parameter_norms:
        parts["parameters"] = norms.shares(engine.parameters()).to(device)
    if update_norms:
        parts["updates"] = norms.update_shares().to(device)
    # These values are not added up: each rank has a place of its own in the sum.
    if inputs.busy_seconds is not None:
        busy = torch.zeros(world, dtype=torch.float64)
        busy[rank] = inputs.busy_seconds
        parts["busy"] = to_device(busy, device)
    if shares.attention_logits is not None:
        parts["attention"] = shares.attention_logits.double().flatten()
    if to_compare is not None:
        table = torch.zeros(world, len(to_compare), dtype=torch.float64, device=device)
        table[rank] = to_compare
        parts["checksums"] = table.flatten()
    total = torch.cat(list(parts.values()))
    dist.all_reduce(total)
    pieces = total.split([len(part) for part in parts.values()])
    rows = {"attention": engine.layout.tp, "checksums": world}
    return Sums(dict(zip(parts, pieces, strict=True)), shares, norms.blocks, rows)


def _lists(values: Sequence[float], lengths: Sequence[int]) -> list[Sequence[float]]:
    """``values`` cut into pieces of these lengths."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _largest(by_rank: Sequence[Sequence[float]]) -> Sequence[float]:
    """The largest logit of each layer; NaN where one is not a number."""
    return [math.nan if any(map(math.isnan, values)) else max(values) for values in zip(*by_rank, strict=True)]
