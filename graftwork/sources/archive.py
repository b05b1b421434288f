"""Archives: a ``.zip`` or a ``.tar``, plain or compressed, that holds ``CLASS/*.jpg``, or ``train|val|test/CLASS/*.jpg``; or texts, ``*.txt``.

Nothing is unpacked under a member's name. A zip and a plain tar are read in place, at offsets; a compressed tar has no offsets, so its files
are unpacked once into one nameless temporary file. An archive is somebody else's input: sizes, counts and paths in it are checked, not believed.

One top folder that everything shares is not a class (``photos/cat/1.jpg``: the class is ``cat``) and is left out of the keys. It stays where it
is itself the class (``cat/1.jpg``) or the split (``train/cat/1.jpg``), but not where it only has a split's name (``test/train/cat/1.jpg``).
"""

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import weakref
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, Self

import numpy as np
import numpy.typing as npt

from graftwork.errors import UserError, one_line
from graftwork.parallel import WORKERS
from graftwork.sources.record import (
    AS_IT_IS,
    NOUNS,
    SPLIT_NAMES,
    DataSource,
    Layout,
    Member,
    Reading,
    Record,
    check_layout,
    local_path,
    modality_of,
    printable,
    regular,
    settle,
)

SUFFIXES = (
    ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar", ".zip",
)  # fmt: skip
MAX_ENTRIES = 5_000_000
MAX_MEMBER_BYTES = 512 * 2**20
MAX_TOTAL_BYTES = 2**40  # of all images, unpacked
MAX_RATIO = 200  # unpacked to packed; blank bitmaps reach 100, a bomb 1,000
SMALL_TOTAL_BYTES = 2 * 2**30  # below it the ratio does no harm
MAX_PATH_BYTES = 4096
MAX_HEADER_BYTES = 2**20  # of one long name or extended header in a tar
MAX_DICTIONARY_BYTES = 128 * 2**20  # that LZMA may ask for
SPARE_BYTES = 512 * 2**20  # left free on the disk that a compressed tar is unpacked to
CHUNK = 2**20

LINKS, UNSAFE, SPECIAL = "links in the archive", "unsafe paths in the archive", "special files in the archive"
SPARSE, TWICE = "sparse files in the archive", "duplicate names in the archive"
DAMAGED = "damaged in the archive"


def open_archive(uri: str, reading: Reading = AS_IT_IS) -> DataSource | None:
    """Return the archive at ``uri``: a path, ``file://`` or ``s3://``, the last copied to the cache folder first.

    A file with another suffix is taken as well where it holds a zip or a tar.
    """
    named = uri.lower().endswith(SUFFIXES)
    if uri.startswith("s3://"):
        return fetch(uri, reading.modality) if named else None
    if "://" in uri and not uri.startswith("file://"):
        return None
    path, shown = local_path(uri), one_line(uri)
    try:
        if path.is_dir() or not (named or path.is_file()):
            return None
        opened = Opened.at(path, shown)
        kind = kind_of(opened)
        if not named and not kind:
            return None
        return ArchiveSource(opened, kind, stem(path.name), str(path.resolve()), opened.version, reading.modality)
    except FileNotFoundError:
        raise UserError(f"data {shown}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        if not named:
            return None
        raise UserError(
            f"data {shown}: cannot be read ({getattr(error, 'strerror', None) or one_line(error)}); give an archive that you may read"
        ) from None


def fetch(uri: str, modality: str = "auto") -> DataSource:
    """Open an archive at ``s3://``, by its copy in the cache folder, of which there is one an address: that of the newest version."""
    from graftwork.sources.arrays import cache_folder
    from graftwork.sources.s3 import download, object_version

    version = object_version(uri)
    name = uri.rpartition("/")[2]
    folder = cache_folder() / "archives" / hashlib.sha256(uri.encode()).hexdigest()[:24]
    copy = folder / hashlib.sha256(version.encode()).hexdigest()[:24]
    shown = one_line(uri)
    try:
        if not copy.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as partial:
                download(uri, Path(partial) / "archive")
                (Path(partial) / "archive").replace(copy)
            for other in folder.iterdir():  # a run that reads an older one has it open, and keeps it
                if other.is_file() and other != copy:
                    other.unlink(missing_ok=True)
        opened = Opened.at(copy, shown)
    except OSError as error:
        raise UserError(
            f"data {shown}: cannot be copied to {one_line(folder)} ({error.strerror or one_line(error)}); make room there, or set XDG_CACHE_HOME"
        ) from None
    return ArchiveSource(opened, kind_of(opened), stem(name), uri, version, modality)


def stem(name: str) -> str:
    """Return an archive's file name without its suffixes, printable."""
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), Path(name).suffix)
    return printable(name.removesuffix(name[len(name) - len(suffix) :]) if suffix else name) or "data"


