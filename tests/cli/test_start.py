"""`run start` refuses nonsense before anything is held: no folder, no request, no job; what is right is accepted."""

import json
import os
from pathlib import Path

import pytest

from opt_ops.adapters.slurm_site import objections
from opt_ops.errors import SchedulerUnavailable
from tests.commands import opt_ops

REPOSITORY = Path(__file__).parents[2]

SINFO = "train*|16|3-00:00:00|1-infinite\\ntrain*|4|3-00:00:00|1-infinite\\ndebug|2|30:00|1-1\\n"


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "for real"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["opt-tny"], "no recipe is called 'opt-tny'. Did you mean opt-tiny?"),
        (["opt-tiny", "--set", "step=4"], "no setting is called 'step'. Did you mean steps"),
        (["opt-tiny", "--set", "steps=-4"], "steps must be at least 1"),
        (["opt-tiny", "--nodes", "4"], "this machine has 3 nodes (n1, n2, n3); 4 and 1 spare are wanted"),
        (["opt-tiny", "--spares", "1000000"], "this machine has 3 nodes"),
        (["opt-tiny", "--ranks", "1000000"], "leaves some of 2000000 data-parallel ranks without a sequence"),
        (["opt-tiny", "--set", "parallel.tp=3"], "2 processes cannot form"),
        (["opt-tiny", "--ranks", "2", "--min-nodes", "1", "--set", "parallel.tp=4"], "2 processes cannot form"),
        (["opt-tiny", "--data", "bad.jsonl"], "bad.jsonl:1: not a JSON object"),
        (["opt-tiny", "--data", "short.jsonl"], "less than one sample of 65"),
        (["opt-tiny", "--data-since", "0:short.jsonl"], "with a step of 1 or above"),
        (["opt-tiny", "--data-since", "9:missing.jsonl"], "missing.jsonl does not exist"),
        (["opt-tiny", "--data-since", "9:short.jsonl"], "less than one sample of 65"),
    ],
)
def test_nonsense_is_refused_and_leaves_nothing_behind(tmp_path: Path, words: list[str], said: str, dry: list[str]):
    (tmp_path / "bad.jsonl").write_text("no JSON\n" * 20)
    (tmp_path / "short.jsonl").write_text('{"text": "short"}\n')
    done = opt_ops(tmp_path, "run", "start", *words, *dry)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert said in done.stderr
    assert "\n  next: " in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["opt-tiny"],
        ["opt-tiny", "--set", "steps=5", "--nodes", "1", "--spares", "0", "--ranks", "2", "--set", "parallel.tp=2"],
        ["opt-tiny", "--nodes", "3", "--spares", "0", "--min-nodes", "1", "--data", "good.jsonl"],
        [
            *("opt-tiny", "--set", "steps=5", "--data", "good=good.jsonl", "--data-since", "3:good=good.jsonl:1"),
            *("--data-since", "3:books=good.jsonl:1"),
        ],
    ],
)
def test_what_is_right_is_accepted(tmp_path: Path, words: list[str]):
    (tmp_path / "good.jsonl").write_text(json.dumps({"text": "The cat sat on the mat. " * 50}) + "\n")
    done = opt_ops(tmp_path, "run", "start", *words, "--dry-run")
    note = "  note: the learning rate rises for all 5 steps; --set optim.warmup_steps makes the warm-up shorter\n"
    assert (done.returncode, done.stderr) == (0, note if "steps=5" in words else "")
    assert "would train   opt-tiny" in done.stdout
    assert ("would change  the data after step 3: + books 50 %, good 100 % → 50 %" in done.stdout) is (
        "--data-since" in words
    )
    assert not (tmp_path / "runs").exists()


