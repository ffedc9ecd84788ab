"""Recovery in place under SIGKILL: how long training stands still, and whether anything else is seen of it.

    python -m benchmarks.in_place --kills 20
    python -m benchmarks.in_place --kills 200 --seed 1 -o json

A real local lineage: daemon, agents, the real trainer (opt-tiny), four ranks on four nodes and a spare, shipped ticks.
Of the shipped playbooks, only the budget and `settle_steps` of process_death are changed: so many kills so close
together would otherwise be restarts. A rank is drawn, rank 0 as well, and killed at a moment that is drawn evenly in
time, once a standby is ready and five steps were made since the last recovery. Then the same lineage runs undisturbed
(the twin), and a third one runs with `in_place = false` (the relaunch).

`seconds_down` is the time from the kill to the line of the first step that is new, less one usual step.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from opt_ops import playbook_loader
from opt_ops.core.state.model import State
from opt_ops.core.values import Action, Status
from tests.e2e.site import Site, until

NODES, SPARES = 4, 1
_STEPS = 200_000  # of the schedule; no lineage gets that far
_TRAINER = f"'{sys.executable}', '-m', 'trainer'"
_SETTINGS = ("data.seq_len=64", "data.global_batch=8", f"steps={_STEPS}", "checkpoint_every=200")
_BETWEEN = 5  # steps between a recovery and the next kill
_PATIENCE = 600.0


@dataclass(kw_only=True)
class Kill:
    """One kill, and what was seen of it."""

    rank: int
    step: int  # the last line of telemetry before it
    into_step: float  # seconds since that line, as a share of a usual step
    seconds_down: float
    in_place: bool
    fell_back: str | None
    pids_kept: float  # share of the other ranks whose process is the same afterwards
    repeated: int  # lines of telemetry whose step was there before


@dataclass(kw_only=True)
class Trained:
    """A lineage while it trains: its telemetry, and the process of each rank."""

    site: Site
    kills: list[Kill] = field(default_factory=list[Kill])

    def lines(self) -> list[dict[str, Any]]:
        """The telemetry of all attempts, in the order of writing."""
        paths = sorted(self.site.runs.glob("1/1.*/a*/telemetry.jsonl"), key=lambda path: int(path.parent.name[1:]))
        texts = [path.read_bytes().rpartition(b"\n")[0].splitlines() for path in paths]
        return [json.loads(line) for text in texts for line in text]

    def pids(self) -> dict[int, int]:
        """The newest process of each rank."""
        return {rank: pid for rank, (pid, _) in self.site.running_ranks().items()}

    def ready(self, state: State, in_place: bool) -> bool:
        """Whether everything is as before a kill: training, nothing open, a standby ready."""
        attempt = state.attempt
        spares = [node for name, node in state.nodes.items() if attempt and name not in attempt.nodes]
        warm = not in_place or any(node.standby for node in spares)
        return state.status is Status.TRAINING and not state.open_incidents and warm

    def kill(self, draw: random.Random, in_place: bool) -> Kill:
        """Kill a rank at a moment that is drawn, and wait until training has gone on."""
        self.site.wait(lambda state: self.ready(state, in_place), _PATIENCE)
        begun = len(self.lines())
        until(lambda: len(self.lines()) >= begun + _BETWEEN, _PATIENCE)
        before, pids, incidents = self.lines(), self.pids(), len(self.site.state().incidents)
        usual = _usual(before)
        rank = draw.randrange(NODES)
        time.sleep(draw.random() * usual)
        killed_at = time.time()
        os.kill(pids[rank], signal.SIGKILL)
        seen = self.lines()
        newest = max(line["num_updates"] for line in seen)

        self.site.wait(lambda s: len(s.incidents) > incidents and not s.open_incidents, _PATIENCE)
        state = self.site.state()
        incident, attempt = list(state.incidents.values())[incidents], state.attempt
        assert attempt is not None
        replaced = incident.decision is not None and incident.decision.action is Action.REPLACE_RANKS
        # The line of a step that was confirmed before the kill may be written after it. That step is not new.
        last = attempt.members[-1].step if replaced and attempt.members else newest
        assert last is not None
        # After a restart, steps are made again before there is a new one.
        new = until(lambda: [x for x in self.lines()[len(seen) :] if x["num_updates"] > last], _PATIENCE)
        after = self.lines()[len(seen) :]
        others = {other: pid for other, pid in pids.items() if other != rank}
        now = self.pids()
        kept = sum(now.get(other) == pid for other, pid in others.items()) / len(others)
        known = {line["num_updates"] for line in seen}
        done = Kill(
            rank=rank,
            step=before[-1]["num_updates"],
            into_step=round((killed_at - seen[-1]["ts"]) / usual, 3),
            seconds_down=round(new[0]["ts"] - killed_at - usual, 3),
            in_place=replaced,
            fell_back=incident.fell_back,
            pids_kept=kept,
            repeated=sum(line["num_updates"] in known for line in after),
        )
        self.kills.append(done)
        print(f"kill {len(self.kills)}: {done}", file=sys.stderr)
        return done


def _usual(lines: list[dict[str, Any]]) -> float:
    """Seconds of a usual step."""
    return median(line["step_seconds"] for line in lines[-50:][1:] or lines)


def _site(folder: Path, *, in_place: bool) -> Site:
    names = ", ".join(f"'n{number}'" for number in range(1, NODES + SPARES + 1))
    shutil.copytree(playbook_loader.folder(), folder / "playbooks")
    page = folder / "playbooks" / "process_death.md"
    text, changed = re.subn(r"settle_steps = \d+", f"settle_steps = {_BETWEEN - 1}", page.read_text())
    text, more = re.subn(r"actions = \d+", "actions = 100000", text)
    assert (changed, more) == (1, 2), "the page has another form than this benchmark knows"
    page.write_text(text)
    recovery = f"[recovery]\nin_place = {str(in_place).lower()}\nin_place_seconds = 30\n"
    config = f"playbooks = 'playbooks'\n[local]\nnodes = [{names}]\n{recovery}"
    return Site(folder, config, trainer=_TRAINER, quick=False)


def _start(site: Site) -> Trained:
    site.folder.mkdir(exist_ok=True)
    options = [f"--set={setting}" for setting in _SETTINGS]
    site.command("run", "start", "opt-tiny", *options, f"--nodes={NODES}", f"--spares={SPARES}", "-q")
    site.start_daemon()
    return Trained(site=site)


def _killed(folder: Path, kills: int, seed: int, *, in_place: bool) -> Trained:
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    with closing(_site(folder, in_place=in_place)) as site:
        trained = _start(site)
        for _ in range(kills):
            trained.kill(draw, in_place)
        return trained


def _twin(folder: Path, steps: int) -> dict[int, float]:
    """The losses of the same training, which nothing disturbs, by step."""
    folder.mkdir(parents=True)
    with closing(_site(folder, in_place=False)) as site:
        trained = _start(site)
        until(lambda: len(trained.lines()) >= steps, max(_PATIENCE, steps * 2.0))
        return {line["num_updates"]: line["loss"] for line in trained.lines()}


def measure(kills: int, seed: int, relaunches: int, folder: Path) -> dict[str, Any]:
    """Run all three lineages, one after another."""
    killed = _killed(folder / "killed", kills, seed, in_place=True)
    lines = killed.lines()
    last = max(line["num_updates"] for line in lines)
    undisturbed = _twin(folder / "twin", last)
    restarted = _killed(folder / "restarted", relaunches, seed, in_place=False) if relaunches else None
    own = {line["num_updates"]: line["loss"] for line in lines}
    down = [each.seconds_down for each in killed.kills if each.in_place]
    relaunch = [each.seconds_down for each in restarted.kills] if restarted else []
    return {
        "kills": kills,
        "recovered_in_place": len(down),
        "fell_back": kills - len(down),
        "pids_kept_share": min((each.pids_kept for each in killed.kills if each.in_place), default=None),
        "steps_repeated_max": max((each.repeated for each in killed.kills if each.in_place), default=None),
        "seconds_down_median": _rounded(median(down)) if down else None,
        "seconds_down_p95": _rounded(quantiles(down, n=20, method="inclusive")[-1]) if len(down) > 1 else None,
        "seconds_down_max": _rounded(max(down)) if down else None,
        "losses_bitwise_equal": own == {step: loss for step, loss in undisturbed.items() if step <= last},
        "steps": last,
        "restart_seconds_down_median": _rounded(median(relaunch)) if relaunch else None,
        "restarts": len(relaunch),
        "kills_of_rank_0": sum(each.rank == 0 for each in killed.kills),
        "kills_by_quarter_of_step": _by_quarter(killed.kills),
        "step_seconds": _rounded(_usual(lines)),
        "seed": seed,
        "load": os.getloadavg()[0],
        "torch": version("torch"),
        "python": platform.python_version(),
        "each": [asdict(each) for each in killed.kills],
    }


def _by_quarter(kills: list[Kill]) -> dict[int, int]:
    """How many kills met each quarter of a step."""
    return dict(sorted(Counter(max(1, min(4, 1 + int(4 * each.into_step))) for each in kills).items()))


def _rounded(value: float) -> float:
    return round(value, 3)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.in_place", description="recovery in place, measured")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--relaunches", type=int, default=3, help="kills that are answered by a restart (default: 3)")
    parser.add_argument("--keep", type=Path, help="an empty folder for the lineages (default: a temporary one)")
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="in-place-") as scratch:
        found = measure(given.kills, given.seed, given.relaunches, given.keep or Path(scratch))
    if given.output == "json":
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        if name != "each":
            print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
