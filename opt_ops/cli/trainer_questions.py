"""What commands ask the trainer itself, before anything is held: whether it would start, and which recipes it has.

The trainer answers in a process of its own, by `--check` and `--recipes` (docs/formats.md).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from opt_ops.config import TrainerCommand
from opt_ops.contract.environment import Place, of_rank
from opt_ops.contract.exit_codes import ExitCode
from opt_ops.core.text import printable
from opt_ops.errors import Unavailable, UsageError

_ANSWER_SECONDS = 30.0  # ours needs less than 2; a network file system may need longer to find Python
_REFUSED = (ExitCode.USER_ERROR, ExitCode.CHECKPOINT_REFUSED)


class Unanswered(Exception):
    """The trainer was not asked, or did not answer. The message says why."""


def require_accepted(trainer: TrainerCommand, arguments: Mapping[str, Any]) -> None:
    """Ask the trainer whether it would train this, on the number of ranks that the shape says.

    Args:
        trainer: Its command.
        arguments: Of the request `start`.

    Raises:
        UsageError: the trainer would refuse it.
        Unanswered: it has no such check.
    """
    shape = arguments["shape"]
    for nodes in dict.fromkeys((shape["nodes"], shape.get("min_nodes") or shape["nodes"])):
        _require_accepted(trainer, arguments, nodes * shape["ranks_per_node"], shape["ranks_per_node"])


def _require_accepted(trainer: TrainerCommand, arguments: Mapping[str, Any], world: int, on_a_node: int) -> None:
    words = ["--check", "--recipe", arguments["recipe"]]
    for option, key in (("--set", "settings"), ("--data", "data"), ("--valid", "valid")):
        for value in arguments[key]:
            words += [option, value]
    if arguments["tokenizer"]:
        words += ["--tokenizer", arguments["tokenizer"]]
    rank = of_rank(Place(0, world, 0), local_world=on_a_node, address="127.0.0.1", port=1, node="check")
    done = _asked(trainer, words, rank)
    if done.returncode in _REFUSED:
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
        why = printable(said[-1]) if said else f"exit code {done.returncode}"
        raise UsageError(
            f"the trainer would refuse this: {why}",
            f"opt-ops run recipes; settings: {' '.join(trainer.command)} --list-recipes",
        )
    if done.returncode != ExitCode.DONE:
        raise Unanswered(f"its check ended with exit code {done.returncode}")


def recipes(trainer: TrainerCommand) -> list[dict[str, Any]]:
    """The trainer's recipes: one mapping each, with `recipe`, `parameters`, `steps`, `tokens` and `about`.

    Raises:
        Unavailable: it does not tell them.
    """
    hint = "the trainer's own documentation lists them"
    try:
        done = _asked(trainer, ["--recipes"], {})
        found = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    except Unanswered as error:
        raise Unavailable(f"the trainer does not tell its recipes: {error}", hint) from error
    except ValueError as error:
        raise Unavailable("the trainer does not tell its recipes: its answer is not JSON", hint) from error
    if done.returncode or not all(isinstance(each, dict) and isinstance(each.get("recipe"), str) for each in found):
        raise Unavailable(f"the trainer does not tell its recipes: exit code {done.returncode}", hint)
    return found


def _asked(
    trainer: TrainerCommand, words: Sequence[str], variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    asks = trainer.check if trainer.check is not None else ("-m", "trainer") in pairwise(trainer.command)
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
