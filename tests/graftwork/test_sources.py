"""Sources: folders as people really have them, and the one line for each that cannot be used."""

import gzip
import io
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graftwork.errors import UserError
from graftwork.sources import open_source
from graftwork.sources.arrays import cache_folder, read_idx
from graftwork.sources.folder import FolderSource


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)).save(path, "PNG")
    os.utime(path, (1_600_000_000, 1_600_000_000))
    return path


def folder_of(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        picture(root / name, seed)
    return root


def found(root: Path) -> list[tuple[str, str, str]]:
    return [(r.key, r.label, r.split) for r in open_source(str(root)).records()]


def within(seconds: float, function: Callable[[], object]) -> object:
    """Call ``function`` in a thread, so that one that waits for ever fails the test in place of hanging it."""
    result: list[object] = []

    def call() -> None:
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits for ever"
    return result[0]


# ---- layouts -------------------------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    """A user's plainest layout would not be read, or not in the same order from run to run."""
    folder_of(tmp_path, "dog/2.jpg", "dog/1.JPG", "cat/a.png")
    assert found(tmp_path) == [("cat/a.png", "cat", ""), ("dog/1.JPG", "dog", ""), ("dog/2.jpg", "dog", "")]
    assert open_source(str(tmp_path)).name == tmp_path.name


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["train", "val", "test"], ["train", "val", "test"]),
        (["training", "validation", "test"], ["train", "val", "test"]),
        (["Train", "Valid", "TEST"], ["train", "val", "test"]),
        (["train", "val"], ["train", "val"]),
        (["train", "test"], ["train", "test"]),
        (["train"], ["train"]),
    ],
    ids=lambda v: "-".join(v),
)
def test_split_folders(tmp_path: Path, folders: list[str], splits: list[str]) -> None:
    """A user's own split would be taken for classes, or be cut anew, and results not be comparable with others'."""
    folder_of(tmp_path, *(f"{f}/{c}/x.png" for f in folders for c in ("ant", "bee")))
    expected = [(f"{f}/{c}/x.png", c, s) for f, s in zip(folders, splits, strict=True) for c in ("ant", "bee")]
    assert sorted(found(tmp_path)) == sorted(expected)


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    """A user who tells trains from cars would have the trains taken for a training split."""
    folder_of(tmp_path, "train/1.jpg", "car/1.jpg")
    assert found(tmp_path) == [("car/1.jpg", "car", ""), ("train/1.jpg", "train", "")]


