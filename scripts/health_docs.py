"""Writes docs/health.md from the table: `python scripts/health_docs.py > docs/health.md`. A test compares both."""

from __future__ import annotations

from opt_ops.core.health import HEALTH_TABLE
from opt_ops.core.health.explain import rows, sxids_by_row, xids_by_row
from opt_ops.core.health.nvlink import REGISTERS, Cause
from opt_ops.core.health.table import Row
from opt_ops.core.health.xids import NVLINK_ROWS

_NTH = {0: "first", 2: "third", 3: "fourth", 4: "fifth"}

HEAD = f"""# Node health

Generated from the table in `opt_ops/core/health/` by `python scripts/health_docs.py`. The evidence of every verdict
names the table's version, {HEALTH_TABLE}.

The newest readings of a node's agent decide its verdict. Of all rows that apply, the worst verdict wins. Among equals,
the first row wins.

| verdict | what follows |
| --- | --- |
| `bad` | The attempt on the node is stopped. The node is excluded and drained. |
| `suspect` | Running ranks continue. No new attempt starts on the node. |
| `unknown` | Neither healthy nor bad. If the site expects GPUs, nothing starts on a node whose GPUs cannot be read. |
| `healthy` | A row with this verdict is reported and triggers no action. |

| column | meaning |
| --- | --- |
| action | What an administrator must do before the node is used again. opt-ops records it and does nothing itself. |
| again | The action if the finding recurs on the part in 7 days (NVSentinel). A healthy verdict becomes `suspect`. |
| readings | How many readings in a row, two seconds apart, confirm the row. |
| source | Where the limit or the action comes from. |
| others | Which other tools decide differently. |

A value that cannot be read counts neither for nor against a row. A missing field, an old driver or a call that hangs is
unknown. It makes no node healthy and none bad.

`opt-ops node explain REASON` prints a row. `opt-ops node check` reads nodes now and can burn them in
(docs/node-check.md). There, one reading counts at once.
"""

XIDS = """## Xids

Xids come from the kernel log. If the agent may not read the log, they come from NVML's events, without the text of the
line. The codes are those of NVIDIA's Xid catalogue of 2025-10-29.

- The driver's own recovery action outranks every single Xid. Xid 154 announces it. The action "none" does not clear
  earlier errors.
- 48 together with 63 or 64 on the same GPU is a reset. 48 alone is a field diagnostic.
- 63 marks a row for remapping; the row `remap_pending` applies then. 64 is a reset.
- 74 (NVLink) lets the job continue and requests a reset at its end. On Hopper the registers in its line decide.
- 144–150 (NVLink 5) depend on the line. "Fatal" is a reset. "Nonfatal" waits for 154.
- 45 is a consequence and never a cause.
- An error that recurs within a minute is the same event.
- An agent keeps one entry for each code and GPU, with the first time, the last time and a count, the worst first. So a
  flood of one error does not hide another. Only lines of one code that state different severities have an entry each.
- With MIG, a line names the instance behind the address. The verdict is that of the whole GPU.
- A GPU that has fallen off the bus, or cannot be initialized, counts also where the line has no Xid (`off_the_bus`,
  `gpu_init_failed`). Beside an Xid 79 of the same GPU it is the same event.

`opt-ops node explain --line "TEXT" --card NAME` shows what a line of the kernel log means for a card.
"""

NVLINK = """## Xid 74 of a Hopper GPU

The first, third, fourth and fifth register of the line count. If several bits are set, the first of their causes in
this table decides. The evidence contains the link and all causes. If another error came with a consequence or a
marginal signal, that error decides. The bits are those of NVIDIA's workflow. Other cards do not use this table.
"""

SXIDS = """## SXids

SXids are errors of NVSwitches. If the line of a fatal code contains "Non-fatal", the line decides. For a code that is
not listed, the line decides too.
"""


def page() -> str:
    """The whole of docs/health.md."""
    parts = [HEAD, "## Readings\n", _table([(f"`{row.reason}`", row) for row in rows()])]
    parts += [XIDS, _table(xids_by_row(), signal=False), NVLINK, _bits(), SXIDS, _table(sxids_by_row(), signal=False)]
    return "\n".join(parts)


def _bits() -> str:
    lines = ["| cause | bits, by register | verdict | action | again |", "| --- " * 5 + "|"]
    for cause, row in zip(Cause, NVLINK_ROWS, strict=True):
        bits = [
            f"{_NTH[register]}: {', '.join(str(bit) for bit, each in known.items() if each is cause)}"
            for register, known in REGISTERS.items()
            if cause in known.values()
        ]
        known_bits = "; ".join(bits) + ("; all others" if cause is Cause.UNLISTED else "")
        lines.append(f"| {cause} | {known_bits} | {row.verdict} | {row.verb} | {row.again or ''} |")
    return "\n".join(lines) + "\n"


def _table(named: list[tuple[str, Row]], signal: bool = True) -> str:
    first = "| reason | finding " if signal else "| codes "
    lines = [first + "| verdict | action | again | applies to | readings | cards, drivers | source | others |"]
    lines.append("| --- " * (10 if signal else 9) + "|")
    for name, row in named:
        cells = [name, *([row.signal] if signal else []), str(row.verdict), str(row.verb), str(row.again or "")]
        where = ", ".join(part for part in (row.cards, f"driver {row.drivers}") if "all" not in part)
        cells += [str(row.scope), str(row.readings), where or "all", row.source, row.disagree]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
