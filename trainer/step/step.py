"""One training step. The functions stand in the order in which a step runs them.

1. Choose the batch: :func:`choose_batch`.
2. Run forward and backward pass for each micro-batch: :func:`forward_backward`.
3. Add up all measurements over all ranks, in one all-reduce: :func:`measure`.
4. Decide whether the update may be applied: :func:`find_fault` and :class:`trainer.step.guard.Guard`.
5. Clip the gradients and update the weights: :meth:`trainer.parallel.engine.Engine.update`.
6. Advance the position in the data: :func:`advanced`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from opt_ops.contract.skip_windows import next_sample
from trainer import optim
from trainer.data.samples import part
from trainer.errors import CorruptionError, NonFiniteError, PeerCorruptionError
from trainer.parallel.engine import Engine
from trainer.recipes import Recipe
from trainer.step.attention_logits import sampling
from trainer.step.checksums import Checksums, ChecksumVerdict
from trainer.step.guard import Guard, first_bad_module
from trainer.step.measured import Progress, StepMeasurements, StepOutcome
from trainer.step.norms import BlockNorms
from trainer.step.rank_inputs import RankInputs, StepInputs


class SampleSource(Protocol):
    """Gives samples by their index in the lineage."""

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of ``count`` samples from ``first`` on: two int64 tensors [count, seq_len]."""
        ...


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


class Steps:
    """Runs steps. What a step must know of earlier steps is in ``guard`` and ``checksums``.

    Args:
        recipe: what is trained.
        lr_factors: (step, factor) pairs on top of the schedule.
        skips: windows (first, last) of batches to skip.
        engine: the model and its optimizer.
        samples: what to train on.
        guard: decides which updates are applied.
        inputs: what reaches this rank from outside.
        checksums: what the ranks compare.
    """

    def __init__(
        self,
        recipe: Recipe,
        lr_factors: Sequence[tuple[int, float]],
        skips: Sequence[tuple[int, int]],
        engine: Engine,
        samples: SampleSource,
        guard: Guard,
        inputs: RankInputs,
        checksums: Checksums,
    ) -> None:
        self._recipe, self._lr_factors, self._skips = recipe, lr_factors, skips
        self._engine, self._samples = engine, samples
        self._guard, self._inputs, self._checksums = guard, inputs, checksums
        self._norms = BlockNorms(engine)
        self._applied = False  # whether the step before applied its update; in a new process there was none

    def take(self, progress: Progress, *, closely: bool = False) -> StepOutcome:
        """Run one step: train on the next batch and apply the update, unless a fault or the guard forbids it.

        Args:
            progress: before the step.
            closely: whether to measure also the norms of the parameters and of the update before this step, and a
                sample of attention logits.

        Raises:
            SupersededError: a newer attempt of the lineage exists.
            UserError: the drills cannot be read.
        """
        step, engine, guard, checksums = progress.step + 1, self._engine, self._guard, self._checksums
        # 1. Choose the batch.
        before = choose_batch(progress, self._recipe, self._skips)
        # 2. and 3. Forward and backward pass; all ranks add up what they measured.
        scale = guard.loss_scale
        run = partial(forward_backward, engine, self._samples, self._recipe, before, scale)
        to_compare = checksums.values_to_compare(before.data_position)
        shares = run(sample=closely)
        inputs = self._inputs.read(step)
        last = closely and self._applied
        measured = measure(engine, shares, inputs, to_compare, self._norms, parameter_norms=closely, update_norms=last)
        # 4. May the update be applied?
        self._inputs.raise_if_stopped(measured)
        verdict = checksums.judge(measured.checksums)
        bad_module = None if measured.finite else first_bad_module(engine.model, run, engine.layout.host)
        fault = find_fault(step, measured, verdict, bad_module, engine.layout.rank)
        skip = None
        # Also an update that is not applied sets the learning rate, because telemetry reads it back.
        lr = optim.learning_rate(step, self._recipe.optim, self._lr_factors) * measured.drill_factor
        optim.set_learning_rate(engine.optimizer, lr)
        if fault is None:
            skip = guard.skip_reason(measured)
            # 5. Clip and update.
            if skip is None:
                engine.update(measured.gnorm, lr, measured.divisor)
            self._applied = skip is None
            # 6. Advance.
            progress = advanced(before, self._recipe, applied=skip is None)
            checksums.updated(step, measured.flip)
            fault = guard.loss_scale_error()
        return StepOutcome(
            measured=measured,
            progress=progress,
            skipped=guard.skipped,
            skip=skip,
            bad_module=bad_module,
            verdict=verdict,
            fault=fault,
        )


