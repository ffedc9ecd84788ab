"""Text that others wrote shows itself and does nothing: in the page, in the Markdown, in the curves."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from chronicles.logbook.drawing import markdown as md
from chronicles.logbook.drawing.anchors import slug
from chronicles.logbook.drawing.markup import code, plain, quote
from chronicles.logbook.entries.entry import Change, LogEntry
from chronicles.logbook.front_page import front_page
from chronicles.logbook.render import render
from chronicles.logbook.story.model import Fold, Story, StoryEntry
from chronicles.record import Moment, load
from chronicles.report.build import build
from opt_ops.core import events as e
from opt_ops.core.values import (
    Action,
    Checkpoint,
    Driver,
    Fault,
    Outcome,
    PlannedChange,
    Severity,
    StackGroup,
    Tier,
    Verdict,
)
from tests.chronicles.record import LINEAGE
from tests.chronicles.told import Told

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "a | b || c",
    "`code` ``more``",
    "```\n# heading\n```",
    "[x](javascript:alert(1))",
    "![x](https://example.org/x.png)",
    "<https://example.org>",
    "[x]: https://example.org",
    "# heading",
    "- item",
    "1. item",
    "---",
    "===",
    "> quote",
    "&lt;b&gt; &#60;b&#62;",
    "**bold** __bold__ ~~gone~~",
    "{{ 7*7 }} {% raw %}",
    "$\\frac{a}{b}$",
    "\x1b[31mred\x1b[0m \u202egnp.exe \x00",
    "first\nsecond\r\nthird\u2028fourth",
]


class Page(HTMLParser):
    """Every tag with its attributes, and all text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def hostile(folder: Path, text: str) -> Told:
    """A lineage in which every text that is not ours is this one."""
    told = Told(folder).begin(author=text, settings=(text,)).plan("12.00", cause=text)
    told.hold(text, "n2", "n3").launch("12.00-a0", None, None, text, "n2")
    told.train("12.00-a0", 1, 30, valid=lambda step: {text: 3.0, "b": 2.0} if step % 10 == 0 else None)
    judged = e.NodeJudged(
        node=text, host=text, verdict=Verdict.BAD, reason=text, source=text, at=told.now, evidence={"line": text}
    )
    told.see(judged, e.NoteAdded(request="n", author=text, target=text, text=text))
    told.end("12.00-a0", Outcome.FAILED, 30)
    incident = told.incident(
        "bad_gpu",
        text,
        "12.00-a0",
        30,
        nodes=(text,),
        evidence={text: text, "uuid": f"GPU-{text}", "serial": text, "line": text},
    )
    told.decide(incident, Action.RESTART, exclude=(text,), why=text, playbook=text)
    told.see(e.NodeExcluded(node=text, incident=incident, reason=text))
    told.launch("12.00-a1", None, incident, "n2", "n3").train("12.00-a1", 1, 40).close(incident)
    measured: dict[str, Any] = {"task": text, "metric": text, "harness": text, "task_version": text, "file": text}
    told.evaluated(20, **measured).evaluated(30, **measured).sampled(30, (text, text, text + " more" * 80))
    _remarked(told, incident, text)
    _steered(told, text)
    _found(told, text)
    told.see(e.StopRequested(request="s", author=text, reason=text), e.LineageCancelled(request="s", why=text))
    return told


def _remarked(told: Told, incident: str, text: str) -> None:
    """What people say below an entry, ask in the end, and what a trainer says of its versions."""
    told.see(
        e.NoteAdded(request="n1", author=text, target=incident, text=text, correction=True),
        e.NoteAdded(request="n2", author=text, target="12-e1", text=text),
        e.NoteAdded(request="n3", author=text, target=text, text=f"{text}?"),
    )
    known = told.state.attempts["12.00-a1"]
    assert known.schedule
    assert known.optimizer
    configured = e.AttemptConfigured(
        attempt="12.00-a1",
        steps=400,
        schedule=known.schedule,
        optimizer=known.optimizer,
        versions={text: text, "torch": text},
        layout={text: text},
    )
    told.see(configured)


def _steered(told: Told, text: str) -> None:
    """What people, programs and the scheduler say while an attempt runs."""
    asked: dict[str, Any] = {"author": text, "reason": text}
    told.see(e.StrayFound(job=text, allocation=text), e.SizeDecided(nodes=1, why=text))
    told.see(e.AllocationIntended(allocation="12-n1", nodes=1, exclude=(text,), why=text))
    told.see(e.AllocationSubmitted(allocation="12-n1", job=text, adopted=False))
    hung = told.incident("hang", text, "12.00-a1", 40)
    groups = (StackGroup(ranks=(0,), frames=(text,)), StackGroup(ranks=(1,), frames=(text, text)))
    taken = e.StacksTaken(attempt="12.00-a1", incident=hung, groups=groups, odd=(1,), silent=(), nodes=(text,))
    told.see(taken)
    told.decide(hung, Action.ROLLBACK, why=text, settings=(text,), advice=True)
    told.see(
        e.IncidentClosed(incident=hung, proven=None, proof={}, step_resumed=None, steps_lost=None, seconds_down=None)
    )
    told.see(
        e.ChangeRequested(request="c", settings=(text,), **asked), e.ChangeRequested(request="c2", lr=1e-4, **asked)
    )
    told.incident("operator", text, "12.00-a1", 40, evidence={"request": "c2"})
    told.see(e.NodeExcluded(node="n9", incident="operator", request="x", **asked))
    told.see(
        e.NodeAllowed(request="y", node=text, **asked), e.RequestRefused(request="z", author=text, verb=text, why=text)
    )
    told.see(e.DriverChanged(request="d", driver=Driver.OPERATOR, **asked))
    told.see(e.ChangesDeclared(request="s", planned=(PlannedChange(step=50, what=text, by=text),), **asked))
    told.see(e.AlertIntended(alert=text, severity=Severity.PAGE, title=text, body=text))
    told.see(e.AlertSettled(alert=text, delivered=False, why=text))
    told.see(e.PauseRequested(request="p", **asked), e.LineagePaused(why=text), e.ResumeRequested(request="r", **asked))


