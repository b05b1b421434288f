"""Archives: as people really have them, as they are after a bad copy, and as somebody makes them who means harm."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import re
import shutil
import stat
import struct
import subprocess
import tarfile
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from graftwork.errors import UserError
from graftwork.sources import archive, open_source
from graftwork.sources.archive import ArchiveSource, open_archive
from graftwork.sources.folder import FolderSource

FILES = {"cat/1.jpg": b"first cat", "cat/2.jpg": b"second cat" * 50, "dog/1.png": b"a dog"}
ENDINGS = [".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"]
KINDS = [".zip", ".tar", ".tar.gz"]  # the three ways that contents are read


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stand in a folder of its own below others, and hold that nothing was written there, nor above, nor in the temporary folder."""
    here = tmp_path / "a" / "b" / "here"
    temporary = tmp_path / "temporary"
    here.mkdir(parents=True)
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    written = [p for p in tmp_path.rglob("*") if not p.is_dir() or p.is_symlink()]
    assert [p for p in written if p.parent != tmp_path] == []


def squeeze(name: str, data: bytes) -> bytes:
    """Compress as the name says."""
    if name.endswith("gz"):
        return gzip.compress(data, 1)
    if name.endswith("bz2"):
        return bz2.compress(data)
    if name.endswith("xz"):
        return lzma.compress(data, preset=0)
    if name.endswith("zst"):
        return bytes(pa.compress(data, codec="zstd", asbytes=True))
    return data


