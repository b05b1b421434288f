"""A manifest: a table with a row an example (CSV, TSV, Parquet or JSON Lines; on this machine or on S3) that names its path and its label.

A table that holds the examples themselves, texts, is read and checked here as well; ``graftwork.sources.texts`` makes records of it.
The table stays in Arrow's columns; records are made one batch after the other, so a million rows cost tens of megabytes.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graftwork.errors import UserError, one_line
from graftwork.parallel import WORKERS
from graftwork.sources.record import (
    AS_IT_IS,
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    Content,
    DataSource,
    File,
    Reading,
    Record,
    Unreadable,
    exists,
    local_path,
    printable,
    regular,
)

LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
SUFFIXES = (".csv", ".csv.gz", ".tsv", ".parquet", *LINES)
COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "uri"),
    "label": ("label", "class", "target", "category", "y"),
    "split": ("split",),
    "group": ("group", "group_id", "patient", "patient_id"),
    "time": ("time", "timestamp", "date"),
    "weight": ("weight", "sample_weight"),
}
# Of a table of texts. More names than a manifest knows: whatever a manifest does not know, it takes for no column of its own.
TEXT_COLUMNS = {
    "text": (
        "text", "sentence", "review", "content", "message", "document", "comment", "utterance", "body", "tweet", "texts", "sentences",
        "review_text", "reviewtext", "comment_text", "post", "question", "query", "headline", "abstract", "description", "phrase",
        "statement", "sms",
    ),
    "label": (
        *COLUMNS["label"], "sentiment", "topic", "intent", "labels", "emotion", "polarity", "stance", "genre", "tag", "rating", "stars",
    ),
    **{role: COLUMNS[role] for role in ("split", "group", "time", "weight")},
}  # fmt: skip
ROLES = {"image": COLUMNS, "text": TEXT_COLUMNS}
REQUIRED = ("path", "text", "label")
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
HEADER_BYTES = 2**20
CSV_BYTES = 2 * 2**30  # held in memory while it is parsed: what unpacks to more is refused
LINE_BYTES = 128 * 2**20  # of one line of JSON, which is held several times while it is parsed
BLOCK_BYTES = (
    2**23,
    2**27,
    2**31 - 1,
)  # in which a CSV is parsed, one after the other tried until the longest row fits
NAMES_SHOWN = 50  # of the keys of JSON Lines, of which there may be a new one in every line
BATCH = 10_000
SCHEME = r"^[a-zA-Z][a-zA-Z0-9+.\-]*://"
KNOWN_SCHEME = r"^(file:///|s3://[^/]+/.)"
NUMBER = r"^-?(\d+(\.\d*)?|\.\d+)([eE][+\-]?\d+)?$"
REPEATED = "rows that repeat a path"
Where = Callable[[int], str]


def open_manifest(uri: str, reading: Reading = AS_IT_IS) -> DataSource | None:
    """Return the manifest, or the table of texts, at ``uri``, read and checked; None where its name is not a manifest's.

    Raises:
        UserError: it cannot be read, lacks a column, or a row of it cannot be meant; the row is named.
    """
    name = uri.rsplit("/", 1)[-1]
    if not name.lower().endswith(SUFFIXES):
        return None
    remote = uri.startswith("s3://")
    if not remote and ("\0" in uri or ("://" in uri and not uri.startswith("file://"))):
        return None
    if not remote and exists(local_path(uri)) and local_path(uri).is_dir():
        return None
    table, digest = read_manifest(uri, (), reading)
    if table.modality == "auto":
        reading = reading._replace(modality=modality_of_paths(one_line(uri), table.columns["path"]))
        table, digest = read_manifest(uri, (), reading)
    path = None if remote else local_path(uri)
    if table.modality == "text":
        from graftwork.sources.texts import TextTable

        return TextTable(one_line(uri), path.name if path else name, table, digest, uri, reading)
    base = str(path.absolute().parent) if path else uri.rsplit("/", 1)[0]
    return ManifestSource(one_line(uri), path.name if path else name, base, table, digest, uri, reading)


def read_manifest(uri: str, also: Sequence[str] = (), reading: Reading = AS_IT_IS) -> "tuple[Table, str]":
    """Return the columns of the manifest at ``uri`` that are needed, those named in ``also`` as well, and the digest of the file."""
    name = uri.rsplit("/", 1)[-1]
    shown = one_line(uri)
    if uri.startswith("s3://"):
        from graftwork.sources.s3 import read_object

        data = read_object(uri)
        return read_table(shown, name, data, also, reading), hashlib.sha256(data).hexdigest()
    path = local_path(uri)
    try:
        with regular(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            table = read_table(shown, name, file, also, reading)
    except FileNotFoundError:
        raise UserError(f"data {shown}: no such file; check the path") from None
    except OSError as error:
        reason = one_line(error.strerror or error, 120)
        raise UserError(f"data {shown}: cannot be read ({reason}); give a file that you may read") from None
    return table, digest


class Table(NamedTuple):
    """The columns that were found, by role: Arrow arrays of text without blanks at the ends, "" where there is nothing."""

    columns: dict[str, Any]
    where: Where  # names a row, counted from 0 here and from 1 in the name
    lines: Sequence[int] | None = None  # of JSON Lines, the line of each row

    @property
    def modality(self) -> str:
        """ "auto": it has paths and texts, of which the paths alone were read."""
        return "text" if "text" in self.columns else "image" if "label" in self.columns else "auto"


def read_table(shown: str, name: str, file: Any, also: Sequence[str], reading: Reading) -> Table:
    """Read ``file``, bytes or an open file, as its ``name`` says; of Parquet, only the columns that are needed."""
    if name.lower().endswith(".parquet"):
        return read_parquet(shown, io.BytesIO(file) if isinstance(file, bytes) else file, also, reading)
    read = read_lines if name.lower().endswith(LINES) else read_csv
    return read(shown, unpacked(shown, name, file), also, reading)


def modality_of_paths(shown: str, paths: Any) -> str:
    """Return whether a table that has paths and texts is one of images or of texts: by what most of the paths lead to.

    Raises:
        UserError: they have no suffix that tells.
    """
    import pyarrow.compute as pc

    def count(mask: Any) -> int:
        return int(pc.sum(mask).as_py() or 0)

    given = count(pc.not_equal(paths, ""))
    suffix = "|".join(re.escape(suffix) for suffix in sorted(IMAGE_SUFFIXES))
    images = count(pc.match_substring_regex(pc.utf8_lower(paths), rf"({suffix})$"))
    elsewhere = pc.and_(
        pc.match_substring_regex(paths, SCHEME), pc.invert(pc.match_substring_regex(paths, KNOWN_SCHEME))
    )
    others = count(pc.or_(pc.match_substring_regex(paths, r"\.[A-Za-z][A-Za-z0-9]{0,4}$"), elsewhere)) - images
    if 2 * images > given:
        return "image"
    if not given or (not images and 2 * others >= given):
        return "text"
    raise UserError(
        f"data {shown}: has a column of paths and one of texts, and its paths do not tell whether they lead to images; "
        "set modality to image or to text"
    )


class Beside(NamedTuple):
    """What a table says of each row beside its contents: Arrow arrays, None where it has no such column."""

    labels: Any
    splits: Any
    groups: Any
    times: Any
    weights: npt.NDArray[np.float64] | None

    def take(self, rows: npt.NDArray[np.int64]) -> "Beside":
        labels, splits, groups, times = (None if c is None else c.take(rows) for c in self[:4])
        return Beside(labels, splits, groups, times, None if self.weights is None else self.weights[rows])

    def slice(self, start: int, count: int) -> Iterator[tuple[str, str, str, str, float]]:
        """Yield label, split, group, time and weight of rows."""
        columns = ([""] * count if c is None else c.slice(start, count).to_pylist() for c in self[:4])
        weights = [1.0] * count if self.weights is None else self.weights[start : start + count].tolist()
        yield from zip(*columns, weights, strict=True)


def checked_columns(shown: str, table: Table) -> Beside:
    """Return what ``table`` says of each row.

    Raises:
        UserError: a row cannot be meant, and is named; or there are fewer than two classes.
    """
    columns, where = table.columns, table.where
    splits = checked_splits(shown, columns["split"], where) if "split" in columns else None
    weights = checked_weights(shown, columns["weight"], where) if "weight" in columns else None
    times = checked_times(shown, columns["time"], where) if "time" in columns else None
    labels = columns["label"].dictionary_encode()
    check_classes(shown, labels.dictionary.to_pylist())
    return Beside(labels, splits, columns["group"].dictionary_encode() if "group" in columns else None, times, weights)


def own_columns_of(uri: str, names: Sequence[str], digest: str, reading: Reading) -> Table:
    """Read the file again, with columns of the user's own.

    Raises:
        UserError: there is no such column, or the file has changed.
    """
    table, now = read_manifest(uri, names, reading)
    if now != digest:
        raise UserError(f"data {one_line(uri)}: changed while it was read; run again when it is at rest")
    return table


def name_of_file(file_name: str) -> str:
    suffixes = "|".join(re.escape(suffix) for suffix in sorted(SUFFIXES, key=len, reverse=True))
    return printable(re.sub(rf"(?i)({suffixes})$", "", file_name)) or "data"


class ManifestSource:
    """Rows of a manifest. ``base`` is the folder, or the s3:// prefix, that relative paths start from."""

    modality = "image"

    def __init__(
        self,
        shown: str,
        file_name: str,
        base: str,
        table: Table,
        digest: str,
        uri: str,
        reading: Reading = AS_IT_IS,
    ) -> None:
        columns, where = table.columns, table.where
        self._uri = uri
        self._reading = reading
        if not len(columns["path"]):
            raise UserError(f"data {shown}: has a header and no rows; add a row for each example")
        paths = checked_paths(shown, columns["path"], where)
        beside = checked_columns(shown, table)

        self.name = name_of_file(file_name)
        self.base = base
        self._digest = digest
        rows, nth = distinct_rows(paths, beside.labels, beside.splits)
        self._dropped = len(paths) - len(rows)
        self._rows = rows
        self._paths = paths.take(rows)
        self._beside = beside.take(rows)
        self._keys = keys_of_repeated(self._paths, nth)
        self._objects = self._find_objects()
        self.readers = 16 if self._objects else WORKERS

    def _find_objects(self) -> dict[str, Any]:
        """Return what S3 has at every s3:// path of the manifest: the objects, with their versions, or None where there is none."""
        import pyarrow.compute as pc

        remote = pc.starts_with(self._paths, "s3://")
        if self.base.startswith("s3://"):
            elsewhere = pc.or_(pc.starts_with(self._paths, "/"), pc.starts_with(self._paths, "file://"))
            remote = pc.and_(pc.invert(elsewhere), pc.not_equal(self._paths, ""))
        uris = dict.fromkeys(
            uri for path in self._paths.filter(remote).unique().to_pylist() for uri in self._object_uris(path)
        )
        if not uris:
            return {}
        from graftwork.sources.s3 import objects

        return objects(list(uris))

    def _object_uris(self, path: str) -> list[str]:
        """Return where ``path`` may lie on S3: as it is written, then with Windows's separators turned."""
        if path.startswith("s3://"):
            return [path]
        if not self.base.startswith("s3://") or path.startswith(("/", "file://")):
            return []
        return [f"{self.base}/{p}" for p in dict.fromkeys((path, path.replace("\\", "/")))]

    def _content(self, path: str) -> Content:
        if not path:
            return Unreadable("no path")
        if uris := self._object_uris(path):
            found = (self._objects.get(uri) for uri in uris)
            return next((o for o in found if o is not None), Unreadable("no such object"))
        if "\0" in path:
            return Unreadable("no such file")
        if path.startswith("file://"):
            return File(local_path(path))
        file = Path(self.base, path)
        if "\\" in path and not exists(file) and exists(turned := Path(self.base, path.replace("\\", "/"))):
            return File(turned)
        return File(file)

    def fingerprint(self) -> str:
        label = f"\0{self._reading.label_column}" if self._reading.label_column else ""
        digest = hashlib.sha256(f"{self._digest}\0{self.base}{label}\n".encode("utf-8", "surrogateescape"))

        def versions(start: int) -> bytes:
            paths = self._paths.slice(start, BATCH).to_pylist()
            lines = "\n".join(self._content(p).version() for p in paths)
            return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).digest()

        with ThreadPoolExecutor(self.readers) as pool:
            for part in pool.map(versions, range(0, len(self._paths), BATCH)):
                digest.update(part)
        return digest.hexdigest()[:32]

    def records(self) -> Iterator[Record]:
        for start in range(0, len(self._paths), BATCH):
            paths = self._paths.slice(start, BATCH).to_pylist()
            rows = self._rows[start : start + BATCH].tolist()
            beside = self._beside.slice(start, len(paths))
            for n, (path, row, said) in enumerate(zip(paths, rows, beside, strict=True), start):
                label, split, group, time, weight = said
                key = self._keys.get(n, path) or f"(no path, row {row + 1})"
                content = self._content(path) if label or not path else Unreadable("no label")
                yield Record(key, label, split, content, group, time, weight)

    def __len__(self) -> int:
        return len(self._paths)

    def own_columns(self, names: Sequence[str]) -> dict[str, Any]:
        """Return columns of the user's own, by name, an array of text each, in the order of ``records``.

        Raises:
            UserError: there is no such column, or the file has changed.
        """
        table = own_columns_of(self._uri, names, self._digest, self._reading)
        return {name: table.columns[f"own {name}"].take(self._rows) for name in names}

    def skipped(self) -> dict[str, int]:
        return {REPEATED: self._dropped} if self._dropped else {}


