"""`node check` of the nodes of a Slurm job, by srun."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_the_nodes_of_a_job_are_read_and_burnt_in(slurm: Cluster, tmp_path: Path):
    nodes = slurm.nodes[:2]
    command = ["salloc", "-N2", "-w", ",".join(nodes), sys.executable, "-m", "opt_ops", "node", "check", *nodes]
    options = ["--burn-in", "--seconds", "110", "-o", "json"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # a busy machine may be found slow; it is not bad
    items = json.loads(done.stdout)["items"]
    assert [item["node"] for item in items] == list(nodes)
    found = json.dumps(items)
    assert '"finished": true' in found, found
    assert f'"nodes": ["{nodes[0]}", "{nodes[1]}"]' in found, "the network between them was measured"
