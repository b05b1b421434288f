"""What is decided on validation: metrics as scikit-learn has them, and which epoch is the best."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score

from graftwork.selection import METRICS, better, measure, merit

RNG = np.random.default_rng(0)
TARGETS = RNG.integers(0, 4, 60)
LOGITS = (RNG.normal(size=(60, 4)) + 1.5 * np.eye(4)[TARGETS]).astype(np.float32)


def test_metrics_are_scikit_learns() -> None:
    """A figure that nobody else can recompute convinces nobody."""
    found = measure(LOGITS, TARGETS, METRICS)
    probabilities = softmax(LOGITS.astype(np.float64), axis=1)
    assert found["val_accuracy"] == pytest.approx(accuracy_score(TARGETS, LOGITS.argmax(1)))
    assert found["val_macro_f1"] == pytest.approx(f1_score(TARGETS, LOGITS.argmax(1), average="macro"))
    assert found["val_auroc"] == pytest.approx(roc_auc_score(TARGETS, probabilities, multi_class="ovr"))
    assert found["val_loss"] == pytest.approx(log_loss(TARGETS, probabilities))
    assert 0.3 < found["val_accuracy"] < 0.95, "neither all right nor all wrong"
    assert set(measure(LOGITS, TARGETS)) == {"val_accuracy", "val_loss"}, "no more than is asked for is computed"


def test_two_classes() -> None:
    """Two classes are a special case in scikit-learn, and the most frequent in practice."""
    targets, logits = TARGETS % 2, LOGITS[:, :2]
    found = measure(logits, targets, METRICS)
    assert found["val_auroc"] == pytest.approx(roc_auc_score(targets, logits[:, 1] - logits[:, 0]))
    assert found["val_macro_f1"] == pytest.approx(f1_score(targets, logits.argmax(1), average="macro"))


def test_a_class_without_examples_is_left_out() -> None:
    """A rare class that validation lacks would make every figure a NaN, or zero."""
    few = TARGETS != 2
    found = measure(LOGITS[few], TARGETS[few], METRICS)
    assert all(np.isfinite(v) for v in found.values())
    labels = [0, 1, 3]
    expected = f1_score(TARGETS[few], LOGITS[few].argmax(1), labels=labels, average="macro")
    assert found["val_macro_f1"] == pytest.approx(expected)
    scores = softmax(LOGITS[few], axis=1)
    assert found["val_auroc"] == pytest.approx(
        np.mean([roc_auc_score(TARGETS[few] == c, scores[:, c]) for c in labels])
    )
    one = measure(LOGITS[TARGETS == 1], TARGETS[TARGETS == 1], METRICS)
    assert one["val_auroc"] == 0.0 and all(np.isfinite(v) for v in one.values())


def test_nothing_to_measure_is_no_error() -> None:
    """A small dataset without a validation split would end the run."""
    assert measure(LOGITS[:0], TARGETS[:0], METRICS) == {f"val_{m}": 0.0 for m in METRICS}


def test_logits_far_out_stay_numbers() -> None:
    """A confident network would have an infinite loss, and no epoch be better than another."""
    logits = np.array([[0.0, 1e4], [1e4, 0.0]], np.float32)
    found = measure(logits, np.array([0, 1]), METRICS)
    assert found["val_loss"] == pytest.approx(1e4) and np.isfinite(list(found.values())).all()
    assert measure(LOGITS + 1000, TARGETS)["val_loss"] == pytest.approx(
        -log_softmax(LOGITS, axis=1)[np.arange(60), TARGETS].mean(), abs=1e-4
    )


@pytest.mark.parametrize("metric", METRICS)
def test_the_better_one_and_ties(metric: str) -> None:
    """On fifty images, many epochs have the same accuracy: the surer one is the better."""
    low, high = {f"val_{m}": 0.5 for m in METRICS}, {f"val_{m}": 0.6 for m in METRICS}
    assert better(metric, high, low) == (metric != "loss") and better(metric, low, high) == (metric == "loss")
    assert not better(metric, low, low), "an equal one is not better: the first is kept"
    surer = low | {"val_loss": 0.4}
    assert better(metric, surer, low) and not better(metric, low, surer)
    assert merit("loss", {"val_loss": 0.3}) == -0.3 and merit("auroc", {"val_auroc": 0.3}) == 0.3
