"""What a text is like: for packing, validation, drift and slices. See ``graftwork.modality.Looks``.

A text is packed as UTF-8, whatever its file is in, and as it is otherwise: no character is changed.
"""

import contextlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from graftwork.errors import UserError, one_line
from graftwork.modality import Index, Looked, Looker
from graftwork.settings import IngestSettings, ValidateSettings
from graftwork.text_names import INSTALL

if TYPE_CHECKING:
    from graftwork.dataset import Dataset

NOUN = "text"
HINT = "give plain text in UTF-8"
RECIPE = "1"  # of how a text is packed; another number packs everything again
PERMUTATIONS = 64  # of a MinHash: its estimate of a similarity of 0.8 is off by 0.05 (one standard deviation)
SCHEME = "affine32"  # of datasketch's permutations
SHINGLE = 5  # characters of a shingle: short texts have few words, and some scripts have no blanks between them
SIMILAR = 0.8  # share of the shingles that two texts have in common, from which on they are nearly the same one
SIGNATURE = pa.schema(
    [
        (
            "minhash",
            pa.binary(4 * PERMUTATIONS),
        ),  # uint32; Broder 1997, "On the resemblance and containment of documents"
        ("characters", pa.int32()),
        ("words", pa.int32()),
        ("mojibake", pa.int32()),  # places that look as if they were decoded by the wrong encoding
        ("replaced", pa.int32()),  # replacement characters: of what could not be decoded
        ("letters", pa.float32()),  # share of the characters that are letters
    ]
)
LOOKS = ("characters", "words", "mojibake", "replaced", "letters")
COLUMNS = LOOKS
SLICES = ("characters", "words")
SIZE = ("characters", "Length, characters")
EDGES: dict[str, npt.NDArray[np.float64]] = {
    "characters": np.geomspace(1, 2**20, 21),
    "words": np.geomspace(1, 2**18, 19),
    "letters": np.linspace(0, 1, 11),
}
MEASURES = {
    "characters": "lengths of the texts",
    "words": "numbers of words",
    "letters": "shares of letters in the texts",
}
NEAR = "are nearly one in another split"
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class Signature(NamedTuple):
    """A row of ``signatures.parquet``."""

    minhash: bytes
    characters: int
    words: int
    mojibake: int
    replaced: int
    letters: float


def recipe(settings: IngestSettings) -> str:
    return f"text-{RECIPE}-{PERMUTATIONS}-{SHINGLE}-{settings.max_characters}"


@contextmanager
def lookers(settings: IngestSettings, lock: Path) -> Iterator[Looker]:
    """Yield what looks at texts: in this process, since that costs a fraction of a millisecond each."""
    yield Reader(settings.max_characters)


class Reader:
    def __init__(self, max_characters: int) -> None:
        try:
            from datasketch import MinHash
            from ftfy.badness import badness
        except ImportError as error:
            raise UserError(f"text: needs the package {error.name}, which is not installed; {INSTALL}") from None
        self.max_characters = max_characters
        self._badness = badness
        self._minhash = MinHash
        self._first = MinHash(PERMUTATIONS, scheme=SCHEME)

    def look(self, examples: list[bytes]) -> list[Looked | str]:
        return [self._one(data) for data in examples]

    def _one(self, data: bytes) -> Looked | str:
        if len(data) > 4 * self.max_characters + 4:  # no encoding has more bytes a character
            return f"longer than {self.max_characters:,} characters"
        found = decoded(data)
        if isinstance(found, str):
            return found
        text, encoding = found.text, found.encoding
        if not text.strip():
            return "empty text"
        if "\0" in text:
            return "holds a NUL character: no text"
        if len(text) > self.max_characters:
            return f"longer than {self.max_characters:,} characters"
        plain = text.encode("utf-8")
        letters = sum(map(str.isalpha, text)) / len(text)
        looks = Signature(
            self.minhash(text), len(text), len(text.split()), int(self._badness(text)), text.count("\ufffd"), letters
        )
        return Looked(len(text), text.count("\n") + 1, encoding, ".txt", plain if plain != data else None, looks)

    def minhash(self, text: str) -> bytes:
        """Return the MinHash of a text's shingles, its case and blanks left out of account."""
        made = self._minhash(PERMUTATIONS, permutations=self._first.permutations, scheme=SCHEME)
        made.update_batch([shingle.encode() for shingle in shingles(text)])
        return np.ascontiguousarray(made.hashvalues, np.uint32).tobytes()


class Decoded(NamedTuple):
    text: str
    encoding: str  # by which it was decoded


