"""A run that begins with given weights: from Hugging Face into training, and out again."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from tests.trainer.convert_files import hugging_face
from tests.trainer.harness import settings, telemetry, train
from trainer import recipes
from trainer.convert.__main__ import main
from trainer.data import dataset

# The form of OPT-350M at toy size, as convert_files makes it; no dropout: another program's loss is compared.
SHAPE = (
    "model.vocab_size=500",
    "model.max_positions=40",
    "model.num_layers=3",
    "model.hidden_size=32",
    "model.norm=post",
    "model.embed_size=16",
    "model.dropout=0",
    "data.seq_len=32",
    "data.global_batch=8",
    "checkpoint_every=2",
)


def run(folder: Path, name: str, text: Path, *arguments: str | Path, world: int = 0, more: tuple[str, ...] = ()) -> int:
    checkpoints = folder / "checkpoints"
    common = ["--recipe", "opt-tiny", "--data", str(text), "--checkpoint-dir", checkpoints, "--run-dir", folder / name]
    done = train(world, *common, *settings(*SHAPE, *more), *arguments)
    (folder / f"{name}.err").write_text("".join(process.stderr for process in done))
    return max(process.returncode for process in done)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Hugging Face → ours → two updates → Hugging Face."""
    folder = tmp_path_factory.mktemp("init")
    hugging_face("350M").save_pretrained(folder / "hf")
    assert main([str(folder / "hf"), str(folder / "native"), "--to", "native"]) == 0
    assert run(folder, "a1", text, "--init-from", folder / "native", more=("steps=2",)) == 0
    return folder


def test_the_first_loss_is_that_of_the_given_weights(folder: Path, text: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    recipe = recipes.build("opt-tiny", SHAPE)
    data = dataset.load([str(text)], [], None, recipe).samples(recipe.data.seq_len, recipe.seed)
    inputs, targets = data.batch(0, recipe.data.global_batch)
    with torch.no_grad():
        expected = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).item()
    assert telemetry(folder / "a1")[0]["loss"] == pytest.approx(expected, abs=1e-5)
    config = json.loads((folder / "a1" / "config.json").read_text())
    assert config["init_from"] == str(folder / "native")
    assert (config["resume"], config["data"]["tokenizer"][:7]) == (None, "sha256:")


def test_what_was_trained_goes_back_to_hugging_face(folder: Path) -> None:
    trained = folder / "checkpoints" / "step-00000002"
    tokenizer = folder / "a1" / "tokenizer.json"
    assert main([str(trained), str(folder / "trained"), "--to", "hf", "--tokenizer", str(tokenizer)]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "trained").eval()
    first = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert not torch.equal(model.model.decoder.project_in.weight, first.model.decoder.project_in.weight)
    words = transformers.AutoTokenizer.from_pretrained(folder / "trained")
    ids = words("The assignment", return_tensors="pt").input_ids
    assert ids[0, 0] == 2
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_a_resumed_run_ignores_what_it_began_with(folder: Path, text: Path) -> None:
    resume = ("--resume", folder / "checkpoints" / "step-00000002")
    assert run(folder, "a2", text, *resume, "--init-from", folder / "native", world=2, more=("steps=4",)) == 0
    assert [line["num_updates"] for line in telemetry(folder / "a2")] == [3, 4]
    assert run(folder, "a3", text, *resume, "--init-from", folder / "gone", more=("steps=4",)) == 0


@pytest.mark.parametrize(
    ("arguments", "more", "why"),
    [
        (["--resume", "native"], (), "holds only weights"),
        (["--init-from", "native", "--from-scratch"], ("model.num_heads=8",), "its num_heads is 4"),
        (["--init-from", "native", "--from-scratch"], ("model.num_layers=2",), "holds another model: model.layers.2"),
        (["--init-from", "hf", "--from-scratch"], (), "no COMMITTED marker"),
    ],
)
def test_other_weights_are_refused(
    folder: Path, text: Path, arguments: list[str], more: tuple[str, ...], why: str
) -> None:
    name = "refused-" + "-".join([*arguments, *more]).replace("/", "")
    given = [folder / word if word in {"native", "hf"} else word for word in arguments]
    assert run(folder, name, text, *given, more=more) in {65, 78}
    assert why in (folder / f"{name}.err").read_text()
