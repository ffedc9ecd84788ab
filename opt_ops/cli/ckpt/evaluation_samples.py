"""Fixed prompts and their completions: `samples.60-tokens.json` beside the results of a checkpoint's evaluations."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opt_ops.cli.ckpt.checkpoints import Named
from opt_ops.contract.files import sha256
from opt_ops.core.events import CheckpointSampled
from opt_ops.core.state.model import State
from opt_ops.core.text import clean
from opt_ops.core.values import Completion
from opt_ops.errors import NotFound, OptOpsError, UsageError
from opt_ops.runfolder.files import read_bytes, read_json

SEED = 1
MOST_PROMPTS, _LONGEST = 64, 8192  # as the daemon takes them
_MOST_IN_ALL = 900_000  # bytes of a request


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Fixed prompts: a file with one a line."""

    file: Path
    lines: tuple[str, ...]
    sha256: str
    tokens: int
    seed: int = SEED

    @property
    def stem(self) -> str:
        """Of the result file."""
        return f"samples.{self.tokens}-tokens"


def read(file: Path, tokens: int) -> Prompts:
    """The prompts of a file.

    Raises:
        NotFound: there is no such file.
        UsageError: it has no prompts, too many, or too long ones.
    """
    try:
        lines = [line for line in read_bytes(file, 1 << 20).decode("utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise NotFound(f"--prompts {file}: no such file", "write one prompt a line into it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {file}: {getattr(error, 'strerror', None) or error}") from error
    if not 0 < len(lines) <= MOST_PROMPTS:
        raise UsageError(f"--prompts {file}: {len(lines)} prompts; from 1 to {MOST_PROMPTS} are wanted, one a line")
    if (longest := max(len(line) for line in lines)) > _LONGEST:
        raise UsageError(f"--prompts {file}: a prompt has {longest:,} characters; at most {_LONGEST:,} are wanted")
    return Prompts(file=file.absolute(), lines=tuple(lines), sha256=sha256(file), tokens=tokens)


def find(chosen: Named, folder: Path, state: State, prompts: Prompts) -> CheckpointSampled | None:
    """The completions that are there already: in a result file, or in the journal, which has one set a checkpoint."""
    for path in sorted(folder.glob(f"{prompts.stem}*.json")):
        completed, of = _completed_in(chosen, path)
        if of == (chosen.digest, prompts.sha256):
            return completed
    return state.samples.get(chosen.digest)


def completed_in(chosen: Named, path: Path) -> CheckpointSampled:
    """What a result file says.

    Raises:
        OptOpsError: it is damaged.
    """
    return _completed_in(chosen, path)[0]


def _completed_in(chosen: Named, path: Path) -> tuple[CheckpointSampled, tuple[Any, Any]]:
    """And the digests of the checkpoint and of the prompts that it is of."""
    whole: Any = read_json(path)
    try:
        origin = whole["opt_ops"]
        event = CheckpointSampled(
            request="",
            author="",
            run=chosen.checkpoint.run,
            step=chosen.checkpoint.step,
            digest=chosen.digest,
            completions=_short([Completion(**each) for each in whole["completions"]]),
            tokens=int(origin["tokens"]),
            seed=int(origin["seed"]),
            file=str(path.relative_to(chosen.lineage.path)),
            sha256=sha256(path),
        )
        return event, (origin.get("digest"), origin.get("prompts"))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise OptOpsError(f"{path} is no result file: {error!r}", f"move it away: mv {path} {path}.damaged") from error


def is_of(completed: CheckpointSampled, prompts: Prompts) -> bool:
    """Whether these are the prompts that were completed. The journal has one set for each checkpoint."""
    return [each.prompt for each in completed.completions] == [clean(line, _LONGEST) for line in prompts.lines]


def items(chosen: Named, completed: CheckpointSampled, *, ran: bool) -> list[dict[str, Any]]:
    """For `-o json`, one for each prompt."""
    about = {
        **{name: getattr(completed, name) for name in ("run", "step", "tokens", "seed", "sha256")},
        "settled": chosen.counts,
        "ran": ran,
        "file": str(chosen.lineage.path / completed.file),
    }
    return [{**asdict(each), **about} for each in completed.completions]


def _short(completions: list[Completion]) -> tuple[Completion, ...]:
    """The completions as a request can have them: without null characters, and cut. The file has them whole."""
    longest = _LONGEST
    while True:
        cut = tuple(
            Completion(
                prompt=each.prompt.replace("\0", "�"),
                greedy=each.greedy.replace("\0", "�")[:longest],
                drawn=each.drawn.replace("\0", "�")[:longest],
            )
            for each in completions
        )
        if len(json.dumps([asdict(each) for each in cut])) < _MOST_IN_ALL or longest < 2:
            return cut
        longest //= 2
