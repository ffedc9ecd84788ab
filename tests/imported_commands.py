"""Imports what the commands import, for the process that tests fork them from."""

import typer.main
import typer.rich_utils

from opt_ops.cli import app

typer.main.get_command(app)
