"""Evaluation: every candidate on the same test examples, with intervals, and where the chosen one fails; the choice among them is made on validation alone."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from graftwork.batches import Examples, Progress
from graftwork.calibration import probabilities
from graftwork.dataset import Dataset
from graftwork.errors import UserError, one_line
from graftwork.execution import Inference, Planned, plan_inference
from graftwork.files import finished_folder, write_json
from graftwork.label_errors import crossvalidated, likely_label_errors
from graftwork.metrics import compare, score
from graftwork.modality import showing
from graftwork.model import Floats, Model, load_model, predict_logits, read_info
from graftwork.report import (
    confused_pairs,
    confusion_picture,
    curves_picture,
    history_picture,
    reliability_picture,
    render_evaluation,
)
from graftwork.selection import merit
from graftwork.settings import EvaluateSettings, ExecutionSettings
from graftwork.slices import slice_scores

FORMAT = "graftwork-evaluation/2"
MISTAKES = 12  # shown
LABEL_ERRORS = 50  # listed
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
    embeddings: Path | None = None,
) -> dict[str, Any]:
    """Predict the test split with every Model artifact in ``models`` and write the evaluation; return its ``evaluation.json``.

    ``predictions-CANDIDATE.parquet`` has a row an example: id, label, predicted, correct, and a calibrated probability a class;
    ``logits-CANDIDATE.npy`` the same rows' logits. With the Embeddings artifact, labels of train and validation are doubted as well.

    Raises:
        UserError: the test split is empty, or a setting names a column or a distortion that there is not.
    """
    rows = dataset.split("test")
    if not len(rows):
        raise UserError("test split: is empty, so nothing can be proved; add test examples or raise test_fraction")
    if settings.corruptions:
        showing(dataset.info).check_corruptions(list(settings.corruptions))
    targets = dataset.targets(rows)
    result: dict[str, Any] = {
        "format": FORMAT,
        "dataset_digest": dataset.digest,
        "examples": len(rows),
        "confidence": settings.confidence,
        "classes": dataset.classes,
        "metric": settings.metric,
        "candidates": {},
    }
    test: Examples | None = None
    logits: dict[str, Floats] = {}
    plans: set[str] = set()
    with finished_folder(folder) as partial:
        for number, (name, path) in enumerate(models.items()):
            model = load_model(path)
            if test is None or test.preprocess != model.preprocess:
                test = Examples(dataset, "test", model.preprocess)
            planned = how_to_run(model, test)
            if str(planned) not in plans:  # candidates of one network share it
                note(f"plan: {planned}")
            plans.add(str(planned))
            logits[name] = predict_logits(
                model,
                test,
                lambda done, n=number: progress(n * len(rows) + done, len(models) * len(rows)),  # type: ignore[misc]
                planned.execution,
            )
            result["candidates"][name] = {
                "test": score(targets, logits[name], dataset.classes, settings, model.temperature),
                "val": model.info["selection"],
                "temperature": model.temperature,
                "seconds": model.info["seconds"],
                "sha256": model.info["sha256"],
                "history": model.info.get("history", []),
                "hyperparameters": model.info.get("hyperparameters", {}),
                "seeds": model.info.get("seeds", []),
                "parameters": model.info["parameters"],
                "size_mb": (path / "model.safetensors").stat().st_size / 1e6,
                "latency_ms": latency(model, test),
                "weights_source": model.info["weights"]["source"],
            }
            np.save(partial / f"logits-{name}.npy", logits[name], allow_pickle=False)
            write_predictions(
                partial / f"predictions-{name}.parquet", rows, dataset.classes, targets, logits[name], model.temperature
            )
        merits = {name: merit(settings.metric, info["val"]["val"]) for name, info in result["candidates"].items()}
        # A loss is no share of the examples: one of them can change it by any amount.
        chosen = choose(merits, 0 if settings.metric == "loss" else len(dataset.split("val")))
        best = result["candidates"][chosen]
        calibrated = {
            name: probabilities(logits[name], found["temperature"]) for name, found in result["candidates"].items()
        }
        result["chosen"] = chosen
        result["comparisons"] = {
            name: compare(targets, calibrated[chosen], calibrated[name], settings) for name in logits if name != chosen
        }
        result["confused"] = confused_pairs(np.array(best["test"]["confusion"]), dataset.classes)
        result["notes"] = list(best["test"]["notes"])
        model = load_model(models[chosen])
        if test is None or test.preprocess != model.preprocess:
            test = Examples(dataset, "test", model.preprocess)
        result["mistakes"] = worst_mistakes(
            dataset, rows, targets, calibrated[chosen], model, partial, settings.attributions
        )
        result |= doubted_labels(dataset, rows, targets, calibrated[chosen], embeddings, models)
        result["slices"] = slice_scores(dataset, rows, targets, logits[chosen].argmax(1), settings.slices)
        result["corruptions"] = []
        if settings.corruptions:
            run = how_to_run(model, test).execution
            kinds: list[str] = list(settings.corruptions)
            result["corruptions"] = showing(dataset.info).distorted(model, test, targets, kinds, run, note)
        result["learning_curve"] = labels_saved(settings.learning_curve)
        write_json(partial / "evaluation.json", result)
        confusion_picture(np.array(best["test"]["confusion"]), dataset.classes, partial / "confusion.png")
        reliability_picture(
            best["test"]["reliability_uncalibrated"], best["test"]["reliability"], partial / "reliability.png"
        )
        curves_picture(best["test"], partial / "curves.png")
        for name in models:
            if "epoch" in result["candidates"][name]["val"]:
                history_picture(result["candidates"][name]["history"], partial / f"history-{name}.png")
        page = render_evaluation(result, dataset.info, read_info(models[chosen]), partial)
        (partial / "report.html").write_text(page, encoding="utf-8")
    return result


def how_to_run(model: Model, test: Examples) -> Planned:
    """Choose how the network is run: in fp32, since what is reported must be what the model gives in service."""
    few = torch.arange(min(64, len(test)))
    return plan_inference(
        model.network,
        f"{model.info['backbone']}, {len(model.classes)} logits",
        test[few],
        model.preprocess,
        model.device,
        len(test),
        ExecutionSettings(),
        ("fp32",),
    )


def latency(model: Model, test: Examples) -> float:
    """Return the median milliseconds of the network on one example, the input's normalisation included, run as for a few."""
    from graftwork.execution import default_execution

    run = Inference(
        model.network,
        model.preprocess,
        model.device,
        default_execution(ExecutionSettings(), model.device, model.preprocess),
    )
    one, seconds = test[torch.arange(1)], []
    for _ in range(15):
        began = time.perf_counter()
        run(one)
        seconds.append(time.perf_counter() - began)
    return round(float(np.median(seconds[3:])) * 1000, 2)


