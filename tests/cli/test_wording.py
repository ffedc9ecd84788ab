"""What people read: no spelling of Python's, no control characters, numbers that agree, hints that work."""

import ast
import io
import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.cli.curve_files.read import CurveFile
from opt_ops.cli.daemon import log as daemon_log
from opt_ops.cli.shared import output, wording
from opt_ops.cli.shared.output import signs_of_life
from tests.cli.test_cli import told
from tests.commands import opt_ops
from tests.e2e.stub_trainer import telemetry

ROOT = Path(__file__).parents[2]

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab c", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text("ab", min_size=1, max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    told().save(folder / "runs" / "12")
    return folder


@given(st.dictionaries(st.sampled_from(["at", "ended_at", "rung", "path", "readbacks"]), VALUES, max_size=4))
def test_no_value_is_spelled_as_python_spells_it(fields: Mapping[str, object]):
    said = wording.values(fields)
    assert not any(sign in said for sign in ("{", "}", "[", "]", "'", "None", "True", "False"))


def test_events_have_no_spelling_of_pythons_and_rungs_begin_with_1(site: Path):
    said = opt_ops(site, "events", "12").stdout
    assert not any(sign in said for sign in ("{", "}", "[", "]", "None", "True", "False"))
    assert "12-i000: back to step 300, learning rate × 0.75 (loss spike, rung 1)" in said
    assert "rung 0" not in said
    assert "next run 12.01 from step 300, learning rate × 0.75 (12-i000)" in said
    wide = opt_ops(site, "events", "12", "-o", "wide").stdout
    assert "learning rate × 0.75 (loss spike, rung 1)\tincident=12-i000 playbook=loss_spike" in wide
    assert not any(sign in wide for sign in ("{", "}", "[", "]", "None", "True", "False"))
    rows = json.loads(opt_ops(site, "events", "12", "-o", "json").stdout)["items"]
    assert [row["text"] for row in rows] == [line.split("\t")[3] for line in said.splitlines()[1:]]
    watched = opt_ops(site, "run", "watch", "12").stdout
    assert not any(sign in watched for sign in ("{", "}", "[", "]", "None", "True", "False"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["events", "12", "--kind", "checkpoint_sen"], 2, "checkpoint_sen: no such kind; did you mean checkpoint_seen"),
        (["events", "12", "--kind", "foo"], 2, "next: the kinds: afterthought_added, "),
        (["run", "note", "12", ""], 2, "an empty note says nothing"),
        (["run", "note", "12", " \n"], 2, "an empty note says nothing"),
        (["drill", "lr", "12", "--factor", "inf", "--dry-run"], 2, "--factor inf: at most 1e+06"),
        (["drill", "lr", "12", "--factor", "nan", "--dry-run"], 2, "--factor nan: "),
        (["run", "rollback", "12", "--lr-scale", "nan", "--dry-run"], 2, "--lr-scale nan: not a finite number"),
        (["run", "rollback", "12", "--lr-scale", "-inf", "--dry-run"], 2, "--lr-scale -inf: not a finite number"),
        (["run", "set", "12", "lr=inf", "--dry-run"], 2, "lr=inf: not a finite number above 0"),
        (["run", "set", "12", "stps=3", "--dry-run"], 2, "no setting is called 'stps'. Did you mean steps"),
        (["run", "set", "12", "--dry-run"], 2, "give KEY=VALUE, for example lr=6e-5, or --planned STEP[:WHAT]"),
        (["run", "set", "12", "--planned", "stage-b", "--dry-run"], 2, "'stage-b' is not of the form STEP[:WHAT]"),
        (["run", "suggest", "12", "--repair-hours", "inf"], 2, "--repair-hours inf: not a finite number"),
        (["node", "check", "--seconds", "12"], 3, "--seconds 12: at least 20"),
        (["drill", "lr", "12", "--updates", "0"], 2, "opt-ops: --updates 0: at least 1\n  next: opt-ops drill lr -h"),
        (["drill", "lr", "12", "--updates", "x"], 2, "--updates x: not a whole number"),
        (["q", "-o", "xml"], 2, "-o xml: 'xml' is not one of 'table', "),
        (["note", ""], 2, "an empty note says nothing"),
        (["node", "check", "--xid-minutes", "inf"], 3, "--xid-minutes inf: not a finite number"),
        (["node", "ledger"], 0, "nothing failed in 28 days: "),
        (["replay", "bad.csv"], 2, "has no column date"),
        (["signals", "replay", "bad.csv"], 2, "no column step or loss"),
        (["replay", "no.csv"], 3, "no.csv cannot be read"),
        (["signals", "replay", "no.csv"], 3, "there is no file no.csv"),
        (["replay", "--scenario", "none"], 2, "shipped scenarios: "),
        (["run", "set", "12", "--planned", "b", "--dry-run"], 2, "48000:stage-b; see opt-ops run set -h"),
        (["compare", "12", "no such"], 2, "next: opt-ops q -a lists all lineages"),
        (["ckpt", "release", "12/x", "--out", "o", "--licence", "apache-2.0"], 2, "next: opt-ops ckpt list"),
        (["run", "stop", "12"], 4, "next: opt-ops run stop 12 --yes"),
    ],
)
def test_a_mistake_is_told_and_has_the_same_code_everywhere(site: Path, words: list[str], code: int, said: str):
    (site / "bad.csv").write_text("a,b\n1,2\n")
    done = opt_ops(site, *words)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "unexpected" not in done.stderr
    # A plugin of a monitoring system says one line.
    assert not code or words[:2] == ["node", "check"] or re.search(r"\n  next: .*\bopt-ops [a-z]", done.stderr), (
        "a person is told what to run next"
    )


