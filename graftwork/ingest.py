"""Ingest: read every example of a source once, give each its split, and leave what can be used as a Dataset artifact."""

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from graftwork import __version__
from graftwork.dataset import FORMAT, SCHEMA, SPLITS, dataset_digest
from graftwork.errors import UserError, one_line
from graftwork.files import finished_folder, write_json
from graftwork.modality import looks
from graftwork.packing import Packed, Packer, why
from graftwork.parallel import bounded_map
from graftwork.settings import IngestSettings
from graftwork.sources import open_source
from graftwork.sources.record import DataSource, Reading, Record
from graftwork.splits import Labelled, assign_splits, limit_per_class

Progress = Callable[[int, int], None]
T = TypeVar("T")


def ingest(
    settings: IngestSettings,
    folder: Path,
    progress: Progress = lambda done, total: None,
    source: DataSource | None = None,
) -> dict[str, Any]:
    """Pack the source ``settings.data`` (``source``, where it is open already) into a Dataset artifact at ``folder``; return its ``dataset.json``.

    Where all is wanted, each example is read once. Where ``train_per_class`` or ``test_per_class`` limits it, all are hashed first, since the
    hash decides which are taken, and only those are decoded and packed.

    Raises:
        UserError: the source cannot be read, or holds nothing that can be learned from.
    """
    source = source or open_source(settings.data, Reading.of(settings.model_dump()))
    root = hashlib.sha256(settings.data.encode("utf-8", "surrogateescape")).hexdigest()
    limited = bool(settings.train_per_class or settings.test_per_class)
    with finished_folder(folder) as partial:
        packer = Packer(root, partial / "packs", settings, source.modality)
        try:
            found = (take_some if limited else take_all)(source, packer, settings, progress)
            if not found.codes:
                first = found.broken[0] if found.broken else {"source": settings.data, "reason": "nothing was left"}
                raise UserError(
                    f"data {one_line(settings.data)}: none of its {len(found.broken)} {packer.looks.NOUN}s can be decoded "
                    f"({one_line(first['source'])}: {first['reason']}); "
                    + ("check the paths" if first["reason"].startswith("no such") else packer.looks.HINT)
                )
            (partial / "shards").mkdir()
            places = packer.finish(list(found.codes), partial / "shards", partial / "signatures.parquet")
        finally:
            packer.abandon()
        shutil.rmtree(partial / "packs", ignore_errors=True)
        manifest = make_manifest(found, places, own_columns(source, settings))
        pq.write_table(manifest, partial / "manifest.parquet")
        classes = sorted({*found.labels, *(b["label"] for b in found.broken)} - {""})
        counts = Counter(zip(found.splits, found.labels, strict=True))
        info: dict[str, Any] = {
            "format": FORMAT,
            "modality": source.modality,
            "name": source.name,
            "source": settings.data,
            "digest": dataset_digest(zip(found.contents, found.labels, found.splits, strict=True)),
            "classes": classes,
            "counts": {split: {c: counts[split, c] for c in classes} for split in SPLITS},
            "broken": found.broken,
            "skipped": source.skipped(),
            "settings": settings.model_dump(),
            "graftwork": __version__,
        }
        write_json(partial / "dataset.json", info)
    return info


class Found(NamedTuple):
    """The examples that can be used, a position an example in every list, and those that cannot."""

    keys: list[str]
    labels: list[str]
    splits: list[str]
    contents: list[str]  # SHA-256
    groups: list[str]
    times: list[str]
    weights: list[float]
    codes: "array[int]"  # of ``Packer``
    broken: list[dict[str, str]]


def nothing() -> Found:
    return Found([], [], [], [], [], [], [], array("q"), [])


def add(found: Found, record: Record, sha256: str, code: int = -1) -> None:
    found.keys.append(record.key)
    found.labels.append(intern(record.label))
    found.splits.append(record.split)
    found.contents.append(sha256)
    found.groups.append(intern(record.group))
    found.times.append(intern(record.time))
    found.weights.append(record.weight)
    found.codes.append(code)


def labelled(found: Found) -> Labelled:
    return Labelled(found.keys, found.labels, found.splits, found.contents, found.groups, found.times)


def reject(record: Record, reason: str) -> dict[str, str]:
    return {"source": record.key, "label": record.label, "reason": reason}


def take_all(source: DataSource, packer: Packer, settings: IngestSettings, progress: Progress) -> Found:
    """Pack everything as it is read, then assign the splits."""
    found, total = nothing(), len(source)
    for position, record, result in packer.pack(enumerate(source.records()), source.readers):
        if isinstance(result, Packed):
            add(found, record, result.sha256, result.code)
        else:
            found.broken.append(reject(record, result))
        progress(position + 1, total)
    return found._replace(splits=assign_splits(labelled(found), settings))