class ArchiveSource:
    """The images, or the texts, of an archive, in the order in which they lie in it; hidden files are passed over, as are links and unsafe paths."""

    readers = WORKERS

    def __init__(
        self, opened: "Opened", kind: str, name: str, place: str, version: str, modality: str = "auto"
    ) -> None:
        """``kind`` as ``kind_of`` returns it; ``place`` and ``version`` say which archive this is, wherever its copy lies.

        Raises:
            UserError: not an archive, damaged, cut off, encrypted, made to do harm, or no labelled set of at least two classes.
        """
        shown = opened.shown
        if not kind:
            refuse_what_is_no_archive(opened)
        self.name = name
        self._place, self._version = place, version
        table = Table(shown, modality)
        if kind == "zip":
            list_zip(opened, table)
            self._contents = opened
        else:
            self._contents = list_tar(opened, kind, table)
        if not table.entries:
            raise UserError(f"data {shown}: is an empty archive; check how it was made")
        self._zip = kind == "zip"
        self._passed = table.passed
        self._layout, self._images = table.finish()
        self.modality = self._layout.modality
        if not self._images.paths and self._passed:
            counts = ", ".join(f"{n:,} {what}" for what, n in sorted(self._passed.items()))
            raise UserError(
                f"data {shown}: no {NOUNS[self.modality]} that may be used ({counts}); "
                f"archive the folder that holds one folder of {NOUNS[self.modality]} a class, by relative paths"
            )
        check_layout(shown, self._layout, {m.label for m in self._images.members}, len(self._images.paths))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._place}\0{self._version}".encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._images.paths)

    def records(self) -> Iterator[Record]:
        images = self._images
        for n, path in enumerate(images.paths):
            offset, size = int(images.offsets[n]), int(images.sizes[n])
            suffix = Path(path).suffix.lower()
            content: ZipMember | TarMember = (
                ZipMember(
                    self._contents,
                    suffix,
                    offset,
                    size,
                    int(images.packed[n]),
                    int(images.crcs[n]),
                    int(images.methods[n]),
                )
                if self._zip
                else TarMember(self._contents, suffix, offset, size, self._version)
            )
            member = images.members[images.codes[n]]
            yield Record(printable(path), member.label, member.split, content)

    def skipped(self) -> dict[str, int]:
        return {**self._layout.skipped, **self._passed}


# ---- contents ------------------------------------------------------------------------------------------------------------------


