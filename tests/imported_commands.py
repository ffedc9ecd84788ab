"""Imports what the commands import, for the process that tests fork them from; also what many import when they run."""

import importlib

import typer.main
import typer.rich_utils

from opt_ops.cli import app

for _name in ("chronicles.ledger.total", "chronicles.logbook.render", "opt_ops.laboratory.playbook_trial"):
    importlib.import_module(_name)

typer.main.get_command(app)
