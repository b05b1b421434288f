"""Metrics: figures that scikit-learn agrees with, intervals that are theirs, and never a NaN."""

import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
    top_k_accuracy_score,
)

from graftwork import metrics
from graftwork.calibration import probabilities
from graftwork.errors import UserError
from graftwork.metrics import HEADLINES, LOWER_IS_BETTER, calibration, compare, measure_one, score
from graftwork.settings import EvaluateSettings

SETTINGS = EvaluateSettings(resamples=200)


def drawn(seed: int, examples: int, classes: int, ties: bool = False, gain: float = 1.5):
    """Labels and logits that know something of them; with ties, few different logits."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, examples)
    logits = rng.normal(size=(examples, classes)).astype(np.float32)
    logits[np.arange(examples), targets] += gain
    return targets, np.round(logits) if ties else logits


def by_scikit_learn(targets, chances) -> dict[str, float]:
    """The headlines written down once more, straight from scikit-learn."""
    said, labels = chances.argmax(1), np.unique(targets)
    some = [c for c in labels if (targets == c).sum() < len(targets)]
    mean = {"labels": labels, "average": "macro", "zero_division": 0}
    return {
        "accuracy": accuracy_score(targets, said),
        "macro_precision": precision_score(targets, said, **mean),
        "macro_recall": recall_score(targets, said, **mean),
        "balanced_accuracy": recall_score(targets, said, **mean),
        "macro_f1": f1_score(targets, said, **mean),
        "log_loss": log_loss(targets, chances, labels=np.arange(chances.shape[1])),
        "auroc": np.mean([roc_auc_score(targets == c, chances[:, c]) for c in some]) if some else np.nan,
        "average_precision": np.mean([average_precision_score(targets == c, chances[:, c]) for c in some])
        if some
        else np.nan,
        "ece": calibration(targets, chances)[0],
    }


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("examples", "classes"), [(300, 10), (40, 12), (12, 3), (60, 2)])
def test_figures_are_scikit_learns(examples: int, classes: int, ties: bool) -> None:
    """If a figure differs from the library that everybody checks with, nobody believes the rest."""
    targets, logits = drawn(examples, examples, classes, ties)
    names = [f"c{n}" for n in range(classes)]
    found = score(targets, logits, names, SETTINGS, temperature=1.7)
    chances = probabilities(logits, 1.7)
    for name, value in by_scikit_learn(targets, chances).items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
        assert measure_one(name, targets, chances) == pytest.approx(found[name], abs=1e-9), name
    if len(np.unique(targets)) == classes:
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(targets, logits.argmax(1)))
    assert found["log_loss_uncalibrated"] == pytest.approx(
        log_loss(targets, probabilities(logits), labels=range(classes))
    )
    assert np.array(found["confusion"]).trace() == (targets == logits.argmax(1)).sum()
    assert found["top_k"] == {12: 5, 10: 3}.get(classes)
    if found["top_k"] and not ties:
        expected = top_k_accuracy_score(targets, chances, k=found["top_k"], labels=range(classes))
        assert found["top_k_accuracy"] == pytest.approx(expected)
    assert found["top_k_accuracy"] is None or found["top_k_accuracy"] >= found["accuracy"]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("examples", "classes"), [(200, 10), (25, 12), (9, 3), (2, 7)])
def test_every_resample_is_scored_as_scikit_learn_would(examples: int, classes: int, ties: bool) -> None:
    """Intervals around another statistic than the one reported would mislead."""
    targets, logits = drawn(examples, examples, classes, ties)
    chances = probabilities(logits)
    rng = np.random.default_rng(3)
    rows = rng.integers(0, examples, (30, examples))
    rows[0] = np.arange(examples)
    rows[1] = 0  # of one class alone
    counts = np.stack([np.bincount(row, minlength=examples) for row in rows], 1).astype(np.float32)
    names = [name for name in HEADLINES if measure_one(name, targets, chances) is not None]
    found = metrics.sums_to_metrics(names, targets, chances.argmax(1), chances)(counts)
    for number, row in enumerate(rows):
        expected = by_scikit_learn(targets[row], chances[row])
        expected["top_k_accuracy"] = measure_one("top_k_accuracy", targets[row], chances[row])
        for name, value in zip(names, found[:, number], strict=True):
            assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-6, nan_ok=True), (name, number)


def test_intervals_hold_their_figures_and_narrow_with_the_examples() -> None:
    """An interval beside its figure, or one that does not care how much was tested, would decide wrongly."""
    widths = []
    for examples in (200, 3200):
        found = score(*drawn(5, examples, 8), list("abcdefgh"), SETTINGS)
        for name in HEADLINES:
            low, high = found[f"{name}_interval"]
            assert low <= found[name] <= high, name
        widths.append([np.ptp(found[f"{name}_interval"]) for name in HEADLINES if name != "ece"])
    np.testing.assert_allclose(np.array(widths[0]) / widths[1], 4, rtol=0.35)
    assert found == score(*drawn(5, examples, 8), list("abcdefgh"), SETTINGS), "the same seed gives the same intervals"


def test_interval_covers_what_it_should() -> None:
    """A 95 % interval that covers the truth in 70 % of the cases would call noise a gain."""
    rng = np.random.default_rng(1)
    settings = EvaluateSettings(resamples=300)
    covered = np.zeros(3)
    for trial in range(150):
        right = rng.random(200) < 0.8
        other = np.where(rng.random(200) < 0.5, right, rng.random(200) < 0.8)
        targets = np.zeros(200, np.int64)
        mine, theirs = (probabilities(np.stack([x * 1.0, ~x * 1.0], 1).astype(np.float32)) for x in (right, other))
        seeded = settings.model_copy(update={"seed": trial})
        alone = metrics.intervals(["accuracy"], targets, mine.argmax(1), mine, {"accuracy": right.mean()}, 300, seeded)
        low, high = alone["accuracy_interval"]
        both = compare(targets, mine, theirs, seeded)  # in truth, they are alike
        covered += [low <= 0.8 <= high, both["interval"][0] <= 0 <= both["interval"][1], both["lower_bound"] <= 0]
    assert (np.abs(covered / 150 - 0.945) < 0.045).all(), covered


@pytest.mark.parametrize(
    ("case", "note"),
    [
        ("one class", "all test examples are of one class (a)"),
        ("one example", "only 1 test example:"),
        ("ten images, all right", "every resample gives the same figure"),
        ("classes without images", "without test examples, and left out of the macro means: c, d"),
        ("equal logits", ""),
        ("a class with one image", "fewer than 10 test examples, so that their own figures say little: b"),
        ("certain and wrong", "every resample"),
    ],
)
def test_never_a_nan(case: str, note: str) -> None:
    """A NaN is no JSON: the evaluation of an odd test set would end in a trace, after all the training."""
    targets, logits = drawn(0, 40, 4)
    if case == "one class":
        targets[:] = 0
    elif case == "one example":
        targets, logits = targets[:1], logits[:1]
    elif case == "ten images, all right":
        targets = np.arange(10) % 4
        logits = 9 * np.eye(4, dtype=np.float32)[targets]
    elif case == "classes without images":
        targets %= 2
    elif case == "equal logits":
        logits[:] = 0
    elif case == "a class with one image":
        targets = (np.arange(40) == 7).astype(np.int64)
    else:
        logits = 1e4 * np.eye(4, dtype=np.float32)[(targets + 1) % 4]
    found = score(targets, logits, list("abcd"), SETTINGS, temperature=0.3)
    json.dumps(found, allow_nan=False)
    json.dumps(
        [compare(targets, probabilities(logits), probabilities(-logits), SETTINGS, m) for m in HEADLINES],
        allow_nan=False,
    )
    assert note in " ".join(found["notes"]), found["notes"]
    low, high = found["accuracy_interval"]
    assert 0 <= low <= found["accuracy"] <= high <= 1 and high - low > 0.05, "nothing is certain with so few"
    for row in found["per_class"]:
        assert (row["recall"] is None) == (row["recall_interval"] is None) == (row["examples"] == 0)
    if case == "one class":
        assert found["auroc"] is None and found["average_precision_interval"] is None


def test_confusion_and_class_figures_with_an_absent_class() -> None:
    """A class with no test image must not become a zero in the report, nor a division by zero."""
    found = score(np.array([0, 0, 1]), 5 * np.eye(3, dtype=np.float32)[[0, 1, 1]], list("abc"), SETTINGS)
    assert found["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    a, b, c = found["per_class"]
    assert (a["recall"], a["precision"], b["precision"]) == (0.5, 1, 0.5)
    assert {key: c[key] for key in ("recall", "precision", "f1", "auroc")} == dict.fromkeys(
        ("recall", "precision", "f1", "auroc")
    )
    assert found["macro_recall"] == pytest.approx(0.75), "the absent class is no zero in the mean"


def test_calibration_never_changes_a_label() -> None:
    """Accuracy that moves with the temperature would be of another model than the one that was trained."""
    targets, logits = drawn(2, 400, 6)
    names = list("abcdef")
    cold, hot = (score(targets, logits, names, SETTINGS, temperature=t) for t in (0.05, 20.0))
    for key in ("accuracy", "accuracy_interval", "macro_f1", "top_k_accuracy", "confusion", "ece_uncalibrated"):
        assert cold[key] == hot[key], key
    assert cold["ece"] != hot["ece"] and cold["reliability_uncalibrated"] == hot["reliability_uncalibrated"]
    plain = score(targets, logits, names, SETTINGS)
    assert (plain["ece"], plain["log_loss"]) == (plain["ece_uncalibrated"], plain["log_loss_uncalibrated"])


def test_calibration_error() -> None:
    """An over-confident model would pass for a calibrated one."""
    rng = np.random.default_rng(2)
    confidence = rng.uniform(0.5, 1, 20_000)
    targets = (rng.random(20_000) > confidence).astype(np.int64)
    honest = np.stack([confidence, 1 - confidence], 1).astype(np.float32)
    assert calibration(targets, honest)[0] < 0.02
    boastful = np.tile(np.float32([[0.99, 0.01]]), (20_000, 1))
    error, bins = calibration(targets, boastful)
    assert error == pytest.approx(0.99 - (targets == 0).mean(), abs=1e-3)
    assert [b["examples"] for b in bins] == [20_000]


def test_roc_curve_is_short_and_true() -> None:
    """A curve of a million points would be the whole report; one that cuts corners would flatter."""
    targets, logits = drawn(4, 1000, 10)
    found = score(targets, logits, [str(n) for n in range(10)], SETTINGS)["roc"]
    assert len(found["fpr"]) == len(found["tpr"]) == len(found["threshold"]) <= 100
    assert (found["fpr"][0], found["tpr"][0], found["fpr"][-1], found["tpr"][-1]) == (0, 0, 1, 1)
    hot, chances = targets[:, None] == np.arange(10), probabilities(logits)
    fpr, tpr, _ = roc_curve(hot.ravel(), chances.ravel())
    assert np.trapezoid(found["tpr"], found["fpr"]) == pytest.approx(np.trapezoid(tpr, fpr), abs=0.002)


def test_comparison_is_paired_and_positive_is_better() -> None:
    """A sign the wrong way round would put the worse model into service."""
    targets, weak = drawn(7, 600, 10, gain=1.0)
    strong = weak.copy()
    strong[np.arange(600), targets] += 0.7
    mine, theirs = probabilities(strong), probabilities(weak)
    for metric in HEADLINES:
        found, back = compare(targets, mine, theirs, SETTINGS, metric), compare(targets, theirs, mine, SETTINGS, metric)
        assert found["difference"] == pytest.approx(-back["difference"])
        direction = -1 if metric in LOWER_IS_BETTER else 1
        assert found["difference"] == pytest.approx(direction * (found["mine"] - found["theirs"]))
        if metric != "ece":
            assert found["interval"][0] < found["difference"] < found["interval"][1]
            assert 0 < found["interval"][0] < found["lower_bound"] < found["difference"] and back["lower_bound"] < 0
        assert (found["only_mine_right"], found["only_theirs_right"]) == (
            back["only_theirs_right"],
            back["only_mine_right"],
        )
        assert found["p_value"] == pytest.approx(back["p_value"]) and found["p_better"] < 0.01 < 0.99 < back["p_better"]
    # Paired: narrower than the difference of two models that were tested on other examples.
    widths = [np.ptp(score(targets, logits, ["c"] * 10, SETTINGS)["accuracy_interval"]) for logits in (strong, weak)]
    assert np.ptp(compare(targets, mine, theirs, SETTINGS)["interval"]) < 0.8 * np.hypot(*widths)
    alike = compare(targets, mine, mine, SETTINGS)
    assert (alike["difference"], alike["interval"], alike["lower_bound"]) == (0, [0, 0], 0)
    assert (alike["p_value"], alike["p_better"]) == (1, 1)


def test_mcnemars_test_is_the_exact_one() -> None:
    """Five of six images gained is no proof, and the approximation would say it is."""
    targets = np.zeros(20, np.int64)
    right, wrong = np.float32([0.9, 0.1]), np.float32([0.1, 0.9])
    mine = np.array([right] * 15 + [wrong] * 5)
    theirs = np.array([wrong] * 5 + [right] * 11 + [wrong] * 4)
    found = compare(targets, mine, theirs, SETTINGS)
    assert (found["only_mine_right"], found["only_theirs_right"], found["examples"]) == (5, 1, 20)
    assert (found["p_value"], found["p_better"]) == (pytest.approx(14 / 64), pytest.approx(7 / 64))


def test_three_images_prove_nothing() -> None:
    """All of three right against none of three: no resample says otherwise, and a new champion would stand on three images."""
    right, wrong = (np.tile(np.float32(row), (3, 1)) for row in ([[0.9, 0.1]], [[0.1, 0.9]]))
    found, back = (compare(np.zeros(3, np.int64), *pair, SETTINGS) for pair in ((right, wrong), (wrong, right)))
    assert found["difference"] == 1 and found["lower_bound"] < 0.1 and found["interval"][0] < found["lower_bound"]
    assert back["interval"] == [-1, -found["interval"][0]] and back["lower_bound"] == -1
    many = compare(np.zeros(3000, np.int64), np.repeat(right, 1000, 0), np.repeat(wrong, 1000, 0), SETTINGS)
    assert many["lower_bound"] > 0.99
    alone = compare(np.zeros(1, np.int64), right[:1], right[:1], SETTINGS)
    assert alone["difference"] == 0 and alone["interval"] is None and alone["lower_bound"] is None


def test_many_classes_have_fewer_resamples_of_the_order_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of a thousand classes would take an hour, or be cut short without a word."""
    monkeypatch.setattr(metrics, "RANK_WORK", 500 * 20 * 250)
    targets, logits = drawn(8, 500, 20)
    found = score(targets, logits, [str(n) for n in range(20)], EvaluateSettings(resamples=400))
    assert any("of 250 resamples, not 400" in note for note in found["notes"])
    assert found["auroc_interval"][0] < found["auroc"] < found["auroc_interval"][1]


def test_what_cannot_be_evaluated_is_one_line() -> None:
    """A network that diverged would get figures, or a trace."""
    targets, logits = drawn(9, 10, 3)
    with pytest.raises(UserError, match="test split: is empty"):
        score(targets[:0], logits[:0], list("abc"), SETTINGS)
    logits[3, 1] = np.nan
    with pytest.raises(UserError, match="no finite number for 1 of 10 test examples"):
        score(targets, logits, list("abc"), SETTINGS)


def test_importing_is_quick() -> None:
    """Every step would wait seconds for scikit-learn, whether it measures anything or not."""
    code = "import sys, graftwork.metrics; print([m for m in ('sklearn', 'scipy.stats', 'torch') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
    )
