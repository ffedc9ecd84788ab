"""The newest evaluation in one sentence, for notes."""

from __future__ import annotations

from collections.abc import Sequence

from chronicles.evaluations import ScoreReport, called, series
from chronicles.wording import minute, score, whole

_NAMED = 3  # scores


def newest_evaluation(found: Sequence[ScoreReport], after: float, until: float) -> str | None:
    """The newest settled evaluation that came after `after` and until `until`; None if none did. Not escaped."""
    recent = [each for each in found if each.settled and after < each.at <= until]
    if not recent:
        return None
    last = max(recent, key=lambda each: (each.at, each.step))
    known = [each for each in series(each for each in found if each.at <= until) if each.settled]
    ours = [each for each in known if (each.newest.run, each.newest.step) == (last.run, last.step)]
    told = [
        f"{called(each.newest)} {score(each.newest.value)}"
        + (f" ({score(each.previous.value)} at step {whole(each.previous.step)})" if each.previous else "")
        for each in ours[:_NAMED]
    ]
    if not told:  # an older step was evaluated last
        told = [f"{called(last)} {score(last.value)}"]
    more = f" and {whole(len(ours) - _NAMED)} more" if len(ours) > _NAMED else ""
    worse = [called(each) for each in recent if each.fell and each.step == last.step]
    fell = f" Worse by more than three standard errors: {', '.join(worse[:_NAMED])}." if worse else ""
    return f"Newest evaluation, step {whole(last.step)}, {minute(last.at)}: {', '.join(told)}{more}.{fell}"
