"""`opt-ops.toml`: the configuration of a site. An unknown key is an error that names it."""

from __future__ import annotations

import os
import sys
import tomllib
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opt_ops.errors import UsageError

FILE = "opt-ops.toml"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Local(_Table):
    """The local scheduler: this machine as a cluster."""

    nodes: Annotated[list[str], Field(min_length=1)] = ["n1", "n2", "n3"]


class Slurm(_Table):
    """Options of sbatch; `additional` holds those that have no key of their own."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_minutes: Annotated[int, Field(ge=1)] = 72 * 60
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    gpus_per_node: Annotated[int, Field(ge=1)] | None = None
    exclusive: bool = False
    additional: dict[str, str | int | bool] = {}


class DefaultShape(_Table):
    """The shape of a lineage where `run start` does not set it."""

    nodes: Annotated[int, Field(ge=1)] = 2
    spares: Annotated[int, Field(ge=0)] = 1
    ranks_per_node: Annotated[int, Field(ge=1)] = 1


class TrainerCommand(_Table):
    """The command that starts a rank. docs/formats.md says what another trainer must write."""

    command: Annotated[list[str], Field(min_length=1)] = [sys.executable, "-m", "trainer"]
    environment: dict[str, str] = {}
    snapshot_dir: str = ""  # on the nodes' own disks; {node} is the node's name; empty: no snapshots
    checkpoint_copy: str = ""  # a second place for checkpoints, as a URL; empty: none


class Health(_Table):
    """What a node of the site has, and how it is tested."""

    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    burn_in_seconds: Annotated[float, Field(ge=0, le=90)] = 0.0  # of each node, after it was allocated; 0: none


class Chronicle(_Table):
    """How often the logbook is drawn while a lineage is not finished. It is always drawn at the end."""

    every_seconds: Annotated[float, Field(ge=1)] = 30.0


class Mlflow(_Table):
    """MLflow's store, and how often a lineage that is not finished is mirrored there."""

    enabled: bool = True
    tracking_uri: str | None = None  # default: SQLite in the runs folder
    experiment: str = "opt-ops"
    every_seconds: Annotated[float, Field(ge=1)] = 300.0


class Rates(_Table):
    """Factors of the ledger for node-hours and energy. Without a factor, its result is none."""

    ideal_step_seconds: Annotated[float, Field(gt=0)] | None = None  # default: of the fastest 5 % of steps
    pue: Annotated[float, Field(ge=1)] = 1.0  # kWh of the site (hosts, network, cooling) for each kWh of its GPUs
    kg_co2e_per_kwh: Annotated[float, Field(ge=0)] | None = None
    cost_per_kwh: Annotated[float, Field(ge=0)] | None = None
    cost_per_node_hour: Annotated[float, Field(ge=0)] | None = None
    currency: str = "USD"


class Alerts(_Table):
    """Where alerts are sent, and the heartbeat for an outside monitor. A URL may hold `$NAME` for a secret."""

    urls: list[str] = []
    least: Literal["info", "warning", "page"] = "warning"
    heartbeat_url: str | None = None
    heartbeat_seconds: Annotated[float, Field(ge=1)] = 60.0


class Config(_Table):
    """The configuration of a site."""

    runs: Path = Path("runs")
    playbooks: Path | None = None  # default: those that are shipped with opt-ops
    scheduler: Literal["local", "slurm"] = "local"
    tick_seconds: Annotated[float, Field(gt=0)] = 0.5
    local: Local = Local()
    slurm: Slurm = Slurm()
    shape: DefaultShape = DefaultShape()
    trainer: TrainerCommand = TrainerCommand()
    health: Health = Health()
    chronicle: Chronicle = Chronicle()
    mlflow: Mlflow = Mlflow()
    alerts: Alerts = Alerts()
    ledger: Rates = Rates()

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
        raise UsageError(f"there is no configuration at {file}", "name an existing file with -c, or omit -c")
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
        config = Config.model_validate(values)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{file}: {error}", "correct that line; `opt-ops init --to FILE` writes a file to compare"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{file} cannot be read: {why}", "name a readable file with -c") from error
    except ValidationError as error:
        wrong = "; ".join(_message(each["loc"], each["type"], each["msg"]) for each in error.errors())
        raise UsageError(f"{file}: {wrong}", "docs/configuration.md lists all keys") from error
    folder = file.parent
    playbooks = folder / config.playbooks if config.playbooks else None
    return config.model_copy(update={"runs": folder / config.runs, "playbooks": playbooks})


def _message(place: tuple[int | str, ...], kind: str, said: str) -> str:
    """One error, without Python's words."""
    key = ".".join(map(str, place))
    if kind == "extra_forbidden":
        table: Any = Config
        for part in place[:-1]:
            table = table.model_fields[part].annotation
        near = get_close_matches(str(place[-1]), table.model_fields, n=1)
        return f"{key}: unknown key{f'; did you mean {near[0]}?' if near else ''}"
    return f"{key}: {'must be a path, in quotes' if kind == 'path_type' else said}"
