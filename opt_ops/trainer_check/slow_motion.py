"""Watches saves in slow motion: between slices of a tenth of a millisecond, all ranks are stopped.

What lies on the disk while they are stopped is what SIGKILL would leave at that moment. The pauses also make the times
of files tell their order: the kernel's clock for them may tick only every few milliseconds.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from opt_ops.contract.manifest import MARKER
from opt_ops.trainer_check.attempts import Attempt, Pace
from opt_ops.trainer_check.findings import Finding, broken, kept, unknown
from opt_ops.trainer_check.records import FILE_CLOCK_SECONDS, files_below, problem_of

_SAVES = 20
_SLICE_SECONDS = 0.0001
_PAUSE_SECONDS = max(0.005, 1.5 * FILE_CLOCK_SECONDS)
_LONGEST_SECONDS = 6.0


async def watch_saves(attempt: Attempt, pace: Pace) -> Finding:
    """Watch an attempt that saves after every update, then kill it in a save. It is dead afterwards."""
    if not await attempt.until(lambda: len(attempt.committed) >= 1, pace.updates(4)):
        return unknown(f"it did not save with checkpoint_every=1: {attempt.how()}")
    seen = {path.name for path in attempt.committed.values()}
    deadline, count, problem, caught = time.monotonic() + _LONGEST_SECONDS, 0, "", ""
    while not problem and attempt.all_run and time.monotonic() < deadline:
        attempt.send_group(signal.SIGCONT)
        time.sleep(_SLICE_SECONDS)  # noqa: ASYNC251  (the loop's own clock is too coarse)
        attempt.send_group(signal.SIGSTOP)
        await asyncio.sleep(_PAUSE_SECONDS)
        for step, path in attempt.committed.items():
            if path.name not in seen:
                seen.add(path.name)
                count += 1
                attempt.watched.append(step)
                attempt.look_at_lines(max(attempt.committed, default=0))
                problem = problem or _damage(path)
        if count >= _SAVES and (names := attempt.unfinished):
            caught = names[0]
            break
    attempt.send_group(signal.SIGCONT)
    if not problem and not caught and attempt.all_run:
        await attempt.until(
            lambda: len(seen | set(map(_name, attempt.committed.values()))) > _SAVES, pace.updates(_SAVES)
        )
    attempt.send_group(signal.SIGKILL)
    await attempt.until(lambda: attempt.over, 5.0)
    saved = list(attempt.committed.values())
    problem = problem or next((found for path in saved if (found := _damage(path))), "") or younger(saved)
    if problem:
        return broken(problem)
    where = f"in the save of {caught}" if caught else "between saves"
    return kept(
        f"{len(seen | set(map(_name, saved)))} saves, the marker was last; SIGKILL {where} left no false marker"
    )


def _name(path: Path) -> str:
    return path.name


def _damage(path: Path) -> str:
    found = problem_of(path)
    if not found or not (path / MARKER).exists():  # pruned meanwhile
        return ""
    return f"{path.name} had its marker and was not whole: {found}"


def younger(saved: Sequence[Path]) -> str:
    """The first file that is younger than the marker of its checkpoint. Empty if there is none."""
    for path in saved:
        try:
            marker = (path / MARKER).stat().st_mtime_ns
            for file in files_below(path):
                if (later := file.stat().st_mtime_ns - marker) > 0:
                    return f"{path.name}: {file.relative_to(path)} is {later / 1e6:.3f} ms younger than {MARKER}"
        except OSError:  # pruned meanwhile
            continue
    return ""
