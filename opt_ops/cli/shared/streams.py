"""stdin, stdout and stderr as a command needs them: open, and able to take any text in any locale."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys

READER_LEFT = 141  # as shells say it: 128 + SIGPIPE

PLAIN = {
    "×": "x",
    "→": "->",
    "–": "-",
    "—": "-",
    "−": "-",
    "≥": ">=",
    "≤": "<=",
    "…": "...",
    "·": "-",
    "÷": "/",
    "±": "+-",
    "“": '"',
    "”": '"',
    "„": '"',
    "‘": "'",
    "’": "'",
    "\N{NO-BREAK SPACE}": " ",
}
"""What is printed for a sign that the stream's encoding lacks; `?` for all others."""


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


codecs.register_error("opt-ops.plain", _plainly)


def prepare_streams() -> None:
    """Open what the caller has closed, and let no locale make output fail: what it lacks is written plainly."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened, such as a journal, would get what is printed
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115  (it lives as long as the process)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="opt-ops.plain")


def flush_streams() -> int:
    """Write out what is buffered, now: at the end of Python, an error would be a traceback.

    Returns:
        0, or the exit code if stdout could not be written.
    """
    code = 0
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = READER_LEFT
    except OSError as error:  # for example a full disk
        code = 1
        with contextlib.suppress(OSError):
            print(f"opt-ops: the output was not written: {error.strerror}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    if code:  # Python flushes once more, and would complain once more
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code
