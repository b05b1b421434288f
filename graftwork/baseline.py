"""The baseline: a linear probe on frozen features, folded into the network's head, so that it is a Model like any other.

This step imports neither torch nor timm: it changes one matrix in a file.
"""

import json
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from graftwork.calibration import fit_temperature
from graftwork.errors import UserError
from graftwork.modality import transforms
from graftwork.model import read_info, read_tensors, save_model
from graftwork.selection import METRICS, measure

STRENGTHS = (
    1e-4,
    5e-4,
    1e-3,
    2e-3,
    5e-3,
    1e-2,
    3e-2,
    0.1,
    1.0,
)  # scikit-learn's C: the smaller, the stronger the L2 penalty
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Probe(NamedTuple):
    """A linear classifier on raw features: ``features @ weight.T + bias``. Shapes (classes, D) and (classes,)."""

    weight: Floats
    bias: Floats


def train_baseline(embeddings: Path, folder: Path) -> dict[str, Any]:
    """Write the Model artifact of the probe; return its ``model.json``.

    The strength is chosen on validation. The probe that is kept is then fitted again on train and validation together: labels are dear.
    ``selection`` holds the accuracy of the one fitted on train alone, which has not seen validation; that one is kept
    beside it, in ``probe.safetensors``, as the head from which fine-tuning starts.
    """
    started = time.perf_counter()
    info = json.loads((embeddings / "embeddings.json").read_text(encoding="utf-8"))
    features = {split: np.load(embeddings / f"features-{split}.npy", allow_pickle=False) for split in ("train", "val")}
    position = {c: n for n, c in enumerate(info["classes"])}
    index = {split: pq.read_table(embeddings / f"index-{split}.parquet") for split in ("train", "val")}
    targets = {
        split: np.array([position[label] for label in rows["label"].to_pylist()], dtype=np.int64)
        for split, rows in index.items()
    }
    # Of a mean of 1: the penalty's strength means the same whatever the scale of the weights.
    weights = {split: rows["weight"].to_numpy() for split, rows in index.items()}
    weights = {split: w / w.mean() if len(w) else w for split, w in weights.items()}
    views = len(features["train"])
    flat = {
        split: array.reshape(-1, array.shape[-1]) for split, array in features.items()
    }  # every view is an example to learn from
    repeated = {split: np.tile(targets[split], views) for split in targets}
    counted = {split: np.tile(weights[split], views) for split in targets}
    # The penalty is weighed against a sum over the examples: V views of each want a V-th of what one view wants. One view is enough
    # to choose it, in a sixth of the time.
    _, single, curve = choose_strength(
        features["train"][0], targets["train"], features["val"][0], targets["val"], len(position), weights["train"]
    )
    strength = single / views
    probe, _ = fit_probe(flat["train"], repeated["train"], strength, len(position), weights=counted["train"])
    final = probe
    if len(targets["val"]):
        final, _ = fit_probe(
            np.concatenate([flat["train"], flat["val"]]),
            np.concatenate([repeated["train"], repeated["val"]]),
            strength,
            len(position),
            weights=np.concatenate([counted["train"], counted["val"]]),
        )
    # Of the probe that has not seen validation: the final one's confidence there would be that of training.
    logits = logits_of(probe, features["val"][0])
    found = measure(logits, targets["val"], METRICS)
    source = embeddings / "backbone"
    tensors = read_tensors(source, read_info(source))
    shape = tensors[
        f"{info['head']}.weight"
    ].shape  # (classes, D), or (classes, D, 1, 1) where the head is a convolution
    return save_model(
        folder,
        {**tensors, f"{info['head']}.weight": final.weight.reshape(shape), f"{info['head']}.bias": final.bias},
        {
            **{k: v for k, v in info.items() if k != "format"},
            "candidate": "baseline",
            "seconds": info["seconds"] + time.perf_counter() - started,  # with those of its features
            "selection": {
                "metric": "val_accuracy",
                "value": found["val_accuracy"],
                "examples": len(targets["val"]),
                "val": found,
            },
            "temperature": fit_temperature(logits, targets["val"]),
            "hyperparameters": {"C": strength, "refit": "train+val"},
            "history": curve,
        },
        beside={"probe.safetensors": {"weight": probe.weight.reshape(shape), "bias": probe.bias}},
        files=transforms(info).read_preprocess(info["preprocess"], source).files(),
    )


