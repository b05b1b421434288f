"""What is decided on validation: the metrics of an epoch or a candidate, and which of two is better."""

from typing import Any

import numpy as np
import numpy.typing as npt

METRICS = ("accuracy", "macro_f1", "auroc", "loss")
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def measure(logits: Floats, targets: Ints, wanted: tuple[str, ...] = ("accuracy", "loss")) -> dict[str, float]:
    """Return ``val_METRIC`` for each wanted one, from logits (N, classes) and targets (N,); all are 0 where there are no examples.

    ``auroc`` is the mean over the classes of one against the rest; a class without examples, or with nothing else, is left out.
    """
    if not len(targets):
        return {f"val_{name}": 0.0 for name in wanted}
    found: dict[str, float] = {}
    for name in wanted:
        if name == "accuracy":
            found["val_accuracy"] = float((logits.argmax(1) == targets).mean())
        elif name == "loss":
            from scipy.special import log_softmax

            chosen = log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(targets)), targets]
            found["val_loss"] = float(-chosen.mean())
        elif name == "macro_f1":
            from sklearn.metrics import f1_score

            labels = np.unique(targets)
            f1 = f1_score(targets, logits.argmax(1), labels=labels, average="macro", zero_division=0)
            found["val_macro_f1"] = float(f1)
        elif name == "auroc":
            from scipy.special import softmax
            from sklearn.metrics import roc_auc_score

            scores = softmax(logits.astype(np.float64), axis=1)
            present = [c for c in np.unique(targets) if 0 < (targets == c).sum() < len(targets)]
            areas = [roc_auc_score(targets == c, scores[:, c]) for c in present]
            found["val_auroc"] = float(np.mean(areas)) if areas else 0.0
    return found


def better(metric: str, candidate: dict[str, float], best: dict[str, float]) -> bool:
    """Tell whether ``candidate`` beats ``best``. A tie in the metric, common on a small validation split, goes to the smaller loss."""
    return rank(metric, candidate) > rank(metric, best)


def rank(metric: str, values: dict[str, float]) -> tuple[float, float]:
    """Return what candidates are ordered by, the best last."""
    return merit(metric, values), -values["val_loss"]


def merit(metric: str, values: dict[str, Any]) -> float:
    """Return the metric as a number of which more is better."""
    value = float(values[f"val_{metric}"])
    return -value if metric == "loss" else value
