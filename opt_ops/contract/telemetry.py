"""The lines of ``telemetry.jsonl``: their fields, and a file that holds whole lines only.

``docs/formats.md`` gives unit and meaning of each field. Writers and readers spell the names as literals; pyright
compares them with the classes below.
"""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

log = logging.getLogger(__name__)

_READ_BYTES = 2**16  # a line has about 2,000


class OptimizerFields(TypedDict):
    """What the live optimizer uses for this update, read back from it."""

    lr: float
    betas: Sequence[float]
    weight_decay: float
    clip_norm: float


class BusyFields(TypedDict):
    """Seconds that ranks worked in a step: the median, the most, and the rank that worked most."""

    median: float
    max: float
    rank: int


class ChecksumFields(TypedDict):
    """The result of a comparison of checksums between ranks."""

    ranks: Sequence[int]
    certain: bool
    what: str


class TelemetryLine(OptimizerFields):
    """One line. Every trainer must write the first fields; those that are not required may be missing."""

    ts: float
    num_updates: int
    loss: float | None
    gnorm: float | None
    finite: bool
    step_seconds: float
    tokens: int
    wps: float

    actv_norm: NotRequired[float | None]
    attn_logit_max: NotRequired[Sequence[float] | None]
    bad_module: NotRequired[str | None]
    base_lr: NotRequired[float | None]
    blocks: NotRequired[Mapping[str, Mapping[str, float | None]] | None]
    bsz: NotRequired[int]
    busy_seconds: NotRequired[BusyFields | None]
    checksums: NotRequired[ChecksumFields | None]
    clip: NotRequired[int]
    cuda_gb_allocated: NotRequired[float | None]
    data_position: NotRequired[int]
    eval_seconds: NotRequired[float]
    log_seconds: NotRequired[float]
    loss_scale: NotRequired[float | None]
    mfu: NotRequired[float | None]
    pnorm: NotRequired[float | None]
    ppl: NotRequired[float | None]
    save_error: NotRequired[str | None]
    save_seconds: NotRequired[float]
    skip: NotRequired[str | None]
    skipped: NotRequired[int]
    stage: NotRequired[str | None]
    tflops: NotRequired[float]
    train_wall: NotRequired[float]
    ups: NotRequired[float]
    valid: NotRequired[Mapping[str, float | None] | None]
    wall: NotRequired[float]
    wpb: NotRequired[int]


def cut_torn_line(path: Path) -> bytes:
    """Cut off a last line that is not whole, because its writer has died. Returns the last whole line; empty if none.

    Raises:
        OSError: the file can be neither opened nor created, or not be read.
    """
    with path.open("a+b") as file:
        end, kept = file.seek(0, os.SEEK_END), b""
        begin = end
        while begin > 0 and kept.count(b"\n") < 2:
            begin = max(0, begin - _READ_BYTES)
            file.seek(begin)
            kept = file.read(end - begin)
        whole = kept[: kept.rfind(b"\n") + 1]
        if len(whole) < len(kept):
            file.truncate(begin + len(whole))
    return whole[:-1].rpartition(b"\n")[2]


class LineFile:
    """A ``*.jsonl`` file with one writer. It holds whole lines only.

    A line that cannot be written, as on a full disk, is dropped. If a part of it reached the file, that is cut off. The
    log says so once when it begins, and once when lines can be written again.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = os.fstat(self._fd).st_size
        self._dropped = 0

    def write(self, value: Mapping[str, Any]) -> bool:
        """Append ``value`` as a line of strict JSON, in one system call.

        Returns:
            False if the line was dropped.

        Raises:
            ValueError: a number in ``value`` is not finite.
        """
        line = (json.dumps(value, allow_nan=False) + "\n").encode()
        if not self._append(line):
            self._dropped += 1
            return False
        if self._dropped:
            log.warning("%s can be written again; %d lines were lost", self._path, self._dropped)
            self._dropped = 0
        return True

    def _append(self, line: bytes) -> bool:
        reason = "no room for a whole line"
        try:
            if self._dropped:
                os.ftruncate(self._fd, self._size)  # in case this failed when the line was dropped
            if os.write(self._fd, line) == len(line):
                self._size += len(line)
                return True
        except OSError as error:
            reason = str(error)
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._size)
        if not self._dropped:
            log.warning("%s cannot be written, training continues: %s", self._path, reason)
        return False
