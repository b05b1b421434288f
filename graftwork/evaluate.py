"""Evaluation: every candidate on the same test images, with intervals; the choice among them is made on validation alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from graftwork.batches import Progress, SplitImages
from graftwork.dataset import Dataset
from graftwork.errors import UserError
from graftwork.execution import Execution, plan_inference
from graftwork.files import finished_folder, write_json
from graftwork.model import Floats, Model, load_model, predict, read_info
from graftwork.report import confusion_picture, history_picture, reliability_picture, render_evaluation
from graftwork.selection import merit
from graftwork.settings import EvaluateSettings, ExecutionSettings

Ints = npt.NDArray[np.int64]
# A tie on validation goes to the simpler candidate, which comes first.
CANDIDATES = ("baseline", "fine_tuned", "scratch")


def evaluate(
    dataset: Dataset,
    models: dict[str, Path],
    settings: EvaluateSettings,
    folder: Path,
    progress: Progress = lambda done, total: None,
    note: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Predict the test split with every Model artifact in ``models`` and write the evaluation; return its ``evaluation.json``.

    ``predictions-CANDIDATE.parquet`` has a row an example: id, label, predicted, correct, and a probability a class.

    Raises:
        UserError: the test split is empty.
    """
    rows = dataset.split("test")
    if not len(rows):
        raise UserError("test split: is empty, so nothing can be proved; add test images or raise test_fraction")
    targets = dataset.targets(rows)
    result: dict[str, Any] = {
        "format": "graftwork-evaluation/1",
        "dataset_digest": dataset.digest,
        "examples": len(rows),
        "confidence": settings.confidence,
        "classes": dataset.classes,
        "candidates": {},
    }
    test: SplitImages | None = None
    with finished_folder(folder) as partial:
        for number, (name, path) in enumerate(models.items()):
            model = load_model(path)
            if test is None or test.preprocess != model.preprocess:
                test = SplitImages(dataset, "test", model.preprocess)
            probabilities = predict(
                model,
                test,
                lambda done, n=number: progress(n * len(rows) + done, len(models) * len(rows)),  # type: ignore[misc]
                how_to_run(model, test, note),
            )
            metrics = score(targets, probabilities, settings)
            result["candidates"][name] = {
                "test": metrics,
                "val": model.info["selection"],
                "seconds": model.info["seconds"],
                "sha256": model.info["sha256"],
                "history": model.info.get("history", []),
                "hyperparameters": model.info.get("hyperparameters", {}),
            }
            write_predictions(partial / f"predictions-{name}.parquet", rows, dataset.classes, targets, probabilities)
        result["metric"] = settings.metric
        result["chosen"] = choose(
            {name: merit(settings.metric, info["val"]["val"]) for name, info in result["candidates"].items()},
            # A loss is no share of the examples: one of them can change it by any amount.
            0 if settings.metric == "loss" else len(dataset.split("val")),
        )
        chosen = result["candidates"][result["chosen"]]
        write_json(partial / "evaluation.json", result)
        confusion_picture(np.array(chosen["test"]["confusion"]), dataset.classes, partial / "confusion.png")
        reliability_picture(chosen["test"]["reliability"], partial / "reliability.png")
        for name in models:
            if "epoch" in (chosen["val"] if name == result["chosen"] else result["candidates"][name]["val"]):
                history_picture(result["candidates"][name]["history"], partial / f"history-{name}.png")
        render_evaluation(result, dataset.info, read_info(models[result["chosen"]]), partial)
    return result


def how_to_run(model: Model, test: SplitImages, note: Callable[[str], None]) -> Execution:
    """Choose how the network is run: in fp32, since what is reported must be what the model gives in service."""
    few = torch.arange(min(64, len(test)))
    planned = plan_inference(
        model.network,
        f"{model.info['backbone']}, {len(model.classes)} logits",
        test[few],
        model.preprocess,
        model.device,
        len(test),
        ExecutionSettings(),
        ("fp32",),
    )
    note(f"plan: {planned}")
    return planned.execution


