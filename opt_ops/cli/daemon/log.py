"""The log of the daemon: one line a message, in UTC, without the escape sequences of what others wrote."""

from __future__ import annotations

import logging
import sys
import time

from opt_ops.core.text import printable, printable_lines


class Lines(logging.Formatter):
    """A message is one line, whatever it quotes: the end of a rank's log cannot write lines of its own, or colours."""

    converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (the name that logging calls)
        """The line, without the traceback."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: logging._SysExcInfoType) -> str:  # noqa: N802  # pyright: ignore[reportPrivateUsage]
        """The traceback, which has several lines."""
        return printable_lines(super().formatException(ei))


def start() -> None:
    """Log to stderr, which `opt-ops daemon ensure` points at daemon.log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
