"""What every source shares: the record, the ways its contents are held, and the words for splits, image files and text files."""

import contextlib
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
    ".tga", ".jp2", ".j2k", ".ico", ".avif",
}  # fmt: skip
TEXT_SUFFIXES = {".txt", ".text"}
SUFFIXES = {"image": IMAGE_SUFFIXES, "text": TEXT_SUFFIXES}
MODALITY_OF = {suffix: modality for modality, suffixes in SUFFIXES.items() for suffix in suffixes}
NOUNS = {"image": "images", "text": "texts"}
# Names, without suffix, of texts that say something of the data beside them and are none of it.
NOTES = {
    "authors", "changelog", "changes", "citation", "classes", "contributors", "copying", "copyright", "credits", "labels",
    "licence", "license", "metadata", "notes", "notice", "readme", "read_me", "sources", "todo", "version",
}  # fmt: skip
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
OUTSIDE = {modality: f"{noun} outside a class folder" for modality, noun in NOUNS.items()}


class Reading(NamedTuple):
    """What the user says of how a source is to be read: the settings of these names. The defaults leave it to the source."""

    modality: str = "auto"  # or "image", "text"
    text_column: str = ""  # of a table; "": by its name
    label_column: str = ""
    max_characters: int = 1_000_000

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Return what ``settings``, which may hold others, say of it."""
        return cls(**{name: settings[name] for name in cls._fields if name in settings})


AS_IT_IS = Reading()


class Content(Protocol):
    """An example's contents, not read yet. Small, and safe to read from any thread."""

    @property
    def suffix(self) -> str:
        """The file name's suffix, in small letters, with the dot."""

    def version(self) -> str:
        """Return what changes whenever the contents may have changed (size and time, an ETag), without reading them; "" if unknown."""

    def read(self) -> bytes:
        """Return the encoded example. OSError: this one cannot be read. UserError: nothing of the source can."""

    def sha256(self) -> str:
        """Return the SHA-256 of the contents in hex: equal examples have equal hashes whatever they are called."""


class Record(NamedTuple):
    """One labelled example, not read yet."""

    key: str  # unique in the source and printable; a relative path, for files
    label: str
    split: str  # "train", "val" or "test" where the source says, else ""
    content: Content
    group: str = ""  # examples of one group (a patient, a video) stay in one split; "": of none
    time: str = ""  # sorts as text, as ISO 8601 does; "": unknown
    weight: float = 1.0  # in training


class DataSource(Protocol):
    """What ``ingest`` needs of a source."""

    modality: str  # of all its examples: "image" or "text"
    name: str  # printable; names the dataset, and the registered model where no other name is given
    readers: int  # threads that read at once: the cores for a disk, more where waiting is most of the time

    def fingerprint(self) -> str:
        """Return what changes whenever the source's contents may have changed; cheap: no example is read."""

    def records(self) -> Iterator[Record]:
        """Yield every example, in an order that does not change from run to run."""

    def __len__(self) -> int:
        """Return the number of records, for a progress bar."""

    def skipped(self) -> dict[str, int]:
        """Count the files that ``records`` passed over because they are no examples, by suffix."""


class File(NamedTuple):
    """Contents in a file of this machine."""

    path: Path

    @property
    def suffix(self) -> str:
        return self.path.suffix.lower()

    def version(self) -> str:
        try:
            status = self.path.stat()
        except OSError:  # a dangling link: it is reported as broken when it is read
            return "missing"
        return f"{status.st_size}-{status.st_mtime_ns}"

    def read(self) -> bytes:
        return regular(self.path).read_bytes()

    def sha256(self) -> str:
        with regular(self.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class Pixels(NamedTuple):
    """Contents that are pixels in memory, of shape (H, W) or (H, W, 3), uint8."""

    array: npt.NDArray[np.uint8]

    @property
    def suffix(self) -> str:
        return ".png"

    def version(self) -> str:
        return ""

    def read(self) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.array).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def sha256(self) -> str:
        return hashlib.sha256(self.array.tobytes()).hexdigest()


class Text(NamedTuple):
    """Contents that are a text in memory."""

    text: str

    @property
    def suffix(self) -> str:
        return ".txt"

    def version(self) -> str:
        return ""

    def read(self) -> bytes:
        return self.text.encode()

    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


class Unreadable(NamedTuple):
    """Contents that are known beforehand to be missing: the example is reported, with ``reason``, and left out."""

    reason: str

    @property
    def suffix(self) -> str:
        return ""

    def version(self) -> str:
        return ""

    def read(self) -> bytes:
        raise OSError(self.reason)

    def sha256(self) -> str:
        raise OSError(self.reason)


def load(content: Content) -> tuple[bytes, str]:
    """Return the encoded example and its SHA-256, with one read."""
    data = content.read()
    return data, content.sha256() if isinstance(content, Pixels) else hashlib.sha256(data).hexdigest()


def regular(path: Path) -> Path:
    """Return ``path``; OSError where opening it could wait for ever (a pipe, a socket, a device)."""
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")
    return path


