"""Labelling examples in bulk: from files, folders, tables, archives and S3, with or without labels of their own.

What an example is, ``graftwork.modality.Inputs`` knows. Examples are decoded by threads while the network runs, and rows are written while both
go on: memory does not grow with their number.
"""

import contextlib
import csv
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from graftwork.calibration import probabilities
from graftwork.errors import UserError, one_line
from graftwork.modality import Array, BrokenExampleError, Inputs, Preprocess
from graftwork.modality import inputs as inputs_of
from graftwork.model import Floats, Model
from graftwork.parallel import WORKERS, bounded_map
from graftwork.sources.record import NOUNS, SUFFIXES, Content, File, Text, Unreadable, exists, printable
from graftwork.tracking import quiet_mlflow, shown_uri, sqlite_file

if TYPE_CHECKING:
    from graftwork.execution import Execution

FEW = 256  # examples up to which nothing is timed to run the network faster
TABLES = (".csv", ".parquet")
GROUP = 8192  # rows a row group of Parquet


class Item(NamedTuple):
    """An example that is to be labelled, not read yet. The name says where it is; it may be "", for what is no file and no row."""

    name: str
    content: Content


class Found(NamedTuple):
    """What was asked for: examples from one input after the other; ``number`` of them is None where only listing them would tell."""

    parts: list["Part"]
    modality: str

    @property
    def number(self) -> int | None:
        counts = [part.number for part in self.parts if part.number is not None]
        return sum(counts) if len(counts) == len(self.parts) else None


class Part(NamedTuple):
    items: Iterable[Item]
    number: int | None
    readers: int = WORKERS  # threads


class Loaded(NamedTuple):
    name: str
    example: Array | str  # or why there is none
    text: str = ""  # of an example that is one


class Rows(NamedTuple):
    """Examples and what the model says of them: ``labels`` are positions among the classes; ``probabilities`` (N, classes), calibrated."""

    names: list[str]
    labels: list[int]
    probabilities: Floats
    texts: Sequence[str] = ()  # of examples that are texts

    def identity(self) -> list[Sequence[str]]:
        """Return the columns that say which example it is, as ``Inputs.HEADINGS`` calls them."""
        return [self.names, self.texts] if self.texts else [self.names]


# ---- what is asked for ---------------------------------------------------------------------------------------------------------


def find_examples(inputs: list[str], modality: str, column: str = "") -> Found:
    """Find the examples that ``inputs`` name: files, folders, tables, archives, ``s3://`` objects and prefixes, named datasets, texts themselves.

    ``column`` names the column of the tables that holds the paths, or the texts; "": it is known by its name.

    Raises:
        UserError: there is no such input, or no example in it.
    """
    parts: list[Part] = []
    single: list[Item] = []

    def close() -> None:
        if single:
            parts.append(Part(list(single), len(single)))
            single.clear()

    for given in inputs:
        part = open_input(given, modality, column)
        if isinstance(part, Item):
            single.append(part)
        else:
            close()
            parts.append(part)
    close()
    return Found(parts, modality)


def open_input(given: str, modality: str, column: str = "") -> Item | Part:
    """Return one input: a single example, or a source of many."""
    from graftwork.sources import archive, manifest

    lower = given.lower()
    is_path = not given.startswith("s3://")
    path = Path(given)
    there = bool(given) and exists(path) if is_path else True
    if is_path and there and path.is_dir():
        return folder_part(path, modality)
    if there and lower.endswith(manifest.SUFFIXES):
        return table_part(given, modality, column)
    if there and lower.endswith(archive.SUFFIXES):
        return archive_part(given, modality)
    if not is_path:
        return s3_part(given, modality)
    if there:
        return Item(str(path), File(path))
    found: Item | Part = inputs_of(modality).rest(given)
    return found


