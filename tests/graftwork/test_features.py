"""Frozen features: the same whether or not they were interrupted or held in memory; and what the first step decides for all others."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from graftwork import features
from graftwork.baseline import train_baseline
from graftwork.dataset import Dataset, open_dataset
from graftwork.features import BATCH, choose_views, extract_features
from graftwork.ingest import ingest
from graftwork.model import read_info
from graftwork.settings import FeatureSettings, IngestSettings


class Killed(Exception):
    """Stands for SIGKILL."""


@pytest.fixture
def chosen(weights: Path) -> FeatureSettings:
    return FeatureSettings(
        backbone=TINY, weights=str(weights), image_size=32, flip=True, views=3, plan_seconds=0, memory_share=0.3
    )


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*-*")) if p.is_file()}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """More digits than run in one batch: 40 a class to train, of which 8 for validation."""
    folder = tmp_path_factory.mktemp("larger") / "digits"
    ingest(IngestSettings(data="digits", train_per_class=40, test_per_class=1), folder)
    return open_dataset(folder)


def test_shapes_and_the_first_view(larger: Dataset, chosen: FeatureSettings, tmp_path: Path) -> None:
    """A probe on rows that belong to other images would learn noise."""
    info = extract_features(larger, chosen, tmp_path / "e")
    train, val = (np.load(tmp_path / "e" / f"features-{s}.npy", allow_pickle=False) for s in ("train", "val"))
    assert train.shape[:2] == (3, len(larger.split("train"))) and val.shape[:2] == (3, len(larger.split("val")))
    assert train.dtype == np.float32 and len(larger.split("train")) > BATCH and train.shape[2] == val.shape[2] == 96
    assert not np.array_equal(train[0], train[1]) and not np.array_equal(train[1], train[2])
    plain = extract_features(larger, chosen.model_copy(update={"views": 1}), tmp_path / "plain")
    assert np.array_equal(np.load(tmp_path / "plain" / "features-train.npy")[0], train[0]), (
        "the first is the image as it is"
    )
    assert (info["views"], plain["views"]) == (3, 1)
    assert not list((tmp_path / "e").glob("*.f32")) and not list((tmp_path / "e").glob("*.width"))
    assert json.loads((tmp_path / "e" / "embeddings.json").read_text())["plan"] == info["plan"]


@pytest.mark.parametrize("share", [0.3, 0.0], ids=["held", "streamed"])
@pytest.mark.parametrize("stops", [[1], [4], [2, 5, 7], [3, 6, 8, 9]])
def test_interrupted_features_are_the_same_bytes(
    stops: list[int], share: float, larger: Dataset, chosen: FeatureSettings, tmp_path: Path, monkeypatch
) -> None:
    """An hour over a million images would be lost, or end with the rows of one image under the label of another."""
    chosen = chosen.model_copy(update={"memory_share": share})
    extract_features(larger, chosen, tmp_path / "undisturbed")
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "checkpoints"))
    reported: list[tuple[int, int]] = []
    for stop in stops:
        calls = 0

        def progress(done: int, total: int, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Killed
            reported.append((done, total))

        try:
            extract_features(larger, chosen, tmp_path / "e", progress)
        except Killed:
            assert not (tmp_path / "e").exists()
        else:
            break
    if not (tmp_path / "e").exists():
        extract_features(larger, chosen, tmp_path / "e", lambda done, total: reported.append((done, total)))
    assert content(tmp_path / "e") == content(tmp_path / "undisturbed")
    assert len(content(tmp_path / "e")) == 4
    assert reported[-1][0] == reported[-1][1] == 3 * (len(larger.split("train")) + len(larger.split("val")))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_what_is_there_is_not_done_again(larger: Dataset, chosen: FeatureSettings, tmp_path: Path, monkeypatch) -> None:
    """A run that "goes on" and does everything anew has not gone on."""
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "checkpoints"))
    ran: list[int] = []

    class Counting(features.Inference):
        def __call__(self, images):
            ran.append(len(images))
            return super().__call__(images)

    monkeypatch.setattr(features, "Inference", Counting)
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 4:  # two batches of train and one of validation make a view
            raise Killed

    with pytest.raises(Killed):
        extract_features(larger, chosen, tmp_path / "e", progress)
    extract_features(larger, chosen, tmp_path / "e", progress)
    train, val = len(larger.split("train")), len(larger.split("val"))
    assert sum(ran) == 3 * (train + val) and len(ran) == 9


@pytest.mark.parametrize("left", ["no rows yet", "half a row", "half a width"])
def test_killed_in_the_middle_of_a_write(
    left: str, larger: Dataset, chosen: FeatureSettings, tmp_path: Path, monkeypatch
) -> None:
    """A kill between two system calls would leave files on which every later run fails."""
    monkeypatch.setenv("GRAFTWORK_CHECKPOINTS", str(tmp_path / "checkpoints"))

    def progress(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        extract_features(larger, chosen, tmp_path / "e", progress)
    rows = next((tmp_path / "checkpoints").glob("*/features-train.f32"))
    if left == "half a row":
        rows.write_bytes(rows.read_bytes() + b"half")
    else:
        rows.unlink()
        if left == "half a width":
            rows.with_suffix(".width").write_text("")
    extract_features(larger, chosen, tmp_path / "e")
    monkeypatch.delenv("GRAFTWORK_CHECKPOINTS")
    extract_features(larger, chosen, tmp_path / "again")
    assert content(tmp_path / "e") == content(tmp_path / "again")


def test_streamed_and_held_give_the_same_features(larger: Dataset, chosen: FeatureSettings, tmp_path: Path) -> None:
    """The baseline would depend on how much memory happened to be free."""
    extract_features(larger, chosen, tmp_path / "held")
    extract_features(larger, chosen.model_copy(update={"memory_share": 0}), tmp_path / "streamed")
    assert content(tmp_path / "held") == content(tmp_path / "streamed")


def test_without_validation_the_baseline_can_be_trained(dataset, chosen: FeatureSettings, tmp_path: Path) -> None:
    """Three images a class may leave none for validation: an error of NumPy's about shapes helps nobody."""
    alone = dataset._replace(manifest=dataset.split("train"))
    extract_features(alone, chosen, tmp_path / "e")
    info = train_baseline(tmp_path / "e", tmp_path / "m")
    assert info["selection"]["examples"] == 0


