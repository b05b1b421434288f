"""Named datasets that are a few arrays. Adding one is a function that returns its arrays, and a line in ``NAMED``."""

import gzip
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graftwork.errors import UserError, one_line
from graftwork.parallel import WORKERS
from graftwork.sources.record import AS_IT_IS, DataSource, Pixels, Reading, Record, exists


def open_named(uri: str, reading: Reading = AS_IT_IS) -> DataSource | None:
    """Return the dataset named ``uri``; a folder of that name goes before it."""
    return NamedSource(uri) if uri in NAMED and not exists(Path(uri)) else None


class Arrays(NamedTuple):
    """A dataset that is a few arrays: images of shape (N, H, W) or (N, H, W, 3), uint8; labels as positions in ``classes``."""

    classes: list[str]
    splits: dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]


class NamedSource:
    modality = "image"
    readers = WORKERS

    def __init__(self, name: str) -> None:
        self.name = name
        self._arrays = cache(NAMED[name])

    def fingerprint(self) -> str:
        return f"named:{self.name}:1"  # published datasets do not change

    def records(self) -> Iterator[Record]:
        arrays = self._arrays()
        for split, (images, labels) in arrays.splits.items():
            for position, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield Record(f"{split or 'all'}/{position:06d}.png", arrays.classes[label], split, Pixels(image))

    def __len__(self) -> int:
        return sum(len(labels) for _, labels in self._arrays().splits.values())

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
