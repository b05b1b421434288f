"""Labelling images in bulk: from every kind of input, with the pixels of training, into whole files or none."""

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graftwork import image_inputs
from graftwork.errors import UserError
from graftwork.images import Preprocess
from graftwork.model import load_model, predict, predict_logits
from graftwork.predicting import Found, Rows, find_examples, label_examples, loaded, table_writer


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (61, 37)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep" / "deeper").mkdir(parents=True)
    for n, place in enumerate(("a.png", "deep/b.jpg", "deep/deeper/c.png", ".hidden.png")):
        picture(n).save(folder / place)
    (folder / "notes.txt").write_text("no image")
    return folder


def find_images(inputs: list[str]) -> Found:
    return find_examples(inputs, "image")


def names(*inputs: object) -> list[str]:
    images = find_images([str(i) for i in inputs])
    return [item.name for part in images.parts for item in part.items]


def test_folders_without_labels(photos: Path) -> None:
    """What is to be labelled lies in no class folders; images at any depth count, others do not."""
    assert names(photos) == [str(photos / p) for p in ("a.png", "deep/b.jpg", "deep/deeper/c.png")]
    assert find_images([str(photos), str(photos / "a.png")]).number == 4


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "parquet", "jsonl"])
def test_manifests_without_labels(photos: Path, kind: str) -> None:
    """A list of paths is enough: whoever asks for labels has none."""
    import gzip

    import pyarrow as pa

    file = photos / f"list.{kind}"
    paths = ["a.png", "deep/b.jpg", "gone.png"]
    separator = "\t" if kind == "tsv" else ","
    text = f"id{separator}path\n" + "".join(f"{n}{separator}{p}\n" for n, p in enumerate(paths))
    if kind == "parquet":
        pq.write_table(pa.table({"id": [0, 1, 2], "path": paths}), file)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"id": n, "path": p}) + "\n" for n, p in enumerate(paths)))
    else:
        file.write_bytes(gzip.compress(text.encode()) if kind == "csv.gz" else text.encode())
    images = find_images([str(file)])
    preprocess = Preprocess(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    found = list(loaded(images.parts, preprocess, image_inputs))
    assert [one.name for one in found] == paths
    assert [isinstance(one.example, str) for one in found] == [False, False, True]
    file.unlink()


def test_archives_without_labels(photos: Path, tmp_path: Path) -> None:
    """Photos come in a zip, often flat: no folder is needed in it."""
    import tarfile

    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.write(photos / "a.png", "a.png")
        archive.write(photos / "deep/b.jpg", "x/y/b.jpg")
        archive.writestr("readme.txt", "none")
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as tar:
        tar.add(photos / "a.png", "a.png")
    assert names(tmp_path / "p.zip") == [f"{tmp_path}/p.zip/a.png", f"{tmp_path}/p.zip/x/y/b.jpg"]
    images = find_images([str(tmp_path / "p.tar.gz")])
    items = [i for part in images.parts for i in part.items]
    assert [i.content.read() for i in items] == [(photos / "a.png").read_bytes()]


def test_mistakes_are_told(tmp_path: Path) -> None:
    """A wrong path that yields an empty table looks like an answer."""
    (tmp_path / "list.csv").write_text("name,label\nx,y\n")
    (tmp_path / "rows.csv").write_text("path\n")
    (tmp_path / "empty").mkdir()
    for given, says in {
        "gone.png": "no such file; check the path",
        str(tmp_path / "empty"): "this folder holds no images",
        str(tmp_path / "list.csv"): "no column for the path",
        str(tmp_path / "rows.csv"): "has a header and no rows",
    }.items():
        with pytest.raises(UserError, match=says):
            find_images([given])


def test_labels_are_the_models_own(photos: Path, baseline: Path) -> None:
    """Bulk labels that differ from one at a time are found in production; a broken image costs its own row alone."""
    model = load_model(baseline, "cpu")
    bad = photos.parent / "broken.jpg"
    bad.write_bytes((photos / "deep/b.jpg").read_bytes()[:200])
    broken: list[tuple[str, str]] = []
    images = find_images([str(photos), str(bad), *[str(photos / "a.png")] * 300])  # more than a few: timed
    rows = list(label_examples(model, images, lambda name, reason: broken.append((name, reason))))
    assert broken == [(str(bad), "cut off")]
    assert sum(len(r.names) for r in rows) == 303
    found = np.concatenate([r.probabilities for r in rows])
    pixels = [one.example for one in loaded(find_images([str(photos)]).parts, model.preprocess, image_inputs)]
    expected = predict(model, pixels)
    assert np.allclose(found[:3], expected, atol=1e-4) and np.allclose(found[3:], expected[0], atol=1e-4)
    assert [i for r in rows for i in r.labels][:3] == predict_logits(model, pixels).argmax(1).tolist()


def test_tables_are_whole_or_not_there(tmp_path: Path) -> None:
    """Half a table under the final name is taken for a whole one."""
    rows = Rows(["a.png", 'b "x",\n.png'], [1, 0], np.array([[0.25, 0.75], [1.0, 0.0]], np.float32))
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(KeyboardInterrupt), table_writer(tmp_path / name, ["p", "q, r"]) as write:
            write(rows)
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())
    for name in ("t.csv", "t.parquet"):
        with table_writer(tmp_path / name, ["p", "q, r"]) as write:
            write(rows)
    with (tmp_path / "t.csv").open(newline="") as file:
        read = list(csv.reader(file))
    assert read[0] == ["image", "label", "p_p", "p_q, r"] and read[1] == ["a.png", "q, r", "0.250000", "0.750000"]
    assert read[2][0] == 'b "x",\n.png'
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.column_names == read[0] and table["label"].to_pylist() == ["q, r", "p"]
    with pytest.raises(UserError, match=r"neither in \.csv nor in \.parquet"), table_writer(tmp_path / "t.xlsx", ["p"]):
        pass


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P"])
def test_no_skew(mode: str, baseline: Path, tmp_path: Path) -> None:
    """Training, evaluation, service and bulk labels must see the same pixels of an image of odd size and mode, to the last bit."""
    from graftwork.batches import Examples
    from graftwork.dataset import open_dataset
    from graftwork.ingest import ingest
    from graftwork.settings import IngestSettings

    suffix = ".jpg" if mode == "CMYK" else ".png"
    model = load_model(baseline, "cpu")
    for label in ("p", "q"):
        for n in range(8):
            file = tmp_path / "data" / label / f"{n}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(n + 10 * (label == "q"), mode).save(file)
    ingest(IngestSettings(data=str(tmp_path / "data")), tmp_path / "packed")
    dataset = open_dataset(tmp_path / "packed")
    for split in ("train", "test"):
        trained = Examples(dataset, split, model.preprocess)
        for source, pixels in zip(trained.rows["source"].to_pylist(), trained, strict=True):
            file = tmp_path / "data" / source
            bulk, *_ = loaded(find_images([str(file)]).parts, model.preprocess, image_inputs)
            logged = image_inputs.from_python(file.read_bytes(), model.preprocess)
            served = image_inputs.example(file.read_bytes(), model.preprocess)
            assert all(np.array_equal(pixels, other) for other in (bulk.example, logged, served))
