"""A good record of each format with one field of any value: the reader returns, and the watch lives and can restart."""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chronicles.logbook.render import render
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.fold import replay
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.runfolder.journal import read
from opt_ops.runfolder.left_out import LeftOutCounter
from opt_ops.runfolder.node_files import FileAgents
from opt_ops.runfolder.trainer_files import FileTrainer
from tests.e2e.stub_trainer import telemetry
from tests.runfolder.test_boundary import BEAT, CONFIG

EDGES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    3.0,
    1e308,
    math.nan,
    -math.inf,
    "",
    "nan",
    "\ud800",
    "x" * 10**5,
    [],
    {},
]
VALUES = st.sampled_from(EDGES) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
XID = {"code": 79, "pci": "0000:3b:00", "line": "Xid", "at": 1.0, "drill": None}
RECORDS: dict[str, Any] = {
    "telemetry": telemetry(7, 1e-3, 2.0, 0.1)
    | {
        "busy_seconds": {"median": 1.0, "max": 2.0, "rank": 1},
        "checksums": {"ranks": [1], "certain": True, "what": "w"},
    }
    | {"valid": {"wiki": 2.0}, "save_seconds": 1.0, "loss_scale": 8.0, "skip": None, "actv_norm": 3.0},
    "phases": {"ts": 1.0, "phase": "saving", "step": 3},
    "config": CONFIG,
    "heartbeats": BEAT
    | {
        "xids": [XID],
        "orders": [1, 2],
        "machine": {"mounts": {"/a": True}, "carriers": {"e0": 1}, "ports": [{"name": "p"}]},
    }
    | {"burn_in": {"nodes": ["n1"], "devices": [], "alone": [], "silent": [], "finished": True}, "burned_at": 1.0},
    "reports": {
        "node": "n1",
        "started": 1.0,
        "ranks": [{"rank": 0, "code": 1, "signal": None, "ended": 2.0, "tail": "x"}],
    },
    "stacks": {"stacks": {"0": "x"}, "py_spy": {"1": "y"}},
    "requests": {"ts": 1.0, "author": "ann", "verb": "note", "arguments": {"target": "12", "text": "x"}},
}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*at, key))


def changed(record: Any, at: tuple[Any, ...], how: str, value: Any) -> Any:
    if not at:
        return value
    copy = record.copy()
    if len(at) > 1:
        copy[at[0]] = changed(record[at[0]], at[1:], how, value)
    elif how == "drop":
        del copy[at[0]]
    elif how == "add" and isinstance(copy, dict):
        copy["mood"] = value
    else:
        copy[at[0]] = value
    return copy


@st.composite
def hostile(draw: st.DrawFn) -> tuple[str, bytes]:
    source = draw(st.sampled_from(sorted(RECORDS)))
    at = draw(st.sampled_from(list(places(RECORDS[source]))))
    record = changed(RECORDS[source], at, draw(st.sampled_from(["replace", "drop", "add"])), draw(VALUES))
    return source, json.dumps(record).encode()


def put(folder: Path, source: str, data: bytes, attempt: str = "12.00/a0") -> None:
    path = {
        "telemetry": folder / attempt / "telemetry.jsonl",
        "phases": folder / attempt / "phases.jsonl",
        "config": folder / attempt / "config.json",
        "heartbeats": folder / "health/n1.jsonl",
        "reports": folder / attempt / "nodes/n1.json",
        "stacks": folder / attempt / "stacks/12-i000/n1.json",
        "requests": folder / "inbox/h.json",
    }[source]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab" if path.suffix == ".jsonl" else "wb") as file:
        file.write(data + b"\n")


def finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


@given(case=hostile())
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
def test_a_reader_returns_whatever_one_field_holds(case: tuple[str, bytes]):
    source, data = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        put(folder, source, data)
        counter = LeftOutCounter(folder)
        trainer, agents = FileTrainer(folder, counter), FileAgents(folder, counter)
        for point in trainer.points("12.00-a0"):
            assert all(map(finite, (point.ts, point.loss, point.gnorm, point.lr, point.wps, point.step_seconds)))
        trainer.phases("12.00-a0")
        trainer.config("12.00-a0")
        list(agents.heartbeats())
        agents.reports("12.00-a0")
        agents.stacks("12.00-a0", "12-i000")
        FileInbox(folder, counter).requests()
        for each in counter.left_out():
            json.dumps([each.file, each.first, each.newest], ensure_ascii=False).encode()


@pytest.mark.parametrize("seed", range(2))
def test_a_supervisor_lives_through_hostile_input_and_recovers_from_what_happens_meanwhile(tmp_path: Path, seed: int):
    from benchmarks.hostile_inputs import Attack, Figures

    figures = Figures()
    attack = Attack(tmp_path, seed, lies=False, figures=figures)
    attack.run(400)
    assert figures.clean, figures.errors
    state = replay(read(tmp_path / "journal")[0])
    assert FailureClass.PROCESS_DEATH in {each.kind for each in state.incidents.values()}
    assert state.left_out
    assert not state.failing
    render(tmp_path)
    assert "left out" in (tmp_path / "chronicle" / "logbook.md").read_text()
