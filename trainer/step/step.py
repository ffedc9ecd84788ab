"""One step of training: forward and backward pass over the global batch, and what all ranks measure of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer import optim
from trainer.data.samples import next_sample, part
from trainer.errors import CorruptionError, NonFiniteError, PeerCorruptionError
from trainer.parallel.engine import Engine
from trainer.recipes import Recipe
from trainer.step.checksums import Checksums, Verdict
from trainer.step.guard import Guard, first_bad_module
from trainer.step.norms import BlockNorms
from trainer.step.rank_inputs import Heard, Outside
from trainer.telemetry import Measured, Outcome, Progress


class Source(Protocol):
    """Where samples come from, by their index in the lineage."""

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of ``count`` samples from ``first`` on: two int64 tensors [count, seq_len]."""
        ...


@dataclass(frozen=True, slots=True)
class Shares:
    """One rank's shares of the mean loss and of the mean activation norm: over all ranks, they add up to them.

    ``loss_scale`` is what the gradients are too large by, in fp16.
    """

    loss: Tensor
    activation_norm: Tensor
    loss_scale: float | None = None


class Steps:
    """Takes one step after the other; what it needs to know of the last ones is in ``guard`` and ``checksums``.

    Args:
        recipe: what is trained.
        lr_factors: (step, factor) pairs on top of the schedule.
        skips: windows of batches that are left out.
        engine: the model and its optimizer.
        samples: what to train on.
        guard: decides which updates are applied.
        outside: what reaches the run from outside.
        checksums: what ranks compare.
    """

    def __init__(
        self,
        recipe: Recipe,
        lr_factors: Sequence[tuple[int, float]],
        skips: Sequence[tuple[int, int]],
        engine: Engine,
        samples: Source,
        guard: Guard,
        outside: Outside,
        checksums: Checksums,
    ) -> None:
        self._recipe, self._lr_factors, self._skips = recipe, lr_factors, skips
        self._engine, self._samples = engine, samples
        self._guard, self._outside, self._checksums = guard, outside, checksums
        self._norms = BlockNorms(engine)

    def take(self, progress: Progress, *, closely: bool = False) -> Outcome:
        """Go through the next batch and apply the update, unless something speaks against it.

        Args:
            progress: that before the step.
            closely: measure the norms of parameters as well.

        Raises:
            SupersededError: a newer attempt of the lineage exists.
            UserError: the drills cannot be read.
        """
        step, engine, guard, checksums = progress.step + 1, self._engine, self._guard, self._checksums
        position = next_sample(progress.data_position, self._recipe.data.global_batch, self._skips)
        before = replace(progress, data_position=position)
        scale = guard.loss_scale
        run = partial(forward_backward, engine, self._samples, self._recipe, before, scale)
        told = checksums.told(position)
        measured = measure(engine, run(), self._outside.heard(step), told, self._norms, closely=closely)
        self._outside.stop_if_told(measured)
        verdict = checksums.judge(measured.checksums)
        bad_module = None if measured.finite else first_bad_module(engine.model, run)
        fault = _fault(step, measured, verdict, bad_module, engine.layout.rank)
        skip = None
        if fault is None:
            skip = guard.why_skip(measured)
            lr = optim.learning_rate(step, self._recipe.optim, self._lr_factors) * measured.drill_factor
            engine.update(measured.gnorm, lr, scale, apply=skip is None)
            progress = advanced(before, self._recipe, applied=skip is None)
            checksums.updated(step, measured.flip)
            fault = guard.stuck()
        return Outcome(
            measured=measured,
            progress=progress,
            skipped=guard.skipped,
            skip=skip,
            bad_module=bad_module,
            verdict=verdict,
            fault=fault,
        )


def forward_backward(
    engine: Engine, samples: Source, recipe: Recipe, progress: Progress, loss_scale: float | None = None
) -> Shares:
    """Leave the gradients of the mean loss over the global batch in the parameters.

    Args:
        engine: whose model's clock is set.
        samples: what to train on.
        recipe: for the sizes of batch and sequence.
        progress: that before this update. Its data position is that of the batch.
        loss_scale: what to multiply the loss by, in fp16.
    """
    layout, clock = engine.layout, engine.model.clock
    seq_len, batch = recipe.data.seq_len, recipe.data.global_batch
    share = part(progress.data_position, batch, layout.dp, layout.dp_rank)
    # As many as the largest share needs: each is a round of collectives, which all ranks must go through together.
    micro_steps = math.ceil(math.ceil(batch / layout.dp) / recipe.data.micro_batch)
    tokens_per_rank = batch * seq_len / layout.dp  # on average: engines average over ranks, whatever their shares
    loss_sum = activation_norm_sum = torch.zeros((), device=layout.device)
    clock.step = progress.step + 1
    clock.first_position = engine.first_position(seq_len)
    engine.zero_grad()
    for micro_step in range(micro_steps):
        first, count = part(*share, micro_steps, micro_step)
        if count == 0:
            first = share[0]  # something to go through the motions with
        clock.first_sample = first
        inputs, targets = (ids.to(layout.device) for ids in samples.batch(first, max(1, count)))
        with engine.micro_step(last=micro_step == micro_steps - 1):
            loss, activation_norm = engine.loss(inputs, targets)
            loss = loss / tokens_per_rank
            if count == 0:
                loss, activation_norm = loss * 0, activation_norm * 0
            (loss * loss_scale if loss_scale else loss).backward()
        loss_sum = loss_sum + (loss.to_local() if isinstance(loss, DTensor) else loss).detach()
        activation_norm_sum = activation_norm_sum + activation_norm
    return Shares(loss_sum / layout.world, activation_norm_sum / (batch * seq_len), loss_scale)


