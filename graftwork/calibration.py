"""Temperature scaling: one number by which a model's logits are divided, so that its confidence is as large as its accuracy (Guo et al. 2017).

It is fitted on validation and kept in ``model.json``; it never changes a label. Needs neither torch nor scikit-learn.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
# What is believed of the logarithm of a temperature before any example is seen: few examples, all of them right, would make it nought.
SPREAD = 0.5
RANGE = (0.05, 20.0)


def fit_temperature(logits: Floats, targets: Ints) -> float:
    """Return the temperature with the smallest log-loss on ``logits`` (N, classes) with ``targets`` (N,); 1 where there are no examples.

    A prior, normal in the logarithm, keeps few examples from deciding too much: by a thousand it has no weight.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    if not len(targets) or not np.isfinite(logits).all():
        return 1.0
    scores = logits.astype(np.float64)

    def loss(log_temperature: float) -> float:
        right = log_softmax(scores / np.exp(log_temperature), axis=1)[np.arange(len(targets)), targets]
        return float(-right.sum() + log_temperature**2 / (2 * SPREAD**2))

    found = minimize_scalar(loss, bounds=tuple(np.log(RANGE)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def probabilities(logits: Floats, temperature: float = 1.0) -> Floats:
    """Return ``softmax(logits / temperature)``, shape (N, classes), float32."""
    from scipy.special import softmax

    return softmax(logits.astype(np.float64) / temperature, axis=1).astype(np.float32)
