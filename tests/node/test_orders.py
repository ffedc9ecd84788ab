"""Orders of any form, by anybody: what is not right is refused and told, and nothing ends for it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.node.folder_watch import GONE_SECONDS, UNMOUNTED_SECONDS, FolderWatch
from opt_ops.node.heartbeat_line import LARGEST_HEARTBEAT, line_of
from opt_ops.node.orders import OrdersFile, OrdersRefused, orders_of
from opt_ops.runfolder.files import write_json
from opt_ops.runfolder.heartbeat import heartbeat_of

LAUNCH = {
    "attempt": "1.00-a0",
    "nodes": ["n0", "n1"],
    "holders": {"n1": "1-n0"},
    "ranks_per_node": 2,
    "address": "10.0.0.1",
    "port": 4242,
    "argv": ["python", "-m", "trainer"],
    "environment": {"A": "b"},
    "membership": None,
    "warm": {"n7": "1-n1"},
    "standbys": {"n7": 2},
}
MEMBERSHIP = {
    "generation": 4,
    "ranks": [["n0", 0], ["n0", 1], ["n1", 0], ["n1", 1]],
    "new": [3],
    "address": "10.0.0.9",
    "port": 4243,
}
PROBE = {**LAUNCH, "attempt": "12-i003-same_data", "nodes": ["n1"], "ranks_per_node": 1}

EVALUATE = {"evaluation": "1-ev003", "node": "n7", "holder": "1-n7", "argv": ["python"], "nice": 10}


def with_members(**changes: Any) -> dict[str, Any]:
    return {"launch": {**LAUNCH, "membership": {**MEMBERSHIP, **changes}}}


GOOD: dict[str, Any] = {
    "v": 1,
    "epoch": 2,
    "seq": 5,
    "launch": LAUNCH,
    "drills": [{"drill": "d0", "fault": "kill-rank", "node": None, "arguments": {"attempt": "1.00-a0", "rank": 3}}],
    "released": ["1-n7"],
    "save": None,
    "dump": "1-i000",
    "probes": [PROBE],
    "evaluate": EVALUATE,
    "burn_in_seconds": 0.0,
}


@pytest.fixture
def file(tmp_path: Path) -> OrdersFile:
    return OrdersFile(tmp_path, "n1")


def put(file: OrdersFile, **changes: Any) -> None:
    write_json(file._path, {**GOOD, **changes})


def test_good_orders_are_read_whole(file: OrdersFile):
    put(file, new_field={"x": 1}, epoch=2.0)
    orders = file.read()
    assert orders == {name: value for name, value in GOOD.items() if name != "v"}
    assert file.refused is None


def test_a_membership_is_read_whole(file: OrdersFile):
    put(file, **with_members())
    orders = file.read()
    assert orders is not None
    assert orders["launch"]["membership"] == {**MEMBERSHIP, "ranks": [tuple(each) for each in MEMBERSHIP["ranks"]]}


def test_without_a_file_there_are_none(file: OrdersFile):
    assert (file.read(), file.refused) == (None, None)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"epoch": "2"}, "epoch"),
        ({"epoch": None}, "epoch"),
        ({"epoch": True}, "epoch"),
        ({"epoch": -1}, "epoch"),
        ({"epoch": 1.5}, "epoch"),
        ({"epoch": 10**16}, "epoch"),
        ({"seq": []}, "seq"),
        ({"launch": 7}, "launch"),
        ({"launch": {**LAUNCH, "attempt": "../../x-a1"}}, "attempt"),
        ({"launch": {**LAUNCH, "argv": "rm"}}, "argv"),
        ({"launch": {**LAUNCH, "argv": []}}, "no command"),
        ({"launch": {**LAUNCH, "argv": ["a\0b"]}}, "argv"),
        ({"launch": {**LAUNCH, "ranks_per_node": 10**9}}, "ranks_per_node"),
        ({"launch": {**LAUNCH, "nodes": ["n0"]}}, "not among its nodes"),
        ({"launch": {**LAUNCH, "environment": {"A": 1}}}, "environment"),
        ({"launch": {**LAUNCH, "warm": ["n7"]}}, "warm"),
        ({"launch": {**LAUNCH, "standbys": {"n7": -1}}}, "standbys"),
        (with_members(generation=None), "generation"),
        (with_members(ranks=[]), "pairs"),
        (with_members(ranks=[["n0", 0, 1]]), "pairs"),
        (with_members(ranks=[["n0", 0], ["n0", 0], ["n1", 0], ["n1", 1]]), "each once"),
        (with_members(ranks=[["n0", 0], ["n0", 1], ["n1", 0], ["n9", 1]]), "each once"),
        (with_members(new=[4]), "new"),
        (with_members(port=70_000), "port"),
        ({"probes": {}}, "probes"),
        ({"probes": [7]}, "launch"),
        ({"probes": [{**PROBE, "attempt": "1.00-a0"}]}, "no name of a probe"),
        ({"probes": [{**PROBE, "attempt": "12-i003-../../x"}]}, "no name of a probe"),
        ({"probes": [{**PROBE, "nodes": ["n0", "n1"]}]}, "one node"),
        ({"probes": [{**PROBE, "argv": []}]}, "no command"),
        ({"evaluate": "1-ev003"}, "evaluate"),
        ({"evaluate": {**EVALUATE, "evaluation": "../../x"}}, "no name of an evaluation"),
        ({"evaluate": {**EVALUATE, "argv": []}}, "no command"),
        ({"evaluate": {**EVALUATE, "argv": "python"}}, "argv"),
        ({"evaluate": {**EVALUATE, "node": None}}, "node"),
        ({"evaluate": {**EVALUATE, "nice": 20}}, "nice"),
        ({"dump": "../../etc"}, "dump"),
        ({"burn_in_seconds": 1e300}, "burn_in_seconds"),
        ({"drills": [{"drill": "d0"}]}, "arguments"),
        ({"released": "1-n0"}, "released"),
    ],
)
def test_orders_of_a_wrong_type_are_refused_and_told(file: OrdersFile, changes: dict[str, Any], word: str):
    put(file, **changes)
    assert file.read() is None
    assert file.read() is None
    assert file.refused is not None
    assert word in file.refused["why"]
    assert file.refused["count"] == 2
    put(file)
    assert file.read() is not None
    assert file.refused is None


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"epoch": 1' + b"0" * 9000 + b"}"])
def test_what_is_no_json_is_refused(file: OrdersFile, data: bytes):
    file._path.write_bytes(data)
    assert file.read() is None
    assert bool(file.refused) is (data != b"null"), "null is no file of orders"


def test_a_pipe_or_a_folder_in_its_place_is_refused(file: OrdersFile):
    os.mkfifo(file._path)
    assert file.read() is None
    assert "named pipe" in str(file.refused)
    file._path.unlink()
    file._path.mkdir()
    assert file.read() is None
    assert "folder" in str(file.refused)


def test_orders_that_others_can_write_are_refused(file: OrdersFile):
    put(file)
    file._path.chmod(0o664)
    assert file.read() is None
    assert "other users may write it" in str(file.refused)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_orders_of_another_user_are_refused(file: OrdersFile):
    put(file)
    os.chown(file._path, 12345, -1)
    assert file.read() is None
    assert "belongs to user 12345" in str(file.refused)


def test_orders_of_an_older_process_are_refused(file: OrdersFile):
    put(file)
    orders = file.read()
    assert orders is not None
    file.accepted(orders)
    for older in ({"epoch": 1, "seq": 99}, {"epoch": 2, "seq": 4}):
        put(file, **older)
        assert file.read() is None
        assert "older" in str(file.refused)


def test_only_the_owner_of_the_lineage_is_obeyed(file: OrdersFile):
    """Forged or restored orders of a higher epoch; then the owner writes its own again, or takes a higher epoch."""
    owner = {"v": 1, "epoch": 2, "host": "h", "pid": 1, "token": "t"}
    write_json(file._path.with_name("journal.owner.json"), owner)
    put(file, epoch=999)
    assert file.read() is None
    assert "the owner of the lineage has epoch 2" in str(file.refused)
    put(file)
    assert file.read() is not None
    put(file, epoch=1000)
    write_json(file._path.with_name("journal.owner.json"), {**owner, "epoch": 1000})
    assert file.read() is not None


def test_a_new_owner_that_has_not_written_yet_refuses_nothing(file: OrdersFile):
    put(file)
    orders = file.read()
    assert orders is not None
    file.accepted(orders)
    write_json(file._path.with_name("journal.owner.json"), {"epoch": 3, "host": "h", "pid": 1, "token": "t"})
    assert file.read() == orders
    assert file.refused is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([*GOOD, "launch"]), st.sampled_from([None, *LAUNCH]), JSON)
def test_any_value_in_any_field(field: str, inner: str | None, value: Any):
    made = {**GOOD, field: value if inner is None or field != "launch" else {**LAUNCH, inner: value}}
    try:
        orders = orders_of(json.loads(json.dumps(made)), "n1")
    except OrdersRefused:
        return
    assert isinstance(orders["epoch"], int)
    assert orders["launch"] is None or orders["launch"]["argv"]
    json.dumps(orders, allow_nan=False)


# ---- the folder of the lineage


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_folder_that_is_renamed_or_replaced_is_gone(tmp_path: Path):
    folder, clock = tmp_path / "runs" / "1", Clock()
    folder.mkdir(parents=True)
    watch = FolderWatch(folder, clock)
    assert not watch.is_gone()
    folder.rename(folder.with_name("old"))
    assert not watch.is_gone()
    assert not watch.here
    clock.now = GONE_SECONDS
    assert watch.is_gone()
    folder.with_name("old").rename(folder)
    assert not watch.is_gone(), "it came back in time"
    folder.rename(folder.with_name("old"))
    folder.mkdir()
    assert not watch.is_gone()
    clock.now += GONE_SECONDS
    assert watch.is_gone(), "another folder of its name is not the lineage"


def test_a_file_system_that_is_gone_ends_nothing_for_minutes(tmp_path: Path):
    folder, clock = tmp_path / "runs" / "1", Clock()
    folder.mkdir(parents=True)
    watch = FolderWatch(folder, clock)
    folder.parent.rename(tmp_path / "old")
    assert not watch.is_gone()
    clock.now = UNMOUNTED_SECONDS - 1
    assert not watch.is_gone()
    clock.now = UNMOUNTED_SECONDS
    assert watch.is_gone()


# ---- a heartbeat's length


def test_a_heartbeat_is_never_longer_than_its_reader_takes():
    beat: dict[str, Any] = {"ts": 1.0, "node": "n1", "host": "h", "nvml": "ok", "gpus": [{"index": 0}], "xids": []}
    beat["machine"] = {"ports": [], "carriers": {}, "mounts": {f"/data/{i:04}": True for i in range(800)}}
    whole = json.loads(line_of(beat))
    assert len(whole["machine"]["mounts"]) == 800, "hundreds of mounts are read"
    beat["machine"]["mounts"] = {"/" + "x" * 4000 + str(i): True for i in range(800)}
    line = line_of(beat)
    assert len(line) <= LARGEST_HEARTBEAT
    assert json.loads(line)["left_out"] == ["machine.mounts"]
    assert heartbeat_of(json.loads(line)).machine.mounts is None, "unknown, not lost"
    beat["gpus"] = [{"index": i, "name": "x" * 300_000} for i in range(4)]
    assert heartbeat_of(json.loads(line_of(beat))).nvml == "too_long"
