"""A playbook that cannot be executed is refused with file and line; those that ship say what they do."""

import re
import shutil
from pathlib import Path

import pytest

from opt_ops import playbook_loader
from opt_ops.core.decide import recovery
from opt_ops.core.decide.policy import AskRule
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Action, AskDefault
from opt_ops.playbook_loader import PlaybookError, load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in playbook_loader.folder().glob("*.md"):
        shutil.copy(path, tmp_path)
    return tmp_path


def edit(path: Path, old: str, new: str) -> int:
    """Replace once; the line on which the change lies."""
    text = path.read_text()
    assert text.count(old) >= 1, old
    path.write_text(text.replace(old, new, 1))
    return text[: text.index(old)].count("\n") + 1


def test_the_shipped_playbooks_are_what_the_policy_executes():
    policy, pages = load(playbook_loader.folder())
    spike = policy.playbooks["loss_spike"]
    assert [(rung.action, rung.lr_factor, rung.margin_steps) for rung in spike.ladder] == [
        (Action.ROLLBACK, 0.75, 100),
        (Action.ROLLBACK, 0.67, 200),
        (Action.ROLLBACK, 0.5, 400),
        (Action.HALT, None, 0),
    ]
    assert [rung.action for rung in spike.cures if rung.cause == "bad_data"] == [Action.ROLLBACK]
    assert all(rung.lr_factor is None for rung in spike.cures), "a cure of a cause leaves the learning rate as it was"
    assert policy.spike.heal_steps == 50
    assert policy.silent_seconds == 25
    assert policy.playbooks["bad_gpu"].ladder[0].exclude
    assert {page.path.stem for page in pages} == {book.name for book in policy.playbooks.values()}


def test_every_shipped_page_says_how_it_asks():
    policy, pages = load(playbook_loader.folder())
    assert all("\n[ask]\n" in page.head for page in pages)
    waits = {
        page.playbook.name for page in pages if page.playbook.ask == AskRule(default=AskDefault.WAIT, seconds=1800.0)
    }
    acts = {page.playbook.name for page in pages if page.playbook.ask == AskRule(default=AskDefault.ACT, seconds=120.0)}
    assert {"loss_spike", "loss_drift", "straggler"} <= waits
    stops = ("process_death", "hang", "bad_gpu", "allocation_lost", "silent_node", "non_finite_loss")
    assert {policy.playbooks[kind].name for kind in stops} <= acts
    assert len(waits) + len(acts) == len(pages)


def test_an_edited_number_changes_the_policy_and_its_version(folder: Path):
    before, _ = load(folder)
    edit(folder / "loss_spike.md", "lr_factor = 0.75", "lr_factor = 0.9")
    after, _ = load(folder)
    assert after.playbooks["loss_spike"].ladder[0].lr_factor == 0.9
    assert after.version != before.version


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr_factor = 0.67", "lr_factor = 1.67", "ladder.1.lr_factor: Input should be less than 1"),
        ("heal_steps = 50 ", "heal_stepps = 50 ", "detect.heal_stepps: unknown key"),
        ("patience = 300 ", 'patience = "big"', "detect.patience: Input should be a valid integer"),
        ("version = 2", "version = 0", "version: Input should be greater than or equal to 1"),
        ('name = "loss_spike"', 'name = "loss_spikes"', "name: is 'loss_spikes', but the name of the file is"),
        ("actions = 5", "actions = five", "Invalid value"),
        ("minutes = 30", "minutes = 0", "ask.minutes: Input should be greater than 0"),
        ('default = "wait"', 'default = "later"', "ask.default: Input should be"),
        ('cause = "bad_data"', 'cause = "bad_luck"', "ladder.6.cause: Input should be"),
        ('settings = ["optim.eps=1e-6"]', 'settings = ["eps"]', "ladder.9.settings.0: String should match pattern"),
        ("margin_steps = 200", "", "ladder.1: only rollback has margin_steps and lr_factor, and"),
    ],
)
def test_a_malformed_page_is_refused_with_file_and_line(folder: Path, old: str, new: str, said: str):
    path = folder / "loss_spike.md"
    line = edit(path, old, new)
    with pytest.raises(PlaybookError, match=re.escape(said)) as error:
        load(folder)
    named = re.search(r"loss_spike\.md, line (\d+)", str(error.value))
    assert named is not None, str(error.value)
    assert int(named[1]) == pytest.approx(line, abs=3 if not new else 0)


