"""The lines of common trainers: one small parser each, and the table of them.

Formats were read in the trainers' sources (versions in docs/watch-job.md). A parser sees one clean line: no escape
codes, no label of a rank, no white space at its ends. Evaluations are no training lines, and give no reading.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from opt_ops.watch_job.bars import LightningReader, TransformersReader, is_lightning_line, is_transformers_line
from opt_ops.watch_job.reading import NUMBER, Reading, number, positive, stamp, whole

_BITS = math.log(2.0)  # nats in a bit: metaseq and fairseq print the loss in bits


class Reader(Protocol):
    """Reads the lines of one log in one format. It may hold a line back until the next ones come."""

    def take(self, line: str, source: int = 0) -> Sequence[Reading]:
        """Take in the next line; the readings that are whole now. A line of white space alone comes as empty text.

        `source` tells logs apart, where there are several.
        """
        ...

    def idle(self) -> Sequence[Reading]:
        """No line has come for a moment: the readings that need not wait any longer."""
        ...

    def end(self) -> Sequence[Reading]:
        """The log has ended: all that was held back."""
        ...


class LineReader:
    """Reads a format in which one line tells one update."""

    def __init__(self, parse: Callable[[str], Reading | None]) -> None:
        self._parse = parse

    def take(self, line: str, source: int = 0) -> Sequence[Reading]:  # noqa: ARG002
        """The reading of the line, if it is a training line."""
        found = self._parse(line)
        return (found,) if found is not None else ()

    def idle(self) -> Sequence[Reading]:
        """Nothing: no line is held back."""
        return ()

    end = idle


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format of log lines.

    Attributes:
        name: As it is said to people.
        is_training_line: Whether a line tells a training update. Recognition counts these.
        reader: Makes a reader; the argument is the number of updates between two lines (`--every`), None: not given.
        without_steps: Whether lines may have to be counted.
        remark: What people must know of this format; empty: nothing.
    """

    name: str
    is_training_line: Callable[[str], bool]
    reader: Callable[[int | None], Reader]
    without_steps: bool = False
    remark: str = ""


def _by_line(name: str, parse: Callable[[str], Reading | None], remark: str = "") -> Format:
    return Format(
        name=name,
        is_training_line=lambda line: parse(line) is not None,
        reader=lambda _: LineReader(parse),
        remark=remark,
    )


def _fields(line: str, separator: str = "|") -> dict[str, str]:
    """`a: 1 | b: 2` as a mapping, names in lower case. A field without a colon is left out."""
    pairs = (part.partition(":") for part in line.split(separator))
    return {name.strip().lower(): value.strip() for name, colon, value in pairs if colon}


# ---- Megatron-LM, Megatron-DeepSpeed

_MEGATRON = re.compile(r"(?:^|\]|\s)iteration\s+(\d{1,10})\s*/\s*(\d{1,10})\s*\|")
_NO_LOSS = ("loss scale", "validation loss", "test loss")


def megatron(line: str) -> Reading | None:
    """` [stamp] iteration 120/ 10000 | consumed samples: … | lm loss: 3.4E+00 | …`. A loss that is NaN is left out."""
    head = _MEGATRON.search(line)
    if head is None or ("elapsed time" not in line and "consumed" not in line and "loss" not in line):
        return None
    fields = _fields(line[head.end() :])
    losses = {name: value for name, value in fields.items() if "loss" in name and not name.startswith(_NO_LOSS)}
    loss = number(losses.get("lm loss", next(iter(losses.values()), None)))
    step_seconds = positive(fields.get("elapsed time per iteration (s)"))
    if step_seconds is None and (milliseconds := positive(fields.get("elapsed time per iteration (ms)"))):
        step_seconds = milliseconds / 1000
    return Reading(
        step=whole(head[1]),
        steps=whole(head[2]),
        loss=loss,
        loss_missing=loss is None,
        gnorm=number(fields.get("grad norm")),
        lr=number(fields.get("learning rate")),
        step_seconds=step_seconds,
        tokens_per_second=positive(fields.get("tokens per gpu per second (tgs)")),
        tokens=tokens(fields.get("consumed tokens")),
        batch=whole(fields.get("global batch size")),
        loss_scale=positive(fields.get("loss scale")),
        nan_updates=whole(fields.get("number of nan iterations")) or 0,
        skipped_updates=whole(fields.get("number of skipped iterations")) or 0,
        at=stamp(line[: head.start() + 1]),
    )


