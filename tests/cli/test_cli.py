"""The commands as people and scripts use them: output, exit codes, help, and what they may not import."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer.main

from opt_ops.cli import app
from opt_ops.core import events as e
from opt_ops.core.state.model import State
from opt_ops.core.values import Checkpoint, Outcome, Verdict
from opt_ops.ports import Request
from opt_ops.runfolder import lineages
from opt_ops.runfolder.files import write_json
from opt_ops.runfolder.journal import Journal
from opt_ops.supervise.operator_requests import event_of
from tests.commands import opt_ops
from tests.core.story import Story
from tests.e2e.stub_trainer import telemetry

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"


def told() -> Story:
    """A rollback, a bad GPU, a drill: something of everything that commands show."""
    story = Story().training(460)
    story.spike(460, onset=410)
    story.ends()
    story.train(330)
    story.judge("n2", Verdict.BAD, "xid_79", drill="d000")
    story.see(e.NodeDrained(node="n2", done=True, why=""))
    story.ends(Outcome.STOPPED, last_step=335)
    story.train(320)
    return story


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one lineage, 12, as its journal tells it."""
    folder = tmp_path_factory.mktemp("site")
    told().save(folder / "runs" / "12")
    (folder / "runs/12/12.01/a1").mkdir(parents=True)
    trains(folder)
    return folder


def trains(folder: Path) -> None:
    """The attempt has made a step just now."""
    path = folder / "runs/12/12.01/a1/telemetry.jsonl"
    path.write_text(json.dumps(telemetry(320, 5e-4, 2.5, 0.5)) + "\n")


def golden(name: str, text: str, folder: Path) -> None:
    """Compare with the golden file. To accept a change on purpose: delete the file and run again."""
    text = text.replace(str(folder), "SITE")
    path = GOLDEN / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        pytest.fail(f"{path} was written; look at it and run again")
    assert _unbroken(text) == _unbroken(path.read_text())


def _unbroken(text: str) -> str:
    """Without the line breaks before the folder, which depend on the length of its name."""
    return re.sub(r"\s+SITE", " SITE", text)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run-show.json", ["run", "show", "12", "-o", "json"]),
        ("explanation.json", ["run", "explain", "12", "-o", "json"]),
        ("events.jsonl", ["events", "12", "-o", "jsonl", "--kind", "recovery_decided", "--kind", "incident_closed"]),
        ("node-list.json", ["node", "list", "12", "-o", "json"]),
        ("ckpt-list.json", ["ckpt", "list", "12", "-o", "json"]),
        ("ledger.json", ["ledger", "12", "-o", "json"]),
        ("watch.txt", ["run", "watch", "12"]),
        ("explain.txt", ["run", "explain", "12"]),
    ],
)
def test_output_is_a_contract(site: Path, name: str, arguments: list[str]):
    trains(site)
    done = opt_ops(site, *arguments)
    assert done.returncode == 0, done.stderr
    without_ages = re.sub(r'"(age|step_age|step_at|heard_age)": "[^"]*"', r'"\1": "…"', done.stdout)
    without_ages = re.sub(r'"(step_age|data_age)_seconds": [\d.]+', r'"\1_seconds": 1.0', without_ages)
    without_ages = re.sub(r"TRAINING\? for \S+", "TRAINING? for …", without_ages)
    without_ages = re.sub(r"last step \S+ ago", "last step … ago", without_ages)
    golden(name, without_ages, site)


# Of every command that reads, what it says to programs; the files above hold whole answers. Not here: `node check`,
# whose evidence depends on the machine, and the fields of events, which docs/formats.md and tests/core hold.
READING = [
    ["q"],
    ["run", "list"],
    ["run", "show", "12"],
    ["run", "show", "12", "--check"],
    ["run", "explain", "12"],
    ["run", "suggest", "12"],
    ["ckpt", "list", "12"],
    ["node", "list", "12"],
    ["node", "ledger", "12", "--all"],
    ["node", "explain", "xid", "79"],
    ["events", "12"],
    ["ledger"],
    ["playbook", "list"],
    ["playbook", "try", "12", "--all"],
    ["signals", "replay", "curve.csv"],
    ["daemon", "status"],
    ["doctor"],
]


