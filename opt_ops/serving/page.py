"""The page at `/`: one HTML file with its style and script, and the policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

_FILE = Path(__file__).with_name("page.html")


class Page:
    """The page of one checkpoint.

    Args:
        about: name, engine and so on, as page.html uses them. They are escaped.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        text = template.from_string(_FILE.read_text("utf-8")).render(about)
        self.body = text.encode()
        style, script = (_digest(text, tag) for tag in ("style", "script"))
        self.policy = (
            f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )


def _digest(text: str, tag: str) -> str:
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert found, f"page.html has no <{tag}>"
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
