"""The Dataset artifact: ``manifest.parquet``, a row an example; ``shards/*.tar``, the contents, uncompressed, each once, under the first twenty
digits of its SHA-256; ``signatures.parquet``, what they look like; ``dataset.json``, what it is."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from graftwork.errors import UserError, one_line

FORMAT = "graftwork-dataset/3"
SPLITS = ("train", "val", "test")
OPEN_SHARDS = 32
SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # the key in the shard; unique
        ("label", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),  # where the example came from
        ("sha256", pa.string()),  # of the example's contents
        ("width", pa.int32()),  # pixels
        ("height", pa.int32()),
        ("mode", pa.string()),  # Pillow's, as found
        ("bytes", pa.int64()),
        ("shard", pa.string()),  # file name under shards/
        ("offset", pa.int64()),  # of the example in its shard, in bytes: one read at a known place
        ("length", pa.int64()),  # in the shard; other than ``bytes``, the source's, where the image was scaled down
        ("group", pa.string()),  # "": of none
        ("time", pa.string()),  # ISO 8601; "": unknown
        ("weight", pa.float64()),  # in training
        (
            "columns",
            pa.string(),
        ),  # JSON: what the user's manifest says of it in the columns that ``slices`` names; "": nothing
        ("signature", pa.int32()),  # row in ``signatures.parquet``
    ]
)


class Dataset(NamedTuple):
    """A Dataset artifact, opened: its folder, ``dataset.json`` and the manifest."""

    folder: Path
    info: dict[str, Any]
    manifest: pa.Table

    @property
    def classes(self) -> list[str]:
        return list(self.info["classes"])

    @property
    def digest(self) -> str:
        return str(self.info["digest"])

    def split(self, name: str) -> pa.Table:
        """Return the manifest's rows of one split, in the manifest's order."""
        return self.manifest.filter(pa.compute.equal(self.manifest["split"], name))

    def targets(self, rows: pa.Table) -> npt.NDArray[np.int64]:
        """Return the labels of ``rows`` as positions in ``classes``, shape (N,)."""
        found = pa.compute.index_in(rows["label"], value_set=pa.array(self.classes))
        return found.to_numpy().astype(np.int64)

    def signatures(self, columns: list[str] | None = None) -> pa.Table:
        """Return what the examples look like, a row an example in the manifest's order; columns as ``graftwork.packing.SIGNATURE``.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            table = pq.read_table(self.folder / "signatures.parquet", columns=columns)
            return table.take(self.manifest["signature"])
        except (OSError, pa.ArrowInvalid, pa.ArrowIndexError) as error:
            raise self._unreadable(error) from None

    def signature_bytes(self, widths: dict[str, int]) -> dict[str, npt.NDArray[np.uint8]]:
        """Return binary columns of the signatures as arrays of shape (N, width), in the manifest's order.

        They are filled a batch at a time: the thumbnails of a million images are a gigabyte, which must not be held twice.

        Raises:
            UserError: the file is missing or damaged.
        """
        wanted = self.manifest["signature"].to_numpy()
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        found = {name: np.empty((len(wanted), width), np.uint8) for name, width in widths.items()}
        start = 0
        try:
            for batch in pq.ParquetFile(self.folder / "signatures.parquet").iter_batches(8192, columns=list(widths)):
                first, last = np.searchsorted(ordered, [start, start + len(batch)])
                rows = order[first:last]
                for name, width in widths.items():
                    column = batch.column(name)
                    values = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
                    found[name][rows] = values.reshape(-1, width)[ordered[first:last] - start]
                start += len(batch)
            if len(ordered) and ordered[-1] >= start:
                raise ValueError("it is too short")
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            raise self._unreadable(error) from None
        return found

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"dataset {one_line(self.folder)}: its signatures cannot be read ({one_line(error)}); run ingest_data again"
        )

    def read(self, rows: pa.Table) -> Iterator[bytes]:
        """Yield the encoded examples of ``rows``, one positioned read each; shards stay open, since rows may be in any order."""
        files: dict[str, BinaryIO] = {}  # the one used last at the end
        try:
            for shard, offset, length in places(rows):
                if shard not in files and len(files) == OPEN_SHARDS:
                    files.pop(next(iter(files))).close()
                files[shard] = files.pop(shard) if shard in files else (self.folder / "shards" / shard).open("rb")
                files[shard].seek(offset)
                yield files[shard].read(length)
        finally:
            for file in files.values():
                file.close()