def fields(value: Any, path: str = "") -> Iterator[str]:
    """The places of all values in an answer, with their types; those of all items of a list are one place."""
    if isinstance(value, dict):
        for key in value:
            yield from fields(value[key], f"{path}.{key}")
    elif isinstance(value, list):
        for each in value:
            yield from fields(each, f"{path}[]")
        yield f"{path}: list"
    else:
        yield f"{path}: {'null' if value is None else type(value).__name__}"


def test_the_fields_of_every_answer_are_a_contract(site: Path, tmp_path: Path):
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    lines = "".join(f"{step},{3.0 if step < 150 else 9.0},1.0\n" for step in range(1, 200))
    (folder / "curve.csv").write_text(f"step,loss,grad_norm\n{lines}")
    sign = {"ts": 0.0, "host": "head", "pid": 1, "version": "0", "policy": "p", "lineages": ["12"]}
    write_json(folder / "runs" / "daemon.json", sign)
    told = []
    for arguments in READING:
        answer = json.loads(opt_ops(folder, *arguments, "-o", "json").stdout)
        found = {line for item in answer["items"] for line in fields(item) if not line.startswith(".fields.")}
        told += [answer["schema"], *(f"  {line}" for line in sorted(found))]
    golden("fields.txt", "\n".join(told) + "\n", folder)


def test_the_queue_for_people_pipes_and_programs(site: Path):
    old = telemetry(320, 5e-4, 2.5, 0.5) | {"ts": 1_000.0}  # whose age does not change while this test runs
    (site / "runs/12/12.01/a1/telemetry.jsonl").write_text(json.dumps(old) + "\n")
    assert opt_ops(site).stdout == opt_ops(site, "q").stdout == opt_ops(site, "run", "list").stdout
    heading, line = opt_ops(site, "q").stdout.splitlines()
    assert heading.split("\t")[:3] == ["LINEAGE", "RUN", "STATE"]
    assert line.split("\t")[:8] == ["12", "12.01", "TRAINING?", "77", "2", "320/1000", "2.5", "300"]
    assert opt_ops(site, "q", "--no-header", "-o", "name").stdout == "12\n"
    value = json.loads(opt_ops(site, "q", "-o", "json").stdout)
    assert value["schema"] == "opt-ops/run-list/1"
    assert value["items"][0]["lr"] == 5e-4


def test_an_empty_site_is_not_an_error(tmp_path: Path):
    (tmp_path / "opt-ops.toml").write_text("")
    done = opt_ops(tmp_path, "q", "-o", "json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"schema": "opt-ops/run-list/1", "items": []})
    assert "There is no lineage yet." in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "show", "13"], 3, "no lineage 13"),
        (["run", "show", "abc"], 2, "'abc' is no lineage (12), run (12.01), attempt (12.01-a3) or incident (12-i003)"),
        (["run", "note", "12.07", "x"], 3, "lineage 12 has no 12.07"),
        (["run", "fly"], 2, "No such command"),
        (["run", "start", "opt-tiny", "--set", "steps"], 2, "not of the form key=value"),
        (["run", "start", "opt-tiny", "--data", "/no/such"], 2, "/no/such does not exist"),
        (["run", "start", "opt-tiny", "--data", "wiki=/no/such:0.3"], 2, "/no/such does not exist"),
        (["run", "stop", "12"], 4, "not done without confirmation"),
        (["drill", "kill-rank", "12", "--yes"], 4, "no daemon is running"),
        (["events", "12", "--since", "yesterday"], 2, "not of the form 90s, 15m, 2h, 3d or 1w"),
        (["logbook", "open", "12"], 3, "there is no logbook at"),
        (["daemon", "status"], 75, "no daemon has ever run for"),
        (["-c", "/no/such.toml", "q"], 2, "there is no configuration at /no/such.toml"),
    ],
)
def test_mistakes_are_told_with_their_exit_code(site: Path, arguments: list[str], code: int, said: str):
    done = opt_ops(site, *arguments)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["-c", "other.toml", "q"], ["q", "-c", "other.toml"]])
def test_the_configuration_may_be_named_before_and_behind_a_command(tmp_path: Path, arguments: list[str]):
    (tmp_path / "other.toml").write_text("runs = 'elsewhere'")
    (tmp_path / "elsewhere" / "7").mkdir(parents=True)
    assert opt_ops(tmp_path, *arguments, "-o", "name").stdout == "7\n"


