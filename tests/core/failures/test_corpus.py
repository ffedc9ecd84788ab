"""Logs of failed ranks, each with the class, the line and the node that a person would name."""

import csv
import json
from pathlib import Path

import pytest

from opt_ops.core.failures.cause_lines import LONGEST, CauseLines
from opt_ops.core.failures.classify_exit import blame, last_words, why_ended
from opt_ops.core.failures.families import FAMILIES, Fault
from opt_ops.core.values import RankExit
from opt_ops.runfolder.log_set import read_log_set

DATA = Path(__file__).parent / "data"
HARDWARE = {"gpu", "node"}


def rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ended(row: dict[str, str]) -> RankExit:
    code, signal = (int(row[name]) if row[name] else None for name in ("code", "signal"))
    return RankExit(rank=0, node="n1", code=code, signal=signal, at=1.0)


def text_of(row: dict[str, str]) -> str:
    return row["text"].replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\0", "\\")


ROWS = [row for name in ("reported_lines.csv", "library_wordings.csv", "found_reports.csv") for row in rows(name)]


@pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])
def test_the_class_and_the_line(row: dict[str, str]):
    found = why_ended(ended(row), text_of(row))
    assert found.kind in row["class"].split("|"), (found.family and found.family.name, found.line)
    assert any(words in found.line for words in row["line_has"].split("|")), found.line


@pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])
def test_the_fault_is_never_a_cards_where_a_person_says_it_is_the_programs(row: dict[str, str]):
    found = why_ended(ended(row), text_of(row))
    if row["fault"] in ("user", "memory", "scheduler", "storage"):
        assert str(found.fault) not in HARDWARE
    if row["fault"] in HARDWARE:
        assert found.fault in (Fault.GPU, Fault.NODE, Fault.UNCLEAR)


@pytest.mark.parametrize("row", rows("aborts/wanted.csv"), ids=lambda row: row["file"])
@pytest.mark.parametrize("stacks", [0, 10, 200, 10_000])
def test_the_reason_is_found_however_many_stacks_follow(row: dict[str, str], stacks: int):
    frame = b"frame #%d: c10d::ProcessGroupNCCL::watchdogHandler() + 0x617 (0x7f5a44427557 in /opt/libtorch_cuda.so)\n"
    whole = (DATA / "aborts" / row["file"]).read_bytes() + b"".join(frame % number for number in range(stacks))
    exited = RankExit(rank=3, node="n2", code=None, signal=int(row["signal"]), at=1.0)
    lines = CauseLines()
    for start in range(0, len(whole), 1000):  # as it grows: pieces end anywhere
        lines.feed(whole[start : start + 1000])
    found = why_ended(exited, last_words(exited, (each.line for each in lines.finish().found)))
    assert found.kind == row["class"]
    assert row["line_has"] in found.line


@pytest.mark.parametrize("folder", sorted((DATA / "log_sets").iterdir()), ids=lambda folder: folder.name)
def test_the_first_cause_among_several_ranks(folder: Path):
    wanted = json.loads((folder / "wanted.json").read_text())
    found = blame(read_log_set(folder))
    assert found.kind in wanted["class"].split("|")
    assert found.first.rank in wanted["first_rank"]
    assert found.node == wanted["node"]
    assert wanted["line_has"] in found.line


def exit_of(rank: int, code: int | None = 1, signal: int | None = None, at: float = 1.0) -> RankExit:
    return RankExit(rank=rank, node=f"n{rank // 2 + 1}", code=code, signal=signal, at=at)


LOST = "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, remote process exited or there was a network error"
ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
ILLEGAL = "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_a_notice_of_the_memory_killer_explains_the_killed_rank_of_its_node():
    notice = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed."
    failed = {exit_of(0, at=1.1): LOST, exit_of(2, None, 9, 0.9): "", exit_of(3, at=1.4): f"{LOST}\n{notice}"}
    found = blame(failed)
    assert (found.kind, found.first.rank, found.line, found.node) == ("out_of_memory", 2, notice, None)


def test_one_error_on_several_nodes_blames_no_node():
    found = blame({exit_of(0): ILLEGAL, exit_of(4, at=1.1): ILLEGAL})
    assert (found.kind, found.node, found.nodes, found.ranks) == ("gpu_error", None, ("n1", "n3"), 2)


def test_a_card_is_blamed_though_its_victims_ended_earlier():
    found = blame({exit_of(0, at=0.5): LOST, exit_of(5, None, 6, 9.0): ECC, exit_of(1, None, 6, 2.0): ""})
    assert (found.kind, found.first.rank, found.node) == ("gpu_error", 5, "n3")


def test_a_full_disk_blames_no_node():
    full = "OSError: [Errno 28] No space left on device: '/scratch/step-10/x.pt'"
    found = blame({exit_of(0): full, exit_of(2, at=2.0): LOST})
    assert (found.kind, found.first.rank, found.node) == ("storage", 0, None)


def test_an_error_that_training_survived_is_no_cause():
    said = "OSError: [Errno 5] Input/output error, trying again\n[rank2] step 18: 9 s\n"
    assert why_ended(exit_of(2, None, 9), said).kind == "process_death"
    assert why_ended(exit_of(2), said + "ValueError: no").line == "ValueError: no"
    assert why_ended(exit_of(2), said).kind == "storage", "it left by itself, and says nothing else"


def test_what_is_kept_is_bounded_and_has_no_control_characters():
    lines = CauseLines()
    for number in range(50_000):
        lines.add(f"\x1b[31mRuntimeError: CUDA error: {number} \x1b]0;title\x07\x00" + "x" * 50)
    lines.add("a" * 100_000 + ECC + "b" * 100_000)
    lines.feed(bytes(range(256)) * 4000).feed(b"y" * 1_000_000).finish()
    kept = [found.line.text for found in lines.found]
    assert len(kept) < 30
    assert all(len(text) <= LONGEST and text.isprintable() for text in kept)
    assert kept[0] == "RuntimeError: CUDA error: 0  " + "x" * 50
    assert any(ECC in text for text in kept)


def test_a_line_without_end_is_looked_at():
    lines = CauseLines().feed(b"z" * 40_000).feed(ECC.encode()).feed(b"w" * 300_000)
    assert any(ECC in found.line.text for found in lines.found)


def test_every_family_is_found_by_a_row():
    named = {found.family.name for row in ROWS for found in CauseLines().add_all(text_of(row).splitlines()).found}
    assert {family.name for family in FAMILIES} == named
