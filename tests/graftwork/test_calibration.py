"""Temperature scaling: confidence as large as accuracy, and never another label."""

import numpy as np
import pytest

from graftwork.calibration import fit_temperature, probabilities
from graftwork.metrics import calibration


def boastful(examples: int, by: float, seed: int = 0):
    """Return logits that are ``by`` times too large for how often they are right, and the labels."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 1.5, (examples, 5))
    chances = np.exp(honest) / np.exp(honest).sum(1, keepdims=True)
    targets = (chances.cumsum(1) > rng.random((examples, 1))).argmax(1)
    return (by * honest).astype(np.float32), targets


@pytest.mark.parametrize("by", [0.4, 1.0, 3.0])
def test_the_temperature_is_found(by: float) -> None:
    """An over-confident model would be believed, an under-confident one overruled."""
    logits, targets = boastful(4000, by)
    assert fit_temperature(logits, targets) == pytest.approx(by, rel=0.08)


def test_calibration_error_falls_on_examples_it_has_not_seen() -> None:
    """A temperature that only suits its own validation images would be no use in service."""
    logits, targets = boastful(8000, 3.0)
    temperature = fit_temperature(logits[:4000], targets[:4000])
    before, after = (calibration(targets[4000:], probabilities(logits[4000:], t))[0] for t in (1.0, temperature))
    assert after < before / 4


def test_no_label_changes() -> None:
    """Calibration is about confidence: a changed label would make the evaluation that of another model."""
    logits, _ = boastful(5000, 1.0)
    for temperature in (0.05, 0.3, 1.0, 4.0, 20.0):
        assert (probabilities(logits, temperature).argmax(1) == logits.argmax(1)).all()


def test_few_examples_decide_little() -> None:
    """Ten validation images, all of them right, would make every prediction certain."""
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]] * 2
    assert 0.2 < fit_temperature(logits, logits.argmax(1)) < 1
    assert fit_temperature(logits[:0], logits[:0].argmax(1)) == 1
