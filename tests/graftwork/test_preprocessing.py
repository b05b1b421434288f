"""``--preprocess auto``: what is lost by a crop is noticed, and what the user gave stays."""

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, make_weights
from test_features import pictures

from graftwork.backbones import load_backbone
from graftwork.features import extract_features
from graftwork.preprocessing import candidates, choose_preprocess, spread
from graftwork.settings import FeatureSettings


def at_the_border(c: int, rng, width: int, height: int):
    """A wide picture of noise, with its label at the left or the right border, where a centre crop cuts it off."""
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    place = slice(0, 12) if c == 0 else slice(width - 12, width)
    image[:, place] = 255
    return image


def in_the_centre(c: int, rng, width: int, height: int):
    """A square picture with its label small, in the centre."""
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    half = 3 if c == 0 else 10
    image[height // 2 - half : height // 2 + half, width // 2 - half : width // 2 + half] = 255
    return image


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory):
    return pictures(tmp_path_factory.mktemp("wide"), at_the_border, per_class=40, size=(96, 32))


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory):
    return pictures(tmp_path_factory.mktemp("square"), in_the_centre, per_class=24)


def settings(weights: Path, **given) -> FeatureSettings:
    usual = {
        "backbone": TINY,
        "weights": str(weights),
        "preprocess": "auto",
        "flip": False,
        "views": 1,
        "plan_seconds": 0,
    }
    return FeatureSettings(**(usual | given))


def test_what_a_crop_cuts_off_is_kept(wide, weights: Path, tmp_path: Path) -> None:
    """Her wide pictures would be cropped to their empty middle, and the accuracy be that of a coin."""
    said: list[str] = []
    info = extract_features(wide, settings(weights, image_size=32), tmp_path / "e", note=said.append)
    assert info["preprocess"]["resize"] in ("squash", "pad") and info["preprocess"]["size"] == 32
    crop = next(p for p in info["preprocess_tried"] if p["preprocess"]["resize"] == "crop")
    kept = next(p for p in info["preprocess_tried"] if p["preprocess"] == info["preprocess"])
    assert kept["val_accuracy"] > 0.9 and kept["val_loss"] < crop["val_loss"]
    assert any(line.startswith(f"preprocess: {info['preprocess']['resize']} at 32 px") for line in said)
    plain = settings(weights, image_size=32, preprocess="fixed")
    fixed = extract_features(wide, plain, tmp_path / "f")
    assert fixed["preprocess"]["resize"] == "crop" and fixed["preprocess_tried"] == []


def test_a_size_that_is_given_stays(wide, square, weights: Path) -> None:
    """She chose the size for her GPU; a larger one would not fit."""
    chosen = settings(weights, image_size=64)
    tried = candidates(wide, chosen, load_backbone(chosen, 2))
    assert {c.size for c in tried} == {64} and {c.resize for c in tried} == {"crop", "squash", "pad"}
    tried = candidates(square, chosen, load_backbone(chosen, 2))
    assert [(c.resize, c.crop_pct) for c in tried] == [("crop", 1.0), ("crop", 0.875)], (
        "of squares, the rest is the same"
    )


def test_sizes_are_tried_where_none_is_given(square, weights: Path) -> None:
    """At the backbone's own size, small images take six times as long as they have to."""
    chosen = settings(weights)
    backbone = load_backbone(chosen, 2)
    assert backbone.preprocess.size == 160
    assert sorted({c.size for c in candidates(square, chosen, backbone)}) == [64, 128, 160]
    found, tried = choose_preprocess(square, chosen, backbone, lambda message: None)
    best = min(p["val_loss"] for p in tried)
    close = [p["preprocess"]["size"] for p in tried if p["val_loss"] <= 1.03 * best]
    assert found.size == min(close), "a larger input has to earn its time"


def test_a_network_built_for_one_size_stays_at_it(square, tmp_path: Path) -> None:
    """A transformer's position embeddings fit one size; any other would end in an error of torch's."""
    weights = make_weights("test_vit", tmp_path / "vit.safetensors")
    chosen = settings(weights, backbone="test_vit")
    backbone = load_backbone(chosen, 2)
    assert backbone.fixed_size and {c.size for c in candidates(square, chosen, backbone)} == {backbone.preprocess.size}
    smaller = settings(weights, backbone="test_vit", image_size=96)
    assert {c.size for c in candidates(square, smaller, load_backbone(smaller, 2))} == {96}


def test_without_validation_the_backbones_own_is_kept(square, weights: Path) -> None:
    """Chosen on nothing, it would be chosen by chance; and an error would end the run."""
    said: list[str] = []
    chosen = settings(weights, image_size=32)
    backbone = load_backbone(chosen, 2)
    alone = square._replace(manifest=square.split("train"))
    assert choose_preprocess(alone, chosen, backbone, said.append) == (backbone.preprocess, [])
    assert "no validation split" in said[0]


def test_a_sample_keeps_every_class(dataset) -> None:
    """The rows are sorted by label: the first thousand of a large set would be of one class."""
    import pyarrow as pa

    rows = pa.concat_tables([dataset.split("train")] * 10).sort_by("label")
    some = spread(rows)
    assert len(some) == 1000 and len(set(some["label"].to_pylist())) == 10
    assert spread(dataset.split("train")) is not None and len(spread(dataset.split("train"))) == 240
