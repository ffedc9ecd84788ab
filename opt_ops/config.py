"""`opt-ops.toml`: the configuration of a site. An unknown key is an error that names it."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from opt_ops.errors import UsageError

FILE = "opt-ops.toml"

_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # it becomes the name of files, and a host name has at most 63
_DAY = 86400.0
_SBATCH_OF_OURS = (
    "array",
    "comment",
    "error",
    "job-name",
    "nodes",
    "ntasks-per-node",
    "output",
    "requeue",
    "signal",
    "wrap",
)
_MOST_NODES = 100_000  # more than any machine has; a larger number is a slip


def _whole(least: int, most: int) -> BeforeValidator:
    """A whole number in a range."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return value

    return BeforeValidator(check)


def _number(least: float, most: float) -> BeforeValidator:
    """A finite number in a range."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError(f"must be a number from {least:.10g} to {most:.10g}")
        return float(value)

    return BeforeValidator(check)


def _node_names(names: list[str]) -> list[str]:
    for name in names:
        if not _NODE.fullmatch(name):
            raise ValueError(
                "the name of a node must have at most 63 letters, digits, `.`, `_` and `-`, the first a letter or digit"
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} must be there only once: each node needs a name of its own")
    return names


def _only_additional(options: dict[str, Any]) -> dict[str, Any]:
    if ours := sorted(options.keys() & {each for name in _SBATCH_OF_OURS for each in (name, name.replace("-", "_"))}):
        raise ValueError(f"{', '.join(ours)}: opt-ops says that to sbatch itself, in its own way")
    return options


def _not_blank(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("must not be empty")
    return value


def _variables(values: dict[str, str]) -> dict[str, str]:
    for name in values:
        if not name or "=" in name:
            raise ValueError(f"{name!r} cannot be the name of a variable")
    return values


def _no_password(url: str) -> str:
    if re.match(r"[a-z0-9+.-]+://[^/@\s]*:[^/@\s]*@", url, re.IGNORECASE):
        raise ValueError("must hold no password, because ps shows it; set it where that URL's library looks")
    return url


_Text = Annotated[str, AfterValidator(_not_blank)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Local(_Table):
    """The local scheduler: this machine as a cluster."""

    nodes: Annotated[list[str], Field(min_length=1, max_length=1000), AfterValidator(_node_names)] = ["n1", "n2", "n3"]


class Slurm(_Table):
    """Options of sbatch; `additional` holds those that have no key of their own."""

    partition: _Text | None = None
    account: _Text | None = None
    qos: _Text | None = None
    time_minutes: Annotated[int, _whole(1, 10 * 366 * 24 * 60)] = 72 * 60
    cpus_per_task: Annotated[int | None, _whole(1, 100_000)] = None
    gpus_per_node: Annotated[int | None, _whole(1, 1024)] = None
    exclusive: bool = False
    additional: Annotated[dict[str, str | int | bool], AfterValidator(_only_additional)] = {}


class DefaultShape(_Table):
    """The shape of a lineage where `run start` does not set it."""

    nodes: Annotated[int, _whole(1, _MOST_NODES)] = 2
    spares: Annotated[int, _whole(0, _MOST_NODES)] = 1
    ranks_per_node: Annotated[int, _whole(1, 1024)] = 1


class TrainerCommand(_Table):
    """The command that starts a rank. docs/contract.md says what another trainer must do."""

    command: Annotated[list[_Text], Field(min_length=1)] = [sys.executable, "-m", "trainer"]
    environment: Annotated[dict[str, str], AfterValidator(_variables)] = {}
    check: bool | None = None  # ask it with --check before a start; default: only where the command is `-m trainer`
    snapshot_dir: str = ""  # on the nodes' own disks; {node} is the node's name; empty: no snapshots
    checkpoint_copy: Annotated[str, AfterValidator(_no_password)] = ""  # a second place, as a URL; empty: none

    @property
    def python(self) -> list[str] | None:
        """What stands before `-m trainer`; None if the command is another trainer."""
        at = next((at for at, pair in enumerate(pairwise(self.command)) if pair == ("-m", "trainer")), None)
        return None if at is None else self.command[:at]


class Recovery(_Table):
    """How an attempt goes on when it has lost ranks. Trainers that cannot replace ranks are always restarted."""

    in_place: bool = True  # replace only the lost ranks, where that can be done; false: each failure is a restart
    in_place_seconds: Annotated[float, _number(1, 3600)] = 120.0  # until all ranks have joined; then a restart
    standby: bool = True  # keep warm ranks on spare nodes, and a warm process on each node


class Health(_Table):
    """What a node of the site has, and how it is tested."""

    # None: `slurm.gpus_per_node`, and where that is not set, what most nodes have; 0: nodes have no GPUs
    gpus_per_node: Annotated[int, _whole(0, 1024)] | None = None
    burn_in_seconds: Annotated[float, _number(0, 90)] = 0.0  # of each node, after it was allocated; 0: none


class Chronicle(_Table):
    """How often the logbook is drawn while a lineage is not finished. It is always drawn at the end."""

    every_seconds: Annotated[float, _number(1, 30 * _DAY)] = 30.0


class Mlflow(_Table):
    """MLflow's store, and how often a lineage that is not finished is mirrored there."""

    enabled: bool = True
    tracking_uri: _Text | None = None  # default: SQLite in the runs folder
    experiment: _Text = "opt-ops"
    every_seconds: Annotated[float, _number(1, 30 * _DAY)] = 300.0


