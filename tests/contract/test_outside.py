"""What one rank hears, all ranks do, in the same update."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from opt_ops.contract.drills import DrillFile

PROGRAM = """
import json, os, signal, sys, time
from opt_ops.contract import Options, Outside, SupersededError, UserError
from pathlib import Path
folder = Path(sys.argv[1])
fence = folder / "fence.json"
options = Options(run_dir=folder, checkpoint_dir=folder, attempt="1.00-a1", fence=fence)
first = Outside(options, 0)
second = Outside(options, 1, first.signals)
def both(step):
    return first.agreed([a + b for a, b in zip(first.local(step), second.local(step))])
fence.write_text(json.dumps({"attempt": "1.00-a1"}))
print(both(1))
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGUSR1)
first.signals.save_requested.wait(240)
print(both(2).save, both(3).save)
(folder / "drill.json").write_text(json.dumps([
    {"id": "a", "kind": "lr", "from_step": 5, "updates": 2, "factor": 50},
    {"id": "b", "kind": "nan", "from_step": 6}, {"id": "c", "kind": "flip-bit", "from_step": 7, "rank": 1}]))
for step in (4, 5, 6, 7):
    agreed = both(step)
    print(agreed.lr_factor, agreed.nan, agreed.flip)
(folder / "drill.json").write_text("{")
try:
    both(8)
except UserError as error:
    print("drill.json is not a list" in str(error))
(folder / "drill.json").unlink()
fence.write_text(json.dumps({"attempt": "1.00-a2"}))
time.sleep(1.1)
print(both(9).superseded)
try:
    first.check_fence()
except SupersededError:
    print("superseded")
"""


def test_outside(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines() == [
        "Agreed(save=False, superseded=False, lr_factor=1.0, nan=False, flip=None)",
        "True False",
        "1.0 False None",
        "50.0 False None",
        "50.0 True None",
        "1.0 False 1",
        "True",
        "True",
        "superseded",
    ], done.stderr


def test_a_nan_drill_that_is_late_begins_now(tmp_path: Path) -> None:
    path = tmp_path / "drill.json"
    path.write_text(json.dumps([{"id": "x", "kind": "nan", "from_step": 3}]))
    drills = DrillFile(path)
    assert drills.lr_factor(10) == 1.0
    assert [step for step in range(1, 20) if drills.nan(step)] == [10]
