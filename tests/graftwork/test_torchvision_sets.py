"""torchvision's datasets, in the layouts that torchvision expects: small files, made here."""

import bz2
import csv
import functools
import gzip
import hashlib
import http.server
import io
import json
import pickle
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

from graftwork.errors import UserError
from graftwork.sources.record import File, Pixels, Record
from graftwork.sources.torchvision_sets import CIFAR, NAMES, examples, open_torchvision

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFTWORK_TORCHVISION_ROOT", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".ppm": "PPM", ".png": "PNG"}[path.suffix.lower()]
    Image.fromarray(noise(8, 8, 3)).save(path, kind)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_mat(path: Path, **arrays: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, arrays)
    return md5(path)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"uint8": 8, "int32": 12}[array.dtype.name]
    header = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(array.dtype.newbyteorder(">")).tobytes())


def opened(uri: str) -> list[Record]:
    source = open_torchvision(uri)
    assert source is not None
    records = list(source.records())
    assert len({r.key for r in records}) == len(records) == len(source)
    assert all(r.key.isprintable() and not r.key.startswith(("/", "..")) for r in records)
    return records


def rows(uri: str) -> list[tuple[str, str, str]]:
    return [(r.key, r.label, r.split) for r in opened(uri)]


def pixels(record: Record) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record.content.read())))


# ---- datasets of image files ---------------------------------------------------------------------------------------------------


