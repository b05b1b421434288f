"""Splits: nothing that is learned from is tested on, nothing moves when data is added, and every class is on every side."""

import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from graftwork.dataset import SPLITS
from graftwork.errors import UserError
from graftwork.settings import IngestSettings
from graftwork.splits import Labelled, assign_splits, fill_empty_splits, position, units_of

Keyed = list[tuple[str, str]]  # (key, label)


def records(label: str, number: int, start: int = 0) -> tuple[Keyed, list[str]]:
    found = [(f"{label}/{n}", label) for n in range(start, start + number)]
    return found, [hashlib.sha256(key.encode()).hexdigest() for key, _ in found]


def labelled(
    found: Keyed, hashes: list[str], groups: list[str] | None = None, times: list[str] | None = None
) -> Labelled:
    none = [""] * len(found)
    return Labelled([k for k, _ in found], [c for _, c in found], none, hashes, groups or none, times or none)


def test_splits_are_stratified() -> None:
    """A user's rarer class would be missing from the test, or the parts not be those that were asked for."""
    everything, hashes = [], []
    for label, number in (("big", 5000), ("mid", 1500), ("small", 600)):
        found, digests = records(label, number)
        everything += found
        hashes += digests
    splits = assign_splits(labelled(everything, hashes), IngestSettings(test_fraction=0.3, val_fraction=0.1))
    for label, number in (("big", 5000), ("mid", 1500), ("small", 600)):
        share = Counter(s for s, r in zip(splits, everything, strict=True) if r[1] == label)
        tolerance = 3.5 * (0.3 * 0.7 / number) ** 0.5
        assert share["test"] / number == pytest.approx(0.3, abs=tolerance)
        assert share["val"] / number == pytest.approx(0.7 * 0.1, abs=tolerance)
        assert share["train"] / number == pytest.approx(0.7 * 0.9, abs=tolerance)


def test_a_larger_test_fraction_only_adds_to_the_test() -> None:
    """A user who enlarges the test set would have nothing left to compare with: another test set altogether."""
    found, hashes = records("a", 500)
    parts = [
        {
            h
            for h, s in zip(
                hashes, assign_splits(labelled(found, hashes), IngestSettings(test_fraction=f)), strict=True
            )
            if s == "test"
        }
        for f in (0.1, 0.2, 0.4)
    ]
    assert parts[0] < parts[1] < parts[2]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("number", [3, 4, 6])
def test_a_tiny_class_has_an_example_in_every_split(number: int, seed: int) -> None:
    """A user's class of three images would be missing from training, from validation or from the test."""
    found, hashes = records("tiny", number)
    assert set(assign_splits(labelled(found, hashes), IngestSettings(seed=seed))) == set(SPLITS)


@pytest.mark.parametrize("seed", range(8))
def test_a_tiny_class_with_copies(seed: int) -> None:
    """A user's class of three images, two of them copied, would have a copy on each side of the test."""
    found, hashes = records("tiny", 6)
    hashes[3:] = [hashes[0], hashes[0], hashes[1]]
    splits = assign_splits(labelled(found, hashes), IngestSettings(seed=seed))
    assert set(splits) == set(SPLITS)
    assert len(set(zip(hashes, splits, strict=True))) == 3


@pytest.mark.parametrize("seed", range(30))
def test_filling_a_tiny_class_tears_no_copies_apart(seed: int) -> None:
    """A user whose tiny class holds one image of a large one would be stopped for a leak that graftwork made."""
    large, large_hashes = records("large", 100)
    tiny, tiny_hashes = records("tiny", 6)
    tiny_hashes[seed % 6] = next(  # a picture of both classes, which the large one has in training
        h
        for h, s in zip(
            large_hashes, assign_splits(labelled(large, large_hashes), IngestSettings(seed=seed)), strict=True
        )
        if s == "train"
    )
    hashes = large_hashes + tiny_hashes
    splits = assign_splits(labelled(large + tiny, hashes), IngestSettings(seed=seed))
    assert len(set(zip(hashes, splits, strict=True))) == len(set(hashes))


def test_filling_takes_from_the_fullest_split() -> None:
    """A user's tiny class would get its test example at the price of its only validation example."""
    hashes = list("abcd")
    splits = ["val", "train", "train", "train"]
    fill_empty_splits(splits, [0, 1, 2, 3], hashes, ["test", "val"])
    assert splits == ["val", "test", "train", "train"]


def test_position_spreads_evenly_and_depends_on_contents_and_seed_alone() -> None:
    """A user's fractions would not be kept, or the split change from machine to machine."""
    found = np.array([position(0, h) for h in records("a", 4000)[1]])
    assert found.min() >= 0 and found.max() < 1
    assert np.abs(np.histogram(found, 10, (0, 1))[0] - 400).max() < 80
    # Published: another number here moves every user's examples to other splits.
    assert position(0, "0" * 64) == pytest.approx(0.966007829751345, abs=1e-15)
    assert position(1, "0" * 64) != position(0, "0" * 64)


# ---- groups --------------------------------------------------------------------------------------------------------------------


