"""Skip windows: batches of the original data order that training skips.

An operator or a recovery orders them. A trainer gets each of them as ``--skip-batches FIRST:LAST``.
"""

from collections.abc import Iterable


def parse_skip_window(text: str) -> tuple[int, int]:
    """The (first, last) batch in ``FIRST:LAST``. Both are skipped; 1 is the first batch.

    Raises:
        ValueError: the text has another form, or the batches are not 1 ≤ first ≤ last.
    """
    first, _, last = text.partition(":")
    try:
        window = int(first), int(last)
    except ValueError:
        window = 0, 0
    if not 1 <= window[0] <= window[1]:
        raise ValueError(
            "expected FIRST:LAST, two batch numbers with 1 <= FIRST <= LAST, for example 301:360. 1 is the first batch."
        )
    return window


def next_sample(position: int, batch: int, skips: Iterable[tuple[int, int]]) -> int:
    """The first sample of the next update: ``position``, or the first sample after the windows that begin there.

    No update trains on a sample of a window. That also holds where the batch size has changed at a checkpoint and
    ``position`` is no multiple of the new size.

    Args:
        position: index of the sample after the last one that was trained on. Windows that end before it have no effect.
        batch: samples in a batch.
        skips: windows (first, last) of batches to skip, from 1. Windows may overlap.
    """
    for first, last in sorted(skips):
        if (first - 1) * batch < position + batch and position < last * batch:
            position = last * batch
    return position


def batch_of(step: int, skips: Iterable[tuple[int, int]]) -> int:
    """The batch of the original order that update ``step`` trains on, both from 1, if all windows apply from the start.

    Args:
        step: number of the update.
        skips: windows (first, last) of batches to skip. They may overlap.
    """
    batch, end = step, 0
    for first, last in sorted(skips):
        skipped = last - max(first - 1, end)  # batches that no window before has skipped
        if batch < first:
            break
        batch, end = batch + max(0, skipped), max(end, last)
    return batch
