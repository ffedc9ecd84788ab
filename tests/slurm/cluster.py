"""A real Slurm on this one host, for tests: munge, MariaDB, slurmdbd, slurmctld and one slurmd per node.

    eval "$(python tests/slurm/cluster.py up)"   # sets SLURM_CONF; with --install, Debian's packages are fetched
    python tests/slurm/cluster.py down           # all clusters of this repository: of tests, too, that were interrupted

All of it lives in one folder (`.slurm/` in the repository): SLURM_CONF leads every daemon and command there
(slurmdbd looks for slurmdbd.conf beside slurm.conf), munge and MariaDB have their own sockets there, and ports
are free ones: /etc, and a Slurm, munge or MariaDB that this host runs already, are not touched. Everything runs
as root, so that no folder has to be opened to the users slurm, munge and mysql.

There are no pid files to go stale. A process belongs to the cluster if it is one of these daemons and works in
the cluster's folder, or is a task (it has SLURM_CONF and SLURMD_NODENAME from Slurm): /proc knows both.
"""

import argparse
import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".slurm"
PORTS = range(10000, 15000)  # beyond Slurm's own 6817-6819; other tests and training have those above
HEADER = "# Made by tests/slurm/cluster.py"  # a folder whose slurm.conf does not begin so is left alone
MAX_FOLDER = 75  # a Unix socket's path has at most 107 characters, and slurmstepd's takes 32 below the folder
USABLE = {"idle", "mix", "alloc", "comp"}  # node states, as `sinfo -o %t` writes them
DAEMONS = {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd"}
STARTERS = {"setsid", "mariadb-install"}  # what becomes or starts a daemon, by the kernel's 15 characters
PACKAGES = {"munged": "munge", "mariadbd": "mariadb-server", "slurmdbd": "slurmdbd", "slurmd": "slurm-wlm"}
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/bin"])  # sbin is often left out
MARK = "OPT_OPS_TEST_RUN"  # a test run finds what belongs to it by this variable (tests/processes.py)
MARIADB = ["--no-defaults", "--user=root", "--datadir=."]

SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
AuthInfo=socket={folder}/munged/socket
StateSaveLocation={folder}/slurmctld
SlurmctldPidFile={folder}/slurmctld/pid
SlurmdPidFile={folder}/%n/pid
SlurmdSpoolDir={folder}/%n
SlurmdTimeout={slurmd_timeout}
ReturnToService=2
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
# submitit polls sacct, and sacct needs slurmdbd; the "pass" is munge's socket
AccountingStorageType=accounting_storage/slurmdbd
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munged/socket
AccountingStoreFlags=job_comment
# without cgroups, which a container may not give us
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# config_overrides: a node may promise more cores and memory than this host has
SlurmdParameters=config_overrides
NodeName=gpu[001-{nodes:03}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=8000
# whoever submits to "urgent" takes nodes away from the others: at once, or after some seconds of grace
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=graceful Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""
SLURMDBD_CONF = """\
AuthInfo=socket={folder}/munged/socket
DbdHost=localhost
DbdPort={dbd_port}
PidFile={folder}/slurmdbd/pid
StorageType=accounting_storage/mysql
"""


class ClusterError(Exception):
    """The cluster could not be brought up or taken down; the message says why and what to do."""


class UnavailableError(ClusterError):
    """This machine cannot run the cluster: not root, or packages are missing."""


@dataclass(frozen=True)
class Cluster:
    """A cluster, by its folder. What of it runs is asked of the system every time."""

    folder: Path
    nodes: tuple[str, ...]
    was_up: bool = False  # found rather than brought up

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment so that Slurm's commands speak to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def daemons(self) -> dict[str, int | None]:
        """Each daemon ("munged", …, "gpu004"), in the order of starting, with its pid, or None if it is dead."""
        alive = {home: pid for pid, home, program in processes_of(self.folder) if program in (home, "slurmd")}
        return {name: alive.get(name) for name in self._commands()}

    def states(self) -> dict[str, str]:
        """Each node's state as sinfo's %t writes it; empty when slurmctld does not answer."""
        return dict(re.findall(r"(\S+) (\S+)", self._ask("sinfo", "-h", "-N", "-o", "%N %t").stdout))

    def kill_node(self, name: str) -> None:
        """Let a node die silently: its slurmd, step daemons and tasks end at once, and nobody is notified."""
        assert name in self.nodes, f"no node {name} among {self.nodes}"
        _kill(self.folder, name)

    def revive_node(self, name: str) -> None:
        """Start a dead node's slurmd and wait until slurmctld has heard from it; ClusterError if it does not."""
        started = int(time.time())

        def registered() -> bool:
            since = re.search(r"SlurmdStartTime=(\d+)", self._ask("scontrol", "show", "node", name).stdout)
            return since is not None and int(since[1]) >= started

        if self.daemons()[name] is None:
            self._start(name)
            self._wait(name, registered)

    def stop(self, name: str) -> None:
        """End slurmctld or slurmdbd, which save their state first."""
        pid = self.daemons()[name]
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            while self.daemons()[name] is not None:
                time.sleep(0.1)

    def start(self, name: str) -> None:
        """Start one of these again, and wait until it answers; ClusterError if it does not."""
        checks = {"slurmctld": ["scontrol", "ping"], "slurmdbd": ["sacct", "-n"]}
        if self.daemons()[name] is None:
            self._start(name)
            self._wait(name, lambda: self._ask(*checks[name]).returncode == 0)

    def _commands(self) -> dict[str, list[str]]:
        """Each daemon's command, to be run in its own folder, by name and in the order of starting."""
        files = ["--socket=socket", "--pid-file=pid"]
        # --force: munge's socket may lie below a private folder, since only root speaks to it
        return {
            "munged": ["munged", "--foreground", "--force", *files, "--key-file=key", "--seed-file=seed"],
            "mariadbd": ["mariadbd", *MARIADB, *files, "--skip-networking", "--tmpdir=."],
            **{name: [name, "-D"] for name in ("slurmdbd", "slurmctld")},
            **{name: ["slurmd", "-D", "-N", name] for name in self.nodes},
        }

    def _environment(self) -> dict[str, str]:
        # nothing of the caller's: a SINFO_FORMAT or SLURM_JOB_ID would change what the commands say;
        # and MariaDB's socket, for which slurmdbd.conf has no setting
        own = {"MYSQL_UNIX_PORT": f"{self.folder}/mariadbd/socket", "SLURM_TIME_FORMAT": "%s"}
        return {**self.env, **own, **{name: os.environ[name] for name in (MARK,) if name in os.environ}}

    def _ask(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self._environment(), cwd=cwd, capture_output=True, text=True, timeout=300)

    def _start(self, name: str) -> None:
        """Start a daemon; `setsid --fork` makes it a child of init instead of ours."""
        home, command = self.folder / name, ["setsid", "--fork", *self._commands()[name]]
        with (home / "log").open("ab") as log:
            subprocess.run(command, cwd=home, env=self._environment(), stdout=log, stderr=log, check=True)

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        """Wait until a daemon is ready, at most five minutes, but not for one that is dead 5 s after its start."""
        started = time.monotonic()
        while not ready():
            waited = time.monotonic() - started
            alive = any(home == name for _, home, _ in processes_of(self.folder))  # or what is about to become it
            if waited > 300 or (waited > 5 and not alive):
                log = self.folder / name / "log"
                problem = f"{name} {'is not ready' if alive else 'has ended'} {waited:.0f} s after its start"
                raise ClusterError("\n  ".join([f"{problem}; {log}:", *log.read_text().splitlines()[-15:]]))
            time.sleep(0.1)

    def _configure(self, port: int, slurmd_timeout: int) -> None:
        """Make the folders, the configuration, munge's key and an empty database."""
        host, count = socket.gethostname().partition(".")[0], len(self.nodes)
        values = {"folder": self.folder, "host": host, "nodes": count, "slurmd_timeout": slurmd_timeout}
        values |= {"ctld_port": port, "dbd_port": port + 1, "first": port + 2, "last": port + 1 + count}
        self.folder.mkdir(parents=True, exist_ok=True)
        # slurm.conf comes first: it marks the folder as ours, should we be killed half-way
        (self.folder / "slurm.conf").write_text(f"{HEADER}\n{SLURM_CONF.format(**values)}")
        for name in self._commands():
            (self.folder / name).mkdir()
        private = {"slurmdbd.conf": SLURMDBD_CONF.format(**values).encode(), "munged/key": secrets.token_bytes(128)}
        for name, content in private.items():
            (self.folder / name).touch(0o600)  # slurmdbd and munged refuse what others may read
            (self.folder / name).write_bytes(content)
        command = ["mariadb-install-db", *MARIADB, "--auth-root-authentication-method=normal"]
        installed = self._ask(*command, cwd=self.folder / "mariadbd")
        if installed.returncode:
            raise ClusterError(f"mariadb-install-db failed:\n{installed.stdout}{installed.stderr}")

    def _start_all(self) -> None:
        """Start the daemons, each when the one that it needs is ready."""
        checks = {
            "munged": ["munge", "--no-input", f"--socket={self.folder}/munged/socket"],
            "mariadbd": ["mariadb-admin", "--no-defaults", f"--socket={self.folder}/mariadbd/socket", "ping"],
            "slurmdbd": ["sacctmgr", "--immediate", "add", "cluster", "tests"],
            "slurmctld": ["scontrol", "ping"],
        }
        for name, check in checks.items():
            self._start(name)
            self._wait(name, lambda check=check: self._ask(*check).returncode == 0)
        for name in self.nodes:
            self._start(name)
        for name in self.nodes:
            self._wait(name, lambda name=name: self.states().get(name) == "idle")

    def _resume(self) -> None:
        """Make nodes usable that an earlier test left drained or down."""
        for name in [name for name, state in self.states().items() if state not in USABLE]:
            self._ask("scontrol", "update", f"nodename={name}", "state=resume")
            self._wait(name, lambda name=name: self.states().get(name) in USABLE)


def processes_of(folder: Path) -> Iterator[tuple[int, str, str]]:
    """Every live process of the cluster in that folder, even a removed one: pid, daemon or node, program."""
    ours = f"SLURM_CONF={folder}/slurm.conf".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            program = (entry / "comm").read_text().strip()
            cwd = (entry / "cwd").readlink()
            environ = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        node = next((word.partition(b"=")[2] for word in environ if word.startswith(b"SLURMD_NODENAME=")), b"")
        if program in DAEMONS | STARTERS and folder in cwd.parents:
            yield int(entry.name), cwd.relative_to(folder).parts[0].removesuffix(" (deleted)"), program
        elif node and ours in environ:
            yield int(entry.name), node.decode(), program


def _kill(folder: Path, home: str | None = None) -> None:
    """Kill all processes of a cluster, or those of one daemon or node, and wait until they are gone.

    They are stopped first, so that none acts on the death of another: srun's helper process, when it outlives srun,
    ends the step on all nodes. The youngest is killed first: the kernel continues stopped processes whose group has
    lost its parent.
    """
    deadline = time.monotonic() + 60
    stopped: set[int] = set()
    while found := [process for process in processes_of(folder) if home in (None, process[1])]:
        if time.monotonic() > deadline:
            raise ClusterError(f"these processes survive SIGKILL: {found}")
        pids = {pid for pid, _, _ in found}
        new = pids - stopped
        for pid in sorted(new or pids, key=_started, reverse=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP if new else signal.SIGKILL)
        stopped |= new
        time.sleep(0.0 if new else 0.05)


def _started(pid: int) -> tuple[int, int]:
    """For sorting by age; pids alone begin again at the kernel's largest."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0, pid
    return int(stat.rpartition(")")[2].split()[19]), pid  # clock ticks since boot


def folders() -> list[Path]:
    """Of all clusters of this repository, also of those whose folder is gone while processes still work there."""
    found = set(FOLDER.parent.glob(f"{FOLDER.name}*"))
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (entry / "comm").read_text().strip() in DAEMONS | STARTERS:
                found.update(path for path in (entry / "cwd").readlink().parents if path.parent == FOLDER.parent)
    return sorted(path for path in found if path.name.startswith(FOLDER.name))


def folder_of(worker: str, run: int) -> Path:
    """Where a worker of pytest-xdist has its cluster; `run` is the controller's process id."""
    return FOLDER.with_name(f"{FOLDER.name}-{worker}-{run}")


def run_of(folder: Path) -> int | None:
    """The controller's process id, of a cluster of tests."""
    found = re.match(rf"{re.escape(FOLDER.name)}-\w+-(\d+)", folder.name)
    return int(found[1]) if found else None


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let one `up` or `down` run at a time on this machine; the lock is on a folder, so no file is left lying."""
    lock = os.open(tempfile.gettempdir(), os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _free_ports(first: int, count: int) -> int:
    """The first port from which `count` ports in a row are free or, as after `down`, linger in TIME_WAIT."""
    for base in range(first, PORTS.stop - count, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + count):
                probe = stack.enter_context(socket.socket())
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
            return base
    raise ClusterError(f"no {count} free ports in a row from {first} to {PORTS.stop}: choose --base-port")


def require(install: bool = False) -> None:
    """Check for root and the packages, fetching these if asked to; UnavailableError says what is missing."""
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)})
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    problems = ["not root, and only root may start tasks as any user"] if os.geteuid() else []
    if missing and install and not problems:
        for step in (["apt-get", "update"], ["env", "DEBIAN_FRONTEND=noninteractive", *command]):
            if subprocess.run(step, stdout=sys.stderr.fileno()).returncode:  # stdout is for eval
                problems.append(f"`{' '.join(step)}` failed, see above")
    elif missing:
        problems.append(f"missing packages: run `{' '.join(command)}` as root, or `up --install`")
    if problems:
        raise UnavailableError("this machine cannot run the test Slurm: " + "; ".join(problems))


def load(folder: Path) -> Cluster | None:
    """The cluster that lives in that folder, running or not; None where nothing is (or an empty slurm.conf)."""
    conf = folder / "slurm.conf"
    if not folder.exists() or not any(entry.stat().st_size for entry in folder.iterdir()):
        return None
    if not (conf.is_file() and conf.read_text().startswith(HEADER)):
        raise ClusterError(f"{folder} was not made by this program, so it is left alone: choose another --dir")
    return Cluster(folder, tuple(sorted(node.name for node in folder.glob("gpu*"))), was_up=True)


def up(folder: Path = FOLDER, nodes: int = 4, base_port: int = PORTS.start, slurmd_timeout: int = 300) -> Cluster:
    """Bring up a cluster with all nodes idle, or find it up and make its nodes usable.

    A half-up one, or what a killed one left, is swept away first. Ports are the first free row from base_port;
    slurmd_timeout is in seconds. ClusterError says which daemon did not come up, and the end of its log.
    """
    require()
    folder = folder.resolve()
    if len(str(folder)) > MAX_FOLDER or len(str(folder).split()) > 1:
        raise ClusterError(f"{folder}: choose a path of at most {MAX_FOLDER} characters, without spaces")
    with _one_at_a_time():
        found = load(folder)
        if found and all(found.daemons().values()):
            if len(found.nodes) != nodes:
                raise ClusterError(f"a cluster of {len(found.nodes)} nodes is up in {folder}: run `down` first")
            found._resume()
            return found
        _clear(folder)
        cluster = Cluster(folder, tuple(f"gpu{number:03}" for number in range(1, nodes + 1)))
        try:
            cluster._configure(_free_ports(base_port, 2 + nodes), slurmd_timeout)
            cluster._start_all()
        except BaseException:
            _kill(folder)  # and keep the logs
            raise
        return cluster


def down(folder: Path = FOLDER) -> None:
    """Kill all processes of the cluster and remove its folder."""
    with _one_at_a_time():
        _clear(folder.resolve())


def _clear(folder: Path) -> None:
    load(folder)  # refuses a folder that is not ours
    _kill(folder)
    if folder.exists():
        shutil.rmtree(folder)


def main() -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(description="A real Slurm on this one host, for tests.")
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument("--dir", type=Path, help=f"where it lives ({FOLDER}; down: all of this repository)")
    parser.add_argument("--nodes", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--base-port", type=int, default=PORTS.start, help="look for free ports from (%(default)s)")
    parser.add_argument("--slurmd-timeout", type=int, default=300, help="until a node is down (%(default)s s)")
    parser.add_argument("--install", action="store_true", help="fetch missing packages with apt-get")
    args = parser.parse_args()
    try:
        if args.command == "down":
            ended = [args.dir] if args.dir else folders()
            for folder in ended:
                down(folder)
            named = f": {', '.join(folder.name for folder in ended)}" if ended else ""
            print(f"{len(ended)} {'cluster' if len(ended) == 1 else 'clusters'} ended{named}", file=sys.stderr)
        elif args.command == "up":
            require(args.install)
            cluster = up(args.dir or FOLDER, args.nodes, args.base_port, args.slurmd_timeout)
            how = "Slurm is up already:" if cluster.was_up else "Slurm is up:"
            print(how, *map(" ".join, cluster.states().items()), file=sys.stderr)
            print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}")
        else:
            daemons = found.daemons() if (found := load((args.dir or FOLDER).resolve())) else {"Slurm": None}
            print(*(f"{name}: {pid or 'not running'}" for name, pid in daemons.items()), sep="\n")
            return 0 if all(daemons.values()) else 1
    except ClusterError as error:
        print(f"cluster.py: {error}", file=sys.stderr)
        return os.EX_UNAVAILABLE if isinstance(error, UnavailableError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