def walk(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """Yield the files below ``folder`` with one of ``suffixes``, a folder's own before those of its folders, each in the order of their names."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f != "__MACOSX")
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                yield Path(here, name)


def folder_part(folder: Path, modality: str) -> Part:
    """Return the examples in a folder, at any depth; hidden files are passed over.

    Raises:
        UserError: there are none.
    """
    suffixes, noun = SUFFIXES[modality], NOUNS[modality]
    # Walked twice: counting takes a fraction of what a list of a million paths would hold.
    count = sum(1 for _ in walk(folder, suffixes))
    if not count:
        kinds = (
            f" ({', '.join(sorted(suffixes))})" if len(suffixes) < 5 else ""
        )  # a longer list tells less than the word
        raise UserError(
            f"input {one_line(folder)}: this folder holds no {noun}{kinds}; give files of {noun}, or a folder of them"
        )
    return Part((Item(str(path), File(path)) for path in walk(folder, suffixes)), count)


def table_part(uri: str, modality: str, wanted: str = "") -> Part:
    """Return the examples of a table's rows, in its order: the paths as they stand there, or the texts. It needs no labels.

    Raises:
        UserError: it cannot be read, or has no column of paths or texts.
    """
    import pyarrow as pa

    from graftwork.sources import manifest
    from graftwork.sources.record import local_path, regular

    shown, name = one_line(uri), uri.rsplit("/", 1)[-1]
    remote = uri.startswith("s3://")
    if remote:
        from graftwork.sources.s3 import read_object

        data, base = read_object(uri), uri.rsplit("/", 1)[0]
    else:
        path = local_path(uri)
        base = str(path.absolute().parent)
        try:
            data = regular(path).read_bytes()
        except OSError as error:
            reason = one_line(error.strerror or error, 120)
            raise UserError(f"data {shown}: cannot be read ({reason}); give a file that you may read") from None
    kind = inputs_of(modality)
    column = Column(shown, *kind.TABLE_COLUMN, wanted)
    if name.lower().endswith(".parquet"):
        values, where = parquet_values(column, data)
    else:
        data = manifest.as_utf8(shown, manifest.unpacked(shown, name, data))
        values, where = (lines_values if name.lower().endswith(manifest.LINES) else csv_values)(column, data)
    if not len(values):
        raise UserError(f"data {shown}: has a header and no rows; add a row for each {modality}")
    if column.role != "path":
        place = printable(uri)

        def rows() -> Iterator[Item]:
            for start in range(0, len(values), manifest.BATCH):
                for row, text in enumerate(values.slice(start, manifest.BATCH).to_pylist(), start):
                    yield Item(f"{place} {where(row)}", Text(text) if text else Unreadable("empty text"))

        return Part(rows(), len(values))

    class Paths(manifest.ManifestSource):
        """The paths of a manifest, and where their contents lie; a row that repeats another is labelled again."""

        def __init__(self) -> None:
            self.base, self._paths = base, manifest.checked_paths(shown, values, where)
            self._objects = self._find_objects()
            self.readers = 16 if self._objects else WORKERS

        def items(self) -> Iterator[Item]:
            for start in range(0, len(self._paths), manifest.BATCH):
                for row, path in enumerate(self._paths.slice(start, manifest.BATCH).to_pylist(), start):
                    yield Item(path or f"(no path, row {row + 1})", self._content(path))

    source = Paths()
    assert isinstance(source._paths, pa.Array)
    return Part(source.items(), len(source), source.readers)


class Column(NamedTuple):
    """The column that is looked for in a table: by the name ``wanted``, or by those that the ``role`` may have."""

    shown: str  # the table
    role: str  # "path" or "text"
    aliases: tuple[str, ...]
    wanted: str = ""

    def position(self, names: list[str]) -> int:
        """Return its position; -1: there is none.

        Raises:
            UserError: there are several.
        """
        plain = [name.strip().lower() for name in names]
        aliases = (self.wanted.strip().lower(),) if self.wanted else self.aliases
        found = [n for n, name in enumerate(plain) if name in aliases]
        if len(found) > 1:
            several = one_line(", ".join(names[n].strip() for n in found))
            raise UserError(
                f"data {self.shown}: {len(found)} columns could be the {self.role}: {several}; "
                + ("keep one" if self.wanted else "keep one, or say which with --column")
            )
        return found[0] if found else -1

    def missing(self, names: list[str]) -> UserError:
        from graftwork.sources.manifest import few

        found = one_line(", ".join(f"'{name.strip()}'" for name in names), 200)
        if self.wanted:
            return UserError(
                f"data {self.shown}: no column '{one_line(self.wanted)}' among the columns found: {found}; check --column"
            )
        return UserError(
            f"data {self.shown}: no column for the {self.role} ({few(self.aliases)}) among the columns found: {found}; "
            "name it in the first row, or give --column"
        )


def csv_values(column: Column, data: bytes) -> tuple[Any, Callable[[int], str]]:
    import io

    import pyarrow as pa
    import pyarrow.csv

    from graftwork.sources.manifest import BLOCK_BYTES, HEADER_BYTES, SEPARATORS, csv_rows, text_column

    header = io.StringIO(data[:HEADER_BYTES].decode("utf-8", "ignore"), newline="").readline()
    best: list[str] = []
    for separator in SEPARATORS:
        names = next(csv.reader([header], delimiter=separator), [])
        best = max(best, names, key=len)
        position = column.position(names)
        if position >= 0:
            break
    else:
        raise column.missing(best)

    def parse(block: int) -> Any:
        return pa.csv.read_csv(
            pa.BufferReader(data),
            pa.csv.ReadOptions(column_names=[str(n) for n in range(len(names))], skip_rows=1, block_size=block),
            pa.csv.ParseOptions(delimiter=separator, newlines_in_values=b'"' in data),
            pa.csv.ConvertOptions(
                include_columns=[str(position)], column_types={str(position): pa.string()}, strings_can_be_null=False
            ),
        )

    for block in BLOCK_BYTES:
        try:
            table = parse(block)
            break
        except pa.ArrowException as error:
            if "Empty CSV" in str(error):
                return pa.array([], pa.large_string()), csv_rows(data)
            if "straddling" in str(error) and block < min(len(data), BLOCK_BYTES[-1]):
                continue  # a row is longer than a block
            raise UserError(
                f"data {column.shown}: is no CSV file that can be parsed ({one_line(error, 150)}); save it again, as CSV in UTF-8"
            ) from None
    return text_column(column.shown, column.role, table.column(0)), csv_rows(data)


def lines_values(column: Column, data: bytes) -> tuple[Any, Callable[[int], str]]:
    """Return a key's values of JSON Lines; "" where a line lacks it."""
    import pyarrow as pa

    from graftwork.sources.manifest import numbered_lines, parse_line, plain_value, text_array, text_column

    values: list[str] = []
    numbers: list[int] = []
    names: dict[str, None] = {}
    for number, line in numbered_lines(column.shown, data):
        row = parse_line(column.shown, number, line)
        keys = list(row)
        position = column.position(keys)
        value = row[keys[position]] if position >= 0 else None
        if isinstance(value, list | dict):
            raise UserError(
                f"data {column.shown}: line {number}: '{one_line(keys[position], 80)}', the column for the {column.role}, holds "
                f"{'a list' if isinstance(value, list) else 'an object'}; give text"
            )
        names.update(dict.fromkeys(keys) if len(names) < 50 else {})
        numbers.append(number)
        values.append(plain_value(value))
    if numbers and column.position(list(names)) < 0:
        raise column.missing(list(names))
    texts = pa.chunked_array([text_array(values)])
    return text_column(column.shown, column.role, texts), lambda row: f"line {numbers[row]}"


def parquet_values(column: Column, data: bytes) -> tuple[Any, Callable[[int], str]]:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    from graftwork.sources.manifest import text_column

    try:
        parquet = pq.ParquetFile(io.BytesIO(data))
        names = parquet.schema_arrow.names
        position = column.position(names)
        if position < 0:
            raise column.missing(names)
        values = parquet.read(columns=[names[position]]).column(0)
    except (pa.ArrowException, OSError) as error:
        reason = one_line(str(error).partition("\n")[0], 120)
        raise UserError(
            f"data {column.shown}: is not Parquet, or is damaged ({reason}); write it again, or copy it again"
        ) from None
    return text_column(column.shown, column.role, values), lambda row: f"row {row + 1}"


def archive_part(uri: str, modality: str) -> Part:
    """Return the examples of an archive, at any depth; one at ``s3://`` is copied to the cache folder first.

    Raises:
        UserError: it cannot be read, is damaged or made to do harm, or holds no example.
    """
    import hashlib
    import tempfile

    from graftwork.sources import archive
    from graftwork.sources.record import local_path

    shown = one_line(uri)

    class Anywhere(archive.Table):
        """Takes every example into one class: where an archive's folders are no labels, each example has a place."""

        def _see_folders(self, folders: list[str]) -> None:
            self._tops = {"any"}

        def put(self, path: str, *rest: int) -> None:
            super().put(f"any/{path}", *rest)

    class Members(archive.ArchiveSource):
        def __init__(self, opened: archive.Opened) -> None:
            kind = archive.kind_of(opened)
            if not kind:
                archive.refuse_what_is_no_archive(opened)
            table = Anywhere(shown, modality)
            self._version, self._zip, self._contents = opened.version, kind == "zip", opened
            if kind == "zip":
                archive.list_zip(opened, table)
            else:
                self._contents = archive.list_tar(opened, kind, table)
            self._layout, self._images = table.finish()

    with contextlib.ExitStack() as stack:
        try:
            if uri.startswith("s3://"):
                from graftwork.sources.s3 import download

                # Nameless once it is open, it takes its room on the disk until the last example is read.
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graftwork-")))
                path = folder / hashlib.sha256(uri.encode()).hexdigest()[:24]
                download(uri, path)
            else:
                path = local_path(uri)
            source = Members(archive.Opened.at(path, shown))
        except OSError as error:
            reason = one_line(error.strerror or error, 120)
            raise UserError(f"data {shown}: cannot be read ({reason}); give an archive that you may read") from None
    if not len(source):
        raise UserError(
            f"input {shown}: this archive holds no {NOUNS[modality]} that may be used; check how it was made"
        )
    items = (Item(f"{uri}/{r.key.removeprefix('any/')}", r.content) for r in source.records())
    return Part(items, len(source))


def s3_part(uri: str, modality: str) -> Part:
    """Return the object ``uri`` where its name is an example's, else the examples below that prefix, a page at a time.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from graftwork.sources import s3

    suffixes = SUFFIXES[modality]
    if Path(uri).suffix.lower() in suffixes:
        found = s3.objects([uri])[uri] or Unreadable("no such object")
        return Part([Item(printable(uri), found)], 1)
    bucket, path = s3.split_uri(uri)
    prefix = f"{path.rstrip('/')}/" if path.strip("/") else ""
    store = s3.connect(uri)

    def listed() -> Iterator[Item]:
        for page in s3.list_pages(store, uri, bucket, prefix):
            for key, mark in page:
                name = key.rpartition("/")[2]
                if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                    yield Item(printable(f"s3://{bucket}/{key}"), s3.S3Object(store, bucket, key, mark))

    items = listed()
    first = next(items, None)
    if first is None:
        raise UserError(
            f"input {one_line(uri)}: there is no {modality} below this prefix; check the bucket and the prefix"
        )
    return Part(chain([first], items), None, s3.READERS)


# ---- labelling -----------------------------------------------------------------------------------------------------------------


def label_examples(
    model: Model,
    found: Found,
    broken: Callable[[str, str], None],
    note: Callable[[str], None] = lambda message: None,
) -> Iterator[Rows]:
    """Yield rows, a batch at a time, in the order of ``found``; what cannot be decoded is told to ``broken``, with the reason.

    Where there are more than ``FEW``, the fastest of the ways to run the network is sought first; all of them give the same labels.
    """
    from graftwork.execution import Inference

    kind = inputs_of(found.modality)
    parts = iter(found.parts)
    head: list[tuple[Part, list[Item]]] = []  # as many examples as tell whether there are many
    seen = 0
    for part in parts:
        items = iter(part.items)
        first = list(islice(items, FEW - seen))
        head.append((part._replace(items=chain(first, items)), first))
        seen += len(first)
        if seen >= FEW:
            break
    execution = how_to_run(model, [i for _, first in head for i in first], found.number, note)
    run = Inference(model.network, model.preprocess, model.device, execution, note)

    def flush(ready: list[Loaded]) -> Rows:
        logits = run(model.preprocess.stack([one.example for one in ready])).numpy()  # type: ignore[misc]
        names, texts = [one.name for one in ready], [one.text for one in ready]
        return Rows(
            names,
            logits.argmax(1).tolist(),
            probabilities(logits, model.temperature),
            texts if len(kind.HEADINGS) > 1 else [],
        )

    ready: list[Loaded] = []
    for one in loaded(chain((p for p, _ in head), parts), model.preprocess, kind):
        if isinstance(one.example, str):
            broken(one.name, one.example)
            continue
        ready.append(one)
        if len(ready) == execution.micro_batch * kind.TOGETHER:
            yield flush(ready)
            ready = []
    if ready:
        yield flush(ready)


def loaded(parts: Iterable[Part], preprocess: Preprocess, kind: Inputs) -> Iterator[Loaded]:
    """Yield what was read, decoded ahead by threads."""

    def one(item: Item) -> Loaded:
        return load(item, preprocess, kind)

    def size(result: Loaded) -> int:
        return 0 if isinstance(result.example, str) else result.example.nbytes + len(result.text)

    for part in parts:
        yield from bounded_map(one, part.items, part.readers, size)


def load(item: Item, preprocess: Preprocess, kind: Inputs) -> Loaded:
    """Read an item; where it cannot be used, the reason takes the example's place."""
    try:
        return Loaded(item.name, *kind.read(item, preprocess))
    except MemoryError:
        return Loaded(item.name, "more than the memory holds")
    except (BrokenExampleError, OSError) as error:
        return Loaded(item.name, one_line(getattr(error, "strerror", None) or error, 120))


def how_to_run(model: Model, first: list[Item], count: int | None, note: Callable[[str], None]) -> "Execution":
    """Choose how the network is run over ``count`` examples: as evaluation does, in fp32, so that the labels are those that were evaluated."""
    from graftwork.execution import default_execution, plan_inference
    from graftwork.settings import ExecutionSettings

    settings = ExecutionSettings()
    if len(first) >= FEW:
        kind = inputs_of(model.info)
        sample = [p for i in first[:64] if not isinstance(p := load(i, model.preprocess, kind).example, str)]
        if sample:
            planned = plan_inference(
                model.network,
                f"{model.info['backbone']}, {len(model.classes)} logits",
                model.preprocess.stack(sample),
                model.preprocess,
                model.device,
                count or 4 * FEW,  # not known where a store is still being listed
                settings,
                ("fp32",),
            )
            note(f"plan: {planned}")
            return planned.execution
    return default_execution(settings, model.device, model.preprocess)


# ---- tables --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; what is written there takes the name ``path`` only if the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def table_writer(
    path: Path, classes: list[str], kind: str = "", what: str = "table", headings: tuple[str, ...] = ("image",)
) -> Iterator[Callable[[Rows], None]]:
    """Yield a function that writes rows: ``headings``, label, and the probability of every class; ``kind`` is ".csv" or ".parquet".

    Raises:
        UserError: the name has another suffix, or nothing can be written there.
    """
    kind = kind or path.suffix.lower()
    if kind not in TABLES:
        raise UserError(f"{what} {one_line(path)}: ends neither in .csv nor in .parquet; name it so")
    if path.is_dir():
        raise UserError(f"{what} {one_line(path)}: cannot be written (Is a directory); give another path")
    writer = csv_writer if kind == ".csv" else parquet_writer
    with contextlib.ExitStack() as stack:
        try:
            partial = stack.enter_context(finished_file(path))
            write = stack.enter_context(writer(partial, classes, headings))
        except OSError as error:
            raise UserError(
                f"{what} {one_line(path)}: cannot be written ({error.strerror}); give another path"
            ) from None

        def guarded(rows: Rows) -> None:
            try:
                write(rows)
            except OSError as error:  # a disk that is full
                raise UserError(
                    f"{what} {one_line(path)}: cannot be written ({error.strerror or one_line(error, 120)}); give another path"
                ) from None

        yield guarded


