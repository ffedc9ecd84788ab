"""The view of all lineages that MLflow 3.16 and later lists under *Views*, as a tag of the experiment. Pure.

Read in the page's own script of 3.17.2: an envelope with a name, two times and the view as JSON. Older servers show
their usual columns.
"""

from __future__ import annotations

import json

VIEW = "opt-ops-lineages"
TAG = f"mlflow.sharedViewState.{VIEW}"

_WRITTEN = 1_798_000_000_000  # milliseconds, the same for all: another time of change is a person's

_COLUMNS = (
    "tags.`opt.state`",
    "metrics.`ops/step`",
    "metrics.`ops/loss`",
    "metrics.`ops/goodput`",
    "metrics.`ops/lr_scale`",
    "metrics.`ops/incidents`",
    "tags.`opt.last_incident`",
    "tags.`opt.owner`",
    "attributes.`Description`",
)


def saved_view(known: str) -> str:
    """The tag's value; `known` itself if a person changed the view."""
    if known and not _is_ours(known):
        return known
    state = {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,  # the newest first
        "selectedColumns": _COLUMNS,
        "columnOrder": _COLUMNS,
        "runsExpanded": {},  # parents only
    }
    return json.dumps({"name": "opt-ops", "createdAt": _WRITTEN, "updatedAt": _WRITTEN, "state": json.dumps(state)})


def _is_ours(known: str) -> bool:
    try:
        return json.loads(known)["updatedAt"] == _WRITTEN
    except (ValueError, KeyError, TypeError):
        return False  # whatever it is, we did not write it
