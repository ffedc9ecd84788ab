"""Files that keep a daemon running: for systemd, cron, scrontab, and a Slurm job that submits its successor.

All of them start the same command with absolute paths. docs/daemon.md says how each behaves after a reboot, an upgrade
and a kill.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from enum import StrEnum
from pathlib import Path

from opt_ops.config import Config
from opt_ops.errors import Refused, UsageError


class Form(StrEnum):
    """What can keep a daemon running."""

    SYSTEMD = "systemd"
    CRONTAB = "crontab"
    SCRONTAB = "scrontab"
    SLURM = "slurm"


def unit(form: Form, config: Config, file: Path | None, partition: str | None) -> str:
    """The text of a unit for this site.

    Args:
        form: The form.
        config: The site's configuration.
        file: Its absolute path; None if the site has no file.
        partition: Partition of the jobs of `scrontab` and `slurm`; None: that of the lineages.

    Raises:
        Refused: with the local scheduler, the agents would end with the daemon's Slurm job.
        UsageError: a path has a line break, which these files cannot hold.
    """
    folder, runs = file.parent if file else config.runs.parent, config.runs
    if form in (Form.SCRONTAB, Form.SLURM) and config.scheduler != "slurm":
        raise Refused(
            'with scheduler = "local", training would end with the daemon\'s job',
            "opt-ops daemon unit systemd, or crontab",
        )
    if "\n" in f"{folder}{runs}{file}{sys.executable}":
        raise UsageError("a path of this site has a line break in it", "rename that folder")
    python = [sys.executable, "-m", "opt_ops", *(["-c", str(file)] if file else [])]
    if form is Form.SYSTEMD:
        return _systemd(folder, _variables(config), [*python, "daemon", "run"])
    options = _job_options(config, partition)
    if form is Form.SLURM:
        return _slurm(folder, runs, options, _variables(config), [*python, "daemon", "run"])
    command = ["env", *_variables(config), *python, "daemon"]
    if form is Form.CRONTAB:
        return _crontab(folder, shlex.join([*command, "ensure", "-q"]))
    return _scrontab(folder, runs, options, shlex.join([*command, "run"]))


def job_name(runs: Path) -> str:
    """Name of the daemon's own job: one for each runs folder, and never that of a lineage's job."""
    return f"opt-ops-daemon-{hashlib.sha256(str(runs).encode()).hexdigest()[:8]}"


def _variables(config: Config) -> list[str]:
    """PATH to this Python and to Slurm's commands: cron and systemd know the system's folders only."""
    programs = (sys.executable, shutil.which("sbatch"))
    folders = [str(Path(program).parent) for program in programs if program]
    path = ":".join(dict.fromkeys([*folders, "/usr/local/bin", "/usr/bin", "/bin"]))
    conf = os.environ.get("SLURM_CONF") if config.scheduler == "slurm" else None
    return [f"PATH={path}", *([f"SLURM_CONF={conf}"] if conf else [])]


def _systemd(folder: Path, variables: list[str], command: list[str]) -> str:
    def plain(path: Path) -> str:  # systemd.unit(5), "Specifiers"
        return str(path).replace("%", "%%")

    def quoted(word: str) -> str:  # systemd.syntax(7), "Quoting"
        escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
        return f'"{escaped}"'

    start = " ".join(quoted(word).replace("$", "$$") for word in command)
    return f"""\
# Put into ~/.config/systemd/user/opt-ops.service, then
#   loginctl enable-linger
#   systemctl --user daemon-reload
#   systemctl --user enable --now opt-ops
[Unit]
Description=opt-ops watches training
StartLimitIntervalSec=0

[Service]
Type=exec
WorkingDirectory={plain(folder)}
Environment={" ".join(quoted(variable) for variable in variables)}
# secrets of [alerts], as lines of NAME=value; make it readable by you alone
EnvironmentFile=-{plain(folder / "opt-ops.env")}
ExecStart={start}
Restart=always
RestartSec=10
# the local scheduler's agents are children of the daemon, and outlive it
KillMode=process
OOMPolicy=continue

[Install]
WantedBy=default.target
"""


def _crontab(folder: Path, ensure: str) -> str:
    line = f"cd {shlex.quote(str(folder))} && {ensure}".replace("%", r"\%")  # crontab(5): a bare % ends the command
    return f"""\
# Add with: crontab -e
# secrets of [alerts]: lines of NAME=value above this one
* * * * * {line}
"""


def _job_options(config: Config, partition: str | None) -> dict[str, str | int | None]:
    """Options of sbatch and scrontab: one core, and the time limit of a lineage's job."""
    slurm = config.slurm
    wanted = {"partition": partition or slurm.partition, "account": slurm.account, "qos": slurm.qos}
    size = {"ntasks": 1, "cpus-per-task": 1, "mem": "4G", "time": slurm.time_minutes}
    return {"job-name": job_name(config.runs), "output": "/dev/null", **wanted, **size}


def _lines(word: str, options: dict[str, str | int | None]) -> str:
    return "\n".join(f"{word} --{name}={value}" for name, value in options.items() if value is not None)


def _to_log(runs: Path) -> str:
    """Send the output of a job to the file that `daemon ensure` writes, too."""
    return f"mkdir -p {shlex.quote(str(runs))} && exec >>{shlex.quote(str(runs / 'daemon.log'))} 2>&1"


def _scrontab(folder: Path, runs: Path, options: dict[str, str | int | None], run: str) -> str:
    return f"""\
# Add with: scrontab -e
{_lines("#SCRON", options)}
* * * * * {_to_log(runs)} && cd {shlex.quote(str(folder))} && exec {run}
"""


def _slurm(
    folder: Path, runs: Path, options: dict[str, str | int | None], variables: list[str], command: list[str]
) -> str:
    name = job_name(runs)
    return f"""\
#!/bin/bash
# Write this into a file and submit it once with sbatch. To end it for good: scancel --me --name={name}
{_lines("#SBATCH", options)}
#SBATCH --dependency=singleton
#SBATCH --no-requeue
export {shlex.join(variables)}
{_to_log(runs)} && cd {shlex.quote(str(folder))} || exit
# Queue the next one: it waits until this one has ended, however that was. Not before a minute has passed, so that a
# daemon that cannot start is not a storm of jobs.
(
  until [ -n "$(squeue --noheader --me --states=PENDING --name={name} --format=%i)" ] ||
    sbatch --parsable --begin=now+60 "$0"; do
    sleep 60
  done &
)
exec {shlex.join(command)}
"""
