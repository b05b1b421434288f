"""Robustness to corrupted images."""

import numpy as np
import pytest
import torch

from graftwork.batches import Examples
from graftwork.corruptions import KINDS, SEVERITIES, check_kinds, corrupt, robustness
from graftwork.errors import UserError
from graftwork.model import load_model, predict


@pytest.fixture(scope="module")
def image():
    y, x = np.mgrid[:64, :64]
    return (
        np.stack([(128 + 100 * np.sin(x / 3)), (128 + 100 * np.cos(y / 4)), 2 * x + y], 2).clip(0, 255).astype(np.uint8)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_higher_severity_is_further_from_the_image(kind: str, image) -> None:
    """A severity that changes nothing, or a shape that the network does not take, would prove robustness that is not there."""
    before = image.copy()
    distances = []
    for severity in SEVERITIES:
        made = corrupt(image, kind, severity)
        assert made.shape == image.shape and made.dtype == np.uint8
        distances.append(np.abs(made.astype(float) - image).mean())
        np.testing.assert_array_equal(made, corrupt(image, kind, severity))
    assert 0.5 < distances[0] < distances[1] < distances[2] < 90
    np.testing.assert_array_equal(image, before)


def test_chance_is_drawn_by_image(image) -> None:
    """The same noise on all images is no noise, and light is both too much and too little."""
    assert (corrupt(image, "noise", 1, 0) != corrupt(image, "noise", 1, 1)).any()
    assert (corrupt(image, "noise", 1, 0) != corrupt(image, "noise", 1, 0, seed=1)).any()
    assert corrupt(image, "brightness", 1, 0).mean() > image.mean() > corrupt(image, "brightness", 1, 1).mean()


def test_figures_follow_from_the_predictions(dataset, tuned) -> None:
    """A drop against another accuracy, or of other images than those that were counted, is a wrong figure in the report."""
    model = load_model(tuned, "cpu")
    split = Examples(dataset, "test", model.preprocess)
    targets, pixels = dataset.targets(split.rows), split[torch.arange(len(split))].numpy()
    seen: list[tuple[int, int]] = []
    found = robustness(
        model, iter(pixels), targets, ["noise", "jpeg"], progress=lambda done, total: seen.append((done, total))
    )
    assert [(one["corruption"], one["severity"]) for one in found] == [
        (k, s) for k in ("noise", "jpeg") for s in SEVERITIES
    ]
    assert seen[-1] == (7 * 150, 7 * 150)
    clean = (predict(model, pixels).argmax(1) == targets).mean()
    for one in found:
        made = [corrupt(image, one["corruption"], one["severity"], n) for n, image in enumerate(pixels)]
        assert one["accuracy"] == pytest.approx((predict(model, made).argmax(1) == targets).mean(), abs=0.011)
        assert one["drop"] == pytest.approx(clean - one["accuracy"], abs=0.011)
        assert one["interval"][0] <= one["accuracy"] <= one["interval"][1]
    assert robustness(model, split, targets, ["noise", "jpeg", "noise"]) == found, "however the images are read"
    assert robustness(model, pixels, targets, []) == []


def test_an_unknown_kind_is_refused_before_any_work() -> None:
    """After an hour of training, a mistyped name is dear."""
    with pytest.raises(UserError, match="'fog' is none of gaussian-blur, noise, brightness, jpeg"):
        check_kinds(["noise", "fog"])
    with pytest.raises(UserError, match="none of"):
        robustness(None, [], np.zeros(0, np.int64), ["nois\ne"])  # type: ignore[arg-type]
