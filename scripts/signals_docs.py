"""Writes the table of detectors into docs/signals.md: `python scripts/signals_docs.py`. A test compares both."""

from __future__ import annotations

from pathlib import Path

from opt_ops import playbook_loader
from opt_ops.core.decide.policy import Policy
from opt_ops.core.detect import growth
from opt_ops.core.detect.activations import ActivationDetector
from opt_ops.core.detect.forecast import ForecastDetector

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
    rising = f"logarithm above median + {spike.gnorm_deviations:g} sd of 128 points and rising, two points in a row"
    stays = f"evidence {spike.act:g}, {spike.heal_steps} steps, points enough to see it come back, and it does not"
    fall = f"{drift.low:g} standard errors and {drift.low_sd:g} sd lower than 16, 64 or 256 points ago, out of its pace"
    return [
        ("gradient_norm", "alert", rising),
        ("loss_spike", "alert", f"evidence {spike.alert:g} against the best level, at once 4 sd above it"),
        ("loss_spike", "act", f"… {stays}"),
        ("loss_drift", "alert", f"evidence {spike.alert:g} against the best level, little by little"),
        ("loss_drift", "act", f"… {stays}"),
        (
            "loss_plateau",
            "alert",
            f"no better level for half of all steps; {drift.stall} points, or 128 where progress would be seen",
        ),
        ("loss_too_low", "alert", fall),
        ("loss_too_low", "act", f"… for {drift.low_stays} points"),
        ("bad_restore", "act", "an attempt's first points do not continue the loss that was reached"),
        (
            "undeclared_change",
            "act",
            "the loss rises where `lr`, `batch`, `batch_tokens` or `stage` change, and does not grow",
        ),
        ("undeclared_change", "act", "the batch is not the one of config.json, and was before (live only)"),
        (
            "unplanned_lr",
            "alert",
            "the learning rate leaves its path: a factor of 1.5 between two lines, a rise after warm-up, a stop",
        ),
        (
            "off_forecast",
            "alert",
            f"cells lie {ForecastDetector.EVIDENCE:g} sd in sum above what the curve foretold",
        ),
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
        (
            "loss_scale_floor",
            "act",
            f"{scale.overflows} overflows without a doubling; {scale.refill} finite updates undo one",
        ),
        ("activation_norm", "alert", grown),
        ("update_norm", "alert", f"update norm / lr of a block {growth.ENOUGH:g} sd above its usual path, summed up"),
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