def choose_strength(
    features: Floats,
    targets: Ints,
    val_features: Floats,
    val_targets: Ints,
    classes: int,
    weights: npt.NDArray[np.float64] | None = None,
) -> tuple[Probe, float, list[dict[str, float]]]:
    """Fit a probe at every strength; return the one with the smallest validation loss, its strength, and the curve.

    The loss decides, not the accuracy: on a few hundred examples it is far the steadier of the two. With no validation at all, the middle of the range.
    """
    curve: list[dict[str, float]] = []
    probes: list[Probe] = []
    model: Any = None
    for strength in STRENGTHS:
        if (
            len(curve) > 2
            and len(val_targets)
            and curve[-1]["val_loss"] > curve[-2]["val_loss"] > curve[-3]["val_loss"]
        ):
            break  # the loss over the strength has one valley, and the weak penalties beyond it are the slow ones
        probe, model = fit_probe(features, targets, strength, classes, model, weights)
        probes.append(probe)
        curve.append({"C": strength, **measure(logits_of(probe, val_features), val_targets)})
    best = min(range(len(curve)), key=lambda n: curve[n]["val_loss"]) if len(val_targets) else len(curve) // 2
    return probes[best], STRENGTHS[best], curve


def fit_probe(
    features: Floats,
    targets: Ints,
    strength: float,
    classes: int,
    start: Any = None,
    weights: npt.NDArray[np.float64] | None = None,
) -> tuple[Probe, Any]:
    """Fit a multinomial logistic regression on standardised features and fold the standardisation into its weights.

    ``weights`` (N,), of a mean of 1, are those of the examples. Standardisation takes them all alike.
    Returns scikit-learn's model as well: given as ``start``, the next strength begins where this one ended, in half the steps.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    seen = np.unique(targets)
    if len(seen) < 2:
        raise UserError("baseline: the training split holds only one class; give more labelled images, or other splits")
    mean, std = features.mean(0), features.std(0) + 1e-6
    # OpenBLAS's threads wait by spinning, whatever OMP_WAIT_POLICY says, and products of this size gain nothing by them: measured with
    # 6,000 x 1,280 features on two cores that other programs use as well, 4 s with one thread and 39 s with two.
    threads = threadpool_limits(1 if features.size < 2e7 else None, user_api="blas")
    with threads, warnings.catch_warnings():
        # Weak penalties need many steps; an unfinished one competes on validation as it is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = start if start is not None else LogisticRegression(max_iter=300, tol=1e-3, warm_start=True)
        fitted.set_params(C=strength).fit(
            (features - mean) / std, targets, sample_weight=None if weights is None or (weights == 1).all() else weights
        )
    coefficients, intercept = fitted.coef_, fitted.intercept_
    if (
        len(seen) == 2
    ):  # scikit-learn gives one row, the logit of the second class: half to each keeps the same probabilities
        coefficients, intercept = (
            np.concatenate([-coefficients, coefficients]) / 2,
            np.concatenate([-intercept, intercept]) / 2,
        )
    weight = np.zeros((classes, features.shape[1]), np.float64)
    bias = np.full(classes, intercept.min() - 10.0)  # a class with no training example is not predicted
    weight[seen] = coefficients / std
    bias[seen] = intercept - weight[seen] @ mean
    return Probe(weight.astype(np.float32), bias.astype(np.float32)), fitted


def logits_of(probe: Probe, features: Floats) -> Floats:
    return features @ probe.weight.T + probe.bias