def tar_of(*members: tuple[str, bytes] | tuple[tarfile.TarInfo, bytes], **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = info.size or len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a name is there twice
        with zipfile.ZipFile(buffer, "w", method) as z:
            for name, data in members:
                z.writestr(name, data)
    return buffer.getvalue()


def pack(path: Path, *members: tuple[str, bytes]) -> Path:
    """Write an archive of the kind that the file's name says."""
    path.write_bytes(zip_of(*members) if path.suffix == ".zip" else squeeze(path.name, tar_of(*members)))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def opened(path: Path) -> ArchiveSource:
    source = open_archive(str(path))
    assert isinstance(source, ArchiveSource)
    return source


def contents(path: Path) -> dict[str, bytes]:
    return {r.key: r.content.read() for r in opened(path).records()}


def found(path: Path) -> list[tuple[str, str, str]]:
    return [(r.key, r.label, r.split) for r in opened(path).records()]


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def refusal(path: Path) -> str:
    """Return the one line that an archive is refused with."""
    with pytest.raises(UserError) as raised:
        open_archive(str(path))
    text = str(raised.value)
    assert text.startswith(f"data {path}: ") and text.isprintable() and len(text) < 600
    return text.removeprefix(f"data {path}: ")


# ---- kinds and layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_kind_of_archive(ending: str, tmp_path: Path) -> None:
    """A user's archive would not be read, or other bytes would be read than were put in."""
    path = pack(tmp_path / f"my.photos{ending}", *FILES.items())
    source = opened(path)
    assert source.name == "my.photos"
    assert len(source) == 3
    records = list(source.records())
    assert [(r.key, r.label, r.split) for r in records] == [
        ("cat/1.jpg", "cat", ""),
        ("cat/2.jpg", "cat", ""),
        ("dog/1.png", "dog", ""),
    ]
    assert {r.key: r.content.read() for r in records} == FILES
    assert [r.content.suffix for r in records] == [".jpg", ".jpg", ".png"]
    assert len({r.content.version() for r in records}) == 3
    assert [r.content.sha256() for r in records] == [hashlib.sha256(data).hexdigest() for data in FILES.values()]
    assert source.skipped() == {}


@pytest.mark.parametrize(
    "tool", ["tar -cf x.tar .", "tar -czf x.tar data", "tar --posix -cf x.tar data", "zip -qr x.zip data"]
)
def test_what_the_usual_tools_write(tool: str, tmp_path: Path) -> None:
    """A user's archive, made by tar or zip on the command line, would be laid out otherwise than by Python's modules, and be refused."""
    if not shutil.which(tool.split()[0]):
        pytest.skip("no such tool")
    for name, data in FILES.items():
        file = tmp_path / "work" / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    subprocess.run(tool.split(), cwd=tmp_path / "work", check=True)
    name = "x.zip" if "zip" in tool else "x.tar"
    (tmp_path / "work" / name).rename(tmp_path / name)
    shutil.rmtree(tmp_path / "work")
    assert contents(tmp_path / name) == FILES


@pytest.mark.parametrize("ending", KINDS)
@pytest.mark.parametrize(
    "names",
    [
        [
            "cat/1.jpg",
            "dog/2.jpg",
            "loose.jpg",
            "cat/deep/er/3.jpg",
            "README.md",
            "cat/.hidden.jpg",
            ".x/cat/1.jpg",
            "dog/a.TXT",
        ],
        ["train/a/1.png", "train/b/1.png", "test/a/2.png", "VALID/b/2.png", "notes.txt"],
        ["train/a/1.png", "train/b/1.png"],
        ["train/1.png", "car/1.png"],
        ["train/a/1.png", "train/b/1.png", "more/a/1.png"],
        ["cat/a.jpg", "dog/line\nbreak.jpg", "ça 中 🙂/é.png", "cat/Thumbs.db", "dog/LICENSE"],
    ],
    ids=["classes", "splits", "train alone", "a class called train", "not all splits", "names"],
)
@pytest.mark.parametrize("top", ["", "./", "photos/", "./my photos/"])
def test_an_archive_is_read_as_its_folder_would_be(ending: str, names: list[str], top: str, tmp_path: Path) -> None:
    """A user who unpacks the archive would get other classes, splits or names than one who does not."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path / "temporary"))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    unpacked = FolderSource(folder)
    expected = sorted((r.key, r.label, r.split, r.content.read()) for r in unpacked.records())
    shutil.rmtree(folder)
    path = pack(tmp_path / f"x{ending}", *((top + name, name.encode()) for name in names))
    source = opened(path)
    assert sorted((r.key, r.label, r.split, r.content.read()) for r in source.records()) == expected
    assert source.skipped() == unpacked.skipped()


def test_a_top_folder_with_the_name_of_a_split(tmp_path: Path) -> None:
    """A user's archive of a folder that happens to be called test would be one split of classes called train and val."""
    path = pack(
        tmp_path / "x.zip", ("test/train/a/1.png", b"1"), ("test/train/b/1.png", b"2"), ("test/val/a/2.png", b"3")
    )
    assert found(path) == [
        ("train/a/1.png", "a", "train"),
        ("train/b/1.png", "b", "train"),
        ("val/a/2.png", "a", "val"),
    ]
    path = pack(tmp_path / "x.tar", ("test/a/1.png", b"1"), ("test/b/1.png", b"2"))
    assert "no train folder" in refusal(path)


@pytest.mark.parametrize("ending", KINDS)
def test_the_top_folder_that_is_a_class_stays(ending: str, tmp_path: Path) -> None:
    """A user with one class would be told that there are no images, and not that a second class is missing."""
    path = pack(tmp_path / f"x{ending}", ("cat/1.jpg", b"1"), ("cat/2.jpg", b"2"))
    assert refusal(path).startswith("only one class, 'cat'")


@pytest.mark.parametrize("ending", KINDS)
def test_what_a_mac_adds(ending: str, tmp_path: Path) -> None:
    """A user of a Mac would have __MACOSX, and a shadow of each photo, as classes and as broken images."""
    path = pack(
        tmp_path / f"x{ending}",
        *((f"photos/{name}", data) for name, data in FILES.items()),
        *((f"__MACOSX/photos/{name.replace('/', '/._')}", b"shadow") for name in FILES),
        ("photos/.DS_Store", b"x"),
    )
    assert contents(path) == FILES


def test_an_archive_is_known_by_its_contents(tmp_path: Path) -> None:
    """A user whose download has the wrong suffix, or none, would be sent to repair a file that is in order."""
    (tmp_path / "wrong.zip").write_bytes(tar_of(*FILES.items()))
    (tmp_path / "wrong.tar").write_bytes(zip_of(*FILES.items()))
    (tmp_path / "packed.tar").write_bytes(gzip.compress(tar_of(*FILES.items())))
    (tmp_path / "download").write_bytes(zip_of(*FILES.items()))
    (tmp_path / "setup.exe").write_bytes(b"MZ" + b"program" * 1000 + zip_of(*FILES.items()))
    for name in ("wrong.zip", "wrong.tar", "packed.tar", "download", "setup.exe"):
        assert contents(tmp_path / name) == FILES, name
    assert opened(tmp_path / "download").name == "download"


def test_what_is_no_archive_is_left_to_the_other_sources(tmp_path: Path) -> None:
    """A user's folder, manifest or bucket would be refused as a broken archive."""
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "labels.csv").write_text("path,label\n")
    (tmp_path / "labels.csv.gz").write_bytes(gzip.compress(b"path,label\n"))
    for uri in (
        *(str(tmp_path / name) for name in ("folder.zip", "labels.csv", "labels.csv.gz", "nowhere")),
        "digits",
        "s3://bucket/photos",
        "https://example.org/photos.zip",
        "x" * 5000,
        "a\0b",
    ):
        assert open_archive(uri) is None, uri