def test_split_folders_beside_a_hidden_folder_and_loose_files(tmp_path: Path) -> None:
    """A user's .git, .DS_Store or README beside train and test would turn the splits into classes."""
    folder_of(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", ".cache/c/1.png")
    (tmp_path / "README.md").write_text("hello")
    assert [(label, split) for _, label, split in found(tmp_path)] == [("a", "test"), ("a", "train"), ("b", "train")]


def test_nested_folders_belong_to_their_class(tmp_path: Path) -> None:
    """A user's sub-folders (by day, by camera) would become classes or be lost."""
    folder_of(tmp_path, "cat/2024/may/1.png", "cat/2.png", "dog/x/y/z/1.png")
    assert Counter(label for _, label, _ in found(tmp_path)) == {"cat": 2, "dog": 1}


def test_what_is_no_image_is_counted_and_hidden_files_are_not(tmp_path: Path) -> None:
    """A user could not see that half of the files were passed over for their suffix."""
    folder_of(tmp_path, "cat/1.png", "dog/1.png", "loose.png", "cat/.hidden.png", "__MACOSX/cat/1.png", "dog/.x/1.png")
    for name in ("cat/notes.txt", "dog/more.TXT", "cat/raw.heic", "dog/LICENSE", "cat/.DS_Store", "dog/Thumbs.db"):
        (tmp_path / name).write_text("x")
    source = open_source(str(tmp_path))
    assert [r.key for r in source.records()] == ["cat/1.png", "dog/1.png"]
    assert source.skipped() == {".txt": 2, ".heic": 1, "no suffix": 1, "images outside a class folder": 1}


@pytest.mark.parametrize(
    "name",
    [
        "two words",
        'it\'s "quoted"',
        "ça 中 🙂",
        "line\nbreak",
        "-rf",
        "a;b&c|d$(e)",
        "100%20",
        "#1?",
        "{count}",
        "é" * 100,
    ],
)
def test_names_of_every_kind(tmp_path: Path, name: str) -> None:
    """A user's class would be missing, or called something else, for a character in its name."""
    picture(tmp_path / name / f"{name}.png")
    picture(tmp_path / "other" / "1.png", 1)
    assert (f"{name}/{name}.png", name, "") in found(tmp_path)


def test_bytes_that_are_no_utf8_are_shown_and_can_be_stored(tmp_path: Path) -> None:
    """A user with files from an old Windows share would see the run end in a UnicodeEncodeError."""
    root = tmp_path / os.fsdecode(b"donn\xe9es")
    picture(root / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.png"))
    picture(root / "tea" / "1.png", 1)
    (root / "tea" / os.fsdecode(b"notes.\xe9t\xe9")).write_text("x")
    (tmp_path / "link").symlink_to(root)
    source = open_source(str(tmp_path / "link"))
    records = list(source.records())
    assert [(r.key, r.label) for r in records] == [("caf\\xe9/\\xff.png", "caf\\xe9"), ("tea/1.png", "tea")]
    assert all(r.content.read().startswith(b"\x89PNG") for r in records)
    assert source.fingerprint()
    for text in (source.name, *source.skipped()):  # both are written to dataset.json
        text.encode("utf-8")


def test_a_folder_is_found_by_path_by_file_uri_and_by_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's way of naming the folder would be refused, though it is there."""
    root = folder_of(tmp_path / "my data é", "a/1.png", "b/1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(root)
    for uri in (str(root), f"file://{root}", root.as_uri(), "~/my data é", ".", "../my data é/"):
        source = open_source(uri)
        assert (source.name, len(list(source.records()))) == ("my data é", 2), uri


# ---- links and things that are no files ----------------------------------------------------------------------------------------


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    """A user's data folder with a link to its own parent would be read for ever, or each image many times."""
    folder_of(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "cat" / "up").symlink_to("..")
    (tmp_path / "dog" / "here").symlink_to(".")
    (tmp_path / "dog" / "itself.png").symlink_to("itself.png")
    records = within(10, lambda: found(tmp_path))
    assert [r for r in records if "itself" not in r[0]] == [("cat/1.png", "cat", ""), ("dog/1.png", "dog", "")]


def test_class_folders_and_images_that_are_links(tmp_path: Path) -> None:
    """A user whose images lie on another disk, linked into class folders, would have no images."""
    folder_of(tmp_path / "disk", "c/1.png", "d/1.png")
    root = tmp_path / "data"
    (root / "dog").mkdir(parents=True)
    (root / "cat").symlink_to(tmp_path / "disk" / "c")
    (root / "dog" / "1.png").symlink_to(tmp_path / "disk" / "d" / "1.png")
    assert found(root) == [("cat/1.png", "cat", ""), ("dog/1.png", "dog", "")]


def test_a_link_into_another_class_takes_nothing_from_it(tmp_path: Path) -> None:
    """A user would lose a whole class, without a word, to a link that an earlier class holds."""
    folder_of(tmp_path, "cat/1.png", "dog/1.png", "dog/2.png")
    (tmp_path / "cat" / "more").symlink_to("../dog")
    assert [key for key, label, _ in found(tmp_path) if label == "dog"] == ["dog/1.png", "dog/2.png"]


def test_folders_beside_train_and_test_are_no_classes(tmp_path: Path) -> None:
    """A user whose folder holds notes, or was packed on a Mac, would train a model to tell train from test."""
    folder_of(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "__MACOSX/train/cat/1.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").write_text("{}")
    assert {(label, split) for _, label, split in found(tmp_path)} == {
        ("cat", "train"), ("dog", "train"), ("cat", "test"),
    }  # fmt: skip
    picture(tmp_path / "extra" / "1.png", 9)
    with pytest.raises(UserError, match=r"has test, train beside extra: are those splits or classes\?"):
        open_source(str(tmp_path))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    """A user who tells trains from buses could not."""
    folder_of(tmp_path, "train/1.png", "bus/2.png")
    assert {(label, split) for _, label, split in found(tmp_path)} == {("train", ""), ("bus", "")}


def test_a_pipe_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    """A user's run would wait for ever on a named pipe left among the images."""
    folder_of(tmp_path, "cat/1.png", "dog/1.png")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    source = within(10, lambda: open_source(str(tmp_path)))
    assert isinstance(source, FolderSource)
    assert within(10, source.fingerprint)
    pipe = next(r for r in source.records() if r.key == "cat/pipe.png")
    for read in (lambda r: r.content.read(), lambda r: r.content.sha256()):
        error = within(10, lambda read=read: read(pipe))
        assert isinstance(error, OSError) and "not a regular file" in str(error)


def test_a_dangling_link_is_a_record_that_cannot_be_read(tmp_path: Path) -> None:
    """A user would not learn that an image is missing: the link to it would vanish or end the run."""
    folder_of(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "cat" / "gone.png").symlink_to("/nowhere/gone.png")
    source = open_source(str(tmp_path))
    assert source.fingerprint()
    gone = next(r for r in source.records() if r.key == "cat/gone.png")
    for read in (lambda r: r.content.read(), lambda r: r.content.sha256()):
        with pytest.raises(FileNotFoundError):
            read(gone)


# ---- mistakes ------------------------------------------------------------------------------------------------------------------


def only_class(root: Path) -> str:
    return str(folder_of(root, "cat/1.png", "cat/sub/2.png"))


def no_images(root: Path) -> str:
    (root / "cat").mkdir()
    (root / "cat" / "a.heic").write_text("x")
    return str(root)


def no_train(root: Path) -> str:
    return str(folder_of(root, "val/a/1.png", "val/b/1.png", "test/a/1.png"))


def a_file(root: Path) -> str:
    return str(picture(root / "photo.png"))


MISTAKES = {
    "missing": (lambda root: str(root / "nowhere"), "no such folder.*check the path"),
    "line break": (lambda root: str(root / "no\nwhere"), "no such folder"),
    "a file": (a_file, "is a file that is neither.*give the folder"),
    "empty": (lambda root: str(root), "no images found; put them in one folder a class"),
    "no images": (no_images, r"no images found \(1 files there have no image suffix\)"),
    "loose images": (lambda root: str(folder_of(root, "1.png", "2.png")), "no images found.*CLASS/photo.jpg"),
    "one class": (only_class, "only one class, 'cat'.*at least two"),
    "no train": (no_train, "no train folder; add train/CLASS"),
    "empty train": (lambda root: str((root / "train").mkdir() or root), "no images found"),
    "s3": (lambda root: "s3://bucket/photos", "s3://bucket/photos: no credentials"),
    "https": (lambda root: "https://example.org/photos.zip", "https://example.org/.*not of a kind that can be read"),
    "too long": (lambda root: "x" * 5000, "cannot be read|no such folder"),
    "NUL": (lambda root: "a\0b", "cannot be read|no such folder"),
    "another user's home": (lambda root: "~nosuchuserhere/photos", "nosuchuserhere"),
    "misspelt dataset": (lambda root: "fashion-mnits", "no such folder.*fashion-mnist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_that_says_what_to_do(name: str, tmp_path: Path, monkeypatch) -> None:
    """A user would read a stack trace, or nothing that helps, at the commonest mistakes."""
    monkeypatch.chdir(tmp_path)
    make, pattern = MISTAKES[name]
    with pytest.raises(UserError, match=pattern) as raised:
        open_source(make(tmp_path))
    text = str(raised.value)
    assert text.startswith("data ") and text.isprintable() and len(text) < 600


def test_a_folder_that_may_not_be_read_is_named() -> None:
    """A user would train without a class that the account may not read, and not be told."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder_of(root, "a/1.png", "b/1.png", "c/1.png")
        root.chmod(0o755)
        (root / "b").chmod(0)
        before = os.geteuid()
        try:
            if before == 0:  # root may read everything: be somebody else for a moment
                os.seteuid(65534)
            with pytest.raises(UserError, match=r"/b: cannot be read \(Permission denied\)"):
                open_source(temporary)
        finally:
            os.seteuid(before)
            (root / "b").chmod(0o700)


# ---- the fingerprint -----------------------------------------------------------------------------------------------------------

CHANGES = {
    "added": lambda root: picture(root / "a" / "new.png", 9),
    "in a new class": lambda root: picture(root / "c" / "1.png", 9),
    "changed": lambda root: (root / "a" / "1.png").write_bytes(b"x" * (root / "a" / "1.png").stat().st_size),
    "grown, with its old time": lambda root: (
        (root / "a" / "1.png").write_bytes(b"longer" * 500),
        os.utime(root / "a" / "1.png", (1_600_000_000, 1_600_000_000)),
    ),
    "removed": lambda root: (root / "a" / "2.png").unlink(),
    "renamed": lambda root: (root / "a" / "2.png").rename(root / "a" / "3.png"),
    "moved to another class": lambda root: (root / "a" / "2.png").rename(root / "b" / "2.png"),
    "class renamed": lambda root: (root / "b").rename(root / "bee"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_fingerprint_sees_a_change(name: str, tmp_path: Path) -> None:
    """A user's new images would be left out of the run: the packed data of the last one would be reused."""
    folder_of(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    before = open_source(str(tmp_path)).fingerprint()
    CHANGES[name](tmp_path)
    assert open_source(str(tmp_path)).fingerprint() != before


def test_the_fingerprint_sees_nothing_else(tmp_path: Path) -> None:
    """A user's cached steps would all run again although no image has changed."""
    root = folder_of(tmp_path / "data", "a/1.png", "a/2.png", "b/1.png")
    before = open_source(str(root)).fingerprint()
    for record in open_source(str(root)).records():
        record.content.read()
    (root / "a" / ".DS_Store").write_text("x")
    (root / "notes.txt").write_text("x")
    (root / "empty").mkdir()
    (tmp_path / "link").symlink_to(root)
    assert open_source(str(root)).fingerprint() == before
    assert open_source(str(tmp_path / "link")).fingerprint() == before
    assert open_source(f"{root}/").fingerprint() == before


# ---- named datasets and reading ------------------------------------------------------------------------------------------------


def test_digits_are_what_scikit_learn_has() -> None:
    """A user's first run, on the dataset that needs no download, would be of other pictures or labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    records = list(open_source("digits").records())
    assert [r.label for r in records] == [str(t) for t in bunch.target]
    assert len({r.key for r in records}) == len(records) == 1797 and {r.split for r in records} == {""}
    for n in (0, 1000, 1796):
        image = np.asarray(Image.open(io.BytesIO(records[n].content.read())))
        assert (image == np.round(bunch.images[n] * 255 / 16)).all()
    assert open_source("digits").skipped() == {}


def test_a_folder_comes_before_a_dataset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with a folder called digits would train on scikit-learn's."""
    folder_of(tmp_path, "digits/a/1.png", "digits/b/1.png")
    monkeypatch.chdir(tmp_path)
    assert [r.label for r in open_source("digits").records()] == ["a", "b"]
    shutil.rmtree(tmp_path / "digits")
    assert len(list(open_source("digits").records())) == 1797


def test_a_hash_is_of_the_contents_alone(tmp_path: Path) -> None:
    """A user's copies of one image would land in training and in the test under two names."""
    folder_of(tmp_path, "a/1.png", "b/2.png")
    shutil.copy(tmp_path / "a" / "1.png", tmp_path / "b" / "copy.jpg")
    hashes = {r.key: r.content.sha256() for r in open_source(str(tmp_path)).records()}
    assert hashes["a/1.png"] == hashes["b/copy.jpg"] != hashes["b/2.png"]


@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)])
def test_idx_files_are_read_as_they_were_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A user of Fashion-MNIST would have its pixels in the wrong places."""
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, dtype=">u4").tobytes()
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + values.tobytes()))
    assert (read_idx(tmp_path / "x.gz") == values).all()


def test_the_cache_is_where_the_user_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's home directory would be filled though XDG_CACHE_HOME points to another disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "graftwork"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "graftwork"
