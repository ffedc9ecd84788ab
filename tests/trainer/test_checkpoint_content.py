"""``python -m trainer.checkpoint verify``: every mutation of the files is refused, and content that is no state."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from opt_ops.contract import manifest
from opt_ops.contract.manifest import CheckpointError
from tests.trainer.forked import FORKS
from tests.trainer.harness import REPOSITORY, Ranks, finish
from tests.trainer.test_checkpoint import Training
from trainer.checkpoint import mirror
from trainer.checkpoint.content import examine
from trainer.checkpoint.staging import holds_elements


def saves_twice(folder: Path, wrong: str | None = None) -> None:
    """Checkpoints of steps 1 and 2; ``wrong`` is done to the state between."""
    training = Training(folder, 2, 1, url=f"file://{folder}/bucket")
    if wrong == "step":
        training.step()
        training.progress = type(training.progress)()
    for step in (1, 2):
        training.step()
        if step == 2 and wrong == "stale":
            training.checkpointer._staging.copy = lambda: None
        if step == 2 and wrong == "weights":
            training.checkpointer.load_weights(manifest.step_folder(folder, 1))
        if step == 2 and wrong == "nan":
            next(training.model.parameters()).data.to_local()[0] = torch.nan
        training.save()
        training.checkpointer.finish()


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    ranks(2, saves_twice, folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return manifest.step_folder(tmp_path / "copy", 2)


FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "COMMITTED")


def flip(path: Path, name: str) -> None:
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)


def truncate(path: Path, name: str) -> None:
    os.truncate(path / name, (path / name).stat().st_size - 1)


def empty(path: Path, name: str) -> None:
    os.truncate(path / name, 0)


def drop(path: Path, name: str) -> None:
    (path / name).unlink()


def swap_with_the_save_before(path: Path, name: str) -> None:
    shutil.copy(manifest.step_folder(path.parent, 1) / name, path / name)


def duplicate(path: Path, name: str) -> None:
    shutil.copy(path / name, path / f"{name}.1")


def grow(path: Path, name: str) -> None:
    with (path / name).open("ab") as file:
        file.write(b"0")


MUTATIONS: tuple[Callable[[Path, str], None], ...] = (
    *(flip, truncate, empty, drop, swap_with_the_save_before, duplicate, grow),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_every_mutation_of_every_file_is_refused(copy: Path, mutate: Callable[[Path, str], None], name: str) -> None:
    if (mutate, name) == (swap_with_the_save_before, ".metadata"):
        before, after = (manifest.step_folder(copy.parent, step) / name for step in (1, 2))
        if before.read_bytes() == after.read_bytes():
            pytest.skip("the index is the same in both")
    mutate(copy, name)
    with pytest.raises(CheckpointError):
        manifest.verify(copy)


def test_shards_swapped_with_each_other_are_refused(copy: Path) -> None:
    (copy / "__0_0.distcp").rename(copy / "between")
    (copy / "__1_0.distcp").rename(copy / "__0_0.distcp")
    (copy / "between").rename(copy / "__1_0.distcp")
    with pytest.raises(CheckpointError, match=r"__[01]_0.distcp"):
        manifest.verify(copy)


def test_a_whole_checkpoint_under_another_steps_name_is_refused(copy: Path) -> None:
    shutil.copytree(copy, manifest.step_folder(copy.parent, 3))
    with pytest.raises(CheckpointError, match="the folder says step 3, its manifest step 2"):
        manifest.verify(manifest.step_folder(copy.parent, 3))


def test_a_good_one_is_told_with_what_it_was_compared_with(copy: Path) -> None:
    first, second = examine(manifest.step_folder(copy.parent, 1)), examine(copy)
    assert (first.before, second.before) == (None, 1)
    assert not second.unchanged
    assert first.tensors == second.tensors > 50


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("weights", "stale: its weights are those of step 1"),
        ("nan", "embed_tokens.weight holds numbers that are not finite"),
        ("step", "its step is 2, but its optimizer has made 3 updates"),
    ],
)
def test_content_that_is_no_state_of_training_is_refused(ranks: Ranks, tmp_path: Path, wrong: str, why: str) -> None:
    folder = tmp_path / "wrong"
    ranks(2, saves_twice, folder, wrong)
    with pytest.raises(CheckpointError, match=why):
        examine(manifest.step_folder(folder, 2))


def test_a_stale_save_is_not_committed(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, saves_twice, tmp_path, "stale")
    assert [step for step, _ in manifest.committed(tmp_path)] == [1]


def verify(*paths: Path | str) -> subprocess.CompletedProcess[str]:
    command = FORKS.run("trainer.checkpoint", ["verify", *map(str, paths)], REPOSITORY, os.environ)
    return finish([command])[0]


def test_the_command_says_what_is_wrong_by_word_and_exit_code(copy: Path) -> None:
    bucket = f"file://{copy.parent}/bucket/step-00000002"
    done = verify(copy, bucket)
    assert done.returncode == 0, done.stderr
    here, there = done.stdout.splitlines()
    assert here.startswith(f"{copy}: step 2, 3 files, ")
    assert here.endswith("whole and finite; compared with step 1")
    assert there.endswith("whole and finite; no earlier save to compare with")
    flip(copy, "__1_0.distcp")
    done = verify(copy, manifest.step_folder(copy.parent, 1))
    assert done.returncode == 65
    assert "refused: " in done.stderr
    assert "the content of __1_0.distcp has changed" in done.stderr


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mutate", [drop, truncate, flip], ids=lambda mutate: mutate.__name__)
def test_a_torn_upload_is_not_fetched(
    copy: Path, tmp_path: Path, mutate: Callable[[Path, str], None], name: str
) -> None:
    mutate(copy.parent / "bucket" / "step-00000002", name)
    with pytest.raises(CheckpointError):
        mirror.fetch(f"file://{copy.parent}/bucket/step-00000002", tmp_path / "here")
    assert manifest.committed(tmp_path / "here") == []


def test_what_was_fetched_is_a_checkpoint(copy: Path, tmp_path: Path) -> None:
    path = mirror.fetch(f"file://{copy.parent}/bucket/step-00000002", tmp_path / "here")
    assert manifest.verify(path) == manifest.verify(copy)


def test_an_upload_is_not_finished_by_reports_that_a_torn_one_has_left(copy: Path) -> None:
    bucket = copy.parent / "bucket" / copy.name
    flip(bucket, "__1_0.distcp")
    flip(bucket, "rank-0001.json")
    with pytest.raises(TimeoutError, match=r"no rank-0001\.json of this save"):
        mirror.send(copy, f"file://{bucket.parent}", 0, 2, deadline_seconds=0)
    assert not (bucket / manifest.MARKER).exists()
    mirror.send(copy, f"file://{bucket.parent}", 1, 2, deadline_seconds=0)
    mirror.send(copy, f"file://{bucket.parent}", 0, 2, deadline_seconds=0)
    assert manifest.verify(bucket) == manifest.verify(copy)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../outside", "has the part '..'"),
        ("/tmp/outside", "is absolute"),
        ("sub/../../outside", "has the part '..'"),
        ("..", "has the part '..'"),
    ],
)
def test_a_manifest_that_leads_out_of_its_folder_is_refused(copy: Path, tmp_path: Path, name: str, why: str) -> None:
    bucket = copy.parent / "bucket" / copy.name
    fields = json.loads((bucket / manifest.MANIFEST).read_text())
    fields["files"][name] = fields["files"].pop("__1_0.distcp")
    text = json.dumps(fields)
    (bucket / manifest.MANIFEST).write_text(text)
    (bucket / manifest.MARKER).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    with pytest.raises(CheckpointError, match=why):
        manifest.read(bucket)
    with pytest.raises(CheckpointError, match=why):
        mirror.fetch(f"file://{bucket}", tmp_path / "here" / "deep")
    assert not (tmp_path / "here" / "outside").exists()


FOREIGN = {
    "config.json": b"{}",
    "pytorch_model_fsdp_0/__0_0.distcp": b"weights",
    "pytorch_model_fsdp_0/.metadata": b"index",
    "optimizer_0/deep/0.pt": b"moments",
}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A checkpoint as another trainer may write it, with subfolders."""
    path = manifest.step_folder(tmp_path / "foreign", 3)
    for name, content in FOREIGN.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    manifest.write_rank(path, 0, FOREIGN, state=["optimizer_0/deep/0.pt"])
    fields = {"step": 3, "attempt": "1.00-a1", "ts": 0.0, "layout": {}, "data_position": 0, "tokens": 0}
    header = fields | {"settings_digest": "", "telemetry": {"num_updates": 3}}
    manifest.commit(path, ranks=1, deadline_seconds=0, header=header)
    return path


