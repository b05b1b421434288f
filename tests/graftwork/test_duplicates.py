"""Near-duplicates across splits: what must be found, what must not, and what it may cost."""

import io
import time

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from graftwork.duplicates import CANDIDATES, LEAF, SIDE, Pairs, Signature, near_duplicates, signature

BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(scope="module")
def patches() -> list[Image.Image]:
    """Patches of two photographs that share no pixel, 80 x 80, in colour; those of the sky left out."""
    found = []
    for photo in load_sample_images().images:
        image = Image.fromarray(photo)
        for top in range(0, image.height - 79, 80):
            found += [image.crop((left, top, left + 80, top + 80)) for left in range(0, image.width - 79, 80)]
    return [patch for patch in found if signature(patch).contrast > 10]


@pytest.fixture(scope="module")
def digits() -> list[Image.Image]:
    """1,797 handwritten digits, which are much like each other."""
    return [Image.fromarray((d * 15.9).astype(np.uint8)).resize((64, 64), BICUBIC) for d in load_digits().images]


def encoded(image: Image.Image, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, **options)  # type: ignore[arg-type]
    return Image.open(buffer)


def crop(image: Image.Image, across: float, down: float) -> Image.Image:
    """Keep 95 % of the width and height, at a share of the way across and down."""
    width, height = round(0.95 * image.width), round(0.95 * image.height)
    left, top = round(across * (image.width - width)), round(down * (image.height - height))
    return image.crop((left, top, left + width, top + height))


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), BICUBIC)


def search(signatures: list[Signature], splits: list[int], contents: list[int] | None = None, most: int = 4) -> Pairs:
    return near_duplicates(
        np.array([np.frombuffer(s.thumb, np.uint8) for s in signatures]).reshape(-1, SIDE * SIDE),
        np.array([list(s.colour) for s in signatures], np.uint8).reshape(-1, 3),
        np.array(splits, np.int8),
        np.arange(len(signatures)) if contents is None else np.array(contents),
        most,
    )


def pairs(found: Pairs) -> set[tuple[int, int]]:
    return set(zip(found.first.tolist(), found.second.tolist(), strict=True))


CHANGES = {
    "half the size": lambda image: scaled(image, 0.5),
    "twice the size": lambda image: scaled(image, 2),
    "PNG": lambda image: encoded(image, format="PNG"),
    "JPEG 30": lambda image: encoded(image, format="JPEG", quality=30),
    "JPEG 95": lambda image: encoded(image, format="JPEG", quality=95),
    "top left": lambda image: crop(image, 0, 0),
    "bottom right": lambda image: crop(image, 1, 1),
    "off the centre": lambda image: crop(image, 0.3, 0.6),
    "all at once": lambda image: encoded(scaled(crop(image, 0.8, 0.2), 1.4), format="JPEG", quality=60),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["patches", "digits"])
def test_a_changed_copy_in_another_split_is_found(change: str, kind: str, request: pytest.FixtureRequest) -> None:
    """A user's test set would hold pictures of the training set, scaled, encoded anew or cropped, and overstate the accuracy."""
    images = request.getfixturevalue(kind)[:300]
    count = len(images)
    originals, copies = [signature(i) for i in images], [signature(CHANGES[change](i)) for i in images]
    # Every other copy lies in train and its original in test: either may be the crop.
    splits = [n % 2 for n in range(count)] + [1 - n % 2 for n in range(count)]
    found = pairs(search(originals + copies, splits))
    planted = {(n, n + count) for n in range(count)}
    assert len(found & planted) >= 0.95 * count
    assert len(found - planted) <= 0.002 * count


@pytest.mark.parametrize("kind", ["patches", "digits"])
def test_clean_images_are_not_flagged(kind: str, request: pytest.FixtureRequest) -> None:
    """A user's sound data would be called leaky because its pictures, all of one kind, look much alike."""
    images = request.getfixturevalue(kind)
    found = search([signature(i) for i in images], [n % 3 for n in range(len(images))])
    assert len(found.first) <= 0.001 * len(images)


def test_only_pairs_across_splits_are_given(patches: list[Image.Image]) -> None:
    """A user would be warned of leakage by copies that lie in one split, or that another check reports already as exact."""
    one = signature(patches[0])
    copy = signature(encoded(patches[0], format="JPEG", quality=80))
    assert pairs(search([one, copy], [0, 0])) == set()
    assert pairs(search([one, one], [0, 1], [7, 7])) == set()
    assert pairs(search([one, one], [0, 1], [7, 8])) == {(0, 1)}
    assert pairs(search([one, copy, one, copy], [0, 2, 2, 0])) == {(0, 1), (0, 2), (1, 3), (2, 3)}


def test_the_best_come_first(patches: list[Image.Image]) -> None:
    """A user who looks at the first few pairs would look at the doubtful ones."""
    images = patches[:40]
    assert len(images) == 40
    copies = [encoded(crop(i, 0.5, 0.4), format="JPEG", quality=30) for i in images[:20]] + images[20:]
    found = search([signature(i) for i in images + copies], [0] * 40 + [1] * 40)
    assert (np.diff(found.score) <= 0).all()
    assert (found.first < found.second).all()
    assert found.score[0] > 0.999
    assert found.first[:20].min() >= 20, "the unchanged ones"
    assert found.score.min() > 0.9


