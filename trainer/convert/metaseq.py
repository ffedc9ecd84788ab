"""Read checkpoints of metaseq: one file, model-parallel parts, or parts in flat shards of fairscale's FSDP.

Names end in ``-model_part-<i>-shard<j>.pt``; either may be missing. ``model`` in a file holds the weights. If they are
flat, ``shard_metadata`` lists the parameters of a shard in their order, and the padding at its end. It is made by
fairscale 0.4, ``FullyShardedDataParallel.local_metadata_dict``. In each part, the fused projection of attention holds
keys, values and queries in this order.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.console import print_line
from trainer.convert import pickles
from trainer.convert.weights import EMBEDDINGS, StoredParameter, Weights, checked, shape_of
from trainer.errors import UserError
from trainer.recipes import PUBLISHED

_NAME = re.compile(r"(?P<stem>.+?)(?:-model_part-(?P<part>\d+))?(?:-shard(?P<shard>\d+))?\.pt")
_RENAMED = {"layer_norm": "final_layer_norm", "project_in_dim": "project_in", "project_out_dim": "project_out"}
_DROPPED = {"version"}
_OUTPUT = "output_projection.weight"
_FUSED = ("k_proj", "v_proj", "q_proj")

# The dimension along which the model-parallel parts of a parameter are joined. Every part holds the others whole.
_JOINED = {
    re.compile(r"layers\.\d+\.(self_attn\.[qkv]_proj|fc1)\.(weight|bias)|embed_tokens\.weight"): 0,
    re.compile(r"layers\.\d+\.(self_attn\.out_proj|fc2)\.weight"): 1,
}

# Parameters that all parts should hold alike may differ by rounding. A larger difference is reported.
_DRIFT = 1e-3


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of one checkpoint, by part and shard."""

    stem: str
    parts: Sequence[Sequence[Path]]


def is_here(path: Path) -> bool:
    """Whether ``path`` is a ``.pt`` file, a folder of such files, or the beginning of their names."""
    return bool(_candidates(path))


def read(path: Path, heads: int | None) -> Weights:
    """The OPT in the checkpoint ``path``.

    Args:
        path: a file, a folder with one checkpoint, or the beginning of the names of its files.
        heads: number of attention heads. The weights do not show it, so unpublished shapes need it.

    Raises:
        UserError: it is not an OPT, not complete, or its number of heads is unknown.
    """
    files = _files(path)
    parts = [_part(shards) for shards in files.parts]
    entries = {name: _joined(name, [_of_part(part, name, path) for part in parts]) for name in parts[0]}
    output = entries.pop(_OUTPUT, None)
    if output and not torch.equal(output.load(), entries[EMBEDDINGS].load()):
        raise UserError(f"{path}: {_OUTPUT} differs from the input embedding, but in OPT they are the same matrix.")
    shapes = {name: entry.shape for name, entry in entries.items()}
    config = shape_of(shapes, 1, path)
    known = {
        (model.num_layers, model.hidden_size): model.num_heads
        for model in (recipe().model for recipe in PUBLISHED.values())
    }
    heads = heads or known.get((config.num_layers, config.hidden_size))
    if not heads:
        raise UserError(
            f"{path}: no published OPT has {config.num_layers} layers of {config.hidden_size}, and the weights do not "
            "show the number of attention heads: add --heads."
        )
    shards = len(files.parts[0])
    origin = f"metaseq, {len(parts)} model part(s)" + (f" of {shards} flat shards" if shards > 1 else "")
    return checked(Weights(origin, shape_of(shapes, heads, path), entries), path)


