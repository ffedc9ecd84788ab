"""Do the cures cure? Tiny OPTs on the CPU are made to diverge, and each is compared with an undisturbed twin.

    python -m benchmarks.cures --seed 1 --count 8 -o json
    python -m benchmarks.cures --seed 1 --count 8 --list
    python -m benchmarks.cures --seed 1 --count 8 --case 1-03-bad_data --out FOLDER

Real daemon, local scheduler, real trainer, shipped playbooks. All faults are drills: `benchmarks/cures_trainer.py`
breaks one thing of the trainer, and the supervisor learns of it through telemetry and logs alone. A case is cured if
the mean loss of its last 50 updates is within 0.02 nats of the twin's at the same tokens.

With `--out`, a case that has ended is kept in FOLDER, and the next call goes on after it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import cures_corpus, cures_report
from benchmarks.cures_draws import Draw, draws
from benchmarks.cures_site import Ran, run, run_alone

SCHEMA = "opt-ops/cures/1"


class Bench:
    """Runs cases, and keeps what has ended in a folder."""

    def __init__(self, out: Path, work: Path, seed: int) -> None:
        self._out, self._work = out, work
        self._began = time.monotonic()
        self.twins: dict[str, Ran] = {}  # those without anything injected
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)
        self._corpus = work / "corpus.jsonl"
        if not self._corpus.exists():
            cures_corpus.write(self._corpus, seed)

    def case(self, draw: Draw) -> dict[str, Any]:
        """One case: the disturbed run and its twin, side by side, unless they have ended before."""
        path = self._out / f"{draw.id}.json"
        if path.exists():
            self._twin(draw)
            return json.loads(path.read_text())
        with ThreadPoolExecutor(2) as both:
            twin = both.submit(self._twin, draw)
            ran = both.submit(self._disturbed, draw)
            found = cures_report.case(draw, ran.result(), twin.result())
        _keep(path, found)
        self._say(
            f"{draw.id}: named {found['named']}, {', '.join(found['remedies']) or 'no remedy'}; "
            f"{'cured' if found['cured'] else 'not cured'}: {found['loss']} beside {found['twin_loss']}"
        )
        return found

    def _twin(self, draw: Draw) -> Ran:
        name = f"twin-{draw.seed}-{zlib.crc32(draw.twin.encode()):08x}"
        path = self._out / f"{name}.json"
        if path.exists():
            kept = json.loads(path.read_text())
            losses = {int(step): tuple(value) for step, value in kept["losses"].items()}
            return self._known(name, draw, Ran(**{**kept, "losses": losses}))
        self._say(f"{name} begins")
        settings, folder = (*draw.settings, f"seed={draw.seed}"), self._work / name
        if draw.planned:
            ran = run_alone(folder, settings, self._corpus, dict(draw.inject))
        else:
            ran = run(folder, settings, self._corpus, {})
        self._say(f"{name} {ran.status} after {ran.lines} updates")
        _keep(path, asdict(ran))
        return self._known(name, draw, ran)

    def _known(self, name: str, draw: Draw, ran: Ran) -> Ran:
        if not draw.planned:
            self.twins[name] = ran
        return ran

    def _disturbed(self, draw: Draw) -> Ran:
        self._say(f"{draw.id} begins")
        settings = (*draw.settings, *draw.declared, f"seed={draw.seed}")
        ran = run(self._work / draw.id, settings, self._corpus, dict(draw.inject), draw.nodes, draw.options)
        self._say(f"{draw.id} {ran.status} after {ran.lines} updates")
        return ran

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:5.0f} s  {text}", file=sys.stderr, flush=True)


def _keep(path: Path, found: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found))
    new.replace(path)


def listed(chosen: Sequence[Draw]) -> list[dict[str, Any]]:
    """The draws alone."""
    return [{"id": draw.id, "injected": str(draw.injected)} for draw in chosen]


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--list", action="store_true", help="print the draws, train nothing")
    parser.add_argument("--case", metavar="ID", help="run this case only")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="keep the cases that have ended here")
    parser.add_argument("--work", metavar="FOLDER", type=Path, help="keep run folders here, to look at them")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    options = parser.parse_args()
    chosen = draws(options.seed, options.count)
    if options.case:
        chosen = [draw for draw in chosen if draw.id == options.case]
        if not chosen:
            parser.error(f"no case {options.case}: --list prints them")
    report: dict[str, Any] = {"schema": SCHEMA, "seed": options.seed, "cases": listed(chosen)}
    if not options.list:
        with tempfile.TemporaryDirectory(prefix="cures-") as scratch:
            bench = Bench(options.out or Path(scratch) / "out", options.work or Path(scratch), options.seed)
            report["cases"] = [bench.case(draw) for draw in chosen]
        report["totals"] = cures_report.totals(report["cases"])
        report["by_cause"] = cures_report.by_cause(report["cases"])
        report["twins"] = cures_report.spread(bench.twins)
    print(json.dumps(report, indent=1) if options.output == "json" else cures_report.table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
