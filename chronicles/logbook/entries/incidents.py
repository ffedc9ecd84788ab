"""An incident as an on-call person would have written it down: cause, evidence, decision, what changed, cost, proof."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chronicles import wording
from chronicles.operators import MOVES, altered, asked_for, batches, change
from chronicles.record import LineageRecord
from chronicles.wording import count, duration, evidence, full, names, rate, second, short, whole
from opt_ops.core.health.explain import look_up
from opt_ops.core.state.model import Attempt
from opt_ops.core.text import from_iso
from opt_ops.core.values import Action, Tier

Row = Mapping[str, Any]

_VERBS = {
    Action.RESTART: "start the next attempt from the newest good checkpoint",
    Action.EXCLUDE: "take the node out and leave alone what trains",
    Action.ADOPT: "take over what is running",
    Action.TELL: "leave training alone and call a human",
    Action.HALT: "stop and call a human",
}


def qualifier(record: LineageRecord, row: Row) -> str:
    """What an entry's title says after the run: what was done, and after what."""
    if row["action"] is None:
        return f"incident open: {short(row['cause'])}"
    if row["advice"] and row["action"] != Action.ADOPT:
        return f"advice only: would have {_done(record, row, 'restarted', 'rolled back', 'changed')}"
    if row["closed"] is not None:
        text = _done(record, row, "restart", "rolled back", "changed")
    else:
        text = _done(record, row, "restarting", "rolling back", "changing")
    return f"{text}, NOT PROVEN" if row["proven"] is False else text


def _done(record: LineageRecord, row: Row, restart: str, rolled_back: str, changed: str) -> str:
    """The title in the tense of its verbs."""
    named = ", ".join(row["nodes"])
    cause = short(row["cause"].removeprefix(named).lstrip(": ") if named else row["cause"])
    match row["action"]:
        case Action.ROLLBACK:
            where = whole(row["checkpoint_step"]) if row["checkpoint_step"] else "the start"
            return ", ".join([f"{rolled_back} to {where}", *_altered(record, row)])
        case Action.CHANGE:
            return f"{changed}: {', '.join(_altered(record, row)) or 'nothing'}"
        case Action.RESTART if row["planned"] and not row["advice"]:
            return _moved(record, row)
        case Action.RESTART if row["excluded"]:
            return f"{restart} without {names(row['excluded'])}: {cause}"
        case Action.RESTART:
            return f"{restart} after {short(row['cause'])}"
        case Action.EXCLUDE if row["advice"]:
            return f"taken {names(row['nodes'])} out: {cause}"
        case Action.EXCLUDE:
            return f"{names(row['nodes'])} taken out, training went on: {cause}"
        case Action.ADOPT:
            return "daemon restart, training went on"
        case Action.TELL:
            return f"people told, training went on: {cause}"
        case _:
            return f"halted after {short(row['cause'])}"


def _moved(record: LineageRecord, row: Row) -> str:
    """A planned move: nothing has failed, and its title must not sound as if."""
    before, after = (record.state.attempts.get(row[key] or "") for key in ("attempt", "next_attempt"))
    if row["kind"] == "time_limit":
        return "moved before a time limit" if after else "moving before a time limit"
    if before is None or after is None:
        return "growing to more nodes"
    return f"grown from {len(before.nodes)} to {count(len(after.nodes), 'node')}"


def _altered(record: LineageRecord, row: Row) -> list[str]:
    asked = asked_for(record, row["evidence"])
    return altered(asked.lr if asked else None, row["lr_factor"], row["settings"], row["skip_batches"])


def facts(record: LineageRecord, row: Row) -> Iterator[tuple[str, str, str]]:
    """Label, sentence and log line of everything there is to say."""
    yield from _drill(record, row)
    yield from _why(record, row)
    if row["stacks"]:
        yield "Stacks", _stacks(row["stacks"]), ""
    yield from _decision(record, row)
    if row["action"] in MOVES and not row["advice"]:
        yield "Resumed", _resumed(record, row), ""
        yield "Cost", _cost(row), ""
    if row["action"] not in (None, Action.HALT, Action.TELL) and not row["advice"]:
        yield "Proof", _proof(row), ""
    if row["told"]:
        yield "Told", f"People were told at {second(from_iso(row['told']))}.", ""


