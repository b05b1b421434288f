"""A table of texts: a row an example, the text itself in one column and its label in another (CSV, TSV, Parquet, JSON Lines).

``graftwork.sources.manifest`` reads the table and tells it from a manifest, whose rows name files. The texts stay in Arrow's columns, each
distinct one once.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from graftwork.errors import UserError, one_line
from graftwork.parallel import WORKERS
from graftwork.sources.manifest import (
    BATCH,
    NUMBER,
    Beside,
    Table,
    checked_columns,
    distinct_rows,
    name_of_file,
    own_columns_of,
)
from graftwork.sources.record import Content, Reading, Record, Text, Unreadable, printable

REPEATED = "rows that repeat a text"
FEW_ROWS = 20  # up to which a table may have a class a row: somebody tries something out
ONE_EACH = 0.9  # classes by rows from which a column is no label: a number of the row, a measurement
DATE = r"^\d{4}-\d{2}-\d{2}([T ][0-9:.]+(Z|[+-][0-9:]+)?)?$"


class TextTable:
    """Rows that are texts; blanks at a text's ends are no part of it."""

    modality = "text"
    readers = WORKERS

    def __init__(self, shown: str, file_name: str, table: Table, digest: str, uri: str, reading: Reading) -> None:
        import pyarrow.compute as pc

        self._uri, self._digest, self._reading = uri, digest, reading
        self._lines = table.lines  # not ``where``, which may hold the whole file
        self._file = printable(file_name)
        self.name = name_of_file(file_name)
        if not len(table.columns["text"]):
            raise UserError(f"data {shown}: has a header and no rows; add a row for each example")
        beside = checked_columns(shown, table)
        texts = table.columns.pop("text").dictionary_encode()
        check_texts(shown, texts, beside, reading)
        rows, _ = distinct_rows(texts, beside.labels, beside.splits)
        self._dropped = len(texts) - len(rows)
        self._rows = rows
        self._beside = beside.take(rows) if self._dropped else beside
        self._texts = texts.take(rows) if self._dropped else texts
        # Texts that are too long are few, and reported by their length: they need not be taken out of Arrow for it.
        lengths = pc.utf8_length(self._texts.dictionary).to_numpy()
        codes = np.flatnonzero(lengths > reading.max_characters)
        self._too_long = dict(zip(codes.tolist(), lengths[codes].tolist(), strict=True))

    def fingerprint(self) -> str:
        said = "\0".join((self._digest, *map(str, self._reading)))
        return hashlib.sha256(said.encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def records(self) -> Iterator[Record]:
        for start in range(0, len(self._texts), BATCH):
            part = self._texts.slice(start, BATCH)
            codes = part.indices.to_pylist()
            texts = self._load(codes)
            rows = self._rows[start : start + BATCH].tolist()
            beside = self._beside.slice(start, len(codes))
            for code, row, (label, split, group, time, weight) in zip(codes, rows, beside, strict=True):
                key = f"{self._file} row {row + 1}" if self._lines is None else f"{self._file} line {self._lines[row]}"
                yield Record(key, label, split, self._content(code, texts, label), group, time, weight)

    def _load(self, codes: list[int]) -> dict[int, str]:
        import pyarrow as pa

        wanted = [code for code in dict.fromkeys(codes) if code not in self._too_long]
        found = self._texts.dictionary.take(pa.array(wanted, pa.int64())).to_pylist()
        return dict(zip(wanted, found, strict=True))

    def _content(self, code: int, texts: dict[int, str], label: str) -> Content:
        if code in self._too_long:
            most = self._reading.max_characters
            return Unreadable(f"{self._too_long[code]:,} characters, more than max_characters = {most:,}")
        text = texts[code]
        if not text:
            return Unreadable("empty text")
        return Text(text) if label else Unreadable("no label")

    def __len__(self) -> int:
        return len(self._texts)

    def own_columns(self, names: Sequence[str]) -> dict[str, Any]:
        """Return columns of the user's own, by name, an array of text each, in the order of ``records``.

        Raises:
            UserError: there is no such column, or the file has changed.
        """
        table = own_columns_of(self._uri, names, self._digest, self._reading)
        return {name: table.columns[f"own {name}"].take(self._rows) for name in names}

    def skipped(self) -> dict[str, int]:
        return {REPEATED: self._dropped} if self._dropped else {}


def check_texts(shown: str, texts: Any, beside: Beside, reading: Reading) -> None:
    """Refuse columns that are not what they were taken for: texts that are labels, numbers or dates, labels that are texts or numbers.

    Raises:
        UserError: what the column holds, and which setting names another.
    """
    import pyarrow.compute as pc

    labels = beside.labels
    rows = len(texts)
    distinct, classes = texts.dictionary, labels.dictionary
    length, length_of_label = (pc.mean(pc.utf8_length(column)).as_py() or 0.0 for column in (distinct, classes))
    if rows > 3 and len(classes) >= 2 * len(distinct) and length_of_label > 2 * length:
        raise UserError(
            f"data {shown}: the columns seem to be swapped: the one for the label holds {len(classes):,} different texts, as "
            f"'{one_line(classes[0], 40)}', the one for the text {len(distinct):,} short ones, as '{one_line(distinct[0], 40)}'; "
            "set text_column and label_column"
        )
    given = distinct.filter(pc.not_equal(distinct, ""))
    if not len(given):
        raise UserError(f"data {shown}: no row has a text; fill in the column for the text, or set text_column")
    for pattern, what in ((NUMBER, "numbers"), (DATE, "dates")):
        if not reading.text_column and pc.all(pc.match_substring_regex(given, pattern)).as_py():
            raise UserError(
                f"data {shown}: the column for the text holds nothing but {what}, as '{one_line(given[0], 40)}'; "
                "set text_column to the one that holds the texts"
            )
    labelled = rows - (labels.null_count + int(pc.sum(pc.equal(labels.dictionary_decode(), "")).as_py() or 0))
    if rows > FEW_ROWS and len(classes) > ONE_EACH * labelled:
        raise UserError(
            f"data {shown}: the column for the label holds {len(classes):,} different values in {labelled:,} rows, as "
            f"'{one_line(classes[0], 40)}' and '{one_line(classes[1], 40)}': nothing to learn a class from; "
            "set label_column to the one that holds the classes"
        )
