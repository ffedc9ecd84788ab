"""Faults that an operator injects: from which update on they count, and what a file may not be."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from opt_ops.contract.drills import IN_STEP, DrillFile, DrillsOfStep, standby_delay
from opt_ops.contract.errors import UserError

DRILL = {"id": "d1", "kind": "lr", "from_step": 120, "updates": 20, "factor": 40.0}


def order(path: Path, *drills: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(drills))
    temporary.replace(path)


def factor(drills: DrillFile, step: int) -> float:
    return drills.at(step).lr_factor


def test_a_drill_lasts_from_its_step_for_its_updates(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    drills = DrillFile(path)
    assert factor(drills, 120) == 1.0, "no file, no drill"
    order(path, DRILL, DRILL | {"id": "d2", "from_step": 139, "updates": 5, "factor": 0.5})
    assert [factor(drills, step) for step in (119, 120, 138, 139, 140, 143, 144)] == [1, 40, 40, 20, 0.5, 0.5, 1]


def test_a_drill_ordered_too_late_begins_at_once_and_lasts_as_long(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    drills = DrillFile(path)
    order(path, DRILL)
    assert [factor(drills, step) for step in (500, 501, 519, 520)] == [40, 40, 40, 1]
    order(path, DRILL, DRILL | {"id": "d2", "updates": 1})
    assert [factor(drills, step) for step in (521, 522)] == [40, 1], "the first one is over and stays so"


def test_a_replaced_or_removed_file_counts_at_once(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    drills = DrillFile(path)
    order(path, DRILL)
    assert factor(drills, 125) == 40.0
    order(path, DRILL | {"factor": 41.0})
    assert factor(drills, 125) == 40.0, "an update is asked about twice, and gets one answer"
    assert factor(drills, 126) == 41.0
    path.unlink()
    assert factor(drills, 127) == 1.0


def test_a_nan_drill_spoils_one_update(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    drills = DrillFile(path)
    order(path, {"id": "n", "kind": "nan", "from_step": 3})
    assert [step for step in range(1, 8) if drills.at(step).nan] == [3]
    late = DrillFile(path)
    assert [step for step in range(10, 20) if late.at(step).nan] == [10], "one that is late begins now"


def test_drills_of_the_same_update(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    lr = DRILL | {"from_step": 3, "updates": 2}
    order(
        path, {"id": "n", "kind": "nan", "from_step": 3}, lr, {"id": "f", "kind": "flip-bit", "from_step": 3, "rank": 2}
    )
    drills = DrillFile(path)
    assert [drills.at(step) for step in (2, 3, 4, 5)] == [
        DrillsOfStep(),
        DrillsOfStep(lr_factor=40.0, nan=True, flip=2),
        DrillsOfStep(lr_factor=40.0),
        DrillsOfStep(),
    ]


@pytest.mark.parametrize("place", IN_STEP)
def test_a_rank_is_killed_once_at_its_place_in_an_update(tmp_path: Path, place: str) -> None:
    path = tmp_path / "drill.json"
    drills = DrillFile(path)
    order(path, {"id": "k", "kind": "kill-rank", "rank": 2, "in_step": place})
    assert [drills.at(step).kill for step in (7, 8)] == [(2, place), None], "the next update, and no other"


def test_a_newcomer_does_not_repeat_the_drill_that_made_room_for_it(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    order(path, {"id": "k", "kind": "kill-rank", "rank": 0, "in_step": "copy"}, DRILL)
    newcomer = DrillFile(path, newcomer=True)
    assert newcomer.at(130) == DrillsOfStep()
    order(path, {"id": "n", "kind": "nan", "from_step": 1})
    assert newcomer.at(131).nan, "a later drill counts"


def test_how_long_a_standby_waits(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    assert standby_delay(path) == 0.0, "no file, no drill"
    order(path, {"id": "s", "kind": "slow-standby", "seconds": 90.5})
    assert standby_delay(path) == 90.5
    assert DrillFile(path).at(3) == DrillsOfStep(), "it changes no update"
    path.write_text("[{")
    assert standby_delay(path) == 0.0, "the ranks tell what is wrong with the file"


def test_a_drill_that_comes_between_two_questions_about_an_update_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    drills = DrillFile(path)
    assert not drills.at(5).nan
    order(path, {"id": "n", "kind": "nan", "from_step": 1})
    assert [drills.at(step).nan for step in (5, 5, 6, 6, 7)] == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[{", "JSONDecodeError"),
        ('{"kind": "lr"}', "TypeError: it holds dict"),
        ("{}", "TypeError: it holds dict"),
        ("7", "TypeError: it holds int"),
        ("[7]", "TypeError"),
        ("[" * 200_000, "RecursionError"),
        (b"[\xff]", "UnicodeDecodeError"),
        (b"[" + b" " * 2**20 + b"]", "larger than"),
        ('[{"id": "d", "kind": "lr", "from_step": 1}]', "KeyError: 'updates'"),
        ('[{"kind": "nan", "from_step": 1}]', "KeyError: 'id'"),
        ('[{"id": 7, "kind": "nan", "from_step": 1}]', "`id` is 7, not text"),
        ('[{"kind": "gas leak"}]', "kind 'gas leak' is unknown"),
        ('[{"id": "d", "kind": "lr", "from_step": 1, "updates": "few", "factor": 2}]', "`updates` is 'few'"),
        ('[{"id": "d", "kind": "lr", "from_step": 1e999, "updates": 1, "factor": 2}]', "`from_step` is inf"),
        ('[{"id": "d", "kind": "lr", "from_step": 1, "updates": 1, "factor": NaN}]', "`factor` is nan"),
        ('[{"id": "d", "kind": "lr", "from_step": 1, "updates": 1, "factor": 0}]', "`factor` is 0"),
        ('[{"id": "d", "kind": "flip-bit", "from_step": 1, "rank": 1.5}]', "`rank` is 1.5"),
        ('[{"id": "d", "kind": "kill-rank", "rank": 1}]', "KeyError: 'in_step'"),
        ('[{"id": "d", "kind": "kill-rank", "rank": 1, "in_step": "lunch"}]', "`in_step` is 'lunch'"),
        ('[{"id": "d", "kind": "slow-standby", "seconds": 0}]', "`seconds` is 0"),
        ('[{"id": "d", "kind": "nan", "from_step": 1}, {"id": "d", "kind": "nan", "from_step": 2}]', "the same `id`"),
    ],
)
def test_what_cannot_be_read_is_the_users_error(tmp_path: Path, content: str | bytes, why: str) -> None:
    path = tmp_path / "drill.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=why):
        DrillFile(path).at(1)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "drill.json"
    make(path)
    with pytest.raises(UserError, match="not a regular file"):
        DrillFile(path).at(1)


def test_a_file_system_that_fails_for_a_moment_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "drill.json"
    order(path, DRILL)
    drills = DrillFile(path)
    assert factor(drills, 120) == 40.0

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("opt_ops.contract.drills.read_regular", fail)
        order(path, DRILL, DRILL | {"id": "d2"})
        assert factor(drills, 121) == 40.0
        patch.setattr(Path, "stat", fail)
        assert factor(drills, 122) == 40.0
    assert factor(drills, 123) == 1600.0
