"""``graftwork data``: looking at data on the command line, without a run."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from graftwork.dataset import Dataset, difference, open_dataset
from graftwork.errors import UserError, one_line
from graftwork.modality import name_of
from graftwork.settings import IngestSettings, ValidateSettings, parse
from graftwork.sources.record import NOUNS, DataSource, local_path
from graftwork.validate import Validation, validate

SHOWN_KINDS = 8  # of what was passed over


class NotPackedError(UserError):
    """The data turned out to be of no use, or there is no room for them."""


def inspect(parameters: dict[str, Any], source: DataSource, folder: Path, console: Console) -> Validation:
    """Pack the data of ``source`` into ``folder`` and validate it.

    Raises:
        NotPackedError: that failed. UserError: what was asked is wrong.
    """
    from graftwork import drift
    from graftwork.ingest import ingest

    settings = {model: {k: parameters[k] for k in model.model_fields} for model in (IngestSettings, ValidateSettings)}
    chosen = parse(ValidateSettings, settings[ValidateSettings])
    reference = None if chosen.reference in ("", "none") else drift.read_profile(chosen.reference)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        packing = parse(IngestSettings, settings[IngestSettings])
        try:
            ingest(packing, folder, lambda done, total: bar.update(task, completed=done, total=total), source)
        except UserError as error:
            raise NotPackedError(str(error)) from None
        except OSError as error:
            reason = one_line(error.strerror or error, 120)
            raise NotPackedError(
                f"{one_line(folder)}: cannot be written ({reason}); free some space, or give another folder with --keep"
            ) from None
        bar.update(task, description="validating", completed=0, total=None)
        return validate(open_dataset(folder), chosen, reference)


def place_to_keep(folder: Path) -> Path:
    """Return where a dataset may be kept: it takes the place of an older dataset, and of nothing else.

    Raises:
        UserError: something else is there.
    """
    try:
        folder = folder.expanduser().resolve()
        taken = folder.exists() and not (folder / "dataset.json").is_file()
        if taken and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(
                f"--keep {one_line(folder)}: is there already, and is no dataset; give a folder that is new"
            )
    except (OSError, RuntimeError, ValueError) as error:  # no such user, links that lead round, what no path can be
        reason = one_line(getattr(error, "strerror", None) or error, 120)
        raise UserError(f"--keep {one_line(folder)}: cannot be written ({reason}); give another folder") from None
    return folder


def print_findings(summary: dict[str, Any], console: Console) -> None:
    """Print what failed, the worst first, and the counts."""
    counts = summary["counts"]
    by_split = {split: sum(by_class.values()) for split, by_class in summary["classes"].items()}
    console.print(
        f"{sum(by_split.values()):,} {NOUNS[name_of(summary)]} ({', '.join(f'{n:,} {split}' for split, n in by_split.items())}), "
        f"{len(summary['classes']['train'])} classes, digest {summary['digest']}",
        highlight=False,
        soft_wrap=True,
    )
    if summary["skipped"]:
        kinds = sorted(summary["skipped"].items(), key=lambda kind: -kind[1])
        shown = [f"{count:,} × {kind}" for kind, count in kinds[:SHOWN_KINDS]] + ["others"] * (len(kinds) > SHOWN_KINDS)
        console.print(f"passed over: {escape(one_line(', '.join(shown)))}", highlight=False, soft_wrap=True)
    for severity, style in (("critical", "red"), ("warning", "yellow")):
        for rule in summary["rules"]:
            if not rule["passed"] and rule["severity"] == severity:
                console.print(f"[{style}]{severity}[/]  {escape(rule['message'])}", highlight=False, soft_wrap=True)
    passed = sum(rule["passed"] for rule in summary["rules"])
    verdict = "[red]not good to train on[/]" if counts["critical"] else "[green]good to train on[/]"
    console.print(
        f"{verdict}: {passed} of {counts['rules']} rules passed, {counts['critical']} critical, {counts['warnings']} warnings",
        highlight=False,
    )


def find_dataset(name: str, output: Path) -> Dataset:
    """Open the dataset that ``name`` means: a Dataset folder, or the folder or id of a run.

    Raises:
        UserError: there is none.
    """
    for path in (local_path(name), output / name):
        if (path / "dataset.json").is_file():
            return open_dataset(path)
        summary = path / "summary.json"
        if summary.is_file():
            try:
                return open_dataset(json.loads(summary.read_text(encoding="utf-8"))["files"]["dataset"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"run {one_line(path)}: its summary.json tells of no dataset") from None
    raise UserError(
        f"dataset {one_line(name)}: there is no Dataset folder and no finished run of that name; "
        "give one, as 'graftwork data inspect URI --keep FOLDER' makes it"
    )


def print_difference(before: Dataset, after: Dataset, console: Console) -> bool:
    """Print what changed, by class and split; return whether nothing did."""
    console.print(
        f"A  {escape(one_line(before.info['name']))}  {len(before.manifest):,} {NOUNS[name_of(before.info)]}  {before.digest}\n"
        f"B  {escape(one_line(after.info['name']))}  {len(after.manifest):,} {NOUNS[name_of(after.info)]}  {after.digest}",
        highlight=False,
        soft_wrap=True,
    )
    if before.digest == after.digest:
        console.print("The same contents, labels and splits.")
        return True
    found = difference(before, after)
    table = Table(box=None, pad_edge=False)
    for heading in ("class", "split"):
        table.add_column(heading)
    moves = ("from other splits", "to other splits", "from other classes", "to other classes")
    for heading in ("A", "B", "added", "removed", *moves):
        table.add_column(heading, justify="right")
    for row in found["rows"]:
        counts = [f"{row[k]:,}" if row[k] or k in ("before", "after") else "" for k in list(row)[2:]]
        table.add_row(escape(one_line(row["label"], 40)), row["split"], *counts)
    console.print(table)
    total = found["total"]
    classes = [f"+{one_line(c, 40)}" for c in found["classes_added"]] + [
        f"-{one_line(c, 40)}" for c in found["classes_removed"]
    ]
    console.print(
        f"{total['added']:,} added, {total['removed']:,} removed, {total['moved']:,} moved to another split, "
        f"{total['relabelled']:,} with another label, {total['kept']:,} as they were"
        + (f"; classes: {escape(', '.join(classes))}" if classes else ""),
        highlight=False,
        soft_wrap=True,
    )
    return False