# ---- CSV -----------------------------------------------------------------------------------------------------------------------


def unpacked(shown: str, name: str, file: Any) -> bytes:
    """Return the text of ``file``, bytes or an open file, unpacked where its ``name`` says that it is packed."""
    raw = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with gzip.open(raw) if name.lower().endswith(".gz") else raw as stream:
            data: bytes = stream.read(CSV_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"data {shown}: is no whole gzip file ({one_line(error, 120)}); pack it again, or give it unpacked"
        ) from None
    if len(data) > CSV_BYTES:
        raise UserError(f"data {shown}: holds more than {CSV_BYTES >> 30} GiB of text; save it as Parquet")
    return data


def read_csv(shown: str, data: bytes, also: Sequence[str] = (), reading: Reading = AS_IT_IS) -> Table:
    """Parse a CSV file; the separator is the one that yields the columns that are needed."""
    import pyarrow as pa
    import pyarrow.csv

    if data.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
        raise UserError(f"data {shown}: is an Excel file, or another archive, by its contents; save it as CSV in UTF-8")
    data = as_utf8(shown, data)
    if not data.strip():
        raise UserError(f"data {shown}: is empty; its first row must name the columns, path and label at least")
    header = read_header(shown, data, also, reading)
    name_of = {role: str(n) for role, n in header.columns.items()}
    body = pa.py_buffer(data).slice(header.length) if header.length < len(data) else pa.py_buffer(b"\n")
    unusable: list[Any] = []

    def refuse(row: Any) -> str:
        unusable.append(row)
        return "error"

    def parse(threads: bool, block: int) -> Any:
        return pa.csv.read_csv(
            pa.BufferReader(body),
            pa.csv.ReadOptions(
                column_names=[str(n) for n in range(header.width)], use_threads=threads, block_size=block
            ),
            pa.csv.ParseOptions(
                delimiter=header.separator, newlines_in_values=b'"' in data, invalid_row_handler=refuse
            ),
            pa.csv.ConvertOptions(
                include_columns=list(dict.fromkeys(name_of.values())),
                column_types={name: pa.string() for name in name_of.values()},
                strings_can_be_null=False,
            ),
        )

    where = csv_rows(data)
    for block in BLOCK_BYTES:
        try:
            table = parse(True, block)
            break
        except pa.ArrowException as error:
            failure = error
        if "straddling" in str(failure) and block < min(len(data), BLOCK_BYTES[-1]):
            continue  # a row is longer than a block
        if unusable:  # rows are counted only where one thread reads them
            unusable.clear()
            try:
                parse(False, block)
            except pa.ArrowException:
                row = unusable[0]
                raise UserError(
                    f"data {shown}: {where(row.number - 1)} has {row.actual_columns} fields where the header has {row.expected_columns}: "
                    f"'{one_line(row.text, 80)}'; "
                    + (
                        "close the quote that it opens"
                        if row.text.count('"') % 2
                        else f"put quotes around a value that holds a {SEPARATORS[header.separator]}"
                    )
                ) from None
        raise UserError(
            f"data {shown}: is no CSV file that can be parsed ({one_line(failure, 150)}); save it again, as CSV in UTF-8"
        )
    return Table({role: text_column(shown, role, table.column(name)) for role, name in name_of.items()}, where)