@pytest.mark.parametrize("arguments", [["--debug", "run", "show", "13"], ["run", "show", "13", "--debug"]])
def test_a_traceback_is_shown_to_who_asks(site: Path, arguments: list[str]):
    done = opt_ops(site, *arguments)
    assert done.returncode == 3
    assert "Traceback" in done.stderr
    assert "no lineage 13" in done.stderr.splitlines()[-2]


def test_a_mistake_of_ours_is_one_line_too(site: Path):
    broken = "import opt_ops.cli.queue as queue; queue.watch_now = lambda: 1 / 0; from opt_ops.cli import main; main()"
    command = [sys.executable, "-c", broken, "q"]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=240)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2), done.stderr
    assert "--debug" in done.stderr


def test_what_is_interrupted_leaves_with_130(site: Path):
    command = [sys.executable, "-m", "opt_ops", "events", "12", "-f", "-o", "jsonl"]
    with subprocess.Popen(command, cwd=site, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert (process.wait(240), process.stderr and process.stderr.read()) == (130, b"")


def test_a_reader_that_leaves_early_is_no_error(site: Path):
    line = f"{sys.executable} -m opt_ops events 12 | head -1"
    done = subprocess.run(["bash", "-c", line], cwd=site, capture_output=True, text=True, timeout=240)
    assert (done.stdout, done.stderr) == ("SEQ\tTIME\tKIND\tWHAT\n", "")


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("runz = 'x'", "runz: unknown key; did you mean runs?"),
        ("[shape]\nnodes = 0", "shape.nodes: must be a whole number from 1 to 100000, not 0"),
        ("scheduler = 'pbs'", "scheduler: Input should be 'local' or 'slurm'"),
        ("runs = ", "Invalid value"),
        (
            "runs = 5\n[slurm]\npartitoin = 'x'",
            "runs: must be a path, in quotes, not 5; slurm.partitoin: unknown key; did you",
        ),
        ("[zzz]", "zzz: unknown key\n"),
    ],
)
def test_a_wrong_configuration_is_told_with_its_key(tmp_path: Path, toml: str, said: str):
    (tmp_path / "opt-ops.toml").write_text(toml)
    done = opt_ops(tmp_path, "q")
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_a_damaged_journal_is_told_with_its_line(site: Path, tmp_path: Path):
    folder = tmp_path / "runs" / "12" / "journal"
    folder.mkdir(parents=True)
    source = site / "runs/12/journal/000001.jsonl"
    (folder / source.name).write_bytes(source.read_bytes().replace(b"12.00-a0", b"12.00-b0", 1))
    done = opt_ops(tmp_path, "run", "show", "12")
    assert done.returncode == 1
    assert re.search(r"000001\.jsonl, line \d+: fails its checksum", done.stderr)


def test_a_dry_run_changes_nothing(site: Path):
    before = sorted(str(path) for path in site.rglob("*"))
    assert opt_ops(site, "run", "start", "opt-tiny", "--dry-run").stdout.splitlines() == [
        "would train   opt-tiny on 2 nodes",
        "would ask     for 3 nodes (local), 1 of them spare",
        "would start   2 ranks",
        "would lose    nothing that is trained",
    ]
    stop = opt_ops(site, "run", "stop", "12", "--dry-run").stdout
    assert stop.startswith("would stop    for good, as ")
    assert "would end     12.01-a1 on n1, n3\n" in stop
    assert "would lose    20 steps since the newest good checkpoint (10 s of 2 nodes" in stop
    drill = opt_ops(site, "drill", "kill-rank", "12", "--rank", "0", "--dry-run").stdout
    assert drill.startswith("would inject  a fault in 12.01-a1: rank 0 is killed\n")
    refused = opt_ops(site, "drill", "kill-rank", "12", "--rank", "9", "--dry-run")
    assert (refused.returncode, refused.stdout) == (4, "")
    assert "rank 9: 12.01-a1 has ranks 0 to 1" in refused.stderr
    assert sorted(str(path) for path in site.rglob("*")) == before


