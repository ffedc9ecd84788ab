"""Random OPT models in the formats that people have them in: made here, nothing is downloaded."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

# Every shape that a released OPT has, at toy size: the small ones' and the big ones', 350M's, and odd vocabularies.
SHAPES: dict[str, dict[str, Any]] = {
    "pre-LN": {},
    "odd vocabulary": {"vocab_size": 515},
    "350M": {"do_layer_norm_before": False, "word_embed_proj_dim": 16, "vocab_size": 500},
    "post-LN, not projected": {"do_layer_norm_before": False},
    "pre-LN, projected": {"word_embed_proj_dim": 16},
}


def hugging_face(shape: str) -> OPTForCausalLM:
    """A model with random weights, biases and norms among them, in fp32."""
    config = OPTConfig(
        **{
            "vocab_size": 512,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "ffn_dim": 128,
            "max_position_embeddings": 40,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            **SHAPES[shape],
        }
    )
    model = OPTForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.2, generator=generator)
    return model


def metaseq_names(model: OPTForCausalLM) -> dict[str, Tensor]:
    """The parameters of one whole model as metaseq names them: attention's three inputs fused, keys first."""
    state: dict[str, Tensor] = {"decoder.version": torch.tensor([3.0])}
    weights = {name.removeprefix("model."): p.detach().clone() for name, p in model.named_parameters()}
    for name, tensor in weights.items():
        renamed = name
        for ours, theirs in (
            ("decoder.final_layer_norm", "decoder.layer_norm"),
            ("project_in", "project_in_dim"),
            ("project_out", "project_out_dim"),
        ):
            renamed = renamed.replace(ours, theirs)
        if ".k_proj." in renamed:
            state[renamed.replace("k_proj", "qkv_proj")] = torch.cat(
                [weights[name.replace("k_proj", part)] for part in ("k_proj", "v_proj", "q_proj")]
            )
        elif ".v_proj." not in renamed and ".q_proj." not in renamed:
            state[renamed] = tensor
    state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    return state


def model_parts(whole: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Megatron's split: by rows, by columns, or not at all."""
    split: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for name, tensor in whole.items():
        if "qkv_proj" in name:
            thirds = [third.chunk(parts) for third in tensor.chunk(3)]
            pieces = [torch.cat(of_part) for of_part in zip(*thirds, strict=True)]
        elif "fc1" in name or name.endswith(("embed_tokens.weight", "output_projection.weight")):
            pieces = list(tensor.chunk(parts))
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            pieces = list(tensor.chunk(parts, dim=1))
        else:
            pieces = [tensor] * parts
        for part, piece in zip(split, pieces, strict=True):
            part[name] = piece.clone()
    return split


def flat_shards(part: dict[str, Tensor], shards: int) -> list[dict[str, Any]]:
    """What each rank of fairscale's FSDP saves: every layer and the rest flattened, padded and cut, with metadata."""
    buffers = {name: tensor for name, tensor in part.items() if name == "decoder.version"}
    groups: dict[str, dict[str, Tensor]] = {"": {}}
    for name, tensor in part.items():
        if name in buffers or name == "decoder.output_projection.weight":
            continue
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else ""
        groups.setdefault(layer, {})[name.removeprefix(f"{layer}.") if layer else name] = tensor
    saved = [
        {"model": dict(buffers), "shard_metadata": {"param_metadata": [], "buffer_names": list(buffers)}}
        for _ in range(shards)
    ]
    for path, tensors in groups.items():
        flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
        pieces = list(flat.chunk(shards))
        for shard, piece in zip(saved, pieces, strict=True):
            padding = pieces[0].numel() - piece.numel()
            shard["model"][f"{path}.flat_param_0" if path else "flat_param_0"] = torch.cat(
                [piece, torch.zeros(padding)]
            )
            about = {
                "names": list(tensors),
                "shapes": [tensor.shape for tensor in tensors.values()],
                "numels": [tensor.numel() for tensor in tensors.values()],
                "padding": padding,
            }
            shard["shard_metadata"]["param_metadata"].append(
                {
                    "fsdp_path": path,
                    "params": {"flat_param_0": about},
                    "no_broadcast_optim_state": False,
                    "shared_param_info": []
                    if path
                    else [("decoder.embed_tokens.weight", "decoder.output_projection.weight")],
                }
            )
    return saved


def save_metaseq(folder: Path, model: OPTForCausalLM, parts: int, shards: int) -> Path:
    """Write ``model`` as metaseq would on ``parts`` × ``shards`` ranks. Returns what to name as the source."""
    folder.mkdir()
    split = model_parts(metaseq_names(model), parts) if parts > 1 else [metaseq_names(model)]
    for i, part in enumerate(split):
        for j, content in enumerate(flat_shards(part, shards) if shards > 1 else [{"model": part}]):
            name = "checkpoint_last"
            name += f"-model_part-{i}" if parts > 1 or shards > 1 else ""
            name += f"-shard{j}" if shards > 1 else ""
            arguments = argparse.Namespace(decoder_layers=3, share_decoder_input_output_embed=True)
            torch.save({**content, "args": arguments, "extra_state": {"epoch": 1}}, folder / f"{name}.pt")
    return folder
