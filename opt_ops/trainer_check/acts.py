"""What the check does to ranks in the middle of training: signals, and a fence that names another attempt.

Each act gets an attempt that trains, and judges one promise. It may leave the attempt dead.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from pathlib import Path

from opt_ops.contract.exit_codes import ExitCode
from opt_ops.trainer_check.attempts import Attempt, Pace
from opt_ops.trainer_check.findings import Finding, broken, kept
from opt_ops.trainer_check.records import ended, files_named, problem_of

_DUMP_SECONDS = 10.0
_INTERRUPT_SECONDS = 5.0  # the node agent sends SIGKILL after that
_FENCE_SECONDS = 10.0
_LOOK_SECONDS = 1.5  # rank 0 reads the fence once a second
_QUIET_LOOKS = 40
_AFTERWARDS_SECONDS = 1.0  # a signal may be answered later


async def stacks(attempt: Attempt, pace: Pace) -> Finding:
    """SIGUSR2 to every rank: each appends its stacks to its file, and training continues."""
    ranks = range(len(attempt.ranks))
    files = {rank: attempt.run_dir / "stacks" / f"rank-{rank:04d}.txt" for rank in ranks}
    for rank in ranks:
        if not attempt.catches(rank, signal.SIGUSR2):
            return broken(f"rank {rank} has no handler for SIGUSR2, so the node agent does not send it")
    before, step = {rank: _size(path) for rank, path in files.items()}, attempt.last_step
    attempt.send(signal.SIGUSR2, *ranks)
    grown = await attempt.until(
        lambda: all(_size(path) > before[rank] for rank, path in files.items()) or not attempt.all_run, _DUMP_SECONDS
    )
    if not attempt.all_run:
        return broken(f"after SIGUSR2 at step {step}: {attempt.how()}")
    if not grown:
        silent = [f"stacks/{path.name}" for rank, path in files.items() if _size(path) <= before[rank]]
        return broken(f"after SIGUSR2 at step {step} nothing was written to {', '.join(silent)} in {_DUMP_SECONDS:g} s")
    if not await attempt.more_updates(3, pace.updates(3)):
        return broken(f"after SIGUSR2 at step {step} training did not continue: {attempt.how()}")
    await attempt.until(lambda: not attempt.all_run, _AFTERWARDS_SECONDS)
    if not attempt.all_run:
        return broken(f"after SIGUSR2 at step {step}, and the stacks: {attempt.how()}")
    for rank, path in files.items():
        if not re.search(r'(?m)^\s*File ".*", line \d+', path.read_text(encoding="utf-8", errors="replace")):
            return broken(f'stacks/{path.name} has no stack: no line `File "…", line … in …` (rank {rank})')
    return kept(f"every rank wrote its stacks at step {step}, and training continued")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


async def sigterm(attempt: Attempt, pace: Pace) -> Finding:
    """SIGTERM to all processes of all ranks: nothing changes."""
    saved, step = set(attempt.committed), attempt.last_step
    attempt.send_group(signal.SIGTERM)
    if not await attempt.more_updates(6, pace.updates(6)):
        return broken(f"after SIGTERM at step {step} training did not continue: {attempt.how()}")
    await attempt.until(lambda: not attempt.all_run, _AFTERWARDS_SECONDS)
    if not attempt.all_run:
        return broken(f"after SIGTERM at step {step}: {attempt.how()}")
    if new := sorted(set(attempt.committed) - saved):
        return broken(f"after SIGTERM at step {step} it saved step {new[0]}; the supervisor asks for a save by SIGUSR1")
    return kept(f"6 updates after SIGTERM to all ranks at step {step}")


async def save_on_request(attempt: Attempt, pace: Pace, files: int) -> Finding:
    """SIGUSR1 to one rank alone, then to the last alone, then to all: a checkpoint each time.

    Args:
        attempt: It saves at no interval.
        pace: Of the trainer.
        files: How many files a checkpoint of this trainer has; 0: not known.
    """
    last = len(attempt.ranks) - 1
    requests: dict[str, tuple[int, ...]] = {"rank 0": (0,)}
    if last:
        requests = {"rank 0 alone": (0,), f"rank {last} alone": (last,), "all ranks": tuple(range(last + 1))}
    steps: list[int] = []
    for who, ranks in requests.items():
        step = attempt.last_step
        new, why = await _asked_save(attempt, pace, ranks)
        if why:
            return broken(f"SIGUSR1 to {who} at step {step}: {why}")
        for found in new:
            path = attempt.committed[found]
            if problem := problem_of(path):
                return broken(f"SIGUSR1 to {who} at step {step}: the checkpoint of step {found} is damaged: {problem}")
            if (own := files_named(path)) < files:
                return broken(
                    f"SIGUSR1 to {who} at step {step}: the checkpoint of step {found} has {own} files, "
                    f"one that was saved by itself has {files}: a rank did not take part"
                )
        steps += new
        await asyncio.sleep(0.3)
    return kept(f"saved steps {', '.join(map(str, steps))} on SIGUSR1 to {', '.join(requests)}, and training continued")


async def _asked_save(attempt: Attempt, pace: Pace, ranks: tuple[int, ...]) -> tuple[list[int], str]:
    """The steps that were saved on one request, or what went wrong."""
    for rank in ranks:
        if not attempt.catches(rank, signal.SIGUSR1):
            return [], f"rank {rank} has no handler for it, so the node agent does not send it"
    saved, step = set(attempt.committed), attempt.last_step
    if len(ranks) > 1:
        attempt.send_group(signal.SIGSTOP)  # all of them get the signal between the same two updates
    attempt.send(signal.SIGUSR1, *ranks)
    attempt.send_group(signal.SIGCONT)
    seconds = pace.updates(8)
    await attempt.until(lambda: bool(set(attempt.committed) - saved) or not attempt.all_run, seconds)
    if not attempt.all_run:
        return [], attempt.how()
    if not set(attempt.committed) - saved:
        stands = "training goes on" if attempt.last_step > step + 1 else f"no update after step {attempt.last_step}"
        return [], f"no committed checkpoint in {seconds:.0f} s; {stands}"
    if not await attempt.more_updates(4, pace.updates(4)):
        return [], f"no update followed the save: {attempt.how()}, last step {attempt.last_step}"
    new = sorted(set(attempt.committed) - saved)
    if len(new) > len(ranks):
        return [], f"{len(new)} checkpoints for one request: steps {', '.join(map(str, new))}"
    if new[0] < step:
        return [], f"the checkpoint is of step {new[0]}, before the request"
    return new, ""


async def sigint(attempt: Attempt, pace: Pace) -> Finding:
    """Stop the last rank, so that the others wait for it. SIGINT then ends each rank within five seconds."""
    last, saved, step = len(attempt.ranks) - 1, set(attempt.committed), attempt.last_step
    if last:
        attempt.send_group(signal.SIGSTOP, last)
        await _stalled(attempt, pace)
    for ranks in (range(last), [last]) if last else ([0],):
        began = time.monotonic()
        attempt.send_group(signal.SIGINT, *ranks)
        attempt.send_group(signal.SIGCONT, *ranks)
        if not await attempt.until(
            lambda ranks=ranks: all(attempt.codes[k] is not None for k in ranks), _INTERRUPT_SECONDS
        ):
            slow = [f"rank {rank}" for rank in ranks if attempt.codes[rank] is None]
            waited = " while it waited for a rank that was stopped" if last and last not in ranks else ""
            return broken(
                f"{', '.join(slow)} still ran {time.monotonic() - began:.0f} s after SIGINT at step {step}{waited}"
            )
    if new := sorted(set(attempt.committed) - saved):
        return broken(f"after SIGINT at step {step} it saved step {new[0]}; it must leave at once")
    waited = ", also while it waited for a rank that was stopped" if last else " (1 rank: no peer to wait for)"
    return kept(f"every rank ended within {_INTERRUPT_SECONDS:g} s at step {attempt.last_step}{waited}")


async def _stalled(attempt: Attempt, pace: Pace) -> None:
    """Wait until no update comes any more."""
    still, deadline = max(0.5, 4 * pace.step_seconds), time.monotonic() + pace.updates(4)
    known, since = attempt.count, time.monotonic()
    while time.monotonic() - since < still and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
        if attempt.count != known:
            known, since = attempt.count, time.monotonic()


async def fence_between_updates(attempt: Attempt) -> Finding:
    """First the fence of every rank but rank 0 names another attempt, then that of rank 0. All must leave together."""
    step, last = attempt.last_step, len(attempt.ranks) - 1
    superseded = [int(ExitCode.SUPERSEDED)] * (last + 1)
    for rank in range(1, last + 1):
        attempt.supersede(rank)
    if last:
        await attempt.until(lambda: not attempt.all_run, _LOOK_SECONDS)
        if not attempt.all_run:
            await attempt.until(lambda: attempt.over, _FENCE_SECONDS)
            if list(attempt.codes) != superseded:
                return broken(
                    f"only the fence of other ranks than 0 named another attempt at step {step}, and ranks did not "
                    f"leave together: {ended(attempt.codes)}. Rank 0 alone must look, and tell the others"
                )
            return kept(f"all ranks left with 83 after step {attempt.last_step}")
    step, saved = attempt.last_step, set(attempt.committed)
    attempt.supersede()
    if not await attempt.until(lambda: attempt.over, _FENCE_SECONDS):
        return broken(f"the fence named another attempt at step {step}; {_FENCE_SECONDS:g} s later: {attempt.how()}")
    if list(attempt.codes) != superseded:
        return broken(f"the fence named another attempt at step {step}; not all ranks left with 83: {attempt.how()}")
    if late := sorted(set(attempt.committed) - saved):
        return broken(f"the fence named another attempt at step {step}, and step {late[0]} was committed after that")
    return kept(f"all ranks left with 83 after step {attempt.last_step}")


async def fence_before_marker(attempt: Attempt, pace: Pace) -> Finding:
    """Every update saves. The fence changes while no save is in flight: no later save may get a marker."""
    if not await attempt.until(lambda: len(attempt.committed) >= 2, pace.updates(8)):
        return kept("")  # it does not save at every step: nothing more is known
    for _ in range(_QUIET_LOOKS):
        attempt.send_group(signal.SIGSTOP)
        await asyncio.sleep(0.02)
        if quiet := not attempt.unfinished:
            break
        attempt.send_group(signal.SIGCONT)
        await asyncio.sleep(0.007)
    else:
        quiet = False
        attempt.send_group(signal.SIGSTOP)
        await asyncio.sleep(0.02)
    before, step = set(attempt.committed), attempt.last_step
    for rank in range(len(attempt.ranks)):
        attempt.supersede(rank)
    attempt.send_group(signal.SIGCONT)
    left = await attempt.until(lambda: attempt.codes[0] is not None, _FENCE_SECONDS)
    late = sorted(set(attempt.committed) - before)
    if len(late) > (0 if quiet else 1):  # where a save was in flight, the file may have been read just before
        return broken(f"the fence named another attempt at step {step}, and step {late[-1]} was committed after that")
    if not left or attempt.codes[0] != ExitCode.SUPERSEDED:
        return broken(
            f"with a save after every update: the fence named another attempt at step {step}: {attempt.how()}"
        )
    return kept("")