def decoded(data: bytes) -> Decoded | str:
    """Return a file's text and its encoding, or why it is none: UTF-8, what its byte order mark names, else Windows's Latin-1."""
    encoding = next((name for mark, name in BOMS if data.startswith(mark)), "utf-8")
    try:
        return Decoded(data.decode(encoding), encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            return f"not {encoding.upper()} (byte {error.start})"
        place = error.start
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode("cp1252")
        if not CONTROL.search(text):
            return Decoded(text, "cp1252")
    return f"not text (byte {place} is no UTF-8)"


def shingles(text: str) -> set[str]:
    plain = " ".join(text.casefold().split())
    return {plain[n : n + SHINGLE] for n in range(max(1, len(plain) - SHINGLE + 1))}


def measures(dataset: "Dataset") -> dict[str, npt.NDArray[Any]]:
    signatures = dataset.signatures(list(EDGES))
    return {name: signatures[name].to_numpy() for name in EDGES}


def columns(dataset: "Dataset", rows: pa.Table) -> pd.DataFrame:
    """Return ``COLUMNS`` of ``rows``."""
    return dataset._replace(manifest=rows).signatures(list(LOOKS)).to_pandas()


def near_duplicates(dataset: "Dataset", split: Index, content: Index) -> tuple[Index, Index]:
    """Return rows whose text is nearly that of a row of another split, each once, and that row; the most alike first.

    By locality-sensitive hashing of the MinHashes (Indyk and Motwani 1998), and what it finds by their share of equal values.
    """
    from datasketch import MinHash, MinHashLSH

    values = dataset.signature_bytes({"minhash": 4 * PERMUTATIONS})["minhash"].view(np.uint32)
    first = MinHash(PERMUTATIONS, scheme=SCHEME)
    index = MinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS)
    _, once = np.unique(content, return_index=True)  # equal contents are another rule's
    made = {
        int(n): MinHash(PERMUTATIONS, permutations=first.permutations, hashvalues=values[n], scheme=SCHEME)
        for n in once
    }
    with index.insertion_session() as session:
        for row, minhash in made.items():
            session.insert(row, minhash, check_duplication=False)
    of_content: dict[int, list[int]] = {}
    for row, one in enumerate(content.tolist()):
        of_content.setdefault(one, []).append(row)
    best: dict[int, tuple[float, int]] = {}
    for row, minhash in made.items():
        for other in index.query(minhash):
            alike = float((values[row] == values[other]).mean()) if other > row else 0.0
            if alike < SIMILAR:
                continue
            for mine in of_content[int(content[row])]:
                for theirs in of_content[int(content[other])]:
                    if split[mine] != split[theirs]:
                        for a, b in ((mine, theirs), (theirs, mine)):
                            if alike > best.get(a, (0.0, 0))[0]:
                                best[a] = (alike, b)
    order = sorted(best, key=lambda row: (-best[row][0], row))
    return np.array(order, np.int64), np.array([best[row][1] for row in order], np.int64)


def rules(examples: pd.DataFrame, settings: ValidateSettings, rule: Any, rows: Any) -> list[Any]:
    import great_expectations.expectations as gxe

    between = gxe.ExpectColumnValuesToBeBetween
    return [
        rule(
            "short",
            "warning",
            "examples",
            between(column="characters", min_value=settings.min_characters),
            f"{{count}} texts have fewer than {settings.min_characters} characters ({{examples}})",
            rows(examples["characters"] < settings.min_characters, "characters"),
        ),
        rule(
            "long",
            "warning",
            "examples",
            between(column="characters", max_value=settings.long_text),
            f"{{count}} texts have more than {settings.long_text:,} characters ({{examples}}): the network sees the beginning alone; cut them into parts",
            rows(examples["characters"] > settings.long_text, "characters", descending=True),
        ),
        rule(
            "encoding",
            "warning",
            "examples",
            gxe.ExpectColumnValuesToBeInSet(column="mode", value_set=["utf-8", "utf-8-sig", "utf-16"]),
            "{count} texts are no UTF-8 and were read as Windows-1252 ({examples}): see that their letters are right, and save them as UTF-8",
            rows(examples["mode"] == "cp1252"),
        ),
        rule(
            "mojibake",
            "warning",
            "examples",
            between(column="mojibake", max_value=0),
            "{count} texts have letters as of a wrong encoding, like Ã© for é ({examples}); decode the source rightly, or mend them with ftfy",
            rows(examples["mojibake"] > 0, "mojibake", descending=True),
        ),
        rule(
            "replaced",
            "warning",
            "examples",
            between(column="replaced", max_value=0),
            "{count} texts have replacement characters in place of what could not be decoded ({examples}); decode the source rightly",
            rows(examples["replaced"] > 0, "replaced", descending=True),
        ),
    ]


def card(dataset: "Dataset", row: int, most: int = 300) -> dict[str, str]:
    """Return the beginning of the text in a row of the manifest; "" if it cannot be read."""
    try:
        text = next(dataset.read(dataset.manifest.slice(row, 1))).decode("utf-8", "replace")
    except OSError:
        return {"text": ""}
    return {"text": one_line(text, most)}
