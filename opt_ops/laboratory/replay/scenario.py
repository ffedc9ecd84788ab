"""Scenario files: a simulated cluster, the faults in it, and the source of each number.

A physical cost or a rate is `{ value = 45.0, source = "…" }`. The source says who measured it, or begins with the word
guess. docs/replay.md describes every table.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opt_ops.errors import UsageError
from opt_ops.laboratory.simulated import Costs
from opt_ops.laboratory.simulated.costs import InPlace

Recovery = Literal["in-place", "restart"]

SHIPPED = Path(__file__).parent / "scenarios"
_COMPARE = f"compare it with a shipped one: {SHIPPED / 'opt-175b.toml'}"


class ScenarioError(UsageError):
    """A scenario or a trace that cannot be replayed."""


class _ScenarioTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sourced(_ScenarioTable):
    """A number and its source."""

    value: Annotated[float, Field(ge=0)]
    source: Annotated[str, Field(min_length=3)]


def _zero(why: str) -> Sourced:
    return Sourced(value=0.0, source=why)


class ClusterSettings(_ScenarioTable):
    """The nodes."""

    nodes: Annotated[int, Field(ge=1)]
    spares: Annotated[int, Field(ge=0)]
    min_nodes: Annotated[int, Field(ge=0)] = 0  # training continues on at least so many; 0: on `nodes` only
    gpus_per_node: Annotated[int, Field(ge=1)] = 8
    time_limit_hours: Annotated[float, Field(gt=0)] = 24_000.0


class TrainingSettings(_ScenarioTable):
    """The training."""

    steps: Annotated[int, Field(ge=100)]
    step_seconds: Sourced
    save_every: Annotated[int, Field(ge=1)]  # steps
    evaluate_every: Annotated[int, Field(ge=0)] = 0  # steps; 0: never
    evaluation_seconds: Sourced = _zero("no evaluation")
    keep: tuple[tuple[int, int], ...] = ()  # (age, spacing) in steps: of older checkpoints, only those at the spacing
    peak_lr: float = 1.2e-4
    warmup_steps: int = 1000


class Physical(_ScenarioTable):
    """Physical costs in seconds. `Costs` of the simulated cluster explains each."""

    queue: Sourced
    agent_start: Sourced
    startup: Sourced
    load: Sourced
    save: Sourced
    commit: Sourced
    examine: Sourced
    abort: Sourced
    rank_end: Sourced
    obey: Sourced

    def costs(self) -> Costs:
        """Return the costs for the simulated cluster. Costs that are not stated here have its defaults."""
        return Costs(**{name: getattr(self, name).value for name in type(self).model_fields})


class InPlaceRecovery(_ScenarioTable):
    """Ranks are replaced while the others keep running. Times in seconds; `simulated.costs.InPlace` explains them."""

    model_config = ConfigDict(validate_by_name=True)  # `copy` is a method of every model

    notice: Sourced
    peers: Sourced
    join: Sourced
    state: Sourced
    warm: Sourced
    copy_: Annotated[Sourced, Field(alias="copy")]
    standby: Sourced  # share of stops at which standby ranks are warm
    fails: Sourced  # share of replacements that do not come together by the deadline
    deadline: Sourced  # from the first order until all ranks have joined; then a restart
    pair: Sourced  # probability that of two hosts lost together, one holds the other's copies
    save_every: Annotated[int, Field(ge=1)]  # steps: copies are kept anyway, so saves can be rarer

    def costs(self) -> InPlace:
        """Return the costs for the simulated cluster."""
        return InPlace(
            notice=self.notice.value,
            peers=self.peers.value,
            join=self.join.value,
            state=self.state.value,
            warm=self.warm.value,
            copy=self.copy_.value,
        )

    @property
    def stop(self) -> float:
        """Seconds that a stop takes at least, besides the part of the step in flight that is lost."""
        return self.notice.value + self.join.value + self.state.value


class Stops(_ScenarioTable):
    """Interruptions for each day of useful work."""

    per_day: Sourced
    # The weights of the kinds of stops:
    gpu: Sourced  # a GPU falls off the bus, and its host is replaced
    host: Sourced  # a host goes silent, and is replaced
    process: Sourced  # a rank dies, by a broken collective or by an error that does not recur
    hang: Sourced  # every process runs, no step ends
    planned: Sourced = _zero("none")  # an operator changes something: the attempt saves and ends
    more_than_one: Sourced = _zero("one host at a time")  # share of host losses with more than one host
    five: Sourced = _zero("one host at a time")  # share with five hosts
    launch_fails: Sourced = _zero("every launch succeeds")  # probability that a launch fails, for each launch
    needs_human: Sourced = _zero(
        "every stop can be resolved by a machine"
    )  # share of stops after which every launch fails until on-call has come


class Repair(_ScenarioTable):
    """The replacement of a host: log-normal hours. The new host may be bad, too."""

    median_hours: Sourced
    sigma: Sourced
    bad_again: Sourced


class DivergenceStep(_ScenarioTable):
    """A step at which the loss diverges and does not recover."""

    step: Annotated[int, Field(ge=1)]
    source: str


class DivergenceRules(_ScenarioTable):
    """When the loss diverges, and which learning rate prevents it."""

    at: tuple[DivergenceStep, ...] = ()
    cured_below: tuple[float, float] = (0.7, 0.95)
    """A run does not diverge at a learning rate below c × that of the first run at the step. c is uniform."""
    cure_source: str = "guess"
    rooted_steps: Sourced = _zero("the newest checkpoint before the onset is healthy")
    height: float = 3.0  # nats, in the end
    steps: int = 40  # until nearly that height


class Spikes(_ScenarioTable):
    """Spikes of the loss that recover without action."""

    per_day: Sourced
    steps: tuple[int, int] = (10, 40)
    height: tuple[float, float] = (0.3, 3.0)


class SlowNodes(_ScenarioTable):
    """Nodes that are slower than the others."""

    per_day: Sourced
    factor: Sourced


class ClusterOutage(_ScenarioTable):
    """The whole cluster is lost, and returns in parts."""

    at: Annotated[float, Field(gt=0, lt=1)]  # share of the work
    source: str
    back_hours: Sourced  # until the first part is back
    back_nodes: Annotated[int, Field(ge=0)]
    bad_nodes: Annotated[int, Field(ge=0)]
    full_hours: Sourced  # until all nodes, without spares
    spares_hours: Sourced


class OnCall(_ScenarioTable):
    """The operator who is paged."""

    reply_median_hours: Sourced
    reply_sigma: Sourced
    answers: bool = True


class TraceRules(_ScenarioTable):
    """How a record of incidents is read."""

    runs: tuple[str, ...] = ("",)  # only rows whose run begins with one of these
    kinds: dict[str, Literal["stop", "divergence"]] = {}  # other kinds are not replayed
    why_not: dict[str, str] = {}  # why other kinds are not


class HumanBaseline(_ScenarioTable):
    """What the people of the record achieved, for comparison."""

    goodput: float | None = None  # percent
    share_of_ideal: float | None = None
    stop_minutes: float | None = None
    human_calls: float | None = None
    longest_hands_off_days: float | None = None
    source: str = ""


class Scenario(_ScenarioTable):
    """A scenario file."""

    name: str
    title: str
    cluster: ClusterSettings
    training: TrainingSettings
    physical: Physical
    in_place: InPlaceRecovery | None = None
    stops: Stops | None = None
    repair: Repair
    divergences: DivergenceRules = DivergenceRules()
    spikes: Spikes | None = None
    slow: SlowNodes | None = None
    loss: ClusterOutage | None = None
    person: OnCall
    trace: TraceRules = TraceRules()
    people: HumanBaseline = HumanBaseline()
    vary: dict[Literal["spares", "save_every", "see_seconds"], tuple[float, ...]] = {}  # for the report's tables

    def by(self, recovery: Recovery | None) -> Scenario:
        """Return the scenario with one kind of recovery; None: in place, where its table is there.

        Raises:
            ScenarioError: recovery in place is wanted, and the table is missing.
        """
        if recovery == "in-place" and self.in_place is None:
            raise ScenarioError(f"{self.name} has no table [in_place]", f"add one: {_COMPARE}")
        return self.model_copy(update={"in_place": None}) if recovery == "restart" else self

    @property
    def save_every(self) -> int:
        """Steps between two saves."""
        return self.in_place.save_every if self.in_place else self.training.save_every

    @property
    def healthy_seconds(self) -> float:
        """Seconds for all steps without faults, scheduled evaluation included."""
        training = self.training
        evaluations = training.steps // training.evaluate_every if training.evaluate_every else 0
        return training.steps * training.step_seconds.value + evaluations * training.evaluation_seconds.value


def load(name_or_path: str) -> Scenario:
    """Load a shipped scenario by name, or any scenario by path.

    Raises:
        ScenarioError: it cannot be read, or is not what docs/replay.md says.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = SHIPPED / f"{name_or_path}.toml"
    try:
        with path.open("rb") as file:
            return Scenario.model_validate(tomllib.load(file))
    except OSError as error:
        known = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.toml")))
        raise ScenarioError(f"{path} cannot be read: {error.strerror}", f"shipped scenarios: {known}") from error
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{path}: {error}", _COMPARE) from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5])
        raise ScenarioError(f"{path}: {faults}", _COMPARE) from error