def _why(record: LineageRecord, row: Row) -> Iterator[tuple[str, str, str]]:
    quiet = row["action"] == Action.ADOPT or row["planned"]
    asked = asked_for(record, row["evidence"])
    at = f" {'It met' if quiet else 'It hit'} attempt {row['attempt']} {_where(row)}."
    if asked is not None:
        at = f" Attempt {row['attempt']} was {_where(row)}."
    at = at if row["attempt"] else ""
    if asked is not None:
        yield "Asked for", f"{full(change(asked))}{at}", ""
        return
    yield "Cause", f"{full(row['cause'], keep=row['nodes'])}{_meaning(row)}{at}", ""
    yield "Confidence", f"{row['confidence'].capitalize()}: {row['confidence_why']}.", ""
    told, line = evidence(row["evidence"])
    alert = _alert(record, row)
    yield "Evidence", " ".join(full(text) for text in (row["detector"], told, alert) if text), line


def _where(row: Row) -> str:
    if row["step_failed"] is None:
        return "before its first step"
    later = row["last_step"] is not None and row["last_step"] > row["step_failed"]
    return f"at step {whole(row['step_failed'])}" + (f", which went on to {whole(row['last_step'])}" if later else "")


def _meaning(row: Row) -> str:
    """What the health table says of a code that stands in a cause, where it says one thing."""
    code = row["cause"].rpartition(": ")[2] if row["kind"] == "bad_gpu" else ""
    meant = {each.signal for each in look_up([code])} if re.fullmatch(r"[a-z_]+(?:_\d+)?", code) else set()
    return f" {full(meant.pop())}" if len(meant) == 1 else ""


def _decision(record: LineageRecord, row: Row) -> Iterator[tuple[str, str, str]]:
    if row["action"] is None:
        yield "Decision", "None yet.", ""
        return
    if asked_for(record, row["evidence"]) is not None:
        return  # it is what was asked for
    playbook, version = row["playbook"].rsplit("/", 1)
    book = f"Playbook {playbook} ({version}), rung {row['rung']}"
    if row["advice"]:
        said = f"{book} would have had us {_verb(record, row)}. It was said and not done, since opt-ops did not drive"
        why = full(f"Why: {row['why']}")
        yield "Advice", f"{full(said)} {why}", ""
        return
    yield "Decision", full(f"{book}: {_verb(record, row)}. Why: {row['why']}"), ""


def _stacks(taken: Row) -> str:
    where = f" (on {wording.nodes(taken['nodes'])})" if taken["nodes"] else ""
    odd, silent = taken["odd"], taken["silent"]
    text = "Every rank was asked where it is"
    text += f". {_ranks(odd)}{where} {'is' if len(odd) == 1 else 'are'} not" if odd else ", and none is clearly not"
    text += " where the others are."
    return f"{text} {_ranks(silent)} did not answer." if silent else text


def _ranks(numbers: Sequence[int]) -> str:
    return f"{'Rank' if len(numbers) == 1 else 'Ranks'} {wording.ranks(numbers)}"


def stacks(row: Row) -> list[tuple[str, str, bool]]:
    """The ranks of a hang by where they were: (ranks, innermost frames, whether these are the odd ones)."""
    taken = row["stacks"]
    if not taken:
        return []
    odd = set(taken["odd"])
    found = [
        (wording.ranks(group["ranks"]), " ← ".join(short(frame, 60) for frame in group["frames"][:_FRAMES]))
        for group in taken["groups"]
    ]
    rows = [(*told, not odd.isdisjoint(group["ranks"])) for told, group in zip(found, taken["groups"], strict=True)]
    if taken["silent"]:
        rows.append((wording.ranks(taken["silent"]), "no answer", not odd.isdisjoint(taken["silent"])))
    return rows


_FRAMES = 3  # the innermost: what a rank waits in, and for whom; report.json has them all


