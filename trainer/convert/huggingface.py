"""Hugging Face's format of OPT: ``config.json`` with safetensors or ``pytorch_model.bin``, in one file or in shards."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.convert import pickles
from trainer.convert.weights import EMBEDDINGS, StoredParameter, Weights, checked, read_json
from trainer.data import tokens
from trainer.data.corpus import Corpus
from trainer.errors import UserError
from trainer.model.opt import PADDING_TOKEN
from trainer.recipes import ModelConfig

# In order of preference. An index names the files of a model in shards.
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PREFIX = "model.decoder."
_OUTPUT = "lm_head.weight"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

# Settings that all released OPT models share. The value also stands for a missing key.
_REQUIRED = {
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}

_START = 2  # </s>, which also ends a document
_TOKENS = {"bos_token_id": _START, "eos_token_id": _START, "pad_token_id": PADDING_TOKEN}

MAX_SHARD_BYTES = 5 * 10**9


def is_here(path: Path) -> bool:
    """Whether ``path`` is a folder with a Hugging Face model."""
    return (path / "config.json").is_file() and any((path / name).is_file() for name in _FILES)


def read(path: Path) -> Weights:
    """The OPT in the folder ``path``.

    Raises:
        UserError: it is not an OPT, or not complete.
    """
    config = _model_config(read_json(path / "config.json"), path)
    first = next(name for name in _FILES if (path / name).is_file())
    files = _files_of_index(path / first) if first.endswith(".index.json") else [path / first]
    entries: dict[str, StoredParameter] = {}
    for file in files:
        for name, entry in _entries(file):
            entries[_our_name(name)] = entry
    output = entries.pop(_OUTPUT, None)
    if output and not (
        EMBEDDINGS in entries and output.shape == entries[EMBEDDINGS].shape and _equal(output, entries[EMBEDDINGS])
    ):
        raise UserError(f"{path}: input and output embeddings differ, but in OPT they are the same matrix.")
    return checked(Weights(f"Hugging Face OPT, {first}", config, entries), path)


def write(
    weights: Weights, folder: Path, dtype: torch.dtype | None, progress: Callable[[int], None], max_shard_bytes: int
) -> None:
    """Write the model into the empty ``folder``, in the format that ``transformers`` and vLLM read.

    Args:
        weights: what to write.
        folder: where. The caller renames it when it is complete.
        dtype: of the parameters; None keeps theirs.
        progress: called with the bytes of each parameter that was written.
        max_shard_bytes: size limit of a file. A single parameter may be larger.

    Raises:
        OSError: a file cannot be written.
    """
    shards = list(_shards(weights, dtype, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensor = weights.entries[name].load()
            tensors[_PREFIX + name] = (tensor.to(dtype) if dtype else tensor).contiguous()
            weight_map[_PREFIX + name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
        for tensor in tensors.values():
            progress(tensor.nbytes)
    if len(shards) > 1:
        total = sum(_bytes(entry, dtype) for entry in weights.entries.values())
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    stored = dtype or weights.entries[EMBEDDINGS].dtype
    _write_json(folder / "config.json", _hugging_face_config(weights.config, stored))
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **_TOKENS})


def write_tokenizer(path: Path | None, folder: Path, config: ModelConfig, corpora: Sequence[Corpus] = ()) -> None:
    """Write a tokenizer into ``folder``. It puts ``</s>`` first, as OPT was trained.

    Args:
        path: of the tokenizer; None for the one that was trained on ``corpora``.
        folder: with the weights.
        config: of the model.
        corpora: what it was trained on.

    Raises:
        UserError: it is not a tokenizer, or does not fit this model.
    """
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(tokens.find(path, corpora, config.vocab_size).text)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", _START)])  # pyright: ignore[reportAttributeAccessIssue]  a property that its stub lacks
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_positions, **names}
    _write_json(folder / "tokenizer_config.json", about)


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def _entries(file: Path) -> Iterator[tuple[str, StoredParameter]]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  it is not a dict
                    part = opened.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise UserError(
                            f"{file}: {name} has the type {part.get_dtype()}: quantised weights are not supported."
                        )
                    yield name, StoredParameter(tuple(part.get_shape()), dtype, partial(_tensor, file, name))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}.") from error
    else:
        content = pickles.load(file)
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(f"{file} is not a dictionary of tensors.")
        for name, tensor in content.items():
            yield name, StoredParameter(tuple(tensor.shape), tensor.dtype, partial(torch.as_tensor, tensor))


def _files_of_index(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map.")
    files = sorted(set(names.values()))
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: {name!r} is not the name of a file in the same folder.")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} is missing, but {index.name} names it.")
    return [index.parent / name for name in files]


def _our_name(name: str) -> str:
    """The name without its prefix: ``model.decoder.`` in released files, ``decoder.`` in older ones."""
    return name.removeprefix("model.").removeprefix("decoder.")


def _equal(one: StoredParameter, other: StoredParameter) -> bool:
    return torch.equal(one.load(), other.load())


def _model_config(content: dict[str, Any], path: Path) -> ModelConfig:
    if content.get("model_type") != "opt":
        raise UserError(f"{path}: its model_type is {content.get('model_type')!r}; only OPT can be converted.")
    try:
        size, width = content["hidden_size"], content.get("word_embed_proj_dim") or content["hidden_size"]
        config = ModelConfig(
            vocab_size=content["vocab_size"],
            max_positions=content["max_position_embeddings"],
            num_layers=content["num_hidden_layers"],
            hidden_size=size,
            num_heads=content["num_attention_heads"],
            dropout=content.get("dropout", 0.1),
            init_std=content.get("init_std", 0.02),
            norm="pre" if content.get("do_layer_norm_before", True) else "post",
            embed_size=0 if width == size else width,
        )
        required = _REQUIRED | {"ffn_dim": 4 * size}
    except KeyError as error:
        raise UserError(f"{path}/config.json has no {error.args[0]}.") from None
    for key, value in required.items():
        if (found := content.get(key, value)) != value:
            raise UserError(
                f"{path}/config.json: {key} is {found!r}; every OPT has {value!r}, and only that can be converted."
            )
    return config


def _hugging_face_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_dim": 4 * config.hidden_size,
        "num_attention_heads": config.num_heads,
        "word_embed_proj_dim": config.embedding_width,
        "do_layer_norm_before": config.norm == "pre",
        **_REQUIRED,
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": config.init_std,
        "tie_word_embeddings": True,
        "use_cache": True,
        **_TOKENS,
        "prefix": "</s>",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _shards(weights: Weights, dtype: torch.dtype | None, max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, entry in weights.entries.items():
        more = _bytes(entry, dtype)
        if names and size + more > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _bytes(entry: StoredParameter, dtype: torch.dtype | None) -> int:
    return torch.Size(entry.shape).numel() * (dtype or entry.dtype).itemsize


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
