"""Texts as people and programs hand them over: sentences, files of one text each, rows of a table, strings in JSON, a plain body."""

import codecs
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork.errors import UserError, one_line
from graftwork.modality import BrokenExampleError
from graftwork.predicting import Item, Part
from graftwork.sources.manifest import SUFFIXES as TABLES
from graftwork.sources.manifest import TEXT_COLUMNS
from graftwork.sources.record import MODALITY_OF, Text
from graftwork.texts import Array, Preprocess

if TYPE_CHECKING:
    import pandas as pd

COLUMN = "text"
COLUMN_TYPE = "string"
HEADINGS = ("input", "text")
TABLE_COLUMN = ("text", TEXT_COLUMNS["text"])
TOGETHER = 16  # texts of like length pass the network together, and there must be some to choose from
BODY = "a text as text/plain"
SEND = "text"
SAMPLE = "TEXT"
USE = '["a text to be labelled"]'
ONNX = False
MAX_CHARACTERS = 1_000_000  # of a text, as when a dataset is packed
FILES = (*TABLES, *MODALITY_OF, ".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
PATH = re.compile(r"(\.{1,2}|~)?/\S*[^\s.,;:!?)]|[A-Za-z]:\\\S+")  # of a text without blanks: from a root, or from here
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


# ---- on the command line -------------------------------------------------------------------------------------------------------


def rest(given: str) -> Item | Part:
    """Return the text ``given``, or the named dataset.

    Raises:
        UserError: it is the path of a file that is not there, or nothing at all.
    """
    from graftwork.sources.text_sets import open_text_set

    if looks_like_path(given):
        raise UserError(f"input {one_line(given)}: no such file; check the path")
    source = open_text_set(given)
    if source is not None:
        return Part((Item(f"{given}/{r.key}", r.content) for r in source.records()), len(source), source.readers)
    try:
        return Item("", Text(checked(given)))
    except (ValueError, BrokenExampleError) as error:
        raise UserError(f"input {one_line(given)!r}: {error}; give a text, a file or a folder") from None


def looks_like_path(given: str) -> bool:
    """Tell whether a string is written as only the path of a file is: a text that nobody wrote must not get a label."""
    blank = any(character.isspace() for character in given)
    return not blank and (given.lower().endswith(FILES) or bool(PATH.fullmatch(given)))


def read(item: Item, preprocess: Preprocess) -> tuple[Array, str]:
    text = checked(as_text(item.content.read()))
    return preprocess.example(text.encode()), text


def as_text(data: bytes) -> str:
    """Return the text of a file: UTF-8, UTF-16 where a byte order mark says so, or else Windows-1252.

    Raises:
        BrokenExampleError: it is none of them.
    """
    encoding = next((name for mark, name in BOMS.items() if data.startswith(mark)), "utf-8")
    for name in (encoding, "cp1252") if encoding == "utf-8" else (encoding,):
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            raise BrokenExampleError("not a text")
        return text
    raise BrokenExampleError(f"not {encoding.removesuffix('-sig').upper()}")


def checked(text: str) -> str:
    """Return ``text`` without blanks at its ends, which are no part of it, as when a dataset is packed.

    Raises:
        BrokenExampleError: there is nothing left, or it is too long, or no text that UTF-8 can hold.
    """
    text = text.strip()
    if not text:
        raise BrokenExampleError("empty text")
    if len(text) > MAX_CHARACTERS:
        raise BrokenExampleError(f"{len(text):,} characters, more than {MAX_CHARACTERS:,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BrokenExampleError("holds half a surrogate pair, which is no character") from None
    return text


# ---- over HTTP -----------------------------------------------------------------------------------------------------------------


def is_body(kind: str) -> bool:
    return kind == "text/plain"


def from_body(body: bytes, charset: str) -> str:
    try:
        text = body.decode("utf-8-sig" if codecs.lookup(charset).name == "utf-8" else charset)
    except UnicodeError as error:
        at = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise BrokenExampleError(f"is not {charset.upper()}{at}") from None
    return checked(text)


def check(value: Any) -> str | None:
    return checked(value) if isinstance(value, str) else None


def example(item: str, preprocess: Preprocess) -> Array:
    return preprocess.example(item.encode())


def column(names: list[Any]) -> Any:
    """Return the texts' column: "text", or the only one."""
    if COLUMN not in names and len(names) > 1:
        raise ValueError(f"no column is called '{COLUMN}' ({one_line(', '.join(map(str, names)), 80)})")
    return names[0] if len(names) == 1 else COLUMN


def is_header(names: list[str], followed: bool) -> bool:
    # A text may be as short as a name: without a line of names the first would be lost.
    return COLUMN in names


def samples(preprocess: Preprocess, count: int) -> list[Array]:
    random = np.random.default_rng(0)
    return [preprocess.example(b"some words of a text " * int(n)) for n in random.integers(1, 20, count)]


# ---- to the pyfunc -------------------------------------------------------------------------------------------------------------


def from_table(table: "pd.DataFrame") -> list[Any]:
    return list(table[column(list(table.columns))].tolist())


def from_python(value: Any, preprocess: Preprocess) -> Array:
    """Return the ids of a text, or of a file's bytes; a path is read where it is a ``Path``."""
    if isinstance(value, Path):
        value = value.read_bytes()
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = as_text(bytes(value))
    if not isinstance(value, str):
        raise ValueError(f"is a {type(value).__name__}; give a text")
    return preprocess.example(checked(value).encode())


def example_table() -> "pd.DataFrame":
    """Return two texts as a table."""
    import pandas as pd

    return pd.DataFrame({COLUMN: ["a text to be labelled", "another text"]})


def size_in_words(preprocess: dict[str, Any]) -> str:
    return f"of up to {preprocess['max_length']} tokens"
