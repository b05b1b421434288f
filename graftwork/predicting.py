"""Labelling images in bulk: from files, folders, manifests, archives and S3, with or without labels of their own.

Images are decoded by threads while the network runs, and rows are written while both go on: memory does not grow with their number.
"""

import contextlib
import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from graftwork.calibration import probabilities
from graftwork.errors import UserError, one_line
from graftwork.images import Array, BrokenImageError, Preprocess, decode, fit
from graftwork.model import Floats, Model
from graftwork.parallel import WORKERS, bounded_map
from graftwork.sources.record import IMAGE_SUFFIXES, Content, File, Unreadable, exists, printable
from graftwork.tracking import quiet_mlflow, shown_uri, sqlite_file

if TYPE_CHECKING:
    from graftwork.execution import Execution

FEW = 256  # images up to which nothing is timed to run the network faster
TABLES = (".csv", ".parquet")
GROUP = 8192  # rows a row group of Parquet


class Item(NamedTuple):
    """An image that is to be labelled, not read yet."""

    name: str
    content: Content


class Images(NamedTuple):
    """What was asked for: images from one input after the other; ``number`` of them is None where only listing them would tell."""

    parts: list["Part"]

    @property
    def number(self) -> int | None:
        counts = [part.number for part in self.parts if part.number is not None]
        return sum(counts) if len(counts) == len(self.parts) else None


class Part(NamedTuple):
    items: Iterable[Item]
    number: int | None
    readers: int = WORKERS  # threads


class Rows(NamedTuple):
    """Images and what the model says of them: ``labels`` are positions among the classes; ``probabilities`` (N, classes), calibrated."""

    names: list[str]
    labels: list[int]
    probabilities: Floats


# ---- what is asked for ---------------------------------------------------------------------------------------------------------


def find_images(inputs: list[str]) -> Images:
    """Find the images that ``inputs`` name: files, folders, manifests, archives, ``s3://`` objects and prefixes, named datasets.

    Raises:
        UserError: there is no such input, or no image in it.
    """
    parts: list[Part] = []
    files: list[Item] = []

    def close() -> None:
        if files:
            parts.append(Part(list(files), len(files)))
            files.clear()

    for given in inputs:
        part = open_input(given)
        if isinstance(part, Item):
            files.append(part)
        else:
            close()
            parts.append(part)
    close()
    return Images(parts)


def open_input(given: str) -> Item | Part:
    """Return one input: a single image, or a source of many."""
    from graftwork.sources import archive, manifest

    lower = given.lower()
    is_path = not given.startswith("s3://")
    path = Path(given)
    if is_path and path.is_dir():
        return folder_part(path)
    there = exists(path) if is_path else True
    if there and lower.endswith(manifest.SUFFIXES):
        return manifest_part(given)
    if there and lower.endswith(archive.SUFFIXES):
        return archive_part(given)
    if not is_path:
        return s3_part(given)
    if there:
        return Item(str(path), File(path))
    from graftwork.sources.arrays import open_named
    from graftwork.sources.torchvision_sets import open_torchvision

    source = open_named(given) or open_torchvision(given)
    if source is None:
        raise UserError(f"input {one_line(given)}: no such file; check the path")
    return Part((Item(f"{given}/{r.key}", r.content) for r in source.records()), len(source), source.readers)


def expand(inputs: list[Path]) -> Iterator[Path]:
    """Yield files as they are, and the images in folders, at any depth; hidden files are passed over.

    Raises:
        UserError: there is no such file, or no image in a folder.
    """
    for path in inputs:
        if path.is_dir():
            found = walk(path)
            first = next(found, None)
            if first is None:
                raise UserError(
                    f"input {one_line(path)}: this folder holds no images; give image files, or a folder of them"
                )
            yield from chain([first], found)
        elif not path.exists():
            raise UserError(f"input {one_line(path)}: no such file; check the path")
        else:
            yield path


