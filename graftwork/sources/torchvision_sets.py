"""torchvision's datasets by name, with their own splits. Adding one is a line in ``NAMES``.

Image files pass through as they are; datasets that are arrays give pixels. Nothing is unpickled: CIFAR, which torchvision reads from
pickles, is read from the binary files that its authors publish beside them.
"""

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from graftwork.errors import UserError, one_line
from graftwork.parallel import WORKERS
from graftwork.sources.arrays import cache_folder
from graftwork.sources.record import AS_IT_IS, Content, DataSource, File, Pixels, Reading, Record, exists, printable

PREFIX = "torchvision:"
Arguments = dict[str, dict[str, Any]]  # split ("" where there is none) to the constructor's arguments
ONE: Arguments = {"": {}}
TRAIN_TEST: Arguments = {"train": {"split": "train"}, "test": {"split": "test"}}
THREE: Arguments = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
BY_FLAG: Arguments = {"train": {"train": True}, "test": {"train": False}}


class Named(NamedTuple):
    """A dataset of torchvision: its class, where its files lie below the root, its splits."""

    kind: str
    place: str
    splits: Arguments
    by_hand: bool = False  # its licence, or a dead address, keeps torchvision from downloading it


NAMES = {
    "caltech101": Named("Caltech101", "caltech101", ONE),
    "caltech256": Named("Caltech256", "caltech256", ONE),
    "cifar10": Named("CIFAR10", "cifar-10-batches-bin", BY_FLAG),
    "cifar100": Named("CIFAR100", "cifar-100-binary", BY_FLAG),
    "country211": Named(
        "Country211",
        "country211",
        {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}},
    ),
    "dtd": Named("DTD", "dtd", THREE),
    "emnist": Named(
        "EMNIST",
        "EMNIST",
        {"train": {"split": "balanced", "train": True}, "test": {"split": "balanced", "train": False}},
    ),
    "eurosat": Named("EuroSAT", "eurosat", ONE),
    "fer2013": Named("FER2013", "fer2013", TRAIN_TEST, by_hand=True),
    "fgvcaircraft": Named("FGVCAircraft", "fgvc-aircraft-2013b", THREE),
    "flowers102": Named("Flowers102", "flowers-102", THREE),
    "food101": Named("Food101", "food-101", TRAIN_TEST),
    "gtsrb": Named("GTSRB", "gtsrb", TRAIN_TEST),
    "imagenette": Named("Imagenette", "imagenette2", {"train": {"split": "train"}, "val": {"split": "val"}}),
    "kmnist": Named("KMNIST", "KMNIST", BY_FLAG),
    "mnist": Named("MNIST", "MNIST", BY_FLAG),
    "oxfordiiitpet": Named("OxfordIIITPet", "oxford-iiit-pet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "pcam": Named("PCAM", "pcam", THREE),
    "qmnist": Named("QMNIST", "QMNIST", {"train": {"what": "train"}, "test": {"what": "test"}}),
    "renderedsst2": Named("RenderedSST2", "rendered-sst2", THREE),
    "stanfordcars": Named("StanfordCars", "stanford_cars", TRAIN_TEST, by_hand=True),
    "stl10": Named("STL10", "stl10_binary", TRAIN_TEST),
    "sun397": Named("SUN397", "SUN397", ONE),
    "svhn": Named("SVHN", "train_32x32.mat", TRAIN_TEST),
    "usps": Named("USPS", "usps.bz2", BY_FLAG),
}  # fmt: skip
REFUSED = {
    "imagenet": "torchvision keeps its labels in a pickle, and nothing is unpickled here; give the folder that holds its train and val",
}


def open_torchvision(uri: str, reading: Reading = AS_IT_IS) -> DataSource | None:
    """Return the dataset of torchvision that ``uri`` names, downloaded if it is not there; a folder of that name goes before it.

    Raises:
        UserError: it cannot be downloaded or read, or torchvision has none of that name.
    """
    plain = uri.lower().removeprefix(PREFIX)
    name, asked = re.sub("[-_]", "", plain), plain != uri.lower()
    if name not in NAMES and name not in REFUSED and not asked:
        return None
    if not asked and exists(Path(uri)):
        return None
    if name in REFUSED:
        raise UserError(f"data {one_line(uri)}: {REFUSED[name]}")
    if name not in NAMES:
        raise UserError(f"data {one_line(uri)}: no such dataset; torchvision's are {', '.join(NAMES)}")
    return TorchvisionSource(name)