class Opened:
    """An open file, read at offsets by many threads at once. It is closed when nothing refers to it any more."""

    def __init__(self, descriptor: int, shown: str) -> None:
        weakref.finalize(self, os.close, descriptor)
        self.descriptor = descriptor
        self.shown = shown
        status = os.fstat(descriptor)
        self.size = status.st_size
        self._state = (status.st_size, status.st_mtime_ns)
        self.version = f"{status.st_size}-{status.st_mtime_ns}"

    @classmethod
    def at(cls, path: Path, shown: str) -> Self:
        """Open ``path``. OSError: it is missing, no regular file, or may not be read."""
        return cls(os.open(regular(path), os.O_RDONLY | os.O_CLOEXEC), shown)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes at ``offset``. OSError: they are not all there. UserError: the file was changed since it was opened."""
        status = os.fstat(self.descriptor)
        if (status.st_size, status.st_mtime_ns) != self._state:
            raise UserError(f"data {self.shown}: changed while it was read; run again when the file is at rest")
        if offset + size > self.size:  # before the memory for it is taken
            raise OSError(DAMAGED)
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self.descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(DAMAGED)
            data += more
        return data

    @contextlib.contextmanager
    def from_start(self, buffer: int = 8192) -> Iterator[BinaryIO]:
        """Yield the file to be read through, front to back; one at a time."""
        with os.fdopen(os.dup(self.descriptor), "rb", buffer) as file:
            file.seek(0)
            yield file


class TarMember(NamedTuple):
    """Contents that lie as they are in a tar, or in what a compressed tar was unpacked to."""

    opened: Opened
    suffix: str
    offset: int
    size: int
    archive: str  # its version

    def version(self) -> str:
        return f"{self.archive}-{self.offset}"

    def read(self) -> bytes:
        if self.size > MAX_MEMBER_BYTES:
            raise OSError(f"larger than {amount(MAX_MEMBER_BYTES)}")
        return self.opened.read(self.offset, self.size)

    def sha256(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()


class ZipMember(NamedTuple):
    """Contents that lie in a zip; ``offset`` of the local header, ``packed`` bytes after it."""

    opened: Opened
    suffix: str
    offset: int
    size: int
    packed: int
    crc: int
    method: int

    def version(self) -> str:
        return f"{self.crc:08x}-{self.size}"

    def read(self) -> bytes:
        if max(self.size, self.packed - CHUNK) > MAX_MEMBER_BYTES:
            raise OSError(f"larger than {amount(MAX_MEMBER_BYTES)}")
        if self.method == OUT_OF_PLACE:
            raise OSError(DAMAGED)
        signature, method, name, extra = LOCAL.unpack(self.opened.read(self.offset, LOCAL.size))
        if signature != b"PK\3\4" or method != self.method:
            raise OSError(DAMAGED)
        data = self.opened.read(self.offset + LOCAL.size + name + extra, self.packed)
        if method != STORED:
            data = inflate(method, data, self.size)
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise OSError(DAMAGED)
        return data

    def sha256(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()


def inflate(method: int, data: bytes, size: int) -> bytes:
    """Return ``data`` decompressed, one byte more than ``size`` at most: what the directory says of a size is not believed."""
    try:
        if method == DEFLATED:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        if method == BZIP2:
            return bz2.BZ2Decompressor().decompress(data, size + 1)
        if method == LZMA:
            # Four bytes of version and length, then LZMA's own five: lc, lp and pb in one, and the size of the dictionary.
            _, length, packed, dictionary = struct.unpack_from("<2sHBI", data)
            if length != 5 or dictionary > MAX_DICTIONARY_BYTES:
                raise OSError(DAMAGED)
            model = {"lc": packed % 9, "lp": packed // 9 % 5, "pb": packed // 45}
            filters: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA1, "dict_size": dictionary, **model}]
            return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(data[9:], size + 1)
    except (zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError):
        raise OSError(DAMAGED) from None
    raise OSError(f"packed in a way that cannot be read (zip method {method})")


# ---- the table of what an archive holds ----------------------------------------------------------------------------------------


class Images(NamedTuple):
    """The images, or the texts, to be used, in the archive's order: an item each in every column but ``members``."""

    paths: list[str]  # without the top folder that all share
    codes: "array[int]"  # position in ``members``
    members: list[Member]
    offsets: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]
    packed: npt.NDArray[np.uint64]  # the rest is of a zip
    crcs: npt.NDArray[np.uint32]
    methods: npt.NDArray[np.uint16]


