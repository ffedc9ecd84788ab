"""Weights survive every way from one format to another, and compute the same."""

import json
import os
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from opt_ops.contract import manifest
from tests.trainer.convert_files import SHAPES, flat_shards, hugging_face, metaseq_names, save_metaseq
from tests.trainer.own_model import model_of
from tests.trainer.plain_opt import PlainOPT
from trainer.convert import huggingface, native, pickles
from trainer.convert.__main__ import main, read
from trainer.convert.weights import Weights
from trainer.errors import UserError


def logits_of(weights: Weights) -> Tensor:
    """What this trainer's model computes with them, for :func:`tokens`."""
    model = model_of(weights)
    with torch.no_grad():
        return model(tokens(weights.config.vocab_size))[0][..., : weights.config.vocab_size]


def tokens(vocab_size: int) -> Tensor:
    return torch.randint(4, vocab_size, (2, 33), generator=torch.Generator().manual_seed(3))


def their_logits(model: "transformers.OPTForCausalLM") -> Tensor:
    with torch.no_grad():
        return model(tokens(model.config.vocab_size)).logits


def state(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_hugging_face_to_ours_and_back(shape: str, tmp_path: Path) -> None:
    model = hugging_face(shape)
    model.save_pretrained(tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "native"), "--to", "native"]) == 0
    ours = read(tmp_path / "native")
    torch.testing.assert_close(logits_of(ours), their_logits(model), rtol=0, atol=1e-5)

    assert main([str(tmp_path / "native"), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert same(state(tmp_path / "hf"), state(tmp_path / "back"))
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(their_logits(again.eval()), their_logits(model))
    kept = ("vocab_size", "hidden_size", "word_embed_proj_dim", "do_layer_norm_before", "num_attention_heads")
    assert {key: getattr(again.config, key) for key in kept} == {key: getattr(model.config, key) for key in kept}


@pytest.mark.parametrize(("parts", "shards"), [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("shape", ["pre-LN", "350M"])
def test_metaseq_to_ours(shape: str, parts: int, shards: int, tmp_path: Path) -> None:
    model = hugging_face(shape)
    source = save_metaseq(tmp_path / "metaseq", model, parts, shards)
    assert main([str(source), str(tmp_path / "native"), "--to", "native", "--heads", "4"]) == 0
    torch.testing.assert_close(logits_of(read(tmp_path / "native")), their_logits(model), rtol=0, atol=1e-5)
    assert main([str(source / "checkpoint_last"), str(tmp_path / "hf"), "--to", "hf", "--heads", "4"]) == 0
    model.save_pretrained(tmp_path / "expected")
    assert same(state(tmp_path / "hf"), state(tmp_path / "expected"))


@pytest.mark.filterwarnings("ignore")
def test_the_shards_of_these_tests_are_what_fairscale_writes() -> None:
    """Its own function puts them together again."""
    fairscale = pytest.importorskip("fairscale.nn.data_parallel", reason="fairscale is not installed")
    whole = metaseq_names(hugging_face("350M"))
    del whole["decoder.output_projection.weight"]  # shared: saved once
    shards = flat_shards(whole, 3)
    together = fairscale.FullyShardedDataParallel.consolidate_shard_weights(
        [shard["model"] for shard in shards], [shard["shard_metadata"] for shard in shards]
    )
    assert same(together, whole)


def test_the_fused_projection_has_keys_values_queries(tmp_path: Path) -> None:
    model = hugging_face("pre-LN")
    source = save_metaseq(tmp_path / "metaseq", model, 2, 1)
    entries = read(source / "checkpoint_last", heads=4).entries
    attention = model.model.decoder.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(entries[f"layers.1.self_attn.{name}.weight"].load(), getattr(attention, name).weight)
        assert torch.equal(entries[f"layers.1.self_attn.{name}.bias"].load(), getattr(attention, name).bias)


def test_old_names_pickles_and_shards_of_hugging_face_are_read(tmp_path: Path) -> None:
    """The released files: fp16, ``pytorch_model.bin`` in shards, some without ``model.``, some with the tied copy."""
    model = hugging_face("pre-LN").half()
    model.save_pretrained(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    content = {name.removeprefix("model."): p.detach() for name, p in model.named_parameters()}
    content["lm_head.weight"] = content["decoder.embed_tokens.weight"]
    names = list(content)
    files = {"pytorch_model-00001-of-00002.bin": names[:20], "pytorch_model-00002-of-00002.bin": names[20:]}
    for file, held in files.items():
        torch.save({name: content[name] for name in held}, old / file, _use_new_zipfile_serialization=file[20] == "1")
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert main([str(old), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert same(state(tmp_path / "new"), state(tmp_path / "back"))


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    model = hugging_face("pre-LN")
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "shards").mkdir()
    huggingface.write(read(tmp_path / "hf"), tmp_path / "shards", None, lambda _: None, max_shard_bytes=70_000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards").eval()
    assert torch.equal(their_logits(again), their_logits(model))
    assert main([str(tmp_path / "shards"), str(tmp_path / "whole"), "--to", "hf"]) == 0
    assert same(state(tmp_path / "whole"), state(tmp_path / "hf"))


def test_another_dtype_on_request(tmp_path: Path) -> None:
    hugging_face("pre-LN").save_pretrained(tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "half"), "--to", "hf", "--dtype", "fp16"]) == 0
    assert {tensor.dtype for tensor in state(tmp_path / "half").values()} == {torch.float16}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_progress_of_a_small_model_is_in_megabytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hugging_face("pre-LN").save_pretrained(tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "native"), "--to", "native"]) == 0
    assert re.search(r"^100 % of 0\.2\d MB$", capsys.readouterr().err, re.MULTILINE)


def test_what_is_written_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    hugging_face("350M").save_pretrained(tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "native"), "--to", "native"]) == 0
    found = manifest.verify(tmp_path / "native")
    assert found.model is not None
    assert found.model["vocab_size"] == 500
    shards = next((tmp_path / "native").glob("*.distcp"))
    content = bytearray(shards.read_bytes())
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)
    assert main([str(tmp_path / "native"), str(tmp_path / "back"), "--to", "hf"]) == 65


