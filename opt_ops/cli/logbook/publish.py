"""What `opt-ops logbook publish` does: asks what must be asked, publishes, and says what was replaced."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from chronicles.publish.publish import Publication, Published, unredacted
from chronicles.publish.redact import Wishes
from chronicles.record import load
from opt_ops.cli.shared.options import settings
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.cli.shared.requests import confirm
from opt_ops.config import Config
from opt_ops.errors import UsageError

_KEEP = ("nodes", "people", "jobs")
_DAY = 24 * 3600.0
_SITE_NAMES = ("reservation", "comment", "wckey", "mail-user", "mail_user", "nodelist", "exclude")
"""Options of sbatch whose values name something of the site."""

_WORDS = {"pci": ("PCI address", "PCI addresses"), "people": ("person", "people"), "gpus": ("GPU", "GPUs")}
_WORDS |= {"addresses": ("address", "addresses"), "uuids": ("UUID", "UUIDs"), "urls": ("URL", "URLs")}
_WORDS |= {"environment": ("environment value", "environment values"), "emails": ("e-mail address", "e-mail addresses")}
_WORDS |= {"own": ("text of --replace", "texts of --replace")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says about the redaction."""

    redact: bool
    keep: str
    with_notes: bool
    replace: tuple[str, ...]
    shift_days: int


def publish_logbook(
    folder: Path, to: Path, options: Options, *, yes: bool, dry_run: bool, output: Format, quiet: bool
) -> None:
    """Publish the logbook of the lineage in `folder` to the folder `to`.

    Raises:
        UsageError: an option means nothing, or `to` lies where the table of replacements does.
        Refused: it was not confirmed that names are to be seen.
        OptOpsError: something that should have been replaced is in a file.
    """
    if to.resolve().is_relative_to(folder.resolve()):
        why = f"--to {to} lies in the lineage's own folder, where the logbook and the table of replacements are"
        raise UsageError(why, "name a folder outside of it")
    config, record = settings.config, load(folder)
    wishes = Wishes(keep=_kept(options.keep), with_notes=options.with_notes, shift_seconds=options.shift_days * _DAY)
    publication = Publication(folder, record, wishes, site_names(config), [_rule(each) for each in options.replace])
    found = publication.summary()
    if dry_run:
        said = "Would show" if not options.redact else "Would replace"
    elif options.redact:
        found, said = publication.write(to, config.ledger), "Replaced"
    else:
        confirm(f"Without --redact, {to} shows {_sentence(found.replaced)}{_words(found, 'and the words of')}.", yes)
        found, said = unredacted(record, to, config.ledger), ""
    if output in (Format.JSON, Format.JSONL):
        show("opt-ops/published/1", [found.row()], [Column("FILES", "files")], output)
        return
    for file in found.files:
        print(file)
    if said:
        say(f"{said}: {_sentence(found.replaced)}{_words(found, 'left out:')}.", quiet)


def _kept(text: str) -> frozenset[str]:
    kept = frozenset(filter(None, (each.strip() for each in text.split(","))))
    unknown = sorted(kept - set(_KEEP))
    if unknown:
        raise UsageError(f"--keep {unknown[0]}: only {', '.join(_KEEP)} may be kept", "for example --keep nodes,jobs")
    return kept


def _rule(text: str) -> tuple[re.Pattern[str], str]:
    pattern, equals, instead = text.rpartition("=")
    try:
        if equals and pattern and not re.compile(pattern).match(""):
            return re.compile(pattern), instead
        why = "REGEX=TEXT is needed, and REGEX must match something"
    except re.error as error:
        why = str(error)
    raise UsageError(f"--replace {text}: {why}", "for example --replace 'Falcon[ -]?2=the cluster'")


def site_names(config: Config) -> Iterator[tuple[str, str]]:
    """What the configuration names of the site: (sort, original)."""
    slurm = config.slurm
    yield from (("partitions", each) for each in (slurm.partition or "").split(",") if each)
    yield from (("accounts", each) for each in (slurm.account, slurm.qos, config.group) if each)
    for name in _SITE_NAMES:
        if isinstance(value := slurm.additional.get(name), str):
            yield "accounts", value
    yield from (("environment", name) for name in config.trainer.environment)
    yield from (("environment", value) for value in config.trainer.environment.values() if len(value) > 3)
    addresses = (config.mlflow.tracking_uri, config.trainer.checkpoint_copy, config.alerts.heartbeat_url)
    yield from (("urls", each) for each in (*addresses, *config.alerts.urls) if each)
    yield "paths", str(config.runs.absolute())


def _sentence(replaced: Mapping[str, int]) -> str:
    """`142 nodes, 3 people, 11 paths, 2 addresses`."""
    return ", ".join(f"{number} {_noun(sort, number)}" for sort, number in replaced.items()) or "nothing"


def _words(found: Published, verb: str) -> str:
    return f"; {verb} {_sentence(found.left_out)}" if found.left_out else ""


def _noun(sort: str, number: int) -> str:
    one, several = _WORDS.get(sort, (sort.removesuffix("s"), sort))
    return one if number == 1 else several
