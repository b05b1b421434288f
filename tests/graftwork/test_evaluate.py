"""Evaluation: figures that a sceptic can recompute."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, f1_score

from graftwork.errors import UserError
from graftwork.evaluate import accuracy, calibration, choose, evaluate, interval, macro_f1, score
from graftwork.selection import METRICS
from graftwork.settings import EvaluateSettings

SETTINGS = EvaluateSettings(resamples=500)


@pytest.fixture(scope="module")
def result(dataset, baseline, tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    return folder, evaluate(dataset, {"baseline": baseline, "fine_tuned": tuned}, SETTINGS, folder)


def test_figures_follow_from_the_predictions(dataset, result) -> None:
    """If the headline does not follow from the per-example table, one of the two is wrong."""
    folder, found = result
    for name, candidate in found["candidates"].items():
        table = pq.read_table(folder / f"predictions-{name}.parquet").to_pandas()
        assert len(table) == found["examples"] == 150
        assert candidate["test"]["accuracy"] == pytest.approx((table["label"] == table["predicted"]).mean())
        assert candidate["test"]["macro_f1"] == pytest.approx(
            f1_score(table["label"], table["predicted"], average="macro")
        )
        low, high = candidate["test"]["accuracy_interval"]
        assert low < candidate["test"]["accuracy"] < high
        probabilities = table[[f"p_{c}" for c in dataset.classes]].to_numpy()
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads(json.dumps(found))


def test_report_is_one_file_with_the_answer_first(result) -> None:
    """A page that needs the network, or hides the answer, is not one to send to a reviewer."""
    folder, found = result
    page = (folder / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and "<script" not in page
    headline = f"{100 * found['candidates'][found['chosen']]['test']['accuracy']:.1f} %"
    assert page.index(headline) < page.index("<table")
    assert page.count("data:image/png;base64,") == 3


def test_choice_is_made_on_validation_and_ties_go_to_the_simpler() -> None:
    """Chosen on test figures, the reported accuracy would be too good."""
    assert choose({"baseline": 0.8, "fine_tuned": 0.9}) == "fine_tuned"
    assert choose({"fine_tuned": 0.8, "baseline": 0.8}) == "baseline"
    assert choose({"scratch": 0.95, "fine_tuned": 0.9, "baseline": 0.8}) == "scratch"
    # One more of twenty is luck, two are not; of 250, one and a half are less than a point.
    assert choose({"baseline": 0.70, "fine_tuned": 0.75}, 20) == "baseline"
    assert choose({"baseline": 0.70, "fine_tuned": 0.80}, 20) == "fine_tuned"
    assert choose({"baseline": 0.844, "fine_tuned": 0.852}, 250) == "fine_tuned"
    assert choose({"baseline": -0.51, "fine_tuned": -0.50}) == "fine_tuned", "a loss has no such margin"


def test_choice_is_made_by_the_metric_that_she_asked_for(dataset, baseline, tuned, tmp_path: Path) -> None:
    """Asked for the loss, or for macro F1, the candidate with the better accuracy would be registered all the same."""
    candidates = {"baseline": baseline, "fine_tuned": tuned}
    for metric in ("accuracy", "macro_f1", "auroc", "loss"):
        values = {}
        for name, path in candidates.items():
            info = json.loads((path / "model.json").read_text())
            # One is made the better one by this metric and the worse one by every other.
            good, low = name == "baseline", metric == "loss"
            info["selection"]["val"] |= {f"val_{m}": float(good != (m == metric) != (m == "loss")) for m in METRICS}
            info["selection"]["val"][f"val_{metric}"] = float(good != low)
            copied = tmp_path / metric / name
            shutil.copytree(path, copied)
            (copied / "model.json").write_text(json.dumps(info))
            values[name] = copied
        chosen = EvaluateSettings(resamples=100, metric=metric)
        found = evaluate(dataset, values, chosen, tmp_path / metric / "out")
        assert found["chosen"] == "baseline" and found["metric"] == metric
        swapped = {"baseline": values["fine_tuned"], "fine_tuned": values["baseline"]}
        assert evaluate(dataset, swapped, chosen, tmp_path / metric / "swapped")["chosen"] == "fine_tuned"


def test_how_it_was_run_is_said(dataset, baseline: Path, tmp_path: Path) -> None:
    """Figures in a lower precision than the service's would not be what she gets."""
    said: list[str] = []
    evaluate(dataset, {"baseline": baseline}, SETTINGS, tmp_path / "out", note=said.append)
    assert any(line.startswith("plan: fp32") for line in said)


def test_vectorised_statistics_equal_scikit_learns() -> None:
    """Intervals around another statistic than the one reported would mislead."""
    rng = np.random.default_rng(0)
    targets, predicted = rng.integers(0, 4, (2, 6, 50))
    for n in range(6):
        assert accuracy(targets, predicted)[n] == pytest.approx(accuracy_score(targets[n], predicted[n]))
        expected = f1_score(targets[n], predicted[n], average="macro", labels=np.unique(targets[n]))
        assert macro_f1(targets, predicted)[n] == pytest.approx(expected)


def test_interval_covers_what_it_should() -> None:
    """A 95 % interval that covers the truth in 70 % of the cases would call noise a gain."""
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        targets = np.zeros(200, np.int64)
        predicted = (rng.random(200) > 0.8).astype(np.int64)
        low, high = interval(accuracy, targets, predicted, EvaluateSettings(resamples=300, seed=trial))
        covered += low <= 0.8 <= high
    assert 88 <= covered <= 100


def test_calibration_error() -> None:
    """An over-confident model would pass for a calibrated one."""
    rng = np.random.default_rng(2)
    confidence = rng.uniform(0.5, 1, 20_000)
    targets = (rng.random(20_000) > confidence).astype(np.int64)
    honest = np.stack([confidence, 1 - confidence], 1).astype(np.float32)
    assert calibration(targets, honest)[0] < 0.02
    boastful = np.tile(np.float32([[0.99, 0.01]]), (20_000, 1))
    assert calibration(targets, boastful)[0] == pytest.approx(0.99 - (targets == 0).mean(), abs=1e-3)


def test_confusion_and_class_scores_with_an_absent_class() -> None:
    """A class with no test image must not become a NaN in the report, nor a division by zero."""
    found = score(np.array([0, 0, 1]), np.eye(3, dtype=np.float32)[[0, 1, 1]], SETTINGS)
    assert found["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    json.dumps(found, allow_nan=False)


def test_empty_test_split_is_refused(dataset, baseline: Path, tmp_path: Path) -> None:
    """An evaluation of nothing would be reported as one of something."""
    empty = dataset._replace(manifest=dataset.split("train"))
    with pytest.raises(UserError, match="test split: is empty"):
        evaluate(empty, {"baseline": baseline}, SETTINGS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
