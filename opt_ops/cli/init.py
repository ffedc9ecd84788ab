"""`opt-ops init`: a commented configuration to begin with."""

from __future__ import annotations

import shutil
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from opt_ops.cli.options import QuietOption
from opt_ops.cli.output import say
from opt_ops.config import FILE, load
from opt_ops.errors import Refused
from opt_ops.runfolder.files import write_text


class Kind(StrEnum):
    """What a configuration is for."""

    LOCAL = "local"
    SLURM = "slurm"


_LOCAL = """# opt-ops: this machine as a small cluster. docs/configuration.md lists all keys; every one may be left out.

runs = "runs"                  # journals, telemetry, checkpoints, logbooks
scheduler = "local"

[local]
nodes = ["n1", "n2", "n3"]     # each gets an agent and processes of its own

[shape]                        # of a lineage, where `run start` does not say
nodes = 2                      # train
spares = 1                     # held beside them
ranks_per_node = 1
"""

_SLURM = """# opt-ops on Slurm. docs/configuration.md lists all keys; every one may be left out.

runs = "{runs}"                # on a file system that all nodes share
scheduler = "slurm"

[slurm]
{partition}
# account = "llm"
# qos = "high"
time_minutes = 4320            # a job's time limit; training moves to the next job before it
{gpus}
exclusive = true
# cpus_per_task = 96           # a task is a node's agent with all its ranks
# additional = {{ reservation = "llm" }}   # any other option of sbatch

[shape]                        # of a lineage, where `run start` does not say
nodes = 2                      # train
spares = 1                     # held beside them, so that an attempt moves off a bad node without the queue
ranks_per_node = {ranks}

[health]
gpus_per_node = {expected}              # fewer is a bad node; 0: nodes without GPUs
"""

_REST = """
[trainer]
# command = ["python", "-m", "trainer"]    # another trainer: docs/formats.md says what it must write
# environment = { NCCL_DEBUG = "WARN" }

[mlflow]
# tracking_uri = "http://mlflow.example:5000"   # left out: SQLite in the runs folder
experiment = "opt-ops"

[alerts]                       # who is told when a human is needed: docs/alerts.md
urls = []                      # ["$OPT_OPS_HOOK", "mailtos://ops@example.com"]; $NAME comes from the environment
least = "warning"              # "info", "warning" or "page" and above

[ledger]                       # docs/ledger.md; what has no factor is not computed
# pue = 1.1                    # what the site draws for each kWh of its GPUs
# kg_co2e_per_kwh = 0.35       # of your grid
# cost_per_node_hour = 20.0
"""


def init(
    kind: Annotated[
        Kind | None, typer.Argument(help="local or slurm. [default: slurm where sbatch is found]", show_default=False)
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="The file to write.")] = Path(FILE),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Write a commented configuration, with what can be found out about this site, and check that it is read.

    Examples:
      opt-ops init
      opt-ops init slurm --to /shared/llm/opt-ops.toml
    """
    if to.exists() and not force:
        raise Refused(f"{to} is there already", "look into it, or add --force")
    kind = kind or (Kind.SLURM if shutil.which("sbatch") else Kind.LOCAL)
    try:
        write_text(to, (_LOCAL if kind is Kind.LOCAL else _slurm()) + _REST)
    except OSError as error:
        raise Refused(f"{to} cannot be written: {error.strerror}", "name another place with --to") from error
    load(to)
    print(to)
    say(f"  next: opt-ops doctor{'' if to == Path(FILE) else f' -c {to}'}", quiet)


def _slurm() -> str:
    """With the partition and GPUs that sinfo knows of; commented out where it does not answer."""
    partition, gpus = _seen()
    return _SLURM.format(
        runs=Path.cwd() / "runs",
        partition=f'partition = "{partition}"' if partition else '# partition = "train"',
        gpus=f"gpus_per_node = {gpus}" if gpus else "# gpus_per_node = 8",
        ranks=gpus or 1,
        expected=gpus,
    )


def _seen() -> tuple[str, int]:
    """The default partition, and the GPUs of its nodes."""
    command = ["sinfo", "--noheader", "--format=%P %G"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "", 0
    rows = [line.split() for line in done.stdout.splitlines() if len(line.split()) == 2]
    if not rows:
        return "", 0
    name, gres = next((row for row in rows if row[0].endswith("*")), rows[0])
    counts = [part.split("(")[0].rpartition(":")[2] for part in gres.split(",") if part.startswith("gpu")]
    plain = name.rstrip("*")
    sound = all(each.isalnum() or each in "-_." for each in plain)
    return plain if sound else "", int(counts[0]) if counts and counts[0].isdigit() else 0