class Rates(_Table):
    """Factors of the ledger for node-hours and energy. Without a factor, its result is none."""

    ideal_step_seconds: Annotated[float | None, _number(1e-6, _DAY)] = None  # default: of the fastest 5 % of steps
    pue: Annotated[float, _number(1, 100)] = 1.0  # kWh of the site (hosts, network, cooling) for each kWh of its GPUs
    kg_co2e_per_kwh: Annotated[float | None, _number(0, 1000)] = None
    factor_source: _Text | None = None  # of that factor, such as "EPA eGRID2023, SRMV"
    factor_year: Annotated[int | None, _number(1990, 2100)] = None
    gpu_tdp_watts: Annotated[float | None, _number(1, 10_000)] = Field(  # of one GPU, for the conventional figure
        default=None, validation_alias=AliasChoices("gpu_tdp_watts", "tdp_watts")
    )
    cost_per_kwh: Annotated[float | None, _number(0, 1e9)] = None
    cost_per_node_hour: Annotated[float | None, _number(0, 1e9)] = None
    currency: _Text = "USD"


class Evaluate(_Table):
    """Evaluation of checkpoints by lm-evaluation-harness, in a process of its own."""

    every: Annotated[int, _whole(0, 10**9)] = 0  # steps; 0: only by hand
    tasks: list[_Text] = []  # names of the harness, opt-16, opt-bias, or folders with tasks of one's own
    shots: Annotated[int, _whole(0, 1000)] = 0
    limit: Annotated[int | None, _whole(1, 10**9)] = None  # documents of each task; default: all
    python: _Text = sys.executable  # of the environment that has the harness
    where: Literal["spare", "daemon"] = "spare"  # an idle spare node, or the daemon's host
    nice: Annotated[int, _whole(0, 19)] = 10  # of its processes


class SamplePrompts(_Table):
    """Fixed prompts that checkpoints complete at milestones, in the environment of `[evaluate]`."""

    prompts: Path | None = None  # one prompt a line; default: none
    every: Annotated[int, _whole(1, 10**9)] = 5000  # steps
    tokens: Annotated[int, _whole(1, 2048)] = 60


class Serve(_Table):
    """Engines that answer requests to a checkpoint."""

    python: _Text = sys.executable  # of the environment that has transformers[serving]
    vllm: _Text | None = None  # the program; default: vLLM is not used


class Alerts(_Table):
    """Where alerts are sent, and the heartbeat for an outside monitor. A URL may hold `$NAME` for a secret."""

    urls: list[_Text] = []
    least: Literal["info", "warning", "page"] = "warning"
    heartbeat_url: _Text | None = None
    heartbeat_seconds: Annotated[float, _number(1, _DAY)] = 60.0


class Config(_Table):
    """The configuration of a site."""

    runs: Annotated[Path, BeforeValidator(_not_blank)] = Path("runs")
    playbooks: Path | None = None  # default: those that are shipped with opt-ops
    scheduler: Literal["local", "slurm"] = "local"
    group: str = ""  # whose members may read lineages; nobody but their owner may write them
    tick_seconds: Annotated[float, _number(0.01, 10)] = 0.5  # more, and commands would call the daemon dead
    local: Local = Local()
    slurm: Slurm = Slurm()
    shape: DefaultShape = DefaultShape()
    trainer: TrainerCommand = TrainerCommand()
    recovery: Recovery = Recovery()
    health: Health = Health()
    chronicle: Chronicle = Chronicle()
    mlflow: Mlflow = Mlflow()
    alerts: Alerts = Alerts()
    ledger: Rates = Rates()
    evaluate: Evaluate = Evaluate()
    samples: SamplePrompts = SamplePrompts()
    serve: Serve = Serve()

    @property
    def expected_gpus(self) -> int:
        """GPUs that each node must have; 0: none are expected, or nothing says how many."""
        asked = self.slurm.gpus_per_node if self.scheduler == "slurm" else None
        own = self.health.gpus_per_node
        return (asked or 0) if own is None else own

    @property
    def tracking_uri(self) -> str:
        """The URI of MLflow's store."""
        return self.mlflow.tracking_uri or f"sqlite:///{self.runs}/mlflow.db"


