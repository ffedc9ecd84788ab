"""What `python -m trainer.data.dedup` holds in memory for each document: the number in docs/data.md.

    python -m benchmarks.dedup_memory [--documents 50000 150000] [--threshold 0.95]

Made texts of distinct words, in one file. The peak of the process that compares is measured at two sizes in a process
of its own; their difference is what a document costs. Other processes make the sketches, as with `--workers`.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

_WORDS = 40  # of a document: what is held does not depend on its length


def main() -> None:
    """Measure, and print one line for each size and the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs=2, default=(50_000, 150_000))
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak_of:
        print(_peak(given.peak_of, given.threshold))
        return
    peaks = []
    for number in given.documents:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder, "text.jsonl")
            _write(text, number)
            command = [sys.executable, "-m", "benchmarks.dedup_memory", "--peak-of", str(text)]
            command.append(f"--threshold={given.threshold}")
            peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"{number:,} documents: {peaks[-1] / 2**20:.0f} MiB at the peak")
    each = (peaks[1] - peaks[0]) / (given.documents[1] - given.documents[0])
    print(f"{each:.0f} bytes for each document ({each / 1024:.2f} KiB)")


def _write(path: Path, number: int) -> None:
    """Texts of which each sixteenth repeats half of the one before: some documents have candidates, none goes."""
    draw = random.Random(1)
    before: list[str] = []
    with path.open("w") as file:
        for index in range(number):
            words = [f"{draw.getrandbits(40):x}" for _ in range(_WORDS)]
            if index % 16 == 15:
                words[: _WORDS // 2] = before[: _WORDS // 2]
            before = words
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


def _peak(text: Path, threshold: float) -> int:
    """Bytes of this process at its peak, when it has removed duplicates of the file."""
    from trainer.data.dedup.run import run
    from trainer.data.dedup.work import Options

    run(Options(inputs=(text,), out=text.with_name("out"), workers=2, threshold=threshold))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
