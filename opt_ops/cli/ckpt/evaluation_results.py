"""The folder of a checkpoint's evaluations: `evaluations/step-00061000/`, its result files, and what they say."""

from __future__ import annotations

import fcntl
import math
import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opt_ops.cli.ckpt.checkpoints import Named
from opt_ops.cli.ckpt.evaluation_tasks import Wanted
from opt_ops.contract.files import open_append, sha256
from opt_ops.core.events import CheckpointEvaluated, CheckpointSampled
from opt_ops.core.events.evaluation import limit_of, score_key
from opt_ops.core.state.model import State
from opt_ops.errors import OptOpsError
from opt_ops.runfolder.files import create_json, read_json

FOLDER = "evaluations"
DOCUMENTS = "documents"
_ABOUT = "checkpoint.json"
_LARGEST = 256 * 1024 * 1024  # bytes of a result file: groups have hundreds of tasks, each with its whole configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Results that are there, and the file that holds them."""

    scores: tuple[CheckpointEvaluated, ...]
    left_out: tuple[str, ...] = ()  # metrics that are no finite numbers


def folder_of(chosen: Named) -> Path:
    """The folder of this checkpoint's evaluations. It is made if there is none.

    Two runs may have the same step, and one run may save a step twice: the folder says whose it is, and another
    checkpoint gets another folder.

    Raises:
        OSError: it cannot be written.
    """
    step, run = f"step-{chosen.checkpoint.step:08d}", chosen.checkpoint.run
    names = [step] * chosen.counts + [f"{step}-{run}", f"{step}-{run}-{chosen.digest[:12]}"]
    about = {"run": run, "step": chosen.checkpoint.step, "digest": chosen.digest}
    parent = chosen.lineage.path / FOLDER
    for path in (parent / name for name in (step, *names)):  # one that counted may have been taken back since
        if _digest_in(path) == chosen.digest:
            return path
    for path in (parent / name for name in names):
        if create_json(path / _ABOUT, about) or _digest_in(path) == chosen.digest:
            return path
    where = parent / names[-1]
    raise OptOpsError(f"{where} belongs to another checkpoint", f"mv {where} {where}.other")


def _digest_in(folder: Path) -> str | None:
    about = read_json(folder / _ABOUT)
    return about.get("digest") if isinstance(about, dict) else None


@contextmanager
def alone(folder: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a folder: two commands do not run the same evaluation. The kernel releases it with the process.

    Args:
        folder: The folder.
        on_wait: Told who has it, before this waits.
    """
    with open_append(folder / ".lock") as lock:
        with suppress(OSError):  # a file system without locks: the requests are taken once all the same
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                on_wait(lock.read(200).decode("utf-8", "replace").strip() or "another command")
                fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        lock.flush()
        yield


def free_file(folder: Path, stem: str, taken: Collection[Path] = ()) -> Path:
    """The name of the next result file, and none of those that are `taken`: names in two folders may be the same."""
    number, path = 2, folder / f"{stem}.json"
    while path.exists() or path in taken:
        number, path = number + 1, folder / f"{stem}.{number}.json"
    return path


def find(chosen: Named, folder: Path, state: State, wanted: Wanted, harness: str) -> Found | None:
    """The scores of a task that are there already: in a result file, or only in the journal. None: there are none.

    Of a score that is in both, the journal's is the one that counts.
    """
    for path in sorted(folder.glob(f"{wanted.stem}*.json"), key=lambda path: (len(path.name), path.name)):
        if wanted.is_file(path.name) and (found := scores_in(chosen, path, wanted, harness)) is not None:
            return Found(scores=tuple(state.scores.get(score_key(score), score) for score in found.scores))
    journaled = tuple(
        score
        for score in state.scores.values()
        if (score.digest, score.harness) == (chosen.digest, harness) and _is_of(score, wanted)
    )
    return Found(scores=journaled) if journaled else None


def _is_of(score: CheckpointEvaluated, wanted: Wanted) -> bool:
    ends = wanted.version("")
    if not score.task_version.endswith(ends) or limit_of(score.task_version) != wanted.limit:
        return False
    return wanted.is_file(Path(score.file).name) or (score.task, score.shots) == (wanted.spec, wanted.shots)


def scores_in(chosen: Named, path: Path, wanted: Wanted, harness: str = "") -> Found | None:
    """What a result file says; None: it is of another checkpoint, harness or definition of the task.

    Raises:
        OptOpsError: it is damaged.
    """
    whole: Any = read_json(path, _LARGEST)
    try:
        origin: Mapping[str, Any] = whole["opt_ops"]
        if (origin["digest"], origin["definition"]) != (chosen.digest, wanted.definition) or (
            harness and origin["harness"] != harness
        ):
            return None
        results: Mapping[str, Mapping[str, Any]] = whole["results"]
        return _scores(chosen, path, wanted, whole, origin, results)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise OptOpsError(f"{path} is no result file: {error!r}", f"move it away: mv {path} {path}.damaged") from error


def _scores(
    chosen: Named,
    path: Path,
    wanted: Wanted,
    whole: Mapping[str, Any],
    origin: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
) -> Found:
    scores: list[CheckpointEvaluated] = []
    left_out: list[str] = []
    file, checksum = str(path.relative_to(chosen.lineage.path)), sha256(path)
    for task, row in results.items():
        documents = whole["n-samples"].get(task, {}).get("effective", row.get("sample_len"))
        for key, value in row.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            name = metric if filtered == "none" else key
            if (number := _number(value)) is None:
                left_out.append(f"{task} {name} is {value!r}")
                continue
            scores.append(
                CheckpointEvaluated(
                    request="",
                    author="",
                    run=chosen.checkpoint.run,
                    step=chosen.checkpoint.step,
                    digest=chosen.digest,
                    task=task,
                    metric=name,
                    value=number,
                    stderr=_number(row.get(f"{metric}_stderr,{filtered}")),
                    n=int(documents or 0),
                    shots=int(whole["n-shot"].get(task, wanted.shots)),
                    harness=origin["harness"],
                    task_version=wanted.version(whole["versions"].get(task)),
                    file=file,
                    sha256=checksum,
                    bos=origin["bos"].get(task),
                )
            )
    return Found(scores=tuple(scores), left_out=tuple(left_out))


def _number(value: Any) -> float | None:
    """A finite number; None for everything else."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if numeric and math.isfinite(value) else None


def arguments(event: CheckpointEvaluated | CheckpointSampled) -> dict[str, Any]:
    """The arguments of the request that puts it into the journal."""
    fields = asdict(event)
    return {name: value for name, value in fields.items() if name not in ("request", "author")}


def item(chosen: Named, score: CheckpointEvaluated, *, ran: bool) -> dict[str, Any]:
    """The item of `opt-ops/ckpt-evaluate/1`."""
    return {
        **{name: getattr(score, name) for name in ("run", "step", "task", "metric", "value", "stderr", "n", "shots")},
        "harness": score.harness,
        "task_version": score.task_version,
        "settled": chosen.counts,
        "ran": ran,
        "file": str(chosen.lineage.path / score.file),
        "sha256": score.sha256,
        "bos": score.bos,
    }