def changes(record: LineageRecord, row: Row) -> list[tuple[str, str, str]]:
    """Settings before and after, as (what, before, after); only what did change."""
    hit = record.state.attempts.get(row["attempt"] or "")
    following = record.state.attempts.get(row["next_attempt"] or "")
    found: list[tuple[str, str, str]] = []
    if hit and following:
        found.append(("run", hit.run, following.run))
        found.append(("attempt", hit.name, following.name))
        found.append(("nodes", *_nodes(hit, following)))
        found.append(("step", whole(row["last_step"]), whole(following.checkpoint.step if following.checkpoint else 0)))
        found.append(("learning-rate factors", _factors(record, hit.run), _factors(record, following.run)))
        found += _settings(record, hit, following)
        found.append(("batches left out", _skips(record, hit.run), _skips(record, following.run)))
    if row["lr_after"] is not None:
        step = row["proof"]["readbacks"][0]["step"]
        found.append((f"learning rate at {whole(step)}", rate(row["lr_before"]), rate(row["lr_after"])))
    if row["excluded"]:
        found.append(("excluded nodes", "", names(row["excluded"])))
    return [change for change in found if change[1] != change[2]]


def _nodes(hit: Attempt, following: Attempt) -> tuple[str, str]:
    before, after = wording.nodes(hit.nodes), wording.nodes(following.nodes)
    if after == names(following.nodes) and before == names(hit.nodes):
        return before, after
    gone = [node for node in hit.nodes if node not in following.nodes]
    new = [node for node in following.nodes if node not in hit.nodes]
    after += f", without {wording.nodes(gone)}" if gone else ""
    return before, after + (f", with {wording.nodes(new)}" if new else "")


def _settings(record: LineageRecord, hit: Attempt, following: Attempt) -> Iterator[tuple[str, str, str]]:
    """The `key=value` settings that differ; where nobody had set one before, what the live attempt said it used."""
    asked = record.state.lineage.settings if record.state.lineage else ()
    before, after = (_given((*asked, *record.state.runs[run].settings)) for run in (hit.run, following.run))
    for key in dict.fromkeys((*before, *after)):
        if before.get(key) != after.get(key):
            yield key, before.get(key) or _used(hit, key), after.get(key) or _used(following, key)


def _given(settings: Sequence[str]) -> dict[str, str]:
    pairs = (setting.partition("=") for setting in settings)
    return {key: text for key, _, text in pairs}


def _used(attempt: Attempt, key: str) -> str:
    name = key.removeprefix("optim.")
    for stated in (attempt.optimizer, attempt.schedule):
        if stated is not None and key != name and hasattr(stated, name):
            number = getattr(stated, name)
            return ",".join(f"{each:g}" for each in number) if isinstance(number, tuple) else f"{number:g}"
    return "the recipe's"


def _skips(record: LineageRecord, run: str) -> str:
    return ", ".join(f"{whole(s.first)} to {whole(s.last)}" for s in record.state.runs[run].skips) or "none"


def spans(row: Row) -> list[tuple[str, float]]:
    """Where the standstill went: (what, seconds), in order."""
    labels = {
        "seconds_to_see": "until seen",
        "seconds_to_decide": "until decided",
        "seconds_to_relaunch": "until relaunched",
        "seconds_to_first_step": "until the first step",
    }
    return [(label, row[key]) for key, label in labels.items() if row[key] is not None]


def readbacks(row: Row) -> list[Row]:
    """The proof's updates: step, learning rate read back and expected, loss."""
    return list(row["proof"].get("readbacks") or [])


def _drill(record: LineageRecord, row: Row) -> Iterator[tuple[str, str, str]]:
    drill = record.state.drills.get(row["drill"] or "")
    if drill is None:
        return
    what = wording.drill(drill.fault, drill.arguments)
    yield "Drill", f"Put in on purpose by {drill.author} at {second(drill.at)} as {drill.name}: {what}.", ""


def _verb(record: LineageRecord, row: Row) -> str:
    if row["action"] == Action.ROLLBACK:
        where = f"step {whole(row['checkpoint_step'])}" if row["checkpoint_step"] else "the start"
        factor = f" and multiply the learning rate by {row['lr_factor']:g}" if row["lr_factor"] else ""
        more = f" and leave out {batches(row['skip_batches'])}" if row["skip_batches"] else ""
        return f"roll back to {where}{factor}{more}"
    if row["action"] == Action.CHANGE:
        return f"go on with {', '.join(_altered(record, row))}"
    return ("save one more checkpoint, then " if row["save_first"] else "") + _VERBS[Action(row["action"])]