def test_an_archive_by_path_by_file_uri_and_through_open_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's way of naming the archive would be refused, though it is there."""
    path = pack(tmp_path / "my data é.zip", *FILES.items())
    monkeypatch.setenv("HOME", str(tmp_path))
    for uri in (str(path), f"file://{path}", path.as_uri(), "~/my data é.zip", f"../../../{path.name}"):
        source = open_source(uri)
        assert (source.name, len(list(source.records()))) == ("my data é", 3), uri


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    """A user with files from an old Windows share would see the run end in a UnicodeEncodeError."""
    tar = tar_of((os.fsdecode(b"caf\xe9/\xff.png"), b"1"), ("tea/1.png", b"2"), format=tarfile.GNU_FORMAT)
    (tmp_path / "x.tar").write_bytes(tar)
    assert found(tmp_path / "x.tar") == [("caf\\xe9/\\xff.png", "caf\\xe9", ""), ("tea/1.png", "tea", "")]
    old = zip_of(("cafe/1.png", b"1"), ("tea/1.png", b"2"))
    (tmp_path / "dos.zip").write_bytes(old.replace(b"cafe/", b"caf\x82/"))
    assert [label for _, label, _ in found(tmp_path / "dos.zip")] == ["café", "tea"]
    flagged = zip_of(("ca\u00e9/1.png", b"1"), ("tea/1.png", b"2"))
    (tmp_path / "flagged.zip").write_bytes(flagged.replace("ca\u00e9".encode(), b"ca\xff\xfe"))
    assert [label for _, label, _ in found(tmp_path / "flagged.zip")] == ["ca\\xff\\xfe", "tea"]
    linux = zip_of(("cafes/1.png", b"1"), ("tea/1.png", b"2"))  # UTF-8 that does not say so
    (tmp_path / "linux.zip").write_bytes(linux.replace(b"cafes", "café".encode()))
    assert [label for _, label, _ in found(tmp_path / "linux.zip")] == ["café", "tea"]


@pytest.mark.parametrize("ending", KINDS)
def test_names_that_differ_in_their_normal_form_are_different_files(ending: str, tmp_path: Path) -> None:
    """A user would lose the images of which the name is spelt with another form of the same letter, or with a capital."""
    names = ["a/\u00e9.png", "a/e\u0301.png", "b/x.png", "b/X.png"]
    path = pack(tmp_path / f"x{ending}", *((n, n.encode()) for n in names))
    assert contents(path) == {n: n.encode() for n in names}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_names_in_a_tar(form: int, tmp_path: Path) -> None:
    """A user's images with long names would be called something else, or their first bytes be a header."""
    names = [f"a/{'long' * 60}.png", f"b/{'é' * 100}.png"]
    (tmp_path / "x.tar").write_bytes(tar_of(*((n, n.encode()) for n in names), format=form))
    assert contents(tmp_path / "x.tar") == {n: n.encode() for n in names}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_way_of_packing_a_zip(method: int, tmp_path: Path) -> None:
    """A user's zip would be read but for the images that are packed in the less usual ways."""
    (tmp_path / "x.zip").write_bytes(zip_of(*FILES.items(), ("dog/empty.png", b""), method=method))
    assert contents(tmp_path / "x.zip") == {**FILES, "dog/empty.png": b""}


def test_a_zip_with_64_bit_records_and_a_comment(tmp_path: Path) -> None:
    """A user's zip of more than 4 GiB, or one with a comment that looks like a zip's end, would not be read."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name, data in FILES.items():
            with z.open(name, "w", force_zip64=True) as file:
                file.write(data)
        z.comment = b"PK\5\6 and so on, and on, and on"
    (tmp_path / "comment.zip").write_bytes(buffer.getvalue())
    assert contents(tmp_path / "comment.zip") == FILES
    plain = zip_of(*FILES.items())
    end = len(plain) - 22
    _, _, _, _, count, size, start, _ = struct.unpack("<4sHHHHIIH", plain[end:])
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    wide += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    wide += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "wide.zip").write_bytes(plain[:end] + wide)
    assert contents(tmp_path / "wide.zip") == FILES


def test_a_sparse_zip_beyond_4_gib(tmp_path: Path) -> None:
    """A user's zip of more than 4 GiB would be read at offsets that are cut to 32 bits."""
    with (tmp_path / "x.zip").open("wb") as file:
        file.truncate(5 * 2**30)  # a hole: it takes no room
        file.seek(0, 2)
        with zipfile.ZipFile(file, "a") as z:
            for name, data in FILES.items():
                z.writestr(name, data)
    data = (tmp_path / "x.zip").stat()
    assert data.st_blocks * 512 < 2**20
    # It does not begin as a zip does, but ends as one.
    assert contents(tmp_path / "x.zip") == FILES


