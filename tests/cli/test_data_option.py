"""What `run start --data` hands to the trainer, which is started in another folder."""

from pathlib import Path

import pytest

from opt_ops.cli.run.start_checks import corpus
from opt_ops.errors import UsageError


def test_paths_become_whole_and_names_and_weights_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("wiki", "a=b:3"):
        (tmp_path / name).mkdir()
    assert corpus("--data", "wiki") == f"{tmp_path}/wiki"
    assert corpus("--data", "w=wiki:0.3") == f"w={tmp_path}/wiki:0.3"
    assert corpus("--data", "wiki:2") == f"{tmp_path}/wiki:2"
    assert corpus("--data", "a=b:3") == f"{tmp_path}/a=b:3"
    with pytest.raises(UsageError, match="books does not exist"):
        corpus("--data", "b=books:1")
    with pytest.raises(UsageError, match="'-1' behind the colon is no number"):
        corpus("--data", "w=wiki:-1")
