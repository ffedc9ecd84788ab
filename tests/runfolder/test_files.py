"""Files of the run folder: whole or not at all, and malformed content is skipped."""

import errno
import json
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from opt_ops.contract import manifest
from opt_ops.core.values import Checkpoint
from opt_ops.errors import OptOpsError
from opt_ops.node.kernel_log import KernelLog, parse_xid
from opt_ops.ports import Request
from opt_ops.runfolder import files
from opt_ops.runfolder.checkpoints import FileCheckpoints
from opt_ops.runfolder.files import FileRefused, Tail, create_json, identity_of, read_json, write_json, write_text
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.runfolder.node_files import FileAgents
from opt_ops.runfolder.trainer_files import FileTrainer
from tests.e2e.stub_trainer import save, telemetry


def append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "f.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"new": float("nan")})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        write_text(path, "new")
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_a_file_is_created_once(tmp_path: Path):
    assert create_json(tmp_path / "a" / "once.json", 1)
    assert not create_json(tmp_path / "a" / "once.json", 2)
    assert read_json(tmp_path / "a" / "once.json") == 1
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_damage_is_an_error_and_absence_is_not(tmp_path: Path):
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(OptOpsError, match="is not JSON"):
        read_json(tmp_path / "bad.json")


def test_a_tail_gives_whole_lines_once(tmp_path: Path):
    path, tail = tmp_path / "t.jsonl", Tail(tmp_path / "t.jsonl")
    assert list(tail.read()) == []
    append(path, '{"a": 1}\n{"a": 2')
    assert list(tail.read()) == [{"a": 1}]
    append(path, '}\nnot json\n[1]\n{"a": 3}\n')
    assert list(tail.read()) == [{"a": 2}, {"a": 3}]
    assert tail.bad_lines == 2
    assert list(tail.read()) == []


def test_a_tail_follows_a_file_that_was_begun_anew(tmp_path: Path):
    path, tail = tmp_path / "t.jsonl", Tail(tmp_path / "t.jsonl")
    append(path, '{"a": 1}\n{"a": 2}\n')
    assert len(list(tail.read())) == 2
    path.rename(tmp_path / "t.old")
    append(path, '{"b": 1}\n')
    assert list(tail.read()) == [{"b": 1}]


def test_a_tail_can_begin_near_the_end_at_a_whole_line(tmp_path: Path):
    path, tail = tmp_path / "t.jsonl", Tail(tmp_path / "t.jsonl")
    append(path, "".join(f'{{"n": {n}}}\n' for n in range(1000)))
    tail.skip_to_last(30)
    assert [line["n"] for line in tail.read()] == [998, 999]


def test_a_tail_that_comes_late_passes_over_what_is_old(tmp_path: Path):
    path, tail = tmp_path / "t.jsonl", Tail(tmp_path / "t.jsonl", most=50)
    append(path, "".join(f'{{"n": {n}}}\n' for n in range(1000)))
    assert [line["n"] for line in tail.read()] == [996, 997, 998, 999]
    append(path, '{"n": 1000}\n{"n": 10')
    assert [line["n"] for line in tail.read()] == [1000]
    append(path, "01}\n" + "".join(f'{{"n": {n}}}\n' for n in range(1002, 1006)))
    assert [line["n"] for line in tail.read()] == [1002, 1003, 1004, 1005]
    append(path, '{"n": 1006}\n')
    assert [line["n"] for line in tail.read()] == [1006]


def test_a_line_that_is_too_long_is_never_held_in_memory(tmp_path: Path):
    path, tail = tmp_path / "t.jsonl", Tail(tmp_path / "t.jsonl")
    append(path, '{"a": 1}\n')
    with path.open("r+b") as file:  # a sparse file: no newline for 400 MB
        file.truncate(400_000_000)
    tracemalloc.start()
    assert list(tail.read()) == [{"a": 1}]
    append(path, '\n{"a": 2}\n\n{"a"')
    assert list(tail.read()) == [{"a": 2}]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * files.LONGEST_LINE
    assert (tail.bad_lines, tail.line) == (1, 4), "the long line is the second, and an empty one is the fourth"
    append(path, ": 3}\n")
    assert list(tail.read()) == [{"a": 3}]


def test_a_tail_that_comes_late_finds_the_last_line_however_long_it_is(tmp_path: Path):
    path, tail = tmp_path / "t.jsonl", Tail(tmp_path / "t.jsonl", most=50)
    append(path, "".join(json.dumps({"n": n, "mounts": "x" * 100_000}) + "\n" for n in range(9)))
    assert [line["n"] for line in tail.read()][-1] == 8
    append(path, json.dumps({"n": 9, "mounts": "x" * 200_000}) + "\n")
    assert [line["n"] for line in tail.read()] == [9]
    assert tail.bad_lines == 0