def as_utf8(shown: str, data: bytes) -> bytes:
    """Return ``data`` as UTF-8 without a byte order mark; what is neither UTF-8 nor marked as UTF-16 is refused, with the place."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            data = data.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"data {shown}: is marked as UTF-16 and is not, at byte {error.start}; save it as UTF-8"
            ) from None
    data = data.removeprefix(codecs.BOM_UTF8)
    nul = data.find(b"\0")
    if nul >= 0:
        raise UserError(f"data {shown}: holds a NUL byte at byte {nul}{place(data, nul)}; save it as UTF-8 text")
    decoder, step = codecs.getincrementaldecoder("utf-8")(), 2**24
    for start in range(0, len(data) or 1, step):  # in parts: as one string it could take four times the memory
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(data[start : start + step], final=start + step >= len(data))
        except UnicodeDecodeError as error:
            at = start - pending + error.start
            raise UserError(
                f"data {shown}: is not UTF-8 at byte {at}{place(data, at)}, 0x{data[at]:02x}; save it as UTF-8"
            ) from None
    return data


def place(data: bytes, offset: int) -> str:
    """Say which row and line ``offset`` is in; before anything is parsed, a row is known only where no value can span lines."""
    line = data.count(b"\n", 0, offset) + 1
    row = f" ({csv_rows(data)(line - 2)})" if line > 1 and one_row_a_line(data) else f" (line {line})"
    return row if b"\n" in data else ""


def csv_rows(data: bytes) -> Where:
    """Name rows, and their lines where these are certain."""
    return lambda row: f"row {row + 1} (line {row + 2})" if one_row_a_line(data) else f"row {row + 1}"


def one_row_a_line(data: bytes) -> bool:
    blank = data.startswith((b"\n", b"\r\n")) or b"\n\n" in data or b"\n\r\n" in data
    return not blank and b'"' not in data and data.count(b"\r") == data.count(b"\r\n")


class Header(NamedTuple):
    separator: str
    columns: dict[str, int]  # role to position
    width: int
    length: int  # in bytes, with the line's end


def read_header(shown: str, data: bytes, also: Sequence[str] = (), reading: Reading = AS_IT_IS) -> Header:
    """Find the separator and the columns by the first row."""
    text = data[:HEADER_BYTES].decode("utf-8", "ignore")
    failures: list[tuple[int, UserError]] = []
    for separator in SEPARATORS:
        lengths: list[int] = []

        def lines(lengths: list[int] = lengths) -> Iterator[str]:
            for line in io.StringIO(text, newline=""):
                lengths.append(len(line.encode()))
                yield line

        try:
            names = next((row for row in csv.reader(lines(), delimiter=separator) if row), [])
            return Header(separator, find_columns(shown, names, also, reading), len(names), sum(lengths))
        except UserError as error:
            failures.append((len(names), error))
        except csv.Error:  # one field of more than 128 KiB: a quote that is not closed
            continue
    if not failures:
        raise UserError(
            f"data {shown}: its first row has no end; close its quote, or give a file whose first row names the columns"
        )
    raise max(failures, key=lambda failure: failure[0])[1]


def find_columns(shown: str, names: list[str], also: Sequence[str] = (), reading: Reading = AS_IT_IS) -> dict[str, int]:
    """Return the position of the column for each role that has one, and of those named in ``also``, as "own NAME".

    Where there are paths and texts and the user does not say which it is, the paths alone: what they lead to decides.
    """
    plain = [name.strip().lower() for name in names]
    found = one_line(", ".join(f"'{name.strip()}'" for name in names), 200)
    if reading.text_column and reading.text_column == reading.label_column:
        raise UserError(f"setting text_column and label_column are both {one_line(reading.text_column)!r}; give two")
    paths = [n for n, name in enumerate(plain) if name in COLUMNS["path"]]
    texts = [n for n, name in enumerate(plain) if name in TEXT_COLUMNS["text"]]
    modality = reading.modality
    if modality == "auto":
        if paths and texts and not reading.text_column:
            return {"path": paths[0]}
        modality = "text" if texts or reading.text_column else "image"
    roles: dict[str, tuple[str, ...]] = ROLES[modality]
    named: dict[str, int] = {
        role: named_column(shown, role, names, reading) for role in ("text", "label") if role in roles
    }
    columns: dict[str, int] = {}
    for role, aliases in roles.items():
        positions = [n for n, name in enumerate(plain) if name in aliases and n not in named.values()]
        if (position := named.get(role, -1)) >= 0:
            positions = [position]
        if len(positions) > 1:
            several = one_line(", ".join(f"'{names[n].strip()}'" for n in positions))
            way = f"say which with {role}_column" if modality == "text" and role in named else "keep one"
            raise UserError(
                f"data {shown}: {len(positions)} columns could be the {role}: {several}; {way} (columns found: {found})"
            )
        if positions:
            columns[role] = positions[0]
        elif role in REQUIRED:
            wanted = f"{role} ({few(aliases)})"
            if role == "path" and reading.modality == "auto":
                wanted += f" or the text ({few(TEXT_COLUMNS['text'])})"
            way = f", or give {role}_column" if modality == "text" else ""
            raise UserError(
                f"data {shown}: no column for the {wanted} among the columns found: {found}; name it in the first row{way}"
            )
    for name in also:
        if name.strip().lower() not in plain:
            raise UserError(f"setting slices: the manifest has no column '{one_line(name)}' (columns found: {found})")
        columns[f"own {name}"] = plain.index(name.strip().lower())
    return columns


def few(aliases: Sequence[str]) -> str:
    return ", ".join((*aliases[:8], "...") if len(aliases) > 8 else aliases)


def named_column(shown: str, role: str, names: list[str], reading: Reading) -> int:
    """Return the position of the column that the setting for ``role`` names; -1: it names none.

    Raises:
        UserError: there is no such column, or there are several.
    """
    wanted = (reading.text_column if role == "text" else reading.label_column).strip()
    if not wanted:
        return -1
    positions = [n for n, name in enumerate(names) if name.strip() == wanted]
    positions = positions or [n for n, name in enumerate(names) if name.strip().lower() == wanted.lower()]
    if len(positions) == 1:
        return positions[0]
    found = one_line(", ".join(f"'{name.strip()}'" for name in names), 200)
    count = f"{len(positions)} columns" if positions else "no column"
    raise UserError(
        f"data {shown}: has {count} called '{one_line(wanted)}', which {role}_column names (columns found: {found})"
    )


# ---- JSON Lines ----------------------------------------------------------------------------------------------------------------


class TwiceError(ValueError):
    """An object has the same key twice."""


def read_lines(shown: str, data: bytes, also: Sequence[str] = (), reading: Reading = AS_IT_IS) -> Table:
    """Read JSON Lines: an object a line, a key a column; blank lines are passed over, and keys may be missing.

    Python's reader and not Arrow's, which takes dates for times, refuses numbers among texts and does not say which line is broken.

    Raises:
        UserError: a line is broken, holds a key twice, or a list or an object where a text or a label is needed.
    """
    import pyarrow as pa

    data = as_utf8(shown, data)
    if not data.strip():
        raise UserError(f"data {shown}: is empty; give an object a line, with a text and a label at least")
    wanted = {alias for roles in ROLES.values() for aliases in roles.values() for alias in aliases}
    wanted |= {name.strip().lower() for name in (reading.text_column, reading.label_column, *also)}
    parts: dict[str, list[Any]] = {}  # by key, Arrow arrays of what was read before
    values: dict[str, list[str]] = {}  # the same of the batch at hand
    seen: dict[str, None] = {}
    nested: dict[str, tuple[int, str]] = {}  # by key, the first row that holds no single value
    lines = array("Q")
    rows = 0  # before this batch

    def flush() -> None:
        nonlocal rows
        for key, batch in values.items():
            parts[key].append(text_array(batch))
            batch.clear()
        rows = len(lines)

    for number, line in numbered_lines(shown, data):
        row = parse_line(shown, number, line)
        if not row.keys() <= seen.keys():
            for key in row:
                known = key.strip().lower() in wanted
                if known and key not in values:  # a new column: earlier rows have nothing there
                    parts[key] = [pa.repeat(pa.scalar("", pa.large_string()), rows)] if rows else []
                    values[key] = [""] * (len(lines) - rows)
                if known or len(seen) < NAMES_SHOWN:
                    seen[key] = None
        for key, batch in values.items():
            value = row.get(key)
            if isinstance(value, list | dict):
                nested.setdefault(key, (number, "a list" if isinstance(value, list) else "an object"))
                value = None
            batch.append(value if isinstance(value, str) else plain_value(value))
        lines.append(number)
        if len(lines) - rows == BATCH:
            flush()
    flush()
    names = list(seen)
    columns = find_columns(shown, names, also, reading)
    for role, position in columns.items():
        if names[position] in nested:
            number, what = nested[names[position]]
            raise UserError(
                f"data {shown}: line {number}: '{one_line(names[position], 80)}', the column for the {role}, holds {what}; "
                "give text or a number"
            )
    return Table(
        {
            role: text_column(shown, role, pa.chunked_array(parts[names[position]], pa.large_string()))
            for role, position in columns.items()
        },
        lambda row: f"line {lines[row]}",
        lines,
    )


def numbered_lines(shown: str, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers from 1.

    Raises:
        UserError: one is so long that parsing it could take all memory.
    """
    start, number = 0, 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        if end - start > LINE_BYTES:
            raise UserError(
                f"data {shown}: line {number} is {(end - start) >> 20:,} MiB long, more than {LINE_BYTES >> 20}; leave it out"
            )
        line = data[start:end]
        if line.strip():
            yield number, line
        start = end + 1