# ---- many threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", KINDS)
def test_many_threads_get_the_right_bytes(ending: str, tmp_path: Path) -> None:
    """A user's images would be mixed up, one with another's bytes, whenever they are read by many threads at once."""
    rng = random.Random(0)
    files = {f"c{n % 3}/{n}.png": rng.randbytes(rng.randrange(20_000)) * rng.randrange(1, 4) for n in range(300)}
    source = opened(pack(tmp_path / f"x{ending}", *files.items()))
    records = list(source.records()) * 8
    rng.shuffle(records)
    with ThreadPoolExecutor(32) as pool:
        for record, data in zip(records, pool.map(lambda r: r.content.read(), records), strict=True):
            assert data == files[record.key], record.key


def test_contents_outlive_their_source_and_close_their_file(tmp_path: Path) -> None:
    """A user's reads would fail once the source is let go, or each archive that was ever opened would stay open."""
    before = open_files()
    for ending in (".zip", ".tar", ".tar.gz"):
        path = pack(tmp_path / f"x{ending}", *FILES.items())
        records = list(opened(path).records())
        path.unlink()
        assert records[0].content.read() == b"first cat"
        assert open_files() > before
        del records
    assert open_files() == before


# ---- meant harm ----------------------------------------------------------------------------------------------------------------

UNSAFE = [
    "/etc/cat/1.jpg",
    "../../../cat/1.jpg",
    "cat/../../1.jpg",
    "cat/..",
    "C:/cat/1.jpg",
    "c:cat.jpg",
    "cat\\1.jpg",
    "..\\..\\cat.jpg",
    "//server/share/1.jpg",
    "cat/" + "x" * 5000 + ".jpg",
]


@pytest.mark.parametrize("ending", KINDS)
def test_unsafe_paths(ending: str, tmp_path: Path) -> None:
    """A user's files outside the archive's folder would be overwritten, or an image be taken from where no class is."""
    path = pack(tmp_path / f"x{ending}", *((name, b"harm") for name in UNSAFE), *FILES.items())
    assert contents(path) == FILES
    assert opened(path).skipped() == {"unsafe paths in the archive": len(UNSAFE)}
    assert not Path("/etc/cat").exists()
    path = pack(tmp_path / f"all{ending}", *((name, b"harm") for name in UNSAFE))
    assert "no images that may be used (10 unsafe paths in the archive)" in refusal(path)


@pytest.mark.parametrize("compress", [False, True])
def test_links_and_special_files_in_a_tar(compress: bool, tmp_path: Path) -> None:
    """A user would train on, and send to a server, whatever file of this machine a link in the archive points to; or wait for ever on a pipe."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    tar = tar_of(
        *FILES.items(),
        (special("cat/soft.jpg", tarfile.SYMTYPE, str(secret)), b""),
        (special("up", tarfile.SYMTYPE, "../../.."), b""),
        ("up/cat/3.jpg", b"through the link"),
        (special("cat/hard.jpg", tarfile.LNKTYPE, "../secret.jpg"), b""),
        (special("cat/pipe.jpg", tarfile.FIFOTYPE), b""),
        (special("cat/zero.jpg", tarfile.CHRTYPE), b""),
        (special("cat/disk.jpg", tarfile.BLKTYPE), b""),
        (special("cat/unheard.jpg", b"Q"), b"of"),
    )
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(tar) if compress else tar)
    assert contents(path) == {**FILES, "up/cat/3.jpg": b"through the link"}
    assert opened(path).skipped() == {"links in the archive": 3, "special files in the archive": 4}
    assert not (tmp_path / "cat").exists()


def test_links_and_special_files_in_a_zip(tmp_path: Path) -> None:
    """A user would get, as an image, the path that a link in the zip holds, or what it points to."""
    members: list[tuple[str | zipfile.ZipInfo, bytes]] = list(FILES.items())
    for name, mode in (("cat/soft.jpg", stat.S_IFLNK), ("cat/pipe.jpg", stat.S_IFIFO), ("cat/zero.jpg", stat.S_IFCHR)):
        info = zipfile.ZipInfo(name)
        info.external_attr = (mode | 0o777) << 16
        members.append((info, b"/etc/passwd"))
    (tmp_path / "x.zip").write_bytes(zip_of(*members))
    assert contents(tmp_path / "x.zip") == FILES
    assert opened(tmp_path / "x.zip").skipped() == {"links in the archive": 1, "special files in the archive": 2}


@pytest.mark.parametrize("ending", KINDS)
def test_of_a_name_that_comes_twice_the_last_counts(ending: str, tmp_path: Path) -> None:
    """A user's newer version of an image, added to the archive, would be ignored; or both would be there under one name."""
    path = pack(tmp_path / f"x{ending}", *FILES.items(), ("cat/1.jpg", b"newer"), ("./cat//1.jpg", b"newest"))
    assert contents(path) == {**FILES, "cat/1.jpg": b"newest"}
    assert opened(path).skipped() == {"duplicate names in the archive": 2}