def test_a_tail_counts_what_is_no_json_with_its_line_and_goes_on(tmp_path: Path):
    bad: list[tuple[int, str]] = []
    path = tmp_path / "t.jsonl"
    tail = Tail(path, on_bad=lambda line, why: bad.append((line, why)))
    path.write_bytes(b'{"n": 1}\n' + b"[" * 100_000 + b'\n\xff\xfe{"n"\n"text"\n{"n": 2}\n')
    assert [line["n"] for line in tail.read()] == [1, 2]
    assert [line for line, _ in bad] == [2, 3, 4]
    assert bad[2][1] == "not a JSON object"


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "link to a pipe"])
def test_only_regular_files_are_opened_and_none_holds_up_its_reader(tmp_path: Path, kind: str):
    path = tmp_path / "f.json"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            here = socket.socket(socket.AF_UNIX)
            here.bind(os.path.relpath(path))
            here.close()
        case "folder":
            path.mkdir()
        case _:
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to(tmp_path / "pipe")
    for read in (read_json, lambda p: list(Tail(p).read()), lambda p: Tail(p).skip_to_last(9), identity_of):
        with pytest.raises(FileRefused, match="must be a regular file"):
            read(path)


def test_a_file_that_gives_orders_must_belong_to_this_user_and_be_writable_by_nobody_else(tmp_path: Path):
    path = tmp_path / "f.json"
    path.write_text("1")
    path.chmod(0o644)
    assert read_json(path, orders=True) == 1
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(FileRefused, match="symbolic link"):
        read_json(tmp_path / "link", orders=True)
    for mode in (0o664, 0o646):
        path.chmod(mode)
        assert read_json(path) == 1
        with pytest.raises(FileRefused, match="other users may write it"):
            read_json(path, orders=True)
    path.chmod(0o644)
    if os.geteuid() == 0:  # only root can give a file away
        os.chown(path, 12345, 0)
        with pytest.raises(FileRefused, match="belongs to user 12345"):
            read_json(path, orders=True)


def test_a_file_that_is_too_large_or_nested_without_end_is_no_json(tmp_path: Path):
    path = tmp_path / "f.json"
    path.write_text("[" * 100_000)
    with pytest.raises(OptOpsError, match="is not JSON"):
        read_json(path)
    with pytest.raises(FileRefused, match="larger than 99,999 bytes"):
        read_json(path, most=99_999)


def test_telemetry_that_lacks_what_it_must_have_is_left_out_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trainer = FileTrainer(tmp_path)
    good = json.dumps(telemetry(7, 1e-3, 2.0, 0.1))
    append(tmp_path / "12.00/a0/telemetry.jsonl", f'{{"num_updates": 6}}\n{good}\n{{"loss": "2.0"}}\n')
    assert [point.step for point in trainer.points("12.00-a0")] == [7]
    assert caplog.text.count("is not what docs/formats.md says") == 1
    assert "`lr` is missing" not in caplog.text, "the first reason is enough"
    append(tmp_path / "12.00/a0/config.json", '{"steps": 3}')
    assert trainer.config("12.00-a0") is None
    assert "config.json" in caplog.text


def test_requests_wait_in_order_and_are_taken_out(tmp_path: Path):
    inbox = FileInbox(tmp_path)
    for ts, name in ((2.0, "b"), (1.0, "a"), (3.0, "c")):
        inbox.put(Request(request=name, author="ann", verb="note", arguments={"target": "1", "text": "…"}), ts)
    assert [request.request for request in inbox.requests()] == ["a", "b", "c"]
    inbox.done("b")
    inbox.done("b")
    assert [request.request for request in inbox.requests()] == ["a", "c"]


def test_a_health_file_with_unknown_fields_is_read(tmp_path: Path):
    line = {"node": "n1", "host": "h", "ts": 1.0, "nvml": "ok", "gpus": [{"index": 0, "mood": "good"}], "new": 1}
    append(tmp_path / "health/n1.jsonl", json.dumps(line) + "\n")
    (beat,) = FileAgents(tmp_path).heartbeats()
    assert (beat.node, beat.gpus[0].index, beat.orders) == ("n1", 0, (0, 0))


