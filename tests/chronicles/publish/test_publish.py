"""Publishing: nothing that gives the site away is in any of the files, whatever the names are."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chronicles.logbook.render import render
from chronicles.publish.check import leaks
from chronicles.publish.names import Names, placeholders
from chronicles.publish.publish import Publication
from chronicles.publish.redact import Wishes
from chronicles.record import LineageRecord, load
from opt_ops.core import events as e
from opt_ops.core.text import from_iso
from opt_ops.core.values import Action, Fault, GpuPart, Outcome, PlannedChange, Severity, Verdict
from opt_ops.errors import OptOpsError
from tests.chronicles.told import Told

NODE, OTHER, HEAD = "falcon-gpu-0471", "falcon-gpu-0472", "login3.falcon.example.org"
PERSON, COLLEAGUE = "amelie.dubois", "kofi"
SERIAL, UUID = "1652721094117", "GPU-5b1f7a52-9d1c-4e0c-9b5c-0d7e2a1f44aa"
PATHS = "/lustre/projects/secretlab/shelfmark/part7.jsonl"
SECRET = "hunter2-Xyzzy!9"
NOTE = f"Call Amelie: the console password is {SECRET}, and {OTHER} smells of smoke"
PLANTED = (
    *(
        NODE,
        OTHER,
        "0471",
        HEAD,
        "falcon",
        PERSON,
        "Amelie",
        COLLEAGUE,
        SERIAL,
        UUID,
        "5b1f7a52",
        "secretlab",
        "shelfmark",
    ),
    *(
        "8800417",
        "10.31.7.12",
        "fe80::a1b2",
        "0000:3b:00",
        "ops@secretlab.example.org",
        "mlflow.secretlab",
        "h100-long",
    ),
    *(SECRET, "console password", "smells of smoke", "gpu-account-7", "data hall B", "Torsten", "mirror stage"),
)


def planted(folder: Path) -> LineageRecord:
    """A lineage whose every name gives the site away, in every place where one may stand."""
    told = Told(folder)
    told.see(e.DaemonStarted(host=HEAD, pid=1, version="0.1.0", policy="p", blind_seconds=None))
    told.begin(author=PERSON, settings=("optim.peak_lr=0.001",)).plan("12.00")
    told.hold(NODE, OTHER, "falcon-gpu-0473").launch("12.00-a0", None, None, NODE, OTHER)
    told.see(e.AllocationSubmitted(allocation="12-n0", job="8800417", adopted=False))
    told.train("12.00-a0", 1, 60, valid=lambda step: {PATHS: 3.0} if step % 10 == 0 else None)
    told.save("12.00", 40)
    told.evaluated(40, task=f"{NODE}_qa", author=PERSON, file=PATHS)
    told.evaluated(40, metric="acc", author=PERSON)
    said = (f"Our site is {OTHER}", f"the door code of {OTHER} is 7719", f"{OTHER} again and again")
    told.sampled(40, said, author=PERSON)
    line = f"{NODE}: RuntimeError: CUDA error at {PATHS} (PCI:0000:3b:00), peer 10.31.7.12, fe80::a1b2, {OTHER}-ib0"
    evidence = {"xid": 79, "uuid": UUID, "serial": SERIAL, "line": line, "pci": "0000:3b:00.0", OTHER: "0473"}
    told.see(
        e.NodeJudged(
            node=NODE,
            host=f"{NODE}.falcon.example.org",
            verdict=Verdict.BAD,
            reason="xid_79",
            source=f"NVML on {HEAD}",
            at=told.now,
            evidence=evidence,
            gpus=(GpuPart(uuid=UUID, serial=SERIAL, name="H100"),),
        )
    )
    cause = f"{NODE}: Xid 79, GPU {UUID}; its peers are falcon-gpu-[0470-0472] and falcon-gpu-0999"
    bad = told.incident("bad_gpu", cause, "12.00-a0", 60, nodes=(NODE,), evidence=evidence)
    point = next(iter(told.state.checkpoints.values())).checkpoint
    told.decide(bad, Action.RESTART, exclude=(NODE,), why=f"see https://mlflow.secretlab.example/#/1 or {PATHS}")
    told.end("12.00-a0", Outcome.FAILED, 60)
    told.launch("12.00-a1", point, bad, OTHER, "falcon-gpu-0473").train("12.00-a1", 41, 80).close(bad)
    _people(told, bad)
    return load(folder)


def _people(told: Told, bad: str) -> None:
    reason = f"move job 8800417 to data hall B, says Torsten; partition h100-long of {COLLEAGUE}"
    planned = PlannedChange(step=90, what=f"the mirror stage of {COLLEAGUE} begins", by=PERSON)
    refused = "AssocGrpGRES of gpu-account-7 in h100-long; ask ops@secretlab.example.org"
    drill = {"drill": "d000", "fault": Fault.XID, "attempt": "12.00-a1", "arguments": {"node": OTHER, "xid": 79}}
    told.see(
        e.NoteAdded(request="n", author=COLLEAGUE, target=bad, text=NOTE),
        e.ChangesDeclared(request="c", author=PERSON, reason=reason, planned=(planned,)),
        e.AllocationIntended(allocation="12-n1", nodes=1, exclude=(NODE,), why=f"{NODE} is out; gpu-account-7"),
        e.AllocationFailed(allocation="12-n1", why=refused),
        e.AlertIntended(alert="x", severity=Severity.PAGE, title=f"{NODE} is bad", body=f"{PERSON}: {reason}"),
        e.AlertSettled(alert="x", delivered=False, why="HTTP 503 from mlflow.secretlab.example.org:443"),
        e.DrillRequested(request="d", author=PERSON, **drill),
        e.PauseRequested(request="p", author=PERSON, reason=reason),
        e.LineagePaused(why=f"{PERSON}: {reason[:40]}…"),
    )


Factory = pytest.TempPathFactory
SITE = (("partitions", "h100-long"), ("accounts", "gpu-account-7"))


def text_of(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.iterdir()))


def test_nothing_that_gives_the_site_away_is_in_any_file(tmp_path: Path):
    record = planted(tmp_path / "12")
    found = Publication(tmp_path / "12", record, Wishes(), SITE).write(tmp_path / "public")
    written = sorted(path.name for path in (tmp_path / "public").iterdir())
    assert written == ["logbook.html", "logbook.md", "report.json"]
    text = text_of(tmp_path / "public")
    assert [each for each in PLANTED if each.lower() in text.lower()] == []
    assert "[note of 12 words, left out]" in text
    assert "log line of 11 words, left out: RuntimeError" in text
    assert "DRILL" in text, "the mark of a drill stays"
    assert found.left_out == {"notes": 1, "reasons": 3, "log lines": 2, "completions": 1}
    assert "door code" not in text
    assert "Completed prompts" not in text
    assert "node-001_qa acc_norm" in text, "a score stays, and the name of its task is redacted"
    assert (found.replaced["people"], found.replaced["gpus"], found.replaced["jobs"]) == (2, 1, 2)
    report = json.loads((tmp_path / "public" / "report.json").read_text())
    (incident,) = report["incidents"]
    assert incident["nodes"] == ["node-001"]
    assert (incident["evidence"]["uuid"], incident["evidence"]["serial"]) == ("gpu-001", "gpu-001"), "one GPU, one name"
    assert next(node["host"] for node in report["nodes"] if node["node"] == "node-001") == "node-001"


def test_notes_may_stay_and_go_through_the_same_table(tmp_path: Path):
    record = planted(tmp_path / "12")
    rules = [(re.compile("hunter2\\S*?(?=,)"), "PASSWORD"), (re.compile("Amelie"), "NAME")]
    rules += [(re.compile("Torsten|data hall B"), "…")]
    Publication(tmp_path / "12", record, Wishes(with_notes=True), SITE, rules).write(tmp_path / "public")
    text = text_of(tmp_path / "public")
    assert "Call NAME: the console password is PASSWORD, and node-002 smells of smoke" in text
    assert "the door code of node-002 is 7719" in text
    said = ("console password", "smells of smoke", "mirror stage")
    assert [each for each in PLANTED if each not in said and each.lower() in text.lower()] == []


def test_a_completion_that_stands_elsewhere_is_found_by_the_check(tmp_path: Path):
    told = Told(tmp_path / "12").begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 60)
    said = "the model repeats a secret of ours"
    told.evaluated(50, task=said).sampled(50, ("What do you know?", said, "nothing at all"))
    with pytest.raises(OptOpsError, match="left out: the model repeats a secret of ours"):
        Publication(tmp_path / "12", load(told.folder), Wishes()).write(tmp_path / "public")
    assert list((tmp_path / "public").iterdir()) == []


def test_the_table_is_for_its_owner_alone_and_is_used_again(tmp_path: Path):
    record = planted(tmp_path / "12")
    Publication(tmp_path / "12", record, Wishes(), SITE).write(tmp_path / "public")
    table = tmp_path / "12" / "chronicle" / "redaction.json"
    assert stat.S_IMODE(table.stat().st_mode) == 0o600
    known = json.loads(table.read_text())["replaced"]
    assert (known["nodes"][NODE], known["people"][PERSON]) == ("node-001", "person-A")
    known["nodes"][NODE] = "node-777"
    table.write_text(json.dumps({"schema": "opt-ops/redaction/1", "replaced": known}))
    Publication(tmp_path / "12", record, Wishes(), SITE).write(tmp_path / "again")
    assert "node-777" in (tmp_path / "again" / "logbook.md").read_text()
    table.write_text('{"schema": "another/1"}')
    with pytest.raises(OptOpsError, match="is no table of replacements"):
        Publication(tmp_path / "12", record, Wishes(), SITE)


def test_what_is_to_be_kept_stays(tmp_path: Path):
    record = planted(tmp_path / "12")
    wishes = Wishes(keep=frozenset({"nodes", "jobs"}))
    Publication(tmp_path / "12", record, wishes, SITE).write(tmp_path / "public")
    text = (tmp_path / "public" / "logbook.md").read_text()
    assert NODE in text
    assert "8800417" in text
    assert PERSON not in text


def test_times_may_be_moved_and_durations_stay(tmp_path: Path):
    record = planted(tmp_path / "12")
    render(tmp_path / "12")
    Publication(tmp_path / "12", record, Wishes(shift_seconds=-30 * 86400.0), SITE).write(tmp_path / "public")
    before = json.loads((tmp_path / "12" / "chronicle" / "report.json").read_text())
    after = json.loads((tmp_path / "public" / "report.json").read_text())
    assert from_iso(before["started"]) - from_iso(after["started"]) == pytest.approx(30 * 86400)
    assert from_iso(before["incidents"][0]["at"]) - from_iso(after["incidents"][0]["at"]) == pytest.approx(30 * 86400)
    assert before["incidents"][0]["seconds_down"] == pytest.approx(after["incidents"][0]["seconds_down"])
    assert before["goodput"]["wall_seconds"] == pytest.approx(after["goodput"]["wall_seconds"])


class Blind(Names):
    """A table that forgets to replace a node."""

    def apply(self, text: str) -> str:
        return text if NODE in text else super().apply(text)


def test_one_hit_and_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = planted(tmp_path / "12")
    monkeypatch.setattr("chronicles.publish.publish.Names", Blind)
    with pytest.raises(OptOpsError) as refused:
        Publication(tmp_path / "12", record, Wishes(), SITE).write(tmp_path / "public")
    assert (refused.value.exit_code, list((tmp_path / "public").iterdir())) == (1, [])
    assert re.search(rf"logbook\.md:\d+: nodes: {NODE}", str(refused.value))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("logbook.md", "on fal\\_con-1 it"),
        ("logbook.md", "see https://x/?q=fal%5Fcon-1"),
        ("logbook.html", "<svg><title>fal_&#99;on-1</title></svg>"),
        ("logbook.html", '<p title="fal&#95;con-1">x</p>'),
        ("logbook.html", '<script type="application/json" id="curve-data">{"fal\\u005fcon-1": [1]}</script>'),
        ("logbook.html", "<!-- FAL_con-1 -->"),
        ("report.json", '{"a": [{"fal\\u005fcon-1": 1}]}'),
    ],
)
def test_the_check_reads_every_way_of_writing(tmp_path: Path, name: str, text: str):
    file = tmp_path / name
    file.write_text(text)
    (leak,) = leaks([file], {"nodes": ["fal_con-1"]}, placeholders(), "12")
    assert (leak.file, leak.sort) == (name, "nodes")
    file.write_text(text.replace("on-1", "on-2"))
    assert not list(leaks([file], {"nodes": ["fal_con-1"]}, placeholders(), "12"))


def test_names_that_look_as_ours_get_others(tmp_path: Path):
    told = Told(tmp_path / "12").begin(author="person-A").plan("12.00").hold("node-001", "node-002")
    Publication(tmp_path / "12", load(told.folder), Wishes()).write(tmp_path / "public")
    text = text_of(tmp_path / "public")
    assert ("operator-A" in text, "machine-001" in text) == (True, True)
    assert re.search(r"(?<!batch-)person-A|node-00[12]", text) is None


def test_jobs_of_the_local_scheduler_have_names_of_ours(tmp_path: Path):
    told = Told(tmp_path / "12").begin().plan("12.00").hold()
    told.see(e.AllocationSubmitted(allocation="12-n0", job="12-n0", adopted=False))
    Publication(tmp_path / "12", load(told.folder), Wishes()).write(tmp_path / "public")
    assert '"job": "12-n0"' in (tmp_path / "public" / "report.json").read_text()


def test_a_person_called_as_a_word_of_ours_hinders_nobody(tmp_path: Path):
    record = load(Told(tmp_path / "12").begin(author="will").plan("12.00").hold().folder)
    Publication(tmp_path / "12", record, Wishes()).write(tmp_path / "public")
    assert "person-A" in text_of(tmp_path / "public")


@pytest.mark.parametrize("person", ["lr", "step", "path", "at", "rank", "uuid"])
def test_a_person_called_as_a_field_hinders_nobody(tmp_path: Path, template: LineageRecord, person: str):
    record = renamed(template, {PERSON: person})
    Publication(tmp_path / "12", record, Wishes(), SITE).write(tmp_path / "public")
    assert "person-A" in text_of(tmp_path / "public")


@pytest.mark.parametrize("person", ["4nna", "12.b"])
def test_a_person_whose_name_begins_with_a_digit_is_a_person(tmp_path: Path, person: str):
    told = Told(tmp_path / "12").begin(author=person).plan("12.00").hold()
    Publication(tmp_path / "12", load(told.folder), Wishes()).write(tmp_path / "public")
    assert person not in text_of(tmp_path / "public")


def test_partitions_that_many_sites_have_stay(tmp_path: Path):
    told = Told(tmp_path / "12").begin().plan("12.00").hold("n1", "n2", "n3")
    told.see(
        e.NodeJudged(
            node="n1", host="n1", verdict=Verdict.BAD, reason="gpu_lost", source="NVML", at=told.now, evidence={}
        )
    )
    site = (("partitions", "gpu"), ("accounts", "train"))
    found = Publication(tmp_path / "12", load(told.folder), Wishes(), site).write(tmp_path / "public")
    assert found.replaced == {"people": 1, "nodes": 3, "jobs": 1, "hosts": 1}
    assert re.search("partition-1|account-1", text_of(tmp_path / "public")) is None


def test_a_copy_with_other_brackets_and_quotation_marks_is_left_out(tmp_path: Path):
    told = Told(tmp_path / "12").begin().plan("12.00").hold()
    reason = "Ask {“Torsten”} of [data hall B] first"
    told.see(
        e.PauseRequested(request="p", author="ann", reason=reason),
        e.AlertIntended(
            alert="x", severity=Severity.PAGE, title="t", body='declined by ann: Ask ("Torsten") of (data hall B) fi…'
        ),
    )
    Publication(tmp_path / "12", load(told.folder), Wishes()).write(tmp_path / "public")
    assert re.search("Torsten|data hall", text_of(tmp_path / "public")) is None


# ---- whatever the names are ---------------------------------------------------------------------------------------

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
names = st.builds(
    "{}{}{}".format,
    st.text(_LETTERS, min_size=3, max_size=8),
    st.sampled_from(["", "-", "_", "."]),
    st.text(_LETTERS + "0123456789", min_size=3, max_size=6),
).filter(lambda name: any(letter.isdigit() for letter in name))


def renamed(record: LineageRecord, planted_names: Mapping[str, str]) -> LineageRecord:
    """The same lineage with other names, everywhere."""
    from chronicles.record import from_entries
    from opt_ops.core.codec import decode, encode

    def other(text: str) -> str:
        for before, after in planted_names.items():
            text = text.replace(before, after)
        return text

    events = [json.loads(other(json.dumps(encode(each.event)))) for each in record.entries]
    entries = [replace(each, event=decode(event)) for each, event in zip(record.entries, events, strict=True)]
    points = {curve.attempt: curve.points for curve in record.curves}
    return from_entries("12", entries, (), lambda attempt: points.get(attempt, ()))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> LineageRecord:
    return planted(tmp_path_factory.mktemp("template") / "12")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(names, min_size=5, max_size=5, unique_by=str.lower))
def test_of_random_names_none_is_found(template: LineageRecord, tmp_path_factory: Factory, found: list[str]):
    folder = tmp_path_factory.mktemp("random")
    before = (NODE, OTHER, PERSON, COLLEAGUE, "8800417")
    record = renamed(template, dict(zip(before, found, strict=True)))
    Publication(folder / "12", record, Wishes(), SITE).write(folder / "public")
    text = text_of(folder / "public").lower()
    assert [name for name in found if name.lower() in text] == []


# ---- nodes that are called by a number ----------------------------------------------------------------------------


def test_nodes_may_be_called_by_numbers(template: LineageRecord, tmp_path: Path):
    """Numbers of steps, nodes and hours stay, and what names a node is replaced."""
    record = renamed(template, {NODE: "17", OTHER: "18", "falcon-gpu-0473": "80", "falcon-gpu-0999": "node 99"})
    found = Publication(tmp_path / "12", record, Wishes(), SITE).write(tmp_path / "public")
    assert (found.replaced["nodes"], found.replaced["jobs"]) == (3, 2)
    text, report = text_of(tmp_path / "public"), json.loads((tmp_path / "public" / "report.json").read_text())
    assert "Restarted without node-001: Xid 79" in text
    assert [each["node"] for each in report["nodes"]] == ["node-001"]
    assert "80 of 400 steps" in text
    assert (report["incidents"][0]["nodes"], report["incidents"][0]["evidence"]["node-002"]) == (["node-001"], "0473")


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ("17: Xid 79", "node-001: Xid 79"),
        ("17 is silent", "node-001 is silent"),
        ("the job that holds 18 is about to end", "the job that holds node-002 is about to end"),
        ("runs on the excluded node 17, 18", "runs on the excluded node node-001, node-002"),
        ("a probe needs 17", "a probe needs node-001"),
        ("17 of 18 nodes are held since 17.5 h", "17 of 18 nodes are held since 17.5 h"),
        ("17 steps on 18 GPUs", "17 steps on 18 GPUs"),
    ],
)
def test_a_number_is_a_node_only_where_a_node_stands(tmp_path: Path, said: str, seen: str):
    told = Told(tmp_path / "12").begin().plan("12.00").hold("17", "18", "19")
    assert Publication(tmp_path / "12", load(told.folder), Wishes()).text(said) == seen


def test_the_check_finds_a_node_that_is_called_by_a_number(tmp_path: Path):
    file = tmp_path / "report.json"
    for value, number in (({"node": "17"}, 1), ({"why": "on node 17"}, 1), ({"step": "17", "steps": 17}, 0)):
        file.write_text(json.dumps(value))
        assert len(list(leaks([file], {"nodes": ["17"]}, placeholders(), "12"))) == number
