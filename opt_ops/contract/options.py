"""The options that the supervisor adds to a trainer's command. ``docs/formats.md`` gives the meaning of each.

A script that has options of its own gets them back in :attr:`Options.rest`.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from opt_ops.contract.data_since import parse_data_since
from opt_ops.contract.errors import UserError
from opt_ops.contract.exit_codes import ExitCode
from opt_ops.contract.learning_rate import parse_lr_factor
from opt_ops.contract.skip_windows import parse_skip_window

_Value = TypeVar("_Value")


class ReadSettings(dict[str, str]):
    """The settings of ``--set``. It remembers which of them were read.

    A script may read settings of its own, before an adapter carries out those that it knows. What nobody has read and
    no adapter knows is refused.

    Attributes:
        read: the keys that were asked for, by ``settings[key]`` or ``settings.get(key)``.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        super().__init__(settings)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> str:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        self.read.add(key)
        return super().get(key, default)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a trainer was started with.

    Attributes:
        recipe: the name of what to train.
        settings: of ``--set KEY=VALUE``, as text. Of two with one key, the last counts.
        run_dir: the folder of the attempt. None: nobody supervises this process.
        checkpoint_dir: the folder for the checkpoints of the run.
        attempt: the name of the attempt. Without ``--attempt``, that of ``run_dir``.
        fence: the file that names the newest attempt.
        resume: the checkpoint to continue from.
        from_scratch: whether to start over although there are checkpoints.
        init_from: the checkpoint whose weights to begin with. ``resume`` has precedence.
        lr_factors: (step, factor): multiplies the schedule in every update after that step.
        skips: (first, last): batches of the original order that are left out, both included.
        data: corpora to train on, as given.
        data_since: (step, corpus): corpora that replace them in every update after that step.
        valid: corpora to evaluate on, as given.
        tokenizer: as given.
        snapshot_dir: folder on a disk of the node, for snapshots.
        checkpoint_copy: where to copy each checkpoint to.
        rest: the arguments that are not in this list, in their order.
    """

    recipe: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    run_dir: Path | None = None
    checkpoint_dir: Path | None = None
    attempt: str = ""
    fence: Path | None = None
    resume: Path | None = None
    from_scratch: bool = False
    init_from: Path | None = None
    lr_factors: Sequence[tuple[int, float]] = ()
    skips: Sequence[tuple[int, int]] = ()
    data: Sequence[str] = ()
    data_since: Sequence[tuple[int, str]] = ()
    valid: Sequence[str] = ()
    tokenizer: Path | None = None
    snapshot_dir: Path | None = None
    checkpoint_copy: str = ""
    rest: Sequence[str] = ()

    @property
    def supervised(self) -> bool:
        """Whether there was a ``--run-dir``."""
        return self.run_dir is not None

    def whole(self, key: str, default: int) -> int:
        """The setting ``key``, a whole number from 0.

        Raises:
            UserError: it is something else.
        """
        text = self.settings.get(key, str(default))
        if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
            raise UserError(f"--set {key}={text}: expected a whole number.")
        return int(text)

    def accept_only(self, settings: Collection[str], options: Collection[str] = ()) -> None:
        """Refuse what the trainer does not do. To ignore it in silence would be to train something else than asked.

        Args:
            settings: the keys of ``--set`` that the trainer knows.
            options: those that it takes of ``init-from``, ``data``, ``data-since``, ``valid``, ``tokenizer``,
                ``snapshot-dir``, ``checkpoint-copy``. All trainers take the others.

        Raises:
            UserError: something else was given.
        """
        if unknown := self.settings.keys() - set(settings):
            raise UserError(f"--set {min(unknown)}: no such setting. Settings: {', '.join(sorted(settings))}.")
        given = [name for name in _OPTIONAL if getattr(self, name.replace("-", "_")) and name not in options]
        if given:
            raise UserError(f"--{given[0]}: this trainer does not do that.")
        if self.rest:
            raise UserError(f"{self.rest[0]}: no such option.")


_OPTIONAL = ("init-from", "data", "data-since", "valid", "tokenizer", "snapshot-dir", "checkpoint-copy")
_MOST_DIGITS = 18  # below 2**63


_taken: tuple[Options, list[str]] | None = None
"""The options that :func:`take` has removed from the command line, and what it left there."""


def parse(argv: Sequence[str] | None = None) -> Options:
    """The options in ``argv``, by default those of this process, also after :func:`take`.

    Without ``--run-dir``, only ``--recipe`` and ``--set`` are read, and all else is left in ``rest``: a script that
    nobody supervises may have options of the same names.

    Raises:
        SystemExit: a value is bad, or options do not fit together. With exit code 78, after a message on stderr.
    """
    if argv is None:
        if _taken is not None and _taken[1] == sys.argv[1:]:
            return _taken[0]
        argv = sys.argv[1:]
    run_dir = _parser(["run-dir", "attempt", "fence"]).parse_known_args(argv)[0]
    if not run_dir.run_dir:
        if run_dir.attempt or run_dir.fence or run_dir.run_dir is not None:
            _refuse("--run-dir is missing: the folder of this attempt.")
        found, rest = _parser(["recipe", "set"]).parse_known_args(argv)
        return Options(recipe=found.recipe, settings=_settings(found.set), rest=rest)
    found, rest = _parser(_PLAIN, _REPEATABLE, flag="from-scratch").parse_known_args(argv)
    if not found.checkpoint_dir:
        _refuse("--checkpoint-dir is missing: the folder for the checkpoints of this run.")
    if found.resume and found.from_scratch:
        _refuse("--resume and --from-scratch exclude each other.")
    if found.fence and not found.attempt:
        _refuse("--fence needs --attempt: the name of this attempt, as the file would give it.")
    path: Callable[[str | None], Path | None] = lambda text: Path(text) if text else None  # noqa: E731
    return Options(
        recipe=found.recipe,
        settings=_settings(found.set),
        run_dir=Path(found.run_dir),
        checkpoint_dir=Path(found.checkpoint_dir),
        attempt=found.attempt or Path(found.run_dir).name,
        fence=path(found.fence),
        resume=path(found.resume),
        from_scratch=found.from_scratch,
        init_from=path(found.init_from),
        lr_factors=tuple(_parsed("--lr-factor", parse_lr_factor, text) for text in found.lr_factor),
        skips=tuple(_parsed("--skip-batches", parse_skip_window, text) for text in found.skip_batches),
        data=tuple(found.data),
        data_since=tuple(_parsed("--data-since", parse_data_since, text) for text in found.data_since),
        valid=tuple(found.valid),
        tokenizer=path(found.tokenizer),
        snapshot_dir=path(found.snapshot_dir),
        checkpoint_copy=found.checkpoint_copy or "",
        rest=rest,
    )


def take() -> Options:
    """Parse the options of this process, and remove them from ``sys.argv``, so that a script's own parser works.

    Raises:
        SystemExit: as :func:`parse`.
    """
    global _taken  # noqa: PLW0603  the command line is global, too
    options = parse()
    if options.supervised:
        sys.argv[1:] = options.rest
        _taken = options, list(options.rest)
    return options


_PLAIN = (
    *("recipe", "run-dir", "checkpoint-dir", "attempt", "fence", "resume", "init-from", "tokenizer"),
    *("snapshot-dir", "checkpoint-copy"),
)
_REPEATABLE = ("set", "lr-factor", "skip-batches", "data", "data-since", "valid")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would exit with 2, which is not one of our exit codes
        _refuse(message)


def _parser(plain: Sequence[str], repeatable: Sequence[str] = ("set",), flag: str = "") -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in plain:
        if name not in repeatable:
            parser.add_argument(f"--{name}")
    for name in repeatable:
        parser.add_argument(f"--{name}", action="append", default=[])
    if flag:
        parser.add_argument(f"--{flag}", action="store_true")
    return parser


def _settings(pairs: Sequence[str]) -> ReadSettings:
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            _refuse(f"--set {pair}: expected KEY=VALUE, for example steps=1000.")
        found[key] = value
    return ReadSettings(found)


def _parsed(option: str, parse_value: Callable[[str], _Value], text: str) -> _Value:
    try:
        return parse_value(text)
    except ValueError as error:
        _refuse(f"{option} {text}: {error}")


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(int(ExitCode.USER_ERROR))
