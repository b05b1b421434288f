"""Packing: read each example once, prove that it can be decoded, and write it into tar files (packs), addressed by its contents.

A pack is written under a temporary name and then renamed, and a table of what it holds is put beside it. Packs stay in a store between runs:
an interrupted packing goes on, and when a source grows, only what is new is read (where the source tells versions), decoded and packed.
"""

import contextlib
import errno
import hashlib
import io
import os
import secrets
import shutil
import tarfile
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from graftwork.errors import UserError, one_line
from graftwork.files import STORE
from graftwork.modality import DEFAULT, Looker, looks
from graftwork.parallel import bounded_map
from graftwork.settings import IngestSettings
from graftwork.sources.record import Record, load

PACK_BYTES = 64 * 2**20
STALE_SECONDS = 86_400  # after which a half-written file is nobody's any more
HELD_BYTES = 4 * 2**20  # that a thread reads before it looks at them
BATCH, SMALL = 16, 256 * 2**10  # examples that a thread reads at once, where their mean size in bytes is under that
PLACE = pa.schema(
    [
        ("sha256", pa.string()),  # of the contents as the source has them
        ("bytes", pa.int64()),
        ("width", pa.int32()),  # of the source, upright
        ("height", pa.int32()),
        ("mode", pa.string()),  # Pillow's, as found
        ("offset", pa.int64()),  # in the pack
        ("length", pa.int64()),  # as packed: other than ``bytes`` where the image was scaled down
    ]
)
ORIGIN = pa.schema([("origin", pa.binary(16)), ("suffix", pa.string())])
LOCK = "large.lock"  # in the store: by which large images are decoded one at a time
ROW_BITS = 32  # a code is the pack's number and, below it, the row in the pack


class Fresh(NamedTuple):
    """An example that no pack holds yet; ``row`` lacks the place in the pack."""

    data: bytes
    row: dict[str, Any]


class Packed(NamedTuple):
    """Where an example lies: ``code`` tells the pack and the row in it."""

    code: int
    sha256: str


class Later(NamedTuple):
    """An example that was not read with its neighbours, since they were large."""


LATER = Later()
Found = tuple[int, Record, Packed | str | Fresh | Later]  # position, record, and what became of it


