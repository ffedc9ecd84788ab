"""`ckpt release` of a lineage that the real trainer has trained: it loads, it is whole, and it gives nothing away."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.e2e.site import Site
from tests.e2e.trained import NODE

MARKS = (NODE, "hunter2-of-the-boss", "planted-folder")


def test_a_release_loads_is_whole_and_gives_nothing_away(trained_site: Site, tmp_path: Path):
    site, folder = trained_site, tmp_path / "mine"
    site.command("note", "1", f"the password is {MARKS[1]}")
    words = ("--out", str(folder), "--licence", "apache-2.0")
    told = json.loads(site.command("ckpt", "release", "1/12", *words, "-o", "json"))
    assert told["schema"] == "opt-ops/ckpt-release/1"
    done = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    names = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.rglob("*")), "others can read all of it"
    assert names == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    assert told["items"][0]["files"] == len(names)
    _loads(site, folder)
    _tells(folder)
    assert "exists already" in site.command("ckpt", "release", "1/12", *words, code=4)
    _is_refused(site, tmp_path)


def _loads(site: Site, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (converted,) = (site.runs / "1" / "converted").glob("*-fp16")
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


def _is_refused(site: Site, folder: Path) -> None:
    out = ("--out", str(folder / "x"))
    assert "neither" in site.command("ckpt", "release", "1", *out, "--licence", "beer", code=2)
    words = (*out, "--licence", "apache-2.0")
    assert "no checkpoint of step 7" in site.command("ckpt", "release", "1/7", *words, code=3)
    assert "damaged" in site.command("ckpt", "release", "1/6", *words, code=65)
    assert not (folder / "x").exists()
    assert not list(folder.glob(".x-*"))
