"""Where the data of a lineage changes, in samples."""

from collections.abc import Sequence

from opt_ops.contract.skip_windows import next_sample
from trainer.errors import UserError


def first_samples(
    changes: Sequence[int],
    step: int,
    position: int,
    batch: int,
    skips: Sequence[tuple[int, int]],
    recorded: Sequence[Sequence[int]] = (),
) -> list[int]:
    """For each change of the data, the first sample of the order that begins with it.

    A change after ``step`` begins where training will be then: each update uses up a batch, applied or not. An earlier
    one began where the checkpoint says. That cannot be computed: a batch may have had another size then.

    Args:
        changes: steps after which other data is trained on, ascending.
        step: the last update so far.
        position: index of the sample after the last one that was used.
        batch: samples in a batch.
        skips: windows (first, last) of batches to skip.
        recorded: (step, first sample) of earlier changes, from the checkpoint.

    Raises:
        UserError: the checkpoint was not trained with a change before it.
    """
    known, found = {int(each): int(first) for each, first in recorded}, []
    for change in changes:
        if change < step:
            if change not in known:
                raise UserError(
                    f"--data-since {change}:…: the checkpoint of step {step} was trained without that change. Resume "
                    f"from a checkpoint of step {change} or before, or leave the option out."
                )
            found.append(known[change])
            continue
        for _ in range(step, change):
            position = next_sample(position, batch, skips) + batch
        step = change
        found.append(position)
    return found
