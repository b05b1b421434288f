"""Bad data for ``graftwork data inspect``: what lies in a folder, an archive, a manifest or a bucket, and what must be printed about it.

``pipelines/test_data_corpus.py`` asserts the cases; ``data_corpus_table.py`` prints what they answered. Everything is made here, from seeds.
"""

import contextlib
import csv
import functools
import gzip
import io
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, features

GOOD = 24  # images of ``photos``: twelve in each of the classes a and b
BYTES_OF_MEMORY = 1_500 * 2**20  # that a command may take at most, whatever a file says of its size
SECONDS = 60  # that a command may take at most: more is a hang


class CannotTryError(Exception):
    """This machine cannot show the case; the text says why."""


class World(NamedTuple):
    """Where a case may put its data: a folder of its own, which is the current one of the command, and a server if it asked for one."""

    root: Path
    server: Any = None


class Case(NamedTuple):
    """Some data, and what must be said of them."""

    name: str
    make: Callable[[World], str]  # puts the data into the world and returns what is typed as their URI
    status: int  # 0 usable, 1 a critical finding or nothing usable, 2 refused before anything is packed
    says: tuple[str, ...]  # regular expressions that what is printed must match
    images: int = -1  # in the dataset that is kept; -1: there must be none
    broken: dict[str, str] = {}  # those left out, and a regular expression for the reason  # noqa: RUF012
    either: tuple[str, ...] = ()  # images that may be usable or not, as the decoder likes
    sizes: dict[str, tuple[int, int]] = {}  # width and height, upright, of some  # noqa: RUF012
    args: tuple[str, ...] = ()
    environment: Callable[[World], dict[str, str]] | None = None
    real: bool = False  # as a process of its own: it could hang, or take all the memory
    bare: bool = False  # for which root must be without its rights over files
    server: bool = False  # wants S3


class Tried(NamedTuple):
    """What a command did."""

    status: int
    stdout: str
    stderr: str
    kept: Path  # the dataset, if any
    changed: list[str]  # files and folders outside of ``kept`` that are new, gone, or not as they were
    memory: int  # bytes, of a real process; else 0


# ---- running -------------------------------------------------------------------------------------------------------------------


