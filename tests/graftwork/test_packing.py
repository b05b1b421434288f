"""Packs: nothing is read or packed twice, an interrupted packing goes on, and nothing stays that left the source."""

import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import graftwork.packing
from graftwork.dataset import Dataset, open_dataset
from graftwork.errors import UserError
from graftwork.files import STORE
from graftwork.ingest import ingest
from graftwork.packing import Packer
from graftwork.settings import IngestSettings
from graftwork.sources import open_source
from graftwork.sources.record import File


def picture(path: Path, seed: int, size: tuple[int, int] = (24, 20), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for n in range(60):
        picture(tmp_path / "data" / ("cat" if n % 2 else "dog") / f"{n:03d}.png", n)
    return tmp_path / "data"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of packs that hold about eight pictures each."""
    monkeypatch.setenv(STORE, str(tmp_path / "store"))
    monkeypatch.setattr(graftwork.packing, "PACK_BYTES", 16_000)
    return tmp_path / "store"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read."""
    counted: Counter[str] = Counter()
    read = File.read

    def count(self: File) -> bytes:
        counted[self.path.name] += 1
        return read(self)

    monkeypatch.setattr(File, "read", count)
    return counted


def pack(root: Path, folder: Path, **settings: object) -> Dataset:
    ingest(IngestSettings(data=str(root), **settings), folder)
    return open_dataset(folder)


def check(data: Dataset, root: Path) -> None:
    """Every row holds the bytes of its file, and the shards hold nothing else."""
    rows = data.manifest.to_pylist()
    for row, content in zip(rows, data.read(data.manifest), strict=True):
        assert content == (root / row["source"]).read_bytes()
    members = []
    for path in (data.folder / "shards").iterdir():
        with tarfile.open(path) as tar:
            members += [m.name.split(".")[0] for m in tar.getmembers()]
    assert sorted(members) == sorted({row["sha256"][:20] for row in rows})
    assert len(data.signatures()) == len(rows)


def names(data: Dataset) -> set[str]:
    return {p.name for p in (data.folder / "shards").iterdir()}


def test_what_is_known_is_not_read_again(root: Path, store: Path, reads: Counter[str], tmp_path: Path) -> None:
    """A user's hundred thousand images would be read, decoded and written anew every week for the few that came."""
    first = pack(root, tmp_path / "one")
    assert set(reads.values()) == {1} and len(reads) == 60
    picture(root / "cat" / "new.png", 1000)
    reads.clear()
    second = pack(root, tmp_path / "two")
    assert reads == {"new.png": 1}
    check(first, root)
    check(second, root)
    assert names(first) < names(second) and len(names(second) - names(first)) == 1
    some = sorted(names(first))[0]
    assert (first.folder / "shards" / some).stat().st_ino == (second.folder / "shards" / some).stat().st_ino


def test_a_renamed_image_is_read_but_not_packed_again(
    root: Path, store: Path, reads: Counter[str], tmp_path: Path
) -> None:
    """A user who renames a folder would pay for the disk and the decoding of all of it."""
    first = pack(root, tmp_path / "one")
    (root / "cat").rename(root / "tomcat")
    reads.clear()
    second = pack(root, tmp_path / "two")
    assert len(reads) == 30 and names(first) == names(second)
    assert {r["label"] for r in second.manifest.to_pylist()} == {"tomcat", "dog"}
    check(second, root)
    reads.clear()
    check(pack(root, tmp_path / "three"), root)
    assert not reads  # and the next time it is known under its new name


def test_a_changed_file_is_noticed(root: Path, store: Path, tmp_path: Path) -> None:
    """A user's corrected image would be trained on as it was before."""
    pack(root, tmp_path / "one")
    path = picture(root / "cat" / "001.png", 999)
    os.utime(path, (1, 1))
    check(pack(root, tmp_path / "two"), root)


def test_an_image_that_left_the_source_leaves_the_dataset(root: Path, store: Path, tmp_path: Path) -> None:
    """A user who deletes a patient's image would still hand it on, in the shards."""
    pack(root, tmp_path / "one")
    (root / "cat" / "001.png").unlink()
    data = pack(root, tmp_path / "two")
    assert len(data.manifest) == 59
    check(data, root)


def test_an_interrupted_packing_goes_on(
    root: Path, store: Path, reads: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user whose packing of a day is cut off after 23 hours would wait another day."""
    add, left = tarfile.TarFile.addfile, iter(range(35))

    def cut_off(self: tarfile.TarFile, member: tarfile.TarInfo, content: io.BytesIO) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(self, member, content)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", cut_off)
        with pytest.raises(KeyboardInterrupt):
            pack(root, tmp_path / "one")
    assert not (tmp_path / "one").exists() and not list(store.rglob("*.partial"))
    reads.clear()
    check(pack(root, tmp_path / "one"), root)
    assert 25 <= len(reads) <= 36  # what the unfinished pack held, and what had not been reached


def test_a_damaged_pack_is_not_used(root: Path, store: Path, tmp_path: Path) -> None:
    """A user's store that a full disk has cut would give a dataset with holes."""
    pack(root, tmp_path / "one")
    for n, path in enumerate(sorted(store.rglob("*.tar"))[:3]):
        path.chmod(0o600)
        content = path.read_bytes()
        path.unlink()
        if n:
            path.write_bytes(content[: len(content) // 2])
    table = sorted(store.rglob("*.parquet"))[-1]
    table.write_bytes(b"PAR1 nothing")
    check(pack(root, tmp_path / "two"), root)


def test_limits_take_from_the_store(root: Path, store: Path, reads: Counter[str], tmp_path: Path) -> None:
    """A user who tries ten images a class first would have everything decoded twice."""
    pack(root, tmp_path / "one")
    reads.clear()
    data = pack(root, tmp_path / "two", train_per_class=5, test_per_class=2)
    assert not reads and len(data.manifest) < 20
    check(data, root)
    pack(root, tmp_path / "three", train_per_class=5, test_per_class=2)


def test_settings_that_change_what_is_packed_share_no_packs(root: Path, store: Path, tmp_path: Path) -> None:
    """A user who sets another bound for large images would get those of the old one."""
    pack(root, tmp_path / "one")
    data = pack(root, tmp_path / "two", max_side=16)
    assert {Image.open(io.BytesIO(b)).size for b in data.read(data.manifest)} == {(19, 16)}


def test_equal_contents_are_packed_once(root: Path, tmp_path: Path) -> None:
    """A user's dataset of copies would take their space many times over."""
    for n in range(20):
        (root / "dog" / f"copy{n}.png").write_bytes((root / "cat" / "001.png").read_bytes())
    data = pack(root, tmp_path / "one")
    same = [r for r in data.manifest.to_pylist() if r["source"].startswith("dog/copy") or r["source"] == "cat/001.png"]
    assert len(same) == 21 and len({(r["shard"], r["offset"]) for r in same}) == 1
    assert len({r["id"] for r in same}) == 21
    check(data, root)


@pytest.mark.parametrize(("name", "format"), [("a.jpg", "JPEG"), ("a.png", "PNG"), ("a.tif", "PNG")])
def test_large_images_are_scaled_down_once(name: str, format: str, tmp_path: Path) -> None:
    """A user's camera pictures would be decoded at full size in every epoch."""
    root = tmp_path / "data"
    for label in ("cat", "dog"):
        for n in range(4):
            picture(root / label / f"{n}{name}", hash((label, n)) % 1000, (300, 200))
    small = picture(root / "cat" / f"small{name}", 5, (90, 64))
    data = pack(root, tmp_path / "out", max_side=64)
    for row, content in zip(data.manifest.to_pylist(), data.read(data.manifest), strict=True):
        original = (root / row["source"]).read_bytes()
        if row["source"] == f"cat/{small.name}":
            assert content == original
            continue
        image = Image.open(io.BytesIO(content))
        assert (image.format, image.size) == (format, (96, 64))
        assert (row["width"], row["height"], row["bytes"]) == (300, 200, len(original))
        # The picture is the same: means agree, though the noise is averaged.
        with Image.open(io.BytesIO(original)) as before:
            assert np.allclose(np.asarray(image).mean((0, 1)), np.asarray(before).mean((0, 1)), atol=3)


def test_packs_cannot_be_written_to(root: Path, store: Path, tmp_path: Path) -> None:
    """A user's program that edits one dataset would edit all that share its packs."""
    data = pack(root, tmp_path / "one")
    assert all(p.stat().st_mode & 0o222 == 0 for p in (data.folder / "shards").iterdir())


def test_two_packers_with_one_process_id_share_a_store(root: Path, store: Path, tmp_path: Path) -> None:
    """A user's two pods, each with the process id 1, would write into each other's packs: other pictures under a label."""
    settings = IngestSettings(data=str(root))
    packers = [Packer(str(n), tmp_path / "unused", settings) for n in range(2)]
    records = [list(enumerate(open_source(str(root)).records()))[n::2] for n in range(2)]
    steps = [packer.pack(some, 1) for packer, some in zip(packers, records, strict=True)]
    codes: list[list[int]] = [[], []]
    for pair in zip(*steps, strict=True):
        for n, (_, _, found) in enumerate(pair):
            codes[n].append(found.code)
    for n, packer in enumerate(packers):
        (tmp_path / str(n)).mkdir()
        places = packer.finish(codes[n], tmp_path / str(n), tmp_path / f"{n}.parquet").to_pylist()
        for (_, record), place in zip(records[n], places, strict=True):
            with (tmp_path / str(n) / place["shard"]).open("rb") as file:
                file.seek(place["offset"])
                assert file.read(place["length"]) == record.content.read()


def test_a_store_that_is_emptied_meanwhile_gets_one_line(root: Path, store: Path, tmp_path: Path) -> None:
    """A user who cleans up while a run goes on would get a trace, or a dataset with holes."""
    packer = Packer("x", tmp_path / "unused", IngestSettings(data=str(root)))
    found = [f for _, _, f in packer.pack(enumerate(open_source(str(root)).records()), 2)]
    for path in store.rglob("*.tar"):
        path.unlink()
    (tmp_path / "shards").mkdir()
    with pytest.raises(UserError, match="was emptied while it was used; run again"):
        packer.finish([f.code for f in found], tmp_path / "shards", tmp_path / "s.parquet")


def test_large_examples_after_small_ones_are_not_read_in_numbers(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's photographs after thumbnails would be read by the hundred, into all of the memory."""
    monkeypatch.setattr(graftwork.packing, "HELD_BYTES", 2_000)
    for n in range(80):
        picture(tmp_path / "data" / "ab"[n % 2] / f"{n:02d}.png", n, (8, 8) if n < 40 else (64, 64))
    check(pack(tmp_path / "data", tmp_path / "out"), tmp_path / "data")


def test_a_store_that_cannot_be_written_gets_one_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who mistypes the store's folder would read a trace that calls it a defect."""
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(STORE, str(tmp_path / "file" / "store"))
    with pytest.raises(UserError, match=r"store .*cannot be written \(Not a directory\); set GRAFTWORK_STORE"):
        pack(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
