"""What `opt-ops ckpt release` does: weights, model card, data statement, provenance, logbook and sums in one folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from chronicles.publish.publish import Publication
from chronicles.publish.redact import Wishes
from chronicles.record import LineageRecord, load
from chronicles.release import card, statement
from chronicles.report.model import LineageReport
from opt_ops.cli.ckpt import checkpoints
from opt_ops.cli.ckpt.checkpoints import Named
from opt_ops.cli.ckpt.conversions import converted
from opt_ops.cli.logbook.publish import site_names
from opt_ops.cli.shared.options import settings
from opt_ops.cli.shared.output import say
from opt_ops.contract.files import sha256, sync_folder
from opt_ops.errors import OptOpsError, Refused, UsageError
from opt_ops.runfolder.files import write_text

SUMS = "SHA256SUMS"
_APACHE = "apache-2.0"


def release(
    text: str, out: Path, licence: str, dtype: str, name: str, *, with_notes: bool, anyway: bool, quiet: bool
) -> dict[str, Any]:
    """Write the folder `out`; it appears whole. Returns the item of `opt-ops/ckpt-release/1`.

    Raises:
        UsageError: an option means nothing.
        NotFound: there is no such checkpoint.
        Refused: `out` exists, or the checkpoint does not count.
        Exit: 65, the checkpoint is damaged.
        OptOpsError: it could not be converted, or a name of the site would have been published.
    """
    if out.exists():
        raise Refused(f"{out} exists already and is not overwritten", "name another folder")
    identifier, words = _licence(licence)
    chosen = checkpoints.named(text)
    if not chosen.counts and not anyway:
        why = f"the checkpoint of step {chosen.checkpoint.step} of {chosen.checkpoint.run} was discarded by a rollback"
        raise Refused(why, f"opt-ops ckpt list {chosen.lineage.name}; --anyway releases it all the same")
    checkpoints.require_sound(chosen)
    model = name or out.name
    if not card.is_name(model):
        raise UsageError(f"--name {model}: letters, digits, dots, hyphens and underscores are wanted")
    weights = converted(chosen, settings.config.trainer, dtype, lambda line: say(f"  {line}", quiet))
    out.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        shutil.copytree(weights, hidden, dirs_exist_ok=True)
        about = card.Released(
            name=model,
            run=chosen.checkpoint.run,
            step=chosen.checkpoint.step,
            dtype=dtype,
            licence=identifier,
            digest=chosen.digest,
        )
        _publish(chosen, hidden, about, with_notes=with_notes)
        write_text(hidden / "LICENSE", words)
        write_text(hidden / SUMS, "".join(f"{sha256(file)}  {file.relative_to(hidden)}\n" for file in _files(hidden)))
        for file in _files(hidden):
            file.chmod(0o644)  # safetensors writes weights for their owner alone
        hidden.chmod(0o755)
        sync_folder(hidden)
        hidden.rename(out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    found = list(_files(out))
    return {
        "out": str(out),
        "files": len(found),
        "bytes": sum(file.stat().st_size for file in found),
        "digest": f"sha256:{sha256(out / SUMS)}",
        "licence": identifier,
    }


def _publish(chosen: Named, into: Path, about: card.Released, *, with_notes: bool) -> None:
    """The redacted logbook, and everything else that is told about the model."""
    config, record = settings.config, load(chosen.lineage.path)
    publication = Publication(chosen.lineage.path, record, Wishes(with_notes=with_notes), site_names(config))
    journal = _journal_digest(chosen.lineage.path)

    def more(redacted: LineageRecord, report: LineageReport) -> Mapping[str, str]:
        origin = statement.provenance(
            redacted, run=about.run, step=about.step, checkpoint=chosen.digest, journal=journal
        )
        return {
            "README.md": card.card(redacted, report, about),
            "data.json": _json(statement.data(chosen.config, publication.text, chosen.checkpoint.step)),
            "provenance.json": _json(origin),
        }

    publication.write(into, config.ledger, more)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _journal_digest(lineage: Path) -> str:
    """SHA-256 over all segments of the journal, in order."""
    found = hashlib.sha256()
    for file in sorted((lineage / "journal").glob("*.jsonl")):
        found.update(file.read_bytes())
    return found.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SUMS)


def _licence(text: str) -> tuple[str, str]:
    """Its identifier for hubs, and its words."""
    if text == _APACHE:
        return _APACHE, _apache()
    file = Path(text)
    if file.is_file():
        return "other", file.read_text(encoding="utf-8")
    if text == "opt-175b":
        raise UsageError(
            "--licence opt-175b: its text is not shipped with opt-ops",
            "name a file with it: metaseq has it as projects/OPT/MODEL_LICENSE.md",
        )
    raise UsageError(f"--licence {text}: neither {_APACHE} nor a file", f"for example --licence {_APACHE}")


def _apache() -> str:
    """The text of the Apache License, which is also that of opt-ops."""
    near = Path(__file__).parents[2] / "LICENSE"
    if near.is_file():
        return near.read_text(encoding="utf-8")
    try:
        return next(each for each in files("opt-ops") or () if each.name == "LICENSE").read_text(encoding="utf-8")
    except (PackageNotFoundError, StopIteration) as error:
        raise OptOpsError("the text of the Apache License is not installed", "--licence FILE names one") from error
