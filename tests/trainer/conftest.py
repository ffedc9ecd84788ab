import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.trainer.harness import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with the topics of Python's manual: half a megabyte that a small model learns something about."""
    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
    return path
