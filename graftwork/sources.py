"""Data sources: where labelled examples come from. A source is one class with four members; ``open_source`` finds the right one for a URI.

Adding a named dataset is a function that returns its arrays and a line in ``NAMED``.
"""

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from graftwork.errors import UserError, one_line

IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
    ".tga", ".jp2", ".j2k", ".ico", ".avif",
}  # fmt: skip
OUTSIDE = "images outside a class folder"
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


class Record(NamedTuple):
    """One labelled example, not read yet."""

    key: str  # unique in the source; a relative path, for files
    label: str
    split: str  # "train", "val" or "test" where the source says, else ""
    payload: Path | npt.NDArray[np.uint8]  # a file, or the pixels themselves


class DataSource(Protocol):
    """What ``ingest`` needs of a source."""

    name: str

    def fingerprint(self) -> str:
        """Changes whenever the source's contents may have changed; cheap: no example is read."""

    def records(self) -> Iterator[Record]:
        """Yield every example, in an order that does not change from run to run."""

    def skipped(self) -> dict[str, int]:
        """Count the files that ``records`` passed over because they are no images, by suffix."""


def open_source(uri: str) -> DataSource:
    """Find the source for ``uri`` and look at its outside.

    Raises:
        UserError: there is nothing at ``uri``, or it is not a labelled set of at least two classes.
    """
    if "://" in uri and not uri.startswith("file://"):
        raise UserError(
            f"data '{one_line(uri)}': only folders and named datasets ({', '.join(NAMED)}) can be read; copy the images to a folder"
        )
    plain = uri.removeprefix("file://")
    path = Path(plain)
    if uri.startswith("file://") and not path.exists():  # a URI proper, with escapes
        path = Path(unquote(plain))
    with contextlib.suppress(RuntimeError):  # "~name" of no user: there is no such folder
        path = path.expanduser()
    if uri in NAMED and not path.is_dir():
        return NamedSource(uri)
    return FolderSource(path)


# ---- a folder ------------------------------------------------------------------------------------------------------------------


class FolderSource:
    """``CLASS/*.jpg``, or ``train|val|test/CLASS/*.jpg``. Sub-folders of a class belong to it; hidden files are passed over."""

    def __init__(self, root: Path) -> None:
        shown = one_line(root)
        try:
            # What a path cannot be (too long, a NUL byte) raises here as well.
            kind = "missing" if not root.exists() else "folder" if root.is_dir() else "file"
            children = (
                # A link that leads back up is no class and no split.
                sorted(
                    p.name
                    for p in root.iterdir()
                    if p.is_dir()
                    and not p.name.startswith(".")
                    and p.resolve() not in (root.resolve(), *root.resolve().parents)
                )
                if kind == "folder"
                else []
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"data {shown}: cannot be read ({getattr(error, 'strerror', None) or error}); give a folder that you may read"
            ) from None
        if kind == "missing":
            raise UserError(
                f"data {shown}: no such folder, and no dataset of that name (named: {', '.join(NAMED)}); check the path"
            )
        if kind == "file":
            raise UserError(f"data {shown}: is a file; give the folder that holds one folder of images a class")
        self.root = root.resolve()
        self.name = printable(self.root.name) or "data"
        self.split_of = {c: SPLIT_FOLDERS[c.lower()] for c in children if c.lower() in SPLIT_FOLDERS}
        self.given_splits = bool(self.split_of) and len(self.split_of) == len(children)
        if self.given_splits and "train" not in self.split_of.values():
            raise UserError(f"data {shown}: has {', '.join(self.split_of)} but no train folder; add train/CLASS/*.jpg")
        self._skipped: Counter[str] = Counter()
        self._files = list(self._walk())
        labels = sorted({label for _, label, _, _ in self._files})
        if not self._files:
            outside = self._skipped.pop(OUTSIDE, 0)
            hint = f" in class folders ({outside} lie outside a class folder)" if outside else ""
            hint = hint or (
                f" ({sum(self._skipped.values())} files there have no image suffix)" if self._skipped else ""
            )
            raise UserError(f"data {shown}: no images found{hint}; put them in one folder a class, as CLASS/photo.jpg")
        if len(labels) < 2:
            raise UserError(
                f"data {shown}: only one class, '{one_line(labels[0])}'; a classifier needs images in at least two class folders"
            )

    def _walk(self) -> Iterator[tuple[str, str, str, Path]]:
        def refuse(error: OSError) -> None:
            raise UserError(
                f"data {one_line(error.filename)}: cannot be read ({error.strerror}); give a folder that you may read"
            ) from None

        for folder, subfolders, files in os.walk(self.root, followlinks=True, onerror=refuse):
            here, real = Path(folder), Path(folder).resolve()
            if here != real and real in (p.resolve() for p in here.parents):  # a link to a folder that it is in
                subfolders.clear()
                continue
            subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and s != "__MACOSX")
            parts = Path(folder).relative_to(self.root).parts
            depth = 1 if self.given_splits else 0
            for file in sorted(files):
                if file.startswith(".") or file == "Thumbs.db":
                    continue
                suffix = Path(file).suffix.lower()
                if suffix not in IMAGE_SUFFIXES or len(parts) <= depth:
                    self._skipped[OUTSIDE if suffix in IMAGE_SUFFIXES else printable(suffix) or "no suffix"] += 1
                    continue
                label = printable(parts[depth])
                yield "/".join((*parts, file)), label, self.split_of[parts[0]] if depth else "", Path(folder, file)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.root).encode("utf-8", "surrogateescape"))
        for key, _, _, path in self._files:
            try:
                status = path.stat()
                line = f"{key}\0{status.st_size}\0{status.st_mtime_ns}\n"
            except OSError:  # a dangling link: it is reported as broken when it is read
                line = f"{key}\0missing\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]

    def records(self) -> Iterator[Record]:
        for key, label, split, path in self._files:
            yield Record(printable(key), label, split, path)

    def skipped(self) -> dict[str, int]:
        return dict(self._skipped)