def test_validation_data_reaches_the_trainer(tmp_path: Path):
    (tmp_path / "wiki.jsonl").write_text(json.dumps({"text": "The cat sat on the mat. " * 50}) + "\n")
    given = ["--valid", "first=wiki.jsonl:500", "--valid", "wiki.jsonl"]
    assert opt_ops(tmp_path, "run", "start", "opt-tiny", *given).returncode == 0
    (file,) = (tmp_path / "runs/1/inbox").glob("*.json")
    fields = json.loads(file.read_text())
    whole = [f"first={tmp_path}/wiki.jsonl:500", f"{tmp_path}/wiki.jsonl"]
    assert fields["arguments"]["valid"] == whole
    request = Request(request="r", author="ann", verb="start", arguments=fields["arguments"])
    started = event_of(State(), request)
    assert isinstance(started, e.LineageStarted)
    assert list(started.valid) == whole
    wrong = opt_ops(tmp_path, "run", "start", "opt-tiny", "--valid", "wiki.jsonl:0.5")
    assert (wrong.returncode, "0.5 is no whole number of updates" in wrong.stderr) == (2, True)
    missing = opt_ops(tmp_path, "run", "start", "opt-tiny", "--valid", "books.jsonl:500")
    assert (missing.returncode, "--valid books.jsonl:500: books.jsonl does not exist" in missing.stderr) == (2, True)


def test_the_newest_evaluation_is_shown_wherever_it_is_in_the_telemetry(site: Path, tmp_path: Path):
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    lines = [telemetry(step, 5e-4, 2.5, 0.5) | {"valid": None} for step in range(301, 321)]
    lines[4]["valid"], lines[9]["valid"] = {"wiki": 3.5}, {"wiki": 3.25, "books": None}
    (folder / "runs/12/12.01/a1/telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "validation at step 310   wiki 3.25   books -" in opt_ops(folder, "run", "show", "12").stdout
    (view,) = json.loads(opt_ops(folder, "run", "show", "12", "-o", "json").stdout)["items"]
    assert "validation   wiki 3.25   books -" in opt_ops(folder, "run", "watch", "12").stdout
    assert view["valid"] == {"step": 310, "losses": {"wiki": 3.25, "books": None}}


def test_what_is_wrong_with_a_lineage_is_a_code(site: Path, tmp_path: Path):
    trains(site)
    done = opt_ops(site, "run", "show", "12", "--check", "-o", "json")
    (found,) = json.loads(done.stdout)["items"]
    assert (done.returncode, found["finding"], found["next"]) == (5, "unwatched", "opt-ops daemon ensure")
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    sign = {"ts": time.time(), "host": "head", "pid": 1, "version": "0", "policy": "p", "lineages": ["12"]}
    write_json(folder / "runs" / "daemon.json", sign)
    fine = opt_ops(folder, "run", "show", "12", "--check")
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, "", "Nothing is wrong. Lineage 12 is TRAINING.\n")
    story = told()
    story.spike(340, onset=330)
    journal = Journal(folder / "runs" / "12" / "journal")
    for entry in story.entries[len(journal.entries) :]:
        journal.append(journal.stamp(entry.event, entry.ts))
    trouble = opt_ops(folder, "run", "show", "12", "--check")
    assert (trouble.returncode, "incident\t12-i002, loss spike" in trouble.stdout) == (5, True), trouble.stdout


def test_a_request_without_a_daemon_waits_and_says_so(tmp_path: Path):
    done = opt_ops(tmp_path, "run", "start", "opt-tiny")
    assert done.stdout == "1\n"
    asked = json.loads(opt_ops(tmp_path, "run", "start", "opt-tiny", "-o", "json", "-q").stdout)
    assert (asked["schema"], asked["items"][0]["status"]) == ("opt-ops/request/1", "waiting")
    assert f"No daemon is running. The request is queued in {tmp_path}/runs/1/inbox." in done.stderr
    assert "next: opt-ops daemon ensure" in done.stderr
    (request,) = (tmp_path / "runs/1/inbox").glob("*.json")
    assert json.loads(request.read_text())["arguments"]["recipe"] == "opt-tiny"