def _found(told: Told, text: str) -> None:
    """What detectors, disks, the scheduler and drills are quoted with."""
    said: dict[str, Any] = {"rule": text, "evidence": {"line": text, text: text}}
    for tier, signal in ((Tier.ALERT, "save_failed"), (Tier.ALERT, "gradient_norm")):
        told.see(
            e.SignalRaised(signal=signal, tier=tier, attempt="12.00-a1", step=40, onset_step=None, at=told.now, **said)
        )
    told.see(e.CheckpointRefused(checkpoint=Checkpoint(run="12.00", step=30, path=text), why=text))
    told.see(e.AllocationIntended(allocation="12-n2", nodes=1, exclude=(), why=text))
    told.see(e.AllocationFailed(allocation="12-n2", why=text))
    put_in: dict[str, Any] = {"author": text, "attempt": "12.00-a1", "arguments": {"rank": text, text: text}}
    told.see(
        e.DrillRequested(request="q", drill="d000", fault=Fault.KILL_RANK, **put_in),
        e.DrillRequested(request="q2", drill="d001", fault=Fault.HANG, **put_in),
    )
    drilled = told.incident("process_death", text, "12.00-a1", 40, drill="d000")
    told.decide(drilled, Action.HALT, why=text, playbook=text)
    told.see(e.NodeDrained(node=text, done=False, why=text), e.LineageHalted(why=text, incident=drilled))


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The same lineage with plain words, as Markdown and as a page."""
    return drawn(hostile(tmp_path_factory.mktemp("plain") / "12", "word").folder)


def drawn(folder: Path) -> tuple[str, str]:
    markdown, html, _ = render(folder)
    return markdown.read_text(), html.read_text()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_changes_no_shape(tmp_path: Path, harmless: tuple[str, str], text: str):
    markdown, html = drawn(hostile(tmp_path / "12", text).folder)
    _same_elements(html, harmless[1], text)
    _same_blocks(markdown, harmless[0])


def _same_elements(html: str, harmless: str, text: str) -> None:
    page = Page(html)
    assert sorted(tag for tag, _ in page.tags) == sorted(tag for tag, _ in Page(harmless).tags)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert all(re.fullmatch(r"#[A-Za-z0-9_.-]+", link or "") for link in links)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)
    shown = text.splitlines()[0].replace("\x1b", "�").replace("\u202e", "�").replace("\x00", "�")
    assert shown in page.text, "it shows itself"


def _same_blocks(markdown: str, harmless: str) -> None:
    bare = _without_code(markdown)
    assert not re.search(r"(?<!\\)<(?=[A-Za-z/!?])", bare), "no HTML"
    assert not re.search(r"(?<!\\)\](?=\(|:\s*http)", bare), "no link"
    for start in ("#", "|", "```", "- "):
        mine = [line for line in markdown.split("\n") if line.startswith(start)]
        assert len(mine) == len([line for line in harmless.split("\n") if line.startswith(start)]), start
    assert _cells(bare) == _cells(harmless)


def _cells(markdown: str) -> list[int]:
    """How many cells the lines of the tables have."""
    return [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.split("\n") if line.startswith("| ")]


def _without_code(markdown: str) -> str:
    """Without fenced blocks and code spans, where nothing means anything."""
    markdown = re.sub(r"^```diff$.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!\\)(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", markdown)


def test_plain_text_escapes_what_means_something_and_no_more():
    assert plain("process_death of xid_79: 3 * 4 [x](y) <b> a|b") == (
        "process_death of xid_79: 3 \\* 4 \\[x\\](y) \\<b\\> a\\|b"
    )
    assert plain("_so_ it `is`\nand\tso") == "\\_so\\_ it \\`is\\` and so"
    assert plain("\x1b[31m") == "�\\[31m"


def test_code_is_fenced_by_more_backticks_than_it_has():
    assert code("a `` b ` c") == "``` a `` b ` c ```"
    assert code("plain") == "`plain`"


def test_a_quote_keeps_its_lines_and_starts_nothing():
    assert quote("# a\n- b\n1. c\n2) d\n\n    e\n+ f") == [
        "> \\# a  ",
        "> \\- b  ",
        "> 1\\. c  ",
        "> 2\\) d  ",
        ">   ",
        "> e  ",
        "> \\+ f",
    ]


def test_names_of_incidents_cannot_leave_their_attribute():
    assert slug('1-i000" onclick="alert(1)') == "1-i000--onclick--alert-1-"
    assert slug("1-i000") == "1-i000"


def test_what_changed_cannot_end_its_block():
    record = load(LINEAGE)
    report = build(record)
    entry = LogEntry(
        anchor="e1", ts=0.0, author="ann", run="1.00", title="x", changes=(Change("nodes", "n1\n```\n# h", "n2"),)
    )
    story_entry = StoryEntry(
        anchor="e1",
        begin=Moment(0.0),
        end=Moment(0.0),
        rule=Fold.SINGLE,
        title="x",
        large=True,
        first=False,
        worst=False,
        steps_lost=None,
        seconds_down=None,
        members=("e1",),
        entries=(entry,),
    )
    markdown = md.logbook(
        report,
        front_page(report, None),
        Story(summary=(), words=0, entries=(story_entry,), strategies=(), afterthoughts=()),
    )
    assert "```diff\n- nodes: n1 ``` # h\n+ nodes: n2\n```\n" in markdown
