"""Reads a line of telemetry.jsonl. A module of its own: commands that only read telemetry import nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opt_ops.core.detect.point import Busy, ChecksumComparison, Point
from opt_ops.runfolder import fields as f
from opt_ops.runfolder.files import Tail

LARGEST_TELEMETRY = 1024 * 1024 * 1024
"""Bytes of an attempt's telemetry that are read at most; of a larger file, the last ones. A million steps have less."""

_FACTOR = f.number(0.0)
_CORPORA = 256
_BLOCKS = _LAYERS = 4096


def point_of(line: Mapping[str, Any], left_out: list[str] | None = None) -> Point:
    """Return a line of telemetry as a point. The reasons for the fields that are left out are added to `left_out`.

    A loss or a gradient norm that is not finite, however it is spelled, makes the point one that is not finite. A
    gradient norm of `null` with `finite: true` is one that the trainer does not have.

    Raises:
        BadField: the line lacks what every line must have, or it is of another type.
    """
    record = f.Record(line, left_out=left_out)
    loss = record.required("loss", f.maybe_not_finite)
    gnorm = record.optional("gnorm", f.maybe_not_finite, None)
    skip = record.optional("skip", f.text(f.LONGEST_NAME), None)
    written = line.get("gnorm") is not None and not any(why.startswith("`gnorm`") for why in record.left_out)
    finite = record.optional("finite", f.flag, True)
    # fp16 reports a gradient norm that is not finite at each overflow, and skips the update.
    blocks = record.part("blocks")
    finite = finite and loss is not None and not (written and gnorm is None and skip is None)
    return Point(
        step=record.required("num_updates", f.step),
        ts=record.required("ts", f.moment),
        loss=loss,
        gnorm=gnorm,
        lr=0.0 if line.get("lr", "") is None else record.required("lr", _FACTOR),  # null: not known, as 0 is
        betas=record.nullable("betas", f.items(f.number(), 16), ()),
        weight_decay=record.nullable("weight_decay", f.number(), 0.0),
        clip_norm=record.nullable("clip_norm", f.number(), 0.0),
        step_seconds=record.optional("step_seconds", f.seconds, 0.0),
        tokens=record.optional("tokens", f.whole(0), 0),
        wps=record.optional("wps", _FACTOR, 0.0),
        finite=finite,
        save_seconds=record.optional("save_seconds", f.seconds, 0.0),
        save_error=record.optional("save_error", f.text(), None),
        loss_scale=record.optional("loss_scale", _FACTOR, None),
        skip=skip,
        bad_module=record.optional("bad_module", f.text(), None),
        actv_norm=record.optional("actv_norm", _FACTOR, None),
        busy=_busy(record.part("busy_seconds")),
        checksums=_comparison(record.part("checksums")),
        valid=_losses(record.part("valid")),
        batch=record.optional("bsz", f.whole(1), None),
        batch_tokens=record.optional("wpb", f.whole(1), None),
        stage=record.optional("stage", f.text(f.LONGEST_NAME), None),
        data_position=record.optional("data_position", f.whole(0), None),
        block_gnorms=_norms(blocks, "gnorm"),
        block_pnorms=_norms(blocks, "pnorm"),
        block_unorms=_norms(blocks, "unorm"),
        base_lr=record.optional("base_lr", _FACTOR, None),
        attn_logits=record.optional("attn_logit_max", f.items(f.number(), _LAYERS), None),
    )


def points(
    path: Path, last_bytes: int | None = None, on_bad: Callable[[int, str], None] = lambda _, __: None
) -> Iterator[Point]:
    """Yield the points of a telemetry file, for a reader that reads it once. Lines that are left out are skipped.

    With `last_bytes`, only those at the end of the file are read. A file that cannot be read has no points. `on_bad`
    gets the number of each line that is left out, and the reason.
    """
    tail = Tail(path, most=LARGEST_TELEMETRY, on_bad=on_bad)
    try:
        if last_bytes is not None:
            tail.skip_to_last(last_bytes)
        for line in tail.read():
            try:
                yield point_of(line)
            except f.BadField as error:
                on_bad(tail.line, str(error))
    except OSError:
        return


def _busy(record: f.Record | None) -> Busy | None:
    if record is None:
        return None
    found = (record.optional("median", f.seconds, None), record.optional("max", f.seconds, None))
    rank = record.optional("rank", f.rank, None)
    if found[0] is None or found[1] is None or rank is None:
        return None
    return Busy(median=found[0], max=found[1], rank=rank)


def _comparison(record: f.Record | None) -> ChecksumComparison | None:
    """None if it is not known which ranks are corrupt: an empty list would say that all of them agree."""
    if record is None or (ranks := record.optional("ranks", f.items(f.rank), None)) is None:
        return None
    certain = record.optional("certain", f.flag, True)
    return ChecksumComparison(ranks=ranks, certain=certain, what=record.optional("what", f.text(), ""))


def _norms(blocks: f.Record | None, kind: str) -> dict[str, float] | None:
    """The norms of one kind by block; None if the line has none."""
    record = None if blocks is None else blocks.part(kind)
    return None if record is None else dict(record.all(_FACTOR, _BLOCKS))


def _losses(record: f.Record | None) -> dict[str, float | None] | None:
    return None if record is None else dict(record.all(f.maybe_not_finite, _CORPORA))
