"""Ingest: hash and decode every example of a source, give each its split, and pack what can be used into a Dataset artifact."""

import hashlib
import io
import os
import tarfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from graftwork import __version__
from graftwork.dataset import SCHEMA, SPLITS, dataset_digest
from graftwork.errors import UserError, one_line
from graftwork.files import finished_folder, write_json
from graftwork.images import BrokenImageError, decode
from graftwork.settings import IngestSettings
from graftwork.sources import DataSource, Record, content_hash, open_source, read_bytes

SHARD_BYTES = 64 * 2**20
WORKERS = os.cpu_count() or 1  # threads: hashing, decoding and file reads all leave Python's lock
Progress = Callable[[int, int], None]
T = TypeVar("T")
R = TypeVar("R")


class Example(NamedTuple):
    """A record that was read and decoded; ``sha256`` of its contents."""

    record: Record
    split: str
    sha256: str
    width: int
    height: int
    mode: str


def ingest(settings: IngestSettings, folder: Path, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Pack the source ``settings.data`` into a Dataset artifact at ``folder``; return its ``dataset.json``.

    Raises:
        UserError: the source cannot be read, or holds nothing that can be learned from.
    """
    source = open_source(settings.data)
    records, hashes, broken = hash_contents(source)
    splits = assign_splits(records, hashes, settings)
    results: dict[int, Example | dict[str, str]] = {}
    while True:
        usable = [n for n in range(len(records)) if not isinstance(results.get(n), dict)]
        chosen = limit_per_class(records, hashes, splits, settings, usable)
        new = [n for n in chosen if n not in results]
        if not new:
            break
        total = len(results) + len(new)
        for n, result in zip(
            new, bounded_map(lambda n: inspect(records[n], splits[n], hashes[n], settings.max_pixels), new), strict=True
        ):
            results[n] = result
            progress(len(results), total)
    examples = [r for n in chosen if isinstance(r := results[n], Example)]
    broken += [r for _, r in sorted(results.items()) if isinstance(r, dict)]
    if not examples:
        first = f"{one_line(broken[0]['source'])}: {broken[0]['reason']}" if broken else "nothing was left"
        raise UserError(
            f"data {one_line(settings.data)}: none of its {len(broken)} images can be decoded ({first}); give images that a viewer opens"
        )
    classes = sorted({r.label for r in records} | {b["label"] for b in broken})
    with finished_folder(folder) as partial:
        (partial / "shards").mkdir()
        rows = [
            row
            for shard in bounded_map(
                lambda task: write_shard(partial / "shards", *task, classes), plan_shards(examples)
            )
            for row in shard
        ]
        rows.sort(key=lambda row: (row["split"], row["label"], row["id"]))
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial / "manifest.parquet")
        counts = Counter((row["split"], row["label"]) for row in rows)
        info: dict[str, Any] = {
            "format": "graftwork-dataset/1",
            "name": source.name,
            "source": settings.data,
            "digest": dataset_digest((row["sha256"], row["label"], row["split"]) for row in rows),
            "classes": classes,
            "counts": {split: {c: counts[split, c] for c in classes} for split in SPLITS},
            "broken": broken,
            "skipped": source.skipped(),
            "settings": settings.model_dump(),
            "graftwork": __version__,
        }
        write_json(partial / "dataset.json", info)
    return info


def hash_contents(source: DataSource) -> tuple[list[Record], list[str], list[dict[str, str]]]:
    """Read every record for its hash; what cannot be read comes back in the last list."""
    records: list[Record] = []
    hashes: list[str] = []
    broken: list[dict[str, str]] = []

    def attempt(record: Record) -> str | OSError:
        try:
            return content_hash(record)
        except OSError as error:
            return error

    everything = list(source.records())
    for record, result in zip(everything, bounded_map(attempt, everything), strict=True):
        if isinstance(result, OSError):
            broken.append(
                {"source": record.key, "label": record.label, "reason": (result.strerror or str(result)).lower()}
            )
        else:
            records.append(record)
            hashes.append(result)
    return records, hashes, broken


def position(seed: int, sha256: str) -> float:
    """Return a number in [0, 1) that depends on the contents alone: the same example is at the same place in every run."""
    return int.from_bytes(hashlib.sha256(f"split:{seed}:{sha256}".encode()).digest()[:8]) / 2**64


def assign_splits(records: list[Record], hashes: list[str], settings: IngestSettings) -> list[str]:
    """Return the split of every record: the source's own where it has one, else cut by content hash.

    A share of each class goes to each split by thresholds on the hash, so a new image never moves an old one, and equal images stay together.
    Where a class is so small that the thresholds leave a split empty, the nearest example is taken into it.
    With train and val alone, val is the test set and the validation part is cut from train.
    """
    splits = [r.split for r in records]
    given = set(splits)
    if given == {"train", "val"}:
        splits = ["test" if s == "val" else s for s in splits]
        given = {"train", "test"}
    if "" in given or "train" in given:
        cut_test = "test" not in given
        cut_val = "val" not in given
        members: dict[str, list[int]] = defaultdict(list)
        for n, record in enumerate(records):
            if splits[n] in ("", "train"):
                members[record.label].append(n)
        labels_of: dict[str, set[str]] = defaultdict(set)
        for n, record in enumerate(records):
            labels_of[hashes[n]].add(record.label)
        for group in members.values():
            at = {n: position(settings.seed, hashes[n]) for n in group}
            test_end = settings.test_fraction if cut_test else 0.0
            val_end = test_end + (settings.val_fraction * (1 - test_end) if cut_val else 0.0)
            for n in group:
                splits[n] = "test" if at[n] < test_end else "val" if at[n] < val_end else "train"
            order = sorted(group, key=at.__getitem__)
            contents = {hashes[n] for n in group}
            wanted = [s for s, cut in (("test", cut_test), ("val", cut_val)) if cut]
            if len(contents) > len(wanted):
                fill_empty_splits(splits, order, hashes, wanted, {h for h in contents if len(labels_of[h]) > 1})
    return splits


def fill_empty_splits(
    splits: list[str], order: list[int], hashes: list[str], wanted: list[str], shared: Set[str] = frozenset()
) -> None:
    """Move one content of a small class into each split that it lacks, train included; ``order`` is by position, lowest first.

    Contents that are ``shared`` with another class stay where they are: the copies must not be torn apart.
    """
    for split in ("train", *wanted):
        if any(splits[n] == split for n in order):
            continue
        # Taken from the split that has most to give; its member nearest to the threshold.
        held = Counter(splits[n] for n in {hashes[n]: n for n in order}.values())
        donors = {splits[n] for n in order if hashes[n] not in shared and held[splits[n]] > 1}
        if not donors:
            continue
        donor = max(donors, key=lambda s: (held[s], s))
        candidates = [n for n in order if splits[n] == donor and hashes[n] not in shared]
        moved = hashes[candidates[-1] if split == "train" else candidates[0]]
        for n in order:
            if hashes[n] == moved:
                splits[n] = split


def limit_per_class(
    records: list[Record], hashes: list[str], splits: list[str], settings: IngestSettings, usable: list[int]
) -> list[int]:
    """Return the positions of ``usable`` to keep. ``train_per_class`` limits train, and val in the proportion that the whole source has."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for n in usable:
        groups[splits[n], records[n].label].append(n)
    val_share = settings.val_fraction / (1 - settings.val_fraction)
    limits = {
        "train": settings.train_per_class,
        "val": max(1, round(settings.train_per_class * val_share)) if settings.train_per_class else 0,
        "test": settings.test_per_class,
    }
    kept: list[int] = []
    for (split, _), group in groups.items():
        limit = limits[split]
        # The test set does not depend on the seed, so that runs with other seeds are compared on the same examples.
        seed = 0 if split == "test" else settings.seed
        kept += sorted(group, key=lambda n: position(seed, hashes[n]))[: limit or None]
    return sorted(kept)


def inspect(record: Record, split: str, sha256: str, max_pixels: int) -> Example | dict[str, str]:
    """Decode one record, all of it, since a header tells nothing of a file that was cut off."""
    try:
        if isinstance(record.payload, Path):
            data = read_bytes(record)
            mode = header_mode(data)
            image = decode(data, max_pixels)
            return Example(record, split, sha256, image.width, image.height, mode)
        height, width = record.payload.shape[:2]
        return Example(record, split, sha256, width, height, "L" if record.payload.ndim == 2 else "RGB")
    except (BrokenImageError, OSError) as error:
        return {"source": record.key, "label": record.label, "reason": one_line(error, 120)}


def header_mode(data: bytes) -> str:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode
    except Exception:  # decode() says what is wrong
        return ""


def plan_shards(examples: list[Example]) -> list[tuple[str, list[tuple[str, Example]]]]:
    """Return (file name, its examples with their ids) for every shard. Examples are in the order of their hash: a shard read in order is shuffled."""
    seen: Counter[str] = Counter()
    plan: list[tuple[str, list[tuple[str, Example]]]] = []
    for split in SPLITS:
        size, number = SHARD_BYTES, -1
        for example in sorted((e for e in examples if e.split == split), key=lambda e: (e.sha256, e.record.key)):
            if size >= SHARD_BYTES:
                size, number = 0, number + 1
                plan.append((f"{split}-{number:05d}.tar", []))
            seen[example.sha256] += 1
            again = seen[example.sha256]
            plan[-1][1].append((example.sha256[:20] + (f"-{again}" if again > 1 else ""), example))
            payload = example.record.payload
            size += payload.stat().st_size if isinstance(payload, Path) else payload.nbytes
    return plan


def write_shard(
    folder: Path, name: str, members: list[tuple[str, Example]], classes: list[str]
) -> list[dict[str, Any]]:
    """Write one WebDataset tar (``ID.EXT`` and ``ID.cls`` an example) and return its rows of the manifest."""
    rows = []
    with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, example in members:
            data = read_bytes(example.record)
            if isinstance(example.record.payload, Path) and hashlib.sha256(data).hexdigest() != example.sha256:
                raise UserError(
                    f"data {one_line(example.record.key)}: changed while it was read; run again when the files are at rest"
                )
            suffix = example.record.payload.suffix.lower() if isinstance(example.record.payload, Path) else ".png"
            start = tar.offset + tarfile.BLOCKSIZE
            add_member(tar, f"{key}{suffix}", data)
            add_member(tar, f"{key}.cls", str(classes.index(example.record.label)).encode())
            rows.append(
                {
                    "id": key,
                    "label": example.record.label,
                    "split": example.split,
                    "source": example.record.key,
                    "sha256": example.sha256,
                    "width": example.width,
                    "height": example.height,
                    "mode": example.mode,
                    "bytes": len(data),
                    "shard": name,
                    "offset": start,
                    "length": len(data),
                }
            )
    return rows


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # times, owner and mode stay at their defaults: equal contents make equal bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def bounded_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Map in threads, in order, with a bounded number of results waiting, so memory does not grow with the source."""
    iterator = iter(items)
    with ThreadPoolExecutor(WORKERS) as pool:
        pending = deque(pool.submit(function, item) for item in islice(iterator, 64 * WORKERS))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(iterator, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()
