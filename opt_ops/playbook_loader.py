"""Loads and checks the playbook pages.

A page is Markdown with a TOML head between two lines of `+++`. The head holds the triggers, the ladder of actions with
its numbers, the retry budget and the proof. `load` turns the heads into a `Policy`
(`opt_ops/core/decide/policy.py`), or names the file and the line of an error. An unknown key is an error: a misspelt
threshold must not become a silent default.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from opt_ops.core.decide.policy import (
    AskRule,
    Budget,
    Capacity,
    InPlaceBudget,
    Limits,
    Playbook,
    Policy,
    ProbeRule,
    Rung,
)
from opt_ops.core.decide.replacement import REPLACEABLE
from opt_ops.core.detect.hang import HangRule
from opt_ops.core.detect.loss_level import DriftRule
from opt_ops.core.detect.loss_scale import LossScaleRule
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.detect.straggler import StragglerRule
from opt_ops.core.detect.throughput import ThroughputRule
from opt_ops.core.failures.causes import Cause
from opt_ops.core.failures.classes import ROWS, FailureClass
from opt_ops.core.values import Action, AskDefault, Severity
from opt_ops.errors import UsageError
from opt_ops.playbook_tables import DETECTORS, Table


class PlaybookError(UsageError):
    """A playbook page with an error; the message names file, line and key."""


@dataclass(frozen=True, slots=True)
class Page:
    """A playbook with the text of its page."""

    path: Path
    playbook: Playbook
    head: str
    body: str


class _Rung(Table):
    action: Action
    lr_factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    margin_steps: Annotated[int, Field(ge=1)] | None = None
    exclude: bool = False
    skip_data: bool = False
    save_first: bool = False
    cause: Cause | None = None
    skip_onset: bool = False
    older: bool = False
    settings: tuple[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.]*=\S+$")], ...] = ()
    deadline_seconds: Annotated[float, Field(ge=1, le=3600)] | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> _Rung:
        rollback = self.action is Action.ROLLBACK
        if rollback != (self.margin_steps is not None) or (self.lr_factor is not None and not rollback):
            raise ValueError("only rollback has margin_steps and lr_factor, and rollback needs margin_steps")
        if not rollback and (self.skip_data or self.skip_onset or self.older or self.settings):
            raise ValueError("only rollback has skip_data, skip_onset, older and settings")
        if self.skip_data and self.skip_onset:
            raise ValueError("skip_data leaves out all batches up to the failure, skip_onset some of them: choose one")
        if self.deadline_seconds is not None and self.action is not Action.REPLACE_RANKS:
            raise ValueError("only replace_ranks has deadline_seconds")
        if self.save_first and self.action is not Action.RESTART:
            raise ValueError("only restart has save_first")
        if self.action in (Action.EXCLUDE, Action.RECONFIGURE):
            raise ValueError(
                f"{self.action} is no action of a playbook; the daemon derives it from restart or from a request"
            )
        if self.exclude and self.action in (Action.NOTIFY, Action.COMPLETE):
            raise ValueError(f"{self.action} only notifies, so it cannot exclude a node")
        return self


class _InPlaceBudget(Table):
    actions: Annotated[int, Field(ge=1)] = InPlaceBudget().actions
    hours: Annotated[float, Field(gt=0)] = InPlaceBudget().hours


class _Budget(Table):
    in_place: _InPlaceBudget = _InPlaceBudget()
    actions: Annotated[int, Field(ge=1)]
    hours: Annotated[float, Field(gt=0)]
    settle_steps: Annotated[int, Field(ge=0)] | None = None
    refill_steps: Annotated[int, Field(ge=0)] | None = None


class _Proof(Table):
    steps: Annotated[int, Field(ge=1, le=100)]


class _Probe(Table):
    steps: Annotated[int, Field(ge=20, le=50)] = 30
    deadline_seconds: Annotated[float, Field(gt=0, le=7200)] = 900.0


class _Ask(Table):
    default: AskDefault = AskRule().default
    minutes: Annotated[float, Field(gt=0, le=1440)] = AskRule().seconds / 60


class _Head(Table):
    name: Annotated[str, Field(pattern=r"^[a-z][a-z_]*$")]
    version: Annotated[int, Field(ge=1)]
    title: str
    trigger: Annotated[list[str], Field(min_length=1)]
    budget: _Budget
    proof: _Proof
    ladder: Annotated[list[_Rung], Field(min_length=1)]
    probe: _Probe | None = None
    ask: _Ask = _Ask()
    detect: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _ladder_comes_first(self) -> _Head:
        of_causes = [rung.cause is not None for rung in self.ladder]
        if of_causes[0] or of_causes != sorted(of_causes):
            raise ValueError("rungs with a cause stand behind the others: the ladder is for trouble of unknown cause")
        return self

    @model_validator(mode="after")
    def _replaces_ranks_first(self) -> _Head:
        places = [place for place, rung in enumerate(self.ladder) if rung.action is Action.REPLACE_RANKS]
        if not places:
            return self
        if places != [0] or len(self.ladder) == 1 or self.ladder[1].cause is not None:
            raise ValueError("replace_ranks is only the first rung, and another one follows: it is not always possible")
        return self

    @model_validator(mode="after")
    def _probes_before_a_rollback(self) -> _Head:
        if self.probe is not None and all(rung.action is not Action.ROLLBACK for rung in self.ladder):
            raise ValueError("only a playbook with a rollback has [probe]: a probe tells which rollback fits")
        return self

    @model_validator(mode="after")
    def _completes_only_at_the_end(self) -> _Head:
        if self.trigger != [FailureClass.LAST_CHECKPOINT] and any(r.action is Action.COMPLETE for r in self.ladder):
            raise ValueError(f"only the playbook {FailureClass.LAST_CHECKPOINT} has the action complete")
        return self


def folder() -> Path:
    """The folder of the playbook pages that are shipped with opt-ops."""
    installed = Path(str(resources.files("opt_ops") / "playbooks"))  # where a wheel puts them
    return installed if installed.is_dir() else Path(__file__).parents[1] / "playbooks"


def load(directory: Path, *, expected_gpus: int = 0, least_alert: Severity | None = None) -> tuple[Policy, list[Page]]:
    """Load all playbook pages of a folder.

    Args:
        directory: The folder, with one Markdown file for each playbook.
        expected_gpus: Number of GPUs on each node, from the site's configuration.
        least_alert: Lowest severity of alerts that are sent; None: none is.

    Returns:
        The policy, and the pages in the order of their file names.

    Raises:
        PlaybookError: there is no page, a page has an error, a trigger is no failure class, two pages have one trigger,
            or a page that must set the numbers of a detector is missing.
    """
    paths = sorted(directory.glob("*.md"))
    if not paths:
        raise PlaybookError(
            f"{directory} has no playbook pages",
            "set `playbooks` in opt-ops.toml to a folder that has, then opt-ops playbook check",
        )
    loaded = [_read(path) for path in paths]
    by_trigger: dict[str, Playbook] = {}
    detect: dict[str, Any] = {}
    for page, head in loaded:
        for trigger in head.trigger:
            _check_class(page, trigger)
            if trigger in by_trigger:
                other = by_trigger[trigger].name
                raise _error(page.path, page.head, ("trigger",), f"{trigger} already triggers the playbook {other}")
            by_trigger[trigger] = page.playbook
        if page.playbook.in_place_rungs and REPLACEABLE.isdisjoint(head.trigger):
            why = "replace_ranks is not for these failures: with them the state of every rank may be wrong"
            raise _error(page.path, page.head, ("ladder", 0, "action"), why)
        if head.detect is not None:
            detect[head.name] = _detector(page, head)
    for name in DETECTORS.keys() - detect.keys():
        hint = f"cp {folder() / name}.md {directory}"
        raise PlaybookError(f"{directory}: no playbook {name} with a [detect] table", hint)
    digest = hashlib.sha256("\n".join(page.head for page, _ in loaded).encode()).hexdigest()[:12]
    policy = Policy(
        version=digest,
        playbooks=by_trigger,
        spike=SpikeRule(**detect[FailureClass.LOSS_SPIKE]),
        drift=DriftRule(**detect[FailureClass.LOSS_DRIFT]),
        hang=HangRule(**detect[FailureClass.HANG]),
        silent_seconds=detect[FailureClass.SILENT_NODE]["seconds"],
        straggler=StragglerRule(**detect[FailureClass.STRAGGLER]),
        throughput=ThroughputRule(**detect[FailureClass.THROUGHPUT_DROP]),
        loss_scale=LossScaleRule(**detect[FailureClass.LOSS_SCALE_FLOOR]),
        capacity=Capacity(**detect["capacity"]),
        limits=Limits(**detect[FailureClass.UNKNOWN]),
        least_alert=least_alert,
        expected_gpus=expected_gpus,
    )
    return policy, [page for page, _ in loaded]


def classes_without_page(policy: Policy) -> list[FailureClass]:
    """Failure classes that no page is triggered by. The page `unknown` decides about them."""
    return [kind for kind, row in ROWS.items() if row.playbook is not None and kind not in policy.playbooks]


def _check_class(page: Page, trigger: str) -> None:
    classes = [kind for kind, row in ROWS.items() if row.playbook is not None]
    if trigger not in classes:
        near = get_close_matches(trigger, classes, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(sorted(classes))}"
        raise _error(page.path, page.head, ("trigger",), f"{trigger!r} is no failure class; {hint}")


def _read(path: Path) -> tuple[Page, _Head]:
    text = path.read_text(encoding="utf-8")
    match = re.match(r"\+\+\+\n(.*?\n)\+\+\+\n(.*)", text, re.DOTALL)
    if match is None:
        raise PlaybookError(f"{path}, line 1: the page does not begin with a TOML head between two lines of +++")
    front, body = match.groups()
    try:
        values = tomllib.loads(front)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        where = int(line[1]) + 1 if line else 1
        raise PlaybookError(f"{path}, line {where}: {error}") from error
    head = _checked(path, front, values, _Head, ())
    if head.name != path.stem:
        raise _error(path, front, ("name",), f"is {head.name!r}, but the name of the file is {path.stem!r}")
    if not body.strip():
        raise PlaybookError(
            f"{path}: the page has no text for on-call",
            "write what the failure looks like and what to do, then opt-ops playbook check",
        )
    return Page(path, _playbook(head), front, body), head


def _playbook(head: _Head) -> Playbook:
    rungs = [_rung(rung) for rung in head.ladder]
    return Playbook(
        name=head.name,
        version=head.version,
        title=head.title,
        triggers=tuple(head.trigger),
        ladder=tuple(rung for rung in rungs if rung.cause is None),
        cures=tuple(rung for rung in rungs if rung.cause is not None),
        budget=Budget(**head.budget.model_dump(exclude={"in_place"})),
        in_place=InPlaceBudget(**head.budget.in_place.model_dump()),
        proof_steps=head.proof.steps,
        ask=AskRule(default=head.ask.default, seconds=60 * head.ask.minutes),
        probe=None if head.probe is None else ProbeRule(**head.probe.model_dump()),
    )


def _rung(rung: _Rung) -> Rung:
    return Rung(
        action=rung.action,
        lr_factor=rung.lr_factor,
        margin_steps=rung.margin_steps or 0,
        exclude=rung.exclude,
        skip_data=rung.skip_data,
        save_first=rung.save_first,
        cause=rung.cause,
        skip_onset=rung.skip_onset,
        older=rung.older,
        settings=tuple(rung.settings),
        deadline_seconds=rung.deadline_seconds,
    )


def _detector(page: Page, head: _Head) -> dict[str, Any]:
    model = DETECTORS.get(head.name)
    if model is None:
        raise _error(page.path, page.head, ("detect",), f"the playbook {head.name} has no detector with numbers to set")
    return _checked(page.path, page.head, head.detect, model, ("detect",)).model_dump()


def _checked(path: Path, front: str, values: Any, model: type[Any], where: tuple[str | int, ...]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A misspelt key is also a missing one. Report the misspelling.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        why = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise _error(path, front, (*where, *first["loc"]), why) from error


def _error(path: Path, front: str, where: tuple[str | int, ...], why: str) -> PlaybookError:
    name = ".".join(str(part) for part in where) or "the head"
    return PlaybookError(
        f"{path}, line {_line_of(front, where)}: {name}: {why}",
        "compare it with a shipped page: opt-ops playbook show hang",
    )


def _line_of(front: str, where: tuple[str | int, ...]) -> int:
    """The line of a key in the file; if the key is absent, the line of its table, or line 1."""
    keys = [part for part in where if isinstance(part, str)]
    nth = next((part for part in where if isinstance(part, int)), 0)
    table, best = "", 1
    seen: dict[str, int] = {}
    for number, line in enumerate(front.splitlines(), 2):  # the head begins on line 2
        if header := re.match(r"\s*\[+\s*([\w.]+)\s*\]+", line):
            table = header[1]
            seen[table] = seen.get(table, -1) + 1
            if keys[:1] == [table] and seen[table] == nth:
                best = number
        elif key := re.match(r"\s*([\w-]+)\s*=", line):
            here = [table, key[1]] if table else [key[1]]
            if here == keys and seen.get(table, nth) == nth:
                return number
    return best
