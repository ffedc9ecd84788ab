"""`kill -9` of the daemon, many times: is anything duplicated, lost, or stuck?

    python benchmarks/kill_soak.py --kills 1000 --seed 1

The simulated world runs in this process. The supervisor is a forked child with a real journal on the disk. It reaches
the world through a pipe, and this process carries out its calls. So a child that is killed between an effect and its
answer leaves the same as a daemon that is killed during `sbatch`. Children are killed with SIGKILL after a random time,
or right before or after a random effect. Between two daemon processes the world goes on. Now and then, half a line is
appended to the journal, as a machine that crashes during a write leaves it.

`soak` returns the figures. The command exits with 1 if anything was duplicated, lost or stuck.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from opt_ops import playbook_loader
from opt_ops.core import events as e
from opt_ops.core.decide.policy import EvaluationRule
from opt_ops.core.events.evaluation import score_key
from opt_ops.core.state.fold import replay
from opt_ops.core.values import Schedule, Severity
from opt_ops.errors import OptOpsError
from opt_ops.laboratory.simulated import Physics, World, faults
from opt_ops.laboratory.simulated.drive import pass_time
from opt_ops.laboratory.simulated.ports import ports
from opt_ops.laboratory.simulated.training import Divergence
from opt_ops.laboratory.simulated.world import Planned
from opt_ops.ports import Ports
from opt_ops.runfolder.journal import read
from opt_ops.supervise.executor import Site
from opt_ops.supervise.supervisor import DaemonIdentity, Supervisor

POLICY = replace(
    playbook_loader.load(playbook_loader.folder(), expected_gpus=1)[0],
    least_alert=Severity.WARNING,
    evaluation=EvaluationRule(every=20, tasks=("sim",)),
)
STEPS = 240
LONGEST = 5 * 86400.0  # virtual seconds after which a lineage counts as stuck
LONGEST_PROCESS = 0.12  # seconds until a kill
KILLS_A_LINEAGE = 30
EFFECTS = {"submit", "cancel", "drain", "order", "inject", "done", "send"}


@dataclass
class Figures:
    """The figures of a soak."""

    kills: int = 0
    at_effects: int = 0  # of them, right before or after an effect on the world
    lineages: int = 0
    daemon_processes: int = 0
    submissions: int = 0
    duplicates: int = 0  # jobs beyond the first of one allocation
    twice_started: int = 0  # ranks of an attempt started again on a node
    requests: int = 0
    lost_requests: int = 0
    doubly_answered: int = 0
    evaluations: int = 0  # of checkpoints, by the journal
    doubly_evaluated: int = 0
    stuck: int = 0
    alerts: int = 0
    unsent_alerts: int = 0
    torn: int = 0  # half lines at the end of a journal file, skipped by the next daemon process
    unproven: int = 0  # incidents of a completed lineage that are not closed by a proof
    left_behind: int = 0  # jobs or ranks that outlived their lineage
    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)

    @property
    def clean(self) -> bool:
        """Whether nothing was duplicated, lost or stuck."""
        return not (
            self.duplicates
            or self.twice_started
            or self.lost_requests
            or self.doubly_answered
            or self.doubly_evaluated
            or self.stuck
            or self.left_behind
            or self.unsent_alerts
            or self.unproven
        )

    def table(self) -> str:
        """Return the figures as a Markdown table."""
        rows = [
            (name.replace("_", " "), value) for name, value in vars(self).items() if name not in ("ends", "seconds")
        ]
        rows += [(f"ended {status}", count) for status, count in sorted(self.ends.items())]
        rows.append(("seconds", f"{self.seconds:.0f}"))
        return "\n".join(["| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)])


# ---- the child: a daemon ---------------------------------------------------------------------------------------------


class _Remote:
    """A port at the other end of the pipe."""

    def __init__(self, pipe: Connection, name: str) -> None:
        self._pipe, self._name = pipe, name

    def __getattr__(self, method: str) -> Any:
        if method == "grace_seconds":
            return 30.0

        def call(*arguments: Any) -> Any:
            self._pipe.send((self._name, method, arguments))
            fine, result = self._pipe.recv()
            if not fine:
                raise result
            return result

        return call


def _run_daemon(pipe: Connection, folder: Path) -> NoReturn:
    """Run a daemon process until the lineage is finished, or until it is killed."""
    code = 1
    try:
        remote: dict[str, Any] = {name: _Remote(pipe, name) for name in Ports.__dataclass_fields__}
        identity = DaemonIdentity(host="head", pid=os.getpid(), last_liveness=None)
        supervisor = Supervisor(folder, Ports(**remote), POLICY, Site(folder="/sim/1", trainer=("train",)), identity)
        while not supervisor.state.finished:
            supervisor.tick()
            _Remote(pipe, "world").pass_time()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)  # no handlers of the parent's


# ---- the parent: the world, and the killer ---------------------------------------------------------------------------


@dataclass
class _Death:
    """When a daemon process is killed: at a moment, or at an effect."""

    at: float  # time.monotonic()
    effect: int | None  # the number of the effect
    after: bool = False


class Lineage:
    """One lineage in its world, until it is finished."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self._random = random.Random(seed)
        schedule = Schedule(peak_lr=1e-4, warmup_steps=10, total_steps=STEPS, final_fraction=0.1)
        physics = Physics(
            seed=seed, nodes=10, gpus_per_node=1, steps=STEPS, save_every=10, schedule=schedule, loss_knee=2.0
        )
        self.world = World(physics, plan=list(self._plan()))

    def _plan(self) -> Iterator[Planned]:
        shape = {"nodes": 2, "spares": 1, "ranks_per_node": 1}
        arguments = {"lineage": "1", "recipe": "sim", "settings": [], "data": [], "tokenizer": None, "shape": shape}
        yield Planned(fault=faults.Ask(request="r-start", verb="start", arguments=arguments), at=0.0)
        for number in range(self._random.randrange(4)):
            verb, arguments = self._random.choice([("note", {"target": "1", "text": "hm"}), ("dance", {})])
            ask = faults.Ask(request=f"r-{number}", verb=verb, arguments=arguments)
            yield Planned(fault=ask, step=self._random.randrange(5, STEPS - 20))
        for accepted in self._random.choices((True, False), k=self._random.randrange(3)):
            yield Planned(fault=faults.LostAnswer(accepted=accepted), at=self._random.choice((0.0, 2000.0)))
        if self._random.random() < 0.4:
            yield Planned(fault=faults.Diverge(divergence=Divergence(step=self._random.randrange(130, 170))), at=0.0)
        kinds = (
            faults.KillRank(),
            faults.KillRank(code=1),
            faults.BadGpu(),
            faults.BadGpu(kills=True),
            faults.NodeDown(seconds=3600.0),
            faults.NodeCutOff(seconds=600.0),
            faults.EndJob(),
            faults.SchedulerAway(seconds=200.0),
            faults.Damage(),
            faults.Hang(),
        )
        for fault in self._random.sample(kinds, k=self._random.randrange(1, 5)):
            yield Planned(fault=fault, step=self._random.randrange(20, STEPS - 10))

    def run_daemon(self, death: _Death | None, figures: Figures) -> bool:
        """Run one daemon process. Returns whether it ended by itself."""
        mine, theirs = Pipe()
        child = os.fork()
        if child == 0:
            mine.close()
            _run_daemon(theirs, self.folder)
        theirs.close()
        figures.daemon_processes += 1
        try:
            killed = self._serve(mine, child, death, figures)
        finally:
            mine.close()
        _, status = os.waitpid(child, 0)
        if not killed and status != 0:
            raise RuntimeError(f"the daemon of {self.folder} failed by itself; its traceback is above")
        return not killed

    def _serve(self, pipe: Connection, child: int, death: _Death | None, figures: Figures) -> bool:
        """Carry out the calls of the daemon until it ends or is killed. Returns whether it was killed."""
        world_ports, effects = ports(self.world), 0
        while self.world.now < LONGEST:
            if not pipe.poll(max(0.0, death.at - time.monotonic()) if death else None):
                os.kill(child, signal.SIGKILL)
                return True
            try:
                port, method, arguments = pipe.recv()
            except EOFError:
                return False
            effects += method in EFFECTS
            fatal = death is not None and method in EFFECTS and effects == death.effect
            if fatal and death is not None and not death.after:
                os.kill(child, signal.SIGKILL)
            if not fatal or (death is not None and death.after):
                answer = self._carry_out(world_ports, port, method, arguments)
            if fatal:
                os.kill(child, signal.SIGKILL)
                figures.at_effects += 1
                return True
            pipe.send(answer)
        os.kill(child, signal.SIGKILL)
        return True

    def _carry_out(self, world_ports: Ports, port: str, method: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        if port == "world":
            pass_time(self.world, LONGEST)
            return True, None
        try:
            return True, getattr(getattr(world_ports, port), method)(*arguments)
        except OptOpsError as error:
            return False, error

    def without_daemon(self) -> None:
        """Let time pass without a daemon, and perhaps leave a torn line."""
        self.world.advance(self.world.now + self._random.choice((0.0, 0.5, 3.0, 20.0, 90.0)))
        files = sorted((self.folder / "journal").glob("*.jsonl"))
        if files and self._random.random() < 0.2:
            with files[-1].open("ab") as file:
                file.write(b'{"v": 1, "seq": 99, "epo')

    def death(self) -> _Death:
        """Choose when the next daemon process is killed."""
        at = time.monotonic() + self._random.uniform(0.0, LONGEST_PROCESS)
        if self._random.random() < 0.5:
            return _Death(at, None)
        return _Death(time.monotonic() + 10.0, self._random.randrange(1, 8), self._random.random() < 0.6)

    def count(self, figures: Figures) -> None:
        """Add the lineage to the figures."""
        entries, notes = read(self.folder / "journal")
        state, world = replay(entries), self.world
        figures.lineages += 1
        figures.ends[state.status] += 1
        figures.stuck += not state.finished
        jobs = Counter(job.allocation for job in world.cluster.jobs.values())
        figures.submissions += jobs.total()
        figures.duplicates += sum(number - 1 for number in jobs.values())
        figures.twice_started += sum(number - 1 for number in world.agents.starts.values())
        asked = world.asked
        answers = Counter(name for x in entries if (name := getattr(x.event, "request", None)) is not None)
        figures.requests += len(asked)
        figures.lost_requests += sum(answers[name] == 0 or name in world.inbox for name in asked)
        figures.doubly_answered += sum(answers[name] > 1 for name in asked)
        scored = Counter(score_key(x.event) for x in entries if isinstance(x.event, e.CheckpointEvaluated))
        figures.evaluations += scored.total()
        figures.doubly_evaluated += scored.total() - len(scored)
        told = {x.event.alert for x in entries if isinstance(x.event, e.AlertIntended)}
        figures.alerts += len(told)
        figures.unsent_alerts += len(told - {alert.id for _, alert in world.alerts})
        figures.torn += sum("torn" in note for note in notes)
        if state.finished:
            left = sum(each.runs for each in world.evaluations.all)
            figures.left_behind += len(world.cluster.live) + len(world.alive()) + left
        if any(isinstance(x.event, e.LineageCompleted) for x in entries):
            figures.unproven += sum(incident.proven is False for incident in state.incidents.values())
            figures.unproven += sum(incident.closed_at is None for incident in state.incidents.values())


def soak(kills: int, seed: int, folder: Path) -> Figures:
    """Kill the daemons of one lineage after the other, `kills` times in total."""
    figures, began, number = Figures(), time.monotonic(), 0
    while figures.kills < kills:
        lineage = Lineage(folder / f"{number:04d}", seed * 100_000 + number)
        last = figures.kills + min(KILLS_A_LINEAGE, kills - figures.kills)
        while not lineage.run_daemon(lineage.death() if figures.kills < last else None, figures):
            if lineage.world.now >= LONGEST:
                break
            figures.kills += 1
            lineage.without_daemon()
        lineage.count(figures)
        number += 1
    figures.seconds = time.monotonic() - began
    return figures


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-soak-") as folder:
        figures = soak(options.kills, options.seed, Path(folder))
    print(figures.table())
    return 0 if figures.clean else 1


if __name__ == "__main__":
    sys.exit(main())