def test_sparse_members_are_passed_over(tmp_path: Path) -> None:
    """A user would get an image whose bytes are the map of a sparse file."""
    if not shutil.which("tar"):
        pytest.skip("no tar")
    folder = Path(tempfile.mkdtemp(dir=tmp_path / "temporary"))
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    with (folder / "cat" / "sparse.jpg").open("wb") as file:
        file.truncate(2**20)
        file.seek(2**19)
        file.write(b"x" * 4096)
    for form in ("gnu", "posix"):
        subprocess.run(
            ["tar", "-C", str(folder), f"--format={form}", "-Scf", str(tmp_path / f"{form}.tar"), "."], check=True
        )
    shutil.rmtree(folder)
    for form in ("gnu", "posix"):
        assert contents(tmp_path / f"{form}.tar") == FILES
        assert opened(tmp_path / f"{form}.tar").skipped() == {"sparse files in the archive": 1}, form


def test_an_encrypted_zip(tmp_path: Path) -> None:
    """A user would have every image reported as broken, and not be told that a password is wanted."""
    data = bytearray(zip_of(*FILES.items()))
    for match in re.finditer(rb"PK\x01\x02", bytes(data)):
        data[match.start() + 8] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    assert refusal(tmp_path / "x.zip").startswith("3 of its images are encrypted; unpack it with its password")