def choose_batch(progress: Progress, recipe: Recipe, skips: Sequence[tuple[int, int]]) -> Progress:
    """``progress`` with its data position moved to the first sample of the next batch that is not skipped."""
    return replace(progress, data_position=next_sample(progress.data_position, recipe.data.global_batch, skips))


def forward_backward(
    engine: Engine,
    samples: SampleSource,
    recipe: Recipe,
    progress: Progress,
    loss_scale: float | None = None,
    *,
    sample: bool = False,
) -> Shares:
    """Leave the gradients of the global batch in the parameters: those of the sum of the loss, times ``loss_scale``.

    The sum is back-propagated, as in metaseq, and not the mean. In fp16 the gradients of a mean over many thousand
    tokens are too small: most of them become zero. Engines average over ``dp`` ranks, so the gradients are those of the
    mean loss times tokens · ``loss_scale`` / ``dp``. Nothing divides them here: the update does it
    (:func:`trainer.optim.update`), and so do the norms.

    Args:
        engine: the model. The clock of its dropout is set here.
        samples: what to train on.
        recipe: for the sizes of batch and sequence.
        progress: before this update. Its data position is that of the batch.
        loss_scale: what to multiply the loss by, in fp16.
        sample: whether to take a sample of the attention logits, from the first sequence of the batch.
    """
    layout, clock = engine.layout, engine.model.clock
    seq_len, batch = recipe.data.seq_len, recipe.data.global_batch
    share = part(progress.data_position, batch, layout.dp, layout.dp_rank)
    # As many as the largest share needs: each is a round of collectives, so all ranks must run the same number.
    micro_steps = math.ceil(math.ceil(batch / layout.dp) / recipe.data.micro_batch)
    loss_sum = activation_norm_sum = torch.zeros((), device=layout.device)
    logits = torch.zeros(layout.tp, recipe.model.num_layers, device=layout.device) if sample else None
    clock.step = progress.step + 1
    clock.first_position = engine.first_position(seq_len)
    engine.zero_grad()
    for micro_step in range(micro_steps):
        first, count = part(*share, micro_steps, micro_step)
        if count == 0:
            first = share[0]  # any sample will do: this rank only takes part in the collectives
        clock.first_sample = first
        inputs, targets = (ids.to(layout.device) for ids in samples.batch(first, max(1, count)))
        with engine.micro_step(last=micro_step == micro_steps - 1):
            with sampling(engine, wanted=sample and micro_step == layout.dp_rank == 0) as by_layer:
                loss, activation_norm = engine.loss(inputs, targets)
            if logits is not None and by_layer:
                logits[layout.tp_rank] = torch.stack(by_layer)
            if count == 0:
                loss, activation_norm = loss * 0, activation_norm * 0
            (loss * loss_scale if loss_scale else loss).backward()
        loss_sum = loss_sum + (loss.to_local() if isinstance(loss, DTensor) else loss).detach()
        activation_norm_sum = activation_norm_sum + activation_norm
    tokens = batch * seq_len
    return Shares(
        loss=loss_sum / (tokens * layout.tp),
        activation_norm=activation_norm_sum / tokens,
        divisor=tokens * (loss_scale or 1.0) / layout.dp,
        loss_scale=loss_scale,
        attention_logits=logits,
    )


