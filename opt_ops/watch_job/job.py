"""What Slurm says of somebody else's job. Nothing but `scontrol show`, `sacct` is ever called.

`scontrol show job` knows a job until some minutes after its end; the accounts know it longer, where a site has any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opt_ops.adapters.slurm.answers import NO_JOB
from opt_ops.adapters.slurm.command import ask
from opt_ops.adapters.slurm.states import Job, job_state
from opt_ops.core.text import clean
from opt_ops.errors import NotFound, SchedulerUnavailable, UsageError

JOB_ID = re.compile(r"\d{1,12}(?:_\d{1,9}|\+\d{1,4})?")
"""A job, a task of an array (`812_3`), a part of a heterogeneous job (`812+1`)."""

_FIELD = re.compile(r"(?:^|\s)(\w[\w/:]*)=")
_LONG_VALUES = frozenset({"Command", "WorkDir", "StdErr", "StdIn", "StdOut", "Comment", "AdminComment", "SubmitLine"})
_LONGEST = 4096  # characters of a value
_PATTERN = re.compile(r"%(\d{0,2})([%AabJjNnstuxW])")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job as Slurm reports it.

    Attributes:
        number: As the user gave it.
        word: Slurm's word for its state, such as RUNNING.
        meaning: What that means; None: no table has the word.
        reason: Why it waits or ended, in Slurm's words.
        nodes: Slurm's list of its nodes; empty: it has none.
        code, signal: How it ended; None: not known.
        logs: The files of its stdout and stderr; the same file once.
        name: The job's name. Untrusted text.
    """

    number: str
    word: str
    meaning: Job | None
    reason: str = ""
    nodes: str = ""
    code: int | None = None
    signal: int | None = None
    logs: tuple[Path, ...] = ()
    name: str = ""

    @property
    def running(self) -> bool:
        """Whether its processes run."""
        return self.meaning in (Job.HOLDS, Job.LEAVING) or (self.meaning is Job.MARK and bool(self.nodes))

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.meaning is Job.ENDED


def job_of(number: str) -> JobRecord:
    """Ask Slurm for a job: the controller first, then the accounts.

    Raises:
        UsageError: the number is no job's, or that of several.
        NotFound: neither knows the job.
        SchedulerUnavailable: the controller does not answer, or not in a way that is understood.
    """
    if not JOB_ID.fullmatch(number):
        raise UsageError(f"{number} is no number of a Slurm job", "for example 812, or 812_3 for a task of an array")
    try:
        return _of_records(number, "\n".join(ask("scontrol", "show", "job", number)))
    except SchedulerUnavailable as error:
        if NO_JOB not in str(error):
            raise
    return _from_accounts(number)


def _of_records(number: str, text: str) -> JobRecord:
    records = [_fields(part) for part in re.split(r"(?m)^(?=JobId=)", text) if part.startswith("JobId=")]
    records = [each for each in records if each.get("JobState")]
    if not records:
        raise SchedulerUnavailable(
            f"scontrol does not say what state job {number} is in", f"scontrol show job {number}"
        )
    if len(records) > 1 and "_" not in number:
        started = [each for each in records if each.get("JobId") == number]
        parts = [each for each in records if each.get("HetJobOffset") == "0"]
        if len(parts) != 1 and (len(started) != 1 or any(each.get("ArrayTaskId") for each in records)):
            names = [f"{each.get('ArrayJobId', number)}_{each.get('ArrayTaskId', '?')}" for each in records[:3]]
            raise UsageError(
                f"job {number} is an array of {len(records)} tasks", f"name one task, such as {', '.join(names)}"
            )
        records = parts or started
    return _record(number, records[0])


def _fields(record: str) -> Mapping[str, str]:
    """The fields of one record. A line that begins with a long value, such as a path, holds nothing else."""
    found: dict[str, str] = {}
    for line in record.splitlines():
        name, sign, value = line.strip().partition("=")
        if sign and name in _LONG_VALUES:
            found.setdefault(name, value[:_LONGEST])
            continue
        places = list(_FIELD.finditer(line))
        for number, place in enumerate(places):
            last = number + 1 == len(places) or place[1] == "JobName"  # a user chose the rest of this line
            end = len(line) if last else places[number + 1].start()
            found.setdefault(place[1], line[place.end() : end].strip()[:_LONGEST])
            if place[1] == "JobName":
                break
    return found


