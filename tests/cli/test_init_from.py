"""`run start --init-from`: refused before anything is held, shown where a person looks, and kept through restarts."""

import hashlib
import json
from pathlib import Path

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.model import State
from opt_ops.runfolder import lineages
from opt_ops.supervise.executor import Site, orders_of
from tests.commands import opt_ops
from tests.core.story import Story, only
from tests.e2e.stub_trainer import save

SITE = Site(folder="/runs/12", trainer=("train",))


def weights(folder: Path, step: int = 40, **model: int) -> Path:
    """A committed checkpoint in `folder`; `model`: what its manifest says of the model."""
    save(folder, step, "7.00-a0", {"num_updates": step}, [])
    path = folder / f"step-{step:08d}"
    manifest = json.loads((path / "manifest.json").read_text()) | {"model": model or None}
    (path / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    (path / "COMMITTED").write_text(digest + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("gone", "--init-from gone does not exist", "opt-ops ckpt list ID -o wide names the folders"),
        (
            "hf",
            "--init-from hf is no checkpoint: it has no file COMMITTED",
            "python -m trainer.convert hf DST --to native",
        ),
        (
            "checkpoints",
            "--init-from checkpoints is no checkpoint",
            "one of its checkpoints, for example checkpoints/step-00000040",
        ),
        (
            "torn",
            "--init-from torn: manifest.json does not match the COMMITTED marker",
            "opt-ops ckpt list ID -o wide names others",
        ),
        ("other/step-00000040", "holds another model: its hidden_size is 96", "opt-ops run recipes"),
    ],
)
def test_what_is_no_checkpoint_of_this_model_is_refused_and_leaves_nothing(
    tmp_path: Path, name: str, said: str, hint: str
):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"x")
    weights(tmp_path / "checkpoints")
    weights(tmp_path / "other", hidden_size=96)
    torn = weights(tmp_path / "half").rename(tmp_path / "torn")
    (torn / "manifest.json").write_text("{}")
    done = opt_ops(tmp_path, "run", "start", "opt-tiny", "--init-from", name)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert said in done.stderr
    assert hint in done.stderr
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.rglob("*.pinned"))


def test_it_is_journaled_previewed_shown_and_protected(tmp_path: Path):
    path = weights(tmp_path / "checkpoints")
    begin = ("run", "start", "opt-tiny", "--init-from", "checkpoints/step-00000040")
    dry = opt_ops(tmp_path, *begin, "--dry-run")
    assert f"would begin   with the weights of {path}\n" in dry.stdout, dry.stderr
    assert not list(tmp_path.rglob("*.pinned"))
    assert opt_ops(tmp_path, *begin, "-q").returncode == 0
    (request,) = (tmp_path / "runs" / "1" / "inbox").glob("*.json")
    assert json.loads(request.read_text())["arguments"]["init_from"] == str(path)
    assert path.with_name("step-00000040.pinned").exists(), "a rollback to step 0 needs it again"


def told(folder: Path) -> Story:
    story = Story()
    story.init_from = "/converted/opt"
    story.training(460, checkpoints=())
    story.spike(460, onset=410)
    story.ends()
    story.save(folder / "runs" / "12")
    return story


def test_explain_show_and_the_report_name_the_first_weights(tmp_path: Path):
    told(tmp_path)
    assert "lineage 12 began with the weights of /converted/opt" in opt_ops(tmp_path, "run", "explain", "12").stdout
    assert "first weights /converted/opt" in opt_ops(tmp_path, "run", "show", "12").stdout
    explained = json.loads(opt_ops(tmp_path, "run", "explain", "12", "-o", "json").stdout)
    assert explained["items"][0]["init_from"] == "/converted/opt"
    assert opt_ops(tmp_path, "logbook", "render", "12").returncode == 0
    (logbook,) = tmp_path.rglob("logbook.md")
    assert "First weights" in logbook.read_text()
    assert "with the weights of /converted/opt, as attempt 12.01-a0" in logbook.read_text()
    (report,) = tmp_path.rglob("report.json")
    assert json.loads(report.read_text())["init_from"] == "/converted/opt"


def argv(state: State) -> str:
    launch = orders_of(state, SITE).launch
    assert launch is not None
    return " ".join(launch.argv)


def test_every_attempt_gets_it_and_one_that_resumes_gives_its_checkpoint_precedence(tmp_path: Path):
    story = Story()
    story.init_from = "/converted/opt"
    story.begin()
    story.hold()
    story.train(5)
    assert "--init-from /converted/opt --run-dir /runs/12/12.00/a0" in argv(story.state)
    story.rank_dies(5)
    story.ends()
    assert story.state.attempt is not None
    assert story.state.attempt.name == "12.00-a1", "it died before its first checkpoint"
    assert "--init-from /converted/opt" in argv(story.state)
    assert "--from-scratch" in argv(story.state)
    story.train(110)
    story.checkpoint(100)
    story.rank_dies(110)
    story.ends()
    assert "--init-from /converted/opt" in argv(story.state)
    assert "--resume /runs/12/12.00/checkpoints/step-00000100" in argv(story.state)
    story.train(160)
    recovery = only(story.spike(160, onset=90), e.RecoveryDecided)
    story.ends()
    assert recovery.checkpoint is None
    assert "--init-from /converted/opt" in argv(story.state)
    assert "--from-scratch" in argv(story.state)


def test_a_lineage_of_an_older_journal_begins_with_the_weights_of_its_seed(tmp_path: Path):
    story = Story()
    story.begin()
    story.hold()
    assert "--init-from" not in argv(story.state)
    story.save(tmp_path / "12")
    (journal,) = (tmp_path / "12" / "journal").glob("*.jsonl")
    journal.write_text(journal.read_text().replace(',"init_from":null', ""))
    assert lineages.state(tmp_path / "12").lineage == story.state.lineage