def printable(name: str) -> str:
    """Return a file name as text that UTF-8 can hold: bytes that are no UTF-8 are shown as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ---- named datasets ------------------------------------------------------------------------------------------------------------


class Arrays(NamedTuple):
    """A dataset that is a few arrays: images of shape (N, H, W) or (N, H, W, 3), uint8; labels as positions in ``classes``."""

    classes: list[str]
    splits: dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]


class NamedSource:
    def __init__(self, name: str) -> None:
        self.name = name

    def fingerprint(self) -> str:
        return f"named:{self.name}:1"  # published datasets do not change

    def records(self) -> Iterator[Record]:
        arrays = NAMED[self.name]()
        for split, (images, labels) in arrays.splits.items():
            for position, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield Record(f"{split or 'all'}/{position:06d}.png", arrays.classes[label], split, image)

    def skipped(self) -> dict[str, int]:
        return {}


def digits() -> Arrays:
    """1,797 handwritten digits of 8 x 8 pixels, shipped with scikit-learn, which has no split of its own."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)
    return Arrays([str(n) for n in bunch.target_names], {"": (images, bunch.target.astype(np.int64))})


FASHION_MNIST_CLASSES = [
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
FASHION_MNIST_FILES = {"train": "train", "test": "t10k"}


def fashion_mnist() -> Arrays:
    """70,000 pictures of clothes, 28 x 28 pixels, in grey (Xiao, Rasul and Vollgraf 2017), with a test set of its own."""
    folder = find_fashion_mnist()
    splits = {}
    for split, prefix in FASHION_MNIST_FILES.items():
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        splits[split] = (images, labels.astype(np.int64))
    return Arrays(FASHION_MNIST_CLASSES, splits)


def find_fashion_mnist() -> Path:
    """Return a folder with Fashion-MNIST's four files: Debian's package, else a cached copy, else a download."""
    wanted = [f"{p}-{kind}-ubyte.gz" for p in FASHION_MNIST_FILES.values() for kind in ("images-idx3", "labels-idx1")]
    cache = cache_folder() / "fashion-mnist"
    installed = Path("/usr/share/datasets/fashion-mnist")
    for folder in (installed, cache):
        if all((folder / name).is_file() for name in wanted):
            return folder
    cache.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for download in (download_fashion_mnist_torchvision, download_fashion_mnist_apt):
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix="fashion-mnist-") as temporary:
            try:
                found = download(Path(temporary))
                for name in wanted:
                    read_idx(found / name)
                shutil.rmtree(cache, ignore_errors=True)
                found.rename(cache)
                return cache
            except Exception as error:  # each way fails in its own manner: no network, no apt-get, no such mirror
                reasons.append(f"{download.__name__.removeprefix('download_fashion_mnist_')}: {one_line(error, 80)}")
    raise UserError(
        f"data fashion-mnist: cannot be downloaded ({'; '.join(reasons)}); put its four .gz files into {cache}, "
        "or on Debian: apt-get install dataset-fashion-mnist"
    )


def download_fashion_mnist_torchvision(folder: Path) -> Path:
    """Fetch the files from the mirrors that torchvision knows."""
    from torchvision.datasets import FashionMNIST

    FashionMNIST(str(folder), download=True)
    return folder / "FashionMNIST" / "raw"


def download_fashion_mnist_apt(folder: Path) -> Path:
    """Fetch Debian's package; unpacking it needs no root."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise OSError("no apt-get here")
    run = subprocess.run(
        ["apt-get", "download", "dataset-fashion-mnist"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    packages = list(folder.glob("*.deb"))
    if not packages:
        raise OSError(run.stderr.strip() or "the package was not found; run apt-get update first")
    subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(folder)], check=True, capture_output=True, timeout=300)
    return folder / "usr/share/datasets/fashion-mnist"


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a gzipped IDX file of bytes, the format of MNIST and its successors."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, 4))
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def cache_folder() -> Path:
    """Return the folder for downloads, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graftwork"


NAMED: dict[str, Callable[[], Arrays]] = {"fashion-mnist": fashion_mnist, "digits": digits}


# ---- reading one record --------------------------------------------------------------------------------------------------------


def read_bytes(record: Record) -> bytes:
    """Return the encoded example: a file as it is, pixels as PNG."""
    if isinstance(record.payload, Path):
        return regular(record.payload).read_bytes()
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(record.payload).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def content_hash(record: Record) -> str:
    """Return the SHA-256 of the contents: equal examples have equal hashes whatever they are called."""
    if isinstance(record.payload, Path):
        with regular(record.payload).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(record.payload.tobytes()).hexdigest()


def regular(path: Path) -> Path:
    """Return ``path``; OSError where opening it could wait for ever (a pipe, a socket, a device)."""
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")
    return path