def is_installed(module: str) -> bool:
    """Whether a package can be imported here. It is not imported."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def locate(path: Path | None = None) -> Path | None:
    """The file that `load` reads, absolute: `path`, $OPT_OPS_CONFIG or ./opt-ops.toml. None: there is none.

    Raises:
        UsageError: `path` or $OPT_OPS_CONFIG names a file that does not exist.
    """
    named = path or (Path(value) if (value := os.environ.get("OPT_OPS_CONFIG")) else None)
    file = (named or Path(FILE)).absolute()
    if file.exists():
        return file
    if named is not None:
        raise UsageError(f"there is no configuration at {file}", "opt-ops init writes one; or name another with -c")
    return None


def load(path: Path | None = None) -> Config:
    """The configuration in the file that `locate` finds; without a file, the defaults.

    Paths in it are relative to the file.

    Raises:
        UsageError: the named file does not exist, cannot be read, is not TOML, or has unknown keys or wrong values. The
            message lists all of them.
    """
    file = locate(path)
    if file is None:
        return Config(runs=Path("runs").absolute())
    try:
        values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        if wrong := list(_controls(values)):
            raise UsageError(f"{file}: {'; '.join(wrong)}", "write text without control characters")
        config = Config.model_validate(values)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{file}: {error}", "correct that line; `opt-ops init --to FILE` writes a file to compare"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{file} cannot be read: {why}", f"ls -l {file}; or name another file with -c") from error
    except ValidationError as error:
        wrong = "; ".join(map(_message, error.errors()))
        raise UsageError(
            f"{file}: {wrong}", "correct that key; `opt-ops init --to FILE` writes a file to compare"
        ) from error
    folder = file.parent
    prompts = config.samples.prompts
    paths = {
        "runs": folder / config.runs,
        "playbooks": folder / config.playbooks if config.playbooks else None,
        "samples": config.samples.model_copy(update={"prompts": folder / prompts if prompts else None}),
        "evaluate": config.evaluate.model_copy(
            update={
                "python": _program(folder, config.evaluate.python),
                "tasks": [str(folder / each) if (folder / each).is_dir() else each for each in config.evaluate.tasks],
            }
        ),
        "serve": config.serve.model_copy(
            update={
                "python": _program(folder, config.serve.python),
                "vllm": _program(folder, config.serve.vllm) if config.serve.vllm else None,
            }
        ),
    }
    return config.model_copy(update=paths)


def _program(folder: Path, text: str) -> str:
    """A program: its name, which the PATH finds, or its path."""
    return str(folder / text) if "/" in text else text


def _controls(values: Any, key: str = "") -> Iterator[str]:
    """The texts that hold a control character: a path, an option or a URL with one would fail much later."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _controls(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _controls(value, f"{key}.{number}")
    if any(not character.isprintable() for text in (key, values) if isinstance(text, str) for character in text):
        yield f"{ascii(key)[1:-1]}: must have no control characters, not {ascii(values)[:80]}"


def _message(error: Any) -> str:
    """One error: the key, the value, and what it must be, without Python's words."""
    place, kind, said = error["loc"], error["type"], error["msg"].removeprefix("Value error, ")
    key = ".".join(map(str, place))
    if kind == "extra_forbidden":
        table: Any = Config
        for part in place[:-1]:
            table = table.model_fields[part].annotation
        near = get_close_matches(str(place[-1]), table.model_fields, n=1)
        return f"{key}: unknown key{f'; did you mean {near[0]}?' if near else ''}"
    return f"{key}: {'must be a path, in quotes' if kind == 'path_type' else said}, not {_toml(error['input'])}"


def _toml(value: Any) -> str:
    """A value as it stands in the file, or about so."""
    if isinstance(value, bool):
        return str(value).lower()
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
