"""The Dataset artifact: ``manifest.parquet``, a row an example; ``shards/SPLIT-NNNNN.tar``, the examples, uncompressed (WebDataset);
``dataset.json``, what it is."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from graftwork.errors import UserError, one_line

FORMAT = "graftwork-dataset/1"
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
        ("length", pa.int64()),
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

    def read(self, rows: pa.Table) -> Iterator[bytes]:
        """Yield the encoded examples of ``rows``, one positioned read each; shards stay open, since rows may be in any order."""
        with contextlib.ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            for shard, offset, length in places(rows):
                if shard not in files:
                    if len(files) == OPEN_SHARDS:
                        files.pop(next(iter(files))).close()
                    files[shard] = stack.enter_context((self.folder / "shards" / shard).open("rb"))
                files[shard].seek(offset)
                yield files[shard].read(length)


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
