"""Hostile input in every file that a supervisor reads: does it end a life, spoil a journal, or blind the watch?

    python -m benchmarks.hostile_inputs --mutations 20000 --seed 1

The simulated world runs in this process, and so does the real supervisor. Between them are the real files of a run
folder: telemetry, phases, settings, heartbeats, reports on ranks, stacks, requests and checkpoints. Before each tick,
some of these files get input that no agent, trainer or operator of ours would write. Meanwhile ranks die, a GPU fails,
training hangs and the loss diverges.

Half of the lineages get input that cannot be taken for what was meant: another JSON type, a number that is none, broken
bytes, huge lines, floods, files of other kinds. There, every fault must be recovered and proven, nothing else may be
acted on, and the lineage must complete. The other half get any JSON value, so plausible lies, too. There, a supervisor
may act on a lie, and may halt with a page. In both, no life may end, every journal must be readable, and every lineage
must come to its end.

`attack` returns the figures. The command exits with 1 if any of this does not hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from benchmarks.hostile_readers import attack_readers
from benchmarks.mutations import break_bytes, mutate, other_kind, to_json
from benchmarks.world_files import WorldFiles, append, heartbeat_fields, manifest_fields, write_checkpoint
from opt_ops import playbook_loader
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.fold import replay
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.core.values import Schedule, Severity
from opt_ops.laboratory.replay.write_runfolder import config_fields, telemetry_line
from opt_ops.laboratory.simulated import Physics, World, faults
from opt_ops.laboratory.simulated.drive import Pace, pass_time
from opt_ops.laboratory.simulated.ports import ports
from opt_ops.laboratory.simulated.training import Divergence, Training
from opt_ops.laboratory.simulated.world import Planned
from opt_ops.ports import Ports, Request
from opt_ops.runfolder.checkpoints import FileCheckpoints
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.runfolder.journal_reader import read
from opt_ops.runfolder.left_out import LeftOutCounter
from opt_ops.runfolder.node_files import FileAgents
from opt_ops.runfolder.trainer_files import FileTrainer
from opt_ops.supervise.executor import Site
from opt_ops.supervise.supervisor import DaemonIdentity, Supervisor

POLICY = replace(playbook_loader.load(playbook_loader.folder(), expected_gpus=1)[0], least_alert=Severity.WARNING)
STEPS = 240
LONGEST = 5 * 86400.0  # virtual seconds after which a lineage counts as stuck
TICKS_A_LIFE = 60  # then another daemon process takes over, and reads every file from its start
MOST_LIVES = 400  # of one lineage; one whose every life ends at once is not driven on for ever
A_TICK = 4  # mutations before each tick
FLOOD = 2000  # lines

_MEANINGFUL = frozenset({"loss", "finite", "num_updates"})
"""Fields of telemetry in which a wrong value has a meaning: a loss that is no number is a fault of the training."""

_ENDED = frozenset({"ended"})
"""A rank for which an agent gives any end has ended, even if its time is none."""


@dataclass
class Figures:
    """The figures of an attack."""

    mutations: int = 0
    lineages: int = 0
    lives: int = 0  # daemon processes
    lives_ended: int = 0  # by an exception
    readers_ended: int = 0  # by an exception: readers that are attacked alone
    unreadable: int = 0  # journals
    stuck: int = 0  # lineages that came to no end
    faults: int = 0  # that happened meanwhile, in lineages without lies
    unrecovered: int = 0  # of them
    false_acts: int = 0  # incidents in lineages without lies that no fault caused
    seconds: float = 0.0
    formats: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def clean(self) -> bool:
        """Whether everything held."""
        ended = self.lives_ended or self.readers_ended
        return not (ended or self.unreadable or self.stuck or self.unrecovered or self.false_acts)

    def table(self) -> str:
        """Return the figures as a Markdown table."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        rows = [(name.replace("_", " "), value) for name, value in numbers.items()]
        rows += [(f"mutations of {name}", count) for name, count in sorted(self.formats.items())]
        rows += [("seconds", round(self.seconds))]
        return "\n".join(["| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)])


class Attack:
    """One lineage under attack, until it is finished."""

    def __init__(self, folder: Path, seed: int, lies: bool, figures: Figures) -> None:
        self._random = Random(seed)
        self._lies = lies
        self._figures = figures
        schedule = Schedule(peak_lr=1e-4, warmup_steps=10, total_steps=STEPS, final_fraction=0.1)
        physics = Physics(
            seed=seed, nodes=10, gpus_per_node=1, steps=STEPS, save_every=10, schedule=schedule, loss_knee=2.0
        )
        self._expected: list[frozenset[FailureClass]] = []
        self.world = World(physics, plan=self._plan())
        self.files = WorldFiles(self.world, folder)
        self.folder = folder
        self._formats: dict[str, Callable[[], None]] = {
            "telemetry": self._telemetry,
            "phases": self._phases,
            "heartbeats": self._heartbeat,
            "reports": self._report,
            "settings": self._config,
            "requests": self._request,
            "manifests": self._manifest,
            "stacks": self._stacks,
            "kinds of file": self._kind_of_file,
            "floods": self._flood,
        }
        self._weights = (6, 2, 6, 4, 2, 3, 2, 1, 1, 0.05)
        self._number = 0

    def _plan(self) -> list[Planned]:
        shape = {"nodes": 2, "spares": 1, "ranks_per_node": 1}
        arguments = {"lineage": "1", "recipe": "sim", "settings": [], "data": [], "tokenizer": None, "shape": shape}
        plan = [Planned(fault=faults.Ask(request="r-start", verb="start", arguments=arguments), at=0.0)]
        death, gpu, hang = (
            frozenset({each}) for each in (FailureClass.PROCESS_DEATH, FailureClass.BAD_GPU, FailureClass.HANG)
        )
        loss = frozenset({FailureClass.LOSS_SPIKE, FailureClass.LOSS_DRIFT, FailureClass.NON_FINITE_LOSS})
        divergence = Divergence(step=self._random.randrange(150, 170))
        plan.append(Planned(fault=faults.Diverge(divergence=divergence), at=0.0))
        self._expected.append(loss)
        steps = self._random.sample(range(20, 120, 20), 3)
        for step, (fault, classes) in zip(
            steps, ((faults.KillRank(), death), (faults.BadGpu(), gpu), (faults.Hang(), hang)), strict=True
        ):
            plan.append(Planned(fault=fault, step=step + self._random.randrange(10)))
            self._expected.append(classes)
        return plan

    def run(self, until: int) -> None:
        """Drive the lineage to its end, with mutations until there are `until` of them in all."""
        figures, lives, state = self._figures, 0, None
        while (state is None or not state.finished) and self.world.now < LONGEST and lives < MOST_LIVES:
            lives += 1
            if state is not None and state.status is Status.PAUSED:  # as a lie has asked
                self.world.ask(
                    Request(request=f"r-{lives}", author="ann", verb="resume", arguments={"reason": "a lie"})
                )
            try:
                state = self._live(until)
            except Exception as error:  # noqa: BLE001 - an attack finds every error, whatever it is
                place = traceback.extract_tb(error.__traceback__)[-1]
                figures.lives_ended += 1
                figures.errors[
                    f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"[:200]
                ] += 1
                pass_time(self.world, LONGEST, Pace(tick=10.0))
        figures.lives += lives
        self._judge()

    def _live(self, until: int) -> State:
        """One daemon process."""
        simulated = ports(self.world)
        left_out = LeftOutCounter(self.folder)
        supervisor = Supervisor(
            self.folder,
            Ports(
                clock=simulated.clock,
                scheduler=simulated.scheduler,
                agents=FileAgents(self.folder, left_out),
                trainer=FileTrainer(self.folder, left_out),
                checkpoints=FileCheckpoints(self.folder),
                inbox=FileInbox(self.folder, left_out),
                notifier=simulated.notifier,
                evaluations=simulated.evaluations,
                inputs=left_out,
            ),
            POLICY,
            Site(folder=str(self.folder), trainer=("train",)),
            DaemonIdentity(host="head", pid=1, last_liveness=None),
        )
        try:
            for _ in range(TICKS_A_LIFE):
                self.files.write()
                for _ in range(A_TICK):
                    if self._figures.mutations < until:
                        self._strike()
                supervisor.tick()
                self.files.follow()
                if supervisor.state.finished or self.world.now >= LONGEST:
                    break
                pass_time(self.world, LONGEST, Pace(stride=60.0))
        finally:
            supervisor.close()
        return supervisor.state

    def _strike(self) -> None:
        name = self._random.choices(list(self._formats), self._weights)[0]
        self._formats[name]()
        self._number += 1
        self._figures.mutations += 1
        self._figures.formats[name] += 1

    def _judge(self) -> None:
        figures = self._figures
        figures.lineages += 1
        try:
            state = replay(read(self.folder / "journal")[0])
        except Exception as error:  # noqa: BLE001 - whatever the reason, a fresh process cannot read this journal
            figures.unreadable += 1
            figures.errors[f"journal: {error}"[:200]] += 1
            return
        figures.stuck += not state.finished
        if self._lies:
            return
        unproven = state.status is not Status.COMPLETED
        left = [each for each in state.incidents.values() if each.kind != FailureClass.DAEMON_RESTART]
        for classes in self._expected:
            found = next((each for each in left if each.kind in classes and each.proven), None)
            figures.faults += 1
            figures.unrecovered += found is None or unproven
            if found is not None:
                left.remove(found)
        figures.false_acts += len(left)
        for each in left:
            figures.errors[f"{self.folder.name}: not caused by a fault: {each.kind}: {each.cause}"[:200]] += 1
        if unproven:
            figures.errors[f"{self.folder.name}: {state.status}: {state.why}"[:200]] += 1

    # ---- the formats

    def _line(self, path: Path, record: dict[str, object], keep: frozenset[str] = frozenset()) -> None:
        """Append a mutated line."""
        if self._random.random() < 0.2:
            data = break_bytes(to_json(record).encode(), self._random)
        else:
            data = self._mutated(record, keep)
        append(path, data + b"\n")

    def _file(self, path: Path, record: dict[str, object], keep: frozenset[str] = frozenset()) -> None:
        """Replace a file by a mutated one."""
        broken = self._random.random() < 0.2
        data = break_bytes(to_json(record).encode(), self._random) if broken else self._mutated(record, keep)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(".hostile.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)

    def _mutated(self, record: dict[str, object], keep: frozenset[str] = frozenset()) -> bytes:
        return mutate(record, self._random, self._lies, frozenset() if self._lies else keep).encode()

    def _training(self) -> Training | None:
        return self.world.running

    def _telemetry(self) -> None:
        if (training := self._training()) is not None and training.points:
            path = self.files.attempt(training.launch.attempt) / "telemetry.jsonl"
            busy = {"step": [1.0, 1.0], "data": [0.1, 0.1]}
            extra = {"busy_seconds": busy, "valid": {"a": 1.0}, "loss_scale": 128.0, "save_error": "no space"}
            self._line(path, telemetry_line(training.points[-1]) | extra, _MEANINGFUL)

    def _phases(self) -> None:
        if (training := self._training()) is not None:
            record = {"ts": self.world.wall(), "phase": "training", "step": training.step}
            self._line(self.files.attempt(training.launch.attempt) / "phases.jsonl", record)

    def _heartbeat(self) -> None:
        beats = self.world.agents.heartbeats({})
        if beats:
            beat = self._random.choice(beats)
            self._line(self.folder / "health" / f"{beat.node}.jsonl", heartbeat_fields(beat))
            self.files.append(self.folder / "health" / f"{beat.node}.jsonl", heartbeat_fields(beat))

    def _report(self) -> None:
        training = self._training()
        if training is not None:
            attempt = training.launch.attempt
            node = self._random.choice(list(self.world.agents.reports(attempt)))
            if (path := self.files.attempt(attempt) / "nodes" / f"{node}.json").exists():
                self._file(path, self.files.report_fields(attempt, node), _ENDED)
                self.files.forget(attempt, node)

    def _config(self) -> None:
        if (training := self._training()) is not None and training.config is not None:
            attempt = training.launch.attempt
            self._file(self.files.attempt(attempt) / "config.json", config_fields(attempt, training))
            self.files.forget_config(attempt)

    def _request(self) -> None:
        verbs: list[tuple[str, dict[str, object]]] = [
            ("note", {"target": "1", "text": "x", "correction": False}),
            ("exclude", {"node": "n010", "reason": "x"}),
            ("start", {"lineage": "1", "recipe": "x", "settings": [], "data": [], "tokenizer": None, "shape": {}}),
        ]
        if self._lies:
            verbs += [
                ("change", {"settings": ["a=1"], "lr_factor": 0.5, "to": 10, "reason": "x"}),
                ("drill", {"fault": "kill-rank", "rank": 0}),
                ("drill", {"fault": "lr", "from_step": 0, "updates": 5, "factor": 2.0}),
                ("pause", {"reason": "x"}),
                ("resume", {"reason": "x"}),
            ]
        verb, arguments = self._random.choice(verbs)
        record = {"ts": self.world.wall(), "author": "mallory", "verb": verb, "arguments": arguments}
        self._file(self.folder / "inbox" / f"hostile-{self._number}.json", record)

    def _manifest(self) -> None:
        """Add a checkpoint that is none: its manifest is mutated, and its shard is not what the manifest says."""
        step = self._random.randrange(STEPS)
        path = self.folder / "1.00" / "checkpoints" / f"step-{step:08d}"
        if path.exists() or str(path) in self.world.checkpoints:
            return
        broken, record = self._random.random() < 0.2, manifest_fields(step, b"weights")
        text = "{" * 4000 if broken else mutate(record, self._random, self._lies)
        write_checkpoint(path, step, rotten=True, manifest=text)

    def _stacks(self) -> None:
        if (training := self._training()) is not None:
            record: dict[str, object] = {"stacks": {"0": "Current thread", "1": "x"}, "py_spy": {"1": None}}
            dumps = self.files.attempt(training.launch.attempt) / "stacks"
            dumps.mkdir(parents=True, exist_ok=True)
            for dump in [*dumps.iterdir(), dumps / f"1-i{self._random.randrange(6):03d}"]:
                self._file(dump / f"hostile-{self._number}.json", record)

    def _kind_of_file(self) -> None:
        places = [self.folder / "inbox" / f"k{self._number}.json", self.folder / "health" / f"k{self._number}.jsonl"]
        if (training := self._training()) is not None:
            attempt = self.files.attempt(training.launch.attempt)
            places += [
                attempt / "nodes" / f"k{self._number}.json",
                attempt / "stacks" / f"1-i00{self._number % 5}" / "k",
            ]
        path = self._random.choice(places)
        if not path.exists() and not path.is_symlink():
            other_kind(path, self._random)

    def _flood(self) -> None:
        if (training := self._training()) is not None and training.points:
            path = self.files.attempt(training.launch.attempt) / "telemetry.jsonl"
            line = break_bytes(to_json(telemetry_line(training.points[-1])).encode(), self._random)[:2000]
            append(path, (line + b"\n") * FLOOD)


def attack(mutations: int, seed: int, folder: Path) -> Figures:
    """Attack one lineage after the other, and then the readers of other formats, with `mutations` in all."""
    figures, began, number = Figures(), time.monotonic(), 0
    by_lineages = mutations - mutations // 5
    while figures.mutations < by_lineages:
        target = folder / f"{number:04d}"
        target.mkdir(mode=0o700)
        Attack(target, seed * 100_000 + number, bool(number % 2), figures).run(by_lineages)
        number += 1
    journals = [each / "journal" for each in sorted(folder.iterdir())]
    for name, error in attack_readers(mutations - by_lineages, Random(seed), journals):
        figures.mutations += 1
        figures.formats[name] += 1
        if error is not None:
            figures.readers_ended += 1
            figures.errors[f"{name}: {type(error).__name__}: {error}"[:200]] += 1
    figures.seconds = time.monotonic() - began
    return figures


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile-inputs-") as folder:
        figures = attack(options.mutations, options.seed, Path(folder))
    print(figures.table())
    for error, count in figures.errors.most_common(40):
        print(f"{count:6} × {error}", file=sys.stderr)
    return 0 if figures.clean else 1


if __name__ == "__main__":
    sys.exit(main())
