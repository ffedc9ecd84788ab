"""The address at which MLflow compares two lineages."""

from __future__ import annotations

from pathlib import Path

from opt_ops.errors import Unavailable


def compare_link(a: Path, b: Path) -> str:
    """The address of MLflow's page that compares the runs of two lineages.

    Args:
        a: the folder of one lineage.
        b: that of the other.

    Raises:
        Unavailable: one of them is not in the store.
    """
    names = " and ".join(each.name for each in (a, b))
    raise Unavailable(f"lineages {names} have no page in MLflow that is known here", f"opt-ops mlflow sync {a.name}")
