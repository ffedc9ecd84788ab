"""The whole check: make the attempts, end every process, judge."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from opt_ops.trainer_check.attempts import Attempts, Pace, Trainer
from opt_ops.trainer_check.findings import Finding
from opt_ops.trainer_check.promises import judge_all
from opt_ops.trainer_check.runs import Runs


def check(
    command: Sequence[str],
    *,
    recipe: str,
    settings: Sequence[str],
    ranks: Sequence[int],
    tolerance: float,
    keep: Path | None,
    on_progress: Callable[[str], None] = lambda _: None,
    only: Collection[str] = (),
) -> dict[str, Finding]:
    """Judge every promise of a trainer. Every process that was started has ended afterwards.

    Args:
        command: What starts it.
        recipe: Value of `--recipe`.
        settings: `KEY=VALUE`, for every attempt.
        ranks: Numbers of ranks.
        tolerance: By how much losses may differ that must be the same.
        keep: An empty folder for all that the attempts write. None: a temporary one.
        on_progress: Gets the name of each attempt that begins.
        only: Judge only these promises; the others are not in the result. Empty: all of them.

    Raises:
        OSError: the command cannot be started, or the folder cannot be written.
        KeyboardInterrupt: SIGINT or SIGTERM came.
    """
    temporary = Path(tempfile.mkdtemp(prefix="opt-ops-check-"))
    scratch = (keep or temporary / "scratch").resolve()
    try:
        (temporary / "tmp").mkdir()
        scratch.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(tuple(command), recipe, tuple(settings), scratch, temporary / "tmp")
        runs = Runs(Attempts(trainer, Pace()), ranks, on_progress, only)
        try:
            with asyncio.Runner() as runner:
                runner.run(_made(runs))
        except asyncio.CancelledError:  # SIGTERM
            raise KeyboardInterrupt from None
        found = judge_all(runs.seen, tolerance)
        return {name: finding for name, finding in found.items() if not only or name in only}
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary)


async def _made(runs: Runs) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await runs.make_all()
    finally:
        runs.attempts.end_all()