def _alert(record: LineageRecord, row: Row) -> str:
    """The alerts that came before: for these nothing was touched."""
    if row["onset_step"] is None:
        return ""
    steps = [
        signal.step
        for signal in record.state.signals.values()
        if signal.tier is Tier.ALERT
        and signal.attempt == row["attempt"]
        and signal.step is not None
        and leads(row, signal.step)
    ]
    return (
        f"{'An alert' if len(steps) == 1 else 'Alerts'} came first, at step {', '.join(map(whole, steps))}; "
        "until then nothing was touched"
        if steps
        else ""
    )


_LEAD = 64  # steps: the gradient norm leaves its band before the loss does


def leads(row: Row, step: int | None) -> bool:
    """Whether an alert at this step was the beginning of the incident, in its own attempt or another."""
    first, last = row["onset_step"], row["step_failed"]
    return step is not None and first is not None and last is not None and first - _LEAD <= step <= last


def _resumed(record: LineageRecord, row: Row) -> str:
    step = row["checkpoint_step"]
    if not step and not row["next_attempt"] and row["action"] != Action.ROLLBACK:
        return "Not yet."
    text = f"From the checkpoint of step {whole(step)}" if step else "From scratch, for want of a checkpoint"
    if row["next_attempt"]:
        nodes = record.state.attempts[row["next_attempt"]].nodes
        text += f", as attempt {row['next_attempt']} on {wording.nodes(nodes)}"
    if row["onset_step"] is not None and row["action"] == Action.ROLLBACK and (passed := _passed_over(record, row)):
        text += f". Passed over: {passed}"
    return f"{text}."


def _passed_over(record: LineageRecord, row: Row) -> str:
    """The newer checkpoints of the run that was left, and what spoke against them."""
    against: dict[str, list[int]] = {}
    near = f"too near the onset at {whole(row['onset_step'])}"
    for known in record.state.checkpoints.values():
        step = known.checkpoint.step
        newer = (row["checkpoint_step"] or 0) < step <= (row["last_step"] or row["step_failed"] or 0)
        if known.checkpoint.run != row["run_before"] or not newer or known.seen_at > from_iso(row["opened"]):
            continue
        against.setdefault(near if known.good else known.why or "not verified", []).append(step)
    return "; ".join(f"{_listed(steps)} ({why})" for why, steps in against.items())


def _listed(steps: Sequence[int]) -> str:
    if len(steps) <= _FEW:
        return ", ".join(map(whole, steps))
    return f"{len(steps)} from {whole(steps[0])} to {whole(steps[-1])}"


_FEW = 4  # checkpoints that are listed one by one


def _cost(row: Row) -> str:
    if row["steps_lost"] is None:
        return "Not known yet."
    resumed, lost = row["step_resumed"], row["steps_lost"]
    which = f" ({_span(resumed + 1, resumed + lost)})" if resumed is not None and lost else ""
    hours = f", {wording.hours(row['node_hours_lost'])} node-hours" if row["node_hours_lost"] else ""
    return f"{count(lost, 'step')} lost{which}, {duration(row['seconds_down'])} down{hours}."


def _span(first: int, last: int) -> str:
    return whole(first) if first == last else f"{whole(first)} to {whole(last)}"


def _proof(row: Row) -> str:
    proof, read = row["proof"], readbacks(row)
    if row["closed"] is None:
        return "Not in yet."
    if row["proven"] is None:
        return "Nothing was to be proven: a person has decided since."
    if mismatch := proof.get("mismatch"):
        return full(f"NOT PROVEN. {mismatch}")
    if read:
        first, last = read[0], read[-1]
        return (
            f"At step {whole(first['step'])} the live optimizer used the learning rate {rate(first['lr'])}, where "
            f"{rate(first['expected_lr'])} was expected. It agrees up to step {whole(last['step'])}, and betas, "
            f"weight decay and clipping are {'as asked for' if row['settings'] else 'unchanged'}."
        )
    if "excluded" in proof:
        states = [f"{name}: drain {state}" for name, state in proof.get("drain", {}).items()]
        return f"No attempt starts there any more; {', '.join(states)}."
    if "seen_by_epoch" in proof:
        return f"Attempt {proof['attempt']} was seen at step {whole(proof['step'])} by the next life of the daemon."
    return "The last step was trained before more was needed."


def _factors(record: LineageRecord, run: str) -> str:
    factors = record.state.runs[run].lr_factors
    return ", ".join(f"× {factor.factor:g} after {whole(factor.step)}" for factor in factors) or "none"
