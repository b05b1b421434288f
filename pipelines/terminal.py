"""The terminal that every command writes to, and what most of them share: the option, and the way to MLflow."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from graftwork.errors import UserError, one_line
from graftwork.tracking import quiet_mlflow, shown_uri, sqlite_file, tracking_uri

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


@contextlib.contextmanager
def mlflow_at(output: Path) -> Iterator[Any]:
    """Yield a client of the MLflow that this output folder, or the environment, names; what goes wrong with it is one line."""
    uri = tracking_uri(output)
    database = sqlite_file(uri)
    if database and not database.is_file():
        raise UserError(
            f"MLflow: there is none at {shown_uri(uri)}; run 'graftwork run' first, give its folder with --output, or set MLFLOW_TRACKING_URI"
        )
    quiet_mlflow()
    from mlflow import MlflowClient

    from graftwork.registry import answering

    with answering(uri):
        yield MlflowClient(uri, uri)