def measure(
    engine: Engine,
    shares: Shares,
    heard: Heard,
    checksums: Tensor | None = None,
    norms: BlockNorms | None = None,
    *,
    closely: bool = False,
) -> Measured:
    """Add up over all ranks, in the one collective of the step that is not the gradients'.

    Args:
        engine: with its gradients.
        shares: what :func:`forward_backward` returned.
        heard: what this rank has to tell the others.
        checksums: what it holds, in steps in which that is compared.
        norms: of the engine's shards, where they were made before.
        closely: measure the norms of parameters as well.
    """
    norms = norms or BlockNorms(engine)
    device, world, rank = shares.loss.device, dist.get_world_size(), dist.get_rank()
    told = [heard.drill_factor, heard.save_requested, heard.superseded, heard.flip, heard.snapshot_due]
    parts = {
        "means": torch.stack([shares.loss.double(), shares.activation_norm.double()]),
        "heard": torch.tensor(told, dtype=torch.float64, device=device),
        "gradients": norms.shares(engine.gradients()).to(device),
    }
    if closely:
        parts["parameters"] = norms.shares(engine.parameters()).to(device)
    # What is not added up: each rank has a place of its own in the sum.
    if heard.busy_seconds is not None:
        parts["busy"] = torch.zeros(world, dtype=torch.float64, device=device)
        parts["busy"][rank] = heard.busy_seconds
    if checksums is not None:
        table = torch.zeros(world, len(checksums), dtype=torch.float64, device=device)
        table[rank] = checksums
        parts["checksums"] = table.flatten()
    total = torch.cat(list(parts.values()))
    dist.all_reduce(total)
    sums = dict(zip(parts, _lists(total.tolist(), [len(part) for part in parts.values()]), strict=True))
    loss, activation_norm = sums["means"]
    drill_factor, save_requests, superseded, flip, snapshot_due = sums["heard"]
    scale = shares.loss_scale or 1.0
    return Measured(
        loss=loss,
        activation_norm=activation_norm,
        gnorm=math.sqrt(sum(sums["gradients"])) / scale,
        loss_scale=shares.loss_scale,
        block_gnorms={b: math.sqrt(s) / scale for b, s in zip(norms.blocks, sums["gradients"], strict=True)},
        block_pnorms={b: math.sqrt(s) for b, s in zip(norms.blocks, sums.get("parameters", ()), strict=False)},
        drill_factor=drill_factor,
        save_requested=save_requests > 0,
        snapshot_due=snapshot_due > 0,
        superseded=superseded > 0,
        flip=int(flip) - 1 if flip else None,
        busy_seconds=sums.get("busy", ()),
        checksums=_rows(sums.get("checksums", ()), world),
    )


def advanced(progress: Progress, recipe: Recipe, *, applied: bool = True) -> Progress:
    """``progress`` after one more update; one that was skipped has used its batch and trained on nothing."""
    batch = recipe.data.global_batch
    return replace(
        progress,
        step=progress.step + 1,
        data_position=progress.data_position + batch,
        tokens=progress.tokens + batch * recipe.data.seq_len * applied,
    )


def _lists(values: Sequence[float], lengths: Sequence[int]) -> list[Sequence[float]]:
    """``values`` cut into pieces of these lengths."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _rows(values: Sequence[float], rows: int) -> list[Sequence[float]]:
    return _lists(values, [len(values) // rows] * rows) if values else []


def _fault(
    step: int, measured: Measured, verdict: Verdict | None, bad_module: str | None, rank: int
) -> Exception | None:
    """What forbids the update, if anything."""
    if verdict is None or not verdict.ranks:
        if measured.finite:
            return None
        return NonFiniteError(
            f"step {step}: loss {measured.loss}, gradient norm {measured.gnorm}: not applied; first not finite: "
            f"{bad_module}"
        )
    ranks = ", ".join(map(str, verdict.ranks))
    doubt = "" if verdict.certain else ", and it cannot be told which of them"
    text = f"step {step}: data is corrupt on rank {ranks}{doubt}: {verdict.what}; the update was not applied"
    return CorruptionError(text) if rank in verdict.ranks else PeerCorruptionError(text)
