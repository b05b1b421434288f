"""Splits: which examples are learned from, which decide, which test. The source's own where it has them, else cut by contents, group or time."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from typing import NamedTuple

from graftwork.errors import UserError, one_line
from graftwork.settings import IngestSettings


class Labelled(NamedTuple):
    """What a split is decided from, a position an example, all of the same length."""

    keys: Sequence[str]  # of the source, for messages
    labels: Sequence[str]
    given: Sequence[str]  # "train", "val", "test", or "" where the source does not say
    contents: Sequence[str]  # SHA-256
    groups: Sequence[str]  # "": of no group
    times: Sequence[str]  # sort as text; "": unknown


def position(seed: int, text: str) -> float:
    """Return a number in [0, 1) that depends on ``text`` alone: the same contents are at the same place in every run."""
    return int.from_bytes(hashlib.sha256(f"split:{seed}:{text}".encode()).digest()[:8]) / 2**64


def assign_splits(examples: Labelled, settings: IngestSettings) -> list[str]:
    """Return the split of every example: the source's own where it has one, else cut.

    By contents (the default): a share of each class goes to each split by thresholds on the hash, so a new image never moves an old one,
    and equal images stay together; so do images of one group, whose name is hashed in place of the contents. Where a class is so small that
    the thresholds leave a split empty, the nearest example is taken into it.
    By time: the newest are the test, those before them the validation part; equal times, groups and equal images stay together.
    With train and val alone, val is the test set and the validation part is cut from train.

    Raises:
        UserError: split by time, and an example has none.
    """
    splits = list(examples.given)
    given = set(splits)
    if given == {"train", "val"}:
        splits = ["test" if s == "val" else s for s in splits]
        given = {"train", "test"}
    if not given & {"", "train"}:
        return splits
    wanted = [s for s in ("test", "val") if s not in given]
    units = units_of(examples)
    if len(given) > 1:
        # What belongs together with an example whose side the source gives goes there too: it must not be torn apart.
        rank = {"test": 0, "val": 1}
        side: dict[str, str] = {}
        for unit, split in zip(units, splits, strict=True):
            if split in rank and rank[split] < rank.get(side.get(unit, ""), 2):
                side[unit] = split
        splits = [side.get(unit, split) if split == "" else split for unit, split in zip(units, splits, strict=True)]
    open_ones = [n for n, split in enumerate(splits) if split in ("", "train")]
    if settings.split_by == "time":
        ends = cut_by_time(examples, units, open_ones, wanted, settings)
        for n in open_ones:
            splits[n] = ends[units[n]]
        return splits
    test_end = settings.test_fraction if "test" in wanted else 0.0
    val_end = test_end + (settings.val_fraction * (1 - test_end) if "val" in wanted else 0.0)
    at = {unit: position(settings.seed, unit) for unit in set(units)}
    members: dict[str, list[int]] = defaultdict(list)
    labels_of: dict[str, set[str]] = defaultdict(set)
    for n, unit in enumerate(units):
        labels_of[unit].add(examples.labels[n])
    for n in open_ones:
        members[examples.labels[n]].append(n)
        here = at[units[n]]
        splits[n] = "test" if here < test_end else "val" if here < val_end else "train"
    for members_of_class in members.values():
        own = {units[n] for n in members_of_class}
        if len(own) > len(wanted):
            order = sorted(members_of_class, key=lambda n: at[units[n]])
            fill_empty_splits(splits, order, units, wanted, {u for u in own if len(labels_of[u]) > 1})
    return splits


def units_of(examples: Labelled) -> list[str]:
    """Return the name of what each example must not be torn from: its group, else its contents.

    Groups that hold the same contents are one unit, named by the first of them in the alphabet.
    """
    if not any(examples.groups):
        return list(examples.contents)
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.get(name, name) != name:
            name = leader[name]
        return name

    holder: dict[str, str] = {}
    for content, group in zip(examples.contents, examples.groups, strict=True):
        # A group may be called as a hash is: the mark tells them apart.
        unit = f"group:{group}" if group else content
        first, second = sorted((find(holder.setdefault(content, unit)), find(unit)), reverse=True)
        if first != second:  # a group's name comes after every hash, and so leads
            leader[second] = first
    return [
        find(f"group:{group}" if group else content)
        for content, group in zip(examples.contents, examples.groups, strict=True)
    ]


def cut_by_time(
    examples: Labelled, units: list[str], open_ones: list[int], wanted: list[str], settings: IngestSettings
) -> dict[str, str]:
    """Return the split of every unit: a unit is as new as its newest example."""
    newest: dict[str, str] = {}
    size: Counter[str] = Counter()
    for n in open_ones:
        if not examples.times[n]:
            raise UserError(
                f"data {one_line(examples.keys[n])}: has no time, which split_by = time needs; fill the manifest's time column"
            )
        newest[units[n]] = max(newest.get(units[n], ""), examples.times[n])
        size[units[n]] += 1
    by_time: dict[str, list[str]] = defaultdict(list)
    for unit, time in newest.items():
        by_time[time].append(unit)
    total = len(open_ones)
    test_size = settings.test_fraction * total if "test" in wanted else 0.0
    val_size = settings.val_fraction * (total - test_size) if "val" in wanted else 0.0
    splits: dict[str, str] = {}
    taken = 0
    for time in sorted(by_time, reverse=True):
        # Judged by its middle, a time whose examples lie on the border goes to the side where most of them are.
        count = sum(size[u] for u in by_time[time])
        middle = taken + count / 2
        split = "test" if middle < test_size else "val" if middle < test_size + val_size else "train"
        taken += count
        splits.update(dict.fromkeys(by_time[time], split))
    return splits


def fill_empty_splits(
    splits: list[str], order: list[int], units: list[str], wanted: list[str], shared: Set[str] = frozenset()
) -> None:
    """Move one unit of a small class into each split that it lacks, train included; ``order`` is by position, lowest first.

    Units that are ``shared`` with another class stay where they are: equal images, and groups, must not be torn apart.
    """
    for split in ("train", *wanted):
        if any(splits[n] == split for n in order):
            continue
        # Taken from the split that has most to give; its member nearest to the threshold.
        held = Counter(splits[n] for n in {units[n]: n for n in order}.values())
        donors = {splits[n] for n in order if units[n] not in shared and held[splits[n]] > 1}
        if not donors:
            continue
        donor = max(donors, key=lambda s: (held[s], s))
        candidates = [n for n in order if splits[n] == donor and units[n] not in shared]
        moved = units[candidates[-1] if split == "train" else candidates[0]]
        for n in order:
            if units[n] == moved:
                splits[n] = split


def limit_per_class(
    examples: Labelled, splits: list[str], settings: IngestSettings, usable: Sequence[int]
) -> list[int]:
    """Return the positions of ``usable`` to keep. ``train_per_class`` limits train, and val in the proportion that the whole source has."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for n in usable:
        groups[splits[n], examples.labels[n]].append(n)
    val_share = settings.val_fraction / (1 - settings.val_fraction)
    limits = {
        "train": settings.train_per_class,
        "val": max(1, round(settings.train_per_class * val_share)) if settings.train_per_class else 0,
        "test": settings.test_per_class,
    }
    kept: list[int] = []
    for (split, _), group in groups.items():
        limit = limits[split]
        # The test set does not depend on the seed, so that runs with other seeds are compared on the same examples.
        seed = 0 if split == "test" else settings.seed
        kept += sorted(group, key=lambda n: position(seed, examples.contents[n]))[: limit or None] if limit else group
    return sorted(kept)
