"""`opt-ops.toml`: what a site sets once. Unknown keys are refused, with the path to them."""

from __future__ import annotations

import os
import sys
import tomllib
from difflib import get_close_matches
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
    """How to ask Slurm for nodes; `additional` holds any other sbatch option."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_minutes: Annotated[int, Field(ge=1)] = 72 * 60
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    gpus_per_node: Annotated[int, Field(ge=1)] | None = None
    exclusive: bool = False
    additional: dict[str, str | int | bool] = {}


class DefaultShape(_Table):
    """How many nodes a lineage gets when `run start` does not say."""

    nodes: Annotated[int, Field(ge=1)] = 2
    spares: Annotated[int, Field(ge=0)] = 1
    ranks_per_node: Annotated[int, Field(ge=1)] = 1


class TrainerCommand(_Table):
    """How a rank is started. Name another trainer here to supervise it; docs/formats.md says what it must write."""

    command: Annotated[list[str], Field(min_length=1)] = [sys.executable, "-m", "trainer"]
    environment: dict[str, str] = {}
    snapshot_dir: str = ""  # on nodes' own disks, {node} being the node's name; empty: no snapshots
    checkpoint_copy: str = ""  # a second place for checkpoints, as a URL; empty: none


class Health(_Table):
    """What the site knows of its nodes."""

    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    burn_in_seconds: Annotated[float, Field(ge=0, le=90)] = 0.0  # of each node, once it is held; 0: none


class Chronicle(_Table):
    """How often the logbook is drawn anew while a lineage is alive. It is always drawn at its end."""

    every_seconds: Annotated[float, Field(ge=1)] = 30.0


class Mlflow(_Table):
    """Where MLflow keeps its store, and how often the chronicle is mirrored there while a lineage is alive."""

    enabled: bool = True
    tracking_uri: str | None = None  # default: SQLite in the runs folder
    experiment: str = "opt-ops"
    every_seconds: Annotated[float, Field(ge=1)] = 300.0


class Rates(_Table):
    """What the ledger multiplies node-hours and energy by: the site's own figures; without one, its product is none."""

    ideal_step_seconds: Annotated[float, Field(gt=0)] | None = None  # default: the fastest that the lineage has shown
    pue: Annotated[float, Field(ge=1)] = 1.0  # what the site uses for each kWh of its GPUs: hosts, network, cooling
    kg_co2e_per_kwh: Annotated[float, Field(ge=0)] | None = None
    cost_per_kwh: Annotated[float, Field(ge=0)] | None = None
    cost_per_node_hour: Annotated[float, Field(ge=0)] | None = None
    currency: str = "USD"


class Alerts(_Table):
    """Whom to tell, and who is to notice when nobody tells anything. URLs may hold `$NAME` for secrets."""

    urls: list[str] = []
    least: Literal["info", "warning", "page"] = "warning"
    heartbeat_url: str | None = None
    heartbeat_seconds: Annotated[float, Field(ge=1)] = 60.0


class Config(_Table):
    """Everything a site sets."""

    runs: Path = Path("runs")
    playbooks: Path | None = None  # default: those that come with opt-ops
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
        """Where MLflow's store is."""
        return self.mlflow.tracking_uri or f"sqlite:///{self.runs}/mlflow.db"


def locate(path: Path | None = None) -> Path | None:
    """The file that `load` reads: `path`, $OPT_OPS_CONFIG or ./opt-ops.toml, absolute. None: the defaults hold.

    Raises:
        UsageError: the file that was named is missing.
    """
    named = path or (Path(value) if (value := os.environ.get("OPT_OPS_CONFIG")) else None)
    file = (named or Path(FILE)).absolute()
    if file.exists():
        return file
    if named is not None:
        raise UsageError(f"no configuration at {file}", "name an existing file with -c, or leave it out")
    return None


def load(path: Path | None = None) -> Config:
    """The configuration of the file that `locate` finds; the defaults where there is none.

    Paths in it are relative to the file.

    Raises:
        UsageError: the file that was named is missing, cannot be read, is not TOML, or has unknown keys or values out
            of range; all of them are told.
    """
    file = locate(path)
    if file is None:
        return Config(runs=Path("runs").absolute())
    try:
        values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        config = Config.model_validate(values)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{file}: {error}", "mend that line; `opt-ops init --to FILE` writes one to compare"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{file} cannot be read: {why}", "name a file that you can read with -c") from error
    except ValidationError as error:
        wrong = "; ".join(_told(each["loc"], each["type"], each["msg"]) for each in error.errors())
        raise UsageError(f"{file}: {wrong}", "docs/configuration.md lists all keys") from error
    folder = file.parent
    playbooks = folder / config.playbooks if config.playbooks else None
    return config.model_copy(update={"runs": folder / config.runs, "playbooks": playbooks})


def _told(place: tuple[int | str, ...], kind: str, said: str) -> str:
    """One mistake, in words for people who know no Python."""
    key = ".".join(map(str, place))
    if kind == "extra_forbidden":
        table: Any = Config
        for part in place[:-1]:
            table = table.model_fields[part].annotation
        near = get_close_matches(str(place[-1]), table.model_fields, n=1)
        return f"{key}: unknown key{f'; did you mean {near[0]}?' if near else ''}"
    return f"{key}: {'it must be a path, in quotes' if kind == 'path_type' else said}"
