"""Writes the table of detectors into docs/signals.md: `python scripts/signals_docs.py`. A test compares both."""

from __future__ import annotations

from pathlib import Path

from opt_ops import playbook_loader
from opt_ops.core.decide.policy import Policy
from opt_ops.core.detect.activations import ActivationDetector

PAGE = Path(__file__).parents[1] / "docs" / "signals.md"
BEGIN, END = "<!-- made by scripts/signals_docs.py -->\n", "<!-- end -->\n"

Line = tuple[str, str, str]
"""Signal, tier, when."""


def table() -> str:
    """The table of detectors, with the numbers of the shipped playbooks and the code."""
    policy, _ = playbook_loader.load(playbook_loader.folder())
    lines = ["| signal | tier | when |", "| --- | --- | --- |"]
    lines += [f"| `{signal}` | {tier} | {when} |" for signal, tier, when in (*_loss(policy), *_pace(policy))]
    return "\n".join(lines) + "\n"


def _loss(policy: Policy) -> list[Line]:
    spike, drift = policy.spike, policy.drift
    rising = f"above median + {spike.gnorm_deviations:g} sd of {spike.window} points and rising, two points in a row"
    high = f"{spike.persist} of {spike.of} points above median + max({spike.deviations:g} sd, {spike.floor:g} nats)"
    stays = f"… for {spike.heal_steps} steps and {spike.of} points, two thirds of them, and the loss is not returning"
    level = f"median of {drift.width} points is {drift.rise:g} nats and {drift.errors:g} standard errors above its best"
    fall = f"a sudden fall of {drift.low:g} nats within {drift.width} or {4 * drift.width} points"
    return [
        ("gradient_norm", "alert", rising),
        ("loss_spike", "alert", high),
        ("loss_spike", "act", stays),
        ("loss_drift", "alert", f"{level}, for {drift.persist // 4} points"),
        ("loss_drift", "act", f"… for {drift.persist} points, and the rise has not halved"),
        ("loss_plateau", "alert", f"no better level for {drift.stall} points, and for half of all steps"),
        ("loss_too_low", "alert", fall),
        ("loss_too_low", "act", f"… for {drift.persist} points"),
        ("non_finite_loss", "act", "the loss or the gradient norm is not finite"),
        ("unplanned_lr", "act", "the learning rate read back is not the planned one (live only)"),
        ("unplanned_lr", "alert", "… and it never was: the trainer may follow a schedule that it cannot state"),
    ]


def _pace(policy: Policy) -> list[Line]:
    scale, slow, drop, norm = policy.loss_scale, policy.straggler, policy.throughput, ActivationDetector
    grown = f"{norm.RATIO:g} times its lowest of the last {norm.BACK} points, after the first {norm.WARM}"
    low = f"median of {drop.width} points is {drop.drop:.0%} below the attempt's best, for {drop.width} points"
    node = f"… and one node has the slowest ranks in {drop.share:.0%} of them, or a reading that slows it"
    slightly = f"… or {slow.slight:g} times, until the others have waited {slow.waits_seconds:g} s for it"
    return [
        ("loss_scale_falling", "alert", f"{scale.fall:g} times lower than in the last {scale.within} points"),
        ("loss_scale_floor", "act", f"at or below {scale.floor:g} for {scale.persist} points"),
        ("activation_norm", "alert", grown),
        ("throughput_drop", "alert", low),
        ("throughput_drop", "act", node),
        ("silent_data_corruption", "act", "ranks differ in data that must be equal (`trainer/step/checksums.py`)"),
        ("straggler", "act", f"one rank is {slow.ratio:g} times as busy as the median for {slow.persist} points"),
        ("straggler", "act", slightly),
    ]


def page(text: str) -> str:
    """The page with its table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
