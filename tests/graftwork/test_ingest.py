"""Ingest: the split that never moves, what is left out and why, and shards that any reader can open."""

import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import graftwork.packing
from graftwork.dataset import SPLITS, Dataset, open_dataset
from graftwork.errors import UserError
from graftwork.ingest import ingest
from graftwork.settings import IngestSettings


def picture(path: Path, seed: int, format: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format)
    return path


def classes_of(root: Path, **sizes: int) -> Path:
    """Make ``sizes`` different images a class; the seeds of a class do not depend on the others."""
    for label, size in sizes.items():
        for n in range(size):
            picture(root / label / f"{n:03d}.png", n + 1000 * sum(label.encode()))
    return root


def pack(root: Path | str, folder: Path, **settings: object) -> Dataset:
    ingest(IngestSettings(data=str(root), **settings), folder)
    return open_dataset(folder)


def rows(data: Dataset) -> list[dict[str, object]]:
    return data.manifest.to_pylist()


def split_of(data: Dataset) -> dict[str, str]:
    return {row["source"]: row["split"] for row in rows(data)}


def counts(data: Dataset) -> dict[tuple[str, str], int]:
    return dict(Counter((row["label"], row["split"]) for row in rows(data)))


# ---- splits --------------------------------------------------------------------------------------------------------------------


def test_new_images_move_no_old_one(tmp_path: Path) -> None:
    """A user who adds images each week would test on what the last model learned from, and see it as progress."""
    root = classes_of(tmp_path / "data", cat=40, dog=40)
    before = split_of(pack(root, tmp_path / "one"))
    classes_of(root, cat=70, dog=45, emu=30)
    (root / "cat" / "000.png").rename(root / "cat" / "renamed.png")
    after = split_of(pack(root, tmp_path / "two"))
    before["cat/renamed.png"] = before.pop("cat/000.png")
    assert {k: after[k] for k in before} == before and len(after) == 145
    assert set(before.values()) == set(SPLITS)


def test_another_seed_is_another_split(tmp_path: Path) -> None:
    """A user who repeats an experiment with several seeds would repeat the same split, and believe its luck."""
    root = classes_of(tmp_path / "data", cat=30, dog=30)
    one, two, again = (pack(root, tmp_path / str(n), seed=s) for n, s in enumerate((0, 1, 0)))
    assert split_of(one) != split_of(two) and one.digest != two.digest
    assert split_of(one) == split_of(again) and one.digest == again.digest


@pytest.mark.parametrize("seed", range(4))
def test_copies_of_an_image_stay_in_one_split(tmp_path: Path, seed: int) -> None:
    """A user would test on images that were trained on, under another name or in another class."""
    root = classes_of(tmp_path / "data", cat=12, dog=12)
    for n in range(12):
        shutil.copy(root / "cat" / f"{n:03d}.png", root / "cat" / f"copy{n}.png")
        shutil.copy(root / "cat" / f"{n:03d}.png", root / "dog" / f"cat{n}.png")
    data = pack(root, tmp_path / "out", seed=seed)
    splits = defaultdict(set)
    for row in rows(data):
        splits[row["sha256"]].add(row["split"])
    assert len(splits) == 24 and len(rows(data)) == 48
    assert all(len(found) == 1 for found in splits.values())
    assert len({row["id"] for row in rows(data)}) == 48  # each copy can still be told apart


@pytest.mark.parametrize(
    ("given", "kept", "cut"),
    [
        (("train", "val", "test"), {"train": "train", "val": "val", "test": "test"}, set()),
        (("train", "val"), {"val": "test"}, {"train", "val"}),
        (("train", "test"), {"test": "test"}, {"train", "val"}),
        (("train",), {}, {"train", "val", "test"}),
    ],
    ids=["all", "train and val", "train and test", "train"],
)
def test_the_sources_own_splits(tmp_path: Path, given: tuple[str, ...], kept: dict[str, str], cut: set[str]) -> None:
    """A user's published test set would be trained on, or be another than everybody else's."""
    for number, split in enumerate(given):
        classes_of(tmp_path / "data" / split, **{"cat" + "x" * number: 15, "dog" + "x" * number: 15})
        for label in ("cat", "dog"):
            (tmp_path / "data" / split / (label + "x" * number)).rename(tmp_path / "data" / split / label)
    found = defaultdict(set)
    for source, split in split_of(pack(tmp_path / "data", tmp_path / "out")).items():
        found[source.split("/")[0]].add(split)
    assert found == {**{g: {kept[g]} for g in given if g in kept}, **({"train": cut} if cut else {})}


