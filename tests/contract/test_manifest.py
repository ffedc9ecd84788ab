import json
import os
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
    manifest.write_rank(path, 0, ["__0_0.distcp", ".metadata"])
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
    }


def test_a_link_that_leads_out_of_the_folder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (checkpoint / "__1_0.distcp").rename(outside)
    (checkpoint / "__1_0.distcp").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        manifest.verify(checkpoint)


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
}


@pytest.mark.parametrize("why", DAMAGES)
def test_damage_is_refused_with_its_reason(checkpoint: Path, why: str) -> None:
    DAMAGES[why](checkpoint)
    with pytest.raises(CheckpointError, match=why) as refusal:
        manifest.verify(checkpoint)
    assert refusal.value.path == checkpoint


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

    monkeypatch.setattr(manifest.shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        manifest.remove(checkpoint)
    assert manifest.committed(checkpoint.parent) == []


def test_the_supervisor_needs_no_torch_to_verify() -> None:
    program = "import sys, opt_ops.contract.manifest; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