def tokens(text: str | None) -> int | None:
    """A count of tokens, such as `61.4M`; None if it is none."""
    value = number(text)
    return int(value) if value is not None and math.isfinite(value) and value >= 0 else None


# ---- torchtitan

_TITAN = re.compile(rf"\bstep:\s*([\d,]{{1,13}})\s+loss:\s*({NUMBER})")
_TITAN_FIELD = re.compile(rf"\b(grad_norm|tps|lr|learning_rate):\s*({NUMBER})")


def torchtitan(line: str) -> Reading | None:
    """`[titan] stamp - root - INFO - step: 120  loss:  3.41234  grad_norm:  0.8123  memory: …  tps: 4,012  …`."""
    head = _TITAN.search(line)
    if head is None or "validate" in line[: head.start()]:
        return None
    found = dict(_TITAN_FIELD.findall(line))
    return Reading(
        step=whole(head[1]),
        loss=number(head[2]),
        gnorm=number(found.get("grad_norm")),
        lr=number(found.get("lr", found.get("learning_rate"))),
        tokens_per_second=positive(found.get("tps")),
        at=stamp(line),
    )


# ---- nanoGPT, nanochat, picotron, nanotron

_NANOGPT = re.compile(rf"(?:^|\s)iter (\d{{1,10}}): loss ({NUMBER})")
_NANOGPT_FIELD = re.compile(r"\b(time|lr|grad_norm) ([\d.eE+-]{1,24}|nan|inf)(?:ms)?(?=,|\s|$)")


def nanogpt(line: str) -> Reading | None:
    """`iter 120: loss 3.4123, time 812.41ms, mfu 25.62%`. Its `step …` lines are evaluations."""
    found = _NANOGPT.search(line)
    if found is None:
        return None
    fields = dict(_NANOGPT_FIELD.findall(line[found.end() :]))
    return Reading(
        step=whole(found[1]),
        loss=number(found[2]),
        step_seconds=_seconds(fields.get("time")),
        lr=number(fields.get("lr")),
        gnorm=number(fields.get("grad_norm")),
        at=stamp(line[: found.start() + 1]),
    )


def _seconds(milliseconds: str | None) -> float | None:
    value = positive(milliseconds)
    return None if value is None else value / 1000


_NANOCHAT = re.compile(rf"(?:^|\s)step (\d{{1,10}})(?:/(\d{{1,10}}))? \([^)|]*%\) \| (?:train )?loss: ({NUMBER})")


def nanochat(line: str) -> Reading | None:
    """`step 00120/05000 (2.40%) | loss: 3.412345 | lrm: 1.00 | dt: 812.41ms | tok/sec: 645,331 | …`."""
    found = _NANOCHAT.search(line)
    if found is None:
        return None
    fields = _fields(line[found.end() :])
    return Reading(
        step=whole(found[1]),
        steps=whole(found[2]),
        loss=number(found[3]),
        gnorm=number(fields.get("grad norm")),
        step_seconds=_seconds(fields.get("dt", "").removesuffix("ms")),
        tokens_per_second=positive(fields.get("tok/sec")),
    )


_PICOTRON = re.compile(rf"\bStep: (\d{{1,10}})\s*\| Loss:\s*({NUMBER})")


def picotron(line: str) -> Reading | None:
    """`[rank 0] Step: 120   | Loss: 3.4123 | Global batch size:   1.05M | Tokens/s:  98.21K | …`."""
    found = _PICOTRON.search(line)
    if found is None:
        return None
    fields = _fields(line[found.end() :])
    return Reading(
        step=whole(found[1]),
        loss=number(found[2]),
        gnorm=number(fields.get("grad norm", fields.get("grad_norm"))),
        lr=number(fields.get("lr", fields.get("learning rate"))),
        tokens_per_second=positive(fields.get("tokens/s")),
        tokens=tokens(fields.get("tokens", "").partition("/")[0]),
    )


_NANOTRON = re.compile(rf"\biteration: ({NUMBER})\s*/\s*({NUMBER})\s*\|")


def nanotron(line: str) -> Reading | None:
    """`iteration: 120 / 10000 | consumed_tokens: 61.4M | time_per_iteration_ms: 812 | … | lm_loss: 3.41 | …`."""
    head = _NANOTRON.search(line)
    if head is None or "lm_loss:" not in line:
        return None
    fields = _fields(line[head.end() :])
    return Reading(
        step=whole(head[1]),
        steps=whole(head[2]),
        loss=number(fields.get("lm_loss")),
        gnorm=number(fields.get("grad_norm")),
        lr=number(fields.get("lr")),
        step_seconds=_seconds(fields.get("time_per_iteration_ms")),
        tokens_per_second=positive(fields.get("tokens_per_sec")),
        tokens=tokens(fields.get("consumed_tokens")),
        at=stamp(line[: head.start() + 1]),
    )