def parse_line(shown: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode(), object_pairs_hook=without_twice, parse_constant=lambda _: None)
    except TwiceError as error:
        raise UserError(
            f"data {shown}: line {number} holds the key '{one_line(error, 80)}' twice; keep one of them"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error, 100)
        if isinstance(error, json.JSONDecodeError):  # it counts lines of its own
            reason = f"{error.msg} at column {error.colno:,}"
        raise UserError(
            f"data {shown}: line {number} is no JSON ({reason}): '{one_line(line[:200].decode('utf-8', 'ignore'), 60)}'; "
            "write one object a line"
        ) from None
    if not isinstance(row, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(row), "a single value")
        raise UserError(f"data {shown}: line {number} holds {kind}; write one object a line, with a text and a label")
    return row


def without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise TwiceError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def plain_value(value: Any) -> str:
    """Return a number as ``as_text`` does, a truth value as JSON writes it, "" for null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)


def text_array(texts: list[str]) -> Any:
    """Return texts as an Arrow array; half a surrogate pair, which JSON may hold and UTF-8 may not, becomes U+FFFD."""
    import pyarrow as pa

    try:
        return pa.array(texts, pa.large_string())
    except UnicodeEncodeError:
        whole = (text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts)
        return pa.array(list(whole), pa.large_string())


# ---- Parquet -------------------------------------------------------------------------------------------------------------------


def read_parquet(shown: str, file: Any, also: Sequence[str] = (), reading: Reading = AS_IT_IS) -> Table:
    """Read the columns of an open Parquet file that are needed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        columns = find_columns(shown, names, also, reading)
        table = parquet.read(columns=list(dict.fromkeys(names[n] for n in columns.values())))
    except (pa.ArrowException, OSError) as error:
        reason = one_line(str(error).partition("\n")[0], 120)
        raise UserError(
            f"data {shown}: is not Parquet, or is damaged ({reason}); write it again, or copy it again"
        ) from None
    return Table(
        {role: text_column(shown, role, table.column(names[n])) for role, n in columns.items()},
        lambda row: f"row {row + 1}",
    )


