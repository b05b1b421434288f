"""Slices of the test: groups of examples, by what they look like or by what the user knows of them, and where the model is worse than elsewhere."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from graftwork.dataset import Dataset
from graftwork.errors import UserError, one_line
from graftwork.modality import looks

FEWEST = 10  # examples in a slice, and outside it
GROUPS = 50  # at most; more are names of single things
VALUES = 10  # a column of numbers with more than so many is cut into quartiles
SIGNIFICANT = 0.05
OWN = "columns"  # of the manifest, where there is one: JSON, what the user's own manifest says of each example
Ints = npt.NDArray[np.int64]


def slice_scores(
    dataset: Dataset, rows: pa.Table, targets: Ints, predicted: Ints, columns: list[str], confidence: float = 0.95
) -> list[dict[str, Any]]:
    """Return the accuracy of every slice of ``rows``, those that are worse than the rest first, then by the difference to it.

    ``rows`` are rows of the manifest, ``targets`` and ``predicted`` (N,) classes. Looked at are mode, what the modality slices by (of images
    side, brightness, contrast and saturation), ``group`` where there are few, and ``columns``: of the manifest, or of the user's own. Numbers
    are cut into quartiles. Each slice is told from all other examples by Fisher's exact test, two-sided; ``p_value`` is corrected for
    the number of slices (Benjamini and Hochberg 1995), and ``worse`` says that accuracy is lower and ``p_value`` below 0.05. The
    interval is Wilson's at ``confidence``. Slices of fewer than 10 examples, or that leave fewer, are left out.

    Raises:
        UserError: there is no such column, or the signatures cannot be read.
    """
    from scipy.stats import binomtest, false_discovery_control, fisher_exact

    correct = np.asarray(targets) == np.asarray(predicted)
    found: list[dict[str, Any]] = []
    for column, values in examined(dataset, rows, columns).items():
        named = in_words(values)
        for value in pd.unique(named):
            inside = (named == value).to_numpy()
            examples, right = int(inside.sum()), int(correct[inside].sum())
            rest, rest_right = len(correct) - examples, int(correct.sum()) - right
            if min(examples, rest) < FEWEST:
                continue
            interval = binomtest(right, examples).proportion_ci(confidence, method="wilson")
            table = [[right, examples - right], [rest_right, rest - rest_right]]
            found.append(
                {
                    "column": column,
                    "value": one_line(value, 60),
                    "examples": examples,
                    "accuracy": right / examples,
                    "interval": [float(interval.low), float(interval.high)],
                    "difference": right / examples - rest_right / rest,
                    "p_value": float(fisher_exact(table).pvalue),
                }
            )
    if found:
        corrected = false_discovery_control([one["p_value"] for one in found], method="bh")
        for one, p_value in zip(found, corrected, strict=True):
            one["p_value"] = float(p_value)
            one["worse"] = bool(one["difference"] < 0 and p_value < SIGNIFICANT)
    return sorted(found, key=lambda one: (not one["worse"], one["difference"], one["column"], one["value"]))


def examined(dataset: Dataset, rows: pa.Table, columns: Iterable[str]) -> dict[str, pd.Series]:
    """Return the columns that examples are sliced by, each (N,), numbers as such.

    Raises:
        UserError: there is no column of a name in ``columns``.
    """
    own_looks = looks(dataset.info)
    like = own_looks.columns(dataset, rows)
    known = {"mode": rows["mode"].to_pandas(), **{name: like[name] for name in own_looks.SLICES}}
    found = dict(known)
    groups = rows["group"].to_pandas()
    if 2 <= groups[groups != ""].nunique() <= GROUPS:
        found["group"] = groups
    own = own_columns(rows)
    for name in columns:
        if name in known:
            continue
        if name in rows.column_names and name != OWN:
            found[name] = rows[name].to_pandas()
        elif name in own:
            found[name] = own[name]
        else:
            there = [*known, *(n for n in rows.column_names if n not in (*known, OWN)), *own]
            raise UserError(
                f"slices: there is no column {one_line(name, 60)!r}; there are {one_line(', '.join(there))}"
            )
        if name == "time":
            # Text sorts by time only where all of it is written alike.
            found[name] = pd.to_datetime(found[name], format="ISO8601", utc=True, errors="coerce")
    return found


def own_columns(rows: pa.Table) -> dict[str, pd.Series]:
    """Return what the user's manifest says of each of ``rows``, by its own columns' names; None where it says nothing."""
    if OWN not in rows.column_names:
        return {}
    said = []
    for text in rows[OWN].to_pylist():
        value = json.loads(text) if text else {}
        said.append(value if isinstance(value, dict) else {})
    names = sorted({name for one in said for name in one})
    return {name: pd.Series([one.get(name) for one in said], dtype=object) for name in names}


def in_words(values: pd.Series) -> pd.Series:
    """Return the name of the slice that each of ``values`` is in: a value as it is, or the quartile of a number or a time."""
    empty = values.isna() | (values.astype(str) == "")
    if pd.api.types.is_datetime64_any_dtype(values):
        numbers = values
    elif pd.api.types.is_bool_dtype(values):
        numbers = pd.Series(dtype=float)
    else:
        # A CSV file's numbers are text.
        numbers = pd.to_numeric(values.where(~empty), errors="coerce")
        if numbers.isna().sum() > empty.sum():
            numbers = pd.Series(dtype=float)
    words = quartiles(numbers) if numbers.nunique() > VALUES else values.astype(str)
    return words.where(~empty, "(none)").astype(object)


def quartiles(numbers: pd.Series) -> pd.Series:
    """Return the quartile of each of ``numbers`` as text, with the smallest and the largest in it: "28 to 64"."""
    # Of many equal numbers, a quartile may be empty.
    which = pd.qcut(numbers, 4, labels=False, duplicates="drop")
    names = {}
    for quartile, inside in numbers.groupby(which):
        low, high = inside.min(), inside.max()
        names[quartile] = f"{edge(low)} to {edge(high)}" if low != high else edge(low)
    return which.map(names)


def edge(value: Any) -> str:
    return f"{value:%Y-%m-%d}" if isinstance(value, pd.Timestamp) else f"{value:.4g}"
