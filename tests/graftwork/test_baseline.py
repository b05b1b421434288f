"""The baseline: a probe that is a model like any other."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from graftwork.baseline import STRENGTHS, choose_strength, fit_probe, logits_of
from graftwork.batches import Examples
from graftwork.errors import UserError
from graftwork.model import load_model, predict, read_info
from graftwork.selection import METRICS, measure


def clusters(classes: int, examples: int, seed: int = 0, spread: float = 1.0):
    rng, scale = np.random.default_rng(seed), np.tile([1.0, 10.0, 100.0], 4)
    centres = np.random.default_rng(99).normal(size=(classes, 12)) * scale
    targets = np.arange(examples) % classes
    noise = rng.normal(size=(examples, 12)) * scale * spread
    return (centres[targets] + noise).astype(np.float32), targets


@pytest.mark.parametrize("classes", [2, 5])
def test_folding_gives_scikit_learns_probabilities(classes: int) -> None:
    """A mistake in folding the standardisation away would make the saved model another one than the one that was fitted."""
    features, targets = clusters(classes, 200)
    probe, _ = fit_probe(features, targets, 0.1, classes)
    scaler = StandardScaler().fit(features)
    reference = LogisticRegression(C=0.1, max_iter=300, tol=1e-3).fit(scaler.transform(features), targets)
    logits = features @ probe.weight.T + probe.bias
    ours = np.exp(logits - logits.max(1, keepdims=True))
    ours /= ours.sum(1, keepdims=True)
    np.testing.assert_allclose(ours, reference.predict_proba(scaler.transform(features)), atol=2e-3)


def test_a_class_without_examples_is_never_predicted() -> None:
    """A class that is only in the test set must cost its own examples, not everybody's."""
    features, targets = clusters(3, 90)
    targets[targets == 1] = 2
    probe, _ = fit_probe(features, targets, 0.1, 3)
    assert not ((features @ probe.weight.T + probe.bias).argmax(1) == 1).any()


def test_one_class_is_refused() -> None:
    """scikit-learn's own error does not tell what to do."""
    with pytest.raises(UserError, match="only one class"):
        fit_probe(np.ones((4, 3), np.float32), np.zeros(4, np.int64), 1.0, 2)


def test_strength_is_chosen_on_validation() -> None:
    """With a fixed strength the baseline would be weak on some data, and fine-tuning look better than it is."""
    features, targets = clusters(4, 60)
    val_features, val_targets = clusters(4, 400, seed=1)
    probe, strength, curve = choose_strength(features, targets, val_features, val_targets, 4)
    best = min(curve, key=lambda point: point["val_loss"])
    assert strength == best["C"] in STRENGTHS
    found = measure(logits_of(probe, val_features), val_targets)
    assert found == {k: best[k] for k in ("val_accuracy", "val_loss")}
    assert best["val_loss"] < curve[0]["val_loss"], "the strongest penalty is not simply taken"


def test_artifact_predicts_what_the_probe_does(dataset, baseline: Path) -> None:
    """A baseline that is no real model could be neither served nor compared."""
    info = read_info(baseline)
    model = load_model(baseline, "cpu")
    images = Examples(dataset, "val", model.preprocess)
    accuracy = (predict(model, images).argmax(1) == images.targets.numpy()).mean()
    assert accuracy > 0.5
    assert accuracy >= info["selection"]["value"], "refitted on train and validation, it knows the validation examples"
    assert info["selection"]["examples"] == len(images) == 60
    assert set(info["selection"]["val"]) == {f"val_{m}" for m in METRICS}, "the candidates are compared by any of them"
    assert info["selection"]["val"]["val_accuracy"] == info["selection"]["value"]
    json.dumps(info, allow_nan=False)


def test_probe_for_fine_tuning_has_not_seen_validation(baseline: Path) -> None:
    """If the head that fine-tuning starts from had seen validation, the choice of epoch and of candidate would be a lie."""
    final, info = load_file(baseline / "model.safetensors"), read_info(baseline)
    probe = load_file(baseline / "probe.safetensors")
    assert probe["weight"].shape == final[f"{info['head']}.weight"].shape
    assert not np.array_equal(probe["weight"], final[f"{info['head']}.weight"])


def test_the_probe_heeds_the_weights_of_examples() -> None:
    """A user who gives doubtful labels a small weight would have them counted in full."""
    random = np.random.default_rng(0)
    features = random.normal(size=(400, 6)).astype(np.float32)
    targets = (features[:, 0] > 0).astype(np.int64)
    wrong = random.random(400) < 0.4
    noisy = np.where(wrong, 1 - targets, targets)
    weights = np.where(wrong, 0.01, 1.0)
    right = [
        float((logits_of(fit_probe(features, noisy, 0.1, 2, weights=w)[0], features).argmax(1) == targets).mean())
        for w in (None, weights / weights.mean())
    ]
    assert right[1] > 0.97 and right[1] > right[0] + 0.02
