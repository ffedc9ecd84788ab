"""Which names the files of a checkpoint may have: refused alike when they are written and when they are read."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ops.contract import manifest
from opt_ops.contract.checkpoint.file_names import LONGEST, require_names
from opt_ops.contract.manifest import CheckpointError
from tests.contract.test_manifest import HEADER

REFUSED: list[tuple[str, Sequence[str], str]] = [
    ("empty", [""], "is empty"),
    ("absolute", ["/etc/passwd"], "is absolute"),
    ("up", ["../outside"], "has the part '..'"),
    ("up inside", ["a/../b"], "has the part '..'"),
    ("up alone", [".."], "has the part '..'"),
    ("here", ["./a"], "has the part '.'"),
    ("here inside", ["a/./b"], "has the part '.'"),
    ("two slashes", ["a//b"], "has an empty part"),
    ("slash at the end", ["a/"], "has an empty part"),
    ("backslash", ["a\\b"], "holds a backslash"),
    ("nul", ["a\0b"], "holds a NUL"),
    ("line feed", ["a\nb"], "holds a line break"),
    ("line feed at the end", ["a\n"], "holds a line break"),
    ("carriage return", ["a/\rb"], "holds a line break"),
    ("line separator", ["a\u2028b"], "holds a line break"),
    ("too long", ["a/" * (LONGEST // 2) + "b"], "has 1,025 bytes in UTF-8 (limit 1,024)"),
    ("too long in bytes", ["é" * (LONGEST // 2) + "b"], "has 1,025 bytes in UTF-8 (limit 1,024)"),
    ("not Unicode", ["a\udc80"], "holds characters that UTF-8 cannot encode"),
    ("marker", ["COMMITTED"], "has a part called COMMITTED"),
    ("marker in a folder", ["a/COMMITTED"], "has a part called COMMITTED"),
    ("marker as a folder", ["a/COMMITTED/b"], "has a part called COMMITTED"),
    ("marker, ignoring case", ["Committed"], "has a part called COMMITTED"),
    ("manifest", ["manifest.json"], "begins with manifest.json"),
    ("manifest as a folder", ["Manifest.json/a"], "begins with manifest.json"),
    ("report", ["rank-0000.json"], "begins with the name of a rank's report"),
    ("report of many ranks", ["rank-123456.json"], "begins with the name of a rank's report"),
    ("case", ["a/Model.pt", "a/model.pt"], "differ by case only"),
    ("case of a folder", ["A/x", "a/y"], "differ by case only"),
    ("case of a file and a folder", ["A", "a/b"], "differ by case only"),
    ("file and folder", ["a", "a/b"], "the name 'a' is a file and also the folder of 'a/b'"),
    ("file and folder, deeper", ["x/a/b/c", "x/a"], "the name 'x/a' is a file and also the folder of 'x/a/b/c'"),
]
ACCEPTED = [
    "a",
    ".metadata",
    "sub/manifest.json",
    "sub/rank-0000.json",
    "optimizer_0/__0_0.distcp",
    "global_step12/mp_rank_00_model_states.pt",
    "COMMITTED.txt",
    "rank-0000.json.txt",
    "…/with space/ü 'quoted' \"twice\".bin",
    "...",
    f"{'a' * 199}/" * 5 + "b" * (LONGEST - 1000),
]


def read_back(path: Path, names: Sequence[str]) -> None:
    """Read a manifest with these names that has a right marker, as a trainer of somebody else may write it."""
    path.mkdir(exist_ok=True)
    entry = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    text = json.dumps({"v": 1} | HEADER | {"files": dict.fromkeys(names, entry)})
    (path / "manifest.json").write_text(text)
    (path / "COMMITTED").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    manifest.read(path)


@pytest.mark.parametrize(("names", "why"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_a_bad_name_is_refused_when_written_and_when_read(tmp_path: Path, names: Sequence[str], why: str) -> None:
    path = manifest.step_folder(tmp_path, 450)
    path.mkdir()
    with pytest.raises(CheckpointError) as written:
        manifest.write_rank(path, 0, names)
    assert list(path.iterdir()) == []
    with pytest.raises(CheckpointError) as found:
        read_back(path, names)
    for refusal in (written.value, found.value):
        assert why in refusal.why
        assert refusal.why.isprintable()
        assert len(refusal.why.encode()) < 250


@pytest.mark.parametrize("name", ACCEPTED, ids=lambda name: name[:20])
def test_a_good_name_is_written_read_and_removed(tmp_path: Path, name: str) -> None:
    path = manifest.step_folder(tmp_path, 450)
    (path / name).parent.mkdir(parents=True)
    (path / name).write_bytes(b"content")
    manifest.write_rank(path, 0, [name])
    manifest.commit(path, ranks=1, deadline_seconds=0, header=HEADER)
    assert set(manifest.verify(path).files) == {name}
    manifest.remove(path)
    assert list(tmp_path.iterdir()) == []


def test_names_of_two_ranks_are_compared_at_the_commit(tmp_path: Path) -> None:
    path = manifest.step_folder(tmp_path, 450)
    path.mkdir()
    for rank, name in enumerate(("Model.pt", "model.pt")):
        (path / name).write_bytes(b"content")
        manifest.write_rank(path, rank, [name])
    with pytest.raises(CheckpointError, match=r"the names 'Model.pt' and 'model.pt' differ by case only"):
        manifest.commit(path, ranks=2, deadline_seconds=0, header=HEADER)
    assert manifest.committed(tmp_path) == []


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["link", "link/file", "sub/link/file"])
def test_a_name_that_goes_through_a_link_is_not_written(tmp_path: Path, name: str, inside: bool) -> None:
    path = manifest.step_folder(tmp_path / "checkpoints", 450)
    target = (path if inside else tmp_path) / "target"
    target.mkdir(parents=True)
    (target / "file").write_bytes(b"content")
    link = path / name.removesuffix("/file")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target / "file" if name == "link" else target)
    with pytest.raises(CheckpointError, match=r"is refused: (sub/)?link is a symbolic link"):
        manifest.write_rank(path, 0, [name])


def test_a_name_must_be_text(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not text"):
        manifest.write_rank(tmp_path, 0, [Path("a")])  # pyright: ignore[reportArgumentType]


PARTS = st.sampled_from(
    ["", ".", "..", "a", "A", "b.pt", "ſ", "s", "COMMITTED", "manifest.json", "rank-0000.json", "\\", "é"]
)
NAMES = st.one_of(st.lists(PARTS, max_size=4).map("/".join), st.text(max_size=8))


@settings(max_examples=150)
@given(names=st.lists(NAMES, max_size=4))
def test_names_that_are_accepted_are_different_files_inside_the_folder(names: list[str]) -> None:
    """The rules, written a second time from what they are for."""
    try:
        require_names(Path("folder"), names)
    except CheckpointError:
        return
    folder = PurePosixPath("/folder")
    paths = {name: folder / name for name in names}
    for name, path in paths.items():
        assert str(path) == f"/folder/{name}", "no part vanishes, and the name is not absolute"
        assert ".." not in path.parts
        assert name.encode().decode() == name
        assert "\n" not in name
        assert path.parts[2].lower() not in ("manifest.json", "rank-0000.json")
        assert "committed" not in {part.lower() for part in path.parts}
        assert not any(other in path.parents for other in paths.values()), "no file is a folder"
    assert len({name.lower() for name in paths}) == len(paths) == len({name.upper() for name in paths})
