"""Whether a process still runs the code that is on disk."""

import shutil
from pathlib import Path

import pytest

from trainer import sources


def test_changed_sources_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "trainer"
    shutil.copytree(Path(sources.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    known = sources.running_code()
    assert not sources.has_changed()
    monkeypatch.setattr(sources, "__file__", str(copied / "sources.py"))
    assert not sources.has_changed(), "it does not matter where they are"
    (copied / "optim.py").write_text("# corrected\n")
    assert sources.has_changed()
    assert sources.running_code() == known, "what runs stays what it is"
