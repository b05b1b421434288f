"""``--preprocess auto`` for images: crop, squash or pad, and the resolution, chosen on validation with frozen features, at almost no cost."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from graftwork.batches import examples_of
from graftwork.dataset import Dataset
from graftwork.execution import Inference, default_execution
from graftwork.images import Preprocess
from graftwork.modality import Backbone
from graftwork.model import batches, ready_device
from graftwork.selection import measure
from graftwork.settings import FeatureSettings

EXAMPLES = 1000  # of each split, at most
SIZES = (0.45, 0.7, 1.0)  # of the backbone's own, in whole multiples of 32 pixels
STRENGTH = 0.005  # of the probe: the middle of those that the baseline tries
# A larger input costs time in every later step: it has to earn it by this much of the validation loss.
WORTH = 0.03


def choose_preprocess(
    dataset: Dataset, settings: FeatureSettings, backbone: Backbone, note: Callable[[str], None]
) -> tuple[Preprocess, list[dict[str, Any]]]:
    """Return the preprocessing with the smallest validation loss of a probe, and what was tried, with its loss and accuracy.

    Ties within ``WORTH`` go to the smaller input. Where ``image_size`` is given, or the network is built for one size, it stays.
    """
    from graftwork.features import Penultimate

    device = ready_device()
    rows = {split: spread(dataset.split(split)) for split in ("train", "val")}
    targets = {split: dataset.targets(part) for split, part in rows.items()}
    if not len(rows["val"]) or len(np.unique(targets["train"])) < 2:
        note("preprocess auto: there is no validation split to choose on; the backbone's own is kept")
        return backbone.preprocess, []
    module = Penultimate(backbone.network.to(device, memory_format=torch.channels_last).eval())
    tried: list[dict[str, Any]] = []
    for candidate in candidates(dataset, settings, backbone):
        run = Inference(module, candidate, device, default_execution(settings, device, candidate))
        features = {
            split: np.concatenate(
                [run(batch).numpy() for batch in batches(examples_of(dataset, part, candidate), candidate)]
            )
            for split, part in rows.items()
        }
        scaler = StandardScaler().fit(features["train"])
        probe = LogisticRegression(C=STRENGTH, max_iter=200, tol=1e-3)
        with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():  # as in the baseline
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe.fit(scaler.transform(features["train"]), targets["train"])
        logits = np.full((len(targets["val"]), len(dataset.classes)), -30.0, np.float32)
        scores = probe.decision_function(scaler.transform(features["val"]))
        scores = np.stack([-scores, scores], 1) / 2 if scores.ndim == 1 else scores
        logits[:, probe.classes_] = scores
        tried.append({"preprocess": candidate.model_dump(), **measure(logits, targets["val"])})
    best = min(point["val_loss"] for point in tried)
    close = [point for point in tried if point["val_loss"] <= best * (1 + WORTH)]
    chosen = min(close, key=lambda point: (point["preprocess"]["size"], point["val_loss"]))
    found = Preprocess(**chosen["preprocess"])
    note(
        f"preprocess: {describe(found)}, validation loss {chosen['val_loss']:.3f}; tried "
        + ", ".join(f"{describe(Preprocess(**p['preprocess']))} {p['val_loss']:.3f}" for p in tried if p is not chosen)
    )
    return found, tried


def candidates(dataset: Dataset, settings: FeatureSettings, backbone: Backbone) -> list[Preprocess]:
    """Return what is tried: every way to fit an image into the square that gives other pixels, at every size."""
    own = backbone.preprocess
    fixed = settings.image_size or backbone.args or backbone.fixed_size
    sizes = [own.size] if fixed else sorted({max(32, round(own.size * share / 32) * 32) for share in SIZES})
    square = all(
        w == h
        for w, h in zip(dataset.manifest["width"].to_pylist(), dataset.manifest["height"].to_pylist(), strict=True)
    )
    ways: list[dict[str, Any]] = [{"resize": "crop", "crop_pct": 1.0}, {"resize": "crop", "crop_pct": 0.875}]
    if not square:  # else all of these are the first
        ways += [{"resize": "squash", "crop_pct": 1.0}, {"resize": "pad", "crop_pct": 1.0}]
    return [own.model_copy(update={"size": size, **way}) for size in sizes for way in ways]


def spread(rows: Any) -> Any:
    """Return at most ``EXAMPLES`` of ``rows``, evenly spread: they are sorted by label, so every class keeps its share."""
    if len(rows) <= EXAMPLES:
        return rows
    return rows.take(np.linspace(0, len(rows) - 1, EXAMPLES).astype(np.int64))


def describe(preprocess: Preprocess) -> str:
    crop = f" {preprocess.crop_pct:g}" if preprocess.resize == "crop" else ""
    return f"{preprocess.resize}{crop} at {preprocess.size} px"
