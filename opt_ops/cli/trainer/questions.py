"""What commands ask the trainer itself, before anything is held: whether it would start, and which recipes it has.

The trainer answers in a process of its own, by `--check` and `--recipes` (docs/formats.md). Which documents a batch was
made of, only the trainer of opt-ops can say: `python -m trainer.documents`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from opt_ops.config import TrainerCommand
from opt_ops.contract.environment import Place, of_rank
from opt_ops.contract.exit_codes import ExitCode
from opt_ops.core.text import printable
from opt_ops.errors import OptOpsError, Unavailable, UsageError

_ANSWER_SECONDS = 30.0  # ours needs less than 2; a network file system may need longer to find Python
_REFUSED = (ExitCode.USER_ERROR, ExitCode.CHECKPOINT_REFUSED)


_NOTE, _LONGEST_NOTE = "note: ", 300
_OLDER = "`python -m trainer.documents --help` says whether that trainer is new enough"


class Unanswered(Exception):
    """The trainer was not asked, or did not answer. The message says why."""


def require_accepted(trainer: TrainerCommand, arguments: Mapping[str, Any]) -> list[str]:
    """Ask the trainer whether it would train this, on the number of ranks that the shape says.

    Args:
        trainer: Its command.
        arguments: Of the request `start`.

    Returns:
        What the trainer remarks on it.

    Raises:
        UsageError: the trainer would refuse it.
        Unanswered: it has no such check.
    """
    shape = arguments["shape"]
    worlds = dict.fromkeys((shape["nodes"], shape.get("min_nodes") or shape["nodes"]))
    on_a_node = shape["ranks_per_node"]
    return list(dict.fromkeys(said for nodes in worlds for said in _remarks(trainer, arguments, nodes, on_a_node)))


def _remarks(trainer: TrainerCommand, arguments: Mapping[str, Any], nodes: int, on_a_node: int) -> list[str]:
    words = ["--check", "--recipe", arguments["recipe"]]
    for option, key in (("--set", "settings"), ("--data", "data"), ("--valid", "valid")):
        for value in arguments[key]:
            words += [option, value]
    for change in arguments.get("data_since", ()):
        words += [word for each in change["data"] for word in ("--data-since", f"{change['step']}:{each}")]
    if arguments["tokenizer"]:
        words += ["--tokenizer", arguments["tokenizer"]]
    if arguments.get("parent"):
        words += ["--resume", arguments["parent"]["checkpoint"]]
    if arguments.get("init_from"):
        words += ["--init-from", arguments["init_from"]]
    rank = of_rank(Place(0, nodes * on_a_node, 0), local_world=on_a_node, address="127.0.0.1", port=1, node="check")
    done = _asked(trainer, words, rank)
    if done.returncode in _REFUSED:
        raise _refusal(trainer, done)
    if done.returncode != ExitCode.DONE:
        raise Unanswered(f"its check ended with exit code {done.returncode}")
    lines = done.stdout.splitlines()
    return [printable(line.removeprefix(_NOTE))[:_LONGEST_NOTE] for line in lines if line.startswith(_NOTE)]


def _refusal(trainer: TrainerCommand, done: subprocess.CompletedProcess[str]) -> UsageError:
    said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
    why = printable(said[-1]) if said else f"exit code {done.returncode}"
    return UsageError(
        f"the trainer would refuse this: {why}",
        f"opt-ops run recipes; settings: {' '.join(trainer.command)} --list-recipes",
    )


def recipes(trainer: TrainerCommand, recipe: str = "", settings: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The trainer's recipes: one mapping each, with `recipe`, `parameters`, `steps`, `tokens` and `about`.

    Args:
        trainer: Its command.
        recipe: Only this one, with all its `settings` by name. Empty: all.
        settings: `key=value` that change it.

    Raises:
        Unavailable: it does not tell them.
        UsageError: it has no such recipe or setting.
    """
    hint = "the trainer's own documentation lists them"
    words = ["--recipes", *(["--recipe", recipe] if recipe else []), *(word for s in settings for word in ("--set", s))]
    try:
        done = _asked(trainer, words, {})
        found = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    except Unanswered as error:
        raise Unavailable(f"the trainer does not tell its recipes: {error}", hint) from error
    except ValueError as error:
        raise Unavailable("the trainer does not tell its recipes: its answer is not JSON", hint) from error
    if done.returncode in _REFUSED:
        raise _refusal(trainer, done)
    if done.returncode or not all(isinstance(each, dict) and isinstance(each.get("recipe"), str) for each in found):
        raise Unavailable(f"the trainer does not tell its recipes: exit code {done.returncode}", hint)
    return found


