"""Labels that are likely wrong."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from graftwork.label_errors import crossvalidated, likely_label_errors

SCHEMA = pa.schema([("id", pa.string()), ("label", pa.string()), ("weight", pa.float64())])


def embeddings_of(folder: Path, features, targets, classes: list[str], views: int = 1, val: float = 0.2) -> Path:
    """Write an Embeddings artifact, less its backbone, each split sorted by label."""
    folder.mkdir()
    order = np.arange(len(targets))
    cut = int(len(order) * (1 - val))
    for split, part in (("train", order[:cut]), ("val", order[cut:])):
        part = part[np.argsort(targets[part], kind="stable")]
        stored = np.stack([features[part]] + [np.zeros_like(features[part])] * (views - 1)).astype(np.float32)
        np.save(folder / f"features-{split}.npy", stored)
        index = {
            "id": [f"{n}" for n in part],
            "label": [classes[t] for t in targets[part]],
            "weight": [1.0] * len(part),
        }
        pq.write_table(pa.table(index, schema=SCHEMA), folder / f"index-{split}.parquet")
    (folder / "embeddings.json").write_text(json.dumps({"classes": classes}))
    return folder


@pytest.fixture(scope="module")
def digits():
    """1,200 digits of which 5 % are labelled wrongly: features, labels, the true ones."""
    features, truth = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    kept = rng.permutation(len(truth))[:1200]
    features, truth = features[kept], truth[kept].astype(np.int64)
    labels = truth.copy()
    wrong = rng.permutation(len(truth))[: len(truth) // 20]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return features, labels, truth


def test_changed_labels_are_found(digits, tmp_path: Path) -> None:
    """Someone who goes through the list wants to see wrong labels in it, with the right ones beside them, and most of those there are."""
    features, labels, truth = digits
    folder = embeddings_of(tmp_path / "e", features, labels, [f"digit {n}" for n in range(10)])
    found = crossvalidated(folder, 0.02)
    assert found is not None and found.probabilities.shape == (1200, 10)
    assert found.rows.column_names == ["id", "label", "weight", "split"]
    assert found.rows["split"].to_pylist().count("val") == 240
    position = np.array([int(n) for n in found.rows["id"].to_pylist()])
    np.testing.assert_array_equal(found.targets, labels[position])
    total, suspects = likely_label_errors(found.targets, found.probabilities, limit=1000)
    hits = [n for n, _, _ in suspects if labels[position[n]] != truth[position[n]]]
    assert total == len(suspects)
    assert len(hits) / total > 0.85, "precision"
    assert len(hits) / 60 > 0.6, "recall"
    right = [suggested == truth[position[n]] for n, suggested, _ in suspects if n in hits]
    assert np.mean(right) > 0.85
    qualities = [quality for _, _, quality in suspects]
    assert qualities == sorted(qualities) and qualities[0] >= 0 and qualities[-1] < 0.5
    assert all(suggested != found.targets[n] for n, suggested, _ in suspects)
    assert likely_label_errors(found.targets, found.probabilities, limit=3) == (total, suspects[:3])


def test_a_sample_keeps_every_class_and_the_strength_is_that_of_all_views(digits, tmp_path: Path) -> None:
    """A large dataset must not take an hour, nor the probe be another than the baseline's."""
    features, labels, _ = digits
    classes = [str(n) for n in range(10)]
    one = crossvalidated(embeddings_of(tmp_path / "one", features, labels, classes), 0.02, limit=300)
    four = crossvalidated(embeddings_of(tmp_path / "four", features, labels, classes, views=4), 0.005, limit=300)
    assert one is not None and four is not None and len(one.targets) == 300
    assert np.bincount(one.targets, minlength=10).min() >= 20
    np.testing.assert_allclose(one.probabilities, four.probabilities, atol=1e-5)


def test_what_cannot_be_judged_is_left_out(digits, tmp_path: Path) -> None:
    """Ten images, one class, a class without images, an empty validation split: a report without the table, not a trace."""
    features, labels, truth = digits
    rng = np.random.default_rng(1)
    few = np.concatenate(
        [np.flatnonzero(truth == 0)[:40], np.flatnonzero(truth == 1)[:40], np.flatnonzero(truth == 2)[:3]]
    )
    few = rng.permutation(few)
    found = crossvalidated(
        embeddings_of(tmp_path / "few", features[few], truth[few], ["a", "b", "c", "empty"], val=0), 0.02
    )
    assert found is not None and set(found.targets) == {0, 1} and found.probabilities.shape == (80, 4)
    assert likely_label_errors(found.targets, found.probabilities)[0] <= 1
    ten = rng.permutation(len(truth))[:10]
    assert crossvalidated(embeddings_of(tmp_path / "ten", features[ten], labels[ten], [*"0123456789"]), 0.02) is None
    same = np.flatnonzero(truth == 3)
    assert crossvalidated(embeddings_of(tmp_path / "same", features[same], truth[same], [*"0123456789"]), 0.02) is None


@pytest.mark.parametrize("examples", [0, 1, 2, 10, 100])
def test_any_targets_are_taken(examples: int) -> None:
    """The test split is the user's: cleanlab itself refuses one class, and labels that leave a class out."""
    rng = np.random.default_rng(examples)
    probabilities = rng.dirichlet(np.ones(6), examples).astype(np.float32)
    for targets in (np.full(examples, 4), rng.integers(0, 2, examples) * 3 + 1, rng.integers(0, 6, examples)):
        total, suspects = likely_label_errors(targets.astype(np.int64), probabilities)
        assert total >= len(suspects)
        for n, suggested, quality in suspects:
            assert suggested in targets and suggested != targets[n] and 0 <= quality <= 1
    sure = np.eye(6, dtype=np.float32)[np.arange(examples) % 6]
    assert likely_label_errors((np.arange(examples) % 6).astype(np.int64), sure) == (0, [])
