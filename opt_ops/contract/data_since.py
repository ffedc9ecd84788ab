"""Other data from a step on, as an operator asked for. A trainer gets it as ``--data-since STEP:[NAME=]PATH[:WEIGHT]``.

The option stands once for each corpus of that data. All that have the same step are what every update after that step
is trained on, instead of ``--data``. Options with a later step replace it again.
"""

from collections.abc import Iterable, Mapping

CAPABILITY = "data_since"
"""In ``capabilities`` of ``config.json``: the trainer takes ``--data-since``."""


def parse_data_since(text: str) -> tuple[int, str]:
    """The (step, corpus) in ``STEP:[NAME=]PATH[:WEIGHT]``.

    Raises:
        ValueError: the text has another form, or the step is below 1.
    """
    first, _, corpus = text.partition(":")
    if not (first.isascii() and first.isdecimal() and len(first) <= 18 and int(first) >= 1 and corpus):
        raise ValueError(
            "expected STEP:[NAME=]PATH[:WEIGHT], for example 61000:wiki=wiki/:0.25, with a step of 1 or above. "
            "The updates after STEP are trained on it."
        )
    return int(first), corpus


def by_step(changes: Iterable[tuple[int, str]]) -> Mapping[int, list[str]]:
    """The corpora from each step on, ascending by step, in the order in which they were given."""
    found: dict[int, list[str]] = {}
    for step, corpus in changes:
        found.setdefault(step, []).append(corpus)
    return dict(sorted(found.items()))
