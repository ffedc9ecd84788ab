"""Data that changes while a run goes on, with the real daemon and the real trainer on one CPU rank."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from chronicles.logbook.entries.build import entries
from chronicles.record import load
from chronicles.report.build import build
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import newest_good
from opt_ops.core.state.status import Status
from opt_ops.runfolder.trainer_files import FileTrainer
from tests.e2e.site import Site
from tests.trainer.harness import train

SETTINGS = (
    "steps=100000",
    "checkpoint_every=10",
    "evaluate_every=1000000",
    "peer_copies.every=0",
    "data.seq_len=32",
    "data.global_batch=32",
    "model.vocab_size=512",
    "model.num_layers=1",
    "model.hidden_size=32",
    "optim.warmup_steps=4",
)
_MORE = 12  # steps of a run that are compared


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for number, name in enumerate(("wiki", "books", "code")):
        chosen = [topics[topic] for topic in sorted(topics)[number::3]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    return tmp_path


def losses(site: Site, run: str) -> dict[int, float]:
    """The losses of a run's newest attempt, as far as it has come."""
    lineage = run.partition(".")[0]
    name = [each for each in site.state(lineage).attempts if each.startswith(f"{run}-")][-1]
    return {point.step: point.loss for point in FileTrainer(site.runs / lineage).points(name)}


def trained(site: Site, run: str) -> dict[int, float]:
    """The losses of a run that has made some steps and has a good checkpoint of its own."""

    def found(state: State) -> bool:
        attempt = state.attempt
        if attempt is None or attempt.run != run or attempt.checkpoint is None:
            return attempt is not None and attempt.run == run and newest_good(state, run) is not None
        good = newest_good(state, run)
        enough = (attempt.last_step or 0) >= attempt.checkpoint.step + _MORE
        return enough and good is not None and good.checkpoint.run == run

    site.wait(found, lineage=run.partition(".")[0])
    return losses(site, run)


def same(one: dict[int, float], other: dict[int, float]) -> list[int]:
    """The steps that both have, at which their losses are the same to the last bit."""
    both = sorted(one.keys() & other.keys())
    assert len(both) >= 3, (one.keys(), other.keys())
    return [step for step in both if one[step] == other[step]]


def config(site: Site, run: str) -> dict[str, Any]:
    name = [each for each in site.state(run.partition(".")[0]).attempts if each.startswith(f"{run}-")][-1]
    return json.loads((site.runs / run.partition(".")[0] / run / name.partition("-")[2] / "config.json").read_text())


@pytest.fixture
def site(texts: Path) -> Iterator[Site]:
    """A run of two corpora, which has made some steps."""
    made = Site(texts, trainer=f"'{sys.executable}', '-m', 'trainer'")
    words = [f"--set={each}" for each in SETTINGS]
    try:
        made.command("run", "start", "opt-tiny", *words, *old(texts), "--nodes=1", "--spares=0", "--ranks=1", "-q")
        made.start_daemon()
        yield made
    finally:
        made.close()


def old(texts: Path) -> list[str]:
    return [f"--data=wiki={texts}/wiki.jsonl:0.5", f"--data=books={texts}/books.jsonl:0.5"]


def new(texts: Path) -> list[str]:
    return [f"wiki={texts}/wiki.jsonl:0.75", f"code={texts}/code.jsonl:0.25"]


def changed_at(site: Site) -> int:
    """Change the data. Returns the step of the checkpoint that goes on with the new data."""
    site.command("run", "set", "1", *(f"--data={each}" for each in new(site.folder)), "--reason=code", "--yes", "-q")
    changed = trained(site, "1.01")
    step = site.state().runs["1.01"].checkpoint.step
    assert min(changed) == step + 1
    assert [each["step"] for each in config(site, "1.01")["data"]["since"]] == [0, step]
    return step


def stop(site: Site) -> None:
    site.command("run", "stop", "1", "--yes", "-q")
    site.wait(lambda state: state.status is Status.CANCELLED and state.released)


def test_data_is_changed(site: Site) -> None:
    trained(site, "1.00")
    _is_refused_before_anything_stops(site, site.folder)
    step = changed_at(site)
    stop(site)
    first, changed = losses(site, "1.00"), losses(site, "1.01")
    expected = {each: (first if each <= step else changed)[each] for each in range(1, step + _MORE)}
    _is_told(site, step, {"1.00": [], "1.01": [step]})
    _documents_are_found(site, step)
    site.end_daemon()
    _is_the_training_with_the_list_of_both(site.folder, step, expected)


