"""An attempt whose ranks are replaced while it runs. The test plays agent and supervisor: it writes their files."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from opt_ops.contract.environment import Place, of_rank
from opt_ops.contract.files import write_durably
from opt_ops.contract.membership import Membership, ready_file, write_membership
from tests.forks import Forked
from tests.ports import free_port
from tests.trainer.forked import FORKS
from tests.trainer.harness import REPOSITORY, SMALL, settings, telemetry, wait_for

RECIPE = (*SMALL, "optim.peak_lr=3e-3", "peer_copies.every=1", "log_every=5", "checkpoint_every=1000000")


class Attempt:
    """Processes of ``python -m trainer``, each with the file of its membership.

    Attributes:
        members: the process of each rank.
        generation: the newest.
    """

    def __init__(self, folder: Path, text: Path, *pairs: str, world: int = 3, per_node: int = 1, standbys: int = 1):
        self.folder, self.run_dir, self.checkpoints = folder, folder / "a1", folder / "checkpoints"
        self.run_dir.mkdir(parents=True)
        self._args = [
            *("--recipe", "opt-tiny", "--data", str(text), "--run-dir", str(self.run_dir), "--attempt", "1.00-a1"),
            *("--checkpoint-dir", str(self.checkpoints), "--fence", str(folder / "attempt.json")),
            *settings(*RECIPE, *pairs),
        ]
        self._args += ["--valid", f"{text}:7"]
        self._world, self._per_node = world, per_node
        self._nodes = [f"n{rank // per_node}" for rank in range(world)]
        self.generation, self._count = 1, 0
        self.all: list[tuple[Forked, Path]] = []
        self._fence()
        self.members: list[Forked] = []
        self.standbys = [self.waiting() for _ in range(standbys)]
        self.wait_until(lambda: all(ready_file(self.file_of(each)).exists() for each in self.standbys), "not ready")
        port = free_port()
        self.members = [self._launch(rank, port) for rank in range(world)]
        self.launched = list(self.members)

    def _launch(self, rank: int, port: int) -> Forked:
        place = Place(rank, self._world, rank % self._per_node)
        variables = of_rank(
            place, local_world=self._per_node, address="127.0.0.1", port=port, node=self._nodes[rank], attempt="1.00-a1"
        )
        return self._start(variables)

    def _start(self, variables: dict[str, str], *more: str) -> Forked:
        file = self.folder / f"members-{len(self.all)}.json"
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("OPT_OPS", "RANK", "MASTER"))
        }
        process = FORKS.run(
            "trainer", [*self._args, *more], REPOSITORY, {**clean, **variables, "OPT_OPS_MEMBERS": str(file)}
        )
        self.all.append((process, file))
        return process

    def waiting(self, *pairs: str) -> Forked:
        """Start a process that waits for a place, perhaps with other settings."""
        variables = {"OPT_OPS_STANDBY": "1", "WORLD_SIZE": str(self._world), "OPT_OPS_NODE": "spare"}
        return self._start(variables, *settings(*pairs))

    def file_of(self, process: Forked) -> Path:
        return next(file for each, file in self.all if each is process)

    def replace(self, changes: dict[int, Forked]) -> None:
        """Order the next generation: those processes take the places of these ranks."""
        self.generation += 1
        self._fence()
        old = {rank: self.members[rank] for rank in changes}
        for rank, process in changes.items():
            if process in self.standbys:
                self.standbys.remove(process)
            self.members[rank] = process
            self._nodes[rank] = f"spare{self._count}"
            self._count += 1
        port = free_port()
        for rank, process in [*old.items(), *enumerate(self.members)]:
            placed = process is self.members[rank]
            write_membership(
                self.file_of(process),
                Membership(
                    attempt="1.00-a1",
                    generation=self.generation,
                    rank=rank if placed else None,
                    local_rank=rank % self._per_node,
                    nodes=tuple(self._nodes),
                    new=tuple(changes),
                    address="127.0.0.1",
                    port=port,
                ),
            )

    def _fence(self) -> None:
        about = {"v": 1, "attempt": "1.00-a1", "generation": self.generation}
        write_durably(self.folder / "attempt.json", json.dumps(about))

    def kill(self, rank: int) -> Forked:
        process = self.members[rank]
        process.kill()
        process.wait(60)
        return process

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.step >= step, f"step {step} is not reached")

    def wait_until(self, condition: Any, what: str) -> None:
        """Wait for a condition, as long as no member has ended by itself."""

        def holds() -> bool:
            for process in (*self.members, *self.standbys):
                assert process.poll() in (None, 0, -signal.SIGKILL), self.said()
            return condition()

        wait_for(holds, what)

    @property
    def step(self) -> int:
        """The last step in the telemetry."""
        path = self.run_dir / "telemetry.jsonl"
        lines = telemetry(self.run_dir) if path.exists() else []
        return lines[-1]["num_updates"] if lines else 0

    @property
    def joined(self) -> list[dict[str, Any]]:
        path = self.run_dir / "members.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_join(self) -> None:
        """Wait until the newest generation has begun."""
        self.wait_until(
            lambda: bool(self.joined) and self.joined[-1]["generation"] == self.generation,
            f"generation {self.generation} does not begin",
        )

    def drill(self, *kills: tuple[int, str, int]) -> None:
        """Let ranks kill themselves: rank, place and step of each."""
        entries = [
            {"id": f"{rank} {place} {step}", "kind": "kill-rank", "rank": rank, "in_step": place, "from_step": step - 1}
            for rank, place, step in kills
        ]
        write_durably(self.run_dir / "drill.json", json.dumps(entries))

    def replace_dead(self) -> bool:
        """Order the next generation if a member was killed. Returns whether one was."""
        dead = [rank for rank, process in enumerate(self.members) if process.poll() == -signal.SIGKILL]
        if dead:
            self.replace({rank: self.standbys[index] for index, rank in enumerate(dead)})
        return bool(dead)

    def finish(self) -> None:
        """Wait until all members have ended well."""
        for process in self.members:
            try:
                process.wait(300)
            finally:
                if process.poll() != 0:
                    for each, _ in self.all:
                        each.kill()
            assert process.poll() == 0, self.said()

    def said(self) -> str:
        for each, _ in self.all:
            each.kill()
        said = [(each.poll(), *each.communicate(60)) for each, _ in self.all]
        return "\n".join(f"--- {number}: {code}\n{out}{err}" for number, (code, out, err) in enumerate(said))

    def close(self) -> None:
        for process, _ in self.all:
            process.kill()

    def keep_alive(self) -> None:
        """Replace whoever dies, until all members have ended well."""

        def over() -> bool:
            self.replace_dead()
            return all(process.poll() == 0 for process in self.members)

        self.wait_until(over, "the attempt does not end")