def walk(folder: Path) -> Iterator[Path]:
    """Yield the images below ``folder``, a folder's own before those of its folders, each in the order of their names."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f != "__MACOSX")
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(here, name)


def folder_part(folder: Path) -> Part:
    # Walked twice: counting takes a fraction of what a list of a million paths would hold.
    count = sum(1 for _ in expand([folder]))
    return Part((Item(str(path), File(path)) for path in walk(folder)), count)


def manifest_part(uri: str) -> Part:
    """Return the images that a manifest names, in its order and by the paths as they stand there. It needs no labels.

    Raises:
        UserError: it cannot be read, or has no column of paths.
    """
    import io

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
    if name.lower().endswith(".parquet"):
        paths, where = parquet_paths(shown, io.BytesIO(data))
    else:
        paths, where = csv_paths(shown, manifest.as_utf8(shown, manifest.unpacked(shown, name, data)))
    if not len(paths):
        raise UserError(f"data {shown}: has a header and no rows; add a row for each image")

    class Paths(manifest.ManifestSource):
        """The paths of a manifest, and where their contents lie; a row that repeats another is labelled again."""

        def __init__(self) -> None:
            self.base, self._paths = base, manifest.checked_paths(shown, paths, where)
            self._objects = self._find_objects()
            self.readers = 16 if self._objects else WORKERS

        def items(self) -> Iterator[Item]:
            for start in range(0, len(self._paths), manifest.BATCH):
                for row, path in enumerate(self._paths.slice(start, manifest.BATCH).to_pylist(), start):
                    yield Item(path or f"(no path, row {row + 1})", self._content(path))

    source = Paths()
    assert isinstance(source._paths, pa.Array)
    return Part(source.items(), len(source), source.readers)


def path_column(shown: str, names: list[str]) -> int:
    """Return the position of the column of paths; -1: there is none."""
    from graftwork.sources.manifest import COLUMNS

    found = [n for n, name in enumerate(names) if name.strip().lower() in COLUMNS["path"]]
    if len(found) > 1:
        several = one_line(", ".join(names[n].strip() for n in found))
        raise UserError(f"data {shown}: {len(found)} columns could be the path: {several}; keep one")
    return found[0] if found else -1


def no_path_column(shown: str, names: list[str]) -> UserError:
    from graftwork.sources.manifest import COLUMNS

    found = one_line(", ".join(f"'{name.strip()}'" for name in names), 200)
    return UserError(
        f"data {shown}: no column for the path ({', '.join(COLUMNS['path'])}) among the columns found: {found}; name it in the first row"
    )


def csv_paths(shown: str, data: bytes) -> tuple[Any, Callable[[int], str]]:
    import io

    import pyarrow as pa
    import pyarrow.csv

    from graftwork.sources.manifest import HEADER_BYTES, SEPARATORS, csv_rows, text_column

    header = io.StringIO(data[:HEADER_BYTES].decode("utf-8", "ignore"), newline="").readline()
    best: list[str] = []
    for separator in SEPARATORS:
        names = next(csv.reader([header], delimiter=separator), [])
        best = max(best, names, key=len)
        position = path_column(shown, names)
        if position >= 0:
            break
    else:
        raise no_path_column(shown, best)
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(data),
            pa.csv.ReadOptions(column_names=[str(n) for n in range(len(names))], skip_rows=1),
            pa.csv.ParseOptions(delimiter=separator, newlines_in_values=b'"' in data),
            pa.csv.ConvertOptions(
                include_columns=[str(position)], column_types={str(position): pa.string()}, strings_can_be_null=False
            ),
        )
    except pa.ArrowException as error:
        if "Empty CSV" in str(error):
            return pa.array([], pa.large_string()), csv_rows(data)
        raise UserError(
            f"data {shown}: is no CSV file that can be parsed ({one_line(error, 150)}); save it again, as CSV in UTF-8"
        ) from None
    return text_column(shown, "path", table.column(0)), csv_rows(data)


def parquet_paths(shown: str, file: Any) -> tuple[Any, Callable[[int], str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from graftwork.sources.manifest import text_column

    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        position = path_column(shown, names)
        if position < 0:
            raise no_path_column(shown, names)
        column = parquet.read(columns=[names[position]]).column(0)
    except (pa.ArrowException, OSError) as error:
        reason = one_line(str(error).partition("\n")[0], 120)
        raise UserError(
            f"data {shown}: is not Parquet, or is damaged ({reason}); write it again, or copy it again"
        ) from None
    return text_column(shown, "path", column), lambda row: f"row {row + 1}"


def archive_part(uri: str) -> Part:
    """Return the images of an archive, at any depth; one at ``s3://`` is copied to the cache folder first.

    Raises:
        UserError: it cannot be read, is damaged or made to do harm, or holds no image.
    """
    import hashlib
    import tempfile

    from graftwork.sources import archive
    from graftwork.sources.record import local_path

    shown = one_line(uri)

    class Anywhere(archive.Table):
        """Takes every image into one class: where an archive's folders are no labels, each image has a place."""

        def _see_folders(self, folders: list[str]) -> None:
            self._tops = {"any"}

        def put(self, path: str, *rest: int) -> None:
            super().put(f"any/{path}", *rest)

    class Members(archive.ArchiveSource):
        def __init__(self, opened: archive.Opened) -> None:
            kind = archive.kind_of(opened)
            if not kind:
                archive.refuse_what_is_no_archive(opened)
            table = Anywhere(shown)
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

                # Nameless once it is open, it takes its room on the disk until the last image is read.
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
        raise UserError(f"input {shown}: this archive holds no images that may be used; check how it was made")
    items = (Item(f"{uri}/{r.key.removeprefix('any/')}", r.content) for r in source.records())
    return Part(items, len(source))