# ---- does a mirrored image keep its label? ----------------------------------------------------------------------------------------


def pictures(folder: Path, make, per_class: int = 12, classes: int = 2, size: tuple[int, int] = (32, 32)) -> Dataset:
    """Pack pictures that ``make(class, generator, width, height)`` gives."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        (folder / "src" / f"c{c}").mkdir(parents=True)
        for n in range(per_class):
            Image.fromarray(make(c, rng, *size)).save(folder / "src" / f"c{c}" / f"{n}.png")
    ingest(IngestSettings(data=str(folder / "src"), val_fraction=0.3, test_fraction=0.1), folder / "packed")
    return open_dataset(folder / "packed")


def side_bar(c: int, rng, width: int, height: int):
    """A bar on the left in class 0, on the right in class 1: mirrored, the one is the other."""
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    place = rng.integers(2, 8)
    image[:, slice(place, place + 6) if c == 0 else slice(width - place - 6, width - place)] = 255
    return image


def level_bar(c: int, rng, width: int, height: int):
    """A bar at the top in class 0, at the bottom in class 1: mirrored, it is the same."""
    return np.ascontiguousarray(side_bar(c, rng, height, width).transpose(1, 0, 2))


@pytest.mark.parametrize(("make", "flip"), [(side_bar, False), (level_bar, True)])
def test_mirroring_is_off_where_it_changes_the_label(make, flip: bool, weights: Path, tmp_path: Path) -> None:
    """A mirrored b is a d: half of her training examples would carry the wrong label."""
    data = pictures(tmp_path, make, per_class=60)
    said: list[str] = []
    settings = FeatureSettings(backbone=TINY, weights=str(weights), image_size=32, views=2, plan_seconds=0)
    info = extract_features(data, settings, tmp_path / "e", note=said.append)
    assert info["augmentation"]["flip"] is flip
    assert any(f"mirroring {'on' if flip else 'off'}: " in line for line in said)
    assert read_info(tmp_path / "e" / "backbone")["augmentation"]["flip"] is flip, "fine-tuning reads it there"


@pytest.mark.parametrize("given", ["yes", "no"])
def test_mirroring_is_what_she_says(given: str, weights: Path, dataset, tmp_path: Path) -> None:
    """A setting that a heuristic overrides is none."""
    settings = FeatureSettings(backbone=TINY, weights=str(weights), image_size=32, views=2, flip=given, plan_seconds=0)
    assert extract_features(dataset, settings, tmp_path / "e")["augmentation"]["flip"] is (given == "yes")


def test_views_that_would_all_be_the_same_are_made_once(weights: Path, dataset, tmp_path: Path) -> None:
    """Six passes over the images for six copies of the same rows."""
    settings = FeatureSettings(
        backbone=TINY, weights=str(weights), image_size=32, views=3, flip="no", shift=0, plan_seconds=0
    )
    assert extract_features(dataset, settings, tmp_path / "e")["views"] == 1
    assert len(np.load(tmp_path / "e" / "features-train.npy")) == 1
    assert [choose_views(n) for n in (0, 1, 1000, 1001, 3000, 3001, 10**6)] == [6, 6, 6, 5, 2, 1, 1]
