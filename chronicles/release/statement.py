"""What a released model was trained on, and where it comes from, for programs. No text and no path of the site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chronicles.record import LineageRecord

_OF_CORPUS = ("share", "tokens", "documents", "digest", "corrupt_lines")
_OF_DEDUP = ("engine", "threshold", "shingle", "documents_in", "documents_out", "removed", "digest")

Text = Callable[[str], str]


def data(config: Mapping[str, Any] | None, text: Text, step: int) -> dict[str, Any]:
    """The data statement.

    `stretches` has what was trained on from which step to which. `corpora` is the last of them.

    Args:
        config: config.json of the attempt that wrote the checkpoint; None if it is gone.
        text: redacts a text.
        step: of the checkpoint.
    """
    told: Mapping[str, Any] = (config or {}).get("data") or {}
    whole = {"step": 0, "digest": told.get("digest"), "corpora": told.get("corpora") or ()}
    since = [each for each in told.get("since") or [whole] if each["step"] < max(step, 1)]
    ends = [*(each["step"] for each in since[1:]), step]
    last = since[-1]
    return {
        "schema": "opt-ops/data-statement/1",
        "known": bool(told),
        "digest": last["digest"],
        "tokens": sum(each["tokens"] for each in last["corpora"]) if "since" in told else told.get("tokens"),
        "tokenizer": told.get("tokenizer"),
        "corpora": [_corpus(each, text) for each in last["corpora"]],
        "stretches": [
            {
                "from_step": each["step"] + 1,
                "to_step": end,
                "digest": each["digest"],
                "corpora": [
                    {"name": text(str(corpus.get("name"))), "share": corpus.get("share")} for corpus in each["corpora"]
                ],
            }
            for each, end in zip(since, ends, strict=True)
            if told
        ],
        "validation": [_corpus(each, text) for each in told.get("validation") or ()],
        "dedup": [_dedup(each) for each in told.get("dedup") or ()],
    }


def _corpus(each: Mapping[str, Any], text: Text) -> dict[str, Any]:
    known = {key: each[key] for key in _OF_CORPUS if key in each}
    return {"name": text(str(each.get("name"))), **known}


def _dedup(each: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: each[key] for key in _OF_DEDUP if key in each}
    return {**known, "contaminated": sum((each.get("contaminated") or {}).values())}


def provenance(record: LineageRecord, *, run: str, step: int, checkpoint: str, journal: str) -> dict[str, Any]:
    """Where the weights come from. `checkpoint` and `journal` are SHA-256 digests."""
    attempts = [each for each in record.state.attempts.values() if each.run == run and each.versions]
    versions = dict(attempts[-1].versions or {}) if attempts else {}
    return {
        "schema": "opt-ops/provenance/1",
        "lineage": record.lineage,
        "run": run,
        "step": step,
        "checkpoint": f"sha256:{checkpoint}",
        "journal": {"entries": record.entries[-1].seq if record.entries else 0, "digest": f"sha256:{journal}"},
        "code": versions.pop("code", None),
        "versions": versions,
    }
