"""Writes docs/health.md from the table: `python scripts/health_docs.py > docs/health.md`. A test holds them equal."""

from __future__ import annotations

from opt_ops.core.health import HEALTH_TABLE
from opt_ops.core.health.explain import rows, sxids_by_row, xids_by_row
from opt_ops.core.health.nvlink import REGISTERS, Cause
from opt_ops.core.health.table import Row
from opt_ops.core.health.xids import NVLINK_ROWS

_NTH = {0: "first", 2: "third", 3: "fourth", 4: "fifth"}

HEAD = f"""# Node health

Made from the table in `opt_ops/core/health/` by `python scripts/health_docs.py`. Version {HEALTH_TABLE}; it is in the
evidence of every verdict.

The verdict of a node, by its agent's newest readings. The worst row that applies wins; among equals the first. `bad`
ends an attempt that uses the node, and the node is excluded and drained. `suspect` lets what runs go on and starts
nothing new there. `unknown` is neither: where the site says that nodes have GPUs, nothing starts on a node whose GPUs
cannot be read. A `healthy` row is said, and nothing follows.

The action is what the node needs before it is used again: it is in the evidence and for people and their tools, we
reset and reboot nothing. *Readings* is how many in a row, two seconds apart, confirm a row; what cannot be read
neither confirms nor acquits. *Again* is the action when the same comes back on the same part within 7 days
(NVSentinel: a second remediation in 7 days goes to support), as far as the journal has it.

A missing field, an old driver or a call that hangs is unknown: it makes no node healthy and none bad. `opt-ops node
explain REASON` prints a row; `opt-ops node check` reads nodes now, where one reading is all there is and counts at
once, and burns them in (docs/node-check.md).
"""

XIDS = """## Xids

From the kernel log, or by NVML's events where we may not read it (then without the line's text). Codes as in NVIDIA's
Xid catalogue of 2025-10-29. The driver's own recovery action, and Xid 154 which announces it, outrank every single
Xid; "none" acquits nothing. Workflows: 48 with 63 or 64 on the same GPU is a reset, alone a field diagnostic. 63
marks a row, `remap_pending` follows it; 64 is a reset. 74 (NVLink) lets the job go on and asks for a reset at its end;
a Hopper's goes by the registers in its line, a table below. 144–150 (NVLink 5) go by their line: "Fatal" is a reset,
"Nonfatal" waits for 154. 45 is a consequence and never a cause. An error that comes again within a minute is the same
event.
"""

NVLINK = """## Xid 74 of a Hopper GPU

The first, third, fourth and fifth register of the line count. Of all bits that are set, the cause that stands first
here decides; the evidence has the link and all causes. A consequence and a marginal signal follow the error that they
came with, where another one came. The bits are those of NVIDIA's workflow; on other cards 74 is decided without them.
"""

SXIDS = """## SXids

Errors of NVSwitches. A line that says "Non-fatal" of a fatal code is believed; a code that is not listed goes by its
line.
"""


def page() -> str:
    """The whole of docs/health.md."""
    parts = [HEAD, "## Readings\n", _table([(f"`{row.reason}`", row) for row in rows()])]
    parts += [XIDS, _table(xids_by_row(), signal=False), NVLINK, _bits(), SXIDS, _table(sxids_by_row(), signal=False)]
    return "\n".join(parts)


def _bits() -> str:
    lines = ["| what it means | bits, by register | verdict | action | again |", "| --- " * 5 + "|"]
    for cause, row in zip(Cause, NVLINK_ROWS, strict=True):
        bits = [
            f"{_NTH[register]}: {', '.join(str(bit) for bit, each in known.items() if each is cause)}"
            for register, known in REGISTERS.items()
            if cause in known.values()
        ]
        said = "; ".join(bits) + ("; all others" if cause is Cause.UNLISTED else "")
        lines.append(f"| {cause} | {said} | {row.verdict} | {row.verb} | {row.again or ''} |")
    return "\n".join(lines) + "\n"


def _table(named: list[tuple[str, Row]], signal: bool = True) -> str:
    first = "| reason | what it is " if signal else "| codes "
    lines = [first + "| verdict | action | again | applies to | readings | cards, drivers | source | others |"]
    lines.append("| --- " * (10 if signal else 9) + "|")
    for name, row in named:
        cells = [name, *([row.signal] if signal else []), str(row.verdict), str(row.verb), str(row.again or "")]
        where = ", ".join(said for said in (row.cards, f"driver {row.drivers}") if "all" not in said)
        cells += [str(row.scope), str(row.readings), where or "all", row.source, row.disagree]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