def places(rows: pa.Table) -> Iterator[tuple[str, int, int]]:
    """Yield (shard, offset, length) of every row, a thousand at a time: a million rows as Python objects would take a gigabyte."""
    for start in range(0, len(rows), 1024):
        some = rows.slice(start, 1024)
        yield from zip(some["shard"].to_pylist(), some["offset"].to_pylist(), some["length"].to_pylist(), strict=True)


def open_dataset(folder: str | Path, digest: str = "") -> Dataset:
    """Open the Dataset artifact in ``folder``.

    Raises:
        UserError: it is none, or not the one whose contents have the given ``digest``.
    """
    folder = Path(folder)
    try:
        info = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise ValueError(f"dataset.json is not of the format {FORMAT}")
        manifest = pq.read_table(folder / "manifest.parquet")
        if manifest.schema != SCHEMA:
            raise ValueError("manifest.parquet has other columns")
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise UserError(
            f"dataset {one_line(folder)}: cannot be read ({one_line(error)}); run ingest_data again"
        ) from None
    if digest and digest != info["digest"]:
        raise UserError(
            f"dataset {one_line(folder)}: its digest is {info['digest']}, not {digest}; the data changed on the way, start the run again"
        )
    return Dataset(folder, info, manifest)


def dataset_digest(rows: Iterable[tuple[str, str, str]]) -> str:
    """Hash (sha256, label, split) of every example: equal contents, labels and splits, in any order, have the same digest.

    128 bits in hex, since MLflow takes at most 36 characters.
    """
    digest = hashlib.sha256()
    for row in sorted(rows):
        digest.update("\0".join(row).encode() + b"\n")
    return digest.hexdigest()[:32]


CHANGES = ("before", "after", "added", "removed", "from_splits", "to_splits", "from_labels", "to_labels")


def difference(before: Dataset, after: Dataset) -> dict[str, Any]:
    """Return what changed between two datasets, JSON-ready: rows by label and split with ``CHANGES``, and totals.

    Examples are told apart by their contents: one that is renamed is the same one. One that changed both label and split counts as relabelled.
    """
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    total: Counter[str] = Counter({"added": 0, "removed": 0, "moved": 0, "relabelled": 0, "kept": 0})
    sides = []
    for data, name in ((before, "before"), (after, "after")):
        held: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        columns = (data.manifest[k].to_pylist() for k in ("sha256", "label", "split"))
        for sha256, label, split in zip(*columns, strict=True):
            held[sha256][label, split] += 1
            counts[label, split][name] += 1
        sides.append(held)
    old, new = sides
    for sha256 in old.keys() | new.keys():
        mine, theirs = old.get(sha256, Counter()), new.get(sha256, Counter())
        total["kept"] += (mine & theirs).total()
        gone, come = sorted((mine - theirs).elements()), sorted((theirs - mine).elements())
        # Those that kept their label, first: they moved to another split.
        for same_label in (True, False):
            for place in list(gone):
                match = next((p for p in come if (p[0] == place[0]) is same_label), None)
                if match is None:
                    continue
                gone.remove(place)
                come.remove(match)
                total["moved" if same_label else "relabelled"] += 1
                counts[place]["to_splits" if same_label else "to_labels"] += 1
                counts[match]["from_splits" if same_label else "from_labels"] += 1
        for place in gone:
            counts[place]["removed"] += 1
        for place in come:
            counts[place]["added"] += 1
        total["removed"] += len(gone)
        total["added"] += len(come)
    rows = [
        {"label": label, "split": split, **{k: counts[label, split][k] for k in CHANGES}}
        for label, split in sorted(counts, key=lambda place: (place[0], SPLITS.index(place[1])))
        if any(counts[label, split][k] for k in CHANGES[2:])
    ]
    return {
        "rows": rows,
        "total": dict(total),
        "classes_added": sorted(set(after.classes) - set(before.classes)),
        "classes_removed": sorted(set(before.classes) - set(after.classes)),
    }
