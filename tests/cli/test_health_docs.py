"""The page about health is what the table says, and every reason can be looked up."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opt_ops.core.health.explain import look_up, rows
from opt_ops.core.health.table import Verb
from tests.commands import opt_ops

ROOT = Path(__file__).parents[2]


def explain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return opt_ops(ROOT, "node", "explain", *arguments)


def test_the_page_is_what_the_table_says():
    made = subprocess.run([sys.executable, "scripts/health_docs.py"], cwd=ROOT, capture_output=True, text=True)
    assert made.stdout == (ROOT / "docs/health.md").read_text(), "python scripts/health_docs.py > docs/health.md"


def test_every_reason_is_on_the_page_and_can_be_looked_up():
    page = (ROOT / "docs/health.md").read_text()
    for row in rows():
        assert f"| `{row.reason}` |" in page
        assert row in look_up([row.reason])
        assert row.source


@pytest.mark.parametrize(
    ("words", "verbs"),
    [
        (["xid", "94"], [Verb.RESTART_APP]),
        (["xid_94"], [Verb.RESTART_APP]),
        (["Xid", "48"], [Verb.ISOLATE, Verb.RESET_GPU]),
        (["xid", "145"], [Verb.RESET_GPU, Verb.NONE, Verb.NONE]),
        (["xid", "999"], [Verb.NONE]),
        (["sxid", "12028"], [Verb.RESET_GPU]),
        (["sxid", "20034"], [Verb.RESET_GPU, Verb.NONE]),
        (["nvml_hung"], [Verb.NONE]),
        (["nothing"], []),
    ],
)
def test_errors_are_looked_up_with_all_that_their_lines_may_say(words: list[str], verbs: list[Verb]):
    assert [row.verb for row in look_up(words)] == verbs


def test_who_decides_otherwise_is_said():
    text = explain("xid", "94").stdout
    assert re.search(r"^others\tgcm: critical", text, re.MULTILINE)
    (item,) = json.loads(explain("remap_pending", "-o", "json").stdout)["items"]
    assert (item["reason"], item["verdict"], item["verb"]) == ("remap_pending", "suspect", "RESET_GPU")


def test_an_unknown_reason_is_not_found():
    done = explain("bad_weather")
    assert (done.returncode, "no bad_weather" in done.stderr) == (3, True)


def test_a_line_of_the_kernel_log_is_explained():
    line = "[12.5] NVRM: GPU 0000:5d:00.0: GPU has fallen off the bus."
    done = explain("--line", line, "--card", "NVIDIA H100 80GB HBM3", "-o", "json")
    (item,) = json.loads(done.stdout)["items"]
    told = {name: item[name] for name in ("verdict", "pci", "code", "switch", "reason", "verb")}
    assert told == {
        "verdict": "bad",
        "pci": "0000:5d:00",
        "code": None,
        "switch": False,
        "reason": "off_the_bus",
        "verb": "REBOOT_NODE",
    }
    xid = json.loads(explain("xid", "48", "-o", "json").stdout)["items"][0]
    (same,) = json.loads(explain("--line", "NVRM: Xid (PCI:0000:5d:00): 48, pid=1", "-o", "json").stdout)["items"]
    assert (same["reason"], same["verb"], same["code"]) == (xid["reason"], xid["verb"], 48)


def test_a_line_that_is_no_error_has_no_items():
    done = explain("--line", "usb 1-1: new high-speed USB device", "-o", "json")
    assert (done.returncode, json.loads(done.stdout)["items"]) == (0, [])
    neither, both = explain(), explain("ok", "--line", "x")
    assert (neither.returncode, both.returncode) == (2, 2)
    assert "either a reason code or --line" in neither.stderr
