"""One training step. The functions stand in the order in which a step runs them.

1. Choose the batch: :func:`choose_batch`.
2. Run forward and backward pass for each micro-batch: :func:`forward_backward`.
3. Add up all measurements over all ranks, in one all-reduce: :func:`trainer.step.sums.add_up`.
4. Queue the update (:meth:`trainer.parallel.engine.Engine.update`), on a condition that the device checks: nothing is
   unusual. Then a GPU does not idle while the host reads what was measured.
5. Decide whether an unusual update may be applied: :func:`find_fault` and :class:`trainer.step.guard.Guard`.
6. Advance the position in the data: :func:`advanced`.

The host decides before any update is queued in two cases: where checksums are compared, because any rank may hold wrong
data, and where a step is unusual (:meth:`trainer.step.sums.Sums.usual`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from opt_ops.contract.skip_windows import next_sample
from trainer import optim
from trainer.data.samples import part
from trainer.errors import CorruptionError, NotFiniteError, PeerCorruptionError
from trainer.parallel.engine import Engine
from trainer.recipes import Recipe
from trainer.step.attention_logits import sampling
from trainer.step.batches import put
from trainer.step.checksums import Checksums, ChecksumVerdict
from trainer.step.guard import Guard, first_bad_module
from trainer.step.kill_drill import KillDrill
from trainer.step.measured import Progress, StepMeasurements, StepOutcome
from trainer.step.norms import BlockNorms
from trainer.step.rank_inputs import RankInputs, StepInputs
from trainer.step.sums import Shares, Sums, add_up

DRILLED = "the loss, which a drill made NaN"
"""Where numbers first stopped being finite, in a step that a drill spoils."""


class SampleSource(Protocol):
    """Gives samples by their index in the lineage."""

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of ``count`` samples from ``first`` on: two int64 tensors [count, seq_len]."""
        ...


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
        drill: kills this rank at a place of a step.
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
        drill: KillDrill | None = None,
    ) -> None:
        self._recipe, self._lr_factors, self._skips = recipe, lr_factors, skips
        self._engine, self._samples = engine, samples
        self._guard, self._inputs, self._checksums = guard, inputs, checksums
        self._drill = drill or KillDrill(engine.layout.rank)
        self._norms = BlockNorms(engine)
        self._applied = False  # whether the step before applied its update; in a new process there was none

    def restored(self) -> None:
        """Begin again as a new process does, because the state was replaced by that of a copy.

        Ranks that kept their process and those that did not then add the same values to the sums of a step.
        """
        self._applied = False
        self._checksums.restored()
        self._inputs.restart()

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
        with self._drill.inside(engine, step):
            shares = run(sample=closely, spoil=self._inputs.spoils(step))
        self._drill.passes("measure", step)
        inputs = self._inputs.read(step)
        last = closely and self._applied
        sums = add_up(engine, shares, inputs, to_compare, self._norms, parameter_norms=closely, update_norms=last)
        self._drill.passes("update", step)
        # 4. Queue the update. One that is not applied also sets the learning rate, because telemetry reads it back.
        lr = optim.learning_rate(step, self._recipe.optim, self._lr_factors)
        optim.set_learning_rate(engine.optimizer, lr)
        measured = self._queue_update(sums, shares.divisor, lr) if to_compare is None else sums.reader()()
        # 5. May an update be applied that is not queued?
        agreed = self._inputs.agreed(measured.outside)
        self._drill.hear(agreed.kill, step + 1)
        verdict = checksums.judge(measured.checksums)
        bad_module = None if measured.finite else DRILLED if agreed.nan else self._first_bad_module(run)
        fault = find_fault(step, measured, verdict, bad_module, engine.layout.rank)
        skip = None
        lr *= agreed.lr_factor
        optim.set_learning_rate(engine.optimizer, lr)
        if fault is None:
            skip = guard.skip_reason(measured)
            if skip is None and not measured.usual:
                engine.update(sums.gnorm, lr, measured.divisor)  # not the norm of the host: its last bits may differ
            self._applied = skip is None
            # 6. Advance.
            progress = advanced(before, self._recipe, applied=skip is None)
            checksums.updated(step, agreed.flip)
            fault = guard.loss_scale_error()
        assert not measured.usual or (fault is None and skip is None), "an update was applied that must not be"
        return StepOutcome(
            measured=measured,
            agreed=agreed,
            progress=progress,
            skipped=guard.skipped,
            skip=skip,
            bad_module=bad_module,
            verdict=verdict,
            fault=fault,
        )

    def _first_bad_module(self, run_again: Callable[[], object]) -> str:
        layout = self._engine.layout
        exact = self._recipe.deterministic or layout.device.type == "cpu"
        return first_bad_module(self._engine.model, run_again, layout.host, exact=exact)

    def _queue_update(self, sums: Sums, divisor: float, lr: float) -> StepMeasurements:
        """Queue the update, unless the device finds something unusual. Then wait for what was measured."""
        usual = sums.usual(self._guard.limits())
        read = sums.reader(usual)
        self._engine.update(sums.gnorm, lr, divisor, unless=~usual)
        return read()


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
    spoil: bool = False,
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
        spoil: whether to make the loss NaN, for a drill. In the sums over ranks, the NaN reaches all of them.
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
        inputs, targets, now = put(*samples.batch(first, max(1, count)), clock.values(), layout.device)
        clock.place(now)
        with engine.micro_step(last=micro_step == micro_steps - 1):
            with sampling(engine, wanted=sample and micro_step == layout.dp_rank == 0) as by_layer:
                loss, activation_norm = engine.loss(inputs, targets)
            if logits is not None and by_layer:
                logits[layout.tp_rank] = torch.stack(by_layer)
            if count == 0:
                loss, activation_norm = loss * 0, activation_norm * 0
            if spoil:
                loss = loss * math.nan
            (loss * loss_scale if loss_scale else loss).backward()
        loss_sum = loss_sum + loss.detach()
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
    """:func:`trainer.step.sums.add_up`, and wait for the result."""
    sums = add_up(engine, shares, inputs, to_compare, norms, parameter_norms=parameter_norms, update_norms=update_norms)
    return sums.reader()()


def find_fault(
    step: int, measured: StepMeasurements, verdict: ChecksumVerdict | None, bad_module: str | None, rank: int
) -> Exception | None:
    """The error that ends training instead of update ``step``, if there is one."""
    if verdict is None or not verdict.ranks:
        if measured.finite:
            return None
        return NotFiniteError(
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