def text_column(shown: str, role: str, column: Any) -> Any:
    """Return a column as one array of text, without blanks at the ends, "" for null.

    Raises:
        UserError: it holds what is no single value (a list, a struct), or bytes that are not UTF-8.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        text = pc.utf8_trim_whitespace(pc.fill_null(as_text(column).cast(pa.large_string()), ""))
    except pa.ArrowException as error:
        raise UserError(
            f"data {shown}: the column for the {role} is of type {one_line(column.type, 80)} and cannot be taken as text "
            f"({one_line(str(error).partition(chr(10))[0], 80)}); give text or numbers"
        ) from None
    return pa.concat_arrays(text.chunks) if text.num_chunks else pa.array([], pa.large_string())


def as_text(column: Any) -> Any:
    """Return a column as text: whole numbers without a point, dates as ISO 8601."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, text = column.type, pa.string()
    if pa.types.is_dictionary(kind):
        return as_text(column.cast(kind.value_type))
    if pa.types.is_floating(kind):
        number = column.cast(pa.float64())
        number = pc.if_else(pc.is_nan(number), None, number)  # pandas's sign for "missing"
        whole = pc.fill_null(pc.and_(pc.equal(pc.floor(number), number), pc.less(pc.abs(number), 2.0**53)), False)
        return pc.if_else(whole, pc.if_else(whole, number, 0.0).cast(pa.int64()).cast(text), number.cast(text))
    if pa.types.is_decimal(kind):
        return pc.replace_substring_regex(column.cast(text), r"\.0+$", "")
    if pa.types.is_date(kind):
        return column.cast(pa.date32()).cast(text)
    if pa.types.is_timestamp(kind):
        # Of a column with a time zone, this is the time in UTC.
        moment = column.cast(pa.timestamp("us"), safe=False).cast(text)
        moment = pc.replace_substring_regex(pc.replace_substring(moment, " ", "T"), r"\.0+$", "")
        if kind.tz:
            return pc.binary_join_element_wise(moment, "Z", "")
        return pc.replace_substring_regex(moment, "T00:00:00$", "")
    return column.cast(text)


