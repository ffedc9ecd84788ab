"""`ckpt release` of a lineage that the real trainer has trained: it loads, it is whole, and it gives nothing away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opt_ops.core.state.status import Status
from tests.e2e.site import Site

SETTINGS = (
    "steps=12",
    "checkpoint_every=6",
    "evaluate_every=100",
    "peer_copies.every=0",
    "data.seq_len=32",
    "model.num_layers=1",
    "model.hidden_size=32",
    "optim.warmup_steps=4",
)
MARKS = ("falcon-rack9", "hunter2-of-the-boss", "planted-folder")


@pytest.fixture
def site(tmp_path: Path):
    folder = tmp_path / "planted-folder"
    folder.mkdir()
    site = Site(folder, "[local]\nnodes = ['falcon-rack9']", trainer=f"'{sys.executable}', '-m', 'trainer'")
    yield site
    site.close()


def test_a_release_loads_is_whole_and_gives_nothing_away(site: Site):
    words = [f"--set={each}" for each in SETTINGS]
    site.command("run", "start", "opt-tiny", *words, "--nodes=1", "--spares=0", "--ranks=1", "-q")
    site.start_daemon()
    assert site.ended().status is Status.COMPLETED
    site.command("note", "1", f"the password is {MARKS[1]}")
    site.end_daemon()
    told = json.loads(site.command("ckpt", "release", "1/12", "--out", "mine", "--licence", "apache-2.0", "-o", "json"))
    assert told["schema"] == "opt-ops/ckpt-release/1"
    folder = site.folder / "mine"
    done = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    names = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert names == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    assert told["items"][0]["files"] == len(names)
    _loads(site, folder)
    _tells(folder)
    assert "exists already" in site.command(
        "ckpt", "release", "1/12", "--out", "mine", "--licence", "apache-2.0", code=4
    )
    _is_refused(site)


def _loads(site: Site, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (converted,) = (site.runs / "1" / "converted").iterdir()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode("The quick brown fox")])
    assert ids[0, 0] == 2, "</s> is in front, as in training"
    logits = [AutoModelForCausalLM.from_pretrained(each)(ids).logits for each in (folder, converted)]
    assert torch.equal(*logits)


def _tells(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "run 1.00 at step 12, in fp16" in card
    assert "Apache License" in (folder / "LICENSE").read_text()
    origin = json.loads((folder / "provenance.json").read_text())
    assert (origin["run"], origin["step"]) == ("1.00", 12)
    assert len(origin["checkpoint"]) == len("sha256:") + 64
    data = json.loads((folder / "data.json").read_text())
    assert data["known"]
    assert data["corpora"][0]["documents"] > 0
    for path in folder.rglob("*"):
        if path.suffix in (".md", ".html", ".json", "") and path.is_file():
            text = path.read_text()
            assert not [mark for mark in MARKS if mark in text], path.name


def _is_refused(site: Site) -> None:
    assert "neither" in site.command("ckpt", "release", "1", "--out", "x", "--licence", "beer", code=2)
    assert "no checkpoint of step 7" in site.command(
        "ckpt", "release", "1/7", "--out", "x", "--licence", "apache-2.0", code=3
    )
    shard = max((site.runs / "1/1.00/checkpoints/step-00000012").iterdir(), key=lambda path: path.stat().st_size)
    torn = bytearray(shard.read_bytes())
    torn[-1] ^= 1
    shard.write_bytes(torn)
    said = site.command("ckpt", "release", "1/12", "--out", "x", "--licence", "apache-2.0", code=65)
    assert "damaged" in said
    assert not (site.folder / "x").exists()
    assert not list(site.folder.glob(".x-*"))
