"""An incident as an on-call person would have written it down: cause, evidence, decision, what changed, cost, proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from chronicles import words
from chronicles.record import Record
from chronicles.words import count, duration, evidence, full, names, rate, second, short, whole
from opt_ops.core.codec import from_iso
from opt_ops.core.events import SignalRaised
from opt_ops.core.values import Action, Tier

Row = Mapping[str, Any]

_VERBS = {
    Action.RESTART: "start the next attempt from the newest good checkpoint",
    Action.EXCLUDE: "take the node out and leave alone what trains",
    Action.ADOPT: "take over what is running",
    Action.HALT: "stop and call a human",
}


def qualifier(row: Row) -> str:
    """What an entry's title says after the run: what was done, and after what."""
    cause = short(row["cause"].removeprefix(f"{', '.join(row['nodes'])}: "))
    done = row["closed"] is not None
    match row["action"]:
        case None:
            text = f"incident open: {short(row['cause'])}"
        case Action.ROLLBACK:
            where = whole(row["checkpoint_step"]) if row["checkpoint_step"] else "the start"
            text = f"{'rolled' if done else 'rolling'} back to {where}, learning rate × {row['lr_factor']:g}"
        case Action.RESTART:
            after = f"without {names(row['excluded'])}: {cause}" if row["excluded"] else f"after {short(row['cause'])}"
            text = f"{'restart' if done else 'restarting'} {after}"
        case Action.EXCLUDE:
            text = f"{names(row['nodes'])} taken out, training went on: {cause}"
        case Action.ADOPT:
            text = "daemon restart, training went on"
        case _:
            text = f"halted after {short(row['cause'])}"
    return f"{text}, NOT PROVEN" if row["proven"] is False else text


def facts(record: Record, row: Row) -> Iterator[tuple[str, str, str]]:
    """Label, sentence and log line of everything there is to say."""
    yield from _drill(record, row)
    hit = "It met attempt" if row["action"] == Action.ADOPT else "It hit attempt"
    at = f" {hit} {row['attempt']} at step {whole(row['step_failed'])}." if row["attempt"] else ""
    yield "Cause", f"{full(row['cause'], keep=row['nodes'])}{at}", ""
    told, line = evidence(row["evidence"])
    alert = _alert(record, row)
    yield "Evidence", " ".join(full(text) for text in (row["detector"], told, alert) if text), line
    if row["action"] is None:
        yield "Decision", "None yet.", ""
        return
    playbook, version = row["playbook"].rsplit("/", 1)
    yield "Decision", full(f"Playbook {playbook} ({version}), rung {row['rung']}: {_verb(row)}. Why: {row['why']}"), ""
    if row["action"] in (Action.RESTART, Action.ROLLBACK):
        yield "Resumed", _resumed(record, row), ""
        yield "Cost", _cost(row), ""
    if row["action"] != Action.HALT:
        yield "Proof", _proof(row), ""


def changes(record: Record, row: Row) -> list[tuple[str, str, str]]:
    """Settings before and after, as (what, before, after); only what did change."""
    hit = record.state.attempts.get(row["attempt"] or "")
    following = record.state.attempts.get(row["next_attempt"] or "")
    found: list[tuple[str, str, str]] = []
    if hit and following:
        found.append(("run", hit.run, following.run))
        found.append(("attempt", hit.name, following.name))
        found.append(("nodes", names(hit.nodes), names(following.nodes)))
        found.append(("step", whole(row["last_step"]), whole(following.checkpoint.step if following.checkpoint else 0)))
        found.append(("learning-rate factors", _factors(record, hit.run), _factors(record, following.run)))
    if row["lr_after"] is not None:
        step = row["proof"]["readbacks"][0]["step"]
        found.append((f"learning rate at {whole(step)}", rate(row["lr_before"]), rate(row["lr_after"])))
    if row["excluded"]:
        found.append(("excluded nodes", "", names(row["excluded"])))
    return [change for change in found if change[1] != change[2]]


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


