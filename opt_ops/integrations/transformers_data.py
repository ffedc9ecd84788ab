"""The order of data of a ``transformers.Trainer`` under supervision: whole batches, windows left out."""

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from opt_ops.contract import UserError, next_sample


class Trained(Protocol):
    """What has been trained so far."""

    step: int
    position: int


class WindowSampler(torch.utils.data.Sampler[int]):
    """The order of the trainer's own sampler, cut into the batches of updates, without the windows to leave out.

    The samples of all epochs have one number each, from 0: the *position*. An epoch has as many updates as there are
    whole batches in the data; the samples that are left over at its end are not trained on.

    After a resume, transformers skips as many batches as the epoch had before the checkpoint. With windows these are
    not the batches that were trained on. So they are placeholders here, and the samples after them begin at the
    position of the checkpoint. transformers draws placeholders from the sampler only, and loads no data for them.

    Args:
        original: the sampler that the trainer would use.
        samples: in the data set.
        batch: samples of an update, over all ranks.
        seed: of the order.
        steps: the last update.
        skips: windows (first, last) of batches to leave out.
        trained: what has been trained when an iteration begins.

    Raises:
        UserError: there is no whole batch in the data.
    """

    def __init__(
        self,
        original: torch.utils.data.Sampler[int],
        *,
        samples: int,
        batch: int,
        seed: int,
        steps: int,
        skips: Sequence[tuple[int, int]],
        trained: Trained,
    ) -> None:
        if samples < batch:
            raise UserError(f"the data set has {samples} samples, and an update needs {batch}: take smaller batches.")
        self.updates_per_epoch = samples // batch
        self.begun = False
        self._original, self._batch, self._seed = original, batch, seed
        self._steps, self._skips, self._trained = steps, tuple(skips), trained
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return self.updates_per_epoch * self._batch

    def __iter__(self) -> Iterator[int]:
        self.begun = True
        step, position = self._trained.step, self._trained.position
        over = step % self.updates_per_epoch
        for _ in range(over * self._batch):
            yield 0
        for _ in range(min(self.updates_per_epoch - over, self._steps - step)):
            position = next_sample(position, self._batch, self._skips)
            for each in range(position, position + self._batch):
                yield self._sample_at(each)
            position += self._batch

    def _sample_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return self._order[place]

    def _order_of(self, epoch: int) -> list[int]:
        """The order of one epoch: a function of the seed and the epoch alone, and no other random numbers are drawn."""
        seed = self._seed + epoch
        generator = getattr(self._original, "generator", None) or torch.default_generator
        torch_state, python_state = generator.get_state(), random.getstate()
        generator.manual_seed(seed)
        random.seed(seed)
        try:
            return [int(index) for index in self._original]
        finally:
            generator.set_state(torch_state)
            random.setstate(python_state)