def test_a_checkpoint_with_subfolders_is_sent_fetched_and_verified(foreign: Path, tmp_path: Path) -> None:
    mirror.send(foreign, f"file://{tmp_path}/bucket", 0, 1, deadline_seconds=0)
    path = mirror.fetch(f"file://{tmp_path}/bucket/{foreign.name}", tmp_path / "here")
    assert {name: (path / name).read_bytes() for name in FOREIGN} == FOREIGN
    assert examine(path).manifest == manifest.verify(foreign)
    assert examine(path).tensors is None, "they are not read: the index is not where this trainer has it"
    done = verify(path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "every byte is as it was saved; its tensors were not read: another trainer wrote them" in done.stdout


def test_a_torn_upload_of_a_subfolder_is_not_fetched(foreign: Path, tmp_path: Path) -> None:
    mirror.send(foreign, f"file://{tmp_path}/bucket", 0, 1, deadline_seconds=0)
    drop(tmp_path / "bucket" / foreign.name, "optimizer_0/deep/0.pt")
    with pytest.raises(CheckpointError, match=r"optimizer_0/deep/0\.pt is missing: the upload was never finished"):
        mirror.fetch(f"file://{tmp_path}/bucket/{foreign.name}", tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_files_in_subfolders_are_copied_with_their_folders(foreign: Path, tmp_path: Path) -> None:
    mirror.copy_durably(foreign, tmp_path / "copy", FOREIGN)
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in FOREIGN} == FOREIGN


def test_every_shard_with_elements_is_marked_as_state_and_nothing_else(copy: Path) -> None:
    files = manifest.read(copy).files
    assert {name for name, file in files.items() if file.get("state")} == {"__0_0.distcp", "__1_0.distcp"}
    assert ".metadata" in files


@pytest.mark.parametrize(("sizes", "marked"), [([], False), ([0], False), ([0, 3], True)])
def test_a_rank_that_writes_empty_parts_only_marks_nothing(sizes: list[int], marked: bool) -> None:
    planner = DefaultSavePlanner()
    planner.set_up_planner({f"t{i}": torch.ones(size) for i, size in enumerate(sizes)}, is_coordinator=True)
    assert holds_elements(planner.create_local_plan()) == marked


def load(path: Path) -> None:
    Training(path.parent, 1, 1).load(path)


def test_a_checkpoint_of_another_trainer_is_not_resumed(ranks: Ranks, foreign: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no index \.metadata: this trainer did not write it"):
        ranks(1, load, foreign)


class _Call:
    """What an index must not be able to do."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._path),)


def _agree(path: Path, **changed: object) -> None:
    """Have manifest and marker vouch for the files of ``path`` as they are now."""
    fields = json.loads((path / manifest.MANIFEST).read_text()) | changed
    for name, file in fields["files"].items():
        if (path / name).exists():
            content = (path / name).read_bytes()
            file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(fields)
    (path / manifest.MANIFEST).write_text(text)
    (path / manifest.MARKER).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


def test_looking_at_a_checkpoint_runs_nothing_that_is_in_it(copy: Path, tmp_path: Path) -> None:
    (copy / ".metadata").write_bytes(pickle.dumps(_Call(tmp_path / "called")))
    _agree(copy)
    with pytest.raises(CheckpointError, match="it calls"):
        examine(copy)
    assert not (tmp_path / "called").exists()


def test_a_save_before_that_lies_on_other_hosts_refuses_nothing(copy: Path) -> None:
    before = manifest.step_folder(copy.parent, 1)
    files = json.loads((before / manifest.MANIFEST).read_text())["files"]
    snapshot = manifest.snapshot_folder(copy.parent, 1)
    snapshot.mkdir()
    for name in (manifest.MANIFEST, manifest.MARKER):
        shutil.copy(before / name, snapshot)
    _agree(
        snapshot,
        nodes={"n9": {"host": "another-host", "folder": "/disk/1.00/snapshot-00000001"}},
        files={name: file | {"nodes": ["n9"]} for name, file in files.items()},
    )
    assert examine(copy).before == 1, "the durable one of the same step can be compared with"
    shutil.rmtree(before)
    assert examine(copy).before is None
