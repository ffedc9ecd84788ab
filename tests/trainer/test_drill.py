import json
from pathlib import Path

import pytest

from opt_ops.contract.drills import DrillFile
from trainer.errors import UserError

DRILL = {"id": "d1", "kind": "lr", "from_step": 120, "updates": 20, "factor": 40.0}


def order(path: Path, *drills: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(drills))
    temporary.replace(path)


def test_a_drill_lasts_from_its_step_for_its_updates(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    drills = DrillFile(path)
    assert drills.lr_factor(120) == 1.0, "no file, no drill"
    order(path, DRILL, DRILL | {"id": "d2", "from_step": 139, "updates": 5, "factor": 0.5})
    assert [drills.lr_factor(step) for step in (119, 120, 138, 139, 140, 143, 144)] == [1, 40, 40, 20, 0.5, 0.5, 1]


def test_a_drill_ordered_too_late_begins_at_once_and_lasts_as_long(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    drills = DrillFile(path)
    order(path, DRILL)
    assert [drills.lr_factor(step) for step in (500, 501, 519, 520)] == [40, 40, 40, 1]
    order(path, DRILL, DRILL | {"id": "d2", "updates": 1})
    assert [drills.lr_factor(step) for step in (521, 522)] == [40, 1], "the first one is over and stays so"


def test_a_replaced_or_removed_file_counts_at_once(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    drills = DrillFile(path)
    order(path, DRILL)
    assert drills.lr_factor(125) == 40.0
    order(path, DRILL | {"factor": 41.0})
    assert drills.lr_factor(125) == 41.0
    path.unlink()
    assert drills.lr_factor(125) == 1.0


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[{", "JSONDecodeError"),
        ('{"kind": "lr"}', "TypeError"),
        ('[{"id": "d", "kind": "lr", "from_step": 1}]', "KeyError: 'updates'"),
        ('[{"kind": "gas leak"}]', "kind 'gas leak' is unknown"),
        ('[{"id": "d", "kind": "lr", "from_step": 1, "updates": "few", "factor": 2}]', "ValueError"),
    ],
)
def test_what_cannot_be_read_is_the_users_error(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "drill.json"
    path.write_text(content)
    with pytest.raises(UserError, match=why):
        DrillFile(path).lr_factor(1)
