"""`opt-ops init`: write a commented configuration file."""

from __future__ import annotations

import shutil
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from opt_ops.cli.shared.options import QuietOption
from opt_ops.cli.shared.output import say
from opt_ops.config import FILE, load
from opt_ops.errors import Refused
from opt_ops.runfolder.files import write_text


class Kind(StrEnum):
    """The scheduler that a configuration is for."""

    LOCAL = "local"
    SLURM = "slurm"


_LOCAL = """# opt-ops: this machine as a small cluster. docs/configuration.md lists all keys; all are optional.

runs = "runs"                  # journals, telemetry, checkpoints, logbooks
scheduler = "local"

[local]
nodes = ["n1", "n2", "n3"]     # each has its own agent and ranks

[shape]                        # defaults of `run start`
nodes = 2                      # nodes that train
spares = 1                     # spare nodes
ranks_per_node = 1
"""

_SLURM = """# opt-ops on Slurm. docs/configuration.md lists all keys; all are optional.

runs = "{runs}"                # on a file system that all nodes share
scheduler = "slurm"

[slurm]
{partition}
# account = "llm"
# qos = "high"
time_minutes = 4320            # time limit of a job; training moves to the next job before it ends
{gpus}
exclusive = true
# cpus_per_task = 96           # one task on each node: the agent and its ranks
# additional = {{ reservation = "llm" }}   # any other option of sbatch

[shape]                        # defaults of `run start`
nodes = 2                      # nodes that train
spares = 1                     # spare nodes: they replace a bad node without a new job
ranks_per_node = {ranks}

[health]
gpus_per_node = {expected}              # fewer is a bad node; 0: nodes have no GPUs
"""

_REST = """
[trainer]
# command = ["python", "-m", "trainer"]    # docs/contract.md: what another trainer must do
# environment = { NCCL_DEBUG = "WARN" }

[mlflow]
# tracking_uri = "http://mlflow.example:5000"   # default: SQLite in the runs folder
experiment = "opt-ops"

[alerts]                       # where alerts are sent: docs/alerts.md
urls = []                      # ["$OPT_OPS_HOOK", "mailtos://ops@example.com"]; $NAME is an environment variable
least = "warning"              # the lowest severity that is sent: "info", "warning" or "page"

[evaluate]                     # docs/evaluation.md: checkpoints are scored by lm-evaluation-harness
# every = 2000                 # steps; left out: only by `opt-ops ckpt evaluate`
# tasks = ["hellaswag", "piqa"]
# python = ".venv-evaluate/bin/python"   # that has lm-eval; default: the one that runs opt-ops
# where = "spare"              # an idle spare node, or "daemon"

[samples]                      # fixed prompts that checkpoints complete
# prompts = "prompts.txt"      # one prompt a line
# every = 5000                 # steps

[serve]                        # docs/serving.md: what answers requests for `opt-ops ckpt serve`
# python = ".venv-serve/bin/python"   # that has transformers[serving]; default: the one that runs opt-ops
# vllm = ".venv-vllm/bin/vllm" # the program of vLLM; default: it is not used

[ledger]                       # docs/ledger.md; a value without its factor is not computed
# pue = 1.1                    # kWh of the site for each kWh of its GPUs
# kg_co2e_per_kwh = 0.35       # of the electricity grid
# factor_source = "EPA eGRID2023, SRMV"   # of that factor; without it there are no tonnes of CO2e
# gpu_tdp_watts = 400          # of one GPU by its data sheet, for the conventional carbon figure
# cost_per_node_hour = 20.0
"""


def init(
    kind: Annotated[
        Kind | None, typer.Argument(help="local or slurm. [default: slurm if sbatch is found]", show_default=False)
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="File to write.")] = Path(FILE),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Write a commented configuration file for this site.

    Then check that it can be read.

    Examples:
      opt-ops init
      opt-ops init slurm --to /shared/llm/opt-ops.toml
    """
    if to.exists() and not force:
        raise Refused(f"{to} exists already", "opt-ops init --force replaces it")
    kind = kind or (Kind.SLURM if shutil.which("sbatch") else Kind.LOCAL)
    try:
        write_text(to, (_LOCAL if kind is Kind.LOCAL else _slurm()) + _REST)
    except OSError as error:
        raise Refused(
            f"{to} cannot be written: {error.strerror}", "opt-ops init --to FILE writes another file"
        ) from error
    load(to)
    print(to)
    say(f"  next: opt-ops doctor{'' if to == Path(FILE) else f' -c {to}'}", quiet)


def _slurm() -> str:
    """The text for Slurm, with the partition and GPUs that sinfo reports; without an answer they are comments."""
    partition, gpus = _partition()
    return _SLURM.format(
        runs=Path.cwd() / "runs",
        partition=f'partition = "{partition}"' if partition else '# partition = "train"',
        gpus=f"gpus_per_node = {gpus}" if gpus else "# gpus_per_node = 8",
        ranks=gpus or 1,
        expected=gpus,
    )


def _partition() -> tuple[str, int]:
    """The default partition, and the number of GPUs of its nodes."""
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