def choose(val_merit: dict[str, float], examples: int = 0) -> str:
    """Return the candidate that is best on validation; test figures play no part.

    The simpler candidate stays unless another is better by more than one and a half of the ``examples`` that decided: the best of
    many epochs on few examples owes its last example to luck. Measured with 10 labels a class, where one validation image decided, the
    probe was four and seven points better in two of three draws.
    """
    order = sorted(val_merit, key=CANDIDATES.index)
    best = order[0]
    for name in order[1:]:
        if val_merit[name] > val_merit[best] + (1.5 / examples if examples else 0.0):
            best = name
    return best


def score(targets: Ints, probabilities: Floats, settings: EvaluateSettings) -> dict[str, Any]:
    """Return the metrics of one model on one split: plain numbers, each headline figure with its bootstrap interval [low, high]."""
    predicted = probabilities.argmax(1)
    labels = np.arange(probabilities.shape[1])
    ece, bins = calibration(targets, probabilities)
    return {
        "accuracy": float(accuracy_score(targets, predicted)),
        "accuracy_interval": interval(accuracy, targets, predicted, settings),
        "macro_f1": float(f1_score(targets, predicted, labels=np.unique(targets), average="macro", zero_division=0)),
        "macro_f1_interval": interval(macro_f1, targets, predicted, settings),
        "log_loss": float(-np.log(np.clip(probabilities[np.arange(len(targets)), targets], 1e-12, 1)).mean()),
        "ece": ece,
        "reliability": bins,
        "confusion": confusion_matrix(targets, predicted, labels=labels).tolist(),
        "per_class_f1": [float(v) for v in f1_score(targets, predicted, labels=labels, average=None, zero_division=0)],
    }


def accuracy(targets: Ints, predicted: Ints, axis: int = -1) -> npt.NDArray[np.float64]:
    """Accuracy along ``axis``, for whole arrays of resamples at once."""
    return np.asarray((targets == predicted).mean(axis=axis))


def macro_f1(targets: Ints, predicted: Ints, axis: int = -1) -> npt.NDArray[np.float64]:
    """Unweighted mean of the classes' F1 along ``axis``; a class absent from a resample is left out, as scikit-learn does with absent labels."""
    total, classes = np.zeros(np.delete(targets.shape, axis)), np.zeros(np.delete(targets.shape, axis))
    for c in range(int(targets.max(initial=0)) + 1):
        true, said = targets == c, predicted == c
        support, both = true.sum(axis), (true & said).sum(axis)
        total += np.where(support > 0, 2 * both / np.maximum(support + said.sum(axis), 1), 0.0)
        classes += support > 0
    return total / np.maximum(classes, 1)


def interval(statistic: Any, targets: Ints, predicted: Ints, settings: EvaluateSettings) -> list[float]:
    """Percentile bootstrap over the test examples (Efron 1979), pairs of (target, prediction) drawn together."""
    if len(targets) < 2:
        return [0.0, 1.0]
    found = bootstrap(
        (targets, predicted),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=settings.resamples,
        batch=max(1, 2_000_000 // len(targets)),
        confidence_level=settings.confidence,
        method="percentile",
        rng=np.random.default_rng(settings.seed),
    )
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def calibration(targets: Ints, probabilities: Floats, bins: int = 15) -> tuple[float, list[dict[str, float]]]:
    """Return the expected calibration error (Guo et al. 2017, equal-width bins of confidence) and the bins that hold examples."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == targets
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    found = [
        {
            "confidence": float(confidence[which == b].mean()),
            "accuracy": float(correct[which == b].mean()),
            "examples": int((which == b).sum()),
        }
        for b in range(bins)
        if (which == b).any()
    ]
    return float(sum(b["examples"] * abs(b["accuracy"] - b["confidence"]) for b in found) / max(len(targets), 1)), found


def write_predictions(path: Path, rows: pa.Table, classes: list[str], targets: Ints, probabilities: Floats) -> None:
    predicted = probabilities.argmax(1)
    columns: dict[str, Any] = {
        "id": rows["id"],
        "label": rows["label"],
        "predicted": [classes[p] for p in predicted],
        "correct": predicted == targets,
    }
    columns |= {f"p_{c}": probabilities[:, n] for n, c in enumerate(classes)}
    pq.write_table(pa.table(columns), path)
