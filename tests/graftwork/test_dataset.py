"""The Dataset artifact, opened: what its readers rely on, and artifacts that must be refused."""

import hashlib
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graftwork.dataset import CHANGES, SCHEMA, SPLITS, Dataset, dataset_digest, difference, open_dataset
from graftwork.errors import UserError
from graftwork.ingest import ingest
from graftwork.settings import IngestSettings


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Digits, a few a class."""
    folder = tmp_path_factory.mktemp("packed") / "digits"
    ingest(IngestSettings(data="digits", train_per_class=4, test_per_class=2), folder)
    return open_dataset(folder)


def test_the_splits_are_the_whole_and_do_not_overlap(packed: Dataset) -> None:
    """A user's test would hold training examples, or examples be in no split at all."""
    ids = [packed.split(name)["id"].to_pylist() for name in SPLITS]
    assert sorted(itertools.chain(*ids)) == sorted(packed.manifest["id"].to_pylist())
    assert len(set(itertools.chain(*ids))) == packed.manifest.num_rows == 70
    assert packed.split("elsewhere").num_rows == 0


def test_targets_are_positions_in_classes(packed: Dataset) -> None:
    """A user's model would name the wrong class."""
    train = packed.split("train")
    targets = packed.targets(train)
    assert targets.shape == (40,) and targets.dtype == "int64"
    assert [packed.classes[t] for t in targets] == train["label"].to_pylist()


@pytest.mark.parametrize("order", ["as it is", "reversed", "every third", "the same twice", "none"])
def test_examples_are_read_in_the_order_asked_for(packed: Dataset, order: str) -> None:
    """A user's images and labels would be out of step, which looks like a model that does not learn."""
    n = packed.manifest.num_rows
    positions = {
        "as it is": list(range(n)),
        "reversed": list(range(n))[::-1],
        "every third": list(range(0, n, 3)),
        "the same twice": [5, 5, n - 1, 5],
        "none": [],
    }[order]
    rows = packed.manifest.take(pa.array(positions, pa.int64()))
    read = list(packed.read(rows))
    shards = {p.name: p.read_bytes() for p in (packed.folder / "shards").iterdir()}
    assert read == [shards[r["shard"]][r["offset"] :][: r["length"]] for r in rows.to_pylist()]
    assert all(b.startswith(b"\x89PNG") and b.endswith(b"IEND\xaeB`\x82") for b in read)


def test_the_digest_is_checked(packed: Dataset) -> None:
    """A user's steps would go on with data that was changed between them."""
    assert open_dataset(packed.folder, packed.digest).digest == packed.digest
    with pytest.raises(UserError, match=f"its digest is {packed.digest}, not {'0' * 32}"):
        open_dataset(packed.folder, "0" * 32)


def test_the_digest_is_that_of_the_manifest(packed: Dataset) -> None:
    """A user could not check an artifact against the digest that MLflow shows."""
    rows = packed.manifest.to_pylist()
    assert dataset_digest((r["sha256"], r["label"], r["split"]) for r in rows) == packed.digest


