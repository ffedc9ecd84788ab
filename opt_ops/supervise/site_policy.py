"""The policy of a site: its playbook pages, and its settings in `opt-ops.toml`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from opt_ops import playbook_loader
from opt_ops.config import Config, locate
from opt_ops.core.decide.policy import EvaluationRule, Policy
from opt_ops.supervise.evaluation_orders import EvaluationCommand


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
    evaluation = _evaluation(config)
    return replace(
        policy,
        in_place=recovery.in_place,
        in_place_seconds=recovery.in_place_seconds,
        evaluation=evaluation,
    )


def evaluation_command(config: Config, path: Path | None) -> EvaluationCommand:
    """The command that the daemon, or the agent of an idle node, starts. It reads the same configuration, at `path`."""
    file, samples = locate(path), config.samples
    option = ("-c", str(file)) if file else ()
    return EvaluationCommand(
        argv=(sys.executable, "-m", "opt_ops", *option, "ckpt", "evaluate"),
        samples=("--prompts", str(samples.prompts), "--tokens", str(samples.tokens)) if samples.prompts else (),
        nice=config.evaluate.nice,
    )


def _evaluation(config: Config) -> EvaluationRule:
    evaluate, samples = config.evaluate, config.samples
    return EvaluationRule(
        every=evaluate.every if evaluate.tasks else 0,
        tasks=tuple(evaluate.tasks),
        samples_every=samples.every if samples.prompts else 0,
        on_spares=evaluate.where == "spare",
    )
