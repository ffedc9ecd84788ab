"""What gives a site away by its form, wherever it stands: addresses, paths, names of hosts and parts, secrets.

A pattern that matches too much costs a reader a word; one that matches too little gives the site away.
"""

from __future__ import annotations

import re

_END = r"[^\s/'\"<>|:;,()\[\]{}“”`]"

_HEX = r"[0-9a-f]{1,4}(?::[0-9a-f]{1,4})*"

_DOMAINS = (
    "com|org|net|edu|gov|mil|int|info|biz|io|ai|dev|app|cloud|local|localdomain|lan|internal|intra|intranet|corp|home|"
    "cluster|hpc|example|test|invalid|site|arpa|eu|us|uk|de|fr|ch|at|nl|be|it|es|se|no|fi|dk|cz|ca|au|jp|cn|kr|in|br"
)

PATTERNS: tuple[tuple[str, str], ...] = (
    ("urls", r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>“”`]+"),
    ("emails", r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    (
        "secrets",
        r"(?<![A-Za-z0-9])(?:(?:hf|ghp|gho|ghs|glpat|sk|pk|xox[abp])[_-][A-Za-z0-9_-]{12,}|AKIA[0-9A-Z]{12,})",
    ),
    ("secrets", r"(?<![A-Za-z0-9])(?:password|passwd|secret|token|api[_-]?key)\s*[=:]\s*[^\s'\"<>“”`,;]+"),
    ("environment", r"\b(?-i:[A-Z][A-Z0-9_]{3,})=[^\s'\"<>“”`,;]+"),
    ("gpus", r"(?<![A-Za-z0-9-])(?:GPU|MIG)-[0-9a-f]{4,}(?:-[0-9a-f]{2,})*"),
    ("uuids", r"(?<![A-Za-z0-9])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![A-Za-z0-9])"),
    ("pci", r"(?<![A-Za-z0-9])(?:[0-9a-f]{4,8}:)[0-9a-f]{2}:[0-9a-f]{2}(?:\.[0-7])?(?![A-Za-z0-9:])"),
    ("addresses", r"(?<![A-Za-z0-9:])(?:[0-9a-f]{2}:){5}[0-9a-f]{2}(?![A-Za-z0-9:])"),
    ("addresses", rf"(?<![A-Za-z0-9:]){_HEX}::(?:{_HEX})?(?![A-Za-z0-9:])"),
    ("addresses", r"(?<![A-Za-z0-9:])(?:[0-9a-f]{1,4}:){2,7}(?::|[0-9a-f]{1,4})(?::[0-9a-f]{1,4})*(?![A-Za-z0-9:])"),
    ("addresses", r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)"),
    ("paths", rf"(?<![\w/.~-])(?:~\w*)?/(?:{_END}+/)+{_END}*"),
    ("paths", rf"(?<![\w/.~-])~\w+/{_END}*"),
    ("hosts", rf"(?<![\w.-])[a-z0-9-]+(?:\.[a-z0-9-]+)*\.(?:{_DOMAINS})(?![\w-]|\.\w)"),
)
"""(sort, pattern), to be read without regard to case. At one place in a text, the first that matches holds."""

NO_ADDRESS = re.compile(r"\d+(?::\d+)+")
"""Times and spans, which the pattern of an IPv6 address matches, too."""

_BEFORE = "on|off|needs?|holds?|excludes?|excluded|drains?|drained"
_NUMBERS = r"\d+(?:(?:, ?| and | or )\d+)*(?![\w-]|[.,]\d)"

NUMBERED_NODES = re.compile(
    rf"\b(?:nodes?|hosts?|machines?):? {_NUMBERS}(?! (?:of|steps?|times?|s|min|h)\b| ?%)"
    rf"|\b(?:{_BEFORE}) {_NUMBERS}(?= (?:is|are|and|has|was)\b|[;:)]|\.?$)"
    r"|^\d+(?=: | (?:is|has|was|could|does|did)\b)",
    re.MULTILINE | re.IGNORECASE,
)
"""Where a number is the name of a node, in words of ours: `node 17`, `runs on 17.`, `17: Xid 79`, `17 is silent`."""

COMMON = frozenset(
    (
        *("all", "batch", "compute", "cpu", "debug", "default", "gpu", "gpus", "high", "interactive", "large", "long"),
        *("low", "main", "medium", "normal", "preempt", "prod", "production", "regular", "short", "small", "standard"),
        *("test", "train", "training", "users"),
    )
)
"""Names of partitions and accounts that many sites have: they give nobody away, and are words of ours besides."""

EXCEPTION = re.compile(r"\b(?:[A-Za-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning))\b")


def own_names(lineage: str) -> str:
    """A pattern for the names of the lineage's runs, attempts, incidents, entries, and allocations: they stay."""
    return rf"(?<![A-Za-z0-9.]){re.escape(lineage)}(?:\.\d{{2,}}(?:-a\d+)?|-(?:i\d{{3,}}|e\d+|n\d+))(?![A-Za-z0-9])"
