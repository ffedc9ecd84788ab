"""Snapshots: on two nodes' disks each, so that one lost node loses none. Here, nodes are folders."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.contract import manifest
from opt_ops.contract.files import write_durably
from opt_ops.contract.manifest import CheckpointError
from tests.trainer.harness import Ranks
from tests.trainer.test_checkpoint import LAST, SAVED, Training
from trainer.checkpoint import Retention, transfer
from trainer.checkpoint.retention import EVERYTHING, ORIGIN, SavedCheckpoint, expired, sweep, thin
from trainer.checkpoint.schedule import SaveSchedule
from trainer.checkpoint.transfer import Transfer


def on_nodes(root: Path, nodes: list[str], dp: int, tp: int = 1, **more: Any) -> Training:
    """Each rank on the node that ``nodes`` says."""
    node = nodes[int(os.environ["RANK"])]
    folder = root / "1.00" / "checkpoints"
    return Training(folder, dp, tp, node=node, disk=root / "disks" / node, **more)


def snapshot_and_go_on(root: Path, nodes: list[str], dp: int, tp: int, durable: bool, url: str) -> list[float]:
    training = on_nodes(root, nodes, dp, tp, url=url)
    losses = [training.step() for _ in range(SAVED)]
    training.save(durable=durable)
    losses += [training.step() for _ in range(LAST - SAVED)]
    assert training.checkpointer.finish(), training.checkpointer.take_error()
    return losses[SAVED:]


def resume(root: Path, nodes: list[str], dp: int, tp: int) -> list[float] | str:
    training = on_nodes(root, nodes, dp, tp)
    try:
        training.load(snapshot(root))
    except CheckpointError as error:
        return str(error)
    return [training.step() for _ in range(LAST - SAVED)]


def snapshot(root: Path) -> Path:
    return manifest.snapshot_folder(root / "1.00" / "checkpoints", SAVED)


def on_disk(root: Path, node: str) -> Path:
    return root / "disks" / node / "1.00" / snapshot(root).name


@pytest.fixture(scope="module")
def made(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    root = tmp_path_factory.mktemp("three")
    url = f"file://{root}/bucket"
    return root, ranks(3, snapshot_and_go_on, root, ["n1", "n2", "n3"], 3, 1, True, url)[0]


@pytest.fixture
def root(made: tuple[Path, list[float]], tmp_path: Path) -> Path:
    """A copy to damage: the manifest names folders, so it takes the place of the original's."""
    original, _ = made
    shutil.copytree(original, tmp_path / "root")
    for path in [*(tmp_path / "root").rglob("manifest.json")]:
        text = path.read_text().replace(str(original), str(tmp_path / "root"))
        path.write_text(text)
        write_durably(path.with_name("COMMITTED"), _sha256(text) + "\n")
    return tmp_path / "root"


