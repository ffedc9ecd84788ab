"""A lineage that the real trainer has trained, for tests of what is done with its checkpoints."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from opt_ops.core.state.status import Status
from tests.e2e.site import Site

# Weights of that spread make the likeliest next token depend on all of the prompt, as it does in a trained model.
SETTINGS = (
    "steps=12",
    "checkpoint_every=6",
    "evaluate_every=100",
    "peer_copies.every=0",
    "data.seq_len=32",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.init_std=0.5",
    "optim.warmup_steps=4",
)
NODE = "falcon-rack9"


def trained(shared: Path) -> Site:
    """The site of lineage 1. It is trained once for all workers of a run: nobody changes it.

    The checkpoint of step 12 is sound, that of step 6 is damaged: one bit of its largest file.
    """
    folder, done = shared / "planted-folder", shared / "planted-folder.done"
    with (shared / "planted-folder.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            _train(Site(folder, f"[local]\nnodes = ['{NODE}']", trainer=f"'{sys.executable}', '-m', 'trainer'"))
            done.touch()
    return Site.at(folder)


def _train(site: Site) -> None:
    words = [f"--set={each}" for each in SETTINGS]
    site.command("run", "start", "opt-tiny", *words, "--nodes=1", "--spares=0", "--ranks=1", "-q")
    try:
        site.start_daemon()
        assert site.ended().status is Status.COMPLETED
    finally:
        site.close()
    shard = max((site.runs / "1/1.00/checkpoints/step-00000006").iterdir(), key=lambda path: path.stat().st_size)
    torn = bytearray(shard.read_bytes())
    torn[-1] ^= 1
    shard.write_bytes(torn)


def shared_folder(base: Path) -> Path:
    """The folder of a test run that all its workers see. `base`: this worker's."""
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def harnesses(site: Site) -> list[int]:
    """The process ids of harnesses at work here."""
    mark = str(site.runs).encode()
    found: list[int] = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = each.read_bytes()
        except OSError:
            continue
        if b"trainer.harness" in words and mark in words:
            found.append(int(each.parent.name))
    return found
