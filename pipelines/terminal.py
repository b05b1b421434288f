"""The terminal that every command writes to, and the option that most of them share."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from graftwork.errors import one_line

# Piped into a file or another program, tables are not folded to the 80 columns of a terminal that is not there.
WIDTH = None if sys.stdout.isatty() else 160
console = Console(width=WIDTH)
errors = Console(stderr=True)
Output = Annotated[
    Path, typer.Option("--output", help="Folder for runs, and for MLflow where MLFLOW_TRACKING_URI is not set.")
]


def fail(message: str, status: int = 2) -> NoReturn:
    errors.print(f"[red]graftwork: {escape(one_line(message, 1000))}[/]", soft_wrap=True, highlight=False)
    sys.exit(status)
