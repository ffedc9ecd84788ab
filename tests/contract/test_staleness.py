"""A save that holds the state of the save before is refused, in any format and of any size."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from opt_ops.contract import manifest
from opt_ops.contract.manifest import CheckpointError
from opt_ops.core.values import Checkpoint
from opt_ops.runfolder.checkpoints import problem
from tests.contract.test_manifest import HEADER

BIG = 1000
Save = tuple[Mapping[str, bytes], set[str]]  # the content of each file, and the names that are marked


def save(folder: Path, step: int, saved: Save, kind: str = "step", **telemetry: Any) -> Path:
    files, state = saved
    path = folder / f"{kind}-{step:08d}"
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    manifest.write_rank(path, 0, files, state=state)
    header = HEADER | {"step": step, "telemetry": {"num_updates": step, **telemetry}}
    manifest.commit(path, ranks=1, deadline_seconds=0, header=header)
    return path


def files(fill: bytes, **changed: bytes) -> dict[str, bytes]:
    """A save as other trainers write it, with all that is the same in every save."""
    found = {
        "config.json": b"{}",
        "frozen/model-00001.safetensors": b"base" * BIG,
        "model/model-00002.safetensors": b"lora" * BIG + fill,
        "optimizer/0.pt": fill,
        "rng_state_0.pth": b"nothing drawn",
    }
    return found | {name.replace("__", "/"): content for name, content in changed.items()}


STATE = {"model/model-00002.safetensors", "optimizer/0.pt"}
OPTIMIZER = "optimizer/0.pt"

STALE: dict[str, tuple[Save, Save, str]] = {
    "all of it": ((files(b"1"), STATE), (files(b"1"), STATE), "model/model-00002.safetensors holds the same as in"),
    "one small file": (
        (files(b"1"), STATE),
        (files(b"2") | {OPTIMIZER: b"1"}, STATE),
        "optimizer/0.pt holds the same as in",
    ),
    "an empty file": (
        (files(b"1") | {OPTIMIZER: b""}, STATE),
        (files(b"2") | {OPTIMIZER: b""}, STATE),
        "optimizer/0.pt holds the same as in",
    ),
    "the same content under another name": (
        (files(b"1"), STATE),
        (files(b"2") | {"optimizer/1.pt": b"1"}, STATE | {"optimizer/1.pt"}),
        "optimizer/1.pt holds the same as optimizer/0.pt in",
    ),
    "the save before has no marks": ((files(b"1"), set()), (files(b"1"), STATE), "safetensors holds the same as in"),
    "no save has marks, large shards": (
        ({"__0_0.distcp": b"1" * BIG}, set()),
        ({"__0_0.distcp": b"1" * BIG, "__1_0.distcp": b"2" * BIG}, set()),
        "__0_0.distcp holds the same as in",
    ),
    "only the save before has marks, large shards": (
        ({"__0_0.distcp": b"1" * BIG}, {"__0_0.distcp"}),
        ({"__0_0.distcp": b"1" * BIG}, set()),
        "__0_0.distcp holds the same as in",
    ),
    "shards with marks, a small one": (
        ({"__0_0.distcp": b"1" * BIG, "__1_0.distcp": b"1"}, {"__0_0.distcp", "__1_0.distcp"}),
        ({"__0_0.distcp": b"2" * BIG, "__1_0.distcp": b"1"}, {"__0_0.distcp", "__1_0.distcp"}),
        "__1_0.distcp holds the same as in",
    ),
}
FRESH: dict[str, tuple[Save, Save]] = {
    "all state is new": ((files(b"1"), STATE), (files(b"2"), STATE)),
    "a state file equals a file that is no state": (
        (files(b"1"), STATE),
        (files(b"2") | {OPTIMIZER: b"{}"}, STATE),
    ),
    "no marks, no shards": ((files(b"1"), set()), (files(b"1"), set())),
    "no marks, a small shard": (
        ({"__0_0.distcp": b"1" * BIG, "__1_0.distcp": b"empty"}, set()),
        ({"__0_0.distcp": b"2" * BIG, "__1_0.distcp": b"empty"}, set()),
    ),
    "marks, but not on this shard": (
        ({"__0_0.distcp": b"1" * BIG, "__1_0.distcp": b"same" * BIG}, {"__0_0.distcp"}),
        ({"__0_0.distcp": b"2" * BIG, "__1_0.distcp": b"same" * BIG}, {"__0_0.distcp"}),
    ),
    "two state files of one save are equal": (
        (files(b"1"), STATE),
        (files(b"2") | {"optimizer/1.pt": b"2"}, STATE | {"optimizer/1.pt"}),
    ),
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_save_is_not_committed(tmp_path: Path, case: str) -> None:
    before, after, why = STALE[case]
    save(tmp_path, 100, before)
    with pytest.raises(CheckpointError) as refusal:
        save(tmp_path, 110, after)
    assert refusal.value.why.startswith("stale: ")
    assert f"{why} step-00000100, 10 steps before" in refusal.value.why
    assert [step for step, _ in manifest.committed(tmp_path)] == [100]


@pytest.mark.parametrize("case", STALE)
def test_a_stale_save_that_somebody_committed_is_refused_by_all_readers(tmp_path: Path, case: str) -> None:
    before, after, why = STALE[case]
    path = save(tmp_path / "alone", 110, after)
    save(tmp_path, 100, before)
    path = path.rename(tmp_path / path.name)
    for look in (manifest.read, manifest.verify):
        with pytest.raises(CheckpointError, match=f"stale: .*{why}"):
            look(path)
    assert why in problem(Checkpoint(run="12.00", step=110, path=str(path)))


@pytest.mark.parametrize("case", FRESH)
def test_what_does_not_change_with_training_is_not_stale(tmp_path: Path, case: str) -> None:
    before, after = FRESH[case]
    save(tmp_path, 100, before)
    manifest.verify(save(tmp_path, 110, after))


@pytest.mark.parametrize(("skipped", "is_stale"), [(13, False), (12, True)])
def test_without_an_applied_update_the_state_is_the_same(tmp_path: Path, skipped: int, is_stale: bool) -> None:
    save(tmp_path, 100, (files(b"1"), STATE), skipped=3)
    if is_stale:
        with pytest.raises(CheckpointError, match="stale"):
            save(tmp_path, 110, (files(b"1"), STATE), skipped=skipped)
    else:
        manifest.verify(save(tmp_path, 110, (files(b"1"), STATE), skipped=skipped))


def test_only_the_save_before_is_looked_at(tmp_path: Path) -> None:
    for step, fill in ((90, b"0"), (100, b"1"), (110, b"0")):
        manifest.verify(save(tmp_path, step, (files(fill), STATE)))


def test_a_damaged_save_before_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 90, (files(b"1"), STATE))
    (save(tmp_path, 100, (files(b"2"), STATE)) / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="in step-00000090, 20 steps before"):
        save(tmp_path, 110, (files(b"1"), STATE))


def test_marks_are_kept_by_a_copy(tmp_path: Path) -> None:
    first, second = save(tmp_path / "first", 100, (files(b"1"), STATE)), manifest.step_folder(tmp_path, 100)
    shutil.copytree(first, second)
    reported = manifest.written_by(second, 0)
    manifest.write_rank(second, 0, reported, expected=reported)
    assert {name for name, file in manifest.written_by(second, 0).items() if file.get("state")} == STATE


def test_state_must_be_among_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    with pytest.raises(CheckpointError, match="'b' is named as state, but not as a file of rank 3"):
        manifest.write_rank(tmp_path, 3, ["a"], state=["a", "b"])


@pytest.mark.parametrize("mark", ["true", 1, None, [], "", 0])
def test_a_mark_that_is_no_boolean_is_refused(tmp_path: Path, mark: Any) -> None:
    path = save(tmp_path, 100, (files(b"1"), STATE))
    fields = json.loads((path / "manifest.json").read_text())
    fields["files"][OPTIMIZER]["state"] = mark
    text = json.dumps(fields)
    (path / "manifest.json").write_text(text)
    (path / "COMMITTED").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    with pytest.raises(CheckpointError, match=r"`files\.optimizer/0\.pt\.state` is not true or false"):
        manifest.read(path)