# ---- checks --------------------------------------------------------------------------------------------------------------------


def first(mask: Any) -> int:
    """Return the position of the first true value; -1: there is none."""
    import pyarrow.compute as pc

    return int(pc.index(mask, True).as_py())


def checked_paths(shown: str, paths: Any, where: Where) -> Any:
    """Return the paths, normalised.

    Raises:
        UserError: one is of a scheme that is not read, or climbs out of the manifest's folder.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    scheme = pc.match_substring_regex(paths, SCHEME)
    bad = first(pc.and_(scheme, pc.invert(pc.match_substring_regex(paths, KNOWN_SCHEME))))
    if bad >= 0:
        raise UserError(
            f"data {shown}: {where(bad)}: '{one_line(paths[bad], 120)}' cannot be read; give a path, file:///path or s3://bucket/key"
        )
    # Few paths, if any, have something to normalise: an empty part, "." or "..".
    odd = pc.match_substring_regex(paths, r"(^|[/\\])\.{0,2}([/\\]|$)")
    relative = pc.invert(pc.or_(scheme, pc.or_(pc.starts_with(paths, "/"), pc.equal(paths, ""))))
    odd = pc.and_(odd, relative)
    positions = np.flatnonzero(odd.to_numpy(zero_copy_only=False))
    if not len(positions):
        return paths
    normal = []
    for position, path in zip(positions, paths.take(positions).to_pylist(), strict=True):
        if os.path.normpath(path.replace("\\", "/")).split("/")[0] == "..":
            raise UserError(
                f"data {shown}: {where(int(position))}: '{one_line(path, 120)}' leads out of the manifest's folder; write an absolute path"
            )
        normal.append(os.path.normpath(path))
    return pc.replace_with_mask(paths, odd, pa.array(normal, paths.type))


def checked_splits(shown: str, splits: Any, where: Where) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    encoded = pc.utf8_lower(splits).dictionary_encode()
    names = encoded.dictionary.to_pylist()
    known = [SPLIT_NAMES.get(name, "" if not name else None) for name in names]
    bad = first(pc.is_in(encoded.indices, pa.array([n for n, k in enumerate(known) if k is None], pa.int32())))
    if bad >= 0:
        raise UserError(
            f"data {shown}: {where(bad)}: split '{one_line(splits[bad], 80)}' is not known; give train, val or test, or leave it empty"
        )
    if "" not in known and "train" not in known:
        raise UserError(f"data {shown}: has rows of {', '.join(sorted(set(names)))} but no row of train; add some")
    return pa.DictionaryArray.from_arrays(encoded.indices, pa.array(known, pa.string()))


def checked_weights(shown: str, weights: Any, where: Where) -> npt.NDArray[np.float64]:
    import pyarrow as pa
    import pyarrow.compute as pc

    weights = pc.if_else(pc.equal(weights, ""), "1", weights)
    number = pc.match_substring_regex(weights, NUMBER)
    values = pc.if_else(number, weights, "nan").cast(pa.float64()).to_numpy()
    good = np.isfinite(values) & (values > 0)
    if not good.all():
        bad = int(np.flatnonzero(~good)[0])
        raise UserError(
            f"data {shown}: {where(bad)}: weight '{one_line(weights[bad], 80)}' is not a number above 0; mend it, or leave it empty for 1"
        )
    return values


def checked_times(shown: str, times: Any, where: Where) -> Any:
    """Return times as text in UTC, all of one form, so that they sort as times do; "" stays.

    Numbers are Unix time (in seconds, or in the finer unit that their size shows); four and eight digits throughout are years and days.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    given = pc.not_equal(times, "")
    numbers = pc.all(pc.or_(pc.match_substring_regex(times, NUMBER), pc.invert(given))).as_py()
    dates = pc.all(pc.or_(pc.match_substring_regex(times, r"^(\d{4}|\d{8})$"), pc.invert(given))).as_py()
    if numbers and not dates:
        values = pc.if_else(given, times, "nan").cast(pa.float64()).to_numpy()
        largest = np.nanmax(np.abs(values), initial=0.0)
        microseconds = values * next(
            (m for limit, m in ((1e11, 1e6), (1e14, 1e3), (1e17, 1.0)) if largest < limit), 1e-3
        )
        known = np.abs(microseconds - 9.5e16) < 1.55e17  # the years 72 to 9892
        moments = pa.array(np.where(known, microseconds, 0).round().astype(np.int64), pa.timestamp("us"))
    else:
        # Finer than microseconds makes pandas hold fewer years; "now" and "today" it would take as well.
        text = pc.replace_substring_regex(times, r"(\.\d{6})\d+", r"\1")
        text = pc.if_else(pc.match_substring_regex(text, r"^\d"), text, None)
        parsed = pd.to_datetime(text.to_pandas(), format="ISO8601", utc=True, errors="coerce")
        known = parsed.notna().to_numpy()
        moments = pa.array(parsed.dt.tz_localize(None)).cast(pa.timestamp("us"), safe=False)
    bad = first(pc.and_(given, pa.array(~known)))
    if bad >= 0:
        raise UserError(
            f"data {shown}: {where(bad)}: time '{one_line(times[bad], 80)}' is not understood; write it as 2024-01-31 or 2024-01-31T12:00:00Z"
        )
    text = pc.binary_join_element_wise(pc.replace_substring(moments.cast(pa.string()), " ", "T"), "Z", "")
    return pc.if_else(given, text, "")


