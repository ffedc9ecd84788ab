"""A finished runs folder holds nothing that others may write, also where the umask lets a group write."""

import os
import stat

from opt_ops.core.state.status import Status
from tests.e2e.site import Site


def test_nobody_else_may_write_what_a_finished_lineage_left(site: Site):
    before = os.umask(0o002)
    try:
        site.start("steps=20", "checkpoint_every=10")
        site.start_daemon()
        assert site.ended().status is Status.COMPLETED
    finally:
        os.umask(before)
    site.end_daemon()  # what it is writing now would be gone at the second look
    paths = [path for path in site.runs.rglob("*") if not path.is_symlink()]
    wrong = [str(path) for path in paths if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)]
    assert not wrong
    lineage = site.runs / "1"
    assert stat.S_IMODE(lineage.stat().st_mode) == 0o700
    assert {stat.S_IMODE((lineage / name).stat().st_mode) for name in ("orders.json", "journal.owner.json")} == {0o600}
    assert any(path.name == "COMMITTED" for path in paths)