class TorchvisionSource:
    modality = "image"
    readers = WORKERS

    def __init__(self, name: str) -> None:
        self.name = name
        self.root = Path(os.environ.get("GRAFTWORK_TORCHVISION_ROOT") or cache_folder() / "torchvision").absolute()
        splits = open_splits(name, self.root)
        try:
            self._records = [r for split, dataset in splits.items() for r in examples(dataset, split, self.root)]
        except Exception as error:
            raise UserError(broken(name, self.root, error)) from None
        labels = {r.label for r in self._records}
        if len(labels) < 2:
            raise UserError(
                f"data {name}: {len(labels)} classes in {one_line(self.root)}, where files must be missing; "
                f"delete {one_line(NAMES[name].place)} there to have it downloaded again"
            )

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"torchvision\0{self.name}\0{self.root}\n".encode("utf-8", "surrogateescape"))
        for record in self._records:
            content = record.content
            # Arrays are in memory already: their own bytes tell most.
            seen = content.array.tobytes() if isinstance(content, Pixels) else content.version().encode()
            digest.update(f"{record.key}\0{record.label}\0{record.split}\0{len(seen)}\n".encode() + seen)
        return digest.hexdigest()[:32]

    def records(self) -> Iterator[Record]:
        yield from self._records

    def __len__(self) -> int:
        return len(self._records)

    def skipped(self) -> dict[str, int]:
        return {}


# ---- finding and downloading ---------------------------------------------------------------------------------------------------