def _candidates(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.pt"))
    if path.is_file():
        return [path] if path.suffix == ".pt" else []
    return sorted(file for file in path.parent.glob("*.pt") if file.name.startswith(path.name))


def _files(path: Path) -> _Files:
    by_stem: dict[str, dict[tuple[int, int], Path]] = {}
    for file in _candidates(path):
        match = _NAME.fullmatch(file.name)
        assert match is not None
        by_stem.setdefault(match["stem"], {})[int(match["part"] or 0), int(match["shard"] or 0)] = file
    if len(by_stem) > 1:
        raise UserError(f"{path} holds several checkpoints: {', '.join(sorted(by_stem))}. Name one: {path}/NAME.")
    ((stem, found),) = by_stem.items()
    parts, shards = (1 + max(index[axis] for index in found) for axis in (0, 1))
    missing = [(part, shard) for part in range(parts) for shard in range(shards) if (part, shard) not in found]
    if missing:
        part, shard = missing[0]
        raise UserError(
            f"{path}: {len(missing)} of {parts} × {shards} files of {stem} are missing. The first of them is part "
            f"{part}, shard {shard}. Files after the last part or shard that is there would not be noticed, so compare "
            "with the source that you copied from."
        )
    return _Files(stem, [[found[part, shard] for shard in range(shards)] for part in range(parts)])


def _part(shards: Sequence[Path]) -> dict[str, StoredParameter]:
    """The parameters of one model part by our names. The fused projection is split."""
    contents = [pickles.load(file) for file in shards]
    weights: list[dict[str, Any]] = []
    for content, file in zip(contents, shards, strict=True):
        found = content.get("model", content) if isinstance(content, dict) else None
        if not found or not isinstance(found, dict):
            raise UserError(f"{file} holds no weights.")
        weights.append({name: value for name, value in found.items() if isinstance(value, Tensor)})
    if any("flat_param" in name for name in weights[0]):
        metadata = [content.get("shard_metadata") for content in contents]
        whole = _unflattened(weights, metadata, shards)
    elif len(shards) > 1:
        raise UserError(f"{shards[0]} is one of {len(shards)} shards, but its parameters are not flat.")
    else:
        whole = {name: _entry(tensor, partial(torch.as_tensor, tensor)) for name, tensor in weights[0].items()}
    parameters: dict[str, StoredParameter] = {}
    for name, entry in whole.items():
        ours = _our_name(name)
        if ours in _DROPPED:
            continue
        if ".qkv_proj." in ours:
            rows = entry.shape[0] // 3
            for index, projection in enumerate(_FUSED):
                shape = (rows, *entry.shape[1:])
                load = partial(_third, entry, index * rows, rows)
                parameters[ours.replace("qkv_proj", projection)] = StoredParameter(shape, entry.dtype, load)
        else:
            parameters[ours] = entry
    return parameters


def _entry(tensor: Tensor, load: Callable[[], Tensor]) -> StoredParameter:
    return StoredParameter(tuple(tensor.shape), tensor.dtype, load)


def _our_name(name: str) -> str:
    parts = [part for part in name.split(".") if part not in {"_fsdp_wrapped_module", "_fpw_module"}]
    if parts[0] == "decoder":
        parts = parts[1:]
    return ".".join([_RENAMED.get(parts[0], parts[0]), *parts[1:]])


def _unflattened(
    weights: Sequence[Mapping[str, Tensor]], metadata: Sequence[Any], files: Sequence[Path]
) -> dict[str, StoredParameter]:
    """Each parameter as a part of the flat parameter that contains it."""
    if not all(metadata):
        raise UserError(
            f"{files[0]}: its parameters are flat, and without shard_metadata it is unknown where each begins. "
            "Convert the shards from before they were merged, or the consolidated checkpoint."
        )
    entries: dict[str, StoredParameter] = {}
    aliases: dict[str, str] = {}
    try:
        for index, wrapper in enumerate(metadata[0]["param_metadata"]):
            prefix = f"{wrapper['fsdp_path']}." if wrapper["fsdp_path"] else ""
            for flat, about in wrapper["params"].items():
                paddings = [shard["param_metadata"][index]["params"][flat]["padding"] for shard in metadata]
                pieces = [
                    shard[prefix + flat][: shard[prefix + flat].numel() - padding]
                    for shard, padding in zip(weights, paddings, strict=True)
                ]
                start = 0
                for name, shape, numel in zip(about["names"], about["shapes"], about["numels"], strict=True):
                    load = partial(_stretch, pieces, start, numel, tuple(shape))
                    entries[prefix + name] = StoredParameter(tuple(shape), pieces[0].dtype, load)
                    start += numel
                if start != (held := sum(piece.numel() for piece in pieces)):
                    raise UserError(f"{files[0]}: {prefix}{flat} has {held} elements in all shards, not {start}.")
            aliases |= {copy: source for source, copy in wrapper.get("shared_param_info", ())}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{files[0]}: its shard_metadata does not fit its weights ({error!r}).") from error
    return entries | {copy: entries[source] for copy, source in aliases.items() if source in entries}


def _stretch(pieces: Sequence[Tensor], start: int, numel: int, shape: tuple[int, ...]) -> Tensor:
    """Elements ``start`` to ``start + numel`` of the concatenated ``pieces``."""
    found: list[Tensor] = []
    for piece in pieces:
        found.append(piece[max(0, start) : max(0, start + numel)])
        start -= piece.numel()
    return torch.cat(found).view(shape)


def _third(entry: StoredParameter, first: int, rows: int) -> Tensor:
    return entry.load()[first : first + rows]


def _of_part(part: Mapping[str, StoredParameter], name: str, path: Path) -> StoredParameter:
    if name not in part:
        raise UserError(f"{path}: {name} is not in all model parts.")
    return part[name]


def _joined(name: str, parts: Sequence[StoredParameter]) -> StoredParameter:
    if len(parts) == 1:
        return parts[0]
    dim = next((dim for pattern, dim in _JOINED.items() if pattern.fullmatch(name)), None)
    if name == _OUTPUT:
        dim = 0
    if dim is None:
        return StoredParameter(parts[0].shape, parts[0].dtype, partial(_common, name, parts))
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return StoredParameter(tuple(shape), parts[0].dtype, partial(_concatenated, parts, dim))


def _concatenated(parts: Sequence[StoredParameter], dim: int) -> Tensor:
    return torch.cat([part.load() for part in parts], dim)


def _common(name: str, parts: Sequence[StoredParameter]) -> Tensor:
    first, *others = (part.load() for part in parts)
    drift = max((other.float() - first.float()).abs().max().item() for other in others)
    if not drift <= _DRIFT:
        print_line(f"note: {name} differs between model parts by up to {drift:.2g}; the first part is used", sys.stderr)
    return first