def test_tables_have_words_and_json_has_codes(site: Path):
    shown = opt_ops(site, "run", "show", "12").stdout
    assert "\tloss spike\t" in shown
    assert "\troll back\t" in shown
    assert not re.search(r"\t(loss_spike|rollback|bad_gpu|restart_)\b", shown)
    incidents = json.loads(opt_ops(site, "run", "show", "12", "-o", "json").stdout)["items"][0]["incidents"]
    assert (incidents[0]["kind"], incidents[0]["action"]) == ("loss_spike", "rollback")


def test_a_suggestion_that_is_missing_says_why(site: Path):
    done = opt_ops(site, "run", "suggest", "12")
    assert "-\t-" not in done.stdout
    assert "not known" in done.stdout
    assert "too little has happened to advise\n" in done.stderr
    assert "note: no save interval is suggested: no attempt has told how long a save" in done.stderr
    assert json.loads(opt_ops(site, "run", "suggest", "12", "-o", "json").stdout)["items"][0]["interval"] is None


def test_a_whole_suggestion_says_nothing_more(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from opt_ops.cli.run import commands as run
    from opt_ops.cli.shared import views
    from opt_ops.runfolder import lineages

    known = views.suggestion(site / "runs" / "12", lineages.state(site / "runs" / "12"), 15.0, time.time())
    whole = known | {"save_seconds": 4.0, "interval": "30m", "spares": 1}
    monkeypatch.setattr(views, "suggestion", lambda *_: whole)
    monkeypatch.chdir(site)
    run.suggest("12")
    assert capsys.readouterr().err == ""


def test_the_products_own_telemetry_is_a_curve(tmp_path: Path):
    file = tmp_path / "telemetry.jsonl"
    lines = [json.dumps(telemetry(step, 1e-3, 2.0 if step < 900 else 60.0, 0.5)) for step in range(1, 1000)]
    file.write_text("\n".join([*lines[:5], "torn", *lines[5:]]) + "\n")
    assert [point.step for point, *_ in CurveFile(file).lines()] == list(range(1, 1000))
    items = json.loads(opt_ops(tmp_path, "signals", "replay", "telemetry.jsonl", "-o", "json").stdout)["items"]
    assert ("loss_spike", "act", 900) in [(each["signal"], each["tier"], each["onset_step"]) for each in items]


def test_the_daemons_log_has_no_lines_and_no_colours_of_others():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(daemon_log.Lines("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("tests.cli.daemon_log")
    logger.addHandler(handler)
    logger.warning("rank 3 said: %s", "\x1b[2J\x9b1mboom\n2026-11-29 00:00:00Z INFO all is well\r\u202e")
    try:
        json.loads("\x1b[31m")
    except ValueError:
        logger.exception("failed")
    logger.removeHandler(handler)
    said = stream.getvalue()
    assert said.count("Z WARNING") == said.count("Z ERROR") == 1
    assert "\n2026-11-29 00:00:00Z INFO" not in said
    assert all(sign.isprintable() or sign == "\n" for sign in said)
    assert "Traceback" in said


def test_a_long_wait_gives_a_sign_of_life(capsys: pytest.CaptureFixture[str]):
    with signs_of_life("burning in n1, n2", 24.0):
        assert capsys.readouterr().err == "burning in n1, n2, at most 24 s …\n"


def test_no_hint_names_a_page_that_an_installation_lacks():
    """A wheel has no docs/: a hint names a command, or says what to write."""
    found: list[str] = []
    for path in sorted((*(ROOT / "opt_ops").rglob("*.py"), *(ROOT / "chronicles").rglob("*.py"))):
        tree = ast.parse(path.read_text())
        named = {
            target.id: each.value
            for each in tree.body
            if isinstance(each, ast.Assign)
            for target in each.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if name.endswith(("Error", "NotFound", "Refused", "Unavailable", "_fail", "_finding", "say")):
                parts = [*ast.walk(node)]
                parts += [
                    inner
                    for part in parts
                    if isinstance(part, ast.Name) and part.id in named
                    for inner in ast.walk(named[part.id])
                ]
                texts = [part.value for part in parts if isinstance(part, ast.Constant)]
                found += [f"{path}: {text}" for text in texts if isinstance(text, str) and "docs/" in text]
    assert not found


def test_what_takes_longer_than_two_seconds_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert output._UNASKED_SECONDS == 2.0
    monkeypatch.setattr(output, "_UNASKED_SECONDS", 600.0)  # this machine may be slow
    with signs_of_life("drawing"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(output, "_UNASKED_SECONDS", 0.05)
    with signs_of_life("drawing"):
        until, said = time.monotonic() + 240, ""
        while not said and time.monotonic() < until:
            time.sleep(0.1)
            said = capsys.readouterr().err
    assert said == "drawing …\n"
    with signs_of_life("drawing", quiet=True):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
