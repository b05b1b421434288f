"""The Dataset artifact: ``manifest.parquet``, a row an example; ``shards/SPLIT-NNNNN.tar``, the examples, uncompressed (WebDataset);
``dataset.json``, what it is."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from graftwork.errors import UserError, one_line

FORMAT = "graftwork-dataset/1"
SPLITS = ("train", "val", "test")
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
        position = {label: n for n, label in enumerate(self.classes)}
        return np.array([position[label] for label in rows["label"].to_pylist()], dtype=np.int64)

    def read(self, rows: pa.Table) -> Iterator[bytes]:
        """Yield the encoded examples of ``rows``, one positioned read each."""
        name, file = "", None
        try:
            for shard, offset, length in zip(
                rows["shard"].to_pylist(), rows["offset"].to_pylist(), rows["length"].to_pylist(), strict=True
            ):
                if shard != name:
                    if file:
                        file.close()
                    name, file = shard, (self.folder / "shards" / shard).open("rb")
                assert file is not None
                file.seek(offset)
                yield file.read(length)
        finally:
            if file:
                file.close()


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
