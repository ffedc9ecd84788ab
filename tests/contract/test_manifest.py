import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from opt_ops.contract import manifest
from opt_ops.contract.manifest import CheckpointError

REPOSITORY = Path(__file__).parents[2]

HEADER = {
    "step": 450,
    "attempt": "12.01-a3",
    "ts": 1.5,
    "layout": {"world": 2, "dp": 2, "tp": 1},
    "data_position": 3600,
    "tokens": 460800,
    "settings_digest": "sha256:00",
    "telemetry": {"num_updates": 450, "loss": None, "finite": False},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = manifest.step_folder(tmp_path, 450)
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"zero" * 1000)
    (path / "__1_0.distcp").write_bytes(b"one!" * 2000)
    (path / ".metadata").write_bytes(b"index")
    _write(path / "optimizer/rank/0.pt", b"adamw")
    manifest.write_rank(path, 0, ["__0_0.distcp", ".metadata", "optimizer/rank/0.pt"])
    manifest.write_rank(path, 1, ["__1_0.distcp"])
    manifest.commit(path, ranks=2, deadline_seconds=1, header=HEADER)
    return path


def test_a_whole_checkpoint_is_accepted_and_says_what_it_is(checkpoint: Path) -> None:
    found = manifest.verify(checkpoint)
    assert (found.step, found.attempt, found.data_position, found.tokens) == (450, "12.01-a3", 3600, 460800)
    assert found.telemetry == HEADER["telemetry"]
    assert {name: file["size"] for name, file in found.files.items()} == {
        "__0_0.distcp": 4000,
        "__1_0.distcp": 8000,
        ".metadata": 5,
        "optimizer/rank/0.pt": 5,
    }


def _flip_a_bit(path: Path) -> None:
    content = bytearray((path / "__1_0.distcp").read_bytes())
    content[4321] ^= 1
    (path / "__1_0.distcp").write_bytes(content)


def _truncate(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", 3999)


def _edit_manifest(path: Path) -> None:
    fields = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(fields | {"step": 451}))


DAMAGES = {
    "no COMMITTED marker": lambda path: (path / "COMMITTED").unlink(),
    "does not match the COMMITTED marker": _edit_manifest,
    "manifest.json is missing": lambda path: (path / "manifest.json").unlink(),
    ".metadata is missing": lambda path: (path / ".metadata").unlink(),
    "__0_0.distcp has 3999 bytes, the manifest says 4000": _truncate,
    "content of __1_0.distcp has changed": _flip_a_bit,
    "unexpected file __2_0.distcp": lambda path: (path / "__2_0.distcp").write_bytes(b"stale"),
    "optimizer/rank/0.pt has 4 bytes, the manifest says 5": lambda path: os.truncate(path / "optimizer/rank/0.pt", 4),
    "optimizer/rank/0.pt is missing": lambda path: shutil.rmtree(path / "optimizer"),
    "unexpected file optimizer/more/0.pt": lambda path: _write(path / "optimizer/more/0.pt", b"stale"),
    "unexpected file optimizer/rank-0000.json": lambda path: _write(path / "optimizer/rank-0000.json", b"{}"),
    "unexpected file optimizer/pipe": lambda path: os.mkfifo(path / "optimizer/pipe"),
    "unexpected file '.x1b.'": lambda path: _write(path / "\x1b]", b""),
}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("why", DAMAGES)
def test_damage_is_refused_with_its_reason(checkpoint: Path, why: str) -> None:
    DAMAGES[why](checkpoint)
    with pytest.raises(CheckpointError, match=why) as refusal:
        manifest.verify(checkpoint)
    assert refusal.value.path == checkpoint


@pytest.mark.parametrize("target", ["outside", "step-00000450/.metadata", "nowhere"])
@pytest.mark.parametrize("name", ["__1_0.distcp", "optimizer/rank", "more"])
def test_a_symbolic_link_is_refused_wherever_it_is_and_leads(checkpoint: Path, name: str, target: str) -> None:
    outside = checkpoint.parent / "outside"
    if (checkpoint / name).exists():
        (checkpoint / name).rename(outside)
    (checkpoint / name).symlink_to(checkpoint.parent / target)
    leads_out = "" if target.startswith("step") else " that leads out of the folder"
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link{leads_out}: a checkpoint holds"):
        manifest.verify(checkpoint)


def test_a_checkpoint_may_be_reached_through_a_link_and_have_empty_folders(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "optimizer/empty/deeper").mkdir(parents=True)
    (tmp_path / "latest").symlink_to(checkpoint)
    assert manifest.verify(tmp_path / "latest") == manifest.verify(checkpoint)


