"""What the commands print of MLflow's pages, and the saved view of all lineages."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner, Result

from chronicles.mlflow_mirror.pages import Store, lineage_page
from chronicles.mlflow_mirror.saved_view import TAG, VIEW, saved_view
from opt_ops.cli import build
from opt_ops.errors import Unavailable
from tests.chronicles.told import Told

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TRAINING = "workflowType=machine_learning"


def opt_ops(folder: Path, *arguments: str) -> Result:
    (folder / "opt-ops.toml").write_text(f'runs = "{folder}/runs"\n')
    done = CliRunner().invoke(build(), ["-c", f"{folder}/opt-ops.toml", *arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def test_sync_and_link_print_pages_and_nothing_else(tmp_path: Path, store: str):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    for name in ("12", "13"):
        Told(tmp_path / "runs" / name).begin().plan(f"{name}.00")
    page, experiment = opt_ops(tmp_path, "mlflow", "sync", "12").stdout.splitlines()
    (parent,) = client.search_runs(["1"], "tags.`opt.kind` = 'lineage'")
    assert page == f"http://127.0.0.1:5000/#/experiments/1/runs/{parent.info.run_id}?{TRAINING}"
    assert experiment == f"http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey={VIEW}&{TRAINING}"
    assert opt_ops(tmp_path, "mlflow", "link", "12").stdout.splitlines() == [page, experiment]
    both = opt_ops(tmp_path, "mlflow", "sync").stdout.splitlines()
    assert (both[0], len(both), both[-1]) == (page, 3, experiment)
    compared = unquote(opt_ops(tmp_path, "compare", "12", "13", "--mlflow").stdout).strip()
    ids = [address.rpartition("/")[2].partition("?")[0] for address in both[:2]]
    assert compared == f'http://127.0.0.1:5000/#/compare-runs?runs=["{ids[0]}","{ids[1]}"]&experiments=["1"]'

    view = client.get_experiment("1").tags[TAG]
    assert json.loads(view)["name"] == "opt-ops"
    assert {*json.loads(json.loads(view)["state"])} >= {"selectedColumns", "orderByKey", "runsExpanded"}
    changed = json.dumps({**json.loads(view), "updatedAt": 1})
    client.set_experiment_tag("1", TAG, changed)
    opt_ops(tmp_path, "mlflow", "sync", "12")
    assert client.get_experiment("1").tags[TAG] == changed, "somebody changed it"


def test_a_lineage_that_was_not_sent_has_no_page(tmp_path: Path):
    Told(tmp_path / "12").begin()
    with pytest.raises(Unavailable, match="lineage 12 was not sent to http://mlflow") as caught:
        lineage_page(tmp_path / "12", Store(uri="http://ann:secret@mlflow.example", experiment="opt-ops"))
    assert caught.value.hint == "send it with opt-ops mlflow sync 12"


@pytest.mark.parametrize("known", ["deflate;abc", "{}", '{"updatedAt": 3}', "[]"])
def test_a_view_of_somebody_else_stays(known: str):
    assert saved_view(known) == known
    assert saved_view(saved_view("")) == saved_view("")
