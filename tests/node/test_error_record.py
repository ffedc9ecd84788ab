"""What an agent remembers of errors: no flood hides one, and the verdict is that of the worst."""

import csv
import json
import random
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opt_ops.core.health import Gpu, Heartbeat, Xid, judge
from opt_ops.core.health.kernel_lines import log_events
from opt_ops.core.values import Verdict
from opt_ops.node.error_record import MOST_ENTRIES, ErrorRecord

LINES = Path(__file__).parents[1] / "core/health/data/kernel_lines.csv"
CASE = Path(__file__).parents[1] / "core/health/data/09-off-the-bus-without-xid"
with LINES.open(newline="", encoding="utf-8") as table:
    TABLE = [row["line"] for row in csv.DictReader(table)]
TABLE += [
    "NVRM: Xid (PCI:0000:3b:00): 74, NVLink: fatal error on link 14(0x200000, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0)",
    "NVRM: Xid (PCI:0000:3b:00): 74, NVLink: fatal error on link 14(0x10, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0)",
    "NVRM: Xid (PCI:0000:3b:00): 74, NVLink: fatal error on link 14(0x1, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0)",
]
HARMLESS = [f"NVRM: Xid (PCI:0000:{bus:02x}:00): {code}, pid=1" for bus in range(40) for code in (13, 31, 43, 45)]


def found(line: str, at: float) -> list[dict[str, Any]]:
    return [
        {"code": e.code or 0, "kind": e.kind, "pci": e.pci, "switch": e.switch, "line": e.line, "at": at, "drill": None}
        for e in log_events(line)
    ]


def record(lines: list[tuple[str, float]]) -> ErrorRecord:
    made = ErrorRecord()
    for line, at in lines:
        for each in found(line, at):
            made.add(each)
    return made


def verdict(xids: list[dict[str, Any]], card: str = "NVIDIA H100") -> Verdict:
    gpus = tuple(Gpu(index=i, name=card, pci=f"0000:{bus}:00") for i, bus in enumerate(("3b", "5d", "9b", "01")))
    beat = Heartbeat(
        node="n1", host="h", ts=0.0, attempt=None, nvml="ok", gpus=gpus, xids=tuple(Xid(**x) for x in xids)
    )
    return judge(beat, 0).verdict


TIMES = st.sampled_from([0.0, 0.5, 30.0, 61.0, 90.0, 3600.0, 86400.0 * 6, 86400.0 * 9])


@given(st.lists(st.tuples(st.sampled_from(TABLE), TIMES), max_size=12), st.sampled_from(["NVIDIA H100", "NVIDIA A100"]))
def test_merged_entries_are_judged_as_all_of_them(story: list[tuple[str, float]], card: str):
    story = sorted(story, key=lambda each: each[1])
    raw = [each for line, at in story for each in found(line, at)]
    assert verdict(list(record(story).entries()), card) is verdict(raw, card)


@example([TABLE[32], TABLE[-3]], [], random.Random(1))
@given(st.lists(st.sampled_from(TABLE), max_size=6), st.lists(st.sampled_from(HARMLESS), max_size=300), st.randoms())
def test_no_number_of_harmless_lines_changes_the_verdict(worst: list[str], harmless: list[str], chance: random.Random):
    story = [*worst, *harmless, *HARMLESS]
    chance.shuffle(story)
    merged = record([(line, 0.0) for line in story])
    assert len(merged.entries()) <= MOST_ENTRIES
    assert verdict(list(merged.entries())) is verdict([each for line in worst for each in found(line, 0.0)])


def test_an_entry_has_first_and_last_time_and_a_count():
    line = "NVRM: Xid (PCI:0000:5d:00): 45, pid={}"
    (entry,) = record([(line.format(pid), 10.0 + pid) for pid in range(41)]).entries()
    assert (entry["count"], entry["first_at"], entry["at"], entry["recurred"]) == (41, 10.0, 50.0, False)
    assert entry["line"] == line.format(0)


def test_the_worst_is_first():
    story = ["45", "94", "79", "63", "95"]
    lines = [(f"NVRM: Xid (PCI:0000:5d:00): {code}, pid=1", float(i)) for i, code in enumerate(story)]
    assert [each["code"] for each in record(lines).entries()] == [79, 95, 94, 63, 45], "63 may explain another"


def test_a_storm_needs_no_memory_and_hides_nothing():
    record([("NVRM: Xid (PCI:0000:00:00): 1, warm up", 0.0)])
    made = record([("NVRM: Xid (PCI:0000:5d:00): 79, GPU has fallen off the bus.", 0.0)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(200_000):
        code, bus = 1000 + number % 997, number % 251  # numbers that no table knows: suspect, all of them
        said = {"code": code, "pci": f"0000:{bus:02x}:00", "switch": False, "line": "x", "at": 1.0, "drill": None}
        made.add(said)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "KiB"
    assert len(made.entries()) == MOST_ENTRIES
    assert verdict(list(made.entries())) is Verdict.BAD
    assert made.entries()[0]["code"] == 79
    assert len(json.dumps(made.entries())) < 40_000


@pytest.mark.parametrize("order", [1, -1])
def test_off_the_bus_and_xid_79_of_one_gpu_are_one_entry(order: int):
    xid = "NVRM: Xid (PCI:0000:5d:00): 79, pid='<unknown>', GPU has fallen off the bus."
    lines = [
        xid,
        *(CASE / "kernel.log").read_text().splitlines(),
        *(CASE / "kernel_three_lines.log").read_text().split("\n"),
    ]
    (entry,) = record([(line, float(i)) for i, line in enumerate(lines[::order])]).entries()
    assert (entry["code"], entry["kind"], entry["pci"]) == (79, "", "0000:5d:00")


@pytest.mark.parametrize("log", ["kernel.log", "kernel_init.log", "kernel_three_lines.log"])
def test_the_lines_of_one_loss_are_one_entry(log: str):
    lines = (CASE / log).read_text().splitlines()
    (entry,) = record([(line, 0.1 * i) for i, line in enumerate(lines)]).entries()
    assert (entry["code"], entry["pci"]) == (0, "0000:5d:00")
    assert verdict([entry]) is Verdict.BAD


def test_two_lost_gpus_are_two_entries():
    lost = "NVRM: GPU 0000:{}:00.0: GPU has fallen off the bus."
    assert len(record([(lost.format("5d"), 0.0), (lost.format("9b"), 0.0)]).entries()) == 2
