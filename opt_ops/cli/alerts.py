"""`opt-ops alerts …`: test the delivery of alerts."""

from __future__ import annotations

import socket
import time

import typer

from opt_ops.cli.shared.options import FormatOption, QuietOption, settings
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.core.text import clock
from opt_ops.core.values import Severity
from opt_ops.errors import UsageError
from opt_ops.ports import Alert

app = typer.Typer(no_args_is_help=True, help="Test the delivery of alerts.")


@app.command("test")
def try_urls(output: FormatOption = Format.TABLE, quiet: QuietOption = False) -> None:
    """Send a test alert to every URL of [alerts].

    `least` does not matter. The exit code is 1 if a URL failed.

    Example: opt-ops alerts test
    """
    from opt_ops.adapters.notify import deliver

    config = settings.config
    if not config.alerts.urls:
        raise UsageError(
            "the configuration has no URLs in [alerts]",
            'add urls = ["https://…"] under [alerts] in opt-ops.toml, then opt-ops alerts test',
        )
    now, host = time.time(), socket.gethostname()
    body = f"A test alert of opt-ops alerts test, sent from {host} at {clock(now)} for {config.runs}. Nothing is wrong."
    alert = Alert(id=f"test-{host}-{now:.0f}", severity=Severity.INFO, title="test alert of opt-ops", body=body)
    deliveries = deliver(alert, config.alerts.urls)
    rows = [{"url": done.url, "ok": not done.why, "why": done.why or None} for done in deliveries]
    columns = [Column("URL", "url"), Column("OK", "ok"), Column("WHY", "why")]
    show("opt-ops/alerts-test/1", rows, columns, output)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)
    say("  next: check that it arrived", quiet)
