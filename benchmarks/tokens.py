"""Tokenising: ours with one and two workers beside a plain loop over the tokenizers library, and reading samples.

    python benchmarks/tokens.py --megabytes 16 64

The text is the Python sources of the installed packages, a document a file, the tokenizer a byte-level BPE trained on
its first megabytes: other text and another vocabulary give other figures, and the ratios matter. Every variant is a
process of its own that starts with the text and ends with the tokens on disk; variants take turns, and the fastest of
the rounds counts. Peers: *plain loop* encodes line by line in one thread and keeps the tokens in memory to the end, as
one would write it down first; *library's threads* gives the same lines to `encode_batch` a thousand at a time and lets
the library use all cores. CPU time and the memory of the largest process are the kernel's. Reading is timed in this
process: batches of eight sequences of 2,048 tokens from memory-mapped files, and the first batch of an epoch, which
makes its order.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from trainer.data.samples import Samples

VOCABULARY = 32_768
TRAINED_ON = 8_000_000
BATCH, SEQ_LEN = 8, 2048

PLAIN = """
import json, sys
import numpy as np
from tokenizers import Tokenizer
text, tokenizer, out, batch = sys.argv[1:]
tokenizer, batch = Tokenizer.from_file(tokenizer), int(batch)
ids, lines = [], []
def encode():
    for encoding in tokenizer.encode_batch([json.loads(line)["text"].rstrip() for line in lines]):
        ids.extend(encoding.ids); ids.append(2)
    lines.clear()
for line in open(text, "rb"):
    if batch == 1:
        ids.extend(tokenizer.encode(json.loads(line)["text"].rstrip()).ids); ids.append(2)
    else:
        lines.append(line)
        if len(lines) == batch: encode()
encode()
np.save(out, np.array(ids, np.uint16))
"""

# Between this process and what it measures: a fork of this one would be measured with all memory that this one has.
LAUNCH = """
import json, os, subprocess, sys, time
began = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(json.dumps([time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000]))
sys.exit(process.returncode)
"""


@dataclass(frozen=True)
class Result:
    """What one variant took."""

    seconds: float
    cpu: float
    peak_mb: float
    tokens: int


def texts(megabytes: int, path: Path) -> None:
    """As many megabytes of JSONL, if the installed packages have them."""
    left = megabytes * 10**6
    with path.open("w") as file:
        for source in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
            content = source.read_text(encoding="utf-8", errors="replace")
            if left > 0 and content.strip():
                left -= file.write(json.dumps({"text": content}) + "\n")


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Wall and CPU seconds, and megabytes of the largest of its processes."""
    command = [sys.executable, "-S", "-c", LAUNCH, *command]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True)
    return tuple(json.loads(done.stdout))


def plain(text: Path, tokenizer: Path, folder: Path, batch: int) -> Result:
    """The loop with so many lines in one call of the library."""
    out = folder / "plain.npy"
    command = [sys.executable, "-c", PLAIN, str(text), str(tokenizer), str(out), str(batch)]
    spent = run(command, {"TOKENIZERS_PARALLELISM": "false" if batch == 1 else "true"})
    return Result(*spent, len(np.load(out, mmap_mode="r")))


def ours(text: Path, tokenizer: Path, folder: Path, workers: int) -> tuple[Result, Path]:
    """The trainer's own command; also where the tokens are."""
    cache = folder / f"cache-{text.stem}-{workers}"
    shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, "-m", "trainer.tokens", "build", "--data", str(text), "--tokenizer", str(tokenizer)]
    spent = run([*command, "--workers", str(workers)], {"OPT_OPS_CACHE": str(cache)})
    (entry,) = cache.glob("tokens-*/ids.npy")
    return Result(*spent, len(np.load(entry, mmap_mode="r"))), entry.parent


def tokenizer(text: Path, path: Path) -> None:
    """Train one and write it down."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with text.open() as file:
        made.train_from_iterator((json.loads(line)["text"] for line in file.readlines(TRAINED_ON)), learner)
    made.save(str(path))


def reading(entry: Path) -> str:
    """How long batches take."""
    bounds = np.load(entry / "bounds.npy", mmap_mode="r")
    samples = Samples(np.load(entry / "ids.npy", mmap_mode="r"), SEQ_LEN, 1, bounds)
    samples.batch(0, 1)
    times = []
    for step in range(min(200, samples.blocks // BATCH)):
        began = time.perf_counter()
        samples.batch(step * BATCH, BATCH)
        times.append(time.perf_counter() - began)
    return f"a batch of {BATCH} × {SEQ_LEN} tokens, median of {len(times)}, ms | {1000 * statistics.median(times):.1f}"


def order(documents: int) -> str:
    """How long the first batch of an epoch takes."""
    samples = Samples(np.broadcast_to(np.uint16(0), (100 * documents,)), SEQ_LEN, 1, np.arange(documents + 1) * 100)
    began = time.perf_counter()
    samples.batch(0, 1)
    return f"order of an epoch of {documents:,} documents, s | {time.perf_counter() - began:.1f}"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 10_000_000])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"tokenizers {version('tokenizers')}, numpy {version('numpy')}, Python {sys.version.split()[0]}\n")
    print("| text, MB | variant | tokens | wall s | CPU s | tokens/s | tokens per CPU s | largest process, MB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    entry = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        definition = folder / "tokenizer.json"
        for megabytes in arguments.megabytes:
            text = folder / f"{megabytes}.jsonl"
            texts(megabytes, text)
            if not definition.exists():
                tokenizer(text, definition)
            rounds: dict[str, list[Result]] = {}
            for _ in range(arguments.rounds):
                rounds.setdefault("plain loop", []).append(plain(text, definition, folder, 1))
                rounds.setdefault("library's threads", []).append(plain(text, definition, folder, 1000))
                for workers in (1, 2):
                    found, entry = ours(text, definition, folder, workers)
                    rounds.setdefault(f"ours, {workers} worker{'s' * (workers > 1)}", []).append(found)
            size = text.stat().st_size / 1e6
            for variant, results in rounds.items():
                found = min(results, key=lambda result: result.seconds)
                print(
                    f"| {size:.0f} | {variant} | {found.tokens:,} | {found.seconds:.1f} | {found.cpu:.1f} "
                    f"| {found.tokens / found.seconds:,.0f} | {found.tokens / found.cpu:,.0f} | {found.peak_mb:.0f} |",
                    flush=True,
                )
        print("\n| reading | |\n| --- | ---: |")
        assert entry is not None
        print(f"| {reading(entry)} |")
    for documents in arguments.documents:
        print(f"| {order(documents)} |")


if __name__ == "__main__":
    main()
