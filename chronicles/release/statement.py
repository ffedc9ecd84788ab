"""What a released model was trained on, and where it comes from, for programs. No text and no path of the site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chronicles.record import LineageRecord

_OF_CORPUS = ("share", "tokens", "documents", "digest", "corrupt_lines")
_OF_DEDUP = ("engine", "threshold", "shingle", "documents_in", "documents_out", "removed", "digest")

Text = Callable[[str], str]


def data(config: Mapping[str, Any] | None, text: Text) -> dict[str, Any]:
    """The data statement.

    Args:
        config: config.json of the attempt that wrote the checkpoint; None if it is gone.
        text: redacts a text.
    """
    told: Mapping[str, Any] = (config or {}).get("data") or {}
    return {
        "schema": "opt-ops/data-statement/1",
        "known": bool(told),
        "digest": told.get("digest"),
        "tokens": told.get("tokens"),
        "tokenizer": told.get("tokenizer"),
        "corpora": [_corpus(each, text) for each in told.get("corpora") or ()],
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
