"""What `opt-ops ckpt serve` does: verify, convert, start an engine, and answer until a signal comes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

from opt_ops.cli.ckpt import checkpoints
from opt_ops.cli.ckpt.checkpoints import Named
from opt_ops.cli.ckpt.conversions import converted
from opt_ops.cli.ckpt.engine_programs import engine_program, require_head_size
from opt_ops.cli.shared.options import settings
from opt_ops.cli.shared.output import Column, Format, say, show, signs_of_life
from opt_ops.config import Config
from opt_ops.errors import OptOpsError, Refused, Unavailable, UsageError
from opt_ops.runfolder.files import read_json
from opt_ops.serving.engine import Engine, TokenCounter
from opt_ops.serving.keys import DEFAULTS, Model
from opt_ops.serving.listener import Listener
from opt_ops.serving.page import Page
from opt_ops.serving.proxy import Handler

TOKEN = "OPT_OPS_SERVE_TOKEN"  # noqa: S105  (the name of a variable)
_DISCARDED = "A rollback discarded this checkpoint: its steps are not part of the present weights."


def serve(text: str, kind: str | None, host: str, port: int, output: Format, *, quiet: bool) -> None:
    """Serve the checkpoint that `text` names, until SIGINT or SIGTERM.

    Raises:
        UsageError: an option means nothing, or the engine is not installed, or cannot compute this model.
        NotFound: there is no such checkpoint.
        Refused: the port is in use.
        Exit: 65, the checkpoint is damaged.
        OptOpsError: it could not be converted, or the engine ended.
    """
    config = settings.config
    kind = kind or ("vllm" if config.serve.vllm else "transformers")
    program = engine_program(kind, config.serve)
    chosen = checkpoints.named(text)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _listener(host, port) as listener:
        with signs_of_life("reading the checkpoint", quiet=quiet):
            checkpoints.require_sound(chosen)
        if not chosen.counts:
            say(_DISCARDED, quiet)
        dtype = _dtype(chosen)
        folder = converted(chosen, config.trainer, dtype, lambda line: say(f"  {line}", quiet))
        about = _about(folder)
        model = Model(
            name=f"{chosen.checkpoint.run}/{chosen.checkpoint.step}",
            positions=about["max_position_embeddings"],
            vocabulary=about["vocab_size"],
        )
        if kind == "vllm":
            require_head_size(program, about["hidden_size"] // about["num_attention_heads"])
        with _engine(kind, program, folder, model, dtype, quiet=quiet) as engine, _counter(config, folder) as count:
            item = _describe(listener, engine, chosen, model)
            listener.engine, listener.count = engine, count
            listener.server_activate()
            Thread(target=listener.serve_forever, daemon=True).start()
            _tell(item, output, quiet=quiet)
            with suppress(KeyboardInterrupt):
                engine.wait()


@contextmanager
def _listener(host: str, port: int) -> Iterator[Listener]:
    """The address, held but not listening yet."""
    token = os.environ.get(TOKEN, "")
    try:
        listener = Listener(host, port, Handler, token)
    except OSError as error:
        raise Refused(f"{host}:{port}: {error.strerror}", "--port 0 takes any free one") from error
    with listener:
        if not (token or listener.is_loopback):
            why = f"--host {host}: other machines could send requests"
            raise UsageError(why, f"set {TOKEN} to a secret that requests must show, or leave --host out")
        yield listener


def _dtype(chosen: Named) -> str:
    """The number format in which the run computed; fp16, in which OPT was released, if that is not known."""
    found = ((chosen.config or {}).get("settings") or {}).get("precision")
    return found if found in ("fp32", "fp16", "bf16") else "fp16"


def _about(folder: Path) -> dict[str, Any]:
    """The configuration of the converted model."""
    about = read_json(folder / "config.json")
    if not isinstance(about, dict):
        raise OptOpsError(
            f"{folder / 'config.json'} cannot be read", f"rm -r {folder}; the next command converts again"
        )
    return about


@contextmanager
def _engine(kind: str, program: str, folder: Path, model: Model, dtype: str, *, quiet: bool) -> Iterator[Engine]:
    """An engine that has answered. If it ends, its last lines are printed, and its log stays."""
    scratch, failed = Path(tempfile.mkdtemp(prefix="opt-ops-serve-")), False
    engine = Engine(kind, program, folder, model, dtype, scratch / "engine.log")
    try:
        say(f"Starting {kind}; its log is {engine.log}", quiet)
        with signs_of_life("waiting for its first answer", quiet=quiet):
            engine.wait_ready()
        yield engine
    except OptOpsError:
        failed = True
        for line in engine.last_lines():
            say(f"  {line}")
        raise
    finally:
        engine.close()
        if not failed:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _counter(config: Config, folder: Path) -> Iterator[TokenCounter]:
    if config.trainer.python is None:
        raise Unavailable(
            f"the trainer {' '.join(config.trainer.command)} counts no tokens: only `python -m trainer` does",
            "set [trainer] command to the trainer of opt-ops, in a configuration for serving",
        )
    counter = TokenCounter(config.trainer.python, config.trainer.environment, folder / "tokenizer.json")
    try:
        counter([""])
        yield counter
    finally:
        counter.close()


def _describe(listener: Listener, engine: Engine, chosen: Named, model: Model) -> dict[str, Any]:
    """Tell page and `/v1/models` what is served. Returns the item of `opt-ops/ckpt-serve/1`."""
    item = {
        "url": listener.url,
        "engine": engine.kind,
        "run": chosen.checkpoint.run,
        "step": chosen.checkpoint.step,
        "digest": f"sha256:{chosen.digest}",
        "pid": os.getpid(),
    }
    about = {key: item[key] for key in ("engine", "run", "step")}
    listener.about = {
        "id": model.name,
        "object": "model",
        "owned_by": "opt-ops",
        **about,
        "digest": item["digest"],
        "counts": chosen.counts,
        "max_model_len": model.positions,
    }
    listener.page = Page(
        {
            **about,
            "name": model.name,
            "positions": model.positions,
            "tokens": min(4 * DEFAULTS["max_tokens"], model.positions // 2),
            "remark": "" if chosen.counts else _DISCARDED,
            "token_needed": bool(listener.token),
        }
    )
    return item


def _tell(item: dict[str, Any], output: Format, *, quiet: bool) -> None:
    if output in (Format.JSON, Format.JSONL):
        show("opt-ops/ckpt-serve/1", [item], [Column("URL", "url")], output)
    else:
        print(item["url"])
    sys.stdout.flush()
    say("  Ctrl-C ends it", quiet)