def _sha256(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def test_each_file_is_on_two_nodes_and_verified(made: tuple[Path, list[float]]) -> None:
    root, _ = made
    found = manifest.verify(snapshot(root))
    assert {name: file["nodes"] for name, file in found.files.items()} == {
        ".metadata": ["n1", "n2"],
        "__0_0.distcp": ["n1", "n2"],
        "__1_0.distcp": ["n2", "n3"],
        "__2_0.distcp": ["n3", "n1"],
    }
    assert not [*snapshot(root).glob("*.distcp")], "the shards of a snapshot are on the shared file system"


def test_a_durable_one_is_copied_from_it_and_on_to_a_second_place(made: tuple[Path, list[float]]) -> None:
    root, _ = made
    durable = manifest.verify(manifest.step_folder(root / "1.00" / "checkpoints", SAVED))
    bucket = manifest.verify(root / "bucket" / f"step-{SAVED:08d}")
    assert durable == bucket
    assert not durable.nodes
    assert durable.files["__1_0.distcp"]["sha256"] == manifest.verify(snapshot(root)).files["__1_0.distcp"]["sha256"]
    assert not [*root.glob("disks/*/*/copying-*")]


@pytest.mark.parametrize(
    ("nodes", "dp", "tp"),
    [
        (["n1", "n2", "n3"], 3, 1),
        (["n3", "n1", "n2"], 3, 1),
        (["n1", "n3", "spare"], 3, 1),
        (["n2", "n3"], 2, 1),
        (["n1", "n1", "n3", "n3"], 2, 2),
    ],
)
def test_training_goes_on_from_it_on_other_nodes_and_layouts(
    ranks: Ranks, made: tuple[Path, list[float]], root: Path, nodes: list[str], dp: int, tp: int
) -> None:
    for lost in {"n1", "n2", "n3"} - {*nodes}:
        shutil.rmtree(root / "disks" / lost)
    for losses in ranks(len(nodes), resume, root, nodes, dp, tp):
        exactly = (dp, tp) == (3, 1)
        assert losses == (made[1] if exactly else pytest.approx(made[1], rel=1e-5))


def test_a_damaged_copy_is_made_up_for_by_the_other(ranks: Ranks, made: tuple[Path, list[float]], root: Path) -> None:
    for node, name in (("n1", "__0_0.distcp"), ("n2", "__1_0.distcp"), ("n3", "__2_0.distcp")):
        path = on_disk(root, node) / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    manifest.verify(snapshot(root))
    assert ranks(3, resume, root, ["n1", "n2", "n3"], 3, 1) == [made[1]] * 3


def test_two_lost_neighbours_are_one_too_many(ranks: Ranks, root: Path) -> None:
    for lost in ("n2", "n3"):
        shutil.rmtree(root / "disks" / lost)
    with pytest.raises(CheckpointError, match=r"__1_0.distcp is missing in .*n2.*; __1_0.distcp is missing in .*n3"):
        manifest.verify(snapshot(root))
    for told in ranks(2, resume, root, ["n1", "n4"], 2, 1):
        assert told.endswith("__1_0.distcp is on n2 and n3: this job has no good copy of it")


def test_a_snapshot_that_is_not_durable_stays_on_the_nodes(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, snapshot_and_go_on, tmp_path, ["n1", "n2"], 2, 1, False, f"file://{tmp_path}/bucket")
    assert not (tmp_path / "bucket").exists()
    assert manifest.committed(tmp_path / "1.00" / "checkpoints") == []


def test_one_node_alone_has_snapshots_without_a_peer(ranks: Ranks, tmp_path: Path) -> None:
    losses = ranks(2, snapshot_and_go_on, tmp_path, ["n1", "n1"], 2, 1, False, "")[0]
    assert {tuple(file["nodes"]) for file in manifest.verify(snapshot(tmp_path)).files.values()} == {("n1",)}
    assert manifest.committed(tmp_path / "1.00" / "checkpoints") == []
    assert ranks(2, resume, tmp_path, ["n1", "n1"], 2, 1) == [losses] * 2


def saves_while_the_peers_disk_is_full(root: Path) -> list[bool]:
    training = on_nodes(root, ["n1", "n2"], 2)
    training.step()
    (root / "disks").mkdir(exist_ok=True)
    blocked = root / "disks" / "n2"
    if training.layout.rank == 1:
        blocked.write_text("a file where a disk should be")
    import torch.distributed as dist

    dist.barrier()
    training.save(durable=False)
    outcomes = [training.checkpointer.wait()]
    if training.layout.rank == 1:
        blocked.unlink()
    dist.barrier()
    training.step()
    training.save(durable=False)
    return [*outcomes, training.checkpointer.wait()]


def test_a_node_without_a_disk_costs_the_snapshot_and_no_more(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, saves_while_the_peers_disk_is_full, tmp_path) == [[False, True]] * 2
    assert [step for step, _ in manifest.committed(tmp_path / "1.00" / "checkpoints", "snapshot")] == [2]


def saves_where_something_is_in_the_way(root: Path, obstacle: str, durable: bool) -> tuple[bool, bool, str | None]:
    training = on_nodes(root, ["n1", "n2"], 2)
    if training.layout.rank == 0:
        (root / obstacle).mkdir(parents=True)
    training.step()
    if training.layout.rank == 0 and durable:
        manifest.step_folder(root / "1.00" / "checkpoints", 1).write_text("a file where rank 0 needs a folder")
    training.save(durable=durable)
    return training.checkpointer.wait(), training.checkpointer.finish(), training.checkpointer.take_error()


@pytest.mark.parametrize(
    ("obstacle", "durable", "why"),
    [
        (f"disks/n1/0.99/snapshot-00000001/{ORIGIN}", False, "rank 0: [Errno 21] Is a directory"),  # in a note's place
        ("1.00/checkpoints", True, "[Errno 20] Not a directory"),
    ],
)
def test_what_fails_after_a_snapshot_was_committed_does_not_take_it_away(
    ranks: Ranks, tmp_path: Path, obstacle: str, durable: bool, why: str
) -> None:
    for rank, (saved, finished, told) in enumerate(
        ranks(2, saves_where_something_is_in_the_way, tmp_path, obstacle, durable)
    ):
        assert saved
        assert finished != durable, "the last durable one is not there"
        assert told is not None
        assert told.startswith(why), rank
    ((_, path),) = manifest.committed(tmp_path / "1.00" / "checkpoints", "snapshot")
    assert manifest.verify(path).step == 1


def saves_many(root: Path, pinned: int) -> None:
    rule = Retention(newest=2)
    training = on_nodes(root, ["n1", "n2"], 2, snapshots=rule, durable=rule)
    for step in range(1, 8):
        training.step()
        training.save(durable=step % 2 == 0)
        assert training.checkpointer.finish()
        if step == pinned and training.layout.rank == 0:
            manifest.pin(manifest.snapshot_folder(root / "1.00" / "checkpoints", step))
            manifest.pin(manifest.step_folder(root / "1.00" / "checkpoints", step))


def test_what_is_kept_is_told_by_the_real_names(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, saves_many, tmp_path, 2)
    folder = tmp_path / "1.00" / "checkpoints"
    assert [step for step, _ in manifest.committed(folder, "snapshot")] == [2, 6, 7]
    assert [step for step, _ in manifest.committed(folder)] == [2, 4, 6]
    for tier in ("step", "snapshot"):
        for _, path in manifest.committed(folder, tier):
            manifest.verify(path)
    disk = tmp_path / "disks" / "n1"
    sweep(disk, folder, Retention(newest=2, seconds=1e6), visible_after_seconds=0)
    assert sorted(path.name for path in (disk / "1.00").iterdir()) == [f"snapshot-{step:08d}" for step in (2, 6, 7)]


def test_shards_of_earlier_runs_go_with_age_and_pinned_ones_stay(root: Path) -> None:
    disk, now = root / "disks" / "n1", root / "1.01" / "checkpoints"
    sweep(disk, now, Retention(newest=2, seconds=1e6), visible_after_seconds=0)
    assert on_disk(root, "n1").exists()
    origin = on_disk(root, "n1") / ORIGIN
    origin.write_text(f"{snapshot(root)}\n")
    manifest.pin(snapshot(root))
    sweep(disk, now, Retention(newest=2, seconds=-1), visible_after_seconds=0)
    assert snapshot(root).exists()
    snapshot(root).with_name(f"{snapshot(root).name}.pinned").unlink()
    sweep(disk, now, Retention(newest=2, seconds=-1), visible_after_seconds=0)
    assert not snapshot(root).exists()
    assert not on_disk(root, "n1").exists()
    assert on_disk(root, "n2").exists(), "another node's disk is that node's business"


def test_what_a_dead_attempt_left_unfinished_goes_once_nobody_has_written_to_it_for_long(root: Path) -> None:
    folder, disk = root / "1.00" / "checkpoints", root / "disks" / "n1"
    torn = manifest.step_folder(folder, SAVED + 1)
    held = disk / "0.99" / "copying-00000001"
    part = "optimizer/__0_0.distcp"
    for path in (torn, held):
        (path / "optimizer").mkdir(parents=True)
        (path / part).write_bytes(b"part of it")
    before = sorted(manifest.committed(folder) + manifest.committed(folder, "snapshot"))

    def tidy() -> list[bool]:
        thin(folder, "step", EVERYTHING)
        sweep(disk, folder, EVERYTHING, visible_after_seconds=0)
        return [torn.exists(), held.exists()]

    assert tidy() == [True, True], "somebody may be at it"
    for path in (torn, held):
        for old in (path, path / "optimizer"):
            os.utime(old, (0, 0))
    assert tidy() == [True, True], "a file in it is new"
    for path in (torn, held):
        os.utime(path / part, (0, 0))
    for path in (folder / f"step-{SAVED:08d}", snapshot(root)):  # what is committed has no such age
        for file in (*path.iterdir(), path):
            os.utime(file, (0, 0))
    assert tidy() == [False, False]
    assert sorted(manifest.committed(folder) + manifest.committed(folder, "snapshot")) == before


def test_shards_stay_while_the_shared_file_system_is_away(root: Path) -> None:
    origin = on_disk(root, "n1") / ORIGIN
    origin.write_text(f"{root}/not-mounted/snapshot-00000003\n")
    sweep(root / "disks" / "n1", root, Retention(newest=2), visible_after_seconds=0)
    assert on_disk(root, "n1").exists()


@given(
    ages=st.lists(st.floats(0, 20_000), max_size=40, unique=True),
    newest=st.integers(1, 5),
    pinned=st.sets(st.integers(0, 39)),
)
def test_thinning_keeps_the_newest_one_of_each_span_and_what_is_pinned(
    ages: list[float], newest: int, pinned: set[int]
) -> None:
    now, rule = 100_000.0, Retention(newest=newest, span_seconds=900, seconds=14_400)
    at = sorted(now - age for age in ages)
    found = [SavedCheckpoint(Path(f"snapshot-{i:08d}"), i, each, i in pinned) for i, each in enumerate(at)]
    going = expired(found, rule, now)
    kept = [saved for saved in found if saved not in going]
    assert not [saved for saved in going if saved.pinned]
    assert set(found[-newest:]) <= set(kept)
    older = [saved for saved in kept[: -newest or None] if not saved.pinned]
    assert all(now - saved.at <= rule.seconds for saved in older)
    assert len({int(saved.at // 900) for saved in older}) == len(older)
    spans = {int(s.at // 900) for s in found[:-newest] if not s.pinned and now - s.at <= rule.seconds}
    assert spans == {int(saved.at // 900) for saved in older}


def test_thinned_as_time_passes_there_is_always_one_of_each_span_left() -> None:
    """What is kept today must not be what tomorrow's choice would have needed to go."""
    rule, kept = Retention(newest=3, span_seconds=900, seconds=14_400), []
    for step, now in enumerate(range(0, 60_000, 200)):
        kept.append(SavedCheckpoint(Path(str(step)), step, float(now), pinned=False))
        going = expired(kept, rule, now)
        kept = [saved for saved in kept if saved not in going]
    spans = {int(saved.at // 900) for saved in kept}
    assert spans >= {span for span in range(67) if 46_000 <= span * 900 <= 59_000}
    assert len(kept) <= 16 + 3 + 1


@given(nodes=st.integers(1, 7), per_node=st.integers(1, 3))
def test_peers_are_on_other_nodes_and_take_turns(nodes: int, per_node: int) -> None:
    where = [f"n{i}" for i in range(nodes) for _ in range(per_node)]
    transfers = transfer.to_peers(where, [[f"__{rank}_0.distcp"] for rank in range(len(where))])
    assert len(transfers) == (len(where) if nodes > 1 else 0)
    assert all(where[each.source] != where[each.target] for each in transfers)
    assert len({each.source for each in transfers}) == len(transfers)


def test_what_a_node_has_is_not_sent_to_it() -> None:
    sent = transfer.to_those_who_need(
        ["n1", "n1", "n3"], {"a": ["n1"], "b": ["n3", "n1"]}, {"n1": {"a", "b"}, "n3": {"a", "b"}}
    )
    assert sent == [Transfer("a", 0, 2)]


def test_saves_are_as_often_as_pays() -> None:
    now = [0.0]
    schedule = SaveSchedule(0, 10.0, lambda: now[0])
    assert schedule.interval == pytest.approx((2 * 1.0 * 36_000) ** 0.5)  # goodput: 1 s and 10 h give 4.5 min
    assert not schedule.due(1)
    now[0] = 270.0
    assert schedule.due(2)
    schedule.saved(0.2, 5.0)
    assert not schedule.due(3)
    assert schedule.interval == pytest.approx(120.0)
    schedule.saved(0.2, 900.0)
    assert schedule.interval == 900.0, "more often than they can be written"
    schedule.saved(0.0001, 1.0)
    assert schedule.interval == 60.0


def test_a_set_number_of_updates_is_kept_to() -> None:
    assert [step for step in range(1, 10) if SaveSchedule(3, 10.0).due(step)] == [3, 6, 9]


def test_a_golden_manifest_of_the_first_version_is_still_read(tmp_path: Path) -> None:
    path = manifest.step_folder(tmp_path, 450)
    shutil.copytree(Path(__file__).parents[1] / "data" / "checkpoint-v1", path)
    found = manifest.verify(path)
    assert (found.step, found.attempt, found.nodes, found.guard) == (450, "12.01-a3", {}, None)
    assert json.loads((path / "manifest.json").read_text())["v"] == 1