def check_classes(shown: str, labels: list[str]) -> None:
    labels = [label for label in labels if label]
    if not labels:
        raise UserError(f"data {shown}: no row has a label; fill in the column for the label")
    if len(labels) < 2:
        raise UserError(
            f"data {shown}: only one class, '{one_line(labels[0])}'; a classifier needs examples of at least two classes"
        )


# ---- rows that share a path ----------------------------------------------------------------------------------------------------


def distinct_rows(paths: Any, labels: Any, splits: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows that repeat no earlier row's path, label and split, and for each of them how many before it have its path.

    A path under two labels, or in two splits, stays: validation has rules for both, and they name the rows.
    """
    encoded = paths.dictionary_encode()
    path = encoded.indices.to_numpy().astype(np.int64)
    texts = encoded.dictionary
    empty = texts.index("").as_py()
    if empty >= 0:  # rows without a path are no repetition of one another
        path = np.where(path == empty, len(texts) + np.arange(len(path)), path)
    whole = path * len(labels.dictionary) + labels.indices.to_numpy()
    if splits is not None:
        place = splits.dictionary.dictionary_encode().indices.to_numpy()[splits.indices.to_numpy()]
        whole = whole * len(splits.dictionary) + place
    rows = np.sort(np.unique(whole, return_index=True)[1]).astype(np.int64)
    order = np.argsort(path[rows], kind="stable")
    ordered = path[rows][order]
    starts = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    position = np.arange(len(rows))
    nth = np.empty(len(rows), np.int64)
    nth[order] = position - np.maximum.accumulate(np.where(starts, position, 0))
    return rows, nth


def keys_of_repeated(paths: Any, nth: npt.NDArray[np.int64]) -> dict[int, str]:
    """Return a key for each row whose path an earlier row has: ``path (2)``, and so on; a path of that very name is stepped over."""
    positions = np.flatnonzero(nth)
    if not len(positions):
        return {}
    taken = {path for path in paths.to_pylist() if path.endswith(")")}
    keys: dict[int, str] = {}
    for position, path, again in zip(
        positions.tolist(), paths.take(positions).to_pylist(), nth[positions].tolist(), strict=True
    ):
        keys[position] = next(key for n in count(again + 1) if (key := f"{path} ({n})") not in taken)
        taken.add(keys[position])
    return keys
