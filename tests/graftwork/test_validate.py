"""Validation: every rule fires on a dataset made to break it, with real Great Expectations, and the page that people read."""

import html.parser
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import graftwork.validate
from graftwork.dataset import SCHEMA, SPLITS, Dataset
from graftwork.drift import profile
from graftwork.duplicates import SIDE
from graftwork.image_looks import SIGNATURE
from graftwork.settings import EvaluateSettings, IngestSettings, ValidateSettings
from graftwork.validate import Rule, Validation, validate

Rows = list[dict[str, Any]]
LOOKS = ("thumb", "colour", "brightness", "contrast", "saturation")  # of a row, where a test gives it
FOLDERS = tempfile.TemporaryDirectory(prefix="graftwork-test-validate-")
SHAPE = bytes(n * 7 % 251 for n in range(SIDE * SIDE))
NUMBERS = {"train": 6, "val": 3, "test": 3}


def sound(classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Rows:
    """Rows of a dataset with nothing wrong: 12 examples a class."""
    return [
        {
            "id": f"{label}-{split}-{n}", "label": label, "split": split, "source": f"{label}/{split}{n}.png",
            "sha256": f"{label}-{split}-{n}", "width": 64, "height": 48, "mode": "RGB", "bytes": 9, "shard": "s", "offset": 0,
            "length": 9, "group": "", "time": "", "weight": 1.0,
        }
        for label in classes
        for split, number in NUMBERS.items()
        for n in range(number)
    ]  # fmt: skip


def dataset_of(rows: Rows, classes: tuple[str, ...] = ("ant", "bee", "cat"), broken: int | list[str] = 0) -> Dataset:
    names = [f"ant/broken{n}.png" for n in range(broken)] if isinstance(broken, int) else broken
    info = {
        "name": "made",
        "digest": "0" * 32,
        "classes": list(classes),
        "counts": {s: {c: sum((r["split"], r["label"]) == (s, c) for r in rows) for c in classes} for s in SPLITS},
        "broken": [{"source": name, "label": classes[0], "reason": "cut off"} for name in names],
        "skipped": {".txt": 2},
    }
    random = np.random.default_rng(0)
    looks = [
        {
            "thumb": random.integers(0, 256, SIDE * SIDE, dtype=np.uint8).tobytes(),
            "colour": bytes([100, 110, 120]), "brightness": 110.0, "contrast": 60.0, "saturation": 20.0,
        } | {k: row[k] for k in LOOKS if k in row}
        for row in rows
    ]  # fmt: skip
    folder = Path(tempfile.mkdtemp(dir=FOLDERS.name))
    pq.write_table(pa.Table.from_pylist(looks, schema=SIGNATURE), folder / "signatures.parquet")
    rows = [{k: v for k, v in row.items() if k not in LOOKS} | {"signature": n} for n, row in enumerate(rows)]
    return Dataset(folder, info, pa.Table.from_pylist(rows, schema=SCHEMA))


def failed(result: Validation) -> dict[str, tuple[str, int]]:
    return {r["rule"]: (r["severity"], r["count"]) for r in result.summary["rules"] if not r["passed"]}


def test_sound_data_passes_every_rule() -> None:
    """A user would be stopped, or warned day after day, for nothing."""
    result = validate(dataset_of(sound()), ValidateSettings())
    assert failed(result) == {} and (result.critical, result.warnings) == ([], [])
    assert result.summary["passed"] and result.summary["counts"]["rules"] == len(result.summary["rules"]) >= 13
    assert all((r["message"], r["examples"], r["count"]) == ("", [], 0) for r in result.summary["rules"])


def test_packed_digits_pass(dataset: Dataset) -> None:
    """A user's first run, on the dataset that needs no download, would stop at validation."""
    result = validate(dataset, ValidateSettings())
    assert result.summary["passed"] and result.critical == []
    assert result.summary["classes"]["train"] == dict.fromkeys("0123456789", 24)


def change(select: Callable[[dict[str, Any]], bool], **values: object) -> Callable[[Rows], Rows]:
    return lambda rows: [{**r, **values} if select(r) else r for r in rows]


def without(select: Callable[[dict[str, Any]], bool]) -> Callable[[Rows], Rows]:
    return lambda rows: [r for r in rows if not select(r)]


def is_in(label: str, split: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: (row["label"], row["split"]) == (label, split)


# name: how the rows are changed, how many are broken, what fails (rule: severity, count), examples of the first rule.
BREAKS: dict[str, tuple[Callable[[Rows], Rows], int, dict[str, tuple[str, int]], list[str]]] = {
    "too many broken": (
        list,
        3,
        {"decodable": ("critical", 3), "all_decodable": ("warning", 3)},
        ["ant/broken0.png", "ant/broken1.png", "ant/broken2.png"],
    ),
    "one broken": (list, 1, {"all_decodable": ("warning", 1)}, ["ant/broken0.png"]),
    "a label outside the class list": (
        change(lambda r: r["id"] == "bee-train-1", label="ghost"),
        0,
        {"label_set": ("critical", 1)},
        ["bee/train1.png"],
    ),
    "an image in training and in the test": (
        change(lambda r: r["id"] in ("cat-train-0", "cat-test-2"), sha256="same"),
        0,
        {"content_in_one_split": ("critical", 2)},
        ["cat/train0.png = cat/test2.png"],
    ),
    "an image in two classes": (
        change(lambda r: r["id"] in ("ant-train-0", "cat-train-3", "bee-train-5"), sha256="same"),
        0,
        {"content_has_one_label": ("warning", 3)},
        ["ant/train0.png = cat/train3.png", "ant/train0.png = bee/train5.png"],
    ),
    "narrow images": (
        change(lambda r: r["split"] == "val", width=7),
        0,
        {"size": ("warning", 9)},
        ["ant/val0.png", "ant/val1.png", "ant/val2.png", "bee/val0.png", "bee/val1.png"],  # five are enough
    ),
    "a flat image": (
        change(lambda r: r["id"] == "ant-test-0", height=1),
        0,
        {"size": ("warning", 1), "aspect": ("warning", 1)},
        ["ant/test0.png"],
    ),
    "a tiny class": (
        without(lambda r: r["label"] == "bee" and r["id"] not in ("bee-train-0", "bee-val-0")),
        0,
        {"rows_per_class": ("critical", 1), "test_has_every_class": ("warning", 1)},
        ["bee"],
    ),
    "a class that is not in training": (
        without(is_in("cat", "train")),
        0,
        {"train_has_every_class": ("critical", 1)},
        ["cat"],
    ),
    "a class that is not in validation": (
        without(is_in("ant", "val")),
        0,
        {"val_has_every_class": ("warning", 1)},
        ["ant"],
    ),
    "two classes that are not in the test": (
        without(lambda r: r["split"] == "test" and r["label"] != "ant"),
        0,
        {"test_has_every_class": ("warning", 2)},
        ["bee", "cat"],
    ),
    "a picture that looks like one in the test": (
        change(lambda r: r["id"] in ("cat-train-0", "bee-test-1"), thumb=SHAPE),
        0,
        {"near_duplicates_across_splits": ("warning", 2)},
        ["bee/test1.png = cat/train0.png"],
    ),
    "a group on two sides": (
        change(lambda r: r["id"] in ("cat-train-0", "cat-test-1", "bee-val-0"), group="patient 7"),
        0,
        {"group_in_one_split": ("critical", 3)},
        ["bee/val0.png", "cat/train0.png", "cat/test1.png"],
    ),
    "long images": (
        change(lambda r: r["id"] in ("ant-train-0", "ant-train-1"), width=1000),
        0,
        {"aspect": ("warning", 2)},
        ["ant/train1.png", "ant/train0.png"],
    ),
    "16 bits": (change(lambda r: r["id"] == "ant-val-1", mode="I;16"), 0, {"mode": ("warning", 1)}, ["ant/val1.png"]),
    "blank": (
        lambda rows: [{**r, "contrast": 1.0 / (1 + n)} if r["split"] == "val" else r for n, r in enumerate(rows)],
        0,
        {"not_blank": ("warning", 9)},
        ["cat/val2.png", "cat/val1.png", "cat/val0.png", "bee/val2.png", "bee/val1.png"],  # the blankest first
    ),
    "one class is rare": (
        lambda rows: rows + [{**rows[0], "id": f"x{n}", "sha256": f"x{n}", "source": f"x{n}.png"} for n in range(300)],
        0,
        {"balance": ("warning", 0)},
        [],
    ),
    "no training split": (
        without(lambda r: r["split"] == "train"),
        0,
        {"train_has_every_class": ("critical", 3), "train_not_empty": ("critical", 0)},
        ["ant", "bee", "cat"],
    ),
    "no validation split": (
        without(lambda r: r["split"] == "val"),
        0,
        {"val_has_every_class": ("warning", 3), "val_not_empty": ("critical", 0)},
        ["ant", "bee", "cat"],
    ),
    "no test split": (
        without(lambda r: r["split"] == "test"),
        0,
        {"test_has_every_class": ("warning", 3), "test_not_empty": ("critical", 0)},
        ["ant", "bee", "cat"],
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_rule_fires_alone_with_its_severity_count_and_examples(name: str) -> None:
    """A user's fault in the data would pass unseen, stop the run for a trifle, or be reported without saying where."""
    make, broken, expected, examples = BREAKS[name]
    result = validate(dataset_of(make(sound()), broken=broken), ValidateSettings())
    assert failed(result) == expected
    first = next(r for r in result.summary["rules"] if r["rule"] == next(iter(expected)))
    assert first["examples"] == examples
    messages = {r["rule"]: r["message"] for r in result.summary["rules"] if not r["passed"]}
    for rule, (severity, count) in expected.items():
        assert messages[rule] in (result.critical if severity == "critical" else result.warnings)
        assert not count or (str(count) in messages[rule] and examples[0] in messages[rule])
    assert len(result.critical) + len(result.warnings) == len(expected)
    assert result.summary["passed"] == (not result.critical)
    counts = result.summary["counts"]
    assert (counts["critical"], counts["warnings"], counts["broken"]) == (
        len(result.critical),
        len(result.warnings),
        broken,
    )


def test_every_rule_has_a_dataset_that_breaks_it() -> None:
    """A user would rely on a rule that nobody has ever seen fire."""
    result = validate(dataset_of(sound()), ValidateSettings())
    broken = {rule for _, _, expected, _ in BREAKS.values() for rule in expected}
    assert {r["rule"] for r in result.summary["rules"]} == broken


@pytest.mark.parametrize("name", [n for n, b in BREAKS.items() if any(s == "critical" for s, _ in b[2].values())])
def test_a_message_names_only_settings_that_exist(name: str) -> None:
    """A user would be told to set something that graftwork then refuses."""
    make, broken, _, _ = BREAKS[name]
    result = validate(dataset_of(make(sound()), broken=broken), ValidateSettings())
    known = {n for m in (IngestSettings, ValidateSettings, EvaluateSettings) for n in m.model_fields}
    named = re.findall(r"raise (\w+)", " ".join(result.critical + result.warnings))
    assert set(named) <= known


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_broken": 0.2}, {"all_decodable", "size"}),
        ({"max_broken": 0.2, "min_side": 4}, {"all_decodable"}),
        ({"max_broken": 0.0, "min_side": 4}, {"decodable", "all_decodable"}),
        ({"max_broken": 0.2, "min_side": 4, "min_per_class": 13}, {"all_decodable", "rows_per_class"}),
    ],
)
def test_the_settings_move_the_limits(settings: dict[str, float], expected: set[str]) -> None:
    """A user who knows the data could not tell the rules so."""
    rows = change(lambda r: r["id"] == "ant-val-0", width=5, height=5)(sound())
    assert set(failed(validate(dataset_of(rows, broken=1), ValidateSettings(**settings)))) == expected


@pytest.mark.parametrize(("good", "broken", "allowed"), [(36, 4, 0.1), (36, 28, 0.4375), (29, 21, 0.42), (36, 36, 0.5)])
def test_exactly_the_allowed_share_may_be_broken(good: int, broken: int, allowed: float) -> None:
    """A user would be told "more than the 42% allowed" at 42%."""
    data = dataset_of(sound()[:good], broken=broken)
    result = validate(data, ValidateSettings(max_broken=allowed, min_per_class=1))
    assert "decodable" not in failed(result)
    more = dataset_of(sound()[:good], broken=broken + 1)
    assert "decodable" in failed(validate(more, ValidateSettings(max_broken=allowed, min_per_class=1)))


@pytest.mark.parametrize("severity", ["warning", "critical"])
def test_an_expectation_that_raises_is_critical(severity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's data would pass a check that was never made."""
    import great_expectations.expectations as gxe

    original = graftwork.validate.standard_rules
    unknown = gxe.ExpectColumnValuesToBeBetween(column="no_such_column", max_value=1)
    extra = Rule("odd", severity, "examples", unknown, "{count} are odd ({examples})")
    monkeypatch.setattr(graftwork.validate, "standard_rules", lambda *arguments: [*original(*arguments), extra])
    result = validate(dataset_of(sound()), ValidateSettings())
    assert failed(result) == {"odd": ("critical", 0)} and result.warnings == [] and not result.summary["passed"]
    assert result.critical[0].startswith("odd: could not be checked (") and "no_such_column" in result.critical[0]
    assert "\n" not in result.critical[0]


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: the elements, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_names_and_runs_none_of_them() -> None:
    """A user who opens the report of somebody else's data would run a script from a folder's name."""
    classes = ("<script>", "b&b", "{count} {examples} {{ 7*7 }} {0}")
    evil = ["x/<img src=x onerror=alert(1)>.png", 'x/"><svg onload=alert(2)>.png', "x/a\nb.png"]
    rows = change(lambda r: r["id"] in ("<script>-val-0", "b&b-val-0"), sha256="same")(sound(classes))
    rows = without(is_in(classes[2], "test"))(rows)
    result = validate(dataset_of(rows, classes, evil), ValidateSettings())
    assert set(failed(result)) == {"decodable", "all_decodable", "content_has_one_label", "test_has_every_class"}
    page = Page(result.html)
    assert not {"script", "svg"} & set(page.elements)
    assert all(v.startswith("data:image/") for a, v in page.attributes if a == "src" and v)
    assert not [a for a, _ in page.attributes if a.startswith("on")]
    for name in (*classes, *evil):
        assert " ".join(name.split()) in " ".join(page.text.split())
    assert "\n" not in "".join(result.critical + result.warnings)


def test_the_page_is_one_file_and_says_what_was_found() -> None:
    """A user who is sent the report would see a page without style, or without the numbers."""
    result = validate(dataset_of(without(is_in("cat", "train"))(sound()), broken=1), ValidateSettings())
    page = Page(result.html)
    assert not [v for a, v in page.attributes if a in ("src", "href") and v and not v.startswith(("#", "data:"))]
    assert "url(http" not in result.html and "@import" not in result.html
    for text in ("Not good to train on", "ant/broken0.png", "cut off", "2 × .txt", "train_has_every_class", "0" * 32):
        assert text in page.text
    assert "Good to train on" in validate(dataset_of(sound()), ValidateSettings()).html


def test_many_broken_images_are_cut_short_and_counted() -> None:
    """A user's report of a million broken files would be too large to open, or hide how many there are."""
    result = validate(dataset_of(sound(), broken=500), ValidateSettings())
    assert len(result.summary["broken"]) == 200 and result.summary["counts"]["broken"] == 500
    assert "The first 200 of 500." in result.html
    assert len(json.dumps(result.summary, allow_nan=False)) < 100_000
    assert all(len(r["examples"]) <= 5 for r in result.summary["rules"])


# ---- drift ---------------------------------------------------------------------------------------------------------------------


def many(**values: Callable[[int], object]) -> Dataset:
    """600 examples of two classes, with ``values`` of their number."""
    rows = sound(("ant", "bee"))
    rows = [{**rows[n % 24], "id": str(n), "sha256": str(n), "source": f"{n}.png"} for n in range(600)]
    return dataset_of([{**r, **{k: f(n) for k, f in values.items()}} for n, r in enumerate(rows)], ("ant", "bee"))


def spread(low: float, high: float, seed: int) -> Callable[[int], float]:
    values = np.random.default_rng(seed).uniform(low, high, 600)
    return lambda n: float(values[n])


DRIFTS: dict[str, tuple[dict[str, Callable[[int], object]], set[str]]] = {
    "none": ({"brightness": spread(50, 200, 2)}, set()),
    "darker": ({"brightness": spread(20, 120, 2)}, {"drift_brightness"}),
    "fewer of one class": ({"label": lambda n: "ant" if n % 10 else "bee"}, {"drift_class_shares"}),
    "washed out": ({"contrast": lambda n: 15.0}, {"drift_contrast"}),
    "grey": ({"saturation": lambda n: 0.0}, {"drift_saturation"}),
    "smaller": ({"width": lambda n: 32, "height": lambda n: 24}, {"drift_side"}),
    "upright": ({"width": lambda n: 48, "height": lambda n: 64}, {"drift_aspect"}),
}


@pytest.mark.parametrize("name", DRIFTS)
def test_each_kind_of_drift_is_told(name: str) -> None:
    """A user's camera, crop or mixture of classes would change, and the model be retrained on it unnoticed; or the warning would never be silent."""
    values, expected = DRIFTS[name]
    brightness = {"brightness": spread(50, 200, 1)}
    reference = profile(many(**brightness)) | {"champion": "flowers version 3"}
    result = validate(
        many(**({"brightness": spread(50, 200, 3)} | values)), ValidateSettings(near_duplicates=False), reference
    )
    assert set(failed(result)) == expected
    assert all("flowers version 3" in w for w in result.warnings)


def test_other_classes_than_the_champions_are_told() -> None:
    """A user would learn after hours of training that the champion cannot be compared."""
    reference = profile(dataset_of(sound()))
    result = validate(
        dataset_of(sound(("ant", "bee", "{cow}")), ("ant", "bee", "{cow}")), ValidateSettings(), reference
    )
    assert set(failed(result)) == {"label_set_as_before"}
    assert "(-cat, +{cow})" in result.warnings[0]


def test_the_classes_that_are_given_must_be_there() -> None:
    """A user's renamed folder would become a class of its own, and another be missing."""
    result = validate(dataset_of(sound()), ValidateSettings(classes=["ant", "bee", "dog", "{x}"]))
    assert failed(result) == {"label_set": ("critical", 12), "classes_present": ("critical", 0)}
    assert "there is no image of dog, {x};" in result.critical[1]
    assert failed(validate(dataset_of(sound()), ValidateSettings(classes=["cat", "bee", "ant"]))) == {}
