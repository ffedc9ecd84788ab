"""The log of a rank is followed while it is written: bounded work and memory, whatever is written."""

import os
import time
from pathlib import Path

import pytest

from opt_ops.node.rank_log import CHUNK, MOST_BEHIND, RankLog

ECC = b"RuntimeError: CUDA error: uncorrectable ECC error encountered\n"
NOISE = b"[rank3] forward of layer 12 took 18 ms, nothing to say about it\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rank-0003.log"


def look(log: RankLog) -> None:
    log.look(time.monotonic() + 60.0)


def texts(log: RankLog) -> list[str]:
    return [line.text for line in log.end()]


def test_a_reason_that_a_flood_follows_is_kept(path: Path):
    log = RankLog(path)
    path.write_bytes(ECC)
    look(log)
    with path.open("ab") as file:
        for _ in range(20):
            file.write(NOISE * 20_000)
            file.flush()
            look(log)
    assert texts(log) == [ECC.decode().strip()]


def test_a_log_that_is_cut_or_replaced_is_read_from_its_start(path: Path, tmp_path: Path):
    log = RankLog(path)
    path.write_bytes(NOISE * 100 + ECC)
    look(log)
    os.truncate(path, 0)
    look(log)
    path.write_bytes(b"OSError: [Errno 28] No space left on device\n")
    look(log)
    other = tmp_path / "other"
    other.write_bytes(b"MemoryError\n")
    other.replace(path)
    assert texts(log) == [ECC.decode().strip(), "OSError: [Errno 28] No space left on device", "MemoryError"]


def test_one_look_does_a_bounded_part_and_the_end_does_the_rest(path: Path):
    log = RankLog(path)
    path.write_bytes(NOISE * (3 * MOST_BEHIND // 4 // len(NOISE)) + ECC)
    log.look(0.0)
    assert log._offset == CHUNK, "one chunk, though the time was over before"
    assert texts(log) == [ECC.decode().strip()]


def test_what_is_written_faster_than_it_is_read_is_skipped(path: Path):
    log = RankLog(path)
    path.write_bytes(NOISE * (4 * MOST_BEHIND // len(NOISE)) + ECC)
    log.look(0.0)
    assert log._offset > 2 * MOST_BEHIND
    assert texts(log) == [ECC.decode().strip()]


def test_no_log_and_a_pipe_in_its_place(path: Path):
    log = RankLog(path)
    assert (texts(log), log.tail()) == ([], "")
    os.mkfifo(path)
    look(log)
    assert (texts(log), log.tail()) == ([], "")


def test_a_line_without_end_is_taken_at_the_end(path: Path):
    log = RankLog(path)
    path.write_bytes(b"\0" * 300_000 + b"\n" + ECC.strip())
    look(log)
    assert texts(log) == [ECC.decode().strip()]
