"""``graftwork predict`` and ``graftwork export``."""

import contextlib
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from graftwork.errors import UserError, one_line
from graftwork.pipelines.terminal import Output, console, errors
from graftwork.tracking import tracking_uri

if TYPE_CHECKING:
    from graftwork.predicting import Rows

PREDICT_EXAMPLES = """[bold]Examples[/]

graftwork predict models:/flowers@champion photo.jpg

graftwork predict my-model/ photos/ s3://bucket/photos list.csv --table labels.parquet

graftwork predict models:/reviews@champion "a film that nobody wanted" reviews.jsonl"""
TEXT_SHOWN = 80  # characters of a text on the terminal
EXPORT_EXAMPLES = "[bold]Example[/]\n\ngraftwork export models:/flowers@champion --output flowers.onnx"
ModelArgument = Annotated[
    str, typer.Argument(help="Model folder, or models:/NAME@alias or models:/NAME/VERSION.", metavar="MODEL")
]


class ExportFormat(StrEnum):
    onnx = "onnx"


def predict(
    model: ModelArgument,
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files of images or texts, folders of them at any depth, tables (.csv, .tsv, .parquet, .jsonl with a column 'path', or 'text'), "
            "archives (.zip, .tar), s3://bucket/prefix; or texts themselves. Labels are not needed.",
            metavar="INPUT...",
        ),
    ],
    csv: Annotated[Path | None, typer.Option(help="Write a table with every probability, as CSV.")] = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", "--output-file", help="The same, as CSV or Parquet by the name.", metavar="FILE"),
    ] = None,
    column: Annotated[
        str,
        typer.Option(help="Column of the tables that holds the paths, or the texts, where its name does not say so."),
    ] = "",
    output: Output = Path("runs"),
) -> None:
    """Label images or texts with a model from the registry or from a folder. Exit status 1: some could not be decoded and were left out."""
    from graftwork import predicting

    if table and table.suffix.lower() not in predicting.TABLES:
        raise UserError(f"table {one_line(table)}: ends neither in .csv nor in .parquet; name it so")
    folder = predicting.model_folder(model, tracking_uri(output))
    from graftwork.modality import inputs as inputs_of
    from graftwork.modality import name_of
    from graftwork.model import load_model, read_info

    modality = name_of(read_info(folder))
    found = predicting.find_examples(inputs, modality, column)
    headings = inputs_of(modality).HEADINGS
    loaded = load_model(folder)
    shown = Shown(loaded.classes, bool(csv or table), headings, modality)
    left_out = 0

    def broken(name: str, reason: str) -> None:
        nonlocal left_out
        left_out += 1
        advance(1)
        errors.print(
            f"[red]graftwork: {escape(one_line(name))}: {escape(reason)}; left out[/]", soft_wrap=True, highlight=False
        )

    with contextlib.ExitStack() as stack:
        writers = []
        if csv:
            writers.append(stack.enter_context(predicting.table_writer(csv, loaded.classes, ".csv", "csv", headings)))
        if table:
            writers.append(stack.enter_context(predicting.table_writer(table, loaded.classes, headings=headings)))
        with progress(found.number) as advance:
            for rows in predicting.label_examples(loaded, found, broken):
                for write in writers:
                    write(rows)
                shown.add(rows)
                advance(len(rows.names))
    shown.finish([path for path in (csv, table) if path])
    if left_out:
        raise typer.Exit(1)


@contextlib.contextmanager
def progress(total: int | None):  # type: ignore[no-untyped-def]
    """Yield a function that moves a bar on by a number of examples; the bar is there on a terminal alone, and gone at the end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("predict"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("predict", total=total)
        move: Callable[[int], None] = lambda number: bar.advance(task, number)  # noqa: E731
        yield move


class Shown:
    """What the terminal shows: every row, as long as they are few or go nowhere else; of many that are in a file, the counts."""

    def __init__(self, classes: list[str], in_file: bool, headings: tuple[str, ...], modality: str) -> None:
        self.classes, self.in_file = classes, in_file
        self.headings, self.modality = headings, modality
        self.counts: Counter[int] = Counter()
        self.waiting: list[tuple[tuple[str, ...], int, float]] = []
        self.printed = 0

    def add(self, rows: "Rows") -> None:
        from graftwork.predicting import FEW

        self.counts.update(rows.labels)
        if self.in_file and self.counts.total() > FEW:
            self.waiting.clear()
            return
        best = rows.probabilities[range(len(rows.labels)), rows.labels].tolist()
        self.waiting += zip(zip(*rows.identity(), strict=True), rows.labels, best, strict=True)
        if len(self.waiting) > FEW:  # in parts: memory does not grow with their number
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        table = Table(box=None, pad_edge=False, show_header=not self.printed)
        # Texts that were given as they are have no name.
        shown = [n for n in range(len(self.headings)) if any(which[n] for which, _, _ in self.waiting)]
        for heading in (*(self.headings[n] for n in shown), "label", "probability"):
            table.add_column(heading, justify="right" if heading == "probability" else "left", overflow="fold")
        for which, label, probability in self.waiting:
            cells = [escape(one_line(which[n], TEXT_SHOWN if n else 300)) for n in shown]
            table.add_row(*cells, escape(self.classes[label]), f"{probability:.3f}")
        console.print(table)
        self.printed += len(self.waiting)
        self.waiting.clear()

    def finish(self, files: list[Path]) -> None:
        self.flush()
        from graftwork.sources.record import NOUNS

        total = self.counts.total()
        if total and not self.printed:
            counts = ", ".join(f"{n:,} {self.classes[label]}" for label, n in self.counts.most_common(10))
            counts += ", ..." if len(self.counts) > 10 else ""
            console.print(
                f"{total:,} {NOUNS[self.modality]}: {escape(one_line(counts, 1000))}", highlight=False, soft_wrap=True
            )
            for file in files:
                console.print(f"Table: {escape(one_line(file))}", highlight=False, soft_wrap=True)


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="Where the file goes.", metavar="FILE")],
    format_: Annotated[ExportFormat, typer.Option("--format", help="ONNX, for onnxruntime.")] = ExportFormat.onnx,
    runs: Annotated[Path, typer.Option("--runs", help="Folder for runs, where MLFLOW_TRACKING_URI is not set.")] = Path(
        "runs"
    ),
) -> None:
    """Write an image model as one file that other programs run: fitted uint8 pixels in, calibrated probabilities out."""
    from graftwork.exporting import export_onnx
    from graftwork.predicting import model_folder

    found = export_onnx(model_folder(model, tracking_uri(runs)), output)
    console.print(
        f"{escape(one_line(output))}: {found['megabytes']:.1f} MB, opset {found['opset']}; probabilities differ by at most "
        f"{found['difference']:.1g} from the model's",
        highlight=False,
        soft_wrap=True,
    )
