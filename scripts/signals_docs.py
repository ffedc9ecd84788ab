"""Writes the table of detectors into docs/signals.md: `python scripts/signals_docs.py`. A test holds them equal."""

from __future__ import annotations

from pathlib import Path

from opt_ops import playbook_loader
from opt_ops.core.detect.activations import ActivationDetector

PAGE = Path(__file__).parents[1] / "docs" / "signals.md"
BEGIN, END = "<!-- made by scripts/signals_docs.py -->\n", "<!-- end -->\n"


def table() -> str:
    """The detectors with the numbers that the shipped playbooks and the code give them."""
    policy, _ = playbook_loader.load(playbook_loader.folder())
    spike, drift, scale, slow = policy.spike, policy.drift, policy.loss_scale, policy.straggler
    activation, throughput = ActivationDetector, policy.throughput
    drifted = f"median of {drift.width} points {drift.rise:g} nats and {drift.errors:g} standard errors above its best"
    rows = [
        (
            "gradient_norm",
            "alert",
            f"above median + {spike.gnorm_deviations:g} sd of {spike.window} points and rising, two points in a row",
        ),
        (
            "loss_spike",
            "alert",
            f"{spike.persist} of {spike.of} points above median + max({spike.deviations:g} sd, {spike.floor:g} nats)",
        ),
        (
            "loss_spike",
            "act",
            f"… for {spike.heal_steps} steps and {spike.of} points, two thirds of them, and not on its way back",
        ),
        (
            "loss_drift",
            "alert",
            f"{drifted}, for {drift.persist // 4} points",
        ),
        ("loss_drift", "act", f"… for {drift.persist} points, and not halved"),
        ("loss_plateau", "alert", f"no better level for {drift.stall} points and half of all steps"),
        (
            "loss_too_low",
            "alert",
            f"a fall of {drift.low:g} nats within {drift.width} or {4 * drift.width} points that nothing announced",
        ),
        ("loss_too_low", "act", f"… for {drift.persist} points"),
        ("non_finite_loss", "act", "the loss or the gradient norm is not finite"),
        ("loss_scale_falling", "alert", f"{scale.fall:g} times lower than within the last {scale.within} points"),
        ("loss_scale_floor", "act", f"at or below {scale.floor:g} for {scale.persist} points"),
        (
            "activation_norm",
            "alert",
            f"{activation.RATIO:g} times its lowest within {activation.BACK} points, after the first {activation.WARM}",
        ),
        (
            "throughput_drop",
            "alert",
            f"median of {throughput.width} points {throughput.drop:.0%} below the attempt's best, for as many points",
        ),
        (
            "throughput_drop",
            "act",
            f"… with a node whose ranks were the slowest in {throughput.share:.0%} of them, or whose reading slows it",
        ),
        (
            "silent_data_corruption",
            "act",
            "ranks compared what they should hold alike, and it differs (`trainer/step/checksums.py`)",
        ),
        ("straggler", "act", f"one rank {slow.ratio:g} times as busy as the median for {slow.persist} points"),
    ]
    lines = ["| signal | tier | when |", "| --- | --- | --- |"]
    lines += [f"| `{signal}` | {tier} | {when} |" for signal, tier, when in rows]
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with a fresh table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