# ---- limits --------------------------------------------------------------------------------------------------------------------


def test_per_class_limits(tmp_path: Path) -> None:
    """A user who asks for ten examples a class would get more, fewer, or a validation part out of proportion."""
    root = classes_of(tmp_path / "data", cat=100, dog=100, emu=9)
    data = pack(root, tmp_path / "out", train_per_class=20, test_per_class=7)
    found = counts(data)
    assert {k: found[k] for k in found if k[0] != "emu"} == {
        (label, split): n for label in ("cat", "dog") for split, n in (("train", 20), ("val", 5), ("test", 7))
    }
    assert sum(n for (label, _), n in found.items() if label == "emu") == 9  # fewer than the limit: all
    whole = split_of(pack(root, tmp_path / "whole"))
    assert split_of(data).items() <= whole.items()  # a limit leaves out, it moves nothing


def test_a_larger_limit_keeps_the_smaller_ones_examples(tmp_path: Path) -> None:
    """A user's learning curve would compare different examples in place of more of them."""
    root = classes_of(tmp_path / "data", cat=60, dog=60)
    small, large = (set(split_of(pack(root, tmp_path / str(n), train_per_class=n))) for n in (5, 15))
    assert small < large


def test_the_given_test_set_is_sampled_the_same_under_every_seed(tmp_path: Path) -> None:
    """A user who compares seeds would compare them on different test sets."""
    for split in ("train", "test"):
        classes_of(tmp_path / "data" / split, **{f"cat{split[1]}": 30, f"dog{split[1]}": 30})
        for label in ("cat", "dog"):
            (tmp_path / "data" / split / f"{label}{split[1]}").rename(tmp_path / "data" / split / label)
    parts = []
    for seed in (0, 1):
        data = pack(tmp_path / "data", tmp_path / str(seed), seed=seed, test_per_class=5, train_per_class=5)
        parts.append([{s for s, where in split_of(data).items() if where == part} for part in ("test", "train")])
    assert parts[0][0] == parts[1][0] and len(parts[0][0]) == 10
    assert parts[0][1] != parts[1][1]


def test_a_broken_image_does_not_use_up_a_limit(tmp_path: Path) -> None:
    """A user who asks for all of a small number of examples would train on fewer, for broken files beside good ones."""
    root = classes_of(tmp_path / "data", cat=40, dog=40)
    for n in range(40):
        (root / "cat" / f"broken{n}.png").write_bytes(b"no image %d" % n)
    data = pack(root, tmp_path / "out", train_per_class=10)
    assert (counts(data)["cat", "train"], counts(data)["dog", "train"]) == (10, 10)


# ---- the artifact --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two classes with several formats, one of them with an odd name."""
    root = classes_of(tmp_path / "data", **{"it's a\ncat 中": 8, "dog": 8})
    for n, (format, suffix) in enumerate([("JPEG", ".JPG"), ("GIF", ".gif"), ("TIFF", ".tiff"), ("BMP", ".bmp")]):
        picture(root / "dog" / f"é {n}{suffix}", n, format)
    return root


def test_every_example_is_one_read_at_its_offset(mixed: Path, tmp_path: Path) -> None:
    """A user would train on bytes that are not those of the files, or under another file's label."""
    data = pack(mixed, tmp_path / "out")
    assert len(rows(data)) == 20
    for row, read in zip(rows(data), data.read(data.manifest), strict=True):
        original = (mixed / row["source"]).read_bytes()
        assert read == original and row["bytes"] == row["length"] == len(original)
        with (data.folder / "shards" / row["shard"]).open("rb") as file:
            file.seek(row["offset"])
            assert file.read(row["length"]) == original
        assert row["sha256"] == hashlib.sha256(original).hexdigest()
        assert (row["width"], row["height"]) == (8, 6)
        assert row["label"] == row["source"].split("/")[0]
        with Image.open(mixed / row["source"]) as image:
            assert row["mode"] == image.mode