def _record(number: str, fields: Mapping[str, str]) -> JobRecord:
    known = job_state(fields["JobState"])
    code, signal = _exit(fields.get("ExitCode", ""))
    paths = (_path(fields.get(name, ""), fields) for name in ("StdOut", "StdErr"))
    return JobRecord(
        number=number,
        word=known[1] if known else clean(fields["JobState"], 40),
        meaning=known[0] if known else None,
        reason="" if fields.get("Reason") in (None, "None", "(null)") else clean(fields["Reason"], 200),
        nodes="" if fields.get("NodeList") in (None, "(null)", "None assigned") else fields["NodeList"],
        code=code,
        signal=signal,
        logs=tuple(dict.fromkeys(path for path in paths if path is not None)),
        name=clean(fields.get("JobName", ""), 100),
    )


def _exit(text: str) -> tuple[int | None, int | None]:
    """`1:0` → code 1; `0:9` → signal 9."""
    found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text.strip())
    if found is None:
        return None, None
    code, signal = int(found[1]), int(found[2])
    return (None, signal) if signal else (code, None)


def _path(text: str, fields: Mapping[str, str]) -> Path | None:
    """A file of the job's output, its patterns filled in; None: it has none."""
    if not text or text in ("(null)", "/dev/null"):
        return None
    path = Path(_PATTERN.sub(lambda found: _filled(found, fields), text))
    return path if path.is_absolute() else Path(fields.get("WorkDir", "")) / path


def _filled(found: re.Match[str], fields: Mapping[str, str]) -> str:
    """A pattern of sbatch(1), `%j` and the like, for the batch script. Newer controllers fill them in themselves."""
    job = fields.get("JobId", "")
    first = re.split(r"[,\[]", fields.get("BatchHost") or fields.get("NodeList", ""), maxsplit=1)[0]
    values = {
        "%": "%",
        "A": fields.get("ArrayJobId", job),
        "a": fields.get("ArrayTaskId", "4294967294"),
        "J": job,
        "j": job,
        "N": first.partition(".")[0],
        "n": "0",
        "s": "batch",
        "t": "0",
        "u": fields.get("UserId", "").partition("(")[0],
        "x": fields.get("JobName", ""),
    }
    value = values.get(found[2], found[0])
    return value.rjust(int(found[1]), "0") if found[1] and value.isdigit() else value


def _from_accounts(number: str) -> JobRecord:
    """What the accounts say of a job that the controller has forgotten."""
    names = ("JobID", "State", "ExitCode", "NodeList", "WorkDir", "JobName", "StdOut", "StdErr")
    fields: Mapping[str, str] | None = None
    for asked in (names, names[:6]):  # Slurm before 24.05 does not keep where the output is
        try:
            fields = next(_accounts(number, asked), None)
        except SchedulerUnavailable as error:
            if "nvalid field" in str(error):
                continue
            fields = None
        break
    if fields is None:
        raise NotFound(f"Slurm does not know job {number}", "squeue --me lists your jobs; sacct those that have ended")
    code, signal = _exit(fields.get("ExitCode", ""))
    known = job_state(fields["State"])
    renamed = {**fields, "JobId": number.partition("_")[0]}
    paths = (_path(fields.get(name, ""), renamed) for name in ("StdOut", "StdErr"))
    return JobRecord(
        number=number,
        word=known[1] if known else clean(fields["State"], 40),
        meaning=known[0] if known else None,
        nodes=fields.get("NodeList", "").removeprefix("None assigned"),
        code=code,
        signal=signal,
        logs=tuple(dict.fromkeys(path for path in paths if path is not None)),
        name=clean(fields.get("JobName", ""), 100),
    )


def _accounts(number: str, names: Sequence[str]) -> Iterator[Mapping[str, str]]:
    for line in ask("sacct", "-n", "-P", "-X", "-j", number, "-o", ",".join(names)):
        values = line.split("|")
        if len(values) == len(names) and values[0] == number:
            yield dict(zip(names, values, strict=True))