def test_other_colours_are_another_picture(patches: list[Image.Image]) -> None:
    """A user's classes that differ by colour alone (a red and a green apple, the same shape) would be called duplicates."""
    grey = np.asarray(patches[0].convert("L"), np.float64)
    tints = ([1.0, 1.0, 1.0], [1.3, 0.87, 0.9], [0.8, 1.12, 0.9], [0.9, 0.9, 2.2])
    pictures = [signature(Image.fromarray((grey[:, :, None] * 0.4 * np.array(t)).astype(np.uint8))) for t in tints]
    assert pairs(search(pictures, [0, 1, 2, 3])) == set()
    assert pairs(search([pictures[1], pictures[1]], [0, 1])) == {(0, 1)}


def test_blank_images_have_no_shape(patches: list[Image.Image]) -> None:
    """A user's hundred blank scans would fill the list of duplicates; they have a rule of their own."""
    blank = [signature(Image.new("RGB", (50, 50), (level, level, level))) for level in (0, 0, 128, 128, 255, 255)]
    noise = np.random.default_rng(0).integers(250, 256, (2, 64, 64), dtype=np.uint8)
    blank += [signature(Image.fromarray(n)) for n in noise]
    assert pairs(search(blank, [0, 1] * 4)) == set()
    one = signature(patches[0])
    assert pairs(search([*blank, one, one], [0, 1] * 5)) == {(8, 9)}


def test_nothing_is_no_mistake(patches: list[Image.Image]) -> None:
    """A user's empty or one-image set would end in a traceback."""
    assert pairs(search([], [])) == set()
    assert pairs(search([signature(patches[0])], [1])) == set()


def test_the_same_again(digits: list[Image.Image]) -> None:
    """A user's report would change from run to run on the same data."""
    images = [signature(i) for i in digits[:600]] + [signature(scaled(i, 0.6)) for i in digits[:600]]
    splits = [0] * 600 + [1] * 600
    first, second = search(images, splits), search(images, splits)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert len(first.first) >= 570


def test_many_copies_of_one_picture_are_bounded(digits: list[Image.Image]) -> None:
    """A user's frames of a still camera, all nearly the same, would run for hours or out of memory."""
    base = np.frombuffer(signature(digits[0]).thumb, np.uint8).astype(np.int16)
    noise = np.random.default_rng(0).integers(-3, 4, (8 * LEAF, SIDE * SIDE))
    thumbs = np.clip(base + noise, 0, 255).astype(np.uint8)
    count = len(thumbs)
    colours, splits = np.full((count, 3), 90, np.uint8), (np.arange(count) % 5 == 0).astype(np.int8)
    began = time.perf_counter()
    found = near_duplicates(thumbs, colours, splits, np.arange(count), most=3)
    assert time.perf_counter() - began < 30
    assert len(found.first) <= 3 * count
    assert len(np.unique(np.concatenate([found.first, found.second]))) > 0.99 * count


def test_copies_to_the_byte_do_not_hide_a_near_copy(patches: list[Image.Image]) -> None:
    """A user's near-duplicate would go unseen behind the exact copies of its original, which are reported elsewhere."""
    one, near = signature(patches[0]), signature(encoded(patches[0], format="JPEG", quality=85))
    copies = 3 * CANDIDATES
    others = [signature(p) for p in patches[1:6]]
    found = search(
        [one, *[one] * copies, near, *others], [0] + [1] * (copies + 1) + [0] * 5, [0] * (copies + 1) + [*range(1, 7)]
    )
    assert pairs(found) == {(0, copies + 1)}


@pytest.mark.parametrize("width", [64, 150, 232, 500, 640])
def test_a_jpeg_decoded_at_a_smaller_scale_has_the_same_signature(width: int) -> None:
    """A user's JPEG would be no duplicate of its own PNG, because JPEGs are decoded at an eighth to a half of their size."""
    photo = Image.fromarray(load_sample_images().images[0])
    image = photo.resize((width, round(width * photo.height / photo.width)), BICUBIC)
    small = encoded(image, format="JPEG", quality=90)
    small.draft("RGB", (2 * SIDE, 2 * SIDE))
    small.load()
    assert small.width < image.width or image.width < 200
    whole, draft = signature(image), signature(small)
    difference = np.frombuffer(whole.thumb, np.uint8).astype(float) - np.frombuffer(draft.thumb, np.uint8)
    assert np.sqrt((difference**2).mean()) < 0.06 * whole.contrast
    assert abs(difference.mean()) < 1
    assert search([whole, draft], [0, 1]).score[0] > 0.98
    assert np.allclose(whole[2:], draft[2:], atol=1.5)
    assert np.allclose(list(whole.colour), list(draft.colour), atol=2)


def test_the_numbers_of_a_signature() -> None:
    """A user's blank images and drifts of brightness, contrast or colour would be judged by wrong numbers."""
    pixels: npt.NDArray[np.uint8] = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = (200, 100, 0)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), float)
    got = signature(Image.fromarray(pixels))
    assert len(got.thumb) == SIDE * SIDE
    assert np.allclose(list(got.colour), [100, 50, 0], atol=2)
    assert got.brightness == pytest.approx(grey.mean(), abs=1)
    assert got.contrast == pytest.approx(grey.std(), abs=2)
    assert got.saturation == pytest.approx(100, abs=2)
    plain = signature(Image.fromarray(pixels).convert("L"))
    assert plain.saturation == 0
    assert plain.thumb == signature(Image.fromarray(pixels).convert("L").convert("RGB")).thumb
    for size in [(1, 1), (1, 500), (7, 3), (3000, 10)]:
        assert signature(Image.new("RGB", size, (10, 10, 10))).brightness == 10