def test_padding_is_not_exported(tmp_path: Path) -> None:
    hugging_face("odd vocabulary").save_pretrained(tmp_path / "hf")
    main([str(tmp_path / "hf"), str(tmp_path / "native"), "--to", "native"])
    metadata = native.CheckpointReader(tmp_path / "native").read_metadata().state_dict_metadata
    assert tuple(metadata["model.embed_tokens.weight"].size) == (640, 32)  # pyright: ignore[reportAttributeAccessIssue]
    main([str(tmp_path / "native"), str(tmp_path / "back"), "--to", "hf"])
    assert state(tmp_path / "back")["model.decoder.embed_tokens.weight"].shape == (515, 32)


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_file_can_run_code(name: str, zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    hugging_face("pre-LN").config.save_pretrained(folder)
    content = {"model": {"decoder.embed_tokens.weight": torch.ones(2)}, "cfg": Malice(tmp_path / "harmed")}
    torch.save(content, folder / name, _use_new_zipfile_serialization=zipped)
    assert main([str(folder), str(tmp_path / "out"), "--to", "native"]) == 78
    assert not (tmp_path / "harmed").exists()
    assert not (tmp_path / "out").exists()
    assert name in capsys.readouterr().err


def test_no_checkpoint_can_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whose manifest is right: whoever made it meant harm."""
    hugging_face("pre-LN").save_pretrained(tmp_path / "hf")
    main([str(tmp_path / "hf"), str(tmp_path / "native"), "--to", "native"])
    folder = tmp_path / "native"
    header = json.loads((folder / manifest.MANIFEST).read_text())
    (folder / ".metadata").write_bytes(pickle.dumps(Malice(tmp_path / "harmed")))
    (folder / manifest.MARKER).unlink()
    manifest.write_rank(folder, 0, header["files"])
    known = manifest.Manifest.__dataclass_fields__.keys() - {"files"}
    header = {name: value for name, value in header.items() if name in known}
    manifest.commit(folder, ranks=1, deadline_seconds=0, header=header)
    assert main([str(folder), str(tmp_path / "out"), "--to", "hf"]) == 65
    assert "it calls posix.mkdir" in capsys.readouterr().err
    assert not (tmp_path / "harmed").exists()


def test_settings_of_other_libraries_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metaseq's files hold omegaconf objects. They are loaded without omegaconf, and without running its code."""
    module = types.ModuleType("omegaconf.dictconfig")
    kind = type("DictConfig", (), {"__module__": module.__name__, "__qualname__": "DictConfig"})
    module.DictConfig = kind  # pyright: ignore[reportAttributeAccessIssue]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
        patch.setitem(sys.modules, module.__name__, module)
        settings = kind()
        settings._content = {"model": kind(), "lr": [0.1]}
        torch.save({"cfg": settings, "model": {"a": torch.arange(3)}}, tmp_path / "file.pt")
    assert pickles.load(tmp_path / "file.pt")["model"]["a"].tolist() == [0, 1, 2]


def bad(folder: Path, change: str) -> Path:
    """Something that is no whole OPT."""
    source = folder / "source"
    model = hugging_face("pre-LN")
    if change.startswith("metaseq"):
        save_metaseq(source, model, 2, 3)
    else:
        model.save_pretrained(source)
    config = source / "config.json"
    weights = source / "model.safetensors"
    if change == "metaseq: a shard is gone":
        (source / "checkpoint_last-model_part-1-shard0.pt").unlink()
    elif change == "metaseq: two checkpoints":
        (source / "checkpoint_1-model_part-0.pt").write_bytes(b"")
    elif change == "metaseq: a torn shard":
        torn = source / "checkpoint_last-model_part-1-shard1.pt"
        torn.write_bytes(torn.read_bytes()[:-700])
    elif change == "metaseq: merged without metadata":
        for file in source.glob("*.pt"):
            content = torch.load(file, weights_only=False)
            del content["shard_metadata"]
            torch.save(content, file)
    elif change == "metaseq: not tied":
        for file in source.glob("*.pt"):
            file.unlink()
        state = metaseq_names(model)
        state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"] + 1
        torch.save({"model": state}, source / "consolidated.pt")
    elif change == "another architecture":
        config.write_text(config.read_text().replace('"opt"', '"llama"'))
    elif change == "gelu":
        config.write_text(config.read_text().replace('"relu"', '"gelu"'))
    elif change == "a tensor is gone":
        tensors = load_file(weights)
        del tensors["model.decoder.layers.2.fc1.bias"]
        save_file(tensors, weights)
    elif change == "not tied":
        save_file({**load_file(weights), "lm_head.weight": torch.zeros(512, 32)}, weights)
    elif change == "a torn file":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "an index that leads elsewhere":
        weights.unlink()
        index = {"weight_map": {"a": "../../etc/passwd"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    elif change == "a config that is none":
        config.write_text("{")
    return source


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("metaseq: a shard is gone", r"1 of 2 × 3 files of checkpoint_last are missing.* part 1, shard 0"),
        ("metaseq: two checkpoints", "several checkpoints: checkpoint_1, checkpoint_last"),
        ("metaseq: a torn shard", "shard1.pt cannot be read as weights"),
        ("metaseq: merged without metadata", "without shard_metadata"),
        ("metaseq: not tied", "differs from the input embedding"),
        ("metaseq: nothing wrong", "add --heads"),
        ("another architecture", "its model_type is 'llama'"),
        ("gelu", "activation_function is 'gelu'"),
        ("a tensor is gone", r"layers\.2\.fc1\.bias is absent there"),
        ("not tied", "input and output embeddings differ"),
        ("a torn file", "model.safetensors cannot be read"),
        ("an index that leads elsewhere", "is not the name of a file in the same folder"),
        ("a config that is none", "config.json cannot be read"),
    ],
)
def test_what_is_no_whole_opt_is_explained(change: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        read(bad(tmp_path, change))


def test_an_unknown_source_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither a step-"):
        read(tmp_path)
    (tmp_path / "step-00000010").mkdir()
    with pytest.raises(UserError, match=r"several checkpoints: name one, such as .*step-00000010"):
        read(tmp_path)


def test_nothing_is_written_over_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hugging_face("pre-LN").save_pretrained(tmp_path / "hf")
    (tmp_path / "there").mkdir()
    assert main([str(tmp_path / "hf"), str(tmp_path / "there"), "--to", "native"]) == 78

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "save_file", full)
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "there"]


def test_the_tokenizer_puts_the_end_of_a_document_first(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["some text"], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    hugging_face("pre-LN").save_pretrained(tmp_path / "hf")
    arguments = [str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf", "--tokenizer"]
    assert main([*arguments, str(tmp_path / "tokenizer.json")]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = theirs("some text").input_ids
    assert ids == [2, *tokenizer.encode("some text", add_special_tokens=False).ids]
    assert theirs.decode(ids, skip_special_tokens=True) == "some text"


@pytest.mark.parametrize("shape", ["pre-LN", "350M"])
def test_the_plain_reference_of_benchmarks_is_the_same_model(shape: str, tmp_path: Path) -> None:
    model = hugging_face(shape)
    model.save_pretrained(tmp_path / "hf")
    weights = read(tmp_path / "hf")
    reference = PlainOPT(weights.config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            content = weights.entries[name].load()
            parameter.zero_()
            parameter[: len(content)] = content
        found = reference.logits(tokens(weights.config.vocab_size))[..., : weights.config.vocab_size]
    torch.testing.assert_close(found, their_logits(model), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, logits_of(weights), rtol=0, atol=1e-5)