def try_case(case: Case, root: Path, server: Any = None) -> Tried:
    """Make the data of ``case`` below the empty folder ``root`` and inspect them. CannotTryError: this machine cannot."""
    prefix = unprivileged() if case.bare else ()
    w = World(root, server)
    (root / "tmp").mkdir()
    uri = case.make(w)
    before = snapshot(root)
    arguments = ["data", "inspect", "--keep", "kept", *case.args, "--", uri]
    environment = {
        "XDG_CACHE_HOME": str(root / "cache"),
        "TMPDIR": str(root / "tmp"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    environment |= case.environment(w) if case.environment else {}
    if case.real or case.bare:
        status, stdout, stderr, memory = as_process(arguments, root, environment, prefix)
    else:
        (status, stdout, stderr), memory = in_process(arguments, root, environment), 0
    after = snapshot(root)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    escaped = (folder / "graftwork-escaped.png" for folder in (*root.parents, Path("/tmp")))  # as the archives have it
    changed += [str(path) for path in escaped if path.exists()]
    return Tried(status, stdout, stderr, root / "kept", changed, memory)


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of all that is below ``root``, but for the kept dataset and what lies whole in the cache."""
    found = {}
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [f for f in folders if (here / f) not in (root / "kept",)]
        for name in (*files, *folders):
            path = str((here / name).relative_to(root))
            if path.startswith("cache") and "partial" not in path:
                continue
            status = os.lstat(here / name)
            found[path] = (status.st_size, status.st_mtime_ns) if name in files else (0, 0)
    return found


def clean_environment(more: dict[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "GRAFTWORK_", "COVERAGE_"))}
    return {**kept, "GRAFTWORK_CACHE": os.environ.get("GRAFTWORK_CACHE", ""), **more}


def in_process(arguments: list[str], root: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """Run the command as its entry point does, with all that it and the C libraries below it print caught."""
    from graftwork.pipelines import cli

    saved = sys.argv, dict(os.environ), tempfile.tempdir
    try:
        os.environ.clear()
        os.environ.update(clean_environment(environment))
        sys.argv, tempfile.tempdir = ["graftwork", *arguments], environment["TMPDIR"]
        with contextlib.chdir(root), caught() as printed, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("default")
            for ours_to_see in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", ours_to_see)  # as Python does for a program
            try:
                cli.main()
                status = 0
            except SystemExit as ended:
                status = int(ended.code or 0)
    finally:
        sys.argv, tempfile.tempdir = saved[0], saved[2]
        os.environ.clear()
        os.environ.update(saved[1])
    stdout, stderr = printed
    return status, stdout, stderr + "".join(f"{w.filename}: {w.category.__name__}: {w.message}\n" for w in warned)


@contextlib.contextmanager
def caught() -> Iterator[list[str]]:
    """Catch what is written to stdout and stderr, by whatever library; the list holds both texts when the block has ended."""
    texts: list[str] = []
    with contextlib.ExitStack() as stack:
        files, saved = [], []
        for number, redirect in ((1, contextlib.redirect_stdout), (2, contextlib.redirect_stderr)):
            file = stack.enter_context(tempfile.TemporaryFile(dir="/tmp"))
            saved.append(os.dup(number))
            os.dup2(file.fileno(), number)
            text = os.fdopen(os.dup(file.fileno()), "w", encoding="utf-8", errors="backslashreplace")
            stack.enter_context(redirect(stack.enter_context(text)))
            files.append((file, text))
        try:
            yield texts
        finally:
            for number, ((file, text), descriptor) in enumerate(zip(files, saved, strict=True), 1):
                text.flush()
                os.dup2(descriptor, number)
                os.close(descriptor)
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))


def as_process(
    arguments: list[str], root: Path, environment: dict[str, str], prefix: tuple[str, ...]
) -> tuple[int, str, str, int]:
    """Run the command as a user does; return its status, what it printed, and its peak of memory in bytes."""
    command = [*prefix, sys.executable, "-m", "graftwork.pipelines.cli", *arguments]
    with tempfile.TemporaryFile(dir="/tmp") as out, tempfile.TemporaryFile(dir="/tmp") as err:
        process = subprocess.Popen(command, cwd=root, env=clean_environment(environment), stdout=out, stderr=err)
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            _, raw, usage = os.wait4(process.pid, 0)
        finally:
            timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(raw)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return process.returncode, texts[0], texts[1], usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def unprivileged() -> tuple[str, ...]:
    """Return what goes before a command so that file permissions hold for it: nothing, or root without its rights over files."""
    if os.geteuid() != 0:
        return ()
    dropped = "-dac_override,-dac_read_search"
    prefix = ("setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}")
    if not shutil.which("setpriv") or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        raise CannotTryError("the user is root, whom no permission stops")
    return prefix


# ---- pictures ------------------------------------------------------------------------------------------------------------------


def picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """Return soft spots of colour: unlike every other seed's, and like itself when it is scaled or encoded anew."""
    spots = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def png(seed: int) -> bytes:
    return encoded(picture(seed), compress_level=1)


def tree(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def sound(classes: tuple[str, ...] = ("a", "b"), each: int = GOOD // 2) -> dict[str, bytes]:
    """Return good images, by their paths."""
    return {f"{label}/{n:02d}.png": png(1000 * c + n) for c, label in enumerate(classes) for n in range(each)}


def splits(each: int = 4, names: tuple[str, ...] = ("train", "val", "test")) -> dict[str, bytes]:
    """Return good images with splits: 24 with ``each`` and ``names`` as they are."""
    return {
        f"{split}/{label}/{n}.png": png(10_000 + 1000 * s + 100 * c + n)
        for s, split in enumerate(names)
        for c, label in enumerate("ab")
        for n in range(each)
    }


def folder_of(*parts: dict[str, bytes] | Callable[[], dict[str, bytes]]) -> Callable[[World], str]:
    """Return what makes the folder ``data`` with these files in it."""

    def make(w: World) -> str:
        for part in parts:
            tree(w.root / "data", part() if callable(part) else part)
        return "data"

    return make


def beside_good(files: Callable[[], dict[str, bytes]] | dict[str, bytes]) -> Callable[[World], str]:
    """Return what makes a folder of 24 good images, and these files in the class a."""
    return folder_of(sound, lambda: {f"a/{k}": v for k, v in (files() if callable(files) else files).items()})


LENIENT = ("--set", "max_broken=0.5")
USABLE = (r"^good to train on: ",)
LEFT_OUT = r"^warning  all_decodable: {} images? cannot be decoded and (is|are) left out"
TOO_MANY = r"^critical  decodable: {} of {} images cannot be decoded, more than the 5% allowed"


def image_case(
    name: str,
    files: Callable[[], dict[str, bytes]] | dict[str, bytes],
    images: int,
    broken: dict[str, str] | None = None,
    says: tuple[str, ...] = (),
    **more: Any,
) -> Case:
    """Return a case of ``images`` good ones, 24 of them plain, and broken ones beside them that are left out."""
    found = {f"a/{k}": v for k, v in (broken or {}).items()}
    if found and "either" not in more:
        says = (LEFT_OUT.format(len(found)), *says)
    return Case(name, beside_good(files), 0, (*USABLE, *says), images, found, args=LENIENT, **more)


# ---- images --------------------------------------------------------------------------------------------------------------------

KINDS = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "WEBP": ".webp",
    "PPM": ".ppm",
    "TGA": ".tga",
    "JPEG2000": ".jp2",
    "ICO": ".ico",
    "AVIF": ".avif",
}
if not features.check("avif"):
    del KINDS["AVIF"]
if not features.check("jpg_2000"):
    del KINDS["JPEG2000"]


@functools.cache
def whole(kind: str, seed: int = 500) -> bytes:
    """Return a good image of a kind, some kilobytes."""
    noise = np.random.default_rng(seed).integers(-20, 20, (96, 96, 3))
    image = Image.fromarray(np.clip(np.asarray(picture(seed, 96, 96)) + noise, 0, 255).astype(np.uint8))
    return encoded(image, kind, **({"sizes": [(64, 64)]} if kind == "ICO" else {}))


def damaged(kind: str) -> dict[str, bytes]:
    data, suffix = whole(kind), KINDS[kind]
    middle = len(data) // 2
    flipped = data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 40]) + data[middle + 40 :]
    parts = {"half": data[:middle], "byte": data[:1], "zero": b"", "head": data[:20], "flipped": flipped}
    return {f"{name}{suffix}": content for name, content in parts.items()}


def damaged_case(kind: str) -> Case:
    suffix = KINDS[kind]
    reasons = {"half": "cut off|" + SOME_REASON, "byte": "not an image", "zero": "^zero bytes$", "head": SOME_REASON}
    return image_case(
        f"{kind}: cut in half, its first byte, no byte, its header alone, and with bytes flipped",
        lambda: damaged(kind),
        GOOD,
        {f"{name}{suffix}": reason for name, reason in reasons.items()},
        (
            r"^warning  all_decodable: [45] images cannot be decoded",
            r"a/byte\S+: not an image",
            r"a/zero\S+: zero bytes",
        ),
        either=(f"a/flipped{suffix}",),
    )


SOME_REASON = r"^[a-z0-9][^\n]{3,}"


def under_other_suffixes() -> dict[str, bytes]:
    suffixes = list(KINDS.values())
    return {f"{kind}{suffixes[n - 1]}": whole(kind, 600 + n) for n, kind in enumerate(KINDS)}


def odd_modes() -> dict[str, bytes]:
    image = picture(700)
    grey = np.asarray(image.convert("L"))
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    return {
        "cmyk.jpg": encoded(picture(701).convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(picture(702).convert("L"), "JPEG"),
        "grey16.png": encoded(Image.fromarray(grey.astype(np.uint16) * 257)),
        "one-bit.png": encoded(picture(703).convert("1")),
        "palette.png": encoded(picture(704).quantize(16)),
        "palette-see-through.png": encoded(picture(705).quantize(15), transparency=3),
        "palette-alphas.png": encoded(picture(706).quantize(15), transparency=bytes(range(0, 255, 17))),
        "alpha.png": encoded(alpha),
        "grey-alpha.png": encoded(alpha.transpose(Image.Transpose.ROTATE_180).convert("LA")),
        "float.tif": encoded(Image.fromarray(np.asarray(picture(707).convert("L")).astype(np.float32) / 255), "TIFF"),
        "int32.tif": encoded(Image.fromarray(np.asarray(picture(708).convert("L")).astype(np.int32) * 257), "TIFF"),
    }


def tiled_tiff(seed: int) -> bytes:
    """Return a TIFF of 64 x 64 grey pixels in 16 tiles, which Pillow reads and does not write."""
    pixels = np.asarray(picture(seed, 64, 64).convert("L"))
    tiles = [pixels[y : y + 16, x : x + 16].tobytes() for y in range(0, 64, 16) for x in range(0, 64, 16)]
    values = {
        256: [64],
        257: [64],
        258: [8],
        259: [1],
        262: [1],
        277: [1],
        322: [16],
        323: [16],
        324: [],
        325: [256] * 16,
    }
    lists = 8 + 2 + 12 * len(values) + 4
    values[324] = [lists + 2 * 64 + 256 * n for n in range(16)]
    entries, behind = b"", b""
    for tag, value in values.items():
        where = value[0] if len(value) == 1 else lists + len(behind)
        behind += b"" if len(value) == 1 else struct.pack(f"<{len(value)}I", *value)
        entries += struct.pack("<HHII", tag, 4, len(value), where)
    return struct.pack("<2sHIH", b"II", 42, 8, len(values)) + entries + bytes(4) + behind + b"".join(tiles)


def tiffs() -> dict[str, bytes]:
    compressions = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    pages = {"save_all": True, "append_images": [picture(711), picture(712)]}
    return {
        **{f"{name}.tif": encoded(picture(720 + n), "TIFF", compression=name) for n, name in enumerate(compressions)},
        "group4.tif": encoded(picture(730).convert("1"), "TIFF", compression="group4"),
        "pages.tif": encoded(picture(710), "TIFF", **pages),
        "tiled.tif": tiled_tiff(713),
    }


def animations() -> dict[str, bytes]:
    pages = {"save_all": True, "append_images": [picture(741), picture(742)]}
    return {f"moving-{kind.lower()}{'.jpg' if kind == 'MPO' else f'.{kind.lower()}'}": encoded(picture(750 + n), kind, **pages)
            for n, kind in enumerate(("GIF", "WEBP", "PNG", "MPO"))}  # fmt: skip


def turned() -> dict[str, bytes]:
    found = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found[f"turned{orientation}.jpg"] = encoded(picture(760 + orientation), "JPEG", exif=exif)
    return found


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge_png(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that says it is huge."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_with(kind: bytes, content: bytes, seed: int) -> bytes:
    """Return a good PNG with one more chunk before its pixels."""
    data = png(seed)
    return data[:33] + chunk(kind, content) + data[33:]


@functools.cache
def zeros(megabytes: int) -> bytes:
    """Return that many megabytes of nothing, deflated a thousandfold."""
    return zlib.compress(bytes(megabytes * 2**20), 1)


def bombs() -> dict[str, bytes]:
    """Images that say they are huge, in some bytes."""
    jpeg = bytearray(whole("JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    gif = bytearray(whole("GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    bmp = bytearray(whole("BMP"))
    bmp[18:26] = struct.pack("<ii", 2**30, 2**30)
    tiff = struct.pack("<2sHIH", b"II", 42, 8, 5)
    for tag, value in ((256, 2**31 - 1), (257, 2**31 - 1), (258, 8), (262, 1), (273, 8)):
        tiff += struct.pack("<HHII", tag, 4, 1, value)
    inner = huge_png(60_000, 60_000)
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22) + inner
    return {
        "declared.png": huge_png(60_000, 60_000),
        "largest.png": huge_png(2**31 - 1, 2**31 - 1),
        "declared.jpg": bytes(jpeg),
        "declared.gif": bytes(gif),
        "declared.bmp": bytes(bmp),
        "declared.tif": tiff + bytes(4),
        "declared.ppm": b"P6 99999999 99999999 255\n" + bytes(99),
        "inside.ico": icon,
    }


HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
NO_IMAGES = {
    "page.jpg": HTML,
    "answer.png": b'{"error": "not found"}',
    "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "phone.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "paper.jpg": b"%PDF-1.7\n1 0 obj << >> endobj\n" + bytes(200),
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "film.gif": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(200),
    "zeros.jpg": bytes(5000),
    "noise.jpg": bytes(np.random.default_rng(3).integers(0, 256, 5000, dtype=np.uint8)),
}
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n"
    b"(ran-by-ghostscript) (w) file closefile\n0 0 40 40 rectfill showpage\n%%EOF\n"
)


def odd_jpegs() -> dict[str, bytes]:
    image = picture(780)
    return {
        "tail.jpg": encoded(image, "JPEG") + bytes(np.random.default_rng(4).integers(0, 256, 3000, dtype=np.uint8)),
        "profile.jpg": encoded(picture(781), "JPEG", icc_profile=b"no profile at all"),
        "exif.jpg": encoded(picture(782), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x99" * 60),
        "exif-loop.jpg": encoded(
            picture(783), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x87i\0\4\0\0\0\1\0\0\0\x08\0\0\0\0"
        ),
        "comment.jpg": encoded(picture(784), "JPEG", comment=b"\xff\xfe\x00[bold]" * 99),
        "progressive.jpg": encoded(picture(785), "JPEG", progressive=True),
        "sampled.jpg": encoded(picture(786), "JPEG", subsampling=2, quality=5),
    }


def cut_jpegs() -> dict[str, bytes]:
    progressive, plain = encoded(picture(790, 200, 200), "JPEG", progressive=True), whole("JPEG", 791)
    return {"progressive.jpg": progressive[: len(progressive) * 2 // 3], "last-block.jpg": plain[:-200]}


def bad_pngs() -> dict[str, bytes]:
    data, at = bytearray(whole("PNG", 800)), len(whole("PNG", 800)) // 2
    data[at] ^= 1
    no_end = whole("PNG", 801)[:-12]
    return {"checksum.png": bytes(data), "no-end.png": no_end[: len(no_end) - 500]}


def odd_files(w: World) -> str:
    """Good images, and names of images that lead to something else."""
    tree(w.root / "data", sound())
    here = w.root / "data/a"
    (here / "gone.png").symlink_to("nowhere.png")
    (here / "loop.png").symlink_to("loop.png")
    (here / "folder.jpg").mkdir()
    (here / "zero.png").symlink_to("/dev/zero")
    (here / "linked.png").symlink_to("../b/00.png")
    (here / "linked.png").unlink()  # the same image in two classes is a finding of its own
    return "data"


def pipe_and_socket(w: World) -> str:
    tree(w.root / "data", sound())
    os.mkfifo(w.root / "data/a/pipe.png")
    return "data"


def unreadable(w: World) -> str:
    tree(w.root / "data", sound() | {"a/secret.png": png(810)})
    (w.root / "data/a/secret.png").chmod(0)
    return "data"


def only_broken(w: World) -> str:
    tree(w.root / "data", {f"{label}/{n}.jpg": HTML for label in "ab" for n in range(4)})
    return "data"


IMAGES = (
    *(damaged_case(kind) for kind in KINDS),
    image_case("every kind that can be read, whole", lambda: {f"x{KINDS[k]}": whole(k, 550 + n) for n, k in enumerate(KINDS)},
               GOOD + len(KINDS)),
    image_case("images of every kind under another's suffix", under_other_suffixes, GOOD + len(KINDS)),
    image_case(
        "CMYK, grey, palette, transparent, 1-bit, 16-bit and float images",
        odd_modes,
        GOOD + 11,
        says=(r"^warning  mode: 3 images have more than 8 bits a channel",),
    ),
    image_case("TIFFs: LZW, deflate, PackBits, JPEG, fax, several pages, tiled", tiffs, GOOD + 7),
    image_case("animated GIF, WebP and PNG, and an MPO of two pictures", animations, GOOD + 4),
    image_case(
        "JPEGs turned by EXIF, all eight ways",
        turned,
        GOOD + 8,
        sizes={f"a/turned{n}.jpg": (48, 64) if n > 4 else (64, 48) for n in range(1, 9)},
    ),
    image_case(
        "JPEGs with a tail behind the end, broken profiles, EXIF and comments, progressive, of quality 5", odd_jpegs, GOOD + 7
    ),
    image_case(
        "a progressive JPEG cut off, and a JPEG without its last bytes",
        cut_jpegs,
        GOOD,
        {"progressive.jpg": "^cut off$", "last-block.jpg": "^cut off$"},
        (r"a/progressive\.jpg: cut off",),
    ),
    image_case("PNGs with a wrong checksum, and without their end", bad_pngs, GOOD,
               {"checksum.png": SOME_REASON, "no-end.png": SOME_REASON}),
    image_case(
        "images of a few bytes that say they are huge",
        bombs,
        GOOD,
        dict.fromkeys(bombs(), r"more than 100,000,000 pixels$|pixels, more than 100,000,000$|" + SOME_REASON),
        (r"a/declared\.gif: more than 100,000,000 pixels",),
        real=True,
    ),
    image_case(
        "PNGs whose text and whose colour profile unpack to 200 MB",
        lambda: {
            "text.png": png_with(b"zTXt", b"Comment\0\0" + zeros(200), 820),
            "profile.png": png_with(b"iCCP", b"icc\0\0" + zeros(200), 821),
        },
        GOOD,
        either=("a/text.png", "a/profile.png"),
        real=True,
    ),
    image_case("HTML, JSON, SVG, HEIC, PDF, a Git LFS pointer, a film, zeros and noise named as images", NO_IMAGES, GOOD,
               dict.fromkeys(NO_IMAGES, "^not an image$"), (r"not an image",)),
    image_case("PostScript named as a JPEG, which another program would have to run", {"script.jpg": POSTSCRIPT}, GOOD,
               {"script.jpg": "PostScript"}, ("PostScript",)),
    Case(
        "links to nothing, to themselves and to a device, and a folder named as an image",
        odd_files,
        0,
        (*USABLE, LEFT_OUT.format(3), r"a/gone\.png: no such file", r"a/zero\.png: not a regular file"),
        GOOD,
        {
            "a/gone.png": "^no such file or directory$",
            "a/loop.png": "^too many levels of symbolic links$",
            "a/zero.png": "^not a regular file$",
        },
        args=LENIENT,
    ),
    Case("a pipe named as an image", pipe_and_socket, 0, (*USABLE, LEFT_OUT.format(1), r"a/pipe\.png: not a regular file"), GOOD,
         {"a/pipe.png": "^not a regular file$"}, real=True),
    Case("an image that may not be read", unreadable, 0, (*USABLE, LEFT_OUT.format(1), r"a/secret\.png: permission denied"), GOOD,
         {"a/secret.png": "^permission denied$"}, bare=True),
    image_case("an image of one pixel", lambda: {"dot.png": encoded(Image.new("RGB", (1, 1), "red"))}, GOOD + 1,
               says=(r"^warning  size: 1 images? (has|have) a side under 8 pixels \(a/dot\.png\)",)),
    image_case("an image of 1 x 30,000 pixels", lambda: {"line.png": encoded(picture(830, 1, 30_000))}, GOOD + 1,
               says=(r"^warning  aspect: 1 images? (is|are) more than 8 times as long as wide \(a/line\.png\)",)),
    image_case("blank images, and one that is all transparent",
               lambda: {"white.png": encoded(Image.new("RGB", (50, 50), "white")), "clear.png": encoded(Image.new("RGBA", (50, 60)))},
               GOOD + 2, says=(r"^warning  not_blank: 2 images are blank or nearly of one colour",)),
    Case("one broken image in 25: within the share that may be", beside_good({"x.jpg": HTML}), 0,
         (*USABLE, LEFT_OUT.format(1), r"\(a/x\.jpg: not an image\)"), GOOD, {"a/x.jpg": "^not an image$"}),
    Case("two broken images in 26: more than the share that may be", beside_good({"x.jpg": HTML, "y.jpg": b""}), 1,
         (r"^not good to train on", TOO_MANY.format(2, GOOD + 2), r"a/y\.jpg: zero bytes", "mend or remove them, or raise max_broken"),
         GOOD, {"a/x.jpg": "^not an image$", "a/y.jpg": "^zero bytes$"}),
    Case("nothing but broken images", only_broken, 1,
         (r"^graftwork: data \S+data: none of its 8 images can be decoded \(a/0\.jpg: not an image\); give images that a viewer opens$",)),
    Case("a class of nothing but broken images", folder_of(sound(("a",)), {f"b/{n}.jpg": HTML for n in range(12)}), 1,
         (r"^critical  rows_per_class: 1 class(es)? (has|have) fewer than 3 usable images \(b\)", r"^critical  decodable: 12 of 24"),
         12, {f"b/{n}.jpg": "not an image" for n in range(12)}),
    Case("a broken image where only some are wanted: the next one takes its place",
         beside_good({"x.jpg": HTML, "y.jpg": HTML + b" "}), 0, USABLE, 16,
         {"a/y.jpg": "^not an image$"}, args=(*LENIENT, "--set", "train_per_class=4", "--set", "test_per_class=3")),
    Case("images all larger than max_pixels", folder_of(sound), 1,
         (r"none of its 24 images can be decoded \(a/00\.png: more than 1,000 pixels\)",), args=("--set", "max_pixels=1000")),
)  # fmt: skip


# ---- archives ------------------------------------------------------------------------------------------------------------------


def write_zip(path: Path, files: dict[str, bytes], *more: tuple[zipfile.ZipInfo | str, bytes]) -> None:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as archive:  # of duplicate names
        for name, content in (*files.items(), *more):
            archive.writestr(name, content)


def write_tar(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo, mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in more:
            archive.addfile(member, io.BytesIO(bytes(member.size)))


def zipped(
    files: Callable[[], dict[str, bytes]] | dict[str, bytes], *more: tuple[Any, bytes]
) -> Callable[[World], str]:
    def make(w: World) -> str:
        write_zip(w.root / "photos.zip", files() if callable(files) else files, *more)
        return "photos.zip"

    return make


def tarred(
    files: Callable[[], dict[str, bytes]], *more: tarfile.TarInfo, name: str = "photos.tar", mode: str = "w"
) -> Callable[[World], str]:
    def make(w: World) -> str:
        write_tar(w.root / name, files(), *more, mode=mode)
        return name

    return make


def file_of(name: str, content: Callable[[], bytes] | bytes) -> Callable[[World], str]:
    def make(w: World) -> str:
        (w.root / name).write_bytes(content() if callable(content) else content)
        return name

    return make


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def zip_bytes(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def central(data: bytes, name: str) -> int:
    """Return where the directory of the zip ``data`` describes ``name``."""
    return data.rindex(name.encode()) - 46


def encrypted() -> bytes:
    data = bytearray(zip_bytes(sound()))
    for name in sound():
        data[central(bytes(data), name) + 8] |= 1
    return bytes(data)


def wrong_crc() -> bytes:
    data = bytearray(zip_bytes(sound()))
    data[data.index(b"a/00.png") + 8 + 100] ^= 0xFF
    return bytes(data)


def lying_zip() -> bytes:
    """Good images, and one that unpacks to 64 MB where the directory says 100 bytes."""
    data = bytearray(zip_bytes({**sound(), "a/bomb.png": bytes(64 * 2**20)}, zipfile.ZIP_DEFLATED))
    data[central(bytes(data), "a/bomb.png") + 24 :][:4] = b""
    at = central(bytes(data), "a/bomb.png")
    data[at + 24 : at + 28] = struct.pack("<I", 100)
    return bytes(data)


def boasting_zip() -> bytes:
    """Images that say they unpack to 4 GB each."""
    data = bytearray(zip_bytes(sound(), zipfile.ZIP_DEFLATED))
    for name in sound():
        at = central(bytes(data), name)
        data[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)
    return bytes(data)


def overlapping_zip() -> bytes:
    """Names that all lead to the same packed bytes, as in a bomb without nesting."""
    data = bytearray(zip_bytes(sound()))
    for name in sound():
        at = central(bytes(data), name)
        data[at + 42 : at + 46] = struct.pack("<I", 0)
    return bytes(data)


def gzip_bomb() -> bytes:
    """Return a tar of 2.5 GB of zeros, in three megabytes."""
    info = tarfile.TarInfo("a/bomb.png")
    info.size = 2560 * 2**20
    block = gzip.compress(bytes(2**26), 9)
    return gzip.compress(info.tobuf()) + block * 40 + gzip.compress(bytes(1024))


def tiny_entries(count: int) -> Callable[[], dict[str, bytes]]:
    return lambda: {**sound(), **{f"a/{n}.txt": b"x" for n in range(count)}}


MARKUP = (
    "[red]x[/]",
    "{0}{{count}}{x!r}",
    "line\nbreak",
    'l\'été "猫" & <b>',
    "100% %s",
    "-rf",
    "~",
    "$(touch ran)",
    "`x`|;",
)

ESCAPES = {"../../graftwork-escaped.png": png(900), "/tmp/graftwork-escaped.png": png(901), "a/../../graftwork-escaped.png": png(902), "C:\\x.png": png(903),
           "a\\..\\..\\y.png": png(904)}  # fmt: skip
ARCHIVES = (
    Case("a zip whose members climb out of it", zipped({**sound(), **ESCAPES}), 0,
         (*USABLE, r"^passed over: .*\b5 × unsafe paths in the archive"), GOOD),
    Case("a tar whose members climb out of it", tarred(lambda: {**sound(), **ESCAPES}), 0,
         (*USABLE, r"^passed over: .*\b5 × unsafe paths in the archive"), GOOD),
    Case("a zip with a link to a file outside", zipped(sound, (zip_link("a/passwd.png"), b"/etc/passwd")), 0,
         (*USABLE, r"^passed over: .*\b1 × links in the archive"), GOOD),
    Case(
        "a tar with links, pipes and devices",
        tarred(
            sound,
            member("a/soft.png", tarfile.SYMTYPE, "/etc/passwd"),
            member("a/hard.png", tarfile.LNKTYPE, "../../etc/passwd"),
            member("a/pipe.png", tarfile.FIFOTYPE),
            member("a/disk.png", tarfile.BLKTYPE),
            member("a/zero.png", tarfile.CHRTYPE),
        ),
        0,
        (*USABLE, r"\b2 × links in the archive", r"\b3 × special files in the archive"),
        GOOD,
    ),
    Case("a zip of which nothing may be used", zipped(ESCAPES), 2,
         (r"^graftwork: data photos\.zip: no images that may be used \(5 unsafe paths in the archive\); archive the folder",)),
    Case("a zip whose directory lies of a size: 64 MB in place of 100 bytes", file_of("photos.zip", lying_zip), 0,
         (*USABLE, r"a/bomb\.png: damaged in the archive"), GOOD, {"a/bomb.png": "^damaged in the archive$"}, real=True),
    Case("a zip that says it unpacks to 100 GB", file_of("photos.zip", boasting_zip), 2,
         (r"^graftwork: data photos\.zip: unpacks to 96 GiB or more, from .*, as an archive does that is made to fill a disk",)),
    Case("a zip whose members lie over each other", file_of("photos.zip", overlapping_zip), 2,
         (r"^graftwork: data photos\.zip: 23 of its images lie over others in the archive, as in one made to do harm",)),
    Case("a compressed tar of 3 MB that unpacks to 2.5 GB", file_of("photos.tar.gz", gzip_bomb), 2,
         (r"^graftwork: data photos\.tar\.gz: unpacks to 2 GiB or more", "give the folder"), real=True),
    Case("an encrypted zip", file_of("photos.zip", encrypted), 2,
         (r"^graftwork: data photos\.zip: 24 of its images are encrypted; unpack it with its password and give the folder$",)),
    Case("a zip cut in half", file_of("photos.zip", lambda: (d := zip_bytes(sound()))[: len(d) // 2]), 2,
         (r"^graftwork: data photos\.zip: is cut off", "copy or download it again")),
    Case("a tar cut in half", file_of("photos.tar", lambda: (d := tar_bytes(sound()))[: len(d) // 2]), 2,
         (r"^graftwork: data photos\.tar: is cut off", "copy or download it again")),
    Case("a compressed tar cut in half", file_of("photos.tgz", lambda: (d := tar_bytes(sound(), "w:gz"))[: len(d) // 2]), 2,
         (r"^graftwork: data photos\.tgz: is cut off", "copy or download it again")),
    Case("a zip with a wrong checksum", file_of("photos.zip", wrong_crc), 0,
         (*USABLE, r"a/00\.png: damaged in the archive"), GOOD - 1, {"a/00.png": "^damaged in the archive$"}),
    Case("a zip with a name twice: the last counts", zipped(sound, ("a/00.png", png(905))), 0,
         (*USABLE, r"^passed over: .*\b1 × duplicate names in the archive"), GOOD),
    Case("a web page named as a zip", file_of("photos.zip", HTML), 2,
         (r"^graftwork: data photos\.zip: holds text and is no archive", "download it again")),
    Case("noise named as a tar", file_of("photos.tar", NO_IMAGES["noise.jpg"]), 2,
         (r"^graftwork: data photos\.tar: is neither a zip nor a tar",)),
    Case("an empty file named as a zip", file_of("photos.zip", b""), 2, (r"^graftwork: data photos\.zip: is an empty file",)),
    Case("a compressed text named as a tar", file_of("photos.tar.gz", lambda: gzip.compress(HTML * 99)), 2,
         (r"^graftwork: data photos\.tar\.gz: is compressed, but what is in it is no tar",)),
    Case("a zip with nothing in it", zipped({}), 2, (r"^graftwork: data photos\.zip: is an empty archive",)),
    Case("a zip of a zip", zipped(lambda: {"photos.zip": zip_bytes(sound())}), 2,
         (r"^graftwork: data photos\.zip: no images found \(1 files? there ha(s|ve) no image suffix\)",)),
    Case("an archive that is not there", lambda w: "gone.tar.gz", 2, (r"^graftwork: data gone\.tar\.gz: no such file; check the path$",)),
    Case("a zip with one folder around all, and what a Mac adds",
         zipped(lambda: {**{f"photos/{k}": v for k, v in sound().items()}, "__MACOSX/photos/a/._00.png": b"x", "photos/.DS_Store": b"x"}),
         0, USABLE, GOOD),
    Case("a compressed tar named as a zip", file_of("photos.zip", lambda: tar_bytes(sound(), "w:xz")), 0, USABLE, GOOD),
    Case("a zip with a broken image in 25", zipped({**sound(), "b/x.jpg": HTML}), 0, (*USABLE, r"b/x\.jpg: not an image"), GOOD,
         {"b/x.jpg": "^not an image$"}),
    Case("a zip with 100,000 tiny files beside its images", zipped(tiny_entries(100_000)), 0, (*USABLE, r"^passed over: 100,000 × \.txt"), GOOD),
    Case("a tar with 20,000 tiny files beside its images", tarred(tiny_entries(20_000)), 0, (*USABLE, r"^passed over: 20,000 × \.txt"), GOOD),
    Case("a zip whose classes are named with markup, braces and line breaks",
         zipped(lambda: {f"{label}/{n}.png": png(2000 + 10 * c + n) for c, label in enumerate(MARKUP) for n in range(4)}), 0,
         (*USABLE, rf", {len(MARKUP)} classes, "), 4 * len(MARKUP)),
)  # fmt: skip


# ---- manifests -----------------------------------------------------------------------------------------------------------------


def rows_of(files: dict[str, bytes]) -> list[list[str]]:
    return [[f"data/{path}", path.split("/")[0]] for path in files]


def text_of(header: list[str], rows: list[list[str]], delimiter: str = ",") -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


HEADER = ["path", "label"]


def manifest(
    text: Callable[[list[list[str]]], str | bytes], name: str = "photos.csv", files: dict[str, bytes] | None = None
) -> Callable[[World], str]:
    """Return what writes ``text``, made of the rows (path, label) of good images, beside these images."""

    def make(w: World) -> str:
        held = sound() if files is None else files
        tree(w.root / "data", held)
        content = text(rows_of(held))
        (w.root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return make


def with_column(name: str, *values: str) -> Callable[[list[list[str]]], str]:
    """Return what writes one more column, whose values go round."""
    return lambda rows: text_of([*HEADER, name], [[*row, values[n % len(values)]] for n, row in enumerate(rows)])


def changed(row: int, column: int, value: str) -> Callable[[list[list[str]]], str]:
    """Return what writes the rows, one of their values changed."""

    def text(rows: list[list[str]]) -> str:
        rows[row][column] = value
        return text_of(HEADER, rows)

    return text


def parquet(columns: Callable[[list[list[str]]], dict[str, Any]], cut: float = 1.0) -> Callable[[World], str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def content(rows: list[list[str]]) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns(rows)), buffer)
        return buffer.getvalue()[: int(len(buffer.getvalue()) * cut)]

    return manifest(content, "photos.parquet")


def quoted_names() -> dict[str, bytes]:
    names = ("with, comma.png", 'with "quotes".png', "with\nbreak.png", "with;semi|bar\ttab.png", "größe 猫.png")
    return {**sound(), **{f"a/{name}": png(910 + n) for n, name in enumerate(names)}}


def mostly_missing(rows: list[list[str]]) -> str:
    return text_of(HEADER, [*rows, *([f"data/gone/{n}.png", "ab"[n % 2]] for n in range(100_000))])


def parted(rows: list[list[str]], group: Callable[[int], str]) -> str:
    """Give splits by hand, 8 images each, and groups."""
    names = ("train", "val", "test")
    return text_of([*HEADER, "split", "group"], [[*row, names[n % 3], group(n)] for n, row in enumerate(rows)])


REFUSED = r"^graftwork: data photos\.csv: "
MANIFESTS = (
    Case("a manifest with semicolons", manifest(lambda rows: text_of(HEADER, rows, ";")), 0, USABLE, GOOD),
    Case("a manifest with tabs, named .csv", manifest(lambda rows: text_of(HEADER, rows, "\t")), 0, USABLE, GOOD),
    Case("a manifest with blanks for separators", manifest(lambda rows: text_of(HEADER, rows, " ")), 2,
         (REFUSED + r"no column for the path .* among the columns found: 'path label'; name it in the first row",)),
    Case("a manifest in Latin-1", manifest(lambda rows: text_of(HEADER, [*rows, ["data/größe.png", "a"]]).encode("latin-1")), 2,
         (REFUSED + r"is not UTF-8 at byte \d+ \(row 25 \(line 26\)\), 0xf6; save it as UTF-8$",)),
    Case("a manifest in UTF-16", manifest(lambda rows: text_of(HEADER, rows).encode("utf-16")), 0, USABLE, GOOD),
    Case("a manifest with a byte order mark and Windows's line ends",
         manifest(lambda rows: b"\xef\xbb\xbf" + text_of(HEADER, rows).replace("\n", "\r\n").encode()), 0, USABLE, GOOD),
    Case("names with commas, quotes and line breaks, quoted", manifest(lambda rows: text_of(HEADER, rows), files=quoted_names()), 0,
         USABLE, GOOD + 5),
    Case("a quote that is not closed", manifest(lambda rows: text_of(HEADER, rows).replace("data/b/03", '"data/b/03')), 2,
         (REFUSED + r"row 16 has 1 fields? where the header has 2: .*; close the quote that it opens$",)),
    Case("a row with too many fields", manifest(lambda rows: text_of(HEADER, [*rows[:5], [*rows[5], "x"], *rows[6:]])), 2,
         (REFUSED + r"row 6 \(line 7\) has 3 fields where the header has 2: .*; put quotes around a value that holds a comma$",)),
    Case("a manifest without labels", manifest(lambda rows: text_of(["path", "kind"], rows)), 2,
         (REFUSED + r"no column for the label \(label, class, .*\) among the columns found: 'path', 'kind'",)),
    Case("a manifest without a header", manifest(lambda rows: text_of(rows[0], rows[1:])), 2,
         (REFUSED + r"no column for the path .*; name it in the first row$",)),
    Case("two columns that could be the label", manifest(with_column("class", "a")), 2,
         (REFUSED + r"2 columns could be the label: 'label', 'class'; keep one",)),
    Case("one row without a label", manifest(changed(3, 1, " ")), 0, (*USABLE, r"data/a/03\.png: no label"), GOOD - 1,
         {"data/a/03.png": "^no label$"}),
    Case("no row with a label", manifest(lambda rows: text_of(HEADER, [[r[0], ""] for r in rows])), 2,
         (REFUSED + "no row has a label; fill in the column for the label$",)),
    Case("numbers for labels", manifest(lambda rows: text_of(HEADER, [[p, str(int(la == "a"))] for p, la in rows])), 0,
         (*USABLE, ", 2 classes, "), GOOD),
    Case("labels with blanks around them",
         manifest(lambda rows: text_of(HEADER, [[p, (f" {la}", f"{la}\t", la)[n % 3]] for n, (p, la) in enumerate(rows)])), 0,
         (*USABLE, ", 2 classes, "), GOOD),
    Case("labels of markup and braces",
         manifest(lambda rows: text_of(HEADER, [[p, {"a": "[red]{count}", "b": "{0}[/]\n"}[la]] for p, la in rows[:22]])), 0,
         (*USABLE, ", 2 classes, "), GOOD - 2),
    Case("a path that leads out of the folder", manifest(changed(3, 0, "../../etc/x.png")), 2,
         (REFUSED + r"row 4 \(line 5\): '\.\./\.\./etc/x\.png' leads out of the manifest's folder; write an absolute path$",)),
    Case("a path on the web", manifest(changed(3, 0, "https://x.org/1.png")), 2,
         (REFUSED + r"row 4 \(line 5\): 'https://x\.org/1\.png' cannot be read; give a path, file:///path or s3://bucket/key$",)),
    Case("a row without a path", manifest(changed(3, 0, "")), 0, (*USABLE, r"\(no path, row 4\): no path"), GOOD - 1,
         {"(no path, row 4)": "^no path$"}),
    Case("a path that is a folder", manifest(changed(3, 0, "data/b")), 0, (*USABLE, r"data/b: not a regular file"), GOOD - 1,
         {"data/b": "^not a regular file$"}),
    Case("one missing file in 24", manifest(changed(3, 0, "data/a/gone.png")), 0, (*USABLE, r"data/a/gone\.png: no such file"), GOOD - 1,
         {"data/a/gone.png": "^no such file"}),
    Case("files that are all missing", manifest(lambda rows: text_of(HEADER, [["x" + p, la] for p, la in rows])), 1,
         (r"none of its 24 images can be decoded \(xdata/a/00\.png: no such file or directory\)",)),
    Case("100,000 rows of which nearly all are missing", manifest(mostly_missing), 1,
         (r"^critical  decodable: 100,000 of 100,024 images cannot be decoded", "no such file"), GOOD, {"*": "^no such file"}),
    Case("rows that repeat others", manifest(lambda rows: text_of(HEADER, rows + rows[:5])), 0,
         (*USABLE, r"^passed over: 5 × rows that repeat a path"), GOOD),
    Case("a path under two labels", manifest(lambda rows: text_of(HEADER, [*rows, ["data/a/00.png", "b"]])), 0,
         (*USABLE, r"^warning  content_has_one_label: 2 images have the same content as another with another label \(data/a/00\.png = data/a/00\.png \(2\)\)",),
         GOOD + 1),
    Case("a split that is none", manifest(with_column("split", "train", "test", "vla")), 2,
         (REFUSED + r"row 3 \(line 4\): split 'vla' is not known; give train, val or test, or leave it empty$",)),
    Case("splits without train", manifest(with_column("split", "test", "val")), 2, (REFUSED + "has rows of test, val but no row of train",)),
    Case("a weight below nothing", manifest(with_column("weight", "1", "-2")), 2,
         (REFUSED + r"row 2 \(line 3\): weight '-2' is not a number above 0; mend it, or leave it empty for 1$",)),
    Case("a weight that is no number", manifest(with_column("weight", "1", "nan")), 2, (REFUSED + r"row 2 .*weight 'nan' is not a number",)),
    Case("a time that is none", manifest(with_column("time", "2024-01-31", "31.1.2024")), 2,
         (REFUSED + r"row 2 \(line 3\): time '31\.1\.2024' is not understood; write it as 2024-01-31",)),
    Case("a split by time where a time is missing", manifest(with_column("time", "2024-01-31", "")), 1,
         (r"^graftwork: data data/a/01\.png: has no time, which split_by = time needs",), args=("--set", "split_by=time")),
    Case("a header and no rows", manifest(lambda rows: "path,label\n"), 2, (REFUSED + "has a header and no rows; add a row",)),
    Case("an empty manifest", manifest(lambda rows: ""), 2, (REFUSED + "is empty; its first row must name the columns",)),
    Case("a manifest with NUL bytes", manifest(lambda rows: text_of(HEADER, rows).replace("data/a/05", "data/a\0/05")), 2,
         (REFUSED + r"holds a NUL byte at byte \d+ \(row 6 \(line 7\)\); save it as UTF-8 text$",)),
    Case("an Excel file named .csv", manifest(lambda rows: zip_bytes({"xl/workbook.xml": b"<x/>" * 99}, zipfile.ZIP_DEFLATED)), 2,
         (REFUSED + "is an Excel file, or another archive, by its contents; save it as CSV in UTF-8$",)),
    Case("a gzip that is none", manifest(lambda rows: text_of(HEADER, rows), "photos.csv.gz"), 2,
         (r"^graftwork: data photos\.csv\.gz: is no whole gzip file",)),
    Case("one class alone", manifest(lambda rows: text_of(HEADER, rows[:12])), 2, (REFUSED + "only one class, 'a'",)),
    Case("a class with one image", manifest(lambda rows: text_of(HEADER, rows[:13])), 1,
         (r"^critical  rows_per_class: 1 class(es)? (has|have) fewer than 3 usable images \(b\)",), 13),
    Case("a manifest that is not there", lambda w: "gone.csv", 2, (r"^graftwork: data gone\.csv: no such file; check the path$",)),
    Case("text named as Parquet", manifest(lambda rows: text_of(HEADER, rows), "photos.parquet"), 2,
         (r"^graftwork: data photos\.parquet: is not Parquet, or is damaged",)),
    Case("Parquet cut off", parquet(lambda rows: {"path": [r[0] for r in rows], "label": [r[1] for r in rows]}, cut=0.7), 2,
         (r"^graftwork: data photos\.parquet: is not Parquet, or is damaged",)),
    Case("Parquet without labels", parquet(lambda rows: {"path": [r[0] for r in rows]}), 2,
         (r"^graftwork: data photos\.parquet: no column for the label",)),
    Case("Parquet with lists for labels", parquet(lambda rows: {"path": [r[0] for r in rows], "label": [[r[1]] for r in rows]}), 2,
         (r"^graftwork: data photos\.parquet: the column for the label is of type list.* cannot be taken as text",)),
    Case("Parquet with whole numbers and nulls for labels",
         parquet(lambda rows: {"path": [r[0] for r in rows], "label": [None if n == 3 else float(n > 11) for n in range(len(rows))]}), 0,
         (*USABLE, ", 2 classes, ", r"data/a/03\.png: no label"), GOOD - 1, {"data/a/03.png": "^no label$"}),
    Case("groups that are in two splits", manifest(lambda rows: parted(rows, lambda n: f"patient {n // 2}")), 1,
         (r"^critical  group_in_one_split: 24 images are of a group that is in more than one split .* keep each group in one split",), GOOD),
    Case("groups that are in one split each", manifest(lambda rows: parted(rows, lambda n: f"patient {n % 3}")), 0, USABLE, GOOD),
)  # fmt: skip


# ---- folders -------------------------------------------------------------------------------------------------------------------


def looping(w: World) -> str:
    tree(w.root / "data", sound())
    (w.root / "data/a/up").symlink_to("..")
    (w.root / "data/again").symlink_to(".")
    (w.root / "data/b/itself").symlink_to("itself")
    return "data"


def bytes_names(w: World) -> str:
    tree(w.root / "data", sound())
    try:
        (w.root / "data" / os.fsdecode(b"cl\xff")).mkdir()
        for n in range(4):
            (w.root / "data" / os.fsdecode(b"cl\xff") / os.fsdecode(b"\xfe%d.png" % n)).write_bytes(png(920 + n))
    except OSError:
        raise CannotTryError("the file system holds UTF-8 names alone") from None
    return "data"


def re_encoded(w: World) -> str:
    """Given splits, and a picture of train in test: scaled, and encoded anew."""
    tree(w.root / "data", splits())
    picture(930, 160, 120).save(w.root / "data/train/a/original.png")
    picture(930, 160, 120).resize((120, 90)).save(w.root / "data/test/a/copy.jpg", quality=80)
    return "data"


def long_names() -> dict[str, bytes]:
    return {f"{'c' * 255}/{n}{'x' * 250}.png": png(940 + n) for n in range(4)} | {
        f"{'d' * 255}/{n}.png": png(950 + n) for n in range(4)
    }


def without(prefix: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {k: v for k, v in files.items() if not k.startswith(prefix)}


HIDDEN = {".git/x.png": b"x", "a/.hidden.png": b"x", "__MACOSX/a/._1.png": b"x", "b/Thumbs.db": b"x", "a/.thumbs/1.png": b"x",
          "b/notes.txt": b"x", "b/labels": b"x", "readme.md": b"x"}  # fmt: skip
FOLDERS = (
    Case("a folder that is not there", lambda w: "gone", 2, (r"^graftwork: data gone: no such folder, and no dataset of that name .*; check the path$",)),
    Case("a folder with nothing in it", folder_of({".keep": b""}), 2,
         (r"^graftwork: data data: no images found; put them in one folder a class, as CLASS/photo\.jpg$",)),
    Case("files that are no images", folder_of({"a/x.pdf": b"x", "b/y.heic": b"x"}), 2,
         (r"^graftwork: data data: no images found \(2 files there have no image suffix\)",)),
    Case("images outside class folders", folder_of(lambda: {f"{n}.png": png(n) for n in range(5)}), 2,
         (r"^graftwork: data data: no images found in class folders \(5 lie outside a class folder\)",)),
    Case("one class", folder_of(lambda: sound(("cats",))), 2,
         (r"^graftwork: data data: only one class, 'cats'; a classifier needs images in at least two class folders$",)),
    Case("train and nothing else: the others are cut from it", folder_of(lambda: splits(12, ("train",))), 0, USABLE, GOOD),
    Case("test and val without train", folder_of(lambda: splits(6, ("val", "test"))), 2,
         (r"^graftwork: data data: has test, val but no train folder; add train/CLASS/\*\.jpg$",)),
    Case("a class that test lacks", folder_of(lambda: without("test/b", splits())), 0,
         (*USABLE, r"^warning  test_has_every_class: 1 class(es)? (has|have) no test image \(b\)"), GOOD - 4),
    Case("a class that train lacks", folder_of(lambda: without("train/b", splits())), 1,
         (r"^critical  train_has_every_class: 1 class(es)? (has|have) no training image \(b\); add some",), GOOD - 4),
    Case("an image that is in train and in test", folder_of(lambda: {**splits(), "test/a/copy.png": splits()["train/a/0.png"]}), 1,
         (r"^critical  \w+: 2 images .*\(train/a/0\.png = test/a/copy\.png|test/a/copy\.png = train/a/0\.png\)",), GOOD + 1),
    Case("an image under two labels", folder_of(lambda: {**sound(), "b/copy.png": png(0)}), 0,
         (*USABLE, r"^warning  content_has_one_label: 2 images have the same content as another with another label \(.*a/00\.png",), GOOD + 1),
    Case("an image of train in test, scaled and encoded anew", re_encoded, 0,
         (*USABLE, r"^warning  near_duplicates_across_splits: 2 images look like one in another split", r"copy\.jpg"), GOOD + 2),
    Case("one image in all places", folder_of(lambda: dict.fromkeys(sound(), png(0))), 1,
         (r"^critical  test_not_empty: the test split is empty", r"^warning  content_has_one_label: 24 images have the same content"), GOOD),
    Case("a class with many times the images of another",
         folder_of(lambda: sound(("a",), 20), lambda: {f"b/{n}.png": png(960 + n) for n in range(4)}), 0,
         (*USABLE, r"^warning  balance: the largest class has \d+ times the training images of the smallest"), GOOD,
         args=("--set", "max_imbalance=3")),
    Case("classes of two images", folder_of(lambda: sound(each=2)), 1,
         (r"^critical  rows_per_class: 2 classes have fewer than 3 usable images \(a, b\)",), 4),
    Case("a class that should be there and is not", folder_of(sound), 1,
         (r"^critical  classes_present: there is no image of c; add some",), GOOD, args=("--set", 'classes=["a","b","c"]')),
    Case("a class that should not be there", folder_of(lambda: sound(("a", "b", "z"), 8)), 1,
         (r"^critical  label_set: 8 examples have a label outside the class list",), GOOD, args=("--set", 'classes=["a","b"]')),
    Case("names that are no UTF-8", bytes_names, 0, (*USABLE, ", 3 classes, "), GOOD + 4),
    Case("names of 255 letters", folder_of(long_names), 0, (*USABLE, ", 2 classes, "), 8),
    Case("classes named with markup, braces, quotes and line breaks",
         folder_of(lambda: {f"{c}/{n}.png": png(2000 + 10 * i + n) for i, c in enumerate(MARKUP) for n in range(4)}), 0,
         (*USABLE, rf", {len(MARKUP)} classes, "), 4 * len(MARKUP)),
    Case("broken images in classes named so",
         folder_of(sound, lambda: {f"{c}/{n}.png": png(2000 + n) if n else HTML for c in MARKUP[:3] for n in range(2)}), 1,
         (r"\[red\]x\[/\]/0\.png: not an image", r"\{0\}\{\{count\}\}\{x!r\}/0\.png: not an image", r"line\\nbreak/0\.png: not an image"),
         GOOD + 3, {f"{c}/0.png": "^not an image$" for c in MARKUP[:3]}),
    Case("folders in folders, 60 deep", folder_of(sound, lambda: {f"a/{'d/' * 60}{n}.png": png(970 + n) for n in range(3)}), 0, USABLE,
         GOOD + 3),
    Case("links that lead upwards", looping, 0, USABLE, GOOD),
    Case("hidden files, what a Mac and Windows add, and files that are no images", folder_of(sound, HIDDEN), 0,
         (*USABLE, r"^passed over: .*\b1 × \.txt"), GOOD),
    Case("a class folder with nothing in it", folder_of(sound, {"c/.keep": b""}), 0, (*USABLE, ", 2 classes, "), GOOD),
    Case("a text file", file_of("photos.txt", HTML), 2,
         (r"^graftwork: data photos\.txt: is a file that is neither a manifest .* nor an archive",)),
    Case("an image", file_of("photo.png", lambda: png(0)), 2, (r"^graftwork: data photo\.png: is a file that is neither",)),
    Case("an address on the web", lambda w: "https://x.org/y.zip", 2, (r"^graftwork: data 'https://x\.org/y\.zip': is not of a kind that can be read",)),
    Case("a path that no path can be", lambda w: "x" * 5000, 2, (r"^graftwork: data x+…: cannot be read \(File name too long\)",)),
    Case("a path with a NUL byte", lambda w: "da\0ta", 2, (r"^graftwork: data da\\x00ta: no such folder",)),
    Case("a path with a line break and markup", lambda w: "[red]a\nb", 2, (r"^graftwork: data \[red\]a\\nb: no such folder",)),
    Case("no path at all", lambda w: "", 2, (r"^graftwork: .*data",)),
)  # fmt: skip


# ---- suites --------------------------------------------------------------------------------------------------------------------


def suite(name: str, text: str | bytes, status: int, *says: str, kept: bool = True) -> Case:
    """Return a case of good images and a suite. A suite that is only seen to be wrong beside the data leaves them packed (``kept``)."""

    def make(w: World) -> str:
        tree(w.root / "data", sound())
        (w.root / "suite.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "data"

    images = GOOD if kept else -1
    return Case(name, make, status, says, images, args=("--suite", "suite.yaml"))


EXPECT = (
    "expectations:\n- {{expect: ExpectColumnValuesToBeBetween, column: width, min_value: {}, name: wide_enough{}}}\n"
)
SUITES = (
    suite("a suite that is no YAML", "rules: [", 2, r"^graftwork: suite: line \d+: .*; write YAML$", kept=False),
    suite("a suite that is not UTF-8", b"rules: {\xff: off}", 2, r"^graftwork: suite suite\.yaml: cannot be read \(it is not UTF-8\)",
          kept=False),
    suite("a suite of one word", "strict", 2, r"^graftwork: suite: .*is not known; a suite has settings, rules, expectations$", kept=False),
    suite("a suite with an unknown part", "rulez: {}", 2, r"^graftwork: suite: rulez: is not known; a suite has", kept=False),
    suite("a suite that would run a program", "rules: !!python/object/apply:os.mkdir [executed]", 2, r"^graftwork: suite: line 1: .*write YAML$",
          kept=False),
    suite("rules that are a list", "rules: [size]", 2, r"^graftwork: suite: rules: write a mapping$", kept=False),
    suite("a severity that is none", "rules: {size: fatal}", 2, r"^graftwork: suite: size: severity 'fatal' is none of critical, warning, off$",
          kept=False),
    suite("a setting of a suite out of bounds", "settings: {max_broken: 7}", 2, r"^graftwork: .*max_broken", kept=False),
    suite("a rule that is none", "rules: {sizes: off}", 2, r"^graftwork: suite: rule sizes: there is none of that name; did you mean size\?$"),
    suite("an expectation that is none", "expectations: [{expect: ExpectThePope}]", 2,
          r"^graftwork: suite: expectation 1: Great Expectations has no ExpectThePope$"),
    suite("an expectation without a name", "expectations: [{column: width}]", 2, r"^graftwork: suite: expectation 1: write a mapping with"),
    suite("an expectation on a column that is none", "expectations: [{expect: ExpectColumnValuesToBeBetween, column: widht, min_value: 1}]", 2,
          r"^graftwork: suite: expectation 1: examples has no column 'widht'; it has source, "),
    suite("an expectation on a table that is none", "expectations: [{expect: ExpectColumnValuesToNotBeNull, column: label, table: rows}]", 2,
          r"^graftwork: suite: expectation 1: table 'rows' is none of examples, classes, dataset$"),
    suite("an expectation with a wrong argument", "expectations: [{expect: ExpectColumnValuesToBeBetween, column: width, minimum: 1}]", 2,
          r"^graftwork: suite: expectation 1: ExpectColumnValuesToBeBetween: .*minimum"),
    suite("an expectation that fails: a warning", EXPECT.format(100, ""), 0, r"^good to train on", r"^warning  wide_enough: .*\(24: "),
    suite("an expectation that fails: critical", EXPECT.format(100, ", severity: critical, message: 'too {narrow} [b]'"), 1,
          r"^critical  wide_enough: too \{narrow\} \[b\] \(24: ", r"^not good to train on"),
    suite("an expectation that holds", EXPECT.format(10, ", severity: critical"), 0, r"^good to train on: 20 of 20 rules passed"),
    suite("an expectation that cannot be checked", "expectations: [{expect: ExpectColumnMeanToBeBetween, column: label, min_value: 1}]", 1,
          r"^critical  .*could not be checked"),
    suite("a rule that is made critical", "settings: {min_side: 999}\nrules: {size: critical}", 1, r"^critical  size: 24 images have a side under 999"),
    suite("a rule that is off", "settings: {min_side: 999}\nrules: {size: off}", 0, r"^good to train on: 18 of 18 rules passed"),
    suite("a suite of a comment alone", "# nothing yet\n", 0, r"^good to train on"),
    Case("a suite that is not there", folder_of(sound), 2, (r"^graftwork: suite gone\.yaml: cannot be read \(No such file or directory\)",),
         args=("--suite", "gone.yaml")),
)  # fmt: skip


# ---- S3 ------------------------------------------------------------------------------------------------------------------------


def bucket(w: World, files: dict[str, bytes]) -> str:
    """Put ``files`` into a new bucket and return its name."""
    client = w.server.client()
    name = f"corpus-{zlib.crc32(str(w.root).encode()):08x}"
    client.create_bucket(Bucket=name)
    for key, content in files.items():
        client.put_object(Bucket=name, Key=key, Body=content)
    return name


def objects(files: Callable[[], dict[str, bytes]], below: str = "photos") -> Callable[[World], str]:
    return lambda w: f"s3://{bucket(w, {f'photos/{k}': v for k, v in files().items()})}/{below}"


def credentials(**changes: str | None) -> Callable[[World], dict[str, str]]:
    """Return the server's variables with some changed, or left out."""

    def environment(w: World) -> dict[str, str]:
        found = {**w.server.environment, **{k: v for k, v in changes.items() if v is not None}}
        return {k: v for k, v in found.items() if k not in changes or changes[k] is not None}

    return environment


def closed_port() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}"


def manifest_on_s3(w: World) -> str:
    """A manifest and its images, one of which was deleted and one replaced by a page."""
    files = {f"data/{k}": v for k, v in sound().items()} | {"data/b/00.png": HTML}
    name = bucket(w, {**files, "photos.csv": text_of(HEADER, rows_of(sound())).encode()})
    w.server.client().delete_object(Bucket=name, Key="data/a/00.png")
    return f"s3://{name}/photos.csv"


def s3_case(
    name: str, make: Callable[[World], str], status: int, *says: str, images: int = -1, broken: dict[str, str] | None = None,
    environment: Callable[[World], dict[str, str]] | None = None,
) -> Case:  # fmt: skip
    return Case(
        name,
        make,
        status,
        says,
        images,
        broken or {},
        environment=environment or credentials(),
        server=True,
        args=LENIENT,
    )


ON_S3 = r"^graftwork: data s3://\S+: "
S3 = (
    s3_case("images on S3, one replaced by a page, one empty", objects(lambda: {**sound(), "a/x.png": HTML, "b/y.png": b""}), 0,
            *USABLE, r"a/x\.png: not an image", images=GOOD, broken={"a/x.png": "^not an image$", "b/y.png": "^zero bytes$"}),
    s3_case("a key that S3 does not know", objects(sound), 2, ON_S3 + r"the store does not accept the credentials \(InvalidAccessKeyId\)",
            environment=credentials(AWS_ACCESS_KEY_ID="nobody")),
    s3_case("a wrong secret", objects(sound), 2, ON_S3 + r"the store does not accept the credentials \(SignatureDoesNotMatch\)",
            environment=credentials(AWS_SECRET_ACCESS_KEY="wrong")),
    s3_case("no credentials", objects(sound), 2, ON_S3 + "no credentials for S3; set AWS_ACCESS_KEY_ID and",
            environment=credentials(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)),
    s3_case("a key without its secret", objects(sound), 2, ON_S3 + ".*missing: AWS_SECRET_ACCESS_KEY; check the AWS_ variables",
            environment=credentials(AWS_SECRET_ACCESS_KEY=None)),
    s3_case("a user who may not list the bucket", objects(sound), 2, ON_S3 + "access denied; ask for the right to list the bucket",
            environment=credentials(AWS_ACCESS_KEY_ID="stranger", AWS_SECRET_ACCESS_KEY="stranger-secret")),
    s3_case("a bucket that is not there", lambda w: "s3://no-such-bucket/photos", 2, ON_S3 + "no such bucket; check its name"),
    s3_case("a prefix that nothing is below", objects(sound, "phots"), 2, ON_S3 + "there is no object below it; check the bucket and the prefix$"),
    s3_case("a name without a bucket", lambda w: "s3://", 2, r"^graftwork: data s3://: names no bucket; give s3://bucket/name$"),
    s3_case("a bucket name that none can be", lambda w: "s3://No_Such Bucket!/x", 2,
            r"^graftwork: data s3://No_Such Bucket!/x: no bucket, or no object, can have such a name; check the name$"),
    s3_case("an endpoint where nothing listens", objects(sound), 2, ON_S3 + r"the endpoint http://127\.0\.0\.1:\d+ cannot be reached \(connection refused\)",
            environment=lambda w: {**w.server.environment, "AWS_ENDPOINT_URL": closed_port()}),
    s3_case("an endpoint that is no address", objects(sound), 2, ON_S3 + ".*not a url.*; check the AWS_ variables|" + ON_S3 + ".*Invalid endpoint",
            environment=credentials(AWS_ENDPOINT_URL="not a url")),
    s3_case("a profile that is not there", objects(sound), 2, ON_S3 + r".*profile \(gone\) could not be found; check the AWS_ variables",
            environment=credentials(AWS_PROFILE="gone")),
    s3_case("one class on S3", objects(lambda: sound(("cats",))), 2, ON_S3 + "only one class, 'cats'"),
    s3_case("objects on S3 that are no images", objects(lambda: {"a/x.pdf": b"x"}), 2, ON_S3 + r"no images found \(1 files? there"),
    s3_case("objects on S3 that are all broken", objects(lambda: dict.fromkeys(sound(), HTML)), 1, ON_S3 + "none of its 24 images can be decoded"),
    s3_case("a manifest on S3 with an image deleted and one replaced by a page", manifest_on_s3, 0, *USABLE,
            r"data/a/00\.png: no such object", r"data/b/00\.png: not an image", images=GOOD - 2,
            broken={"data/a/00.png": "^no such object$", "data/b/00.png": "^not an image$"}),
    s3_case("a manifest that is not on S3", objects(sound, "photos/gone.csv"), 2, ON_S3 + "no such object"),
    s3_case("a zip on S3", lambda w: f"s3://{bucket(w, {'photos.zip': zip_bytes(sound())})}/photos.zip", 0, *USABLE, images=GOOD),
    s3_case("a zip on S3 cut off", lambda w: f"s3://{bucket(w, {'photos.zip': zip_bytes(sound())[:9000]})}/photos.zip", 2, ON_S3 + "is cut off"),
    s3_case("a tar that is not on S3", objects(sound, "photos/gone.tar"), 2, ON_S3 + "no such object"),
)  # fmt: skip


# ---- texts ---------------------------------------------------------------------------------------------------------------------


def texts(content: str | bytes, name: str = "texts.csv") -> Callable[[World], str]:
    return file_of(name, content.encode() if isinstance(content, str) else content)


OF_TEXTS = r"^graftwork: data texts\.(csv|jsonl): "
SENTENCES = [f"a sentence of some length, which is number {n}" for n in range(30)]
TEXTS = (
    Case("texts without labels", texts("text,kind\na,b\n"), 2,
         (OF_TEXTS + r"no column for the label .* found: 'text', 'kind'; name it in the first row, or give label_column$",)),
    Case("two columns that could be the text", texts("text,comment,label\na,b,c\n"), 2,
         (OF_TEXTS + r"2 columns could be the text: 'text', 'comment'; say which with text_column",)),
    Case("two columns that could be the label of texts", texts("text,sentiment,topic\na,b,c\n"), 2,
         (OF_TEXTS + r"2 columns could be the label: 'sentiment', 'topic'; say which with label_column",)),
    Case("texts and labels swapped", texts(text_of(["label", "text"], [[s, str(n % 2)] for n, s in enumerate(SENTENCES)])), 2,
         (OF_TEXTS + "the columns seem to be swapped: ",)),
    Case("texts that are numbers", texts("text,label\n1,a\n2,b\n"), 2, (OF_TEXTS + "the column for the text holds nothing but numbers",)),
    Case("texts with a number of the row for a label", texts(text_of(["text", "label"], [[s, str(n)] for n, s in enumerate(SENTENCES)])), 2,
         (OF_TEXTS + "the column for the label holds 30 different values in 30 rows",)),
    Case("texts of one class", texts("text,label\na,x\nb,x\n"), 2, (OF_TEXTS + "only one class, 'x'",)),
    Case("texts in two encodings", texts("text,label\né,x\n".encode() + "é,y\n".encode("latin-1")), 2,
         (OF_TEXTS + r"is not UTF-8 at byte 16 \(row 2 \(line 3\)\), 0xe9; save it as UTF-8$",)),
    Case("texts with a NUL byte", texts("text,label\na,x\nb\0,y\n"), 2, (OF_TEXTS + "holds a NUL byte at byte 16",)),
    Case("texts with a quote that is not closed", texts('text,label\n"a,x\nb,y\n'), 2, (OF_TEXTS + "row 1 has 1 fields .*; close the quote",)),
    Case("a header of texts and no rows", texts("text,label\n"), 2, (OF_TEXTS + "has a header and no rows",)),
    Case("JSON Lines with a broken line", texts('{"text":"a","label":"x"}\n{"text":\n', "texts.jsonl"), 2, (OF_TEXTS + "line 2 is no JSON ",)),
    Case("JSON Lines with a key twice", texts('{"text":"a","label":"x","label":"y"}\n', "texts.jsonl"), 2,
         (OF_TEXTS + "line 1 holds the key 'label' twice",)),
    Case("JSON Lines with a list of labels", texts('{"text":"a","label":["x"]}\n', "texts.jsonl"), 2,
         (OF_TEXTS + "line 1: 'label', the column for the label, holds a list",)),
    Case("a JSON list named as JSON Lines", texts('[{"text":"a","label":"x"}]', "texts.jsonl"), 2, (OF_TEXTS + "line 1 holds a list; write one object",)),
    Case("a folder of texts of one class", folder_of({"a/1.txt": b"x", "a/2.txt": b"y"}), 2,
         (r"^graftwork: data data: only one class, 'a'; a classifier needs texts in at least two class folders$",)),
    Case("texts outside class folders", folder_of({"1.txt": b"x", "2.txt": b"y"}), 2,
         (r"^graftwork: data data: no texts found in class folders \(2 lie outside a class folder\)",)),
)  # fmt: skip

# ---- where it is kept ----------------------------------------------------------------------------------------------------------


def keeping(folder: str, more: Callable[[World], object] = lambda w: None) -> Callable[[World], str]:
    def make(w: World) -> str:
        tree(w.root / "data", sound())
        more(w)
        return "data"

    return make


KEEPING = (
    Case("--keep with the name of the data", keeping("data"), 2, (r"^graftwork: --keep \S+data: is there already",), args=("--keep", "data")),
    Case("--keep with the current folder", keeping("."), 2, (r"^graftwork: --keep \S+: is there already",), args=("--keep", ".")),
    Case("--keep with the name of a file", keeping("x", lambda w: (w.root / "x").write_text("x")), 2,
         (r"^graftwork: --keep \S+x: is there already",), args=("--keep", "x")),
    Case("--keep below a file", keeping("x", lambda w: (w.root / "x").write_text("x")), 1,
         (r"^graftwork: \S+x/y: cannot be written \(Not a directory\)",), args=("--keep", "x/y")),
)  # fmt: skip

FAMILIES = {
    "Images": IMAGES,
    "Archives": ARCHIVES,
    "Manifests": MANIFESTS,
    "Folders": FOLDERS,
    "Suites": SUITES,
    "S3": S3,
    "Texts": TEXTS,
    "Where it is kept": KEEPING,
}
CASES = [case for cases in FAMILIES.values() for case in cases]