def test_a_bomb_in_a_zip_that_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's disk would be filled by an archive of a few kilobytes."""
    monkeypatch.setattr(archive, "SMALL_TOTAL_BYTES", 2**20)
    path = pack(tmp_path / "x.zip", *((f"c{n}/1.bmp", bytes(2**20)) for n in range(4)))
    text = refusal(path)
    assert re.match(r"unpacks to 4 MiB or more, from 4\.\d+ KiB, .*unpack it yourself and give the folder", text), text
    monkeypatch.setattr(archive, "MAX_RATIO", 2000)  # more than there is: the same archive is in order
    assert len(opened(path)) == 4
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 3 * 2**20)
    assert refusal(path).startswith("unpacks to 4 MiB or more")


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"])
@pytest.mark.parametrize("name", ["c/1.bmp", "notes.txt"])
def test_a_bomb_in_a_compressed_tar(ending: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's disk would be filled by an archive of a few kilobytes, before its list of files is even known."""
    monkeypatch.setattr(archive, "SMALL_TOTAL_BYTES", 2**20)
    monkeypatch.setattr(archive, "MAX_RATIO", 10)
    path = pack(tmp_path / f"x{ending}", *FILES.items(), (name, bytes(50 * 2**20)))
    spools = []

    class Seen(archive.Spool):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            spools.append(self)

    monkeypatch.setattr(archive, "Spool", Seen)
    assert re.match(r"unpacks to .* or more, from .* made to fill a disk", refusal(path))
    assert len(spools) == 1 and spools[0].position < 2**22


def test_a_zip_that_lies_about_a_size(tmp_path: Path) -> None:
    """A user's machine would run out of memory on a member that says that it has a kilobyte and has a gigabyte."""
    honest = zip_of(*FILES.items(), ("dog/bomb.bmp", bytes(200 * 2**20)))
    at = honest.rindex(b"PK\1\2")
    (tmp_path / "x.zip").write_bytes(honest[: at + 24] + struct.pack("<I", 1000) + honest[at + 28 :])
    records = {r.key: r.content for r in opened(tmp_path / "x.zip").records()}
    import tracemalloc

    tracemalloc.start()
    for read in (records["dog/bomb.bmp"].read, records["dog/bomb.bmp"].sha256):
        with pytest.raises(OSError, match="damaged in the archive"):
            read()
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert records["dog/1.png"].read() == b"a dog"


@pytest.mark.parametrize("ending", KINDS)
def test_a_member_that_is_too_large(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's machine would run out of memory on one file, though all the others could be used."""
    monkeypatch.setattr(archive, "MAX_MEMBER_BYTES", 400)
    source = opened(pack(tmp_path / f"x{ending}", *FILES.items()))
    read = {}
    for record in source.records():
        if record.key == "cat/2.jpg":
            with pytest.raises(OSError, match="larger than 400 bytes"):
                record.content.read()
        else:
            read[record.key] = record.content.read()
    assert read == {"cat/1.jpg": b"first cat", "dog/1.png": b"a dog"}


def test_a_zip_whose_members_overlap(tmp_path: Path) -> None:
    """A user's disk would be filled by a zip in which a thousand names share one member's bytes."""
    plain = zip_of(*FILES.items(), method=zipfile.ZIP_STORED)
    entries = [m.start() for m in re.finditer(rb"PK\x01\x02", plain)]
    moved = bytearray(plain)
    moved[entries[2] + 42 : entries[2] + 46] = plain[entries[1] + 42 : entries[1] + 46]
    (tmp_path / "same.zip").write_bytes(moved)
    assert refusal(tmp_path / "same.zip").startswith("1 of its images lie over others")
    inside = bytearray(plain)  # as Fifield's does: one member's data hold the others with their headers
    inside[entries[0] + 20 : entries[0] + 24] = struct.pack("<I", 300)
    inside[entries[0] + 24 : entries[0] + 28] = struct.pack("<I", 300)
    (tmp_path / "inside.zip").write_bytes(inside)
    assert refusal(tmp_path / "inside.zip").startswith("1 of its images lie over others")


@pytest.mark.parametrize("ending", KINDS)
def test_too_many_entries(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's machine would run out of memory on an archive of a billion empty files."""
    monkeypatch.setattr(archive, "MAX_ENTRIES", 50)
    path = pack(tmp_path / f"x{ending}", *((f"{n}/1.txt", b"") for n in range(51)))
    assert refusal(path).startswith("holds more than 50 files; split it")


@pytest.mark.parametrize("ending", KINDS)
def test_many_entries_take_little_memory(ending: str, tmp_path: Path) -> None:
    """A user's machine would run out of memory on the list of a few million images."""
    import tracemalloc

    count = 20_000
    path = pack(tmp_path / f"x{ending}", *((f"photos/class{n % 50}/image_{n:07d}.jpg", b"") for n in range(count)))
    tracemalloc.start()
    source = opened(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == count
    assert peak < 2 * 2**20 + 350 * count  # the first is what a decompressor and a buffer take


def hostile_tars() -> dict[str, bytes]:
    header = tarfile.TarInfo("cat/x.jpg")
    negative = bytearray(header.tobuf())
    negative[124:136] = b"\xff" * 8 + (-1024 & 0xFFFFFFFF).to_bytes(4)  # base 256
    huge = bytearray(header.tobuf())
    huge[124:136] = b"\x80" + (2**80).to_bytes(11)
    other = bytearray(negative)  # no image: it is not looked at, only passed
    other[:9] = b"notes.txt"
    other[124:136] = b"\xff" * 8 + (-512 & 0xFFFFFFFF).to_bytes(4)  # back to this very header
    for block in (negative, other, huge):
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    good = tar_of(*FILES.items())[:-1024].rstrip(b"\0")
    good += bytes(-len(good) % 512)

    def extended(kind: bytes, data: bytes) -> bytes:
        info = special("x", kind)
        info.size = len(data)
        return info.tobuf() + data + bytes(-len(data) % 512)

    def record(key: bytes, value: bytes) -> bytes:
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        return b"%d %s=%s\n" % (length, key, value)

    return {
        "negative size": good + bytes(negative) * 3 + bytes(1024),
        "negative size of no image": good + bytes(other) * 3 + bytes(1024),
        "huge size": good + bytes(huge) + bytes(1024),
        "negative size in pax": good + extended(b"x", record(b"size", b"-4096")) + header.tobuf() + bytes(1024),
        "sparse nonsense": good + extended(b"x", record(b"GNU.sparse.map", b"a,b")) + header.tobuf() + bytes(1024),
        "sparse nothing": good
        + extended(b"x", record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0"))
        + header.tobuf()
        + bytes(1024),
        "a name without end": good + extended(b"L", b"x" * 3 * 2**20) + header.tobuf() + bytes(1024),
        "headers of headers": good + extended(b"x", record(b"comment", b"x")) * 5000 + header.tobuf() + bytes(1024),
        "a header for all, again and again": good
        + b"".join(extended(b"g", record(b"k%d" % n, b"x")) for n in range(200))
        + header.tobuf()
        + bytes(1024),
        "charset": good + extended(b"x", b"21 hdrcharset=\xff\xff\xff\xff\xff\n") + header.tobuf() + bytes(1024),
        "a broken header": good + header.tobuf()[:100] + b"zzzz" + header.tobuf()[104:] + bytes(1024),
        "noise": good + random.Random(0).randbytes(5120) + bytes(1024),
    }


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", hostile_tars())
def test_headers_that_make_no_sense(name: str, compress: bool, tmp_path: Path) -> None:
    """A user's run would hang, take all memory or end in a traceback; or train on the half before the broken place without a word."""
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(hostile_tars()[name]) if compress else hostile_tars()[name])
    result: list[str] = []
    thread = threading.Thread(target=lambda: result.append(refusal(path)), daemon=True)
    thread.start()
    thread.join(20)
    assert result, "it waits for ever, or was not refused"
    assert re.match(r"is (damaged \(.+\)|cut off.*); copy or download it again", result[0])


# ---- bad copies ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_archive_that_is_cut_off(ending: str, tmp_path: Path) -> None:
    """A user would train on half of her data after a download that broke off, and not know it."""
    rng = random.Random(0)
    whole = pack(tmp_path / f"x{ending}", *((f"c{n % 2}/{n}.png", rng.randbytes(700)) for n in range(60))).read_bytes()
    for share in (0.02, 0.3, 0.6, 0.9):
        path = tmp_path / f"cut{ending}"
        path.write_bytes(whole[: int(len(whole) * share)])
        assert re.match(r"is (cut off|damaged).*copy or download it again", refusal(path)), share
    if ending == ".tar":  # between two members, where tarfile takes the end for the archive's
        path.write_bytes(whole[: 512 * 3 * 20])
        assert refusal(path).startswith("is cut off: it ends before a tar's end mark, so files may be missing")


def test_a_tar_behind_a_tar(tmp_path: Path) -> None:
    """A user who joined two tars with cat would train on the first alone."""
    tar = tar_of(*FILES.items())
    for data in (tar + tar, gzip.compress(tar) + gzip.compress(tar)):
        (tmp_path / "x.tar").write_bytes(data)
        assert refusal(tmp_path / "x.tar").startswith("holds a second tar behind the first one's end; join them")
    (tmp_path / "x.tar").write_bytes(tar + bytes(10240) + b"padding of a tape" * 100)
    assert contents(tmp_path / "x.tar") == FILES


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.bz2", ".tar.xz"])  # Arrow writes no checksum into a .zst
def test_a_compressed_tar_with_a_wrong_byte(ending: str, tmp_path: Path) -> None:
    """A user's images would be other than those that were packed, without a word."""
    rng = random.Random(1)
    whole = bytearray(
        pack(tmp_path / f"x{ending}", *((f"c{n % 2}/{n}.png", rng.randbytes(7000)) for n in range(20))).read_bytes()
    )
    whole[len(whole) // 2] ^= 255
    (tmp_path / f"x{ending}").write_bytes(whole)
    assert re.match(r"is damaged \(.*\); copy or download it again", refusal(tmp_path / f"x{ending}"))


def test_one_bad_member_of_a_zip_spoils_no_other(tmp_path: Path) -> None:
    """A user would lose the whole archive to one image in it; or train on one whose bytes are wrong."""
    plain = zip_of(*FILES.items(), method=zipfile.ZIP_STORED)
    cases = {
        "checksum": plain.replace(b"first cat", b"fIrst cat"),
        "local header": plain[:8] + b"\x09" + plain[9:],
        "directory": plain[: (at := plain.index(b"PK\1\2")) + 42] + struct.pack("<I", 2**31) + plain[at + 46 :],
        "unknown method": plain[: at + 10] + b"\x61" + plain[at + 11 :],
        "deflated": (d := zip_of(*FILES.items()))[:41] + b"\xff\xff\xff" + d[44:],
    }
    unknown = bytearray(cases["unknown method"])
    unknown[8] = 0x61
    cases["unknown method"] = bytes(unknown)
    for case, data in cases.items():
        (tmp_path / "x.zip").write_bytes(data)
        records = {r.key: r.content for r in opened(tmp_path / "x.zip").records()}
        with pytest.raises(OSError, match=r"damaged in the archive|zip method 97") as raised:
            records["cat/1.jpg"].read()
        assert ("97" in str(raised.value)) == (case == "unknown method")
        assert records["cat/2.jpg"].read() == FILES["cat/2.jpg"] and records["dog/1.png"].read() == b"a dog", case


def test_noise_in_a_zip_is_never_a_traceback(tmp_path: Path) -> None:
    """A user with a damaged zip would read a stack trace of struct or zlib, or get wrong bytes."""
    rng = random.Random(7)
    for whole in (zip_of(*FILES.items()), zip_of(*FILES.items(), method=zipfile.ZIP_LZMA), tar_of(*FILES.items())):
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            (tmp_path / "x.zip").write_bytes(data)
            try:
                records = list(opened(tmp_path / "x.zip").records())
            except UserError as error:
                assert str(error).isprintable()
                continue
            for record in records:
                try:
                    content = record.content.read()
                except OSError:
                    continue
                assert whole[:2] != b"PK" or content in FILES.values()


def test_an_archive_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """A user who replaces the archive during a run would train on a mixture of both, or on bytes of the wrong place."""
    for ending in (".zip", ".tar"):
        path = pack(tmp_path / f"x{ending}", *FILES.items())
        record = next(opened(path).records())
        with path.open("r+b") as file:
            file.seek(0, 2)
            file.write(b"more")
        with pytest.raises(UserError, match="changed while it was read; run again"):
            record.content.read()


# ---- mistakes ------------------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Callable[[], bytes], str]] = {
    "text.zip": (
        lambda: b"version https://git-lfs.github.com/spec/v1\n",
        r"holds text and is no archive \(a web page or a Git LFS",
    ),
    "page.tar.gz": (lambda: b"<!DOCTYPE html><html>\n\tnot found\n", "holds text and is no archive"),
    "nothing.tar": (lambda: b"", "is an empty file"),
    "image.zip": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, "is neither a zip nor a tar"),
    "one.tar.gz": (lambda: gzip.compress(b"\x89PNG" * 500), "is compressed, but what is in it is no tar"),
    "empty.zip": (lambda: zip_of(), "is an empty archive"),
    "empty.tar": (lambda: tar_of(), "is an empty archive"),
    "empty.tgz": (lambda: gzip.compress(tar_of()), "is an empty archive"),
    "noimages.zip": (
        lambda: zip_of(("a/x.pdf", b""), ("b/y.doc", b"")),
        r"no images found \(2 files there have no image suffix\)",
    ),
    "loose.tar": (
        lambda: tar_of(("1.jpg", b"x"), ("2.jpg", b"x")),
        r"no images found in class folders \(2 lie outside",
    ),
    "one class.zip": (lambda: zip_of(("cat/1.jpg", b"x"), ("cat/2.jpg", b"x")), "only one class, 'cat'.*at least two"),
    "one class below.zip": (lambda: zip_of(("p/cat/1.jpg", b"x"), ("p/cat/2.jpg", b"x")), "only one class, 'cat'"),
    "no train.tar": (lambda: tar_of(("val/a/1.jpg", b"x"), ("test/b/2.jpg", b"x")), "no train folder; add train/CLASS"),
    "part.zip": (
        lambda: (z := zip_of(*FILES.items()))[:-18] + b"\1\0" + z[-16:],
        "is one part of an archive in several; join",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_that_says_what_to_do(name: str, tmp_path: Path) -> None:
    """A user would read a stack trace, or nothing that helps, at the commonest mistakes."""
    make, pattern = MISTAKES[name]
    (tmp_path / name).write_bytes(make())
    assert re.search(pattern, refusal(tmp_path / name))


def test_an_archive_that_is_not_there_or_may_not_be_read(tmp_path: Path) -> None:
    """A user would see a traceback for a misspelt name, a pipe, or a file of somebody else's; or wait for ever."""
    assert refusal(tmp_path / "nowhere.zip") == "no such file; check the path"
    os.mkfifo(tmp_path / "pipe.tar")
    assert refusal(tmp_path / "pipe.tar").startswith("cannot be read (not a regular file)")
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        path = pack(Path(temporary) / "x.zip", *FILES.items())
        Path(temporary).chmod(0o755)
        path.chmod(0)
        before = os.geteuid()
        try:
            if before == 0:  # root may read everything: be somebody else for a moment
                os.seteuid(65534)
            assert refusal(path).startswith("cannot be read (Permission denied); give an archive that you may read")
        finally:
            os.seteuid(before)


def test_no_room_to_unpack_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's whole disk would be filled by unpacking, and everything else on the machine fail with it."""
    path = pack(tmp_path / "x.tar.gz", *FILES.items())
    monkeypatch.setattr(archive, "SPARE_BYTES", 2**60)
    assert re.match(r"cannot be unpacked to .* \(no room\); make room there, or set TMPDIR", refusal(path))


# ---- versions ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", KINDS)
def test_the_fingerprint_sees_a_change_and_nothing_else(ending: str, tmp_path: Path) -> None:
    """A user's new images would be left out of the run; or all steps would run again although nothing has changed."""
    path = pack(tmp_path / f"x{ending}", *FILES.items())
    before = opened(path).fingerprint()
    for record in opened(path).records():
        record.content.read()
    (tmp_path / "link").symlink_to(path)
    assert opened(path).fingerprint() == before == opened(tmp_path / "link").fingerprint()
    (tmp_path / "link").unlink()
    pack(path, *FILES.items(), ("dog/2.png", b"new"))
    assert opened(path).fingerprint() != before


def test_an_image_of_a_zip_keeps_its_version(tmp_path: Path) -> None:
    """A user who adds an image to a zip would have all the others read and packed again."""
    before = {r.key: r.content.version() for r in opened(pack(tmp_path / "a.zip", *FILES.items())).records()}
    changed = {"cat/0.jpg": b"new", **FILES, "dog/1.png": b"other"}
    after = {r.key: r.content.version() for r in opened(pack(tmp_path / "b.zip", *changed.items())).records()}
    assert {k for k in before if before[k] != after[k]} == {"dog/1.png"}