class Table:
    """Gathers an archive's members in columns, since there may be millions; where a name comes twice the last counts.

    ``modality`` "auto" gathers images and texts until all are seen: which of them are the data's is known then.
    """

    def __init__(self, shown: str, modality: str = "image") -> None:
        self.shown = shown
        self.modality = modality
        self.entries = 0
        self.passed: Counter[str] = Counter()
        self._others = Layout([], modality)  # counts what is neither image nor text, which needs no layout
        self._tops: set[str] = set()
        self._below: set[str] = set()  # folders in the top folder, as long as there is only one
        self._rows: dict[str, int] = {}
        self._offsets, self._sizes, self._packed = array("Q"), array("Q"), array("Q")
        self._crcs, self._methods = array("I"), array("H")
        self._own: npt.NDArray[np.bool_] | None = None

    def count(self) -> None:
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise UserError(
                f"data {self.shown}: holds more than {MAX_ENTRIES:,} files; split it into several, or unpack it and give the folder"
            )

    def pass_over(self, kind: str) -> None:
        self.count()
        self.passed[kind] += 1

    def admit_folder(self, name: str) -> None:
        self.count()
        self._see_folders(split_path(name) or [])

    def admit(self, name: str) -> str:
        """Return the path under which the file ``name`` is to be ``put``; "": it is no example, hidden, or nowhere that is safe."""
        self.count()
        parts = split_path(name)
        if not parts:
            self.passed[UNSAFE] += 1
            return ""
        self._see_folders(parts[:-1])
        return "/".join(parts) if self._others.place(("any", *parts)) else ""

    def _see_folders(self, folders: list[str]) -> None:
        if not folders or folders[0].startswith(".") or folders[0] == "__MACOSX":
            return
        self._tops.add(folders[0])
        if len(folders) > 1 and len(self._tops) == 1 and not folders[1].startswith("."):
            self._below.add(folders[1])

    def put(self, path: str, offset: int, size: int, packed: int = 0, crc: int = 0, method: int = 0) -> None:
        row = self._rows.setdefault(path, len(self._rows))
        if row < len(self._offsets):
            self.passed[TWICE] += 1
            self._offsets[row], self._sizes[row], self._packed[row] = offset, size, packed
            self._crcs[row], self._methods[row] = crc, method
            return
        self._offsets.append(offset)
        self._sizes.append(size)
        self._packed.append(packed)
        self._crcs.append(crc)
        self._methods.append(method)

    def settle(self) -> npt.NDArray[np.bool_]:
        """Find the modality, once all is gathered; return which rows are of it."""
        if self._own is None:
            self.modality = settle(lambda: self._rows, self.modality)
            kinds = (modality_of(path) == self.modality for path in self._rows)
            self._own = np.fromiter(kinds, np.bool_, len(self._rows))
        return self._own

    def ends(self, own: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Return where each file of a zip begins and, at the least, ends; in order, of the rows ``own``, without those out of place."""
        offsets = np.asarray(self._offsets)
        ends = offsets + np.asarray(self._packed) + np.uint64(LOCAL.size)
        inside = (np.asarray(self._methods) != OUT_OF_PLACE) & own
        order = np.argsort(offsets[inside], kind="stable")
        return offsets[inside][order], ends[inside][order]

    def total(self, own: npt.NDArray[np.bool_]) -> int:
        """Return the bytes that the rows ``own`` claim to have."""
        return int(np.asarray(self._sizes)[own].sum(dtype=np.float64))  # claims may add up to more than 64 bits hold

    def finish(self) -> tuple[Layout, Images]:
        """Return the layout, and the examples that have a place in it. The table is used up."""
        own = self.settle()
        top = next(iter(self._tops)) if len(self._tops) == 1 else ""
        named_as_split = top.lower() in SPLIT_NAMES and not all(f.lower() in SPLIT_NAMES for f in self._below)
        shared = bool(top and self._below and not named_as_split)
        layout = Layout(sorted(self._below if shared else self._tops), self.modality)
        layout.skipped.update(self._others.skipped)
        names = list(self._rows)
        self._rows.clear()
        paths: list[str] = []
        codes, rows = array("I"), array("Q")
        code_of: dict[Member, int] = {}
        member_of: dict[str, Member] = {}  # by folder: whether a file is an example at all is in ``own``
        for row in np.argsort(np.asarray(self._offsets), kind="stable").tolist():
            path = names[row]
            names[row] = ""
            if shared and "/" in path:
                path = path.partition("/")[2]
            folder = path.rpartition("/")[0]
            member = (member_of.get(folder) if own[row] else None) or layout.place(tuple(path.split("/")))
            if member:
                if len(member_of) == 100_000:  # a folder an image
                    member_of.clear()
                member_of[folder] = member
                paths.append(path)
                codes.append(code_of.setdefault(member, len(code_of)))
                rows.append(row)
        chosen = np.asarray(rows)
        return layout, Images(
            paths,
            codes,
            list(code_of),
            np.asarray(self._offsets)[chosen],
            np.asarray(self._sizes)[chosen],
            np.asarray(self._packed)[chosen],
            np.asarray(self._crcs)[chosen],
            np.asarray(self._methods)[chosen],
        )


def split_path(name: str) -> list[str] | None:
    """Return the parts of a member's path; None: it does not lie below the archive's top, or not on every system."""
    if (
        len(name) > MAX_PATH_BYTES
        or name.startswith("/")
        or "\\" in name
        or "\0" in name
        or re.match(r"[A-Za-z]:", name)
    ):
        return None
    parts = [p for p in name.split("/") if p and p != "."]
    return None if ".." in parts else parts


# ---- zip -----------------------------------------------------------------------------------------------------------------------

# The directory is read here and not by zipfile, which holds some 600 bytes an entry and reads with one file under a lock.
LOCAL = struct.Struct("<4s4xH16xHH")  # signature, method, lengths of name and extra
CENTRAL = struct.Struct("<4s2x2xHH4xIIIHHH4xII")
# Signature, flags, method, CRC, packed, size, lengths of name, extra and comment, attributes, offset.
END = struct.Struct("<4sHHHHIIH")
LOCATOR = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQHHIIQQQQ")
STORED, DEFLATED, BZIP2, LZMA = 0, 8, 12, 14
OUT_OF_PLACE = 0xFFFF  # the method of a member that the directory puts where there is none
ENCRYPTED = 0x2041  # flags: encrypted, strongly, or with its header masked
UTF8 = 0x800
WIDE = 0xFFFFFFFF  # the value is in the extra field


class Directory(NamedTuple):
    """Where a zip's central directory lies; ``shift`` is what was put before the archive (a program that unpacks it)."""

    start: int
    size: int
    files: int
    shift: int


def list_zip(opened: Opened, table: Table) -> None:
    """Put a zip's images and texts into ``table``.

    Raises:
        UserError: it is damaged, encrypted, or made to do harm.
    """
    shown = opened.shown
    directory = find_directory(opened)
    encrypted: Counter[str] = Counter()  # by modality
    with opened.from_start(CHUNK) as file:
        file.seek(directory.start)
        left = directory.size
        while left > 0:
            fixed = file.read(CENTRAL.size)
            if len(fixed) < CENTRAL.size or not fixed.startswith(b"PK\1\2"):
                refuse_damaged(shown, "its directory is broken")
            _, flags, method, crc, packed, size, *lengths, attributes, offset = CENTRAL.unpack(fixed)
            raw, extra, comment = (file.read(n) for n in lengths)
            left -= CENTRAL.size + sum(lengths)
            if len(raw) + len(extra) + len(comment) != sum(lengths) or left < 0:
                refuse_damaged(shown, "its directory is broken")
            name = raw.decode("utf-8", "surrogateescape") if flags & UTF8 else old_name(raw)
            if extra:
                name, size, packed, offset = apply_extra(extra, raw, name, size, packed, offset)
            mode = attributes >> 16
            if name.endswith("/") or stat.S_ISDIR(mode):
                table.admit_folder(name)
            elif stat.S_ISLNK(mode):
                table.pass_over(LINKS)
            elif stat.S_IFMT(mode) and not stat.S_ISREG(mode):
                table.pass_over(SPECIAL)
            elif path := table.admit(name):
                encrypted[modality_of(path)] += bool(flags & ENCRYPTED)
                offset += directory.shift
                if offset + LOCAL.size + packed > directory.start:
                    table.put(path, min(offset, directory.start), size, 0, crc, OUT_OF_PLACE)
                else:
                    table.put(path, offset, size, packed, crc, method)
    if (table.entries - directory.files) % 2**16:  # a zip without 64-bit records counts no further
        refuse_damaged(shown, f"it names {table.entries:,} files and should have {directory.files:,}")
    own = table.settle()
    noun = NOUNS[table.modality]
    if encrypted[table.modality]:
        raise UserError(
            f"data {shown}: {encrypted[table.modality]:,} of its {noun} are encrypted; unpack it with its password and give the folder"
        )
    starts, ends = table.ends(own)
    overlapping = int((starts[1:] < ends[:-1]).sum())
    if overlapping:
        raise UserError(
            f"data {shown}: {overlapping:,} of its {noun} lie over others in the archive, as in one made to do harm; "
            f"make it again from the {noun} themselves"
        )
    if table.total(own) > total_limit(opened.size):
        refuse_total(opened, table.total(own))


def find_directory(opened: Opened) -> Directory:
    """Return where the central directory lies, by the record at the zip's end."""
    shown = opened.shown
    tail_start = max(0, opened.size - END.size - 0xFFFF)
    tail = opened.read(tail_start, opened.size - tail_start)
    at = tail.rfind(b"PK\5\6", 0, len(tail) - END.size + 4)
    while at >= 0 and at + END.size + END.unpack_from(tail, at)[7] != len(tail):  # the same bytes, in a comment
        at = tail.rfind(b"PK\5\6", 0, at + 3)
    if at < 0:
        at = tail.rfind(b"PK\5\6", 0, len(tail) - END.size + 4)  # with something behind it
    if at < 0:
        raise UserError(
            f"data {shown}: is cut off: the list of its files, at a zip's end, is missing; copy or download it again"
        )
    _, disk, _, _, count, size, start, _ = END.unpack_from(tail, at)
    place = tail_start + at
    end_of_directory = place
    if place >= LOCATOR.size:
        signature, disk64, place64, _ = LOCATOR.unpack(opened.read(place - LOCATOR.size, LOCATOR.size))
        if signature == b"PK\6\7":
            # Like zipfile: the record is sought right before its locator, as something may have been put before the archive.
            end_of_directory = place - LOCATOR.size - END64.size
            if end_of_directory < 0 or place64 > end_of_directory:
                refuse_damaged(shown, "its directory is broken")
            signature, *_, disk, _, _, count, size, start = END64.unpack(opened.read(end_of_directory, END64.size))
            disk |= disk64
            if signature != b"PK\6\6":
                refuse_damaged(shown, "its directory is broken")
    if disk:
        raise UserError(
            f"data {shown}: is one part of an archive in several; join them (zip -s 0 PART --out WHOLE.zip)"
        )
    shift = end_of_directory - size - start
    if shift < 0:
        refuse_damaged(shown, "some of it is missing")
    return Directory(start + shift, size, count, shift)


def old_name(raw: bytes) -> str:
    """Return a name that a zip does not say the encoding of: UTF-8 where it is that, since many write so, else that of DOS."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp437")


def apply_extra(extra: bytes, raw: bytes, name: str, size: int, packed: int, offset: int) -> tuple[str, int, int, int]:
    """Return name, size, packed and offset with what a member's extra field adds: 64-bit values, and the name in UTF-8."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        field = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind == 1:
            values = iter(struct.unpack_from(f"<{len(field) // 8}Q", field))
            size = next(values, size) if size == WIDE else size
            packed = next(values, packed) if packed == WIDE else packed
            offset = next(values, offset) if offset == WIDE else offset
        elif kind == 0x7075 and field[:1] == b"\1" and field[1:5] == zlib.crc32(raw).to_bytes(4, "little"):
            name = field[5:].decode("utf-8", "surrogateescape")
    return name, size, packed, offset


# ---- tar -----------------------------------------------------------------------------------------------------------------------


class StrictInfo(tarfile.TarInfo):
    """A member of a tar that must go on to its end mark: tarfile takes a broken header, or none, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            info = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):  # type: ignore[attr-defined]
            raise EOFError from None
        except tarfile.HeaderError as error:
            raise ValueError(f"{error} at byte {archive.offset:,}") from None
        if len(archive.pax_headers) > 100:  # tarfile keeps what concerns all members, however much there is
            raise ValueError("too many extended headers")
        return info


class Forward:
    """A stream that is read once, front to back, with a bound on what one read may ask for and on how much there may be."""

    def __init__(self, stream: Any, opened: Opened, codec: str) -> None:
        self.stream = stream
        self.opened = opened
        self.codec = codec
        self.position = 0
        self.limit = total_limit(opened.size) if codec != "tar" else opened.size

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError("a header is too large")
        data: bytes = self.stream.read(size)
        while len(data) < size and (more := self.stream.read(size - len(data))):
            data += more
        self.position += len(data)
        if self.position > self.limit:
            refuse_total(self.opened, self.position)
        return data

    def seek(self, position: int) -> int:
        if position < self.position:
            raise ValueError("a header points backwards")
        if self.codec == "tar":
            self.position = min(position, self.opened.size)
            self.stream.seek(self.position)
        while self.position < position and self.read(min(CHUNK, position - self.position)):
            pass
        return self.position


def list_tar(opened: Opened, codec: str, table: Table) -> Opened:
    """Put a tar's images and texts into ``table`` and return where they are to be read: the tar, or the file it was unpacked to.

    Raises:
        UserError: it is damaged, cut off, or made to do harm; or there is no room to unpack it.
    """
    shown = opened.shown
    try:
        with contextlib.ExitStack() as stack:
            spool = stack.enter_context(open_spool(shown)) if codec != "tar" else None
            file = stack.enter_context(opened.from_start())
            forward = Forward(decompressed(file, codec), opened, codec)
            walk_tar(forward, spool, table)
            read_to_end(forward)
            return spool.finish() if spool else opened
    except EOFError:
        pass
    except OSError as error:
        if error.errno:
            raise UserError(f"data {shown}: cannot be read ({error.strerror}); copy it to another disk") from None
        if "runcated" not in str(error):  # Arrow's word for it
            refuse_damaged(shown, one_line(error, 80))
    except tarfile.ReadError as error:
        if "unexpected end" not in str(error):
            refuse_damaged(shown, one_line(error, 80))
    # What tarfile and the decompressors raise at what makes no sense.
    except (tarfile.TarError, zlib.error, lzma.LZMAError, ValueError, ArithmeticError, LookupError, TypeError) as error:
        refuse_damaged(shown, one_line(error, 80))
    except RecursionError:
        refuse_damaged(shown, "headers of headers")
    raise UserError(
        f"data {shown}: is cut off: it ends before a tar's end mark, so files may be missing; copy or download it again"
    )


def walk_tar(forward: Forward, spool: "Spool | None", table: Table) -> None:
    stream: Any = forward
    archive: Any = tarfile.TarFile(fileobj=stream, tarinfo=StrictInfo, encoding="utf-8", errors="surrogateescape")
    while info := archive.next():
        archive.members.clear()  # it would hold them all
        if info.isdir():
            table.admit_folder(info.name)
        elif info.issym() or info.islnk():
            table.pass_over(LINKS)
        elif not info.isreg():
            table.pass_over(SPECIAL)
        elif info.issparse():
            table.pass_over(SPARSE)
        elif path := table.admit(info.name):
            if spool is None:
                table.put(path, info.offset_data, info.size)
            else:
                table.put(path, spool.position, info.size)
                if info.size <= MAX_MEMBER_BYTES:
                    spool.copy(forward, info.size)


def read_to_end(forward: Forward) -> None:
    """Read what follows the end mark: the checksum of what was decompressed, zeros, and nothing else that is a tar."""
    ended = False
    while block := forward.read(CHUNK):
        start = (len(block) - len(block.lstrip(b"\0"))) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        if not ended and start < len(block) and is_header(block[start : start + tarfile.BLOCKSIZE]):
            raise UserError(
                f"data {forward.opened.shown}: holds a second tar behind the first one's end; join them with tar --concatenate, "
                "or unpack both with tar --ignore-zeros and give the folder"
            )
        ended = ended or start < len(block)  # something else, as padding may be
        if ended and forward.codec == "tar":
            break


def is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def decompressed(file: BinaryIO, codec: str) -> Any:
    if codec == "gz":
        return gzip.GzipFile(fileobj=file)
    if codec == "bz2":
        return bz2.BZ2File(file)
    if codec == "xz":
        return lzma.LZMAFile(file)
    if codec == "zst":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return file


class Spool:
    """A nameless temporary file that takes the files of a compressed tar, one after the other."""

    def __init__(self, file: BinaryIO, folder: Path, shown: str) -> None:
        self.file = file
        self.folder = folder
        self.shown = shown
        self.position = 0
        self._look_at = 0  # the position at which to look again whether there is room

    def copy(self, source: Forward, size: int) -> None:
        while size:
            if self.position >= self._look_at:
                if shutil.disk_usage(self.folder).free < SPARE_BYTES:
                    self.refuse("no room")
                self._look_at = self.position + 64 * CHUNK
            piece = source.read(min(CHUNK, size))
            if not piece:
                raise EOFError
            try:
                self.file.write(piece)
            except OSError as error:
                self.refuse(error.strerror or one_line(error))
            self.position += len(piece)
            size -= len(piece)

    def finish(self) -> Opened:
        try:
            self.file.flush()
        except OSError as error:
            self.refuse(error.strerror or one_line(error))
        return Opened(os.dup(self.file.fileno()), self.shown)

    def refuse(self, reason: str) -> NoReturn:
        raise UserError(
            f"data {self.shown}: cannot be unpacked to {one_line(self.folder)} ({reason}); make room there, or set TMPDIR to a larger disk"
        )


@contextlib.contextmanager
def open_spool(shown: str) -> Iterator[Spool]:
    """Yield a spool on the larger of the disks for temporary files and for the cache."""
    from graftwork.sources.arrays import cache_folder

    folder = Path(tempfile.gettempdir())
    with contextlib.suppress(OSError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        folder = max(folder, cache_folder(), key=lambda f: shutil.disk_usage(f).free)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        except OSError as error:
            raise UserError(
                f"data {shown}: cannot be unpacked to {one_line(folder)} ({error.strerror}); set TMPDIR to a folder that you may write to"
            ) from None
        yield Spool(file, folder, shown)


# ---- what an archive is, and what is refused -----------------------------------------------------------------------------------

CODECS = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zst"}


def kind_of(opened: Opened) -> str:
    """Return "zip", "tar", or what a tar is compressed with ("gz", "bz2", "xz", "zst"), by the contents; "": none of these."""
    head = opened.read(0, min(opened.size, tarfile.BLOCKSIZE))
    if head.startswith((b"PK\3\4", b"PK\5\6", b"PK\7\x08")):
        return "zip"
    codec = codec_of(head)
    if codec:
        try:
            with opened.from_start() as file:
                # More than a header: a checksum that is wrong shows after a block of it, and the file is then damaged.
                return codec if is_tar(decompressed(file, codec).read(CHUNK)[: tarfile.BLOCKSIZE]) else ""
        except (OSError, EOFError, zlib.error, lzma.LZMAError):
            return codec  # what is wrong is said when it is listed
    tail = opened.read(max(0, opened.size - END.size), min(opened.size, END.size))
    if tail.startswith(b"PK\5\6"):  # behind a program that unpacks it
        return "zip"
    return "tar" if is_tar(head) else ""


def codec_of(head: bytes) -> str:
    return next((codec for magic, codec in CODECS.items() if head.startswith(magic)), "")


def is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar" or is_header(head) or head == bytes(tarfile.BLOCKSIZE)


def refuse_what_is_no_archive(opened: Opened) -> NoReturn:
    head = opened.read(0, min(opened.size, tarfile.BLOCKSIZE))
    if not head:
        raise UserError(f"data {opened.shown}: is an empty file; copy or download it again")
    if codec_of(head):
        raise UserError(
            f"data {opened.shown}: is compressed, but what is in it is no tar; unpack it and give the folder of images"
        )
    if head.decode("utf-8", "ignore").replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        raise UserError(
            f"data {opened.shown}: holds text and is no archive (a web page or a Git LFS pointer in its place?); download it again"
        )
    raise UserError(
        f"data {opened.shown}: is neither a zip nor a tar; check the file, or unpack it and give the folder"
    )


def refuse_damaged(shown: str, what: str) -> NoReturn:
    raise UserError(f"data {shown}: is damaged ({what}); copy or download it again")


def total_limit(size: int) -> int:
    """Return how many bytes an archive of ``size`` bytes may unpack to."""
    return min(MAX_TOTAL_BYTES, max(SMALL_TOTAL_BYTES, MAX_RATIO * size))


def refuse_total(opened: Opened, total: int) -> NoReturn:
    raise UserError(
        f"data {opened.shown}: unpacks to {amount(total)} or more, from {amount(opened.size)}, as an archive does that is made to fill a disk; "
        "if it is not, unpack it yourself and give the folder"
    )


def amount(size: int) -> str:
    power = min(4, (max(size, 1).bit_length() - 1) // 10)
    return f"{size / 1024**power:,.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