@pytest.mark.soak
def test_changed_data_is_taken_back_and_taken_over(site: Site) -> None:
    trained(site, "1.00")
    step = changed_at(site)
    first, changed = losses(site, "1.00"), losses(site, "1.01")
    after = newest_good(site.state(), "1.01").checkpoint.step
    assert after > step

    site.command("run", "rollback", "1", "--to", str(after), "--reason=x", "--yes", "-q")
    kept = trained(site, "1.02")
    assert same(kept, losses(site, "1.01")) == sorted(kept.keys() & losses(site, "1.01").keys())

    site.command("run", "rollback", "1", "--to", str(step - 1), "--reason=x", "--yes", "-q")
    back = trained(site, "1.03")
    assert min(back) <= step
    assert "since" not in config(site, "1.03")["data"]
    assert config(site, "1.03")["data"]["digest"] == config(site, "1.00")["data"]["digest"]
    overlap = sorted(back.keys() & changed.keys())
    assert overlap, "it trains past the change"
    assert [each for each in overlap if back[each] == changed[each]] == [], "other data, other losses"
    assert all(back[each] == first[each] for each in back.keys() & first.keys())

    stop(site)
    _is_told(site, step, {"1.00": [], "1.01": [step], "1.02": [step], "1.03": []})
    assert site.command("run", "fork", "1.01", "--at", str(after), "--reason=x", "-q").strip() == "2"
    forked = trained(site, "2.00")
    known = losses(site, "1.01") | kept
    assert same(forked, known) == sorted(forked.keys() & known.keys())
    assert [each["step"] for each in config(site, "2.00")["data"]["since"]] == [0, step]


def _is_refused_before_anything_stops(site: Site, texts: Path) -> None:
    attempt = site.state().attempt
    there = f"--data=wiki={texts}/wiki.jsonl"
    said = site.command("run", "set", "1", f"{there}:0.5", f"--data=code={texts}/none:0.5", "--yes", code=2)
    assert "none does not exist" in said
    said = site.command("run", "set", "1", f"{there}:0.5", f"--data={texts}/code.jsonl", "--yes", code=2)
    assert "needs a weight" in said
    assert site.state().attempt.name == attempt.name
    assert site.state().changes == {}


def _is_told(site: Site, step: int, runs: dict[str, list[int]]) -> None:
    record = load(site.runs / "1")
    titles = [entry.title for entry in entries(record, build(record))]
    assert f"data changed at step {step:,}: + code 25 %, wiki 50 % → 75 %, − books" in titles
    assert any(f"data of before step {step:,}" in title for title in titles) == (len(runs) > 2)
    shown = json.loads(site.command("run", "show", "1", "-o", "json"))["items"][0]
    what = {run["run"]: [each["after_step"] for each in run["data"]] for run in shown["runs"]}
    assert what == runs


def _documents_are_found(site: Site, step: int) -> None:
    """The first batch behind the change has new data, in the new shares."""
    words = ("--step", str(step + 1), "--attempt", "1.01-a0", "-o", "json", "-q")
    rows = json.loads(site.command("data", "show", "1", *words))["items"]
    corpora = Counter(corpus for _, corpus in {(row["sample"], row["corpus"]) for row in rows})
    assert corpora == {"wiki": 24, "code": 8}


def _is_the_training_with_the_list_of_both(folder: Path, step: int, expected: dict[int, float]) -> None:
    words = [word for each in SETTINGS for word in ("--set", each)] + ["--set", f"steps={max(expected)}"]
    words += [word for each in old(folder) for word in each.split("=", 1)]
    words += [word for each in new(folder) for word in ("--data-since", f"{step}:{each}")]
    places = ["--run-dir", folder / "both", "--checkpoint-dir", folder / "both" / "checkpoints"]
    (done,) = train(0, "--recipe", "opt-tiny", *places, *words)
    assert done.returncode == 0, done
    lines = [json.loads(line) for line in (folder / "both" / "telemetry.jsonl").read_text().splitlines()]
    assert {line["num_updates"]: line["loss"] for line in lines} == expected