def documents(trainer: TrainerCommand, words: Sequence[str], on_remark: Callable[[str], None]) -> list[dict[str, Any]]:
    """The parts of documents that samples were made of, as `python -m trainer.documents` prints them.

    It may have to tokenise a corpus again, which takes as long as it took before the run: there is no time limit.

    Args:
        trainer: Its command.
        words: Arguments of `python -m trainer.documents`.
        on_remark: Gets each line that the trainer prints about its progress.

    Raises:
        Unavailable: the trainer cannot tell.
        OptOpsError: it refuses, for example because the data has changed.
    """
    if trainer.python is None:
        raise Unavailable(
            f"the trainer {' '.join(trainer.command)} cannot tell its documents: only `python -m trainer` can",
            "look up the sample in that trainer's own data loader, by data_position of telemetry.jsonl",
        )
    command = [*trainer.python, "-m", "trainer.documents", *words]
    try:
        with tempfile.TemporaryFile() as answer:
            code, said = run_part(trainer, command, on_remark, answer)
            answer.seek(0)
            found = [json.loads(line) for line in answer.read().decode("utf-8", "replace").splitlines()]
    except ValueError as error:
        raise Unavailable("the trainer cannot tell its documents: its answer is not JSON", _OLDER) from error
    if code in _REFUSED:
        raise OptOpsError(said, f"the question was: {shlex.join(command)}")
    if code != ExitCode.DONE or not all(isinstance(each, dict) for each in found):
        raise Unavailable(f"the trainer cannot tell its documents (exit code {code}): {said}", _OLDER)
    return found


def run_part(
    trainer: TrainerCommand, command: Sequence[str], on_remark: Callable[[str], None], answer: int | IO[bytes]
) -> tuple[int, str]:
    """Run a part of the trainer that takes its time, such as `python -m trainer.documents`.

    Args:
        trainer: The site's command.
        command: The part's.
        on_remark: Gets each line that it prints about its progress.
        answer: Where its stdout goes.

    Returns:
        Its exit code, and the last line it printed on stderr: if it failed, why.

    Raises:
        Unavailable: it cannot be started.
    """
    said = ""
    try:
        with subprocess.Popen(
            command,
            env={**os.environ, **trainer.environment, "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process:
            for line in process.stderr or ():
                said = line.rstrip() or said
                if not said.startswith("error: "):
                    on_remark(said)
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}", "opt-ops doctor checks this site") from error
    return process.returncode, printable(said.removeprefix("error: "))


def _asked(
    trainer: TrainerCommand, words: Sequence[str], variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    asks = trainer.check if trainer.check is not None else trainer.python is not None
    if not asks:  # a script that ignores what it does not know would begin to train, here
        raise Unanswered("another trainer is asked only with `check = true` in [trainer]")
    try:
        return subprocess.run(
            [*trainer.command, *words],
            env={**os.environ, **trainer.environment, "PYTHONIOENCODING": "utf-8", **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unanswered(f"it did not answer in {_ANSWER_SECONDS:g} s") from error
    except OSError as error:
        raise Unanswered(f"{trainer.command[0]}: {error.strerror}") from error
