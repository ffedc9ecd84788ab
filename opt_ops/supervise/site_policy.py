"""The policy of a site: its playbook pages, and its settings in `opt-ops.toml`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from opt_ops import playbook_loader
from opt_ops.config import Config
from opt_ops.core.decide.policy import Policy


def site_policy(config: Config, pages: Path | None = None) -> Policy:
    """The policy by which the daemon decides. It sends no alerts.

    Args:
        config: Of the site.
        pages: A folder of playbook pages in place of the site's.

    Raises:
        PlaybookError: A page is malformed.
    """
    folder, recovery = pages or config.playbooks or playbook_loader.folder(), config.recovery
    policy, _ = playbook_loader.load(folder, expected_gpus=config.expected_gpus)
    return replace(policy, in_place=recovery.in_place, in_place_seconds=recovery.in_place_seconds)