def choose(val_merit: dict[str, float], examples: int = 0) -> str:
    """Return the candidate that is best on validation; test figures play no part.

    The simpler candidate stays unless another is better by more than one and a half of the ``examples`` that decided: the best of
    many epochs on few examples owes its last example to luck. Measured with 10 labels a class, where one validation example decided, the
    probe was four and seven points better in two of three draws.
    """
    order = sorted(val_merit, key=CANDIDATES.index)
    best = order[0]
    for name in order[1:]:
        if val_merit[name] > val_merit[best] + (1.5 / examples if examples else 0.0):
            best = name
    return best


# ---- where it fails ------------------------------------------------------------------------------------------------------------


def worst_mistakes(
    dataset: Dataset, rows: pa.Table, targets: Ints, found: Floats, model: Model, folder: Path, attributions: bool
) -> list[dict[str, Any]]:
    """Return the mistakes that the model was surest of, as their modality shows them, and write their files under ``folder``/mistakes."""
    predicted, confidence = found.argmax(1), found.max(1)
    wrong = np.flatnonzero(predicted != targets)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    if not len(worst):
        return []
    shown = showing(dataset.info).mistakes(dataset, rows.take(worst), predicted[worst], model, folder, attributions)
    return [
        {
            "id": rows["id"][position].as_py(),
            "source": rows["source"][position].as_py(),
            "label": dataset.classes[int(targets[position])],
            "predicted": dataset.classes[int(predicted[position])],
            "confidence": float(confidence[position]),
            **one,
        }
        for position, one in zip(worst.tolist(), shown, strict=True)
    ]


def doubted_labels(
    dataset: Dataset,
    rows: pa.Table,
    targets: Ints,
    found: Floats,
    embeddings: Path | None,
    models: dict[str, Path],
) -> dict[str, Any]:
    """Return the labels that are likely wrong: of the test by the chosen model, of train and validation by probes that have not seen them."""
    total, positions = likely_label_errors(targets, found, LABEL_ERRORS)
    listed = [doubt(dataset, rows, *one) for one in positions]
    if embeddings is not None and "baseline" in models:
        made = crossvalidated(embeddings, float(read_info(models["baseline"])["hyperparameters"]["C"]))
        if made is not None:
            index, given, out_of_sample = made
            more, positions = likely_label_errors(given, out_of_sample, LABEL_ERRORS)
            known = {key: n for n, key in enumerate(dataset.manifest["id"].to_pylist())}
            total += more
            for position, suggested, quality in positions:
                row = dataset.manifest.slice(known[index["id"][position].as_py()], 1)
                listed.append(doubt(dataset, row, 0, suggested, quality))
    listed.sort(key=lambda one: one["quality"])
    return {"label_errors": listed[:LABEL_ERRORS], "label_errors_total": total}


def doubt(dataset: Dataset, rows: pa.Table, position: int, suggested: int, quality: float) -> dict[str, Any]:
    told = {key: rows[key][position].as_py() for key in ("id", "source", "split", "label")}
    return {**told, "suggested": dataset.classes[suggested], "quality": round(float(quality), 4)}


def labels_saved(path: str) -> dict[str, str] | None:
    """Return what a learning curve on this data says, where one is at hand."""
    if not path:
        return None
    from graftwork.learning_curve import headline

    try:
        return {"sentence": headline(json.loads(Path(path).read_text(encoding="utf-8")))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"setting learning_curve = {one_line(path)}: is no curve.json ({one_line(error)}); give that of 'graftwork learning-curve'"
        ) from None


def write_predictions(
    path: Path, rows: pa.Table, classes: list[str], targets: Ints, logits: Floats, temperature: float
) -> None:
    # The label is that of the logits, which no temperature changes; probabilities of float32 might tie.
    predicted, found = logits.argmax(1), probabilities(logits, temperature)
    columns: dict[str, Any] = {
        "id": rows["id"],
        "label": rows["label"],
        "predicted": [classes[p] for p in predicted],
        "correct": predicted == targets,
    }
    columns |= {f"p_{c}": found[:, n] for n, c in enumerate(classes)}
    pq.write_table(pa.table(columns), path)