@contextlib.contextmanager
def csv_writer(path: Path, classes: list[str], headings: tuple[str, ...]) -> Iterator[Callable[[Rows], None]]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*headings, "label", *(f"p_{c}" for c in classes)])

        def write(rows: Rows) -> None:
            named = zip(*rows.identity(), strict=True)
            for which, label, p in zip(named, rows.labels, rows.probabilities.tolist(), strict=True):
                writer.writerow([*map(printable, which), classes[label], *(f"{v:.6f}" for v in p)])

        yield write


@contextlib.contextmanager
def parquet_writer(path: Path, classes: list[str], headings: tuple[str, ...]) -> Iterator[Callable[[Rows], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [*((h, pa.string()) for h in (*headings, "label")), *((f"p_{c}", pa.float32()) for c in classes)]
    schema = pa.schema(fields)
    waiting: list[Any] = []
    with pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        def write(rows: Rows) -> None:
            columns: list[Any] = [list(map(printable, column)) for column in rows.identity()]
            columns.append([classes[i] for i in rows.labels])
            columns += list(np.ascontiguousarray(rows.probabilities.T))
            waiting.append(pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema))
            if sum(len(t) for t in waiting) >= GROUP:
                flush()

        yield write
        flush()


# ---- the model -----------------------------------------------------------------------------------------------------------------


def model_folder(model: str, uri: str) -> Path:
    """Return the local folder of ``model``; a registered version is fetched once and kept.

    Raises:
        UserError: the registry has no such model, version or alias.
    """
    if not model.startswith("models:/"):
        if not Path(model).is_dir():
            raise UserError(f"model {one_line(model)}: no such folder; give a Model folder or models:/NAME@champion")
        return Path(model)
    match = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))", model)
    if not match:
        raise UserError(f"model {one_line(model)}: write models:/NAME@ALIAS or models:/NAME/VERSION")
    database = sqlite_file(uri)
    if database and not database.is_file():
        raise UserError(
            f"model {one_line(model)}: there is no registry at {shown_uri(uri)}; give the folder of the runs with --output, or set MLFLOW_TRACKING_URI"
        )
    quiet_mlflow()
    os.environ["MLFLOW_TRACKING_URI"] = uri
    import mlflow
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri, uri)
    name = match["name"]
    try:
        version: Any = (
            client.get_model_version_by_alias(name, match["alias"])
            if match["alias"]
            else client.get_model_version(name, match["version"])
        )
    except MlflowException as error:
        raise UserError(
            f"model {one_line(model)}: the registry at {shown_uri(uri)} has none ({one_line(error, 120)}); give a name, version or alias that it has"
        ) from None
    return fetch_version(version, uri)


def fetch_version(version: Any, uri: str) -> Path:
    """Return a local copy of a registered version's Model artifact, from the cache where its weights are there already."""
    import hashlib
    import tempfile

    from graftwork.files import finished_folder
    from graftwork.register import SAME_WEIGHTS, download_version
    from graftwork.sources.arrays import cache_folder

    # By what was logged, and not by its weights alone: beside equal weights there may be another temperature.
    logged = hashlib.sha256(f"{version.source}\0{version.tags.get(SAME_WEIGHTS)}".encode()).hexdigest()[:32]
    kept = cache_folder() / "models" / logged
    if (kept / "model.json").is_file() and version.tags.get(SAME_WEIGHTS):
        return kept
    with tempfile.TemporaryDirectory() as temporary:
        found = download_version(version, Path(temporary))
        with finished_folder(kept) as partial:
            for file in found.iterdir():
                (partial / file.name).write_bytes(file.read_bytes())
    return kept
