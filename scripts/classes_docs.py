"""Write the table of failure classes into docs/playbooks.md.

    python scripts/classes_docs.py

tests/core/failures/test_classes.py checks that the page agrees with the code.
"""

from __future__ import annotations

from pathlib import Path

from opt_ops.core.failures.classes import ROWS, Blames, FailureRow, Spends

PAGE = Path(__file__).parents[1] / "docs" / "playbooks.md"
BEGIN, END = "<!-- classes: begin -->\n", "<!-- classes: end -->"
HEAD = (
    "| class | title | domain | nature | first alert | spends | blames | playbook |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)
_SPENDS = {Spends.NOTHING: "–", Spends.OWN: "its own budget", Spends.OWN_AND_OVERALL: "its own and the overall budget"}
_BLAMES = {Blames.NOTHING: "–", Blames.NODE: "node", Blames.NODE_AND_GPU: "node and GPU"}


def table() -> str:
    """The rows of the code's table, one line each."""
    return HEAD + "".join(f"| `{kind}` | {_cells(row)} |\n" for kind, row in ROWS.items())


def _cells(row: FailureRow) -> str:
    nature = f"{row.nature}; without notice: {row.unnoticed}" if row.unnoticed else str(row.nature)
    playbook = f"`{row.playbook}`" if row.playbook else "–"
    return " | ".join([row.title, row.domain, nature, row.severity, _SPENDS[row.spends], _BLAMES[row.blames], playbook])


def page(text: str) -> str:
    """The page with its table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