def test_another_trainer_is_not_started_by_a_question(tmp_path: Path):
    program = tmp_path / "train.sh"
    program.write_text("#!/bin/sh\ntouch asked\nexit 78\n")
    program.chmod(0o755)
    config = tmp_path / "opt-ops.toml"
    config.write_text(f"[trainer]\ncommand = ['{program}']\n")
    done = opt_ops(tmp_path, "run", "start", "mine", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "were not checked: another trainer is asked only with `check = true`" in done.stderr
    assert not (tmp_path / "asked").exists()
    assert opt_ops(tmp_path, "run", "recipes").returncode == 75
    config.write_text(f"[trainer]\ncommand = ['{program}']\ncheck = true\n")
    done = opt_ops(tmp_path, "run", "start", "mine", "--dry-run")
    assert (done.returncode, (tmp_path / "asked").exists()) == (2, True)


@pytest.mark.parametrize("code", [1, 64, 127])
def test_a_check_that_fails_refuses_nothing(tmp_path: Path, code: int):
    (tmp_path / "opt-ops.toml").write_text(f"[trainer]\ncheck = true\ncommand = ['sh', '-c', 'exit {code}']\n")
    done = opt_ops(tmp_path, "run", "start", "mine", "--dry-run")
    assert done.returncode == 0
    assert f"were not checked: its check ended with exit code {code}" in done.stderr


def test_recipes_are_listed(tmp_path: Path):
    table = opt_ops(tmp_path, "run", "recipes")
    assert table.returncode == 0, table.stderr
    assert "opt-175b\t175B\t" in table.stdout
    told = json.loads(opt_ops(tmp_path, "run", "recipes", "-o", "json").stdout)
    assert told["schema"] == "opt-ops/recipe-list/1"
    first = told["items"][0]
    assert (first["recipe"], first["steps"], type(first["parameters"])) == ("opt-tiny", 600, int)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that answers questions about the site, and records jobs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, program in {
        "sinfo": f'printf "{SINFO}"',
        "scontrol": 'echo "AccountingStorageEnforce = associations,limits"',
        "sacctmgr": 'printf "llm\\nvision\\n"',
        "sbatch": "touch submitted; exit 1",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{program}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def why(*wanted: object) -> str:
    return "; ".join(each.why for each in objections(*wanted))  # type: ignore[arg-type]


def test_what_slurm_lacks_is_objected_to(slurm: Path):
    assert why(20, 4320, None, "llm") == ""
    assert why(20, 4320, "debug,train", None) == ""
    assert why(21, 60, None, None) == "partition train has 20 nodes; 21 are wanted"
    assert why(2, 20, "debug", None) == "a job in partition debug may have 1 nodes; 2 are wanted"
    assert why(1, 31, "debug", None) == "time_minutes = 31 is above the limit of partition debug, 30 minutes"
    assert why(1, 20, "trian", None) == "Slurm has no partition trian; did you mean train?"
    assert why(1, 20, None, "lm") == "you may not use the account lm; yours: llm, vision"


def test_a_site_that_does_not_enforce_accounts_takes_any(slurm: Path):
    (slurm / "scontrol").write_text('#!/bin/sh\necho "AccountingStorageEnforce = none"\n')
    assert why(1, 20, None, "lm") == ""


@pytest.mark.parametrize("answer", ["exit 1", 'echo "slurm_load_partitions: Unable to contact"', 'echo "a|b|c|d"'])
def test_a_slurm_that_does_not_answer_refuses_nothing(slurm: Path, tmp_path: Path, answer: str):
    (slurm / "sinfo").write_text(f"#!/bin/sh\n{answer}\n")
    with pytest.raises(SchedulerUnavailable):
        why(1, 20, None, None)
    (tmp_path / "opt-ops.toml").write_text('scheduler = "slurm"\n')
    done = opt_ops(tmp_path, "run", "start", "opt-tiny", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "nodes and limits of Slurm were not checked: sinfo" in done.stderr


def test_on_slurm_too_nothing_is_left_behind(slurm: Path, tmp_path: Path):
    (tmp_path / "opt-ops.toml").write_text('scheduler = "slurm"\n[slurm]\npartition = "trian"\n')
    done = opt_ops(tmp_path, "run", "start", "opt-tiny")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Slurm has no partition trian; did you mean train?" in done.stderr
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "submitted").exists()


def test_a_request_that_cannot_be_written_leaves_no_lineage(tmp_path: Path):
    done = opt_ops(tmp_path, "run", "start", "opt-tiny", LOGNAME=os.fsdecode(b"\xff"))
    assert done.returncode == 2, done.stderr
    assert "is no Unicode text" in done.stderr
    assert not list((tmp_path / "runs").glob("[0-9]*"))