def test_shards_are_tars(mixed: Path, tmp_path: Path) -> None:
    """A user of tar, or of webdataset, could not open the shards that are called WebDataset."""
    data = pack(mixed, tmp_path / "out")
    by_member = {row["id"] + Path(row["source"]).suffix.lower(): row for row in rows(data)}
    seen = {}
    for path in sorted((data.folder / "shards").iterdir()):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                row = seen[member.name] = by_member[member.name]
                assert member.isfile() and (member.mtime, member.uid, member.uname) == (0, 0, "")
                assert row["shard"] == path.name
                assert (member.offset_data, member.size) == (row["offset"], row["length"])
    assert seen == by_member


def test_large_data_goes_into_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's hundred gigabytes would be one tar that no worker can share, or lose what lies at the seams."""
    monkeypatch.setattr(graftwork.packing, "PACK_BYTES", 1500)
    root = classes_of(tmp_path / "data", cat=30, dog=30)
    data = pack(root, tmp_path / "out")
    shards = Counter(row["shard"] for row in rows(data))
    assert len(shards) > 6 and sorted(shards) == sorted(p.name for p in (data.folder / "shards").iterdir())
    read = {row["source"]: b for row, b in zip(rows(data), data.read(data.manifest), strict=True)}
    assert read == {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.png")}


def contents(folder: Path, *leave_out: str) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in leave_out
    }