def test_an_action_that_nobody_knows_is_refused(folder: Path):
    line = edit(folder / "hang.md", 'action = "halt"', 'action = "pray"')
    with pytest.raises(PlaybookError, match=f"hang.md, line {line}: ladder.3.action"):
        load(folder)


def test_a_page_without_head_or_text_is_refused(folder: Path):
    (folder / "x.md").write_text("# nothing\n")
    with pytest.raises(PlaybookError, match=r"x\.md, line 1: the page does not begin with a TOML head"):
        load(folder)
    (folder / "x.md").unlink()
    text = (folder / "hang.md").read_text()
    (folder / "hang.md").write_text(text[: text.rindex("+++") + 4])
    with pytest.raises(PlaybookError, match="the page has no text"):
        load(folder)


def test_two_pages_with_one_trigger_are_refused(folder: Path):
    shutil.copy(folder / "user_error.md", folder / "zz.md")
    edit(folder / "zz.md", 'name = "user_error"', 'name = "zz"')
    with pytest.raises(PlaybookError, match="user_error already triggers the playbook user_error"):
        load(folder)


def test_numbers_for_a_detector_that_does_not_exist_are_refused(folder: Path):
    edit(folder / "bad_gpu.md", "[budget]", "[detect]\nxids = 3\n\n[budget]")
    with pytest.raises(PlaybookError, match="bad_gpu has no detector"):
        load(folder)


def test_a_missing_detector_is_refused(folder: Path):
    (folder / "hang.md").unlink()
    with pytest.raises(PlaybookError, match=r"no playbook hang with a \[detect\] table"):
        load(folder)


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(PlaybookError, match="has no playbook pages"):
        load(tmp_path)


def test_a_trigger_that_is_no_failure_class_is_refused(folder: Path):
    edit(folder / "hang.md", 'trigger = ["hang"]', 'trigger = ["hangs"]')
    with pytest.raises(
        PlaybookError, match=r"hang.md, line 5: trigger: 'hangs' is no failure class; did you mean hang"
    ):
        load(folder)


def test_classes_without_a_page_are_named(folder: Path):
    assert playbook_loader.classes_without_page(load(folder)[0]) == []
    (folder / "storage.md").unlink()
    assert playbook_loader.classes_without_page(load(folder)[0]) == [FailureClass.STORAGE]


def test_tell_touches_nothing(folder: Path):
    edit(folder / "loss_too_low.md", 'action = "tell"', 'action = "tell"\nexclude = true')
    with pytest.raises(PlaybookError, match=r"loss_too_low.md, line \d+: ladder.0: .*tell only notifies"):
        load(folder)


@pytest.mark.parametrize("action", ["exclude", "change"])
def test_what_only_decisions_say_is_no_step_of_a_page(folder: Path, action: str):
    edit(folder / "hang.md", 'action = "halt"', f'action = "{action}"')
    with pytest.raises(PlaybookError, match=r"hang.md, line \d+: ladder.3: .* is no action of a playbook"):
        load(folder)


def test_a_page_that_ends_with_telling_people_never_stops_training():
    policy, _ = load(playbook_loader.folder())
    tell = ("straggler", "throughput_drop", "daemon_restart", "nodes_returned")
    ends = {name: recovery._action_when_exhausted(policy.playbooks[name]) for name in (*tell, "hang")}
    assert ends == {**dict.fromkeys(tell, Action.NOTIFY), "hang": Action.HALT}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("older = true", "skip_data = true\nskip_onset = true", "skip_data leaves out all batches"),
        (
            'action = "tell"',
            'action = "tell"\nolder = true',
            "only rollback has skip_data, skip_onset, older and settings",
        ),
        ("lr_factor = 0.75", 'lr_factor = 0.75\ncause = "bad_data"', "rungs with a cause stand behind the others"),
    ],
)
def test_options_of_a_rung_that_do_not_fit_are_refused(folder: Path, old: str, new: str, said: str):
    edit(folder / "loss_spike.md", old, new)
    with pytest.raises(PlaybookError, match=re.escape(said)):
        load(folder)
