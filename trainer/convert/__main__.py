"""The command ``python -m trainer.convert SRC DST --to native|hf``: detect the format of SRC, and write another."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from trainer import device
from trainer.command import exit_code_of
from trainer.console import print_line
from trainer.convert import huggingface, metaseq, native
from trainer.convert.weights import Weights, sync_tree
from trainer.data.corpus import training_corpora
from trainer.errors import UserError
from trainer.model import cost
from trainer.model.precision import DTYPES

_EXAMPLES = """\
examples:
  python -m trainer.convert opt-125m-hf/ weights/opt-125m --to native
  python -m trainer.convert checkpoint_last weights/opt-30b --to native   (checkpoint_last-model_part-0-shard0.pt …)
  python -m trainer.convert runs/1/1.00/checkpoints/step-00000600 mine-hf --to hf --dtype fp16 --tokenizer gpt2-bpe/

exit codes:
  0 done; 1 a file cannot be written, or unexpected error; 65 checkpoint missing or damaged; 78 user error
"""


def main(arguments: list[str] | None = None) -> int:
    """Convert, and return the exit code."""
    options = _parser().parse_args(arguments)
    return exit_code_of(lambda: _convert(options), kept="No files were left behind.")


def _convert(options: argparse.Namespace) -> None:
    source, target = options.source, options.target
    if target.exists():
        raise UserError(f"{target} exists already and is not overwritten. Name another folder, or remove it.")
    if (options.tokenizer or options.data) and options.to != "hf":
        raise UserError("a tokenizer needs --to hf: checkpoints of this trainer hold no tokenizer.")
    weights = read(source, options.heads)
    config, dtype = weights.config, DTYPES.get(options.dtype)
    print_line(
        f"{source}: {weights.origin}; {config.num_layers} layers of {config.hidden_size}, {config.num_heads} heads, "
        f"{config.norm}-LN, vocabulary {config.vocab_size:,}; {cost.parameters(config):,} parameters"
    )
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        progress = _progress(weights, dtype)
        if options.to == "hf":
            huggingface.write(weights, temporary, dtype, progress, huggingface.MAX_SHARD_BYTES)
            if options.tokenizer or options.data:
                corpora = training_corpora([each for each in options.data if each])
                huggingface.write_tokenizer(options.tokenizer, temporary, config, corpora)
        else:
            native.write(weights, temporary, dtype, progress)
        sync_tree(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    use = "AutoModelForCausalLM.from_pretrained" if options.to == "hf" else "python -m trainer … --init-from"
    print_line(f"{target}: written. Use it with {use} {target}")


def read(source: Path, heads: int | None = None) -> Weights:
    """The OPT at ``source``, in any of the formats.

    Raises:
        CheckpointError: the checkpoint is torn or damaged.
        UserError: no format fits, or it is not an OPT, or not complete.
    """
    if native.is_here(source):
        return native.read(source)
    if huggingface.is_here(source):
        return huggingface.read(source)
    if metaseq.is_here(source):
        return metaseq.read(source, heads)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder, and no file whose name begins with this.")
    if steps := sorted(path.name for path in source.glob("step-*")):
        raise UserError(f"{source} holds several checkpoints: name one, such as {source / steps[-1]}.")
    raise UserError(
        f"{source} is neither a step-… folder of this trainer (manifest.json), nor a Hugging Face folder (config.json "
        "and weights), nor .pt files of metaseq."
    )


def _progress(weights: Weights, dtype: torch.dtype | None) -> Callable[[int], None]:
    total = sum(torch.Size(entry.shape).numel() * (dtype or entry.dtype).itemsize for entry in weights.entries.values())
    done = shown = 0

    def show(written: int) -> None:
        nonlocal done, shown
        done += written
        percent = min(100, 100 * done // total)
        if percent >= shown + (1 if sys.stderr.isatty() else 25) or shown < percent == 100:
            shown = percent
            size = f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.2f} MB"
            print_line(f"{percent} % of {size}", sys.stderr)

    return show


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.convert",
        description="Convert OPT weights between Hugging Face, metaseq (read only) and this trainer's checkpoints.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="weights to read; the format is detected")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to create; it appears when it is complete")
    parser.add_argument("--to", choices=("native", "hf"), required=True, help="format to write")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="number format to write (default: that of SRC)"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", type=Path, help="tokenizer to write beside the weights (--to hf)"
    )
    parser.add_argument(
        "--data",
        metavar="SRC",
        action="append",
        default=[],
        help="without --tokenizer: write the one that was trained on this data; empty for the built-in text",
    )
    parser.add_argument("--heads", metavar="N", type=int, help="attention heads, for unpublished shapes from metaseq")
    return parser


if __name__ == "__main__":
    device.hide_gpus()  # all work is on the CPU, and a GPU may belong to a running attempt
    sys.exit(main())