def _drill(record: Record, row: Row) -> Iterator[tuple[str, str, str]]:
    drill = record.state.drills.get(row["drill"] or "")
    if drill is None:
        return
    what = words.drill(drill.fault, drill.arguments)
    yield "Drill", f"Put in on purpose by {drill.author} at {second(drill.at)} as {drill.name}: {what}.", ""


def _verb(row: Row) -> str:
    if row["action"] == Action.ROLLBACK:
        where = f"step {whole(row['checkpoint_step'])}" if row["checkpoint_step"] else "the start"
        return f"roll back to {where} and multiply the learning rate by {row['lr_factor']:g}"
    return _VERBS[Action(row["action"])]


def _alert(record: Record, row: Row) -> str:
    """The alerts that came before: for these nothing was touched."""
    if row["onset_step"] is None:
        return ""
    steps = [
        entry.event.step
        for entry in record.entries
        if isinstance(entry.event, SignalRaised)
        and entry.event.tier is Tier.ALERT
        and entry.event.attempt == row["attempt"]
        and entry.event.step is not None
        and row["onset_step"] <= entry.event.step <= (row["step_failed"] or 0)
    ]
    return (
        f"An alert came first, at step {', '.join(map(whole, steps))}; until then nothing was touched" if steps else ""
    )


def _resumed(record: Record, row: Row) -> str:
    step = row["checkpoint_step"]
    text = f"From the checkpoint of step {whole(step)}" if step else "From scratch, for want of a checkpoint"
    if row["next_attempt"]:
        nodes = record.state.attempts[row["next_attempt"]].nodes
        text += f", as attempt {row['next_attempt']} on {names(nodes)}"
    if row["action"] == Action.ROLLBACK and (passed := _passed_over(record, row)):
        text += f". Passed over: {passed}"
    return f"{text}."


def _passed_over(record: Record, row: Row) -> str:
    """The newer checkpoints of the run that was left, and what spoke against each."""
    near: list[str] = []
    bad: list[str] = []
    for known in record.state.checkpoints.values():
        step = known.checkpoint.step
        newer = (row["checkpoint_step"] or 0) < step <= (row["last_step"] or row["step_failed"] or 0)
        if known.checkpoint.run != row["run_before"] or not newer or known.seen_at > from_iso(row["opened"]):
            continue
        if known.good:
            near.append(whole(step))
        else:
            bad.append(f"{whole(step)} ({known.why or 'not verified'})")
    told = [f"{', '.join(near)} (too near the onset at {whole(row['onset_step'])})"] if near else []
    return "; ".join(told + bad)


def _cost(row: Row) -> str:
    if row["steps_lost"] is None:
        return "Not known yet."
    resumed, lost = row["step_resumed"], row["steps_lost"]
    which = f" ({whole(resumed + 1)} to {whole(resumed + lost)})" if resumed is not None and lost else ""
    return f"{count(lost, 'step')} lost{which}, {duration(row['seconds_down'])} down."


def _proof(row: Row) -> str:
    proof, read = row["proof"], readbacks(row)
    if row["proven"] is None:
        return "Not in yet."
    if mismatch := proof.get("mismatch"):
        return full(f"NOT PROVEN. {mismatch}")
    if read:
        first, last = read[0], read[-1]
        return (
            f"At step {whole(first['step'])} the live optimizer used the learning rate {rate(first['lr'])}, where "
            f"{rate(first['expected_lr'])} was expected. It agrees up to step {whole(last['step'])}, and betas, "
            "weight decay and clipping are unchanged."
        )
    if "excluded" in proof:
        states = [f"{name}: drain {state}" for name, state in proof.get("drain", {}).items()]
        return f"No attempt starts there any more; {', '.join(states)}."
    if "seen_by_epoch" in proof:
        return f"Attempt {proof['attempt']} was seen at step {whole(proof['step'])} by the next life of the daemon."
    return "The last step was trained before more was needed."


def _factors(record: Record, run: str) -> str:
    factors = record.state.runs[run].lr_factors
    return ", ".join(f"× {factor.factor:g} after {whole(factor.step)}" for factor in factors) or "none"
