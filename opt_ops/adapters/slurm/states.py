"""Each word by which Slurm 22.05 to 25.05 reports a job or a node, and what it means for us.

A word that no table has is *unknown*: of a job, nothing follows from it until somebody looks; on a node, nothing new
starts, and the word is reported as the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum


class Job(Enum):
    """What the state of a job means for us."""

    LEAVING = "its nodes are ours for a moment more; the time of its end is no time limit"
    SUSPENDED = "its nodes are ours, but its processes are stopped until it is resumed"
    ENDED = "its nodes are not ours any more"
    QUEUED = "it waits; nodes that it may have already are not up yet"
    HOLDS = "its nodes are ours, and its processes run"
    MARK = "says nothing about nodes: with nodes it holds them, without it waits"


_JOBS: Mapping[Job, str] = {
    Job.QUEUED: """
        PENDING PD  CONFIGURING CF  REQUEUED RQ  REQUEUE_FED RF  REQUEUE_HOLD RH  RESV_DEL_HOLD RD  EXPEDITING EX
        POWER_UP_NODE PU
    """,
    Job.HOLDS: "RUNNING R  RESIZING RS  SIGNALING SI",
    Job.LEAVING: "COMPLETING CG  STAGE_OUT SO",
    Job.SUSPENDED: "SUSPENDED S  STOPPED ST",
    Job.ENDED: """
        BOOT_FAIL BF  CANCELLED CA  COMPLETED CD  DEADLINE DL  FAILED F  LAUNCH_FAILED LF  NODE_FAIL NF
        OUT_OF_MEMORY OOM  PREEMPTED PR  RECONFIG_FAIL RCF  REVOKED RV  SPECIAL_EXIT SE  TIMEOUT TO
    """,
    Job.MARK: "UPDATE_DB UD",
}
_JOB_WORDS = {word: meaning for meaning, words in _JOBS.items() for word in words.split()}
_LONG = {
    compact: word
    for words in _JOBS.values()
    for word, compact in zip(words.split()[::2], words.split()[1::2], strict=True)
}


def job_state(text: str) -> tuple[Job, str] | None:
    """What a state of squeue or sacct means, and its word in full; None: no table has it.

    sacct writes "CANCELLED by 1000". Several words at once are joined by + or a comma: the first meaning of `Job` that
    one of them has is the one that counts.
    """
    first = (text.split() or [""])[0].upper()
    words = [_LONG.get(word, word) for word in re.split(r"[^A-Z_]+", first) if word]
    known = [(_JOB_WORDS[word], word) for word in words if word in _JOB_WORDS]
    order = list(Job)
    return min(known, key=lambda each: order.index(each[0])) if known else None


# Why nothing new starts on a node → the words of sinfo, long and compact, and of scontrol. Empty: something may start.
_NODES: Mapping[str, str] = {
    "": """
        allocated alloc mixed mix idle completing comp maint maintenance planned plnd reserved resv res blocked block
        perfctrs npc powering_up power_up pow_up cloud dynamic_norm dynamic_future external undrain resume
        reboot_canceled running_job
    """,
    "drained by an administrator or by Slurm": "drain drained draining drng",
    "down": "down",
    "about to fail, by an administrator's word": "fail failing failg",
    "in an error state": "error err",
    "it does not have what Slurm's configuration says": "inval invalid_reg",
    "it does not respond": "no_respond not_responding",
    "powering down": "powered_down power_down power_down_asap power_drain powering_down pow_dn",
    "rebooting": "reboot reboot_issued reboot_requested boot",
    "not in service": "future futr",
    "the controller does not know its state": "unknown unk",
}
_NODE_WORDS = {word: why for why, words in _NODES.items() for word in words.split()}
_NO_SUCH_WORD = "a state that opt-ops does not know"

# sinfo shows one sign behind the word.
_SIGNS: Mapping[str, str] = {
    "*": "it does not respond",
    "~": "powered down",
    "!": "to be powered down",
    "%": "powering down",
    "@": "to be rebooted",
    "^": "rebooting",
    "#": "",  # powering up, or being configured
    "$": "",  # in a maintenance reservation
    "-": "",  # planned for another job, later
    "+": "",  # allocated to several jobs
}

_ALL_SIGNS = "".join(_SIGNS)
_LONGEST_WORD = 40  # characters: Slurm's longest has 16
_NO_REASON = frozenset({"", "none", "n/a", "(null)"})


def unfit(state: str, reason: str) -> str:
    """Why nothing new starts on a node; empty: something may.

    Args:
        state: The word of sinfo, long or compact, with its sign; or the words of scontrol, joined by +.
        reason: What the administrator or Slurm gives as the reason.
    """
    found: list[tuple[str, str]] = []  # word, what is wrong
    for part in re.split(r"[+,\s]+", state.strip().lower()):
        word = part.rstrip(_ALL_SIGNS)
        if word and (wrong := _NODE_WORDS.get(word, _NO_SUCH_WORD)):
            found.append((word, wrong))
        found += [(word, _SIGNS[sign]) for sign in part[len(word) :] if _SIGNS[sign]]
    if not found:
        return ""
    told = reason.strip()
    told = "; ".join(dict.fromkeys(why for _, why in found)) if told.lower() in _NO_REASON else told
    return f"slurm_{found[0][0][:_LONGEST_WORD]}: {told}"
