"""``--check`` refuses what training would refuse, before anything heavy is imported; what it accepts makes its step."""

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opt_ops.contract import manifest
from opt_ops.contract.manifest import CheckpointError
from tests.trainer.harness import REPOSITORY, SMALL, Ranks, engine_of, train
from trainer import recipes
from trainer.check import check
from trainer.data import dataset
from trainer.errors import UserError
from trainer.parallel import mesh


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPT_OPS_CACHE", str(tmp_path / "cache"))


def ask(*words: str | Path, world: int = 1) -> subprocess.CompletedProcess[str]:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return subprocess.run(
        [sys.executable, "-m", "trainer", "--check", *map(str, words)],
        cwd=REPOSITORY,
        env=os.environ | place,
        capture_output=True,
        text=True,
        timeout=120,
    )


def spent() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def corpus(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(
    ("words", "world", "why"),
    [
        (["--recipe", "opt-tny"], 1, "no recipe is called 'opt-tny'. Did you mean opt-tiny?"),
        (["--recipe", "opt-tiny", "--set", "step=3"], 1, "no setting is called 'step'. Did you mean steps"),
        (["--recipe", "opt-tiny", "--set", "steps=many"], 1, "'many' is not a whole number"),
        (["--recipe", "opt-tiny", "--set", "optim.peak_lr=inf"], 1, "optim.peak_lr must be a finite number"),
        (["--recipe", "opt-tiny", "--set", "parallel.tp=3"], 4, "4 processes cannot form"),
        (["--recipe", "opt-tiny"], 9, "leaves some of 9 data-parallel ranks without a sequence"),
        (
            ["--recipe", "opt-tiny", "--set", "engine=fairscale", "--set", "parallel.offload=true"],
            1,
            "engine=fairscale",
        ),
        (["--recipe", "opt-tiny", "--set", "model.vocab_size=259"], 1, "less than the 260 tokens"),
        (["--recipe", "opt-tiny", "--data", "/no/such"], 1, "/no/such: no such file or folder"),
        (["--recipe", "opt-tiny", "--data", "/dev/null"], 1, "/dev/null: neither a file nor a folder"),
        (["--recipe", "opt-tiny", "--tokenizer", "/no/such"], 1, "--tokenizer /no/such: expected"),
        (["--recipe", "opt-tiny", "--lr-factor", "1:x"], 1, "--lr-factor 1:x"),
        (["--recipe", "opt-tiny", "--nonsense"], 1, "unrecognized arguments: --nonsense"),
        ([], 1, "--recipe is required"),
    ],
)
def test_what_training_would_refuse_is_refused_within_two_seconds(words: list[str], world: int, why: str) -> None:
    before = spent()
    done = ask(*words, world=world)
    assert (done.returncode, done.stdout) == (78, "")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
    assert spent() - before < 2.0  # of the processors, since others may use them too


def test_what_is_right_is_accepted_and_nothing_is_written(tmp_path: Path, text: Path) -> None:
    before = spent()
    folders = ["--run-dir", tmp_path / "a1", "--checkpoint-dir", tmp_path / "c", "--from-scratch"]
    done = ask("--recipe", "opt-tiny", "--set", "parallel.tp=2", "--data", text, *folders, world=8)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "opt-tiny: nothing is wrong; ranks 8 (dp 4 × tp 2)\n"
    assert list(tmp_path.iterdir()) == []
    assert spent() - before < 2.0


def test_no_torch_is_imported() -> None:
    program = (
        "import sys, trainer.check; from trainer import recipes; trainer.check.check(recipes.build('opt-tiny'), 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; print('torch' in sys.modules)"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


def test_without_torch_it_says_so_in_one_line() -> None:
    program = (
        "import sys, runpy, importlib.util as u; real = u.find_spec;"
        "u.find_spec = lambda name, *rest: None if name in ('torch', 'numpy') else real(name, *rest);"
        "sys.argv = ['trainer', '--recipe', 'opt-tiny', '--run-dir', 'a', '--checkpoint-dir', 'c', *sys.argv[1:]];"
        "runpy.run_module('trainer', run_name='__main__', alter_sys=True)"
    )
    for words in ([], ["--check"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 78
        assert done.stderr.startswith("error: torch, numpy are not installed for ")
        assert "pip install 'opt-ops[trainer]'" in done.stderr
        assert done.stderr.count("\n") == 1


def test_lines_that_are_no_documents_are_refused_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"txt": "renamed"}\n' * 50)
    with pytest.raises(UserError, match=r"bad\.jsonl:1: not a JSON object with a string \"text\""):
        check(recipes.build("opt-tiny"), 1, data=[str(path)])


def test_two_corpora_need_weights(tmp_path: Path) -> None:
    one, two = corpus(tmp_path / "a.jsonl", "a " * 500), corpus(tmp_path / "b.jsonl", "b " * 500)
    with pytest.raises(UserError, match="needs a weight above 0"):
        check(recipes.build("opt-tiny"), 1, data=[f"a={one}:0.5", f"b={two}"])
    check(recipes.build("opt-tiny"), 1, data=[f"a={one}:0.5", f"b={two}:0.5"])


def test_a_checkpoint_to_resume_from_is_looked_at(tmp_path: Path, text: Path) -> None:
    recipe = recipes.build("opt-tiny")
    with pytest.raises(CheckpointError, match="no such folder"):
        check(recipe, 1, resume=tmp_path / "step-00000010")
    places = ["--run-dir", tmp_path / "a1", "--checkpoint-dir", tmp_path / "c"]
    small = [word for setting in (*SMALL, "steps=1") for word in ("--set", setting)]
    (done,) = train(0, "--recipe", "opt-tiny", *small, *places, "--data", text)
    assert done.returncode == 0, done.stderr
    saved = manifest.step_folder(tmp_path / "c", 1)
    check(recipes.build("opt-tiny", [*SMALL]), 1, resume=saved)
    with pytest.raises(UserError, match=r"holds another model: its vocab_size is 512, not 2048"):
        check(recipe, 1, resume=saved)
    with pytest.raises(UserError, match=r"holds another model: its num_layers is 2, not 3"):
        check(recipes.build("opt-tiny", [*SMALL, "model.num_layers=3"]), 1, resume=saved)
    (saved / "manifest.json").write_text("{}")
    assert ask("--recipe", "opt-tiny", "--resume", saved).returncode == 65


def accepts(recipe: recipes.Recipe, world: int, data: list[str]) -> bool:
    try:
        check(recipe, world, data=data)
    except UserError:
        return False
    return True


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(words=st.lists(st.text("abc ", max_size=8), max_size=12), seq_len=st.integers(1, 32))
def test_of_short_data_it_accepts_exactly_what_training_accepts(tmp_path: Path, words: list[str], seq_len: int) -> None:
    recipe = recipes.build("opt-tiny", [*SMALL, f"data.seq_len={seq_len}"])
    path = corpus(tmp_path / "short.jsonl", *words)
    try:
        dataset.load([str(path)], [], None, recipe).samples(seq_len, recipe.seed)
        trains = True
    except UserError:
        trains = False
    assert accepts(recipe, 1, [str(path)]) is trains


def first_step(changes: list[str], data: str) -> None:
    """What training does up to the end of its first step, and can refuse."""
    from trainer.step.measured import Progress
    from trainer.step.rank_inputs import StepInputs
    from trainer.step.step import forward_backward, measure

    recipe = recipes.build("opt-tiny", [*SMALL, *changes])
    engine = engine_of(recipe)
    samples = dataset.load([data], [], None, recipe).samples(recipe.data.seq_len, recipe.seed)
    measure(engine, forward_backward(engine, samples, recipe, Progress()), StepInputs(), parameter_norms=False)


def test_what_it_accepts_on_a_layout_makes_its_first_step(ranks: Ranks, text: Path) -> None:
    dice = random.Random(11)
    accepted = refused = 0
    while accepted < 10 or refused < 10:
        world = dice.choice([1, 2, 3, 4])
        changes = [
            f"parallel.tp={dice.choice([1, 2, 3, 4])}",
            f"model.num_heads={dice.choice([1, 2, 4])}",
            f"data.seq_len={dice.choice([16, 31, 32])}",
            f"data.global_batch={dice.choice([1, 2, 8])}",
            f"data.micro_batch={dice.choice([1, 3, 8])}",
            f"precision={dice.choice(['fp32', 'bf16'])}",
        ]
        recipe = recipes.build("opt-tiny", [*SMALL, *changes])
        if not accepts(recipe, world, [str(text)]):
            with pytest.raises(UserError):
                mesh.check_layout(recipe, world)
            refused += 1
        elif accepted < 10:
            ranks(world, first_step, changes, str(text))
            accepted += 1


def test_recipes_are_told_as_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "--recipes"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["recipe"] for each in told] == list(recipes.RECIPES)
    assert {*told[0]} == {"recipe", "parameters", "steps", "tokens", "seq_len", "tp", "about"}
