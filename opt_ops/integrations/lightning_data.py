"""The order of data of a Lightning ``Trainer`` under supervision: one stream of micro-batches to the last update."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from opt_ops.contract import UserError, next_sample


class MicroBatches:
    """The indices of each micro-batch of one rank, from the update after the checkpoint to the last one.

    The samples of all epochs have one number each, from 0: the *position*. An epoch has as many updates as there are
    whole batches in the data; the samples that are left over at its end are not trained on. An update takes the samples
    of all ranks for its first micro-batch, then those for its second.

    The length counts the micro-batches before the checkpoint, too: Lightning counts them as fetched.

    Args:
        loader: of the script.
        seed: of the order of each epoch, where the script's loader shuffles.
        rank: which one of ``world`` ranks this is.
        world: number of ranks.
        accumulate: micro-batches of an update.

    Raises:
        UserError: the loader is of a kind that can leave out no batch, or find no place again.
    """

    def __init__(self, loader: Any, *, seed: int, rank: int, world: int, accumulate: int) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise UserError(
                f"the training data come from a {type(loader).__name__}: under supervision they need one DataLoader "
                "over a data set with __getitem__ and __len__, so that batches can be left out."
            )
        if loader.batch_size is None or not isinstance(loader.sampler, RandomSampler | SequentialSampler):
            raise UserError(
                f"the training data have a sampler of their own ({type(loader.sampler).__name__}): give batch_size and "
                "shuffle to the DataLoader instead, so that a resume finds its place."
            )
        if isinstance(loader.sampler, RandomSampler) and (
            loader.sampler.replacement or loader.sampler.num_samples != len(loader.dataset)  # pyright: ignore[reportArgumentType]
        ):
            raise UserError("a RandomSampler with replacement or num_samples is not supported under supervision.")
        self._shuffles = isinstance(loader.sampler, RandomSampler)
        self._samples = len(loader.dataset)  # pyright: ignore[reportArgumentType]  checked above: it has a length
        self._size, self._seed, self._rank, self._world = loader.batch_size, seed, rank, world
        self._accumulate = accumulate
        self.batch = self._size * world * accumulate
        self.updates_per_epoch = self._samples // self.batch
        if not self.updates_per_epoch:
            raise UserError(f"the data set has {self._samples} samples, and an update needs {self.batch}.")
        self._steps = 0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def begin(self, steps: int, skips: Sequence[tuple[int, int]], trained: Callable[[], tuple[int, int]]) -> None:
        """Say what is trained. ``trained``: the last update, and the position after it, when the iteration begins."""
        self._steps, self._skips, self._trained = steps, tuple(skips), trained

    def __len__(self) -> int:
        return self._steps * self._accumulate

    def __iter__(self) -> Iterator[list[int]]:
        step, position = self._trained()
        for _ in range(self._steps - step):
            position = next_sample(position, self.batch, self._skips)
            for micro in range(self._accumulate):
                first = position + (micro * self._world + self._rank) * self._size
                yield [self._sample_at(each) for each in range(first, first + self._size)]
            position += self.batch

    def _sample_at(self, position: int) -> int:
        epoch, place = divmod(position, self.updates_per_epoch * self.batch)
        if not self._shuffles:
            return place
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._samples, generator=generator)
        return int(self._order[place])


def with_batches(loader: DataLoader[Any], batches: MicroBatches) -> DataLoader[Any]:
    """The loader of the script, but for the order of its samples."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]  an iterable of lists of indices
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
