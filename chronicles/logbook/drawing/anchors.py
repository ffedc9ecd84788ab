"""Names of places on the page."""

from __future__ import annotations

import re


def slug(text: str) -> str:
    """The text as an id on the page, without characters that mean something in HTML or a URL."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)
