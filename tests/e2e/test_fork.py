"""`run fork` with the real trainer on one CPU rank: a lineage to its last step, and a fork of it, in one site."""

import json
import sys
from pathlib import Path

from chronicles.record import load
from chronicles.report import encode
from chronicles.report.build import build
from opt_ops.core.state.status import Status
from opt_ops.runfolder.trainer_files import FileTrainer
from tests.e2e.site import Site

SETTINGS = (
    "steps=24",
    "checkpoint_every=8",
    "evaluate_every=100",
    "peer_copies.every=0",
    "data.seq_len=32",
    "model.num_layers=1",
    "model.hidden_size=32",
    "optim.warmup_steps=4",
)


def losses(site: Site, lineage: str) -> dict[int, float]:
    attempt = site.state(lineage).attempt
    assert attempt is not None
    return {point.step: point.loss for point in FileTrainer(site.runs / lineage).points(attempt.name)}


def test_a_fork_repeats_the_losses_bit_by_bit_survives_a_killed_daemon_and_pays_for_its_own_steps(tmp_path: Path):
    site = Site(tmp_path, trainer=f"'{sys.executable}', '-m', 'trainer'")
    try:
        _train_and_fork(site)
        _is_told(site)
        _is_refused(site)
    finally:
        site.close()


def _train_and_fork(site: Site) -> None:
    words = [f"--set={each}" for each in SETTINGS]
    site.command("run", "start", "opt-tiny", *words, "--nodes=1", "--spares=0", "--ranks=1", "-q")
    site.start_daemon()
    assert site.ended().status is Status.COMPLETED, "an ended lineage is forked"
    site.kill_daemon()
    assert site.command("run", "fork", "1", "--at", "10", "--reason", "the rate?", "-q").strip() == "2"
    pin = site.runs / "1" / "1.00" / "checkpoints" / "step-00000008.pinned"
    assert pin.read_text() == "lineage-2\n"
    site.start_daemon()
    site.wait(lambda state: state.run, lineage="2")
    site.kill_daemon()  # between the request and the start of its ranks, or soon after
    site.start_daemon()
    forked = site.ended(lineage="2")
    assert (forked.status, list(forked.runs), list(forked.attempts)) == (Status.COMPLETED, ["2.00"], ["2.00-a0"])
    assert not pin.exists(), "it has a good checkpoint of its own"
    before, after = losses(site, "1"), losses(site, "2")
    assert list(after) == list(range(9, 25))
    assert after == {step: before[step] for step in after}, "every bit is the same"


def _is_told(site: Site) -> None:
    checkpoint = str(site.runs / "1" / "1.00" / "checkpoints" / "step-00000008")
    parent = {"lineage": "1", "run": "1.00", "step": 8, "checkpoint": checkpoint}
    rows = {row["lineage"]: row for row in json.loads(site.command("q", "-o", "json"))["items"]}
    for lineage, told in (("1", (None, ["2"], 24)), ("2", (parent, [], 16))):
        assert (rows[lineage]["parent"], rows[lineage]["children"]) == told[:2]
        report = encode.lineage(build(load(site.runs / lineage)))
        assert (report["parent"], report["children"], report["goodput"]["kept_steps"]) == told


def _is_refused(site: Site) -> None:
    folder = site.runs / "1" / "1.00" / "checkpoints"
    end = site.command("run", "fork", "1", "--dry-run", code=4)
    assert "nothing is left to train from step 24: steps=24" in end
    size = site.command("run", "fork", "1", "--at", "8", "--set", "model.hidden_size=64", "--dry-run", code=2)
    assert "hidden_size is 32, not 64" in size
    shard = max((folder / "step-00000016").iterdir(), key=lambda path: path.stat().st_size)
    torn = bytearray(shard.read_bytes())
    torn[-1] ^= 1
    shard.write_bytes(torn)
    older = site.command("run", "fork", "1", "--at", "16", "--lr-scale", "0.5", "--dry-run")
    assert f"would fork    1.00 at step 8: {folder / 'step-00000008'}" in older
    assert "would scale   the learning rate by 0.5 after step 8" in older
    (folder / "step-00000008" / "COMMITTED").unlink()
    torn = site.command("run", "fork", "1", "--at", "16", code=4)
    assert "1.00 has no verified healthy checkpoint at or before step 16" in torn
    assert "that of step 16 is damaged" in torn
    assert "Steps of the good ones: 24" in torn
    assert not (site.runs / "3").exists()