def test_a_new_lineage_takes_the_next_number(tmp_path: Path):
    for name in ("7", "12", "notes"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert lineages.create(tmp_path / "runs").name == "13"


def test_a_configuration_that_cannot_be_read_is_told(tmp_path: Path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.toml").mkdir()
    for name, why in (("binary.toml", "it is not UTF-8 text"), ("folder.toml", "Is a directory")):
        done = opt_ops(tmp_path, "q", "-c", name)
        assert (done.returncode, f"{name} cannot be read: {why}" in done.stderr) == (2, True), done.stderr
        assert f"next: ls -l {tmp_path / name}; or name another file with -c" in done.stderr


def test_runs_that_are_no_folder_are_told_by_every_command(tmp_path: Path):
    (tmp_path / "runs").write_text("")
    done = opt_ops(tmp_path, "q")
    assert (done.returncode, "is a file, and must be a folder" in done.stderr) == (2, True), done.stderr
    doctor = opt_ops(tmp_path, "doctor", "-o", "json")
    found = {row["check"]: row for row in json.loads(doctor.stdout)["items"]}
    assert (doctor.returncode, found["runs folder"]["ok"], "journals" in found) == (5, False, False)
    assert "set `runs` to another" in found["runs folder"]["next"]


def test_places_that_cannot_be_written_are_told(tmp_path: Path):
    done = opt_ops(tmp_path, "init", "local", "--to", "/proc/site.toml")
    assert (done.returncode, "/proc/site.toml cannot be written" in done.stderr) == (4, True), done.stderr
    (tmp_path / "opt-ops.toml").write_text("runs = '/proc/runs'")
    begun = opt_ops(tmp_path, "run", "start", "opt-tiny")
    assert (begun.returncode, "next: opt-ops doctor" in begun.stderr) == (1, True), begun.stderr


def test_doctor_without_slurm_says_what_to_load(tmp_path: Path):
    (tmp_path / "opt-ops.toml").write_text("scheduler = 'slurm'")
    command = [sys.executable, "-m", "opt_ops", "doctor", "-o", "json"]
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    (found,) = (row for row in json.loads(done.stdout)["items"] if row["check"] == "sbatch")
    assert (found["ok"], found["next"]) == (False, "load Slurm's environment, such as module load slurm")


def test_doctor_finds_what_is_wrong(tmp_path: Path):
    (tmp_path / "opt-ops.toml").write_text("[trainer]\ncommand = ['/no/such/python']\n[health]\ngpus_per_node = 8\n")
    done = opt_ops(tmp_path, "doctor", "-o", "json")
    assert done.returncode == 5
    found = {row["check"]: row["ok"] for row in json.loads(done.stdout)["items"]}
    assert (found["configuration"], found["playbooks"], found["runs folder"]) == (True, True, True)
    assert (found["trainer"], found["nvml"], found["daemon"]) == (False, False, False)


def test_what_a_log_or_a_note_says_cannot_drive_the_terminal(tmp_path: Path):
    journal = Journal(tmp_path / "runs" / "12" / "journal")
    for entry in told().entries:
        journal.append(journal.stamp(entry.event, entry.ts))
    nasty = e.NoteAdded(request="n", author="\x1b[31mann", target="12", text="a\x1b]0;owned\x07\nb [bold]c[/bold]")
    journal.append(journal.stamp(nasty, 2_000.0))
    shown = opt_ops(tmp_path, "events", "12", "--kind", "note_added").stdout
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "(bold)c(/bold)" in shown


@cache
def commands() -> Mapping[str, Any]:
    """By their names. They are made once: that takes longer than all else of most tests that ask for them."""

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, child in getattr(command, "commands", {}).items():
            if hasattr(child, "commands"):
                yield from walk(child, (*path, name))
            else:
                yield " ".join((*path, name)), child

    return dict(walk(typer.main.get_command(app), ()))


# The surface grows by a visible change only.
COMMANDS = """
alerts test, campaign forecast, campaign render, campaign start, campaign status, campaign stop,
ckpt evaluate, ckpt list, ckpt prune, ckpt release, ckpt scores, ckpt serve, ckpt verify,
compare,
daemon ensure, daemon run, daemon status, daemon stop, daemon unit, data show,
doctor, drill flip-bit, drill hang, drill kill-daemon, drill kill-node, drill kill-pair, drill kill-rank, drill lr,
drill nan, drill slow-standby, drill xid, events, explain,
glossary, init, ledger,
logbook handover, logbook open, logbook publish, logbook render, logbook update, logs, mlflow link, mlflow open,
mlflow sync, node allow, node check,
node exclude, node explain, node ledger, node list, note, pending, playbook check, playbook list, playbook show,
playbook try, q,
replay, run approve, run ask, run decline, run explain, run forecast, run fork,
run hand-back, run list, run logs, run note, run pause, run recipes, run resume, run rollback,
run set, run shadow, run show, run start, run stop, run suggest, run take-over, run watch, run watch-job, signals blame,
signals replay, trainer check, watch, why
"""


def test_the_commands_are_known():
    assert sorted(commands()) == [name.strip() for name in COMMANDS.split(",")]


@pytest.mark.parametrize("name", list(commands()))
def test_every_command_has_help_with_an_example(name: str):
    help_ = commands()[name].help
    assert help_
    assert f"opt-ops {name}" in help_.partition("Example")[2]


def test_the_documentation_is_what_the_commands_say():
    made = subprocess.run([sys.executable, "scripts/cli_docs.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    written = (ROOT / "docs" / "cli.md").read_text()
    assert made.stdout == written, "python scripts/cli_docs.py > docs/cli.md"


PAGES = [
    *(ROOT / "playbooks").glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_pages_exist_with_their_options(page: Path):
    known = commands()
    for line in re.findall(r"^\$? ?(opt-ops .*)$|`(opt-ops [^`]*)`", page.read_text(), re.MULTILINE):
        unquoted = re.sub(r'"[^"]*"', '""', line[0] or line[1])  # what is quoted may be another command
        words = unquoted.split("#")[0].split()[1:]
        if words[:1] and words[0].startswith(("-", "…")):
            continue
        name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in known), None)
        assert name or words[:1] == ["…"], f"{page.name}: no command {' '.join(words)}"
        options = {
            option for parameter in known[name or ""].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for word in takewhile(lambda word: word != "--", words):  # what comes after it is another command
            if word.startswith("-") and not word[1:2].isdigit():
                assert word.split("=")[0] in options | {"-c", "-h", "--help"}, f"{page.name}: {name} has no {word}"


@pytest.mark.parametrize("arguments", [["q"], ["run", "show", "12"], ["events", "12"], ["node", "list", "12"]])
def test_looking_is_quick_because_it_imports_little(site: Path, arguments: list[str]):
    code = f"import sys; sys.argv = ['opt-ops', *{arguments!r}]\nfrom opt_ops.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nprint(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=site, capture_output=True, text=True, timeout=240)
    loaded = set(re.findall(r"'(\w+)'", done.stderr))
    assert loaded >= {"opt_ops", "typer"}
    assert not loaded & {"torch", "mlflow", "matplotlib", "numpy", "jinja2", "submitit", "pynvml", "httpx", "apprise"}
    assert not loaded & {"playbooks", "requests", "sqlalchemy"}
    if arguments[:2] == ["run", "show"]:  # its incidents are those of the report
        assert not re.search(r"'chronicles\.(logbook|mlflow_mirror)", done.stderr)
    else:
        assert "chronicles" not in loaded
    assert "opt_ops.core.health" not in done.stderr or arguments[0] == "node"


@pytest.mark.parametrize("noun", ["run", "node", "logbook", "q"])
def test_a_noun_alone_has_all_its_commands(noun: str):
    from opt_ops.cli import build

    def names(command: Any) -> list[str]:
        return sorted(getattr(command, "commands", {}))

    whole, alone = (typer.main.get_command(build(only)) for only in ("", noun))
    assert names(alone) in ([noun], [])  # with one command, the group and the command are one
    if noun != "q":
        assert names(alone.commands[noun]) == names(whole.commands[noun])  # type: ignore[attr-defined]


def test_a_progress_note_is_kept_and_the_next_one_begins_there(site: Path, tmp_path: Path):
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    lines = [json.dumps(telemetry(step, 5e-4, 2.5, 0.5)) + "\n" for step in range(301, 321)]
    (folder / "runs/12/12.01/a1/telemetry.jsonl").write_text("".join(lines))
    first = opt_ops(folder, "logbook", "update", "12", "--at", "30.5%")
    assert first.returncode == 0, first.stderr
    assert first.stdout == (folder / "runs/12/chronicle/update-30.5.md").read_text()
    assert "Since the 30.5 % update" in opt_ops(folder, "logbook", "update", "12", "--at", "31%").stdout
    late = opt_ops(folder, "logbook", "update", "12", "--at", "90%")
    assert (late.returncode, "320 of 1000 steps are trained" in late.stderr) == (4, True)
    assert opt_ops(folder, "logbook", "update", "12", "--at", "most").returncode == 2
    assert "## To watch" in opt_ops(folder, "logbook", "handover", "12").stdout


def test_a_logbook_is_published_without_names(site: Path, tmp_path: Path):
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    ask = opt_ops(folder, "logbook", "publish", "12", "--to", "public")
    assert (ask.returncode, "Without --redact, public shows" in ask.stderr, "person" in ask.stderr) == (4, True, True)
    dry = opt_ops(folder, "logbook", "publish", "12", "--redact", "--to", "public", "--dry-run")
    assert (dry.returncode, "Would replace: " in dry.stderr, (folder / "public").exists()) == (0, True, False)
    done = opt_ops(folder, "logbook", "publish", "12", "--redact", "--to", "public", "-o", "json")
    value = json.loads(done.stdout)
    assert (value["schema"], sorted(value["items"][0])) == ("opt-ops/published/1", ["files", "left_out", "replaced"])
    author = json.loads((folder / "public" / "report.json").read_text())["author"]
    assert (author, (folder / "runs/12/chronicle/redaction.json").stat().st_mode & 0o777) == ("person-A", 0o600)
    for wrong in (("--keep", "gpus"), ("--replace", "x"), ("--replace", "(=y"), ("--replace", "x*=y")):
        assert opt_ops(folder, "logbook", "publish", "12", "--redact", "--to", "public", *wrong).returncode == 2
    within = opt_ops(folder, "logbook", "publish", "12", "--redact", "--to", "runs/12/chronicle")
    assert (within.returncode, "lies in the lineage's own folder" in within.stderr) == (2, True)


def test_the_ledger_for_people_programs_and_prometheus(site: Path, tmp_path: Path):
    assert "LOST TIME" in opt_ops(site, "ledger", "12").stdout
    value = json.loads(opt_ops(site, "ledger", "-o", "json").stdout)
    assert (value["schema"], value["items"][0]["lineage"]) == ("opt-ops/ledger/1", "12")
    summed = json.loads(opt_ops(site, "ledger", "--total", "--since", "9999w", "-o", "json").stdout)
    assert (summed["schema"], summed["items"][0]["lineages"]) == ("opt-ops/ledger-total/1", 1)
    assert "conventional tCO2e" in opt_ops(site, "ledger", "--total").stdout
    assert opt_ops(site, "ledger", "--total", "--since", "soon").returncode == 2
    unknown = opt_ops(site, "ledger", "--conventional")
    assert (unknown.returncode, "set gpu_tdp_watts under [ledger] in opt-ops.toml" in unknown.stderr) == (2, True)
    rates = f'runs = "{site}/runs"\n[ledger]\ntdp_watts = 400\nkg_co2e_per_kwh = 0.21\n'
    for source, said in (("", "set factor_source in"), ("factor_source = 'a table'", "0.21 kg per kWh, a table")):
        (tmp_path / "site.toml").write_text(rates + source)
        figures = opt_ops(site, "-c", str(tmp_path / "site.toml"), "ledger", "--conventional")
        assert "kept updates" in figures.stdout
        assert said in figures.stdout
    file = tmp_path / "opt-ops.prom"
    assert opt_ops(site, "ledger", "--prometheus", "--write", str(file)).returncode == 0
    assert file.read_text() == opt_ops(site, "ledger", "12", "--prometheus").stdout
    assert 'opt_ops_restarts{lineage="12",way="automatic"} 2.0' in file.read_text()


def test_init_writes_a_configuration_that_is_read(tmp_path: Path):
    done = opt_ops(tmp_path, "init", "local")
    assert (done.returncode, done.stdout) == (0, "opt-ops.toml\n"), done.stderr
    again = opt_ops(tmp_path, "init", "slurm")
    assert (again.returncode, "exists already" in again.stderr) == (4, True)
    assert opt_ops(tmp_path, "init", "slurm", "--to", "site/slurm.toml").returncode == 0
    (known,) = json.loads(opt_ops(tmp_path, "-c", "site/slurm.toml", "q", "-o", "json").stdout)["items"] or [None]
    assert known is None
    text = (tmp_path / "site/slurm.toml").read_text()
    bare = "\n".join(re.sub(r"^# (?=\w+ = )", "", line) for line in text.splitlines())
    (tmp_path / "all.toml").write_text(bare)  # what is commented out is right, too
    assert opt_ops(tmp_path, "-c", "all.toml", "q").returncode == 0


def saved(folder: Path, step: int) -> Path:
    path = folder / f"runs/12/12.00/checkpoints/step-{step:08d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(bytes(100))
    (path / "COMMITTED").write_text("x")
    return path


def test_checkpoints_are_read_back_and_pruned(tmp_path: Path):
    journal, paths = (
        Journal(tmp_path / "runs" / "12" / "journal"),
        {s: saved(tmp_path, s) for s in (10, 20, 30, 40, 50)},
    )
    story = Story().training(60)
    for step, path in paths.items():
        point = Checkpoint(run="12.00", step=step, path=str(path))
        story.see(e.CheckpointSeen(checkpoint=point))
        if step == 40:
            story.see(e.CheckpointRefused(checkpoint=point, why="torn"))
        elif step != 50:
            story.see(e.CheckpointVerified(checkpoint=point, healthy=True, why=""))
    for entry in story.entries:
        journal.append(journal.stamp(entry.event, entry.ts))
    damaged = opt_ops(tmp_path, "ckpt", "verify", "12", "30", "-o", "json")
    assert damaged.returncode == 5
    assert json.loads(damaged.stdout)["items"][0]["sound"] is False
    assert opt_ops(tmp_path, "ckpt", "verify", "12", "77").returncode == 3
    foreseen = opt_ops(tmp_path, "ckpt", "prune", "12", "--keep", "2", "--dry-run", "-o", "name").stdout
    told = opt_ops(tmp_path, "ckpt", "prune", "12", "--keep", "2", "--dry-run").stdout
    assert told == "would delete  step 40 of 12.00, 0.0 GiB: torn\nwould lose    nothing that is trained\n"
    assert all(path.is_dir() for path in paths.values())
    assert opt_ops(tmp_path, "ckpt", "prune", "12", "--keep", "2").returncode == 4, "nobody has agreed"
    done = opt_ops(tmp_path, "ckpt", "prune", "12", "--keep", "2", "--yes", "-o", "name")
    assert done.stdout == foreseen == "40\n"
    left = {step for step, path in paths.items() if path.exists()}
    assert left == {10, 20, 30, 50}, "10: the first of its tenth; 20, 30: the newest good; 50: not examined yet"


def test_logs_of_a_rank(site: Path, tmp_path: Path):
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    log = folder / "runs/12/12.01/a1/logs/rank-0003.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"one\ntwo \x1b[31m\xff\nthree\n")
    assert opt_ops(folder, "run", "logs", "12", "--rank", "3", "-n", "2").stdout == "two \ufffd[31m\ufffd\nthree\n"
    missing = opt_ops(folder, "run", "logs", "12.01")
    assert (missing.returncode, "ranks with a log: 3" in missing.stderr) == (3, True)


def test_doctor_looks_at_journals_clocks_and_servers(site: Path, tmp_path: Path):
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    file = folder / "runs/12/journal/000001.jsonl"
    file.write_bytes(file.read_bytes().replace(b"12.00-a0", b"12.00-b0", 1))
    (folder / "opt-ops.toml").write_text("[mlflow]\ntracking_uri = 'http://ann:secret@127.0.0.1:9'\n")
    done = opt_ops(folder, "doctor", "-o", "json")
    found = {row["check"]: row for row in json.loads(done.stdout)["items"]}
    assert (found["journals"]["ok"], found["clock"]["ok"], found["mlflow"]["ok"]) == (False, True, False)
    assert "fails its checksum" in found["journals"]["found"]
    assert "start the server" in found["mlflow"]["next"]
    assert "secret" not in done.stdout


def test_a_sparkline_keeps_peaks_and_shows_what_is_not_finite():
    from opt_ops.cli.shared.text_curve import sparkline

    assert sparkline([1.0] * 50 + [9.0] + [1.0] * 49, 10) == "▁▁▁▁▁█▁▁▁▁"
    assert sparkline([1.0, None, 2.0], 10) == "▁×█"
    assert sparkline([None, None], 10) == "××"


def test_completion_knows_lineages_and_runs(site: Path, monkeypatch: pytest.MonkeyPatch):
    from opt_ops.cli.shared.options import complete_id

    monkeypatch.chdir(site)
    assert complete_id("12") == ["12", "12.00", "12.01"]
    assert complete_id("9") == []
    assert "12.01-a1" in complete_id("12.01-")
    assert "12-i000" in complete_id("12-i")


def test_daemon_status_tells_a_living_daemon_from_a_dead_one(tmp_path: Path):
    sign = {"ts": 0.0, "host": "head", "pid": 1, "version": "0", "policy": "p", "lineages": ["12"]}
    write_json(tmp_path / "runs" / "daemon.json", sign)
    done = opt_ops(tmp_path, "daemon", "status", "-o", "json")
    assert done.returncode == 75
    assert json.loads(done.stdout)["items"][0]["alive"] is False
    assert "Training continues, not watched." in done.stderr