@pytest.mark.parametrize(
    ("line", "xid"),
    [
        (
            "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python, GPU has fallen off the bus.",
            (79, "0000:3b:00", False),
        ),
        ("NVRM: Xid (PCI:0000:c1:00): 63, pid='<unknown>', name=<unknown>, Row Remapper: …", (63, "0000:c1:00", False)),
        ("NVRM: Xid (0000:83:00): 31, Ch 00000010, engmask 00000101, intr 10000000", (31, "0000:83:00", False)),
        (
            "nvidia-nvswitch3: SXid (PCI:0000:c8:00.0): 20034, Fatal, Link 36 LTSSM Fault Up",
            (20034, "0000:c8:00.0", True),
        ),
        ("nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 22013, Non-fatal, Link 5 Minion", (22013, "0000:05:00.0", True)),
        (
            "nvidia-nvswitch2: SXid (PCI:0000:07:00.0): 20034, Severity 1 Engine instance 60 Sub-engine instance 00",
            None,
        ),
        ("nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Data {0x10000000, 0x10000000, 0x00000000}", None),
        ("usb 1-1: new high-speed USB device", None),
    ],
)
def test_xid_lines_of_the_kernel_log(line: str, xid: tuple[int, str, bool] | None):
    assert parse_xid(line) == xid


def test_a_kernel_log_that_may_not_be_read_says_so(tmp_path: Path):
    log = KernelLog(str(tmp_path / "none"))
    assert not log.readable
    assert log.xids() == []


def test_kernel_records_are_taken_apart(tmp_path: Path):
    # A pipe gives one record a read, as /dev/kmsg does.
    path = tmp_path / "kmsg"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    log = KernelLog(str(path), since=0.0)
    os.write(writer, b"4,1234,5678901,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1\n SUBSYSTEM=pci\n")
    (xid,) = log.xids()
    assert (xid["code"], xid["pci"], xid["drill"]) == (79, "0000:3b:00", None)
    assert log.xids() == []
    os.close(writer)


def examine(store: FileCheckpoints, checkpoint: Checkpoint) -> str:
    store.examine(checkpoint)
    store.examine(checkpoint)
    while not (ended := store.examined()):
        continue
    ((examined, problem),) = ended
    assert examined == checkpoint
    return problem


def test_checkpoints_are_examined_to_the_last_byte(tmp_path: Path):
    store = FileCheckpoints(tmp_path)
    assert store.committed("12.00") == []
    for step in (20, 10):
        save(tmp_path / "12.00" / "checkpoints", step, "12.00-a0", {}, "")
    first, second = store.committed("12.00")
    assert (first.step, second.step) == (10, 20)
    assert examine(store, first) == ""
    shard = Path(second.path) / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"!")
    assert "__0_0.distcp" in examine(store, second)
    shard.write_bytes(content)
    assert examine(store, second) == ""


def test_snapshots_are_seen_with_the_nodes_that_have_them_and_examined_there(tmp_path: Path):
    store, folder = FileCheckpoints(tmp_path), tmp_path / "12.00" / "checkpoints"
    save(folder, 10, "12.00-a0", {}, "")
    path = manifest.snapshot_folder(folder, 20)
    header = json.loads((folder / "step-00000010" / "manifest.json").read_text()) | {"step": 20, "telemetry": {}}
    header = {key: value for key, value in header.items() if key not in {"v", "files"}}
    for nodes in (("n1", "n2"), ("n3", "n1")):
        path.mkdir()
        for rank, node in enumerate(nodes):
            disk = tmp_path / node
            disk.mkdir(exist_ok=True)
            for name in ("__0_0.distcp", "__1_0.distcp"):
                (disk / name).write_bytes(name.encode())
            place = {"node": node, "host": socket.gethostname(), "folder": str(disk)}
            manifest.write_rank(path, rank, [f"__{rank}_0.distcp"], copies=[f"__{1 - rank}_0.distcp"], place=place)
        manifest.commit(path, ranks=2, deadline_seconds=1, header=header)
        durable, snapshot = store.committed("12.00")
        assert durable.nodes == ()
        assert (snapshot.step, snapshot.nodes) == (20, tuple(sorted([nodes, nodes[::-1]])))
        assert examine(store, snapshot) == ""
        (tmp_path / nodes[0] / "__1_0.distcp").write_bytes(b"damaged")
        assert examine(store, snapshot) == ""
        (tmp_path / nodes[1] / "__1_0.distcp").unlink()
        assert "__1_0.distcp" in examine(store, snapshot)
        store.pin(snapshot)
        assert manifest.pinned(path)
        manifest.remove(path)