def open_splits(name: str, root: Path) -> dict[str, Any]:
    """Return torchvision's dataset for each split; what is not in ``root`` is downloaded."""
    named = NAMES[name]
    make = constructor(name)
    place = root / named.place
    touched = place.exists()  # asked first: some constructors make an empty folder

    def load(folder: Path, **options: bool) -> dict[str, Any]:
        return {split: make(str(folder), **arguments, **options) for split, arguments in named.splits.items()}

    try:
        return load(root)
    except (RuntimeError, OSError) as error:
        missing = error
    except Exception as error:
        raise UserError(broken(name, root, error)) from None
    if named.by_hand:
        raise UserError(
            f"data {name}: cannot be downloaded by a program; put its files into {one_line(place)}, laid out as torchvision's {named.kind} says "
            f"({one_line(missing, 120)})"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        if touched:  # somebody's own files, archives perhaps: torchvision fetches only what is missing
            load(root, download=True)
        else:  # apart, and moved when whole: torchvision takes any folder of the right name for a whole dataset
            with tempfile.TemporaryDirectory(dir=root, prefix=f"{name}-") as temporary:
                load(Path(temporary), download=True)
                for entry in Path(temporary).iterdir():
                    entry.replace(root / entry.name)
        return load(root)
    except Exception as error:  # no network, a full disk, a wrong checksum, a package that it needs
        raise UserError(
            f"data {name}: is not whole in {one_line(root)} and cannot be downloaded ({one_line(error, 160)}); "
            f"put its files into {one_line(place)}, laid out as torchvision's {named.kind} says"
        ) from None


def broken(name: str, root: Path, error: Exception) -> str:
    return (
        f"data {name}: its files in {one_line(root)} cannot be read ({type(error).__name__}: {one_line(error, 120)}); "
        f"delete {one_line(NAMES[name].place)} there to have it downloaded again"
    )


def constructor(name: str) -> Callable[..., Any]:
    """Return what makes one split of a dataset, in a form that unpickles nothing."""
    if name in CIFAR:
        return lambda root, **arguments: read_cifar(CIFAR[name], Path(root), **arguments)
    import torchvision

    kind = getattr(torchvision.datasets, NAMES[name].kind, None)
    if kind is None:
        raise UserError(
            f"data {name}: the torchvision that is installed, {torchvision.__version__}, has no {NAMES[name].kind}; install a newer one"
        )
    if hasattr(kind, "_check_legacy_exist"):  # MNIST's family would torch.load what an older torchvision left
        return type(kind.__name__, (kind,), {"_check_legacy_exist": lambda self: False})
    return kind


class Cifar(NamedTuple):
    """CIFAR's binary version, at https://www.cs.toronto.edu/~kriz/cifar.html."""

    archive: str
    md5: str
    folder: str
    train: list[str]
    test: list[str]
    classes: str
    label_bytes: int  # before each image; the last of them is the class


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {
    "cifar10": Cifar(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-batches-bin",
        [f"data_batch_{n}.bin" for n in range(1, 6)],
        ["test_batch.bin"],
        "batches.meta.txt",
        1,
    ),
    "cifar100": Cifar(
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-binary",
        ["train.bin"],
        ["test.bin"],
        "fine_label_names.txt",
        2,
    ),
}


def read_cifar(cifar: Cifar, root: Path, train: bool, download: bool = False) -> Any:
    """Read one split as torchvision's class has it: ``data`` of shape (N, 32, 32, 3), ``targets``, ``classes``."""
    folder = root / cifar.folder
    files = [folder / name for name in (cifar.train if train else cifar.test)]
    if download and not all(f.is_file() for f in (*files, folder / cifar.classes)):
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(CIFAR_URL + cifar.archive, str(root), md5=cifar.md5)
    rows = np.concatenate(
        [np.frombuffer(f.read_bytes(), np.uint8).reshape(-1, cifar.label_bytes + 3 * 32 * 32) for f in files]
    )
    images = rows[:, cifar.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    classes = (folder / cifar.classes).read_text().split()
    return SimpleNamespace(data=images, targets=rows[:, cifar.label_bytes - 1], classes=classes)


# ---- from torchvision's objects to records -------------------------------------------------------------------------------------


def examples(dataset: Any, split: str, root: Path) -> Iterator[Record]:
    """Yield the records of one split."""
    names = class_names(dataset)

    def label(target: Any) -> str:
        if target is None:
            raise ValueError(f"the {split} split has no labels")
        return names[int(target)] if names else str(int(target))

    files = image_files(dataset)
    if files is not None:
        # Sorted: some classes list a folder in the order that the disk gives.
        for path, target in sorted(files, key=lambda f: str(f[0])):
            yield Record(printable(os.path.relpath(path, root)), label(target), split, File(Path(path)))
        return
    for n, (content, target) in enumerate(pictures(dataset)):
        yield Record(f"{split or 'all'}/{n:06d}.png", label(target), split, content)


def class_names(dataset: Any) -> list[str]:
    """Return the classes' names in the order of their numbers; none where the dataset has only numbers."""
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or []
    return [name[0] if isinstance(name, tuple) else str(name) for name in names]


def image_files(dataset: Any) -> list[tuple[Any, Any]] | None:
    """Return (path, target) of every example of a dataset of image files; None: it is none."""
    for attribute in ("samples", "_samples"):
        samples = getattr(dataset, attribute, None)
        if samples and isinstance(samples[0][0], str | Path):
            return list(samples)
    for attribute in ("_image_files", "_images"):
        if hasattr(dataset, attribute):
            return list(zip(getattr(dataset, attribute), dataset._labels, strict=True))
    kind = type(dataset).__name__
    if kind in ("Caltech101", "Caltech256"):  # a file's name is its number in its class's folder
        folder = Path(dataset.root, f"{kind.removeprefix('Caltech')}_ObjectCategories")
        prefixes = ["image" if kind == "Caltech101" else f"{n:03d}" for n in range(1, len(dataset.categories) + 1)]
        return [
            (folder / dataset.categories[y] / f"{prefixes[y]}_{number:04d}.jpg", y)
            for number, y in zip(dataset.index, dataset.y, strict=True)
        ]
    return None


def pictures(dataset: Any) -> Iterable[tuple[Content, Any]]:
    """Return (pixels, target) of every example of a dataset that is arrays."""
    kind = type(dataset).__name__
    if kind == "FER2013":
        return [(Pixels(np.asarray(image)), target) for image, target in dataset._samples]
    if kind == "PCAM":  # gigabytes in HDF5: each picture is read when it is asked for
        _, (targets_file, *_) = dataset._FILES[dataset._split].values()
        with dataset.h5py.File(dataset._base_folder / targets_file) as file:
            targets = file["y"][:, 0, 0, 0]
        version = " ".join(File(path).version() for path in sorted(dataset._base_folder.glob("*.h5")))
        return [(Item(dataset, n, version), target) for n, target in enumerate(targets)]
    if not hasattr(dataset, "data"):
        return [(Item(dataset, n), dataset[n][1]) for n in range(len(dataset))]
    images = np.asarray(dataset.data)
    targets = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels)
    if kind == "EMNIST":  # stored on its side, mirrored
        images = images.transpose(0, 2, 1)
    if kind in ("SVHN", "STL10"):  # (N, 3, H, W)
        images = images.transpose(0, 2, 3, 1)
    if kind == "QMNIST":  # the writer and more beside the digit
        targets = targets[:, 0]
    return [(Pixels(image), target) for image, target in zip(images, targets, strict=True)]


class Item(NamedTuple):
    """Contents that only torchvision's object can give: a PNG of its picture of that ``number``."""

    dataset: Any
    number: int
    of: str = ""

    @property
    def suffix(self) -> str:
        return ".png"

    def version(self) -> str:
        return self.of

    def read(self) -> bytes:
        buffer = io.BytesIO()
        self.dataset[self.number][0].save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def sha256(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()