def test_the_same_input_gives_the_same_bytes(mixed: Path, tmp_path: Path) -> None:
    """A user's cache and object store would take the same data for new, run after run."""
    pack(mixed, tmp_path / "one")
    pack(mixed, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    shutil.copytree(mixed, tmp_path / "elsewhere")  # other times, another place
    pack(tmp_path / "elsewhere", tmp_path / "three")
    assert contents(tmp_path / "one", "dataset.json") == contents(tmp_path / "three", "dataset.json")


def test_dataset_json_says_what_the_artifact_holds(mixed: Path, tmp_path: Path) -> None:
    """A user could not tell from an artifact what it was made of, and with which settings."""
    (mixed / "dog" / "notes.txt").write_text("x")
    info = ingest(IngestSettings(data=str(mixed), seed=3), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8")) == info
    data = open_dataset(tmp_path / "out", info["digest"])
    assert info["classes"] == ["dog", "it's a\ncat 中"] and info["name"] == "data"
    assert info["counts"] == {s: {c: counts(data).get((c, s), 0) for c in info["classes"]} for s in SPLITS}
    assert (info["broken"], info["skipped"], info["settings"]["seed"]) == ([], {".txt": 1}, 3)


def test_digits_are_packed_as_they_are(tmp_path: Path) -> None:
    """A user's first run, on the dataset that needs no download, would be of other pictures."""
    from sklearn.datasets import load_digits

    data = pack("digits", tmp_path / "out", train_per_class=5, test_per_class=3)
    assert data.classes == list("0123456789")
    assert set(counts(data).values()) == {5, 1, 3}
    bunch = load_digits()
    for row, read in zip(rows(data), data.read(data.manifest), strict=True):
        n = int(Path(row["source"]).stem)
        pixels = np.asarray(Image.open(io.BytesIO(read)))
        assert row["label"] == str(bunch.target[n]) and (pixels == np.round(bunch.images[n] * 255 / 16)).all()


# ---- the digest ----------------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_contents_labels_and_splits_alone(tmp_path: Path) -> None:
    """A user would be told that the data changed when files were only copied or renamed."""
    root = classes_of(tmp_path / "data", cat=12, dog=12)
    other = tmp_path / "other"
    for n, path in enumerate(sorted(root.rglob("*.png"), reverse=True)):
        target = other / path.parent.name / "sub" / f"new name {n}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    assert pack(root, tmp_path / "one").digest == pack(other, tmp_path / "two").digest


def touch_pixel(root: Path) -> None:
    picture(root / "train" / "cat" / "000.png", 999_999)


DIGEST_CHANGES = {
    "content": touch_pixel,
    "one image more": lambda root: picture(root / "val" / "cat" / "new.png", 999_999),
    "one image less": lambda root: (root / "test" / "cat" / "000.png").unlink(),
    "label": lambda root: (root / "train" / "cat" / "000.png").rename(root / "train" / "dog" / "moved.png"),
    "class name": lambda root: [(root / s / "dog").rename(root / s / "hound") for s in SPLITS],
    "split": lambda root: (root / "test" / "cat" / "000.png").rename(root / "train" / "cat" / "moved.png"),
}


@pytest.mark.parametrize("name", DIGEST_CHANGES)
def test_the_digest_sees_a_change(name: str, tmp_path: Path) -> None:
    """A user's model would be said to come from data that it does not come from."""
    root = tmp_path / "data"
    for n, split in enumerate(SPLITS):
        for m, label in enumerate(("cat", "dog")):
            for k in range(3):
                picture(root / split / label / f"{k:03d}.png", 100 * n + 10 * m + k)
    before = pack(root, tmp_path / "one").digest
    DIGEST_CHANGES[name](root)
    assert pack(root, tmp_path / "two").digest != before
    assert len(before) <= 36  # MLflow takes no more


# ---- what goes wrong -----------------------------------------------------------------------------------------------------------


def spoil(folder: Path) -> dict[str, str]:
    """Put one of each kind of broken file in ``folder``; return {name: the reason expected}."""
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    (folder / "zero.png").touch()
    (folder / "text.jpg").write_text("hello")
    (folder / "half.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    Image.new("L", (2000, 20)).save(folder / "wide.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    return {
        "zero.png": "zero bytes",
        "text.jpg": "not an image",
        "half.jpg": "cut off",
        "wide.png": "more than 10,000",
        "gone.png": "no such file or directory",
        "pipe.png": "not a regular file",
    }


def test_broken_images_are_left_out_and_listed_with_their_reason(tmp_path: Path) -> None:
    """A user would train on half-decoded pictures, or lose a run of a million images to a handful."""
    root = classes_of(tmp_path / "data", cat=6, dog=6)
    expected = {f"dog/{name}": reason for name, reason in spoil(root / "dog").items()}
    data = pack(root, tmp_path / "out", max_pixels=10_000)
    found = {b["source"]: b["reason"] for b in data.info["broken"]}
    assert set(found) == set(expected)
    assert all(expected[name] in found[name] for name in expected), found
    assert {b["label"] for b in data.info["broken"]} == {"dog"}
    assert len(rows(data)) == 12 and not set(split_of(data)) & set(expected)


def test_only_broken_images_are_a_mistake_of_the_users(tmp_path: Path) -> None:
    """A user would get an empty dataset, and a stack trace three steps later."""
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "a\nb.jpg").write_text("hello")
    with pytest.raises(UserError, match=r"none of its 2 images can be decoded \(.*not an image\)") as raised:
        pack(tmp_path / "data", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("how", ["text", "dangling link"])
def test_a_class_of_broken_images_is_still_a_class(tmp_path: Path, how: str) -> None:
    """A user would get a classifier that silently lacks a class, or a finding that says nothing of its images."""
    root = classes_of(tmp_path / "data", cat=6, dog=6)
    (root / "emu").mkdir()
    for n in range(3):
        if how == "text":
            (root / "emu" / f"{n}.png").write_text(f"hello {n}")
        else:
            (root / "emu" / f"{n}.png").symlink_to("nowhere.png")
    data = pack(root, tmp_path / "out")
    assert data.classes == ["cat", "dog", "emu"]
    assert [data.info["counts"][split]["emu"] for split in SPLITS] == [0, 0, 0]
    assert len(data.info["broken"]) == 3


def test_names_that_are_no_utf8_can_be_packed(tmp_path: Path) -> None:
    """A user with files from an old Windows share would see the run end in a UnicodeEncodeError."""
    root = classes_of(tmp_path / "data", tea=5)
    picture(root / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.png"), 1)
    (root / "tea" / os.fsdecode(b"notes.\xe9t\xe9")).write_text("x")
    data = pack(root, tmp_path / "out")
    assert data.classes == ["caf\\xe9", "tea"] and "caf\\xe9/\\xff.png" in split_of(data)


def test_a_failure_half_way_leaves_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's full disk would leave a dataset that looks finished, or cost the good one of the last run."""
    root = classes_of(tmp_path / "data", cat=10, dog=10)
    write, calls = tarfile.TarFile.addfile, itertools.count()

    def full_disk(*arguments: object) -> None:
        if next(calls) == 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    pack(root, tmp_path / "old")
    monkeypatch.setattr(tarfile.TarFile, "addfile", full_disk)
    before = contents(tmp_path / "old")
    for name in ("old", "new"):
        calls = itertools.count()
        with pytest.raises(OSError, match="No space left"):
            ingest(IngestSettings(data=str(root), seed=1), tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "old"]
    assert contents(tmp_path / "old") == before


def test_an_image_that_changes_while_it_is_packed_gets_in_under_no_false_hash(tmp_path: Path) -> None:
    """A user who is still copying images would have a digest, a size and a split that belong to other bytes."""
    root = classes_of(tmp_path / "data", cat=6, dog=6)

    def change(done: int, total: int) -> None:
        if done == total:
            picture(root / "cat" / "000.png", 424242)

    try:
        ingest(IngestSettings(data=str(root)), tmp_path / "out", change)
    except UserError as error:
        assert "cat/000.png" in str(error) and not (tmp_path / "out").exists()
        return
    data = open_dataset(tmp_path / "out")
    for row, read in zip(rows(data), data.read(data.manifest), strict=True):
        assert row["sha256"] == hashlib.sha256(read).hexdigest(), row["source"]


def test_progress_counts_up_to_the_whole(tmp_path: Path) -> None:
    """A user's progress bar would stand still, or never reach its end."""
    root = classes_of(tmp_path / "data", cat=5, dog=5)
    (root / "cat" / "broken.png").write_text("x")
    seen: list[tuple[int, int]] = []
    ingest(IngestSettings(data=str(root)), tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert seen == [(n, 11) for n in range(1, 12)]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("limit", [0, 4])
def test_a_manifests_own_columns_come_along(tmp_path: Path, kind: str, limit: int) -> None:
    """She could not see that the model fails on one camera: the column that tells it would be lost on the way."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    from graftwork.slices import slice_scores

    classes_of(tmp_path / "images", cat=30, dog=30)
    paths = sorted((tmp_path / "images").rglob("*.png"))
    camera = ["old" if n % 3 == 0 else "new" for n in range(len(paths))]
    table = pa.table(
        {
            "Camera ": camera,
            "path": [str(p) for p in paths],
            "label": [p.parent.name for p in paths],
            "note": ["" if n else "first" for n in range(len(paths))],
        }
    )
    manifest = tmp_path / f"m.{kind}"
    (pyarrow.csv.write_csv if kind == "csv" else pq.write_table)(table, manifest)
    data = pack(
        manifest, tmp_path / "out", slices=["camera", "note", "width"], train_per_class=limit, test_fraction=0.5
    )
    told = {row["source"]: json.loads(row["columns"]) for row in rows(data) if row["columns"]}
    expected = dict(zip(table["path"].to_pylist(), camera, strict=True))
    assert told and {key: said["camera"] for key, said in told.items()} == {key: expected[key] for key in told}
    assert [said["note"] for said in told.values() if "note" in said] in ([], ["first"])
    test = data.split("test")
    targets = data.targets(test)
    wrong = np.array([json.loads(text)["camera"] == "old" for text in test["columns"].to_pylist()])
    found = slice_scores(data, test, targets, np.where(wrong, 1 - targets, targets), ["camera"])
    if not limit:
        assert (found[0]["column"], found[0]["value"], found[0]["accuracy"]) == ("camera", "old", 0.0)
    plain = pack(manifest, tmp_path / "plain", train_per_class=limit, test_fraction=0.5)
    assert plain.digest == data.digest and set(plain.manifest["columns"].to_pylist()) == {""}
    with pytest.raises(UserError, match=r"no column 'lens' \(columns found: 'Camera', 'path'"):
        pack(manifest, tmp_path / "none", slices=["lens"])
    with pytest.raises(UserError, match="only a manifest"):
        pack(tmp_path / "images", tmp_path / "none", slices=["camera"])