def test_a_link_on_a_nodes_disk_is_damage_of_the_snapshot(tmp_path: Path) -> None:
    path, disk = manifest.snapshot_folder(tmp_path / "run", 450), tmp_path / "disk"
    path.mkdir(parents=True)
    _write(disk / "part/0.pt", b"zero")
    place = {"node": "n1", "host": socket.gethostname(), "folder": str(disk)}
    manifest.write_rank(path, 0, ["part/0.pt"], place=place)
    manifest.commit(path, ranks=1, deadline_seconds=1, header=HEADER)
    assert manifest.verify(path).files["part/0.pt"]["nodes"] == ["n1"]
    (disk / "part").rename(tmp_path / "elsewhere")
    (disk / "part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="part is a symbolic link that leads out"):
        manifest.verify(path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        manifest.verify(tmp_path / "step-00000001")


def test_committed_lists_only_what_bears_the_marker_newest_last(checkpoint: Path) -> None:
    folder = checkpoint.parent
    for step in (1200, 60, 123456789):
        path = manifest.step_folder(folder, step)
        path.mkdir()
        (path / "COMMITTED").touch()
    manifest.step_folder(folder, 9999).mkdir()
    (folder / "step-old").mkdir()
    assert [step for step, _ in manifest.committed(folder)] == [60, 450, 1200, 123456789]
    assert manifest.committed(folder)[1] == (450, checkpoint)
    assert manifest.committed(folder / "missing") == []


def test_without_a_rank_there_is_no_marker(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"zero")
    manifest.write_rank(tmp_path, 0, ["__0_0.distcp"])
    with pytest.raises(TimeoutError, match=r"rank-0001\.json"):
        manifest.commit(tmp_path, ranks=2, deadline_seconds=0.1, header=HEADER)
    assert not (tmp_path / "COMMITTED").exists()


def test_removal_takes_the_marker_first(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        manifest.remove(checkpoint)
    assert manifest.committed(checkpoint.parent) == []
    monkeypatch.undo()
    manifest.remove(checkpoint)
    assert not checkpoint.exists()


def test_the_supervisor_needs_no_torch_to_verify() -> None:
    program = "import sys, opt_ops.contract.manifest; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _begun(folder: Path, **files: bytes) -> Path:
    path = manifest.step_folder(folder, 450)
    for name, content in files.items():
        _write(path / name, content)
    return path


def _not_committed(path: Path, why: str, ranks: int = 1, **header: object) -> None:
    with pytest.raises(CheckpointError, match=why):
        manifest.commit(path, ranks=ranks, deadline_seconds=1, header=HEADER | header)
    assert not (path / "COMMITTED").exists()


def test_two_ranks_may_report_one_file_if_it_is_the_same(tmp_path: Path) -> None:
    path = _begun(tmp_path, config=b"both", weights=b"1")
    manifest.write_rank(path, 0, ["config"])
    _write(path / "config", b"BOTH")
    manifest.write_rank(path, 1, ["config", "weights"])
    _not_committed(path, "two ranks report the file 'config', with different content", ranks=2)
    manifest.write_rank(path, 0, ["config"], state=["config"])
    manifest.commit(path, ranks=2, deadline_seconds=1, header=HEADER)
    assert {name: file.get("state") for name, file in manifest.verify(path).files.items()} == {
        "config": True,
        "weights": None,
    }


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"step": 451}, "the folder says step 450, its manifest step 451"),
        ({"telemetry": {"num_updates": 449}}, "the manifest says step 450, its telemetry step 449"),
        ({"tokens": "many"}, "`tokens` is not a whole number"),
        ({"lr_factors": [[1, "0.5"]]}, "`lr_factors` is not a list of pairs"),
    ],
)
def test_what_a_resume_would_refuse_is_not_committed(tmp_path: Path, header: dict[str, object], why: str) -> None:
    path = _begun(tmp_path, weights=b"1")
    manifest.write_rank(path, 0, ["weights"])
    _not_committed(path, why, **header)


def test_a_file_that_no_rank_reports_is_told_at_the_save_and_not_at_the_resume(tmp_path: Path) -> None:
    path = _begun(tmp_path, weights=b"1")
    manifest.write_rank(path, 0, ["weights"])
    _write(path / "folder/forgotten", b"2")
    _not_committed(path, "unexpected file folder/forgotten")


_COMMIT = """
import itertools, os, pathlib, sys
from opt_ops.contract import manifest
header, calls = eval(sys.argv[2]), itertools.count()
real = {name: getattr(os, name) for name in ("fsync", "replace", "open", "fchmod")}
for at in itertools.count():
    path = manifest.step_folder(pathlib.Path(sys.argv[1]) / str(at), 450)
    (path / "sub" / "deep").mkdir(parents=True)
    (path / "sub" / "deep" / "w.pt").write_bytes(b"weights")
    if (child := os.fork()) == 0:
        def dying(name):
            def call(*args, **kwargs):
                if next(calls) == at:
                    os._exit(9)
                return real[name](*args, **kwargs)
            return call
        for name in real:
            setattr(os, name, dying(name))
        manifest.write_rank(path, 0, ["sub/deep/w.pt"], state=["sub/deep/w.pt"])
        manifest.commit(path, ranks=1, deadline_seconds=0, header=header)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_process_that_dies_at_any_call_of_a_commit_leaves_no_marker_or_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _COMMIT, str(tmp_path), repr(HEADER)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=240)
    tries = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    whole = [bool(manifest.committed(each)) for each in tries]
    assert len(tries) > 15, "calls that open, sync and rename"
    assert whole == sorted(whole), "the marker comes last"
    assert whole[-1]
    for each in tries:
        for _, path in manifest.committed(each):
            assert manifest.verify(path).files["sub/deep/w.pt"]["state"] is True
