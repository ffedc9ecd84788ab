"""What a daemon, an agent and commands create is their user's alone, also under umask 002."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from chronicles.mlflow_mirror.store import serve_command
from opt_ops.config import Config
from opt_ops.errors import Refused
from opt_ops.runfolder import lineages
from opt_ops.runfolder.permissions import (
    check_trusted,
    follow_rights_of,
    give_to_group,
    keep_private,
    private,
    writable_by_others,
)


@pytest.fixture(autouse=True)
def _group_writes_by_default() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_lineage_and_its_requests_are_private(tmp_path: Path):
    lineage = lineages.create(tmp_path / "runs")
    request = lineages.ask(lineage, "ann", "stop", {}, 0.0)
    assert mode(lineage) == mode(lineage / "inbox") == 0o700
    assert mode(lineage / "inbox" / f"{request.request}.json") == 0o600
    assert writable_by_others(tmp_path / "runs") == []
    (tmp_path / "public").touch()
    assert mode(tmp_path / "public") == 0o664, "only for that while"


def test_a_group_may_read(tmp_path: Path):
    import grp

    group = grp.getgrgid(os.getgid()).gr_name
    lineage = lineages.create(tmp_path / "runs", group)
    lineages.ask(lineage, "ann", "stop", {}, 0.0)
    assert mode(lineage) == 0o2750
    assert {mode(path) for path in (lineage / "inbox").iterdir()} == {0o640}
    assert writable_by_others(tmp_path / "runs") == []
    with pytest.raises(Exception, match="cannot be given to group no-such-group"):
        give_to_group(lineage, "no-such-group")


@pytest.mark.parametrize(("rights", "created"), [(0o700, 0o600), (0o750, 0o640), (0o775, 0o644), (0o755, 0o644)])
def test_an_agent_follows_its_lineage_and_never_lets_others_write(tmp_path: Path, rights: int, created: int):
    tmp_path.chmod(rights)
    follow_rights_of(tmp_path)
    (tmp_path / "line").touch()
    assert mode(tmp_path / "line") == created


def test_a_process_that_is_private_stays_so(tmp_path: Path):
    keep_private()
    (tmp_path / "a").mkdir()
    assert mode(tmp_path / "a") == 0o700
    with private("llm"):
        (tmp_path / "b").touch()
    (tmp_path / "c").touch()
    assert (mode(tmp_path / "b"), mode(tmp_path / "c")) == (0o640, 0o600)


def test_a_folder_that_others_may_write_is_told_with_the_command_that_mends_it(tmp_path: Path):
    tmp_path.chmod(0o755)
    assert check_trusted(tmp_path) == ""
    tmp_path.chmod(0o775)
    assert f"chmod go-w {tmp_path}" in check_trusted(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(Refused, match="everybody may write") as refused:
        check_trusted(tmp_path)
    assert refused.value.hint == f"chmod go-w {tmp_path}"
    tmp_path.chmod(0o700)


def test_what_others_may_write_is_found(tmp_path: Path):
    (tmp_path / "12" / "inbox").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "12", tmp_path / "12" / "inbox"):
        path.chmod(0o700)
    (tmp_path / "12" / "orders.json").touch()
    (tmp_path / "12" / "link").symlink_to("/tmp")
    assert writable_by_others(tmp_path) == [tmp_path / "12" / "orders.json"]


def test_a_password_is_in_no_argument(tmp_path: Path):
    uri = "postgresql://ann:secret@db/mlflow"
    command, environment = serve_command(uri, tmp_path, 5000)
    assert not any("secret" in word for word in command)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == uri
    with pytest.raises(ValueError, match="must hold no password"):
        Config.model_validate({"trainer": {"checkpoint_copy": "sftp://ann:secret@host/opt"}})
    assert Config.model_validate({"trainer": {"checkpoint_copy": "s3://bucket/opt"}})
