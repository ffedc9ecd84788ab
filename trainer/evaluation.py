"""The loss on text that training does not use, for each corpus at its own interval."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from trainer.data.samples import Samples, part
from trainer.data.tokens import TokenFile
from trainer.errors import UserError
from trainer.parallel.engine import Engine
from trainer.recipes import Recipe

# Decides the order of validation data. It is the same for all runs, so all are measured on the same sequences.
_SEED = 0


class Evaluation:
    """Measures the model on the same sequences each time: the first ones in a fixed shuffled order.

    Args:
        recipe: for the sizes and the default interval.
        corpora: what to measure on. ``number`` is the interval in updates; None means the default.
        engine: the model.

    Raises:
        UserError: a corpus is shorter than a sample.
    """

    def __init__(self, recipe: Recipe, corpora: Sequence[TokenFile], engine: Engine) -> None:
        self._recipe = recipe
        self._engine = engine
        self._samples: dict[str, Samples] = {}
        self._every: dict[str, int] = {}
        for file in corpora:
            try:
                self._samples[file.name] = Samples(file.ids, recipe.data.seq_len, _SEED, file.bounds)
            except UserError as error:
                raise UserError(f"--valid {file.name}: {error}") from error
            self._every[file.name] = int(file.number or recipe.evaluate_every)

    def due(self, step: int) -> list[str]:
        """The names of the corpora to measure on after update ``step``. After the last update: all."""
        return [name for name, every in self._every.items() if step % every == 0 or step == self._recipe.steps]

    def run(self, names: Sequence[str]) -> tuple[dict[str, float], float]:
        """Measure on these corpora, on all ranks together. The state of training does not change.

        Returns:
            The mean loss over each corpus, in nats per token, and the seconds that all of it took.
        """
        begin = time.monotonic()
        layout, seq_len = self._engine.layout, self._recipe.data.seq_len
        sums, tokens = [], []
        with _evaluating(self._engine):
            for name in names:
                samples = self._samples[name]
                count = min(samples.blocks, self._recipe.evaluate_sequences)
                sums.append(self._loss_sum(samples, count) / layout.tp)  # tp ranks hold the same sum
                tokens.append(count * seq_len)
        total = torch.stack(sums)
        dist.all_reduce(total)
        losses = [loss / count for loss, count in zip(total.tolist(), tokens, strict=True)]
        return dict(zip(names, losses, strict=True)), time.monotonic() - begin

    def _loss_sum(self, samples: Samples, count: int) -> Tensor:
        """The sum of the loss over this rank's part of the first ``count`` samples."""
        engine, layout = self._engine, self._engine.layout
        share = part(0, count, layout.dp, layout.dp_rank)
        # As many as the largest share needs: each is a round of collectives, so all ranks must run the same number.
        micro_steps = math.ceil(math.ceil(count / layout.dp) / self._recipe.data.micro_batch)
        engine.model.clock.first_position = engine.first_position(self._recipe.data.seq_len)
        total = torch.zeros((), dtype=torch.float64, device=layout.device)
        for micro_step in range(micro_steps):
            first, own = part(*share, micro_steps, micro_step)
            # Without a sample of its own, a rank only takes part in the collectives. Any sample will do.
            batch = samples.batch(first if own else 0, max(1, own))
            with engine.micro_step(last=True):
                loss, _ = engine.loss(*(ids.to(layout.device) for ids in batch))
            if own:
                total += loss
        return total


@contextmanager
def _evaluating(engine: Engine) -> Iterator[None]:
    """Turn dropout and gradients off. Afterwards each rank holds only its shards again, as a save expects."""
    engine.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.model.train()
        for module in engine.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
