"""The folders under `runs/campaigns/`: which campaigns exist, and the state of each by its journal."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import cast

from opt_ops.core.campaign.events import CAMPAIGN, CampaignEvent
from opt_ops.core.campaign.state import CampaignState, fold
from opt_ops.errors import NotFound, Refused, UsageError
from opt_ops.runfolder.files import folders_in, names_in
from opt_ops.runfolder.journal_reader import CAMPAIGNS, read
from opt_ops.runfolder.permissions import give_to_group, private

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")  # of a folder, and part of the ids of requests


def folders(runs: Path) -> list[Path]:
    """The folders of all campaigns, by name.

    Raises:
        OSError: they cannot be listed.
    """
    with suppress(NotADirectoryError):  # `campaign start` says what is wrong with it
        return sorted(folders_in(runs / CAMPAIGNS, NAME))
    return []


def require_name(name: str) -> None:
    """Check that a campaign can have this name.

    Raises:
        UsageError: it cannot.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a campaign: at most 63 letters, digits, `.`, `_` and `-` are taken, the "
            "first a letter or digit",
            "for example opt-sizes",
        )


def folder(runs: Path, name: str) -> Path:
    """The folder of a campaign.

    Raises:
        UsageError: no campaign can have this name.
        NotFound: there is no such campaign.
    """
    require_name(name)
    path = runs / CAMPAIGNS / name
    if not path.is_dir():
        known = ", ".join(each.name for each in folders(runs)) or "none"
        raise NotFound(f"no campaign {name} in {runs}; known: {known}", "opt-ops campaign start begins one")
    return path


def create(runs: Path, name: str, group: str = "") -> Path:
    """Create the folder of a campaign, for this user alone; with `group`, its members may read it.

    The folder of a campaign whose start was refused, or interrupted before it was requested, is taken.

    Raises:
        Refused: there is a campaign of this name.
        JournalError: there may be one, and its journal cannot be trusted.
    """
    path = runs / CAMPAIGNS / name
    with private(group):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError as error:
            if path.is_dir() and not names_in(path / "inbox", ".json") and state(path).started is None:
                return path
            raise Refused(f"there is a campaign {name} already", f"opt-ops campaign status {name}") from error
    if group:
        give_to_group(path, group)
    return path


def state(path: Path) -> CampaignState:
    """The state of a campaign.

    Raises:
        JournalError: the journal is damaged or of a newer version.
    """
    found = CampaignState()
    for entry in read(path / "journal", CAMPAIGN)[0]:
        found = fold(found, entry.ts, cast("CampaignEvent", entry.event))
    return found
