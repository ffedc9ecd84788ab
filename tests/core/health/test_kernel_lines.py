"""Lines of the kernel log from public reports, and others of the same families, through the command's own function."""

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core.health.explain import look_up, look_up_line
from opt_ops.core.health.kernel_lines import log_events

DATA = Path(__file__).with_name("data")
H100, A100, B200 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA B200"


def rows(path: str) -> list[dict[str, str]]:
    with (DATA / path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def said(line: str, card: str | None = None) -> tuple[str, str, Any]:
    """Verdict (`none`: no event), address and code."""
    found = look_up_line(line, card)
    assert len(found) <= 1
    if not found:
        return "none", "", None
    event, row = found[0]
    return str(row.verdict), event["pci"] or "", event["code"]


@pytest.mark.parametrize("row", rows("kernel_lines.csv"), ids=lambda row: row["id"])
@pytest.mark.parametrize(
    "prefix", ["", "[240314.528856] ", "[Tue Dec  2 10:43:35 2025] ", "Dec 02 10:43:35 n1 kernel: "]
)
def test_lines_of_public_reports(row: dict[str, str], prefix: str):
    verdict, pci, _ = said(prefix + row["line"], row["card"])
    assert verdict in row["verdict"].split("|")
    assert pci == row["pci"]


def test_mig_lines_name_the_instance_behind_the_address():
    lines = (DATA / "08-mig-xid" / "kernel.log").read_text().splitlines()
    for wanted in rows("08-mig-xid/wanted.csv"):
        got = said(lines[int(wanted["line"]) - 1], A100)
        assert got == (wanted["verdict on NVIDIA A100-SXM4-80GB"], wanted["pci"], int(wanted["code"]))


@pytest.mark.parametrize("wanted", rows("09-off-the-bus-without-xid/wanted.csv"), ids=lambda row: row["file"])
def test_a_lost_gpu_without_an_xid_is_one_event_of_a_record(wanted: dict[str, str]):
    text = (DATA / "09-off-the-bus-without-xid" / wanted["file"]).read_text()
    for record in (text, text.strip().replace("\n", "\\x0a")):
        ((event, row),) = look_up_line(record, H100)
        assert (event["pci"], str(row.verdict), str(row.verb)) == (wanted["pci"], wanted["verdict"], wanted["verb"])
        assert event["code"] is None


def test_beside_an_xid_79_of_the_same_gpu_it_is_that_xid():
    xid = "NVRM: Xid (PCI:0000:5d:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
    lost = "NVRM: GPU 0000:5d:00.0: GPU has fallen off the bus."
    ((event, _),) = look_up_line(f"{xid}\\x0a{lost}", H100)
    assert event["code"] == 79
    other = lost.replace("5d", "9b")
    assert len(look_up_line(f"{xid}\n{other}", H100)) == 2, "two GPUs are two events"


THREE_LINES = r"NVRM: The NVIDIA GPU 0000:3b:00.0\x0aNVRM: (PCI ID: 10de:2330) installed in this system has\x0a"
THREE_LINES += "NVRM: fallen off the bus and is not responding to commands."
OTHER_WORDS = [
    ("NVRM: GPU at 00000000:07:00.0 has fallen off the bus.", A100, "bad", "0000:07:00"),
    (THREE_LINES, H100, "bad", "0000:3b:00"),
    (THREE_LINES.replace("\\x0aNVRM: ", " "), A100, "bad", "0000:3b:00"),
    ("NVRM: rm_init_adapter(0) failed", A100, "bad", ""),
    ("NVRM: RmInitAdapter failed! (0x26:0xffff:1290)", A100, "bad", ""),
    ("NVRM: GPU 0000:C7:00.0: RmInitAdapter failed! (0x22:0x56:884)", H100, "bad", "0000:c7:00"),
    ("NVRM: Xid (0000:83:00): 79, GPU has fallen off the bus.", A100, "bad", "0000:83:00"),
    ("3,9999,8765432,-;NVRM: Xid (PCI:0000:5d:00 GPU-I:06): 95, pid=3, Uncontained", A100, "bad", "0000:5d:00"),
    ("NVRM: Xid (PCI:0000:5d:00 GPU-I:03 GPU-CI:00): 13, pid=1, Graphics Exception", H100, "healthy", "0000:5d:00"),
    ("NVRM: Xid (PCI:0000:C1:00): 31, pid=9, name=python, Ch 00000008", H100, "healthy", "0000:c1:00"),
    ("Mar 04 n1 kernel: nvidia-nvswitch3: SXid (PCI:0000:a9:00.0): 12028, Fatal, Link 32", H100, "bad", "0000:a9:00"),
    ("NVRM: The NVIDIA GPU 0000:01:00.0 (PCI ID: 10de:1b38)\\x0aNVRM: installed in this system is not supported by the",
     A100, "none", ""),
    ("NVRM: (PCI ID: 10de:2901) installed in this system has", B200, "none", ""),
    ("NVRM: GPU Board Serial Number: 1653723052734", H100, "none", ""),
    ("NVRM: A GPU crash dump has been created. If possible, please run nvidia-bug-report.sh", H100, "none", ""),
    ("NVRM: krcRcAndNotifyAllChannels_IMPL: RC all channels for critical error 79.", H100, "none", ""),
    ("nvidia-nvswitch1: SXid (PCI:0000:06:00.0): 20034, Data {0x10000000, 0x10000000, 0x0}", H100, "none", ""),
    ("nvidia-nvlink: Nvlink Core is being initialized, major device number 510", H100, "none", ""),
    ("pcieport 0000:00:03.1: AER: Corrected error message received from 0000:5d:00.0", H100, "none", ""),
    ("EDAC MC0: 1 CE memory read error on CPU_SrcID#0_MC#0_Chan#0_DIMM#0", H100, "none", ""),
    ("mce: [Hardware Error]: Machine check events logged", H100, "none", ""),
    ("mlx5_core 0000:9b:00.0 ib2: Link down", H100, "none", ""),
    ("Out of memory: Killed process 4711 (python) total-vm:1kB, anon-rss:1kB", H100, "none", ""),
    ("usb 1-1: device has fallen off the bus", H100, "none", ""),
    ("", H100, "none", ""),
]  # fmt: skip


@pytest.mark.parametrize(("line", "card", "verdict", "pci"), OTHER_WORDS)
def test_lines_of_the_same_families(line: str, card: str, verdict: str, pci: str):
    assert said(line, card)[:2] == (verdict, pci)


@given(st.text() | st.text(alphabet="NVRM: Xid(PC0)5d,79.\\xa\n"), st.integers(0, 10**12))
def test_any_text_gives_typed_values(text: str, code: int):
    for line in (text, f"NVRM: Xid ({text}): {code}, {text}", f"NVRM: GPU {text}: RmInitAdapter failed!"):
        for event in log_events(line):
            assert event.code is None or 0 <= event.code < 10**9
            assert len(event.pci) <= len("0000:00:00.0")


def test_its_reasons_are_in_the_table():
    for reason in ("off_the_bus", "gpu_init_failed"):
        (row,) = look_up([reason])
        assert row.source
