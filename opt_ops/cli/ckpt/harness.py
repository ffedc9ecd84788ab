"""Starts the harness, `python -m trainer.harness`, in the environment of `[evaluate] python`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opt_ops.cli.ckpt.evaluation_samples import Prompts
from opt_ops.cli.ckpt.evaluation_tasks import Wanted
from opt_ops.contract.exit_codes import ExitCode
from opt_ops.core.text import printable
from opt_ops.errors import NotFound, OptOpsError, Unavailable, UsageError
from opt_ops.node.process_groups import die_with_parent

_PACKAGES = {
    "lm_eval": "lm-evaluation-harness",
    "accelerate": "accelerate",
    "torch": "torch",
    "transformers": "transformers",
    "trainer": "opt-ops",
}  # what is imported, and what people call it
_PROBE = f"""
import importlib.metadata, importlib.util, json
def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
there = [each for each in {tuple(_PACKAGES)} if found(each)]
print(json.dumps([importlib.metadata.version("lm-eval") if "lm_eval" in there else "", there]))
"""
_PROBE_SECONDS = 60.0  # a network file system may need long to find packages
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LAST_LINES = 12
_NAMED = 4  # errors in a message
_ERROR = "error: "  # begins a line of `trainer.harness`
_REMARKS = ("task ", "prompt ", "reading ")  # of `trainer.harness`, about its progress
_BAR_SECONDS = 10.0  # between two lines of a progress bar
_NO_DATA = "OfflineModeIsEnabled"  # what the library of data sets says
_FETCH = (
    "where there is a connection: HF_HOME=/shared/hf python -m lm_eval run --model dummy --tasks NAME --limit 1; then "
    "set that HF_HOME here"
)
_NO_TASK = "{python} -m lm_eval ls tasks; for a task of your own, name its folder: --tasks my-tasks/"
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DISABLE_MULTIPROC": "1",  # one process: the node may be in use
    "PYTHONIOENCODING": "utf-8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one process of the harness does."""

    weights: Path
    about: Mapping[str, Any]
    tasks: Mapping[Wanted, Path]  # with the result files
    documents: Path
    prompts: Prompts | None
    completions: Path | None


def probe(python: str) -> str:
    """The harness's name and version, such as `lm-eval 0.4.13`. Nothing of it is imported.

    Raises:
        UsageError: it is not installed.
        Unavailable: this Python cannot be started.
    """
    try:
        done = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True
        )
        version, there = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()
        why = getattr(error, "strerror", None) or printable(said[-1] if said else f"no answer ({type(error).__name__})")
        raise Unavailable(
            f"[evaluate] python = {python}: {why}", "make evaluate-env, or correct [evaluate] python"
        ) from error
    if missing := [name for package, name in _PACKAGES.items() if package not in there]:
        raise UsageError(f"{missing[0]} is not installed for {python}", f"{python} -m pip install 'opt-ops[evaluate]'")
    return f"lm-eval {version}"


def run(python: str, work: Work, on_line: Callable[[str], None]) -> OptOpsError | None:
    """Score the tasks and complete the prompts. Returns what failed; the others have their result files.

    The process is one of this process's group, and the kernel ends it with this process.

    Args:
        python: Of the environment.
        work: What is to be done.
        on_line: Gets each line about the progress, and the last lines of a failure.

    Raises:
        NotFound: there is no such task.
        Unavailable: it cannot be started.
    """
    last: deque[str] = deque(maxlen=_LAST_LINES)
    errors: list[str] = []
    shown = time.monotonic()
    on_line("starting the harness")
    try:
        with subprocess.Popen(
            _command(python, work),
            env={**os.environ, **_OFFLINE, **_gpus()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509  (it only calls prctl)
        ) as process:
            for line in process.stderr or ():
                text = printable(line.rstrip())
                if text.startswith(_REMARKS):
                    on_line(text)
                elif text.startswith(_ERROR):
                    errors.append(text.removeprefix(_ERROR))
                elif "%|" not in text:
                    last.extend([text] if text else ())
                elif time.monotonic() - shown > _BAR_SECONDS:
                    shown = time.monotonic()
                    on_line(text)
    except OSError as error:
        raise Unavailable(f"{python}: {error.strerror}", "make evaluate-env, or correct [evaluate] python") from error
    if process.returncode == ExitCode.USER_ERROR:
        raise NotFound(errors[-1] if errors else "there is no such task", _NO_TASK.format(python=python))
    if process.returncode == ExitCode.DONE:
        return None
    if errors and all(_NO_DATA in error for error in errors):
        return OptOpsError(f"data of tasks is not on this machine, and nothing is downloaded: {_some(errors)}", _FETCH)
    for line in last:
        on_line(line)
    code = process.returncode
    how = f"signal {signal.Signals(-code).name} ended it, as when memory runs out" if code < 0 else f"exit code {code}"
    return OptOpsError(
        f"the harness failed: {_some(errors) or how}",
        "its last lines are above; the same opt-ops ckpt evaluate goes on from what was finished",
    )


def _some(errors: list[str]) -> str:
    """The first errors, and how many more there are."""
    more = [f"and {len(errors) - _NAMED} more"] if len(errors) > _NAMED else []
    return "; ".join([*errors[:_NAMED], *more])


def _gpus() -> dict[str, str]:
    """The variable that hides the GPUs that others use: training must not notice an evaluation beside it.

    A GPU counts as in use where NVML does not say that no process is on it. Without one that is free, the CPU computes.
    """
    if _VISIBLE in os.environ:
        return {}
    from opt_ops.node.line_process import in_child
    from opt_ops.node.nvml import ONCE_SECONDS, GpuReader
    from opt_ops.node.reading import reading_of

    reading = in_child(GpuReader().read, ONCE_SECONDS, reading_of)
    if isinstance(reading, str):  # NVML hangs or crashes
        return {_VISIBLE: ""}
    return {_VISIBLE: ",".join(str(gpu["uuid"]) for gpu in reading["gpus"] if gpu.get("processes") == 0)}


def _command(python: str, work: Work) -> list[str]:
    words = [python, "-m", "trainer.harness", "--model", str(work.weights), "--about", json.dumps(dict(work.about))]
    for task, file in work.tasks.items():
        words += ["--task", task.spec, str(file), task.definition]
    if work.tasks:
        first = next(iter(work.tasks))
        words += ["--documents", str(work.documents), "--shots", str(first.shots)]
        words += ["--limit", str(first.limit)] if first.limit else []
    if work.prompts is not None and work.completions is not None:
        words += ["--prompts", str(work.prompts.file), "--completions", str(work.completions)]
        words += ["--tokens", str(work.prompts.tokens), "--seed", str(work.prompts.seed)]
    return words
