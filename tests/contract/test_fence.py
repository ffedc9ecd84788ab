"""A fence that cannot be read stops nobody; one that names another attempt does."""

import json
import os
import pickle
from pathlib import Path

import pytest

from opt_ops.contract.fence import Fence, SupersededError


@pytest.mark.parametrize("content", [None, "[{", '{"v": 1}', "[]", "[" * 60_000, "pipe", "folder"])
def test_a_fence_that_cannot_be_read_is_ignored_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    path = tmp_path / "fence.json"
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    fence = Fence(path, "1.00-a1")
    for _ in range(3):
        fence.check()
    pickle.loads(pickle.dumps(fence)).check()  # as the process that writes checkpoints gets it
    assert caplog.text.count("cannot be read and is ignored") == 1
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_text(json.dumps({"v": 1, "attempt": "1.00-a2"}))
    with pytest.raises(SupersededError, match=r"names 1\.00-a2"):
        fence.check()