class Packer:
    """Packs into the store that the environment names, else into ``folder``; ``root`` names the source."""

    def __init__(self, root: str, folder: Path, settings: IngestSettings, modality: str = DEFAULT) -> None:
        self.root = root
        self.settings = settings
        self.looks = looks(modality)
        recipe = self.looks.recipe(settings)
        store = os.environ.get(STORE)
        self.folder = Path(store, hashlib.sha256(recipe.encode()).hexdigest()[:12]) if store else folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / LOCK).touch()
        except OSError as error:
            if not store or error.errno == errno.ENOSPC:
                raise
            raise UserError(
                f"store {one_line(self.folder)}: cannot be written ({error.strerror}); set {STORE} to a folder that you may write"
            ) from None
        self.names: list[str] = []  # of packs, without suffix
        self.by_content: dict[str, int] = {}  # SHA-256 to code; its keys are the very strings that ingest keeps
        self.by_origin: dict[bytes, str] = {}  # source, key and version to SHA-256
        self.newly_met: dict[
            bytes, str
        ] = {}  # origins of contents that a pack held already, under another name or version
        self.token = f"{os.getpid()}-{secrets.token_hex(8)}"  # of what is half-written: process ids come twice, in two containers
        self._tar: tarfile.TarFile | None = None
        self._rows: list[dict[str, Any]] = []
        self._open_store()

    def _open_store(self) -> None:
        for path in sorted(self.folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # another run has just finished it
                if path.suffix == ".partial" and time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink(missing_ok=True)
            if path.suffix == ".origins":
                with contextlib.suppress(OSError, ValueError, pa.ArrowInvalid, KeyError):
                    met = pq.read_table(path, columns=["origin", "sha256"])
                    self.by_origin.update(zip(met["origin"].to_pylist(), met["sha256"].to_pylist(), strict=True))
            if path.suffix != ".parquet":
                continue
            with contextlib.suppress(OSError, ValueError, pa.ArrowInvalid, KeyError):
                found = pq.read_table(path, columns=["origin", "sha256"])
                # A pack that was cut off, by a full disk or by hand, is not taken for whole.
                if path.with_suffix(".tar").stat().st_size == int((found.schema.metadata or {})[b"size"]):
                    first = len(self.names) << ROW_BITS
                    self.names.append(path.stem)
                    for n, (origin, sha256) in enumerate(
                        zip(found["origin"].to_pylist(), found["sha256"].to_pylist(), strict=True)
                    ):
                        self.by_origin[origin] = sha256
                        self.by_content.setdefault(sha256, first + n)

    def known(self, record: Record, version: str) -> str | None:
        """Return the SHA-256 of ``record`` where a pack holds this very version of it; nothing is read."""
        return self.by_origin.get(origin_of(self.root, record.key, version)) if version else None

    def sha256(self, record: Record) -> str:
        """Return the SHA-256 of the contents; they are read only if no pack tells. OSError: they cannot be read."""
        content = self.known(record, record.content.version())
        return content or record.content.sha256()

    def pack(self, records: Iterable[tuple[int, Record]], readers: int) -> Iterator[tuple[int, Record, Packed | str]]:
        """Yield (position, record, its place in a pack, or why it cannot be used), in order.

        ``readers`` threads read and hash, processes decode. Equal contents are packed once.

        Raises:
            UserError: the source cannot be read any more. OSError: the disk is full or cannot be written.
        """

        mean = float(SMALL)  # bytes of an example; unknown ones may be large

        def batches() -> Iterator[list[tuple[int, Record]]]:
            iterator = iter(records)
            while some := list(islice(iterator, BATCH if mean < SMALL else 1)):
                yield some

        def size(results: list[Found]) -> int:
            return sum(len(found.data) for _, _, found in results if isinstance(found, Fresh))

        with warnings.catch_warnings(), self.looks.lookers(self.settings, self.folder / LOCK) as decoders:
            # Of odd metadata, thousands of lines on stderr. The threads share the filters: they are set once, around them.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            for results in bounded_map(lambda some: self._look(some, decoders), batches(), readers, size, most=4):
                for position, record, found in results:
                    if isinstance(found, Later):
                        found = self._look([(position, record)], decoders)[0][2]
                        assert not isinstance(found, Later)  # alone, it has no neighbours to wait for
                    if isinstance(found, Fresh):
                        mean = 0.9 * mean + 0.1 * len(found.data)
                        found = Packed(self._write(found), found.row["sha256"])
                    yield position, record, found

    def _look(self, some: list[tuple[int, Record]], decoders: Looker) -> list[Found]:
        """Read and look at some records: those whose contents a pack holds are not read, or not decoded."""
        results: dict[int, Packed | str | Fresh | Later] = {}
        read: dict[int, tuple[bytes, str, str]] = {}  # contents, SHA-256, version
        for position, record in some:
            try:
                version = record.content.version()
                content = self.known(record, version)
                code = self.by_content.get(content) if content else None  # the pack itself may be gone
                if content is not None and code is not None:
                    results[position] = Packed(code, content)
                    continue
                data, sha256 = load(record.content)
                code = self.by_content.get(sha256)
                if code is not None:
                    results[position] = Packed(code, sha256)
                    if version:
                        self.newly_met[origin_of(self.root, record.key, version)] = sha256
                else:
                    read[position] = data, sha256, version
            except OSError as error:
                results[position] = why(error)
            if read and (sum(len(data) for data, _, _ in read.values()) > HELD_BYTES):
                break  # larger ones than those before: the rest waits until these are written
        looked = dict(zip(read, decoders.look([data for data, _, _ in read.values()]), strict=True)) if read else {}
        for position, record in some:
            found = looked.get(position)
            if isinstance(found, str):
                results[position] = found
            elif found is not None:
                data, sha256, version = read[position]
                row = {
                    "origin": origin_of(self.root, record.key, version),
                    "suffix": found.suffix or record.content.suffix,
                    "sha256": sha256,
                    "bytes": len(data),
                    "width": found.width,
                    "height": found.height,
                    "mode": found.mode,
                    **found.signature._asdict(),
                }
                results[position] = Fresh(found.scaled or data, row)
        return [(position, record, results.get(position, LATER)) for position, record in some]

    def _write(self, fresh: Fresh) -> int:
        """Append to the open pack; return the code."""
        content = fresh.row["sha256"]
        if content in self.by_content:  # two equal ones were read at once
            return self.by_content[content]
        if self._tar is None:
            self._tar = tarfile.open(self._partial(".tar"), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  stays open
            self.names.append("")
        tar = self._tar
        # Times, owner and mode stay at their defaults: equal contents make equal bytes.
        member = tarfile.TarInfo(f"{fresh.row['sha256'][:20]}{fresh.row['suffix']}")
        member.size = len(fresh.data)
        offset = tar.offset + tarfile.BLOCKSIZE
        tar.addfile(member, io.BytesIO(fresh.data))
        code = ((len(self.names) - 1) << ROW_BITS) + len(self._rows)
        self.by_content[content] = code
        self._rows.append({**fresh.row, "offset": offset, "length": len(fresh.data)})
        if tar.offset >= PACK_BYTES:
            self._close()
        return code

    def _partial(self, suffix: str) -> Path:
        return self.folder / f"{self.token}{suffix}.partial"

    def _close(self) -> None:
        """Finish the open pack: its name, which its contents decide, then the table that makes it known."""
        if self._tar is None:
            return
        self._tar.close()
        digest = hashlib.sha256("".join(row["sha256"] for row in self._rows).encode())
        path = self.folder / f"{digest.hexdigest()[:16]}.tar"
        self._partial(".tar").chmod(0o444)  # linked into datasets: a change here would be one there
        self._partial(".tar").replace(path)
        schema = pa.schema([*ORIGIN, *PLACE, *self.looks.SIGNATURE]).with_metadata({"size": str(path.stat().st_size)})
        pq.write_table(pa.Table.from_pylist(self._rows, schema=schema), self._partial(".parquet"), compression="zstd")
        self._partial(".parquet").replace(path.with_suffix(".parquet"))
        self.names[-1] = path.stem
        self._tar, self._rows = None, []
        pa.default_memory_pool().release_unused()

    def _table(self, name: str) -> pa.Table:
        try:
            return pq.read_table(self.folder / f"{name}.parquet")
        except FileNotFoundError:
            raise emptied(self.folder) from None

    def finish(self, codes: list[int], shards: Path, signatures: Path) -> pa.Table:
        """Give ``shards`` (an existing folder) exactly the contents that ``codes`` name, write their signatures, and return their places.

        A pack all of whose contents are wanted is linked, or copied where the file system cannot; from the others, what is wanted is copied
        into new packs, so that nothing which left the source stays in the dataset.

        Returns:
            PLACE, with ``shard`` (file name) and ``signature`` (row in ``signatures``), a row a code, in the order of ``codes``.
        """
        self._close()
        self._keep_origins()
        wanted: dict[int, set[int]] = {}
        for code in codes:
            wanted.setdefault(code >> ROW_BITS, set()).add(code % 2**ROW_BITS)
        moved: dict[int, int] = {}
        for number in sorted(wanted):
            table = self._table(self.names[number])
            if len(wanted[number]) < len(table):
                moved.update(self._copy(number, sorted(wanted[number]), table))
        self._close()
        final = [moved.get(code, code) for code in codes]
        used = sorted({code >> ROW_BITS for code in final}, key=lambda n: self.names[n])
        first: dict[str, int] = {}  # row of each pack's first example, among all of them
        tables = []
        signature = self.looks.SIGNATURE
        with pq.ParquetWriter(signatures, signature, compression="zstd") as writer:
            total = 0
            for name in dict.fromkeys(self.names[number] for number in used):
                link(self.folder / f"{name}.tar", shards / f"{name}.tar")
                table = self._table(name)
                writer.write_table(table.select(signature.names).cast(signature))
                tables.append(table.select(PLACE.names).append_column("shard", pa.array([f"{name}.tar"] * len(table))))
                first[name] = total
                total += len(table)
        rows = pa.array([first[self.names[code >> ROW_BITS]] + code % 2**ROW_BITS for code in final], pa.int32())
        places = pa.concat_tables(tables).replace_schema_metadata(None)
        return places.take(rows).append_column("signature", rows)

    def _keep_origins(self) -> None:
        """Write down what is held under other names: what was moved is read once, and not in every run."""
        if self.newly_met:
            columns = {"origin": list(self.newly_met), "sha256": list(self.newly_met.values())}
            name = hashlib.sha256(b"".join(sorted(self.newly_met))).hexdigest()[:16]
            pq.write_table(pa.table(columns), self._partial(".origins"))
            self._partial(".origins").replace(self.folder / f"{name}.origins")

    def _copy(self, number: int, rows: list[int], table: pa.Table) -> dict[int, int]:
        """Copy ``rows`` of a pack into new ones; return {old code: new code}. Nothing is decoded."""
        moved = {}
        path = self.folder / f"{self.names[number]}.tar"
        if not path.is_file():
            raise emptied(self.folder)
        with path.open("rb") as file:
            for n in rows:
                row = table.slice(n, 1).to_pylist()[0]
                file.seek(row.pop("offset"))
                data = file.read(row.pop("length"))
                del self.by_content[row["sha256"]]
                moved[(number << ROW_BITS) + n] = self._write(Fresh(data, row))
        return moved

    def abandon(self) -> None:
        """Remove the pack that is half written."""
        if self._tar is not None:
            with contextlib.suppress(OSError):
                self._tar.close()
        for suffix in (".tar", ".parquet", ".origins"):
            self._partial(suffix).unlink(missing_ok=True)


def why(error: OSError) -> str:
    """Return the reason of a failed read in a few words."""
    return one_line((error.strerror or str(error)).lower(), 120)


def origin_of(root: str, key: str, version: str) -> bytes:
    return hashlib.sha256(f"{root}\0{key}\0{version}".encode()).digest()[:16]


def link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without links
        try:
            shutil.copyfile(source, target)
        except FileNotFoundError:
            raise emptied(source.parent) from None


def emptied(folder: Path) -> UserError:
    return UserError(f"store {one_line(folder)}: was emptied while it was used; run again")