def printable(name: str) -> str:
    """Return a file name as text that UTF-8 can hold: bytes that are no UTF-8 are shown as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def local_path(uri: str) -> Path:
    """Return the path that ``uri`` (a path, ``~/path`` or ``file://path``) names; it need not exist."""
    plain = uri.removeprefix("file://")
    path = Path(plain)
    if uri.startswith("file://") and not exists(path):  # a URI proper, with escapes
        path = Path(unquote(plain))
    with contextlib.suppress(RuntimeError):  # "~name" of no user: there is no such folder
        path = path.expanduser()
    return path


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # what no path can be (too long, a NUL byte)
        return False


def modality_of(path: str) -> str:
    """Return "image" or "text" by the suffix of a file's name or path; "": neither."""
    return MODALITY_OF.get(os.path.splitext(path)[1].lower(), "")  # noqa: PTH122 - a Path each for millions takes seconds


def settle(paths: Callable[[], Iterable[str]], modality: str = "auto") -> str:
    """Return the modality of a tree that has files at ``paths()``, of which those count that lie in a folder; "image" where it has neither.

    Images in two folders or more are what is meant, whatever texts lie beside them: captions, boxes, tags. Where there are fewer, images go
    before texts unless there are more texts. A text called like an image beside it belongs to the image, and a README or a licence to the whole:
    neither counts.
    """
    if modality != "auto":
        return modality
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for path in paths():
        kind = modality_of(path)
        if kind and not path.startswith(".") and "/." not in path and not (kind == "text" and is_note(path)):
            (inside if "/" in path else outside)[kind] += 1
    if not inside["image"]:
        return "text" if inside["text"] or (outside["text"] and not outside["image"]) else "image"
    images = {path.rpartition(".")[0] for path in paths() if modality_of(path) == "image"}
    if inside["text"] <= inside["image"] or len({path.rpartition("/")[0] for path in images if "/" in path}) > 1:
        return "image"
    texts = (path for path in paths() if modality_of(path) == "text" and "/" in path and not is_note(path))
    own = sum(path.rpartition(".")[0] not in images for path in texts)
    return "text" if own > inside["image"] else "image"


def is_note(path: str) -> bool:
    return path.rpartition("/")[2].rpartition(".")[0].lower() in NOTES


class Member(NamedTuple):
    """Where a file in a tree of folders belongs."""

    label: str
    split: str


class Layout:
    """Sort the files of a tree by their paths: ``CLASS/*.jpg``, or ``train|val|test/CLASS/*.jpg``, judged by the top folders.

    Sub-folders of a class belong to it; hidden files are passed over; what is of another modality, or of none, is counted in ``skipped``.
    """

    def __init__(self, top_folders: list[str], modality: str = "image") -> None:
        """``modality``: "auto" takes the files of any."""
        self.modality = modality
        self.suffixes = MODALITY_OF.keys() if modality == "auto" else SUFFIXES[modality]
        self.split_of = {c: SPLIT_NAMES[c.lower()] for c in top_folders if c.lower() in SPLIT_NAMES}
        self.given_splits = bool(self.split_of) and len(self.split_of) == len(top_folders)
        self.others = [c for c in top_folders if c not in self.split_of]
        self.skipped: dict[str, int] = {}

    def place(self, parts: tuple[str, ...]) -> Member | None:
        """Return where the file whose path has these ``parts`` (folders, then name) belongs; None: it is passed over."""
        *folders, name = parts
        if name.startswith(".") or name == "Thumbs.db" or any(f.startswith(".") or f == "__MACOSX" for f in folders):
            return None
        suffix = Path(name).suffix.lower()
        depth = 1 if self.given_splits else 0
        if suffix not in self.suffixes or len(folders) <= depth:
            kind = OUTSIDE[MODALITY_OF[suffix]] if suffix in self.suffixes else printable(suffix) or "no suffix"
            self.skipped[kind] = self.skipped.get(kind, 0) + 1
            return None
        return Member(printable(folders[depth]), self.split_of[folders[0]] if depth else "")


def check_layout(shown: str, layout: Layout, labels: set[str], files: int) -> None:
    """Refuse a tree of folders that is no labelled set; ``shown`` is its URI.

    Raises:
        UserError: no examples, no train folder, or fewer than two classes.
    """
    from graftwork.errors import UserError, one_line

    noun = NOUNS[layout.modality]
    example = {"image": "photo.jpg", "text": "review.txt"}[layout.modality]
    if not layout.given_splits and len(layout.split_of) > 1 and "train" in layout.split_of.values():
        raise UserError(
            f"data {shown}: has {', '.join(layout.split_of)} beside {one_line(', '.join(layout.others[:3]), 80)}: are those splits or classes? "
            "Move what is no split elsewhere, or rename it"
        )
    if layout.given_splits and "train" not in layout.split_of.values():
        raise UserError(
            f"data {shown}: has {', '.join(layout.split_of)} but no train folder; add train/CLASS/*{Path(example).suffix}"
        )
    if not files:
        outside = layout.skipped.pop(OUTSIDE[layout.modality], 0)
        hint = f" in class folders ({outside} lie outside a class folder)" if outside else ""
        hint = hint or (
            f" ({sum(layout.skipped.values())} files there have no {layout.modality} suffix)" if layout.skipped else ""
        )
        raise UserError(f"data {shown}: no {noun} found{hint}; put them in one folder a class, as CLASS/{example}")
    if len(labels) < 2:
        raise UserError(
            f"data {shown}: only one class, '{one_line(next(iter(labels)))}'; a classifier needs {noun} in at least two class folders"
        )
