"""Slices of the test."""

import json

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import fisher_exact

from graftwork.errors import UserError
from graftwork.slices import slice_scores


@pytest.fixture(scope="module")
def test_rows(dataset):
    return dataset.split("test")


def with_column(rows: pa.Table, name: str, values) -> pa.Table:
    array = pa.array(values)
    if name in rows.column_names:
        return rows.set_column(rows.column_names.index(name), name, array)
    return rows.append_column(name, array)


def test_a_slice_that_fails_is_found_and_is_first(dataset, test_rows) -> None:
    """The camera whose images the model cannot read hides behind a good accuracy of all."""
    targets = dataset.targets(test_rows)
    cameras = np.array(["north", "south", "east"])[np.arange(len(targets)) % 3]
    predicted = np.where((cameras == "east") & (np.arange(len(targets)) % 2 == 0), (targets + 1) % 10, targets)
    rows = with_column(test_rows, "group", cameras)
    found = slice_scores(dataset, rows, targets, predicted, [])
    first = found[0]
    assert (first["column"], first["value"], first["examples"], first["worse"]) == ("group", "east", 50, True)
    assert first["accuracy"] == 0.5 and first["difference"] == -0.5
    assert first["interval"][0] < 0.5 < first["interval"][1]
    assert first["p_value"] >= fisher_exact([[25, 25], [100, 0]]).pvalue, "corrected for the number of slices"
    assert {"brightness", "contrast"} < {one["column"] for one in found}
    assert {one["value"]: one["worse"] for one in found if one["column"] == "group"} == {
        "east": True,
        "north": False,
        "south": False,
    }
    assert all(one["examples"] >= 10 for one in found)
    json.dumps(found, allow_nan=False)


def test_chance_is_not_called_worse(dataset, test_rows) -> None:
    """With dozens of slices, one in twenty is below 0.05 by chance: she would look for a fault that is none."""
    targets = dataset.targets(test_rows)
    alarms = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        predicted = np.where(rng.random(len(targets)) < 0.8, targets, (targets + 1) % 10)
        rows = with_column(
            test_rows, "columns", [json.dumps({"lot": int(n)}) for n in rng.integers(0, 8, len(targets))]
        )
        alarms += any(one["worse"] for one in slice_scores(dataset, rows, targets, predicted, ["lot"]))
    assert alarms <= 3


def test_numbers_are_cut_into_quartiles_and_the_signatures_are_those_of_the_rows(dataset, test_rows) -> None:
    """Brightness of other images would tell nothing of these."""
    shuffled = test_rows.take(np.random.default_rng(0).permutation(len(test_rows)))
    targets = dataset.targets(shuffled)
    brightness = dict(
        zip(
            dataset.manifest["id"].to_pylist(),
            dataset.signatures(["brightness"])["brightness"].to_pylist(),
            strict=True,
        )
    )
    of_rows = np.array([brightness[name] for name in shuffled["id"].to_pylist()])
    dark = of_rows <= np.quantile(of_rows, 0.25)
    found = slice_scores(dataset, shuffled, targets, np.where(dark, -1, targets), [])
    assert found[0]["column"] == "brightness" and found[0]["accuracy"] == 0.0
    assert found[0]["examples"] == dark.sum()
    assert found[0]["value"].startswith(f"{of_rows.min():.4g} to ")
    assert sum(one["column"] == "brightness" for one in found) == 4
    wide = with_column(test_rows, "width", pa.array(np.arange(len(test_rows)) + 1, pa.int32()))
    wide = with_column(wide, "height", pa.array(np.full(len(test_rows), 100), pa.int32()))
    sides = {one["value"]: one["examples"] for one in slice_scores(dataset, wide, targets, targets, [])}
    assert sides["1 to 38"] == 38 and any(value.endswith(" to 100") or value == "100" for value in sides)


def test_columns_that_the_user_names(dataset, test_rows) -> None:
    """What she knows of her images is what she wants to see: text, numbers, truth values, times, and where nothing is said."""
    count = len(test_rows)
    targets = dataset.targets(test_rows)
    own = [
        {
            "age": str(20 + n % 60),
            "scanner": "old" if n % 2 else "new",
            "contrast agent": n % 3 == 0,
            "mixed": [n, "x"][n % 2],
        }
        for n in range(count)
    ]
    rows = with_column(test_rows, "columns", [json.dumps(one) for one in own[:-20]] + ["", "[1]", *["{}"] * 18])
    rows = with_column(rows, "time", [f"2024-{1 + n % 12:02}-15T10:00:00+02:00" for n in range(count)])
    columns = ["age", "scanner", "contrast agent", "label", "time", "mixed", "mode"]
    found = slice_scores(dataset, rows, targets, targets, columns)
    values = {column: [one["value"] for one in found if one["column"] == column] for column in columns}
    assert sorted(values["scanner"]) == ["(none)", "new", "old"]
    assert len(values["age"]) == 5 and "(none)" in values["age"] and any(v.startswith("20 to ") for v in values["age"])
    assert sorted(values["contrast agent"]) == ["(none)", "False", "True"]
    assert sorted(values["label"]) == sorted(dataset.classes)
    assert len(values["time"]) == 4 and "2024-01-15 to 2024-03-15" in values["time"]
    assert values["mixed"] == ["x", "(none)"] or sorted(values["mixed"]) == ["(none)", "x"]
    assert not any(one["worse"] for one in found)
    for name, rest in (("scaner", "age"), ("columns", "scanner")):
        with pytest.raises(UserError, match=rf"no column '{name}'.*brightness.*{rest}"):
            slice_scores(dataset, rows, targets, targets, [name])


def test_a_test_split_too_small_has_no_slices(dataset, test_rows) -> None:
    """Of nine images, and of none, nothing can be said: no table, no trace."""
    for count in (0, 1, 9, 19):
        rows = test_rows.slice(0, count)
        targets = dataset.targets(rows)
        assert slice_scores(dataset, rows, targets, targets, ["label"]) == []
