"""The loss on text that is not trained on, corpus by corpus, each at its own interval."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.data.samples import Samples, part
from trainer.data.tokens import TokenFile
from trainer.errors import UserError
from trainer.parallel.engine import Engine
from trainer.recipes import Recipe
from trainer.telemetry import Phases

# Of the order of validation data, which is no run's own: all runs are measured on the same sequences.
_SEED = 0


class Evaluation:
    """Measures the model on the same sequences each time: those that an order of its own puts first.

    Args:
        recipe: for sizes and the usual interval.
        corpora: what to measure on; ``number`` is the interval in updates, None the recipe's.
        engine: the model.
        phases: where to say when it begins.

    Raises:
        UserError: a corpus is shorter than a sample.
    """

    def __init__(self, recipe: Recipe, corpora: Sequence[TokenFile], engine: Engine, phases: Phases) -> None:
        self._recipe = recipe
        self._engine = engine
        self._phases = phases
        self._samples: dict[str, Samples] = {}
        self._every: dict[str, int] = {}
        for file in corpora:
            try:
                self._samples[file.name] = Samples(file.ids, recipe.data.seq_len, _SEED, file.bounds)
            except UserError as error:
                raise UserError(f"--valid {file.name}: {error}") from error
            self._every[file.name] = int(file.number or recipe.evaluate_every)

    def after(self, step: int) -> tuple[dict[str, float], float]:
        """Measure on what is due after update ``step``: on all after the last. As :meth:`run`."""
        due = [name for name, every in self._every.items() if step % every == 0 or step == self._recipe.steps]
        if not due:
            return {}, 0.0
        self._phases.enter("evaluation", step)
        return self.run(due)

    def run(self, names: Sequence[str]) -> tuple[dict[str, float], float]:
        """Measure on these corpora, on all ranks together; nothing of the training changes.

        Returns:
            The mean loss over each corpus, in nats per token, and the seconds that it all took.
        """
        begin = time.monotonic()
        layout, seq_len = self._engine.layout, self._recipe.data.seq_len
        sums, tokens = [], []
        with _evaluating(self._engine):
            for name in names:
                samples = self._samples[name]
                count = min(samples.blocks, self._recipe.evaluate_sequences)
                sums.append(self._loss_sum(samples, count) / layout.tp)  # each of so many ranks has the same
                tokens.append(count * seq_len)
        total = torch.stack(sums)
        dist.all_reduce(total)
        losses = [loss / count for loss, count in zip(total.tolist(), tokens, strict=True)]
        return dict(zip(names, losses, strict=True)), time.monotonic() - begin

    def _loss_sum(self, samples: Samples, count: int) -> Tensor:
        """Of this rank's part of the first ``count`` samples."""
        engine, layout = self._engine, self._engine.layout
        share = part(0, count, layout.dp, layout.dp_rank)
        # As many as the largest share needs: each is a round of collectives, which all ranks must go through together.
        micro_steps = math.ceil(math.ceil(count / layout.dp) / self._recipe.data.micro_batch)
        engine.model.clock.first_position = engine.first_position(self._recipe.data.seq_len)
        total = torch.zeros((), dtype=torch.float64, device=layout.device)
        for micro_step in range(micro_steps):
            first, own = part(*share, micro_steps, micro_step)
            batch = samples.batch(first if own else 0, max(1, own))  # something to go through the motions with
            with engine.micro_step(last=True):
                loss, _ = engine.loss(*(ids.to(layout.device) for ids in batch))
            if own:
                total += loss.to_local() if isinstance(loss, DTensor) else loss
        return total


@contextmanager
def _evaluating(engine: Engine) -> Iterator[None]:
    """Without dropout and gradients; and each rank holds no more than its shards again, as saves expect it."""
    engine.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.model.train()
        for module in engine.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