def measure(
    engine: Engine,
    shares: Shares,
    inputs: StepInputs,
    to_compare: Tensor | None = None,
    norms: BlockNorms | None = None,
    *,
    parameter_norms: bool = False,
    update_norms: bool = False,
) -> StepMeasurements:
    """Add up all measurements over all ranks. Apart from the gradients, this is the only all-reduce of a step.

    Args:
        engine: with its gradients.
        shares: the result of :func:`forward_backward`.
        inputs: what this rank has read.
        to_compare: checksums of this rank, in steps that compare them.
        norms: of the engine's shards, if they exist already.
        parameter_norms: whether to measure the norms of the parameters, too.
        update_norms: whether to measure the norms of the last update, which must have been applied.
    """
    norms = norms or BlockNorms(engine)
    device, world, rank = shares.loss.device, dist.get_world_size(), dist.get_rank()
    flags = [inputs.drill_factor, inputs.save_requested, inputs.superseded, inputs.flip, inputs.snapshot_due]
    parts = {
        "means": torch.stack([shares.loss.double(), shares.activation_norm.double()]),
        "inputs": torch.tensor(flags, dtype=torch.float64, device=device),
        "gradients": norms.shares(engine.gradients()).to(device),
    }
    if parameter_norms:
        parts["parameters"] = norms.shares(engine.parameters()).to(device)
    if update_norms:
        parts["updates"] = norms.update_shares().to(device)
    # These values are not added up: each rank has a place of its own in the sum.
    if inputs.busy_seconds is not None:
        parts["busy"] = torch.zeros(world, dtype=torch.float64, device=device)
        parts["busy"][rank] = inputs.busy_seconds
    if shares.attention_logits is not None:
        parts["attention"] = shares.attention_logits.double().flatten()
    if to_compare is not None:
        table = torch.zeros(world, len(to_compare), dtype=torch.float64, device=device)
        table[rank] = to_compare
        parts["checksums"] = table.flatten()
    total = torch.cat(list(parts.values()))
    dist.all_reduce(total)
    sums = dict(zip(parts, _lists(total.tolist(), [len(part) for part in parts.values()]), strict=True))
    loss, activation_norm = sums["means"]
    drill_factor, save_requests, superseded, flip, snapshot_due = sums["inputs"]
    divisor = shares.divisor
    return StepMeasurements(
        loss=loss,
        activation_norm=activation_norm,
        gnorm=math.sqrt(sum(sums["gradients"])) / divisor,
        divisor=divisor,
        loss_scale=shares.loss_scale,
        block_gnorms={b: math.sqrt(s) / divisor for b, s in zip(norms.blocks, sums["gradients"], strict=True)},
        block_pnorms={b: math.sqrt(s) for b, s in zip(norms.blocks, sums.get("parameters", ()), strict=False)},
        block_unorms={b: math.sqrt(s) for b, s in zip(norms.blocks, sums.get("updates", ()), strict=False)},
        attention_logits=_largest(_rows(sums.get("attention", ()), engine.layout.tp)),
        drill_factor=drill_factor,
        save_requested=save_requests > 0,
        snapshot_due=snapshot_due > 0,
        superseded=superseded > 0,
        flip=int(flip) - 1 if flip else None,
        busy_seconds=sums.get("busy", ()),
        checksums=_rows(sums.get("checksums", ()), world),
    )


def _lists(values: Sequence[float], lengths: Sequence[int]) -> list[Sequence[float]]:
    """``values`` cut into pieces of these lengths."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _rows(values: Sequence[float], rows: int) -> list[Sequence[float]]:
    return _lists(values, [len(values) // rows] * rows) if values else []


def _largest(by_rank: Sequence[Sequence[float]]) -> Sequence[float]:
    """The largest logit of each layer; NaN where one is not a number."""
    return [math.nan if any(map(math.isnan, values)) else max(values) for values in zip(*by_rank, strict=True)]


def find_fault(
    step: int, measured: StepMeasurements, verdict: ChecksumVerdict | None, bad_module: str | None, rank: int
) -> Exception | None:
    """The error that ends training instead of update ``step``, if there is one."""
    if verdict is None or not verdict.ranks:
        if measured.finite:
            return None
        return NonFiniteError(
            f"step {step}: loss {measured.loss}, gradient norm {measured.gnorm}: not applied; first not finite: "
            f"{bad_module}"
        )
    ranks = ", ".join(map(str, verdict.ranks))
    doubt = "" if verdict.certain else " (one of them; no majority agrees)"
    text = f"step {step}: data is corrupt on rank {ranks}{doubt}: {verdict.what}; the update was not applied"
    return CorruptionError(text) if rank in verdict.ranks else PeerCorruptionError(text)


def advanced(progress: Progress, recipe: Recipe, *, applied: bool = True) -> Progress:
    """``progress`` after one more update. A skipped update uses up its batch and trains on no token."""
    batch = recipe.data.global_batch
    return replace(
        progress,
        step=progress.step + 1,
        data_position=progress.data_position + batch,
        tokens=progress.tokens + batch * recipe.data.seq_len * applied,
    )