def take_some(source: DataSource, packer: Packer, settings: IngestSettings, progress: Progress) -> Found:
    """Hash everything, assign the splits, then pack what the limits leave; an image that cannot be decoded is replaced by the next."""
    everything, unreadable = nothing(), []

    def attempt(record: Record) -> tuple[Record, str | OSError]:
        try:
            return record, packer.sha256(record)
        except OSError as error:
            return record, error

    for record, sha256 in bounded_map(attempt, source.records(), source.readers):
        if isinstance(sha256, OSError):
            unreadable.append(reject(record, why(sha256)))
        else:
            add(everything, record, sha256)
    everything = everything._replace(splits=assign_splits(labelled(everything), settings))
    # Records are made anew below, and told apart by their keys.
    position_of = {key: n for n, key in enumerate(everything.keys)}
    codes = everything.codes
    broken: dict[int, dict[str, str]] = {}
    chosen: list[int] = []
    while True:
        usable = [n for n in range(len(codes)) if n not in broken]
        chosen = limit_per_class(labelled(everything), everything.splits, settings, usable)
        new = {n for n in chosen if codes[n] < 0}
        if not new:
            break
        done, total = len(chosen) - len(new), len(chosen)
        wanted = ((n, r) for r in source.records() if (n := position_of.get(r.key, -1)) in new)
        for position, record, result in packer.pack(wanted, source.readers):
            new.discard(position)
            if isinstance(result, str):
                broken[position] = reject(record, result)
            elif result.sha256 != everything.contents[position]:
                raise changed(record.key)
            else:
                codes[position] = result.code
            done += 1
            progress(done, total)
        if new:
            raise changed(everything.keys[min(new)])
    everything.broken.extend(unreadable + [broken[n] for n in sorted(broken)])
    return pick(everything, chosen)


def pick(found: Found, positions: list[int]) -> Found:
    """Return the examples at ``positions``, in that order."""

    def some(column: list[T]) -> list[T]:
        return [column[n] for n in positions]

    return Found(
        some(found.keys),
        some(found.labels),
        some(found.splits),
        some(found.contents),
        some(found.groups),
        some(found.times),
        some(found.weights),
        array("q", (found.codes[n] for n in positions)),
        found.broken,
    )


def changed(key: str) -> UserError:
    return UserError(f"data {one_line(key)}: changed while it was read; run again when the files are at rest")


# What ``graftwork.slices`` knows of every dataset: no column of the user's own.
STANDARD = tuple(name for name in SCHEMA.names if name != "columns")


def own_columns(source: DataSource, settings: IngestSettings) -> dict[str, str]:
    """Return {key of a record: JSON of what the source says of it in the columns that ``slices`` names}.

    Raises:
        UserError: the source has no such column.
    """
    known = looks(source.modality).SLICES
    names = [name for name in settings.slices if name not in (*STANDARD, *known)]
    if not names:
        return {}
    read = getattr(source, "own_columns", None)
    if read is None:
        raise UserError(
            f"setting slices = {one_line(', '.join(names))}: only a manifest (.csv, .tsv, .parquet) has columns of its own; "
            f"without one, choose among label, group, time, source, mode, width, height, {', '.join(known)}"
        )
    columns = {name: column.to_pylist() for name, column in read(names).items()}
    said: dict[str, str] = {}
    for n, record in enumerate(source.records()):
        values = {name: column[n] for name, column in columns.items() if column[n]}
        if values:
            said[record.key] = intern(json.dumps(values, ensure_ascii=False, sort_keys=True))
    return said


def make_manifest(found: Found, places: pa.Table, own: dict[str, str]) -> pa.Table:
    """Return the manifest, sorted by split, label and id: what reads it in order reads the same, however the source is sorted."""
    seen: Counter[str] = Counter()
    ids = [""] * len(found.keys)
    for n in sorted(range(len(ids)), key=lambda n: (found.contents[n], found.keys[n])):
        short = found.contents[n][:20]
        seen[short] += 1
        ids[n] = short if seen[short] == 1 else f"{short}-{seen[short]}"
    columns = {
        "id": ids,
        "label": found.labels,
        "split": found.splits,
        "source": found.keys,
        "group": found.groups,
        "time": found.times,
        "weight": found.weights,
        "columns": [own.get(key, "") for key in found.keys],
    }
    table = pa.table({field.name: pa.array(columns[field.name], field.type) if field.name in columns else places[field.name]
                      for field in SCHEMA}, schema=SCHEMA)  # fmt: skip
    return table.sort_by([("split", "ascending"), ("label", "ascending"), ("id", "ascending")]).combine_chunks()