def patients(number: int, images: int) -> tuple[Keyed, list[str], list[str]]:
    """Images of ``number`` patients, half of whom are ill."""
    found, hashes, groups = [], [], []
    for patient in range(number):
        mine, digests = records("ill" if patient % 2 else "well", images, start=patient * images)
        found += mine
        hashes += digests
        groups += [f"patient {patient}"] * images
    return found, hashes, groups


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_on_one_side(seed: int) -> None:
    """A user would test on other images of the very patients that were learned from, and publish it."""
    found, hashes, groups = patients(60, 9)
    splits = assign_splits(labelled(found, hashes, groups), IngestSettings(seed=seed))
    sides = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        sides[group].add(split)
    assert all(len(s) == 1 for s in sides.values()) and set().union(*sides.values()) == set(SPLITS)


def test_a_new_group_moves_no_old_one() -> None:
    """A user who adds patients each month would see old ones go from the test into training."""
    found, hashes, groups = patients(80, 4)
    before = assign_splits(labelled(found[:200], hashes[:200], groups[:200]), IngestSettings())
    after = assign_splits(labelled(found, hashes, groups), IngestSettings())
    assert after[:200] == before


@pytest.mark.parametrize("seed", range(10))
def test_a_picture_in_two_groups_joins_them(seed: int) -> None:
    """A user whose picture is filed under two patients would have it on both sides."""
    found, hashes, groups = patients(40, 3)
    for n in range(0, 60, 6):  # the first picture of one patient is also one of the next patient's
        hashes[n + 3] = hashes[n]
    splits = assign_splits(labelled(found, hashes, groups), IngestSettings(seed=seed))
    for names in (hashes, groups):
        assert len(set(zip(names, splits, strict=True))) == len(set(names))


def test_groups_that_are_joined_have_one_unit() -> None:
    """A user's chain of shared pictures, a with b and b with c, would be cut between a and c."""
    found, hashes = records("x", 6)
    hashes = [hashes[n] for n in (0, 1, 1, 2, 2, 3)]
    units = units_of(labelled(found, hashes, ["c", "c", "a", "a", "b", ""]))
    assert units[:5] == [units[0]] * 5 and units[5] == hashes[5]


@pytest.mark.parametrize("seed", range(8))
def test_a_class_of_three_groups_is_on_every_side(seed: int) -> None:
    """A user's class of three patients would be missing from training, validation or the test."""
    found, hashes = records("rare", 9)
    splits = assign_splits(labelled(found, hashes, [f"p{n // 3}" for n in range(9)]), IngestSettings(seed=seed))
    assert set(splits) == set(SPLITS)


# ---- time ----------------------------------------------------------------------------------------------------------------------


def test_by_time_the_newest_are_the_test() -> None:
    """A user who forecasts would learn from the future, and be told that it goes well."""
    found, hashes = records("a", 100)
    times = [f"2026-01-{1 + n * 7 % 100 // 4:02d}" for n in range(100)]
    splits = assign_splits(labelled(found, hashes, times=times), IngestSettings(split_by="time"))
    by_split = {s: sorted(t for t, split in zip(times, splits, strict=True) if split == s) for s in SPLITS}
    assert by_split["train"][-1] < by_split["val"][0] and by_split["val"][-1] < by_split["test"][0]
    assert [len(by_split[s]) for s in SPLITS] == [64, 16, 20]


def test_by_time_copies_and_groups_stay_together() -> None:
    """A user's old picture that was filed again yesterday would be on both sides."""
    found, hashes = records("a", 60)
    hashes[59] = hashes[0]
    groups = ["" if n != 1 and n != 58 else "g" for n in range(60)]
    times = [f"2026-01-01T00:00:{n:02d}" for n in range(60)]
    splits = assign_splits(labelled(found, hashes, groups, times), IngestSettings(split_by="time"))
    assert splits[0] == splits[59] == "test" and splits[1] == splits[58] == "test" and splits[2] == "train"


def test_by_time_needs_times() -> None:
    """A user who asks for a split by time would get one by chance where the time is missing."""
    found, hashes = records("a", 3)
    with pytest.raises(UserError, match="a/1: has no time"):
        assign_splits(labelled(found, hashes, times=["1", "", "2"]), IngestSettings(split_by="time"))


@pytest.mark.parametrize("split_by", ["content", "time"])
def test_what_belongs_to_a_given_test_example_goes_there_too(split_by: str) -> None:
    """A user who fixes the side of some rows would be stopped for leaks that graftwork made of the others."""
    found, hashes, groups = patients(40, 3)
    hashes[5] = hashes[60]
    given = ["test" if n % 12 == 0 else "" for n in range(120)]
    times = [f"{n:03d}" for n in range(120)]
    examples = labelled(found, hashes, groups, times)._replace(given=given)
    splits = assign_splits(examples, IngestSettings(split_by=split_by))
    assert all(split == "test" for split, was in zip(splits, given, strict=True) if was)
    for names in (hashes, groups):
        assert len(set(zip(names, splits, strict=True))) == len(set(names))
    assert set(splits) == set(SPLITS)