def s3_part(uri: str) -> Part:
    """Return the object ``uri`` where its name is an image's, else the images below that prefix, a page at a time.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from graftwork.sources import s3

    if Path(uri).suffix.lower() in IMAGE_SUFFIXES:
        found = s3.objects([uri])[uri] or Unreadable("no such object")
        return Part([Item(printable(uri), found)], 1)
    bucket, path = s3.split_uri(uri)
    prefix = f"{path.rstrip('/')}/" if path.strip("/") else ""
    store = s3.connect(uri)

    def listed() -> Iterator[Item]:
        for page in s3.list_pages(store, uri, bucket, prefix):
            for key, mark in page:
                name = key.rpartition("/")[2]
                if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                    yield Item(printable(f"s3://{bucket}/{key}"), s3.S3Object(store, bucket, key, mark))

    items = listed()
    first = next(items, None)
    if first is None:
        raise UserError(f"input {one_line(uri)}: there is no image below this prefix; check the bucket and the prefix")
    return Part(chain([first], items), None, s3.READERS)


# ---- labelling -----------------------------------------------------------------------------------------------------------------


def label_images(
    model: Model,
    images: Images,
    broken: Callable[[str, str], None],
    note: Callable[[str], None] = lambda message: None,
) -> Iterator[Rows]:
    """Yield rows, a batch at a time, in the order of ``images``; what cannot be decoded is told to ``broken``, with the reason.

    Where there are more than ``FEW``, the fastest of the ways to run the network is sought first; all of them give the same labels.
    """
    import torch

    from graftwork.execution import Inference

    parts = iter(images.parts)
    head: list[tuple[Part, list[Item]]] = []  # as many images as tell whether there are many
    seen = 0
    for part in parts:
        items = iter(part.items)
        first = list(islice(items, FEW - seen))
        head.append((part._replace(items=chain(first, items)), first))
        seen += len(first)
        if seen >= FEW:
            break
    execution = how_to_run(model, [i for _, first in head for i in first], images.number, note)
    run = Inference(model.network, model.preprocess, model.device, execution, note)

    def flush(names: list[str], pixels: list[Array]) -> Rows:
        logits = run(torch.from_numpy(np.stack(pixels))).numpy()
        return Rows(names, logits.argmax(1).tolist(), probabilities(logits, model.temperature))

    names: list[str] = []
    pixels: list[Array] = []
    for name, found in loaded(chain((p for p, _ in head), parts), model.preprocess):
        if isinstance(found, str):
            broken(name, found)
            continue
        names.append(name)
        pixels.append(found)
        if len(pixels) == execution.micro_batch:
            yield flush(names, pixels)
            names, pixels = [], []
    if pixels:
        yield flush(names, pixels)


def loaded(parts: Iterable[Part], preprocess: Preprocess) -> Iterator[tuple[str, Array | str]]:
    """Yield (name, pixels or why there are none), decoded ahead by threads."""

    def one(item: Item) -> tuple[str, Array | str]:
        return item.name, load(item, preprocess)

    def size(result: tuple[str, Array | str]) -> int:
        return 0 if isinstance(result[1], str) else result[1].nbytes

    for part in parts:
        yield from bounded_map(one, part.items, part.readers, size)


def load(item: Item, preprocess: Preprocess) -> Array | str:
    """Return an image's pixels, shape (size, size, 3), uint8; or why it cannot be used."""
    try:
        return fit(decode(item.content.read()), preprocess)
    except MemoryError:
        return "more than the memory holds"
    except (BrokenImageError, OSError) as error:
        return one_line(getattr(error, "strerror", None) or error, 120)


def how_to_run(model: Model, first: list[Item], count: int | None, note: Callable[[str], None]) -> "Execution":
    """Choose how the network is run over ``count`` images: as evaluation does, in fp32, so that the labels are those that were evaluated."""
    import torch

    from graftwork.execution import default_execution, plan_inference
    from graftwork.settings import ExecutionSettings

    settings = ExecutionSettings()
    if len(first) >= FEW:
        pixels = [p for i in first[:64] if not isinstance(p := load(i, model.preprocess), str)]
        if pixels:
            planned = plan_inference(
                model.network,
                f"{model.info['backbone']}, {len(model.classes)} logits",
                torch.from_numpy(np.stack(pixels)),
                model.preprocess,
                model.device,
                count or 4 * FEW,  # not known where a store is still being listed
                settings,
                ("fp32",),
            )
            note(f"plan: {planned}")
            return planned.execution
    return default_execution(settings, model.device, model.preprocess.size)


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
    path: Path, classes: list[str], kind: str = "", what: str = "table"
) -> Iterator[Callable[[Rows], None]]:
    """Yield a function that writes rows: image, label, and the probability of every class; ``kind`` is ".csv" or ".parquet".

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
            write = stack.enter_context(writer(partial, classes))
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
def csv_writer(path: Path, classes: list[str]) -> Iterator[Callable[[Rows], None]]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", *(f"p_{c}" for c in classes)])

        def write(rows: Rows) -> None:
            for name, label, p in zip(rows.names, rows.labels, rows.probabilities.tolist(), strict=True):
                writer.writerow([printable(name), classes[label], *(f"{v:.6f}" for v in p)])

        yield write


@contextlib.contextmanager
def parquet_writer(path: Path, classes: list[str]) -> Iterator[Callable[[Rows], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [("image", pa.string()), ("label", pa.string()), *((f"p_{c}", pa.float32()) for c in classes)]
    schema = pa.schema(fields)
    waiting: list[Any] = []
    with pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        def write(rows: Rows) -> None:
            columns: list[Any] = [[printable(n) for n in rows.names], [classes[i] for i in rows.labels]]
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