def test_a_checkpoint_in_the_folder_of_another_step_is_refused(tmp_path: Path):
    store = FileCheckpoints(tmp_path)
    save(tmp_path / "12.00" / "checkpoints", 10, "12.00-a0", {}, "")
    folder = tmp_path / "12.00" / "checkpoints"
    (folder / "step-00000010").rename(folder / "step-00000030")
    (moved,) = store.committed("12.00")
    assert "its manifest step 10" in examine(store, moved)


def test_a_report_is_read_again_when_it_was_replaced(tmp_path: Path):
    agents, path = FileAgents(tmp_path), tmp_path / "12.00/a0/nodes/n1.json"
    runs = {"rank": 0, "code": None, "signal": None, "ended": None}
    write_json(path, {"node": "n1", "started": 1.0, "ranks": [runs]})
    assert not agents.reports("12.00-a0")["n1"].done
    assert agents.reports("12.00-a0") == agents.reports("12.00-a0")
    write_json(path, {"node": "n1", "started": 1.0, "ranks": [{**runs, "signal": 9, "ended": 2.0}]})
    (killed,) = agents.reports("12.00-a0")["n1"].exits
    assert (killed.signal, killed.at) == (9, 2.0)
    write_json(tmp_path / "12.00/a0/nodes/n2.json", {"node": "n2", "started": 1.0, "ranks": [runs]})
    assert agents.reports("12.00-a0").keys() == {"n1", "n2"}
    assert not agents.reports("12.00-a1")


def test_one_file_that_cannot_be_read_stops_no_look_at_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A folder in place of the file stands for an unreadable file: root may read every file."""
    attempt, runs = tmp_path / "12.00/a0", {"rank": 0, "code": None, "signal": None, "ended": None}
    broken = ("health/n1.jsonl", "12.00/a0/nodes/n1.json", "inbox/1.json", "12.00/a0/config.json")
    for name in (*broken, "12.00/a0/telemetry.jsonl", "12.00/a0/phases.jsonl"):
        (tmp_path / name).mkdir(parents=True)
    beat = {"node": "n2", "host": "h", "ts": 1.0, "nvml": "ok"}
    (tmp_path / "health/n2.jsonl").write_text(json.dumps(beat) + "\n" + json.dumps({"node": "n2"}) + "\n")
    write_json(attempt / "nodes/n2.json", {"node": "n2", "started": 1.0, "ranks": [runs]})
    write_json(tmp_path / "inbox/2.json", {"ts": 1.0, "author": "ann", "verb": "stop", "arguments": {}})
    agents, trainer, inbox = FileAgents(tmp_path), FileTrainer(tmp_path), FileInbox(tmp_path)
    for _ in range(2):
        list(agents.heartbeats())
        assert agents.reports("12.00-a0").keys() == {"n2"}
        assert [each.request for each in inbox.requests()] == ["2"]
        assert (trainer.config("12.00-a0"), trainer.points("12.00-a0"), trainer.phases("12.00-a0")) == (None, [], [])
    assert [beat.node for beat in FileAgents(tmp_path).heartbeats()] == ["n2"]
    said = [record.getMessage() for record in caplog.records]
    assert all(any(Path(name).name in line for line in said) for name in broken)
    assert (tmp_path / "inbox/1.refused").exists(), "a folder is never a request"


def test_a_process_that_ends_does_not_wait_for_examinations(tmp_path: Path):
    program = (
        "import threading, sys; from pathlib import Path; from opt_ops.core.values import Checkpoint\n"
        "import opt_ops.runfolder.checkpoints as c\n"
        "began = threading.Event(); c.verify = lambda path: (began.set(), threading.Event().wait())\n"
        "store = c.FileCheckpoints(Path('.'))\n"
        "for step in range(3): store.examine(Checkpoint(run='12.00', step=step, path=f'step-{step}'))\n"
        "assert began.wait(240)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=300, check=False).returncode == 0


def test_a_link_that_is_answered_twice_was_made_by_this_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)  # NFS sends the call again

    monkeypatch.setattr("os.link", twice)
    assert create_json(tmp_path / "once.json", 1)
    assert not create_json(tmp_path / "once.json", 2)
    assert read_json(tmp_path / "once.json") == 1


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_is_created_once_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def none(source: Path, target: Path) -> None:
        raise OSError(number, "no hard links")

    monkeypatch.setattr("os.link", none)
    assert create_json(tmp_path / "once.json", 1)
    assert not create_json(tmp_path / "once.json", 2)
    assert read_json(tmp_path / "once.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["once.json"]
