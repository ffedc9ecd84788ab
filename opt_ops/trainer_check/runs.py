"""Which attempts are made, and what they did. Two of them run at a time: a trainer waits most of its start-up time.

A few attempts serve all promises. The one without interruption is the reference of all others. Its saves are resumed,
damaged and compared. Attempts that are compared have the same `steps`, since a schedule may depend on it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from opt_ops.contract.manifest import step_folder
from opt_ops.trainer_check import acts, slow_motion
from opt_ops.trainer_check.attempts import ENDLESS, Attempt, Attempts, Launch
from opt_ops.trainer_check.damage import TORN, copied, flip, make_stale
from opt_ops.trainer_check.findings import Finding, unknown
from opt_ops.trainer_check.judge_ends import drill_was_read
from opt_ops.trainer_check.records import Ran, files_named
from opt_ops.trainer_check.seen import (
    EARLY,
    EARLY_AS_ONE,
    EVERY,
    FACTOR,
    FROZEN,
    HUGE,
    LAST,
    MIDDLE,
    NAN_AT,
    UNKNOWN_SETTING,
    Seen,
    late_one_by_one,
    late_windows,
)

_Job = tuple[str, Callable[[], Awaitable[None]]]
"""The promises that an attempt serves, and what makes it."""

_SIGNALS = "stacks sigterm save_on_request sigint"


class Runs:
    """Makes the attempts and fills `seen`.

    Args:
        attempts: Starts them.
        ranks: Numbers of ranks.
        on_progress: Gets the name of each attempt that begins.
        only: Make only the attempts that these promises need. Empty: all.
    """

    def __init__(
        self,
        attempts: Attempts,
        ranks: Sequence[int],
        on_progress: Callable[[str], None],
        only: Collection[str] = (),
    ) -> None:
        self.seen = Seen(tuple(sorted(set(ranks))))
        self.attempts = attempts
        self._on_progress = on_progress
        self._only = only
        # On GPUs two attempts at a time might not have room.
        self._lanes = asyncio.Semaphore(1 if os.path.exists("/dev/nvidiactl") else 2)  # noqa: PTH110

    async def make_all(self) -> Seen:
        """Make all attempts.

        Raises:
            OSError: the command cannot be started.
        """
        seen = self.seen
        for world in seen.ranks:
            base = await self._run(Launch(name=f"base_{world}", world=world, steps=LAST, every=EVERY))
            self.attempts.pace.learn(base)
            saves = [step for step, _ in base.saved if step < LAST]
            if saves:
                seen.middle[world] = MIDDLE if MIDDLE in saves else saves[-1]
        if not any(base.telemetry.steps for base in seen.runs.values()):
            return seen  # it does not train at all
        jobs = [
            job for promises, job in [*self._acts(), *self._comparisons(), *self._refusals()] if self._wanted(promises)
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(self._in_lane(job))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return seen

    def _wanted(self, promises: str) -> bool:
        return not self._only or not set(self._only).isdisjoint(promises.split())

    def _acts(self) -> list[_Job]:
        """Attempts in which something comes in the middle."""
        return [
            (_SIGNALS, self._signals),
            ("marker_last telemetry phases", self._saves),
            ("fence", self._fence),
            ("non_finite", self._nan),
        ]

    async def _in_lane(self, job: Callable[[], Awaitable[None]]) -> None:
        async with self._lanes:
            await job()

    async def _run(self, launch: Launch, *, refused: bool = False) -> Ran:
        self._on_progress(launch.name)
        ran = await self.attempts.run(launch, refused=refused)
        self.seen.runs[launch.name] = ran
        return ran

    def _comparisons(self) -> list[_Job]:
        """Attempts whose losses are compared with those of the reference."""
        seen, jobs = self.seen, list[_Job]()
        for world in seen.ranks:
            if path := seen.checkpoint(world):
                job = partial(self._resume, f"resume_{world}", world, path)
                jobs.append(("resume_step resume_data lr_restored skip_batches layout save_on_request", job))
            if path := seen.checkpoint(world, LAST):
                jobs.append(("ends_at_last_step", partial(self._resume, f"resume_last_{world}", world, path)))
        world, middle = seen.most, seen.middle_of(seen.most)
        factor = ("--lr-factor", f"{middle}:{FACTOR}")
        jobs.append(("lr_factor lr_restored", partial(self._scratch, "lr_factor", world, factor)))
        jobs.append(("skip_batches", partial(self._windows, world, middle)))
        frozen = ("--lr-factor", f"0:{FROZEN}")
        windows = _skips(*EARLY, *late_windows(middle))
        jobs.append(("skip_batches", partial(self._scratch, "frozen", world, frozen)))
        jobs.append(("skip_batches", partial(self._scratch, "frozen_windows", world, (*frozen, *windows))))
        if path := seen.checkpoint(world):
            jobs.append(("lr_restored", partial(self._resume, "lr_factor_resume", world, path, factor)))
            if seen.least != world:
                jobs.append(("layout", partial(self._resume, "layout", seen.least, path)))
        return jobs

    async def _scratch(self, name: str, world: int, extra: tuple[str, ...]) -> None:
        await self._run(Launch(name=name, world=world, steps=LAST, every=EVERY, extra=extra))

    async def _resume(self, name: str, world: int, path: Path, extra: tuple[str, ...] = ()) -> None:
        start = ("--resume", str(path))
        await self._run(Launch(name=name, world=world, steps=LAST, every=EVERY, start=start, extra=extra))

    async def _windows(self, world: int, middle: int) -> None:
        await self._scratch("skip_batches", world, _skips(*EARLY, *late_windows(middle)))
        saved = dict(self.seen.runs["skip_batches"].saved)
        if middle in saved:
            extra = _skips(*EARLY_AS_ONE, *late_one_by_one(middle))
            await self._resume("skip_batches_resume", world, saved[middle], extra)

    def _refusals(self) -> list[_Job]:
        """Attempts that must end before their first update."""
        seen, scratch, jobs = self.seen, self.attempts.trainer.scratch, list[_Job]()
        world = next((each for each in seen.ranks if seen.checkpoint(each)), seen.least)

        def refuse(promise: str, name: str, start: tuple[str, ...], **more: Any) -> None:
            launch = Launch(name=name, world=world, steps=LAST, every=EVERY, start=start, **more)
            jobs.append((promise, partial(self._refused, launch)))

        nothing = step_folder(scratch / "nothing", MIDDLE)
        refuse("exit_codes", "no_checkpoint", ("--resume", str(nothing)))
        refuse("exit_codes", "unknown_setting", ("--from-scratch",), extra=("--set", UNKNOWN_SETTING))
        refuse("exit_codes", "no_run_dir", ("--from-scratch",), run_dir=False)
        path = seen.checkpoint(world)
        if path is None:
            return jobs
        folder = scratch / "starts_over" / "checkpoints"
        copied(path, folder)
        refuse("never_starts_over", "starts_over", (), checkpoint_dir=folder)
        for number, damage in enumerate([*TORN.values(), flip]):
            name = f"torn_{number}" if damage is not flip else "flipped"
            copy = copied(path, scratch / f"{name}_copy")
            damage(copy)
            refuse("refuses_flipped" if damage is flip else "refuses_torn", name, ("--resume", str(copy)))
        with suppress(OSError, ValueError):
            if stale := self._stale(world, path):
                refuse("refuses_stale", "stale", ("--resume", str(stale)))
        return jobs

    def _stale(self, world: int, path: Path) -> Path | None:
        """A checkpoint with the state of the save before it, beside that save."""
        base = self.seen.base(world)
        saved = [(step, each) for step, each in base.saved] if base else []
        at = next((at for at, (_, each) in enumerate(saved) if each == path), 0)
        if not at:  # retention has removed the one before: take the next pair
            at = 1
        if len(saved) < 2:
            return None
        folder = self.attempts.trainer.scratch / "stale_copy"
        before = copied(saved[at - 1][1], folder)
        stale = copied(saved[at][1], folder)
        return stale if make_stale(stale, before) else None

    async def _refused(self, launch: Launch) -> None:
        await self._run(launch, refused=True)

    async def _train(self, name: str, every: int) -> Attempt:
        """Start an attempt without an end, and wait until it trains."""
        self._on_progress(name)
        attempt = self.attempts.start(Launch(name=name, world=self.seen.most, steps=ENDLESS, every=every))
        await attempt.until(lambda: attempt.count >= 3, self.attempts.pace.start + self.attempts.pace.updates(3))
        return attempt

    async def _acted(self, promise: str, attempt: Attempt, act: Callable[[Attempt], Awaitable[Finding]]) -> None:
        if attempt.count >= 3 and attempt.all_run:
            self.seen.acts[promise] = await act(attempt)
        else:
            self.seen.acts[promise] = unknown(f"the attempt for it did not train: {attempt.how()}")

    async def _signals(self) -> None:
        """One attempt for all signals. If it does not survive one, the next signal gets a new attempt."""
        pace, attempt, saved = self.attempts.pace, None, dict[int, Path]()
        base = self.seen.base(self.seen.most)
        files = max((files_named(path) for _, path in base.saved), default=0) if base else 0
        todo: dict[str, Callable[[Attempt], Awaitable[Finding]]] = {
            "stacks": lambda attempt: acts.stacks(attempt, pace),
            "sigterm": lambda attempt: acts.sigterm(attempt, pace),
            "save_on_request": lambda attempt: acts.save_on_request(attempt, pace, files),
            "sigint": lambda attempt: acts.sigint(attempt, pace),
        }
        for promise, act in todo.items():
            if not self._wanted(promise):
                continue
            if attempt is None:
                attempt = await self._train(promise, ENDLESS)
            await self._acted(promise, attempt, act)
            if promise == "save_on_request":
                saved = attempt.committed
            if not self.seen.acts[promise].ok:
                await self._end_of_signals(attempt)
                attempt = None
        if attempt is not None:
            await self._end_of_signals(attempt)
        if saved and self.seen.acts["save_on_request"].ok:
            await self._resume_asked(saved[max(saved)])

    async def _end_of_signals(self, attempt: Attempt) -> None:
        ran = await self.attempts.finish(attempt)
        if ran.saved:
            self.seen.runs["asked"] = ran

    async def _resume_asked(self, path: Path) -> None:
        """Three updates from a checkpoint that was asked for."""
        start = ("--resume", str(path))
        launch = Launch(name="asked_resume", world=self.seen.most, steps=ENDLESS, every=ENDLESS, start=start)
        self._on_progress(launch.name)
        attempt = self.attempts.start(launch)
        await attempt.until(lambda: attempt.count >= 3, self.attempts.pace.start + self.attempts.pace.updates(3))
        self.seen.runs[launch.name] = await self.attempts.finish(attempt)

    async def _saves(self) -> None:
        attempt, pace = await self._train("marker_last", 1), self.attempts.pace
        await self._acted("marker_last", attempt, lambda attempt: slow_motion.watch_saves(attempt, pace))
        self.seen.late_lines, self.seen.watched = attempt.late_lines, attempt.watched
        self.seen.runs["marker_last"] = await self.attempts.finish(attempt)

    async def _fence(self) -> None:
        attempt = await self._train("fence", ENDLESS)
        await self._acted("fence", attempt, acts.fence_between_updates)
        await self.attempts.finish(attempt)
        if not self.seen.acts["fence"].ok:
            return
        attempt, found = await self._train("fence_saves", 1), self.seen.acts["fence"]
        if attempt.count >= 3 and attempt.all_run:
            found = await acts.fence_before_marker(attempt, self.attempts.pace)
        await self.attempts.finish(attempt)
        if found.ok is False:
            self.seen.acts["fence"] = found

    async def _nan(self) -> None:
        drill = {"id": "check", "kind": "nan", "from_step": NAN_AT}
        launch = Launch(name="nan", world=self.seen.most, steps=LAST, every=1, drills=(drill,))
        if drill_was_read(self.seen, await self._run(launch)):
            return
        drill = {"id": "check", "kind": "lr", "from_step": NAN_AT, "updates": ENDLESS, "factor": HUGE}
        await self._run(Launch(name="huge_lr", world=self.seen.most, steps=LAST, every=1, drills=(drill,)))


def _skips(*windows: tuple[int, int]) -> tuple[str, ...]:
    return tuple(word for first, last in windows for word in ("--skip-batches", f"{first}:{last}"))
