"""Readings of a node → its verdict, with the reason code and the source of the rule.

One table; the worst row that applies wins. `BAD` ends an attempt that uses the node; `SUSPECT` lets it run and
starts no new one there; what cannot be read is `UNKNOWN`. The driver's own recovery action (NVML field, driver ≥ 570)
and Xid 154, which says the same, outrank every single Xid.
"""

from opt_ops.core.health.fleet import differing
from opt_ops.core.health.history import History
from opt_ops.core.health.judge import judge, judge_all, rank, remember, same_readings
from opt_ops.core.health.readings import EvaluationReport, Gpu, Heartbeat, Machine, Port, Xid
from opt_ops.core.health.table import HEALTH_TABLE, Judgement, Verb

__all__ = [
    "HEALTH_TABLE",
    "EvaluationReport",
    "Gpu",
    "Heartbeat",
    "History",
    "Judgement",
    "Machine",
    "Port",
    "Verb",
    "Xid",
    "differing",
    "judge",
    "judge_all",
    "rank",
    "remember",
    "same_readings",
]
