"""``python -m trainer.convert SRC DST --to native|hf``: find out what SRC is, and write it as something else."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from opt_ops.contract.manifest import CheckpointError
from trainer.console import say
from trainer.convert import huggingface, metaseq, native
from trainer.convert.weights import Weights, sync_tree
from trainer.errors import UserError
from trainer.model import cost

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_EXAMPLES = """\
examples:
  python -m trainer.convert opt-125m-hf/ weights/opt-125m --to native
  python -m trainer.convert checkpoint_last weights/opt-30b --to native   (checkpoint_last-model_part-0-shard0.pt …)
  python -m trainer.convert runs/1/1.00/checkpoints/step-00000600 mine-hf --to hf --dtype fp16 --tokenizer gpt2-bpe/

exit codes:
  0 done; 1 no room, or an error nobody foresaw; 65 bad checkpoint; 78 user error
"""


def main(arguments: list[str] | None = None) -> int:
    """Convert, and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _convert(options)
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 78
    except CheckpointError as error:
        say(f"error: {error}", sys.stderr)
        return 65
    except OSError as error:
        say(f"error: {error}. Nothing was left behind.", sys.stderr)
        return 1
    return 0


def _convert(options: argparse.Namespace) -> None:
    source, target = options.source, options.target
    if target.exists():
        raise UserError(f"{target} exists already: nothing is written over. Name another, or remove it.")
    if options.tokenizer and options.to != "hf":
        raise UserError("--tokenizer goes with --to hf: this trainer's checkpoints hold no tokenizer.")
    weights = read(source, options.heads)
    config, dtype = weights.config, _DTYPES.get(options.dtype)
    say(
        f"{source}: {weights.origin}; {config.num_layers} layers of {config.hidden_size}, {config.num_heads} heads, "
        f"{config.norm}-LN, vocabulary {config.vocab_size:,}; {cost.parameters(config):,} parameters"
    )
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        progress = _progress(weights, dtype)
        if options.to == "hf":
            huggingface.write(weights, temporary, dtype, progress, huggingface.MAX_SHARD_BYTES)
            if options.tokenizer:
                huggingface.write_tokenizer(options.tokenizer, temporary, config)
        else:
            native.write(weights, temporary, dtype, progress)
        sync_tree(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    use = "AutoModelForCausalLM.from_pretrained" if options.to == "hf" else "python -m trainer … --init-from"
    say(f"{target}: written. Use it with {use} {target}")


def read(source: Path, heads: int | None = None) -> Weights:
    """The OPT at ``source``, whatever format it is in.

    Raises:
        CheckpointError: a torn or damaged checkpoint.
        UserError: no format fits, or what is there is not an OPT, or not whole.
    """
    if native.is_here(source):
        return native.read(source)
    if huggingface.is_here(source):
        return huggingface.read(source)
    if metaseq.is_here(source):
        return metaseq.read(source, heads)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder, and no file whose name begins so.")
    if steps := sorted(path.name for path in source.glob("step-*")):
        raise UserError(f"{source} holds several checkpoints: name one, such as {source / steps[-1]}.")
    raise UserError(
        f"{source}: neither a step-… folder of this trainer (manifest.json), nor a Hugging Face folder (config.json "
        "and weights), nor .pt files of metaseq."
    )


def _progress(weights: Weights, dtype: torch.dtype | None) -> Callable[[int], None]:
    total = sum(torch.Size(entry.shape).numel() * (dtype or entry.dtype).itemsize for entry in weights.entries.values())
    done = shown = 0

    def told(written: int) -> None:
        nonlocal done, shown
        done += written
        percent = min(100, 100 * done // total)
        if percent >= shown + (1 if sys.stderr.isatty() else 25):
            shown = percent
            say(f"{percent} % of {total / 1e9:.2f} GB", sys.stderr)

    return told


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.convert",
        description="Convert OPT weights between Hugging Face, metaseq (read only) and this trainer's checkpoints.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="what to read; its format is found out")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make; appears when it is whole")
    parser.add_argument("--to", choices=("native", "hf"), required=True, help="format to write")
    parser.add_argument("--dtype", choices=_DTYPES, help="of what is written (default: as it is)")
    parser.add_argument("--tokenizer", metavar="PATH", type=Path, help="tokenizer to write beside it (--to hf)")
    parser.add_argument("--heads", metavar="N", type=int, help="attention heads, for metaseq's unpublished shapes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
