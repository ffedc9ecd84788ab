"""The settings of ``--set``, read by the words of the contract."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from opt_ops.contract import Options, UserError

_Value = TypeVar("_Value")

_UNSUPPORTED = ("data", "data_since", "valid", "tokenizer", "init_from", "snapshot_dir", "checkpoint_copy")


class Settings:
    """Settings that are taken one by one. What is left at the end is unknown.

    Args:
        settings: by key, as text.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._left = dict(settings)

    def take(self, key: str, parse: Callable[[str], _Value], default: _Value) -> _Value:
        """The value of ``key``, by ``parse``; ``default`` where it is not given.

        Raises:
            UserError: ``parse`` refuses the text.
        """
        text = self._left.pop(key, None)
        if text is None:
            return default
        try:
            return parse(text)
        except ValueError as error:
            raise UserError(f"--set {key}={text}: {error}") from None

    def rest(self) -> dict[str, str]:
        """What nobody has taken, for a trainer that knows more keys. They count as taken."""
        left, self._left = self._left, {}
        return left

    def require_all_taken(self, known: str) -> None:
        """Refuse what is left.

        Args:
            known: the keys that there are, for the message.

        Raises:
            UserError: a key is unknown.
        """
        if self._left:
            key = next(iter(self._left))
            raise UserError(f"--set {key}={self._left[key]}: this trainer has no setting {key}. It has: {known}.")


def whole(least: int) -> Callable[[str], int]:
    """A parser for whole numbers from ``least``.

    Raises:
        ValueError: by the parser: the text is no such number.
    """

    def parse(text: str) -> int:
        number = int(text) if text.strip().lstrip("-").isdecimal() else least - 1
        if number < least:
            raise ValueError(f"expected a whole number, {least} or more.")
        return number

    return parse


def number(text: str) -> float:
    """``text`` as a finite number, 0 or more.

    Raises:
        ValueError: the text is no such number.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise ValueError("expected a finite number, 0 or more.")
    return value


def betas(text: str) -> tuple[float, float]:
    """``0.9,0.95`` as two numbers.

    Raises:
        ValueError: the text has another form.
    """
    first, _, second = text.partition(",")
    try:
        return float(first), float(second)
    except ValueError:
        raise ValueError("expected two numbers, for example 0.9,0.95.") from None


def refuse_unsupported(options: Options, supported: tuple[str, ...] = ()) -> None:
    """Refuse the options of the supervisor that an adapter does not carry out: none may be ignored in silence.

    Args:
        options: of this process.
        supported: names of those that the adapter does carry out, as attributes of :class:`Options`.

    Raises:
        UserError: one of the others was given.
    """
    for name in _UNSUPPORTED:
        given: Any = getattr(options, name)
        if given and name not in supported:
            raise UserError(f"--{name.replace('_', '-')} is not supported by this trainer: leave it out.")
