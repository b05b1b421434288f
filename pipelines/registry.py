"""``graftwork promote``, ``rollback`` and ``history``: the registry, by hand."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from graftwork.errors import one_line
from graftwork.pipelines.terminal import Output, console, mlflow_at

Name = Annotated[str, typer.Argument(help="Name in the model registry.", metavar="NAME")]


def promote(
    name: Name,
    version: Annotated[int, typer.Argument(help="Number of the version.", min=1)],
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the history.")],
    output: Output = Path("runs"),
) -> None:
    """Make a version champion, whatever the gate said."""
    from graftwork import registry

    with mlflow_at(output) as client:
        former = registry.promote(client, name, str(version), reason)
    say(f"{name}: version {version} is champion" + (f"; version {former} is kept as previous" if former else ""))


def rollback(name: Name, output: Output = Path("runs")) -> None:
    """Give the title back to the champion before this one. The gate will not promote the version taken out again; twice returns."""
    from graftwork import registry

    with mlflow_at(output) as client:
        out, back = registry.rollback(client, name)
    say(f"{name}: version {back} is champion again; version {out} is kept as previous")


def history(name: Name, output: Output = Path("runs")) -> None:
    """List the versions of a model, the newest first, with what became of each and why."""
    from graftwork import registry

    with mlflow_at(output) as client:
        rows = registry.history(client, name)
    table = Table(box=None, pad_edge=False)
    for heading in ("version", "made", "aliases", "candidate", "backbone", "test accuracy", "state", "why"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("version", "made", "state"))
    for row in rows:
        table.add_row(
            str(row["version"]),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"] / 1000)),
            escape(", ".join(row["aliases"])),
            escape(row["candidate"]),
            escape(row["backbone"]),
            f"{float(row['accuracy']):.4f}" if row["accuracy"] else "",
            row["state"],
            escape(one_line(row["reason"], 400)),
        )
    console.print(table)


def say(text: str) -> None:
    console.print(escape(one_line(text, 500)), highlight=False, soft_wrap=True)