# ---- OLMo-core

_OLMO_HEAD = re.compile(r"\[step=([\d,]{1,13})(?:/([\d,]{1,13}))?(?:,[^\]]*)?\]$")
_OLMO_FIELD = re.compile(rf"^([\w/ ().-]{{1,80}})=({NUMBER})$")
_OLMO_NAMES: Mapping[str, str] = {
    "train/CE loss": "loss",
    "optim/total grad norm": "gnorm",
    "optim/LR (group 0)": "lr",
    "throughput/total tokens": "tokens",
    "throughput/device/TPS": "tokens_per_second",
}


def is_olmo_line(line: str) -> bool:
    """Whether a line of OLMo-core tells the loss of an update."""
    return line.startswith("train/CE loss=") and _OLMO_FIELD.match(line) is not None


class OlmoReader:
    """`[step=120/10000,epoch=1,eta=1h02m]`, then one line for each measure. The next head, or silence, ends a block."""

    def __init__(self) -> None:
        self._block: Reading | None = None
        self._quiet = 0

    def take(self, line: str, source: int = 0) -> Sequence[Reading]:  # noqa: ARG002
        """Take in a line. A head ends the block before it."""
        self._quiet = 0
        if head := _OLMO_HEAD.search(line):
            done = self.end()
            self._block = Reading(step=whole(head[1]), steps=whole(head[2]), at=stamp(line[: head.start()]))
            return done
        found = _OLMO_FIELD.match(line) if self._block is not None else None
        name = _OLMO_NAMES.get(found[1]) if found else None
        if self._block is not None and found is not None and name is not None:
            value = tokens(found[2]) if name == "tokens" else number(found[2])
            self._block = replace(self._block, **{name: value})
        return ()

    def idle(self) -> Sequence[Reading]:
        """The block, once no line of it has come for a whole turn."""
        self._quiet += 1
        return self.end() if self._quiet >= 2 else ()

    def end(self) -> Sequence[Reading]:
        """The block, if it tells a loss: other measures come more often."""
        block, self._block = self._block, None
        return (block,) if block is not None and block.loss is not None else ()


# ---- metaseq, fairseq

_METASEQ = re.compile(r"\|\s*train_inner\s*\|\s*(\{.*\})")


def metaseq(line: str) -> Reading | None:
    """A stamp, `| train_inner |`, then JSON whose numbers are text. Its loss is in bits."""
    found = _METASEQ.search(line)
    if found is None:
        return None
    try:
        record: Any = json.loads(found[1])
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "loss" not in record or "num_updates" not in record:
        return None
    fields = {str(name): str(value) for name, value in record.items()}
    loss, updates_per_second = number(fields["loss"]), positive(fields.get("ups"))
    return Reading(
        step=whole(fields["num_updates"]),
        loss=None if loss is None else loss * _BITS,
        gnorm=number(fields.get("gnorm")),
        lr=number(fields.get("lr")),
        tokens_per_second=positive(fields.get("wps")),
        step_seconds=1 / updates_per_second if updates_per_second else None,
        batch=whole(fields.get("bsz")),
        loss_scale=positive(fields.get("loss_scale")),
        at=stamp(line[: found.start()]),
    )


FORMATS: tuple[Format, ...] = (
    Format(
        name="transformers",
        is_training_line=is_transformers_line,
        reader=TransformersReader,
        without_steps=True,
        remark="each loss is a mean since the line before, and the Trainer replaces a NaN by that mean unless "
        "logging_nan_inf_filter is off",
    ),
    _by_line("Megatron-LM", megatron),
    _by_line("torchtitan", torchtitan),
    Format(name="Lightning", is_training_line=is_lightning_line, reader=LightningReader),
    _by_line("nanoGPT", nanogpt),
    _by_line("nanochat", nanochat, "the loss is smoothed: a spike is lower and later than it was"),
    _by_line("picotron", picotron),
    _by_line("nanotron", nanotron, "the loss has three digits, so a change below 0.01 is not seen"),
    Format(name="OLMo-core", is_training_line=is_olmo_line, reader=lambda _: OlmoReader()),
    _by_line("metaseq", metaseq, "the loss is in bits in the log, and in nats here"),
)
"""All formats that are recognised. Where two match equally often, the first one counts."""