def test_the_digest_tells_every_change_from_every_order() -> None:
    """A user's changed labels would go by the old digest, or the same data by a new one."""
    rows = [
        (hashlib.sha256(bytes([n])).hexdigest(), label, "train") for n, label in enumerate(["a", "b", "", "a\nb", "é"])
    ]
    digest = dataset_digest(rows)
    assert all(dataset_digest(r) == digest for r in itertools.permutations(rows))
    changed = [
        [("0" * 64, *rows[0][1:]), *rows[1:]],
        [(rows[0][0], "b", "train"), *rows[1:]],
        [(rows[0][0], "a", "test"), *rows[1:]],
        rows[1:],
        [*rows, rows[0]],
        [(rows[0][0], "atrain", ""), *rows[1:]],
        [],
    ]
    assert len({digest, *map(dataset_digest, changed)}) == len(changed) + 1


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder: Path) -> None:
    content = (folder / "manifest.parquet").read_bytes()
    (folder / "manifest.parquet").write_bytes(content[: len(content) // 2])


DAMAGES = {
    "no folder": lambda folder: folder.rename(folder.with_name("moved")),
    "no dataset.json": drop("dataset.json"),
    "no manifest": drop("manifest.parquet"),
    "dataset.json cut off": overwrite("dataset.json", b'{"format": "graftw'),
    "dataset.json not UTF-8": overwrite("dataset.json", b"\xff\xfe"),
    "dataset.json of something else": overwrite("dataset.json", b"{}"),
    "dataset.json a list": overwrite("dataset.json", b"[]"),
    "manifest cut off": cut,
    "manifest empty": overwrite("manifest.parquet", b""),
    "manifest a text": overwrite("manifest.parquet", b"id,label\n1,cat\n" * 50),
    "manifest of something else": lambda folder: pq.write_table(pa.table({"x": [1]}), folder / "manifest.parquet"),
}


@pytest.mark.parametrize("digest", ["", "0" * 32], ids=["any digest", "a digest"])
@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_no_dataset_is_refused_in_one_line(name: str, digest: str, packed: Dataset, tmp_path: Path) -> None:
    """A user would read a stack trace, or train on rows of nulls, where an artifact is damaged or another's."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(packed.info))
    pq.write_table(packed.manifest, folder / "manifest.parquet")
    assert open_dataset(folder).manifest.schema == SCHEMA
    DAMAGES[name](folder)
    with pytest.raises(UserError, match="run ingest_data again") as raised:
        open_dataset(folder, digest)
    assert "\n" not in str(raised.value)


def test_a_line_break_in_the_folders_name_stays_out_of_the_message(packed: Dataset, tmp_path: Path) -> None:
    """A user's log would hold a line that graftwork did not write, after a folder with a line break in its name."""
    for folder in (tmp_path / "no\nwhere", (tmp_path / "da\nta")):
        with pytest.raises(UserError) as raised:
            open_dataset(folder)
        assert "\n" not in str(raised.value)
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(packed.info))
    pq.write_table(packed.manifest, folder / "manifest.parquet")
    with pytest.raises(UserError) as raised:
        open_dataset(folder, "0" * 32)
    assert "\n" not in str(raised.value)


# ---- what changed --------------------------------------------------------------------------------------------------------------


def made(rows: list[tuple[str, str, str]], classes: str = "ab") -> Dataset:
    """A dataset of (content, label, split), without shards."""
    columns = {"sha256": [r[0] for r in rows], "label": [r[1] for r in rows], "split": [r[2] for r in rows]}
    return Dataset(Path("nowhere"), {"classes": list(classes), "digest": "", "name": ""}, pa.table(columns))


def changes(before: list[tuple[str, str, str]], after: list[tuple[str, str, str]], **options: str) -> dict:
    found = difference(made(before), made(after, **options))
    return found | {"rows": {(r["label"], r["split"]): {k: r[k] for k in CHANGES if r[k]} for r in found["rows"]}}


OLD = [("1", "a", "train"), ("2", "a", "train"), ("3", "b", "val"), ("4", "b", "test"), ("4", "b", "test")]


def test_the_same_examples_in_another_order_are_no_change() -> None:
    """A user would search for a change that there is not."""
    found = changes(OLD, OLD[::-1])
    assert found["rows"] == {} and found["total"] == {"added": 0, "removed": 0, "moved": 0, "relabelled": 0, "kept": 5}


def test_each_kind_of_change_is_counted_where_it_happened() -> None:
    """A user could not tell twenty new images from twenty whose label was changed."""
    after = [("1", "a", "test"), ("2", "b", "train"), ("3", "b", "val"), ("4", "b", "test"), ("5", "a", "val")]
    found = changes(OLD, after)
    assert found["total"] == {"added": 1, "removed": 1, "moved": 1, "relabelled": 1, "kept": 2}
    assert found["rows"] == {
        ("a", "train"): {"before": 2, "to_splits": 1, "to_labels": 1},
        ("a", "val"): {"after": 1, "added": 1},
        ("a", "test"): {"after": 1, "from_splits": 1},
        ("b", "train"): {"after": 1, "from_labels": 1},
        ("b", "test"): {"before": 2, "after": 1, "removed": 1},
    }


def test_a_copy_more_is_an_example_more() -> None:
    """A user's image that is now there twice would be no change, though the digest is another."""
    assert changes(OLD, [*OLD, ("1", "a", "train")])["total"]["added"] == 1


def test_classes_that_came_and_went_are_named() -> None:
    """A user's lost class would be one line among a thousand."""
    found = changes(OLD, [("1", "c", "train")], classes="ac")
    assert (found["classes_added"], found["classes_removed"]) == (["c"], ["b"])
    assert found["total"] == {"added": 0, "removed": 4, "moved": 0, "relabelled": 1, "kept": 0}


# ---- signatures ----------------------------------------------------------------------------------------------------------------


def test_signatures_are_those_of_the_rows(packed: Dataset) -> None:
    """A user's near duplicates would be shown beside pictures that look nothing like them."""
    looks = packed.signature_bytes({"thumb": 1024, "colour": 3})
    table = packed.signatures()
    assert looks["thumb"].tobytes() == b"".join(table["thumb"].to_pylist())
    assert looks["colour"].tobytes() == b"".join(table["colour"].to_pylist())
    some = packed._replace(manifest=packed.manifest.take([5, 2, 2, 30]))
    assert [t.tobytes() for t in some.signature_bytes({"thumb": 1024})["thumb"]] == [
        table["thumb"][n].as_py() for n in (5, 2, 2, 30)
    ]
    for row, data in zip(table.to_pylist(), packed.read(packed.manifest), strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert row["brightness"] == pytest.approx(np.asarray(image).mean(), abs=6)


def test_signatures_that_are_cut_off_get_one_line(packed: Dataset, tmp_path: Path) -> None:
    """A user's half-copied dataset would be judged by whatever was left of it."""
    pq.write_table(packed.signatures().slice(0, 10), tmp_path / "signatures.parquet")
    cut = packed._replace(folder=tmp_path)
    for read in (lambda: cut.signature_bytes({"thumb": 1024}), cut.signatures):
        with pytest.raises(UserError, match=r"its signatures cannot be read .*run ingest_data again"):
            read()
    (tmp_path / "signatures.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="its signatures cannot be read"):
        cut.signature_bytes({"thumb": 1024})


def test_many_shards_are_read_with_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's terabyte would run out of open files, or hold on to every one that it has closed."""
    import graftwork.packing

    monkeypatch.setattr(graftwork.packing, "PACK_BYTES", 1)
    monkeypatch.setattr(graftwork.dataset, "OPEN_SHARDS", 3)
    ingest(IngestSettings(data="digits", train_per_class=2, test_per_class=1), tmp_path / "many")
    data = open_dataset(tmp_path / "many")
    assert len(set(data.manifest["shard"].to_pylist())) > 20
    rows = pa.concat_tables([data.manifest, data.manifest.slice(3, 9)])
    reading = data.read(rows)
    read = [next(reading) for _ in range(len(rows) - 1)]
    assert len([p for p in psutil.Process().open_files() if f"{tmp_path}/many/shards" in p.path]) <= 3
    read.append(next(reading))
    reading.close()
    assert [hashlib.sha256(np.asarray(Image.open(io.BytesIO(b))).tobytes()).hexdigest() for b in read] == rows[
        "sha256"
    ].to_pylist()
    assert not [p for p in psutil.Process().open_files() if str(tmp_path) in p.path]