def flowers102(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    folder = root / "flowers-102"
    for n in range(1, 7):
        picture(folder / "jpg" / f"image_{n:05d}.jpg")
    label = write_mat(folder / "imagelabels.mat", labels=[1, 2, 1, 102, 1, 2])
    setid = write_mat(folder / "setid.mat", trnid=[1, 2], valid=[3, 4], tstid=[6, 5])
    monkeypatch.setattr(
        torchvision.datasets.Flowers102,
        "_file_dict",
        {"image": ("102flowers.tgz", ""), "label": ("imagelabels.mat", label), "setid": ("setid.mat", setid)},
    )
    names = ["pink primrose", "hard-leaved pocket orchid", "pink primrose", "blackberry lily", "pink primrose"]
    names += ["hard-leaved pocket orchid"]
    splits = ["train", "train", "val", "val", "test", "test"]
    keys = [f"flowers-102/jpg/image_{n:05d}.jpg" for n in range(1, 7)]
    return list(zip(keys, names, splits, strict=True))


def oxfordiiitpet(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    folder = root / "oxford-iiit-pet"
    for name in ("Abyssinian_1", "Abyssinian_2", "american_bulldog_1", "american_bulldog_2"):
        picture(folder / "images" / f"{name}.jpg")
    write(folder / "annotations" / "trainval.txt", "Abyssinian_1 1 1 1\namerican_bulldog_1 2 2 1\n")
    write(folder / "annotations" / "test.txt", "Abyssinian_2 1 1 1\namerican_bulldog_2 2 2 1\n")
    (folder / "annotations" / "trimaps").mkdir()
    return [
        ("oxford-iiit-pet/images/Abyssinian_1.jpg", "Abyssinian", "train"),
        ("oxford-iiit-pet/images/american_bulldog_1.jpg", "American Bulldog", "train"),
        ("oxford-iiit-pet/images/Abyssinian_2.jpg", "Abyssinian", "test"),
        ("oxford-iiit-pet/images/american_bulldog_2.jpg", "American Bulldog", "test"),
    ]


def gtsrb(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    folder = root / "gtsrb" / "GTSRB"
    for n in range(12):
        picture(folder / "Training" / f"{n:05d}" / "00000_00000.ppm")
    picture(folder / "Final_Test" / "Images" / "00000.ppm")
    write(root / "gtsrb" / "GT-final_test.csv", "Filename;Width;Height;ClassId\n00000.ppm;8;8;11\n")
    train = [(f"gtsrb/GTSRB/Training/{n:05d}/00000_00000.ppm", str(n), "train") for n in range(12)]
    return [*train, ("gtsrb/GTSRB/Final_Test/Images/00000.ppm", "11", "test")]


def eurosat(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    expected = []
    for label in ("AnnualCrop", "Forest", "SeaLake"):
        picture(root / "eurosat" / "2750" / label / f"{label}_1.jpg")
        expected.append((f"eurosat/2750/{label}/{label}_1.jpg", label, ""))
    return expected


def food101(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    expected = []
    for split in ("train", "test"):
        meta = {label: [f"{label}/{split}1"] for label in ("apple_pie", "baby_back_ribs")}
        write(root / "food-101" / "meta" / f"{split}.json", json.dumps(meta))
        for label in meta:
            picture(root / "food-101" / "images" / label / f"{split}1.jpg")
            expected.append((f"food-101/images/{label}/{split}1.jpg", label, split))
    return expected


def dtd(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    expected = []
    for split in ("train", "val", "test"):
        names = [f"{label}/{label}_{split}.jpg" for label in ("banded", "woven")]
        write(root / "dtd" / "dtd" / "labels" / f"{split}1.txt", "".join(f"{name}\n" for name in names))
        for name in names:
            picture(root / "dtd" / "dtd" / "images" / name)
            expected.append((f"dtd/dtd/images/{name}", name.split("/")[0], split))
    return expected


def fgvcaircraft(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    data, expected = root / "fgvc-aircraft-2013b" / "data", []
    write(data / "variants.txt", "707-320\nA300B4\n")
    for n, split in enumerate(("train", "val", "test")):
        write(data / f"images_variant_{split}.txt", f"00{n}0 707-320\n00{n}1 A300B4\n")
        for m, label in enumerate(("707-320", "A300B4")):
            picture(data / "images" / f"00{n}{m}.jpg")
            expected.append((f"fgvc-aircraft-2013b/data/images/00{n}{m}.jpg", label, split))
    return expected


def stanfordcars(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    folder = root / "stanford_cars"

    def annotations(*labels: int) -> np.ndarray:
        kind = [("fname", "O"), ("class", "O")]
        return np.array([(f"0000{n}.jpg", label) for n, label in enumerate(labels, 1)], dtype=kind)

    write_mat(folder / "devkit" / "cars_train_annos.mat", annotations=annotations(2, 1))
    write_mat(folder / "cars_test_annos_withlabels.mat", annotations=annotations(1, 2))
    write_mat(
        folder / "devkit" / "cars_meta.mat", class_names=np.array(["AM General Hummer", "Acura RL"], dtype=object)
    )
    for split in ("train", "test"):
        for n in (1, 2):
            picture(folder / f"cars_{split}" / f"0000{n}.jpg")
    names = {"train": ("Acura RL", "AM General Hummer"), "test": ("AM General Hummer", "Acura RL")}
    return [
        (f"stanford_cars/cars_{split}/0000{n}.jpg", name, split)
        for split, pair in names.items()
        for n, name in enumerate(pair, 1)
    ]


def caltech101(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    folder, expected = "caltech101/101_ObjectCategories", []
    picture(root / folder / "BACKGROUND_Google" / "image_0001.jpg")
    for label in ("accordion", "brain"):
        for n in (1, 2):
            picture(root / folder / label / f"image_{n:04d}.jpg")
            expected.append((f"{folder}/{label}/image_{n:04d}.jpg", label, ""))
    return expected


def caltech256(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    folder, expected = "caltech256/256_ObjectCategories", []
    for label in ("001.ak47", "002.american-flag"):
        for n in (1, 2):
            picture(root / folder / label / f"{label[:3]}_{n:04d}.jpg")
            expected.append((f"{folder}/{label}/{label[:3]}_{n:04d}.jpg", label, ""))
    return expected


def country211(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    expected = []
    for folder, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        for label in ("AD", "ZW"):
            picture(root / "country211" / folder / label / "1.jpg")
            expected.append((f"country211/{folder}/{label}/1.jpg", label, split))
    return expected


def renderedsst2(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    expected = []
    for folder, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        for label in ("negative", "positive"):
            picture(root / "rendered-sst2" / folder / label / "1.png")
            expected.append((f"rendered-sst2/{folder}/{label}/1.png", label, split))
    return expected


def sun397(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    write(root / "SUN397" / "ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    names = [("a/abbey/sun_b.jpg", "abbey"), ("a/abbey/sun_a.jpg", "abbey")]
    names += [("a/apartment_building/outdoor/sun_c.jpg", "apartment_building/outdoor")]
    for name, _ in names:
        picture(root / "SUN397" / name)
    return sorted((f"SUN397/{name}", label, "") for name, label in names)


def imagenette(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    expected = []
    for split in ("train", "val"):
        for wnid, label in (("n01440764", "tench"), ("n02102040", "English springer")):
            picture(root / "imagenette2" / split / wnid / f"{wnid}_1.JPEG")
            expected.append((f"imagenette2/{split}/{wnid}/{wnid}_1.JPEG", label, split))
    return expected


Layout = Callable[[Path, pytest.MonkeyPatch], list[tuple[str, str, str]]]
FILE_SETS: list[Layout] = [
    flowers102, oxfordiiitpet, gtsrb, eurosat, food101, dtd, fgvcaircraft, stanfordcars, caltech101, caltech256, country211,
    renderedsst2, sun397, imagenette,
]  # fmt: skip


@pytest.mark.parametrize("layout", FILE_SETS, ids=lambda f: f.__name__)
def test_a_dataset_of_files_gives_each_file_as_it_is(
    layout: Layout, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's published test set would be mixed into training, a class have another's name, or JPEGs be encoded again."""
    expected = layout(root, monkeypatch)
    records = opened(layout.__name__)
    assert [(r.key, r.label, r.split) for r in records] == expected
    for record in records:
        assert isinstance(record.content, File)
        assert record.content.read() == (root / record.key).read_bytes()


# ---- datasets of arrays --------------------------------------------------------------------------------------------------------


def mnist_like(root: Path, name: str) -> dict[str, np.ndarray]:
    """Write MNIST's, KMNIST's or EMNIST's files: three pictures in train, two in test."""
    arrays = {}
    for split, count in (("train", 3), ("test", 2)):
        images = arrays[split] = noise(count, 28, 28)
        prefix = f"emnist-balanced-{split}" if name == "EMNIST" else {"train": "train", "test": "t10k"}[split]
        write_idx(root / name / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(root / name / "raw" / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    return arrays


def check_pixels(records: list[Record], expected: dict[str, np.ndarray]) -> None:
    assert [r.split for r in records] == [split for split, images in expected.items() for _ in images]
    for record, image in zip(records, np.concatenate(list(expected.values())), strict=True):
        assert isinstance(record.content, Pixels)
        assert (pixels(record) == image).all()


@pytest.mark.parametrize(
    ("name", "labels"), [("MNIST", ["0 - zero", "1 - one", "2 - two"]), ("KMNIST", ["o", "ki", "su"])]
)
def test_mnist_and_its_kin(name: str, labels: list[str], root: Path) -> None:
    """A user of MNIST would have pictures under other pictures' labels."""
    arrays = mnist_like(root, name)
    records = opened(name)
    assert [r.label for r in records] == labels + labels[:2]
    assert [r.key for r in records][:3] == ["train/000000.png", "train/000001.png", "train/000002.png"]
    check_pixels(records, arrays)


def test_emnist_stands_upright(root: Path) -> None:
    """A user's letters would lie on their side: EMNIST's files hold every picture transposed."""
    arrays = mnist_like(root, "EMNIST")
    records = opened("emnist")
    assert [r.label for r in records] == ["0", "1", "2", "0", "1"]
    check_pixels(records, {split: images.transpose(0, 2, 1) for split, images in arrays.items()})


def test_qmnist(root: Path) -> None:
    """A user of QMNIST would get the writer's number for a label."""
    arrays = {"train": noise(2, 28, 28), "test": noise(2, 28, 28)}
    for split, images in arrays.items():
        write_idx(root / "QMNIST" / "raw" / f"qmnist-{split}-images-idx3-ubyte", images)
        targets = np.array([[7, 99, 1], [3, 98, 2]], dtype=np.int32)
        write_idx(root / "QMNIST" / "raw" / f"qmnist-{split}-labels-idx2-int", targets)
    records = opened("QMNIST")
    assert [r.label for r in records] == ["7 - seven", "3 - three"] * 2
    check_pixels(records, arrays)


def test_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's house numbers would be scrambled, or zeros be called tens: the files hold (H, W, 3, N), and 10 for 0."""
    arrays, files = {}, {}
    for split in ("train", "test"):
        images = arrays[split] = noise(2, 32, 32, 3)
        name = f"{split}_32x32.mat"
        digest = write_mat(root / name, X=images.transpose(1, 2, 3, 0), y=np.array([[10], [4]], dtype=np.uint8))
        files[split] = ["", name, digest]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", files)
    records = opened("svhn")
    assert [r.label for r in records] == ["0", "4"] * 2
    check_pixels(records, arrays)


def test_stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's pictures would lie on their side: STL10's files hold (3, W, H)."""
    folder, arrays, lists = root / "stl10_binary", {}, {}
    folder.mkdir()
    for split in ("train", "test"):
        images = arrays[split] = noise(2, 96, 96, 3)
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes([2, 1]))
        lists[split] = [[f"{split}_{k}.bin", md5(folder / f"{split}_{k}.bin")] for k in "Xy"]
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    monkeypatch.setattr(torchvision.datasets.STL10, "train_list", lists["train"])
    monkeypatch.setattr(torchvision.datasets.STL10, "test_list", lists["test"])
    records = opened("stl-10")
    assert [r.label for r in records] == ["bird", "airplane"] * 2
    check_pixels(records, arrays)


def test_usps(root: Path) -> None:
    """A user's digits would all be off by one: the files count from 1."""
    values = np.array([-1.0, 1.0] * 128)
    line = " ".join(f"{n}:{v}" for n, v in enumerate(values, 1))
    for name in ("usps.bz2", "usps.t.bz2"):
        (root / name).write_bytes(bz2.compress(f"1 {line}\n10 {line}\n".encode()))
    records = opened("usps")
    assert [r.label for r in records] == ["0", "9"] * 2
    picture = ((values + 1) / 2 * 255).astype(np.uint8).reshape(16, 16)
    check_pixels(records, {split: np.stack([picture, picture]) for split in ("train", "test")})


def test_fer2013(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of FER2013 would have its test faces in training."""
    arrays = {"train": noise(2, 48, 48), "test": noise(2, 48, 48)}
    path = root / "fer2013" / "fer2013.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["emotion", "pixels", "Usage"])
        for split, usage in (("train", "Training"), ("test", "PublicTest")):
            for emotion, image in zip((6, 0), arrays[split], strict=True):
                out.writerow([emotion, " ".join(map(str, image.ravel())), usage])
    monkeypatch.setitem(torchvision.datasets.FER2013._RESOURCES, "fer", ("fer2013.csv", md5(path)))
    records = opened("fer-2013")
    assert [r.label for r in records] == ["6", "0"] * 2
    check_pixels(records, arrays)


def test_fer2013_without_labels_of_the_test(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has Kaggle's other files would get a stack trace for the test labels that they lack."""
    image = " ".join(map(str, noise(48 * 48)))
    write(root / "fer2013" / "train.csv", f'emotion,pixels\n1,"{image}"\n2,"{image}"\n')
    write(root / "fer2013" / "test.csv", f'pixels\n"{image}"\n')
    for name in ("train", "test"):
        entry = (f"{name}.csv", md5(root / "fer2013" / f"{name}.csv"))
        monkeypatch.setitem(torchvision.datasets.FER2013._RESOURCES, name, entry)
    with pytest.raises(UserError, match=r"fer2013: .*the test split has no labels"):
        open_torchvision("fer2013")


def test_pcam(root: Path) -> None:
    """A user of PCAM would run out of memory, or have pictures under others' labels."""
    h5py = pytest.importorskip("h5py")
    arrays = {split: noise(2, 96, 96, 3) for split in ("train", "val", "test")}
    (root / "pcam").mkdir()
    for split, images in arrays.items():
        stem = f"camelyonpatch_level_2_split_{'valid' if split == 'val' else split}"
        with h5py.File(root / "pcam" / f"{stem}_x.h5", "w") as file:
            file["x"] = images
        with h5py.File(root / "pcam" / f"{stem}_y.h5", "w") as file:
            file["y"] = np.array([1, 0], dtype=np.uint8).reshape(2, 1, 1, 1)
    records = opened("pcam")
    assert [(r.label, r.split) for r in records] == [(label, s) for s in arrays for label in "10"]
    for record, image in zip(records, np.concatenate(list(arrays.values())), strict=True):
        assert (pixels(record) == image).all() and record.content.version()


def test_a_dataset_of_a_form_not_known_is_asked_for_its_pictures(root: Path) -> None:
    """A user of a later torchvision, which may keep its files elsewhere, would get nothing, or other labels."""
    dataset = torchvision.datasets.FakeData(size=3, image_size=(3, 8, 8), num_classes=7)
    records = list(examples(dataset, "train", root))
    assert [(r.key, r.label) for r in records] == [(f"train/{n:06d}.png", str(int(dataset[n][1]))) for n in range(3)]
    for n, record in enumerate(records):
        assert (pixels(record) == np.asarray(dataset[n][0])).all()
        assert record.content.sha256() == hashlib.sha256(record.content.read()).hexdigest()


# ---- nothing is unpickled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "label_bytes"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_is_read_from_its_binary_files(name: str, label_bytes: int, root: Path) -> None:
    """A user of CIFAR would have colours mixed up, or the coarse class for the fine one."""
    cifar, arrays = CIFAR[name], {}
    folder = root / cifar.folder
    folder.mkdir()
    (folder / cifar.classes).write_text("airplane\nautomobile\nbird\n\n")
    for split, names in (("train", cifar.train), ("test", cifar.test)):
        images = arrays[split] = noise(len(names) * 2, 32, 32, 3)
        for n, file in enumerate(names):
            body = b""
            for image, label in zip(images[2 * n : 2 * n + 2], (2, 0), strict=True):
                body += bytes([9] * (label_bytes - 1) + [label]) + image.transpose(2, 0, 1).tobytes()
            (folder / file).write_bytes(body)
    records = opened(name.upper())
    assert {r.label for r in records} == {"bird", "airplane"} and records[0].label == "bird"
    check_pixels(records, arrays)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "sprung"))


def test_a_pickle_in_the_folder_is_never_opened(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's shared folder of datasets could run anybody's code."""
    trap = tmp_path / "trap"
    monkeypatch.setattr("graftwork.sources.torchvision_sets.CIFAR_URL", "http://127.0.0.1:9/")
    lists = torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list
    for name in [*(entry[0] for entry in lists), "batches.meta"]:
        path = root / "cifar-10-batches-py" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(Trap(trap)))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    with pytest.raises(UserError, match=r"cifar10: is not whole in .* put its files into .*cifar-10-batches-bin"):
        open_torchvision("cifar10")
    mnist_like(root, "MNIST")
    (root / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):  # what an older torchvision left, and the present one would torch.load
        torch.save((torch.zeros(2, 28, 28, dtype=torch.uint8), torch.tensor([0, 1])), root / "MNIST/processed" / name)
    assert len(opened("mnist")) == 5
    assert not trap.exists()


# ---- names ---------------------------------------------------------------------------------------------------------------------


def test_every_class_is_one_that_torchvision_has() -> None:
    """A user would be told that a published dataset does not exist."""
    assert [name for name, named in NAMES.items() if not hasattr(torchvision.datasets, named.kind)] == []


@pytest.mark.parametrize(
    "uri", ["eurosat", "EuroSAT", "euro-sat", "Euro_Sat", "torchvision:eurosat", "Torchvision:EuroSAT"]
)
def test_a_name_is_found_however_it_is_written(uri: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user would have to know torchvision's capitals."""
    expected = eurosat(root, monkeypatch)
    assert rows(uri) == expected
    source = open_torchvision(uri)
    assert source is not None and source.name == "eurosat" and source.skipped() == {}


@pytest.mark.parametrize(
    "uri", ["photos", "fashion-mnist", "digits", "/data/eurosat", "s3://bucket/dtd", "", "data.csv"]
)
def test_what_is_no_name_is_left_to_the_other_sources(uri: str) -> None:
    """A user's folder would not be looked at."""
    assert open_torchvision(uri) is None


def test_a_folder_of_that_name_goes_first(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own folder called dtd would be passed over for the published one."""
    (tmp_path / "dtd").mkdir()
    assert open_torchvision("dtd") is None
    expected = dtd(root, monkeypatch)
    assert rows("torchvision:dtd") == expected


def test_the_files_lie_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's cache on another disk would be passed over, and gigabytes be downloaded again."""
    monkeypatch.delenv("GRAFTWORK_TORCHVISION_ROOT")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = dtd(tmp_path / "cache" / "graftwork" / "torchvision", monkeypatch)
    assert rows("dtd") == expected


# ---- mistakes and downloads ----------------------------------------------------------------------------------------------------


def refused(uri: str) -> str:
    with pytest.raises(UserError) as raised:
        open_torchvision(uri)
    text = str(raised.value)
    assert text.startswith("data ") and text.isprintable() and len(text) < 600
    return text


def test_an_unknown_name_is_answered_with_the_known(root: Path) -> None:
    """A user who mistypes a name would not see which there are."""
    assert "flowers102" in refused("torchvision:flowers103")
    assert "pickle" in refused("imagenet")


@pytest.mark.parametrize("name", ["stanford-cars", "fer2013"])
def test_what_cannot_be_downloaded_says_where_to_put_it(name: str, root: Path) -> None:
    """A user would wait for a download that torchvision no longer does, or read of an unknown argument."""
    text = refused(name)
    assert "cannot be downloaded" in text and str(root / NAMES[name.replace("-", "")].place) in text


def test_a_broken_file_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whose copy was cut off would read a stack trace from the middle of scipy or json."""
    food101(root, monkeypatch)
    write(root / "food-101" / "meta" / "test.json", '{"apple_pie": ["appl')
    assert "cannot be read (JSONDecodeError" in refused("food101") and "food-101" in refused("food101")


def test_a_set_with_one_class_is_refused(root: Path) -> None:
    """A user whose copy was cut off would train a classifier of one class."""
    picture(root / "eurosat" / "2750" / "Forest" / "1.jpg")
    assert "1 classes" in refused("eurosat")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on loopback, and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()


def packed_dtd(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    expected = dtd(folder / "made", monkeypatch)
    with tarfile.open(folder / "dtd.tar.gz", "w:gz") as tar:
        tar.add(folder / "made" / "dtd" / "dtd", "dtd")
    return expected


def test_what_is_missing_is_downloaded_once(
    root: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user would have to fetch the files, or they would be fetched at every run."""
    url, folder = server
    expected = packed_dtd(folder, monkeypatch)
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", f"{url}/dtd.tar.gz")
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", md5(folder / "dtd.tar.gz"))
    assert rows("dtd") == expected
    assert [p.name for p in root.iterdir()] == ["dtd"]
    (folder / "dtd.tar.gz").unlink()
    assert rows("dtd") == expected


def test_a_download_that_fails_leaves_nothing_half_done(
    root: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user whose disk filled in mid-download would train on the half that was unpacked, at every later run."""
    url, folder = server
    packed_dtd(folder, monkeypatch)
    whole = gzip.decompress((folder / "dtd.tar.gz").read_bytes())
    (folder / "dtd.tar.gz").write_bytes(gzip.compress(whole[: len(whole) // 2]))
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", f"{url}/dtd.tar.gz")
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", md5(folder / "dtd.tar.gz"))
    for _ in range(2):
        assert "cannot be downloaded" in refused("dtd")
        assert list(root.iterdir()) == []


def test_without_a_network_the_folder_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a network would not learn where to put the files."""
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", "http://127.0.0.1:9/dtd.tar.gz")
    text = refused("dtd")
    assert "refused" in text and str(root / "dtd") in text


def test_an_archive_put_there_by_hand_is_unpacked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has carried the archive over on a stick would be told to download it."""
    expected = packed_dtd(root, monkeypatch)
    (root / "made").rename(root.parent / "made")
    (root / "dtd").mkdir()
    (root / "dtd.tar.gz").rename(root / "dtd" / "dtd.tar.gz")
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", "http://127.0.0.1:9/dtd.tar.gz")
    monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", md5(root / "dtd" / "dtd.tar.gz"))
    assert rows("dtd") == expected


# ---- the fingerprint -----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_sees_changes_and_nothing_else(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's mended files would be passed over for the packed data of the last run, or all be packed anew each time."""

    def fingerprint(name: str) -> str:
        source = open_torchvision(name)
        assert source is not None
        return source.fingerprint()

    dtd(root, monkeypatch)
    mnist_like(root, "MNIST")
    before = {name: fingerprint(name) for name in ("dtd", "mnist")}
    assert before == {name: fingerprint(name) for name in before} and len(set(before.values())) == 2
    (root / "dtd/dtd/images/banded/banded_val.jpg").write_bytes(b"another")
    mnist_like(root, "MNIST")
    assert all(fingerprint(name) != seen for name, seen in before.items())
