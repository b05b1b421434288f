"""Metrics of a model on a test split, each with a bootstrap interval; and two models compared on the same examples.

The figures are scikit-learn's; the intervals are the percentile bootstrap over examples (Efron 1979), drawn by SciPy. Resamples are not made one by one:
how often each example was drawn, a matrix (examples, resamples), is multiplied by sparse matrices of what the metrics add up. For AUROC and average
precision these are the examples in the order of their scores, cut where a positive stands, so that the sums are those of the exact curve, ties included.

Nothing here is NaN: what is undefined (AUROC, where all examples are of one class) is None, and a note says so.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graftwork.calibration import probabilities as calibrated
from graftwork.errors import UserError
from graftwork.settings import EvaluateSettings

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
Score = dict[str, Any]
Comparison = dict[str, Any]

HEADLINES = (
    "accuracy",
    "balanced_accuracy",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "top_k_accuracy",
    "log_loss",
    "auroc",
    "average_precision",
    "ece",
)
LOWER_IS_BETTER = frozenset({"log_loss", "ece"})
RANKED = ("auroc", "average_precision")  # need every class's order of the examples: the dear ones
BINS = 15  # of confidence, of equal width
POINTS = 100  # of the ROC curve, at the most
FEW = 30  # test examples; of fewer, no interval is to be trusted
FEW_PER_CLASS = 10
# Examples x classes x resamples that the order metrics may cost, some seconds; they have fewer resamples beyond it, but not fewer than these.
RANK_WORK, FEWEST_RESAMPLES = 4_000_000_000, 200
ROC_WORK = 5_000_000  # examples x classes that the ROC curve is drawn from
CACHED = 640_000  # counts (examples x resamples) in one batch: what stays in a core's cache is many times as fast


def score(
    targets: Ints, logits: Floats, classes: Sequence[str], settings: EvaluateSettings, temperature: float = 1.0
) -> Score:
    """Return the metrics of one model on one split, ready for JSON: each headline K with ``K_interval`` [low, high], curves, tables, notes.

    ``targets`` (N,) index ``classes``; ``logits`` are (N, classes). Labels are the largest logit's (of equal ones the first's); everything else is of
    ``softmax(logits / temperature)`` in float32, as it is written beside the evaluation. A macro mean is over the classes that have test examples, and so
    is a resample's: a class absent from it is left out. Log-loss is clipped where scikit-learn clips float32, at a probability of 1.2e-7.

    Raises:
        UserError: there are no examples, or a logit is not finite.
    """
    if not len(targets):
        raise UserError("test split: is empty, so nothing can be proved; add test examples or raise test_fraction")
    bad = ~np.isfinite(logits).all(1)
    if bad.any():
        raise UserError(
            f"the model gives a logit that is no finite number for {bad.sum():,} of {len(targets):,} test examples, so it cannot be evaluated; train again"
        )
    predicted, chances, raw = logits.argmax(1), calibrated(logits, temperature), calibrated(logits)
    rank_resamples = affordable(len(targets), len(classes), settings.resamples)
    areas = {name: one_against_rest(name, targets, chances) for name in RANKED}
    found: Score = {}
    for name in HEADLINES:
        found[name] = mean_defined(areas[name]) if name in RANKED else point(name, targets, predicted, chances)
        found[f"{name}_interval"] = None
    counted = [name for name in HEADLINES if name not in RANKED and found[name] is not None]
    ranked = [name for name in RANKED if found[name] is not None]
    for names, resamples in ((counted, settings.resamples), (ranked, rank_resamples)):
        found |= intervals(names, targets, predicted, chances, found, resamples, settings)
    error, bins = calibration(targets, raw, predicted)
    return found | {
        "top_k": top_k(len(classes)),
        "temperature": float(temperature),
        "ece_uncalibrated": error,
        "log_loss_uncalibrated": point("log_loss", targets, predicted, raw),
        "reliability": calibration(targets, chances, predicted)[1],
        "reliability_uncalibrated": bins,
        "confusion": confusion(targets, predicted, len(classes)).tolist(),
        "per_class": per_class(targets, predicted, areas, classes, settings.confidence),
        "roc": roc(targets, chances),
        "notes": notes(targets, classes, settings, rank_resamples if ranked else settings.resamples, found),
    }


def measure_one(metric: str, targets: Ints, probabilities: Floats) -> float | None:
    """Return one of HEADLINES from targets (N,) and probabilities (N, classes); None where it is undefined."""
    return point(metric, targets, probabilities.argmax(1), probabilities)


def compare(
    targets: Ints, mine: Floats, theirs: Floats, settings: EvaluateSettings, metric: str = "accuracy"
) -> Comparison:
    """Compare two models' probabilities (N, classes) on the same examples: the paired difference, its interval, and McNemar's test of the labels.

    "difference" is positive where ``mine`` is better, whatever the metric. "interval" is two-sided and "lower_bound" one-sided, both of the paired
    bootstrap at ``settings.confidence``; all three are None where the metric is undefined, and the bounds also where one example alone cannot tell.
    "p_value" (two-sided) and "p_better" (one-sided: mine is right more often) are the exact binomial test of the examples on which just one of the two
    is right (McNemar 1947).
    """
    from scipy.stats import binomtest

    labels = [p.argmax(1) for p in (mine, theirs)]
    values = [point(metric, targets, label, p) for label, p in zip(labels, (mine, theirs), strict=True)]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    difference, bounds, lower = None, None, None
    if values[0] is not None and values[1] is not None:
        difference = sign * (values[0] - values[1])
        # Both models' order of the examples is needed: twice the work.
        most = affordable(len(targets), 2 * mine.shape[1], settings.resamples)
        resamples = most if metric in RANKED else settings.resamples
        one, other = (
            sums_to_metrics([metric], targets, label, p) for label, p in zip(labels, (mine, theirs), strict=True)
        )
        drawn = distribution(lambda counts: sign * (one(counts) - other(counts)), len(targets), resamples, settings)
        tail = 1 - settings.confidence
        if drawn is not None and (held := drawn[0][np.isfinite(drawn[0])]).size:
            bounds = [float(v) for v in np.quantile(held, [tail / 2, 1 - tail / 2])]
            lower = float(np.quantile(held, tail))
        if abs(difference) == 1 and metric != "log_loss":  # all right against all wrong
            bounds, lower = certain_bounds(difference, len(targets), settings.confidence)
    right = [label == targets for label in labels]
    gained, lost = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    p_values = (1.0, 1.0)
    if gained + lost:
        two_sided = binomtest(gained, gained + lost, alternative="two-sided").pvalue
        p_values = float(two_sided), float(binomtest(gained, gained + lost, alternative="greater").pvalue)
    return {
        "metric": metric,
        "mine": values[0],
        "theirs": values[1],
        "difference": difference,
        "interval": bounds,
        "lower_bound": lower,
        "only_mine_right": gained,
        "only_theirs_right": lost,
        "p_value": p_values[0],
        "p_better": p_values[1],
        "examples": len(targets),
    }


def certain_bounds(difference: float, examples: int, confidence: float) -> tuple[list[float], float]:
    """Return "interval" and "lower_bound" of a difference of 1 or -1, of which no resample has another: Wilson's, where three examples prove little."""
    from scipy.stats import binomtest

    test = binomtest(examples, examples)
    # At least this share of all examples goes one way; the rest might go the other.
    both_sides, one_side = (2 * wilson(test, c)[0] - 1 for c in (confidence, 2 * confidence - 1))
    if difference > 0:
        return [both_sides, 1.0], one_side
    return [-1.0, -both_sides], -1.0


# Figures


def point(metric: str, targets: Ints, predicted: Ints, probabilities: Floats) -> float | None:
    """Return one headline figure, as scikit-learn gives it; ``predicted`` (N,) are the labels. None where it is undefined."""
    from sklearn.metrics import accuracy_score, log_loss, precision_recall_fscore_support

    classes = probabilities.shape[1]
    if not len(targets):
        return None
    if metric == "accuracy":
        return float(accuracy_score(targets, predicted))
    if metric in ("balanced_accuracy", "macro_precision", "macro_recall", "macro_f1"):
        precision, recall, f1, _ = precision_recall_fscore_support(
            targets, predicted, labels=np.unique(targets), average="macro", zero_division=0
        )
        # Balanced accuracy is the mean of the classes' recalls by another name; scikit-learn's function warns of labels that were only predicted.
        return float({"macro_precision": precision, "macro_f1": f1}.get(metric, recall))
    if metric == "top_k_accuracy":
        k = top_k(classes)
        return None if k is None else float(among_first(targets, predicted, probabilities, k).mean())
    if metric == "log_loss":
        return float(log_loss(targets, probabilities, labels=np.arange(classes))) if classes > 1 else 0.0
    if metric in RANKED:
        return mean_defined(one_against_rest(metric, targets, probabilities))
    if metric == "ece":
        return calibration(targets, probabilities, predicted)[0]
    raise ValueError(f"{metric} is none of {', '.join(HEADLINES)}")


def top_k(classes: int) -> int | None:
    """Return how many guesses a model has of so many classes; None where so many would tell nothing."""
    return 5 if classes > 10 else 3 if classes > 5 else None


def among_first(targets: Ints, predicted: Ints, scores: Floats, k: int) -> npt.NDArray[np.bool_]:
    """Tell of which examples (N,) the label is among the k likeliest classes; of equal ones the first in order is likelier, as for argmax.

    (scikit-learn's has it the other way round: of equal scores the last, so that the best guess might not be among the first five.)
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    # Where two logits differ by less than a probability can show, the label is still the larger logit's.
    return np.asarray((order == targets[:, None]).any(1) | (predicted == targets))


def one_against_rest(metric: str, targets: Ints, probabilities: Floats) -> list[float | None]:
    """Return AUROC or average precision of each class against the others; None for a class without examples, or without any other."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    area = roc_auc_score if metric == "auroc" else average_precision_score
    held = np.bincount(targets, minlength=probabilities.shape[1])
    return [
        float(area(targets == c, probabilities[:, c])) if 0 < n < len(targets) else None for c, n in enumerate(held)
    ]


def mean_defined(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def calibration(
    targets: Ints, probabilities: Floats, predicted: Ints | None = None, bins: int = BINS
) -> tuple[float, list[dict[str, float]]]:
    """Return the expected calibration error (Guo et al. 2017, equal-width bins of confidence) and the bins that hold examples."""
    labels = probabilities.argmax(1) if predicted is None else predicted
    confidence, correct = probabilities.max(1).astype(np.float64), labels == targets
    which = confidence_bins(confidence, bins)
    found = [
        {
            "confidence": float(confidence[which == b].mean()),
            "accuracy": float(correct[which == b].mean()),
            "examples": int((which == b).sum()),
        }
        for b in np.unique(which)
    ]
    return float(sum(b["examples"] * abs(b["accuracy"] - b["confidence"]) for b in found) / max(len(targets), 1)), found


def confidence_bins(confidence: Numbers, bins: int = BINS) -> Ints:
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def confusion(targets: Ints, predicted: Ints, classes: int) -> Ints:
    """Return counts (classes, classes): rows are labels, columns what was predicted."""
    from sklearn.metrics import confusion_matrix

    return np.asarray(confusion_matrix(targets, predicted, labels=np.arange(classes)), np.int64)


def per_class(
    targets: Ints,
    predicted: Ints,
    areas: dict[str, list[float | None]],
    classes: Sequence[str],
    confidence: float,
) -> list[dict[str, Any]]:
    """Return each class's figures, ``areas`` (RANKED's) among them; None where one is undefined (the recall of no examples, the precision of no prediction)."""
    from scipy.stats import binomtest
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, examples = precision_recall_fscore_support(
        targets, predicted, labels=np.arange(len(classes)), zero_division=0
    )
    said = np.bincount(predicted, minlength=len(classes))
    rows = []
    for c, name in enumerate(classes):
        n = int(examples[c])
        held = None
        if n:
            right = int(((targets == c) & (predicted == c)).sum())
            held = wilson(binomtest(right, n), confidence)
        rows.append(
            {
                "class": name,
                "examples": n,
                "predicted": int(said[c]),
                "precision": float(precision[c]) if said[c] else None,
                "recall": float(recall[c]) if n else None,
                "recall_interval": held,
                "f1": float(f1[c]) if n else None,
                **{metric: values[c] for metric, values in areas.items()},
            }
        )
    return rows


def wilson(test: Any, confidence: float) -> list[float]:
    """Return Wilson's (1927) interval [low, high] of a share, from a ``scipy.stats.binomtest``."""
    found = test.proportion_ci(confidence_level=confidence, method="wilson")
    return [float(found.low), float(found.high)]


def roc(targets: Ints, probabilities: Floats) -> dict[str, list[float]] | None:
    """Return the micro-averaged ROC curve (every example with every class is one decision), in at most POINTS points as far apart as each other.

    None with one class. The first threshold, above every probability, is written as 1.
    """
    from sklearn.metrics import roc_curve

    classes = probabilities.shape[1]
    if classes < 2 or not len(targets):
        return None
    every = max(1, -(-len(targets) * classes // ROC_WORK))
    targets, probabilities = targets[::every], probabilities[::every]
    fpr, tpr, threshold = roc_curve((targets[:, None] == np.arange(classes)).ravel(), probabilities.ravel())
    travelled = fpr + tpr
    kept = np.unique(np.searchsorted(travelled, np.linspace(0, travelled[-1], POINTS)).clip(0, len(fpr) - 1))
    return {
        "fpr": fpr[kept].astype(float).tolist(),
        "tpr": tpr[kept].astype(float).tolist(),
        "threshold": np.minimum(threshold[kept], 1.0).astype(float).tolist(),
    }


# Intervals


def intervals(
    metrics: list[str],
    targets: Ints,
    predicted: Ints,
    probabilities: Floats,
    points: Score,
    resamples: int,
    settings: EvaluateSettings,
) -> dict[str, list[float] | None]:
    """Return ``{METRIC_interval: [low, high]}`` at ``settings.confidence``; None where the bootstrap has nothing to say.

    Where every resample gives the same figure, as if all of ten examples are right, the bootstrap would claim certainty: a share has Wilson's interval
    then, anything else none. The calibration error adds up magnitudes, so that chance alone makes it larger: a resample's by a bias over the test set's,
    and the test set's by about as much over the truth. Its interval is moved back by that bias, the lower end by twice as much, and not below nought.
    How often it holds the truth, and the plain one does, is measured by ``benchmarks/evaluation.py``; of a model without any error both are too high.
    """
    from scipy.stats import binomtest

    found: dict[str, list[float] | None] = {f"{name}_interval": None for name in metrics}
    if not metrics:
        return found
    drawn = distribution(sums_to_metrics(metrics, targets, predicted, probabilities), len(targets), resamples, settings)
    tail = (1 - settings.confidence) / 2
    for number, name in enumerate(metrics):
        held = np.empty(0) if drawn is None else drawn[number][np.isfinite(drawn[number])]
        if held.size and np.ptp(held) > 1e-6:  # less is rounding
            low, high = np.quantile(held, [tail, 1 - tail])
            if name == "ece":
                bias = held.mean() - points[name]
                low, high = max(0.0, low - 2 * bias), max(high - bias, points[name])
                low = min(low, points[name])
            found[f"{name}_interval"] = [float(low), float(high)]
        elif name in ("accuracy", "top_k_accuracy"):
            test = binomtest(round(points[name] * len(targets)), len(targets))
            found[f"{name}_interval"] = wilson(test, settings.confidence)
    return found


def affordable(examples: int, classes: int, resamples: int) -> int:
    """Return how many resamples AUROC and average precision may have."""
    return min(resamples, max(FEWEST_RESAMPLES, RANK_WORK // (examples * classes)))


def distribution(
    statistic: Callable[[Floats], Numbers], examples: int, resamples: int, settings: EvaluateSettings
) -> Numbers | None:
    """Return ``statistic`` of ``resamples`` bootstrap resamples of the examples, shape (metrics, resamples); None for fewer than two examples.

    What is resampled are the positions of the examples, so that whatever belongs to one example is drawn together. ``statistic`` gets how often each
    example (N,) was drawn in each resample of a batch, (N, batch), and returns (metrics, batch), NaN where a metric is undefined.
    """
    from scipy.stats import bootstrap

    if examples < 2:
        return None

    def of_positions(positions: Ints, axis: int = -1) -> Numbers:
        batch = len(positions)
        cells = positions * batch + np.arange(batch)[:, None]
        return statistic(np.bincount(cells.ravel(), minlength=examples * batch).reshape(-1, batch).astype(np.float32))

    with warnings.catch_warnings():
        # SciPy's own interval is not used: it has no answer where a resample has none, and warns.
        warnings.simplefilter("ignore")
        found = bootstrap(
            (np.arange(examples),),
            of_positions,
            vectorized=True,
            n_resamples=resamples,
            batch=max(16, min(resamples, CACHED // examples)),
            confidence_level=settings.confidence,
            method="percentile",
            rng=np.random.default_rng(settings.seed),
        )
    return np.asarray(found.bootstrap_distribution)


def sums_to_metrics(
    metrics: Sequence[str], targets: Ints, predicted: Ints, probabilities: Floats
) -> Callable[[Floats], Numbers]:
    """Return a function of counts (N, batch) that gives the metrics of the examples taken so often, (metrics, batch), NaN where undefined."""
    from scipy.sparse import csr_array

    classes = probabilities.shape[1]
    examples = np.arange(len(targets))
    correct = predicted == targets
    confidence = probabilities.max(1).astype(np.float64)
    # Rows of sums over the examples: (which row, which example, what it adds).
    parts: dict[str, tuple[Ints, Ints, Numbers, int]] = {
        "support": (targets, examples, np.ones(len(targets)), classes),
        "said": (predicted, examples, np.ones(len(targets)), classes),
        "both": (targets[correct], examples[correct], np.ones(int(correct.sum())), classes),
    }
    if "log_loss" in metrics:
        least = float(np.finfo(probabilities.dtype).eps)
        chance = probabilities[examples, targets].astype(np.float64).clip(least, 1 - least)
        parts["loss"] = (np.zeros_like(targets), examples, -np.log(chance) if classes > 1 else chance * 0, 1)
    k = top_k(classes)
    if "top_k_accuracy" in metrics and k is not None:
        hit = among_first(targets, predicted, probabilities, k).astype(np.float64)
        parts["hit"] = (np.zeros_like(targets), examples, hit, 1)
    if "ece" in metrics:
        parts["gap"] = (confidence_bins(confidence), examples, correct - confidence, BINS)
    ends = np.cumsum([rows for *_, rows in parts.values()])
    start = dict(zip(parts, ends - [rows for *_, rows in parts.values()], strict=True))
    stop = dict(zip(parts, ends, strict=True))
    row = np.concatenate([part[0] + start[name] for name, part in parts.items()])
    column, value = (np.concatenate([part[n] for part in parts.values()]) for n in (1, 2))
    adds = csr_array((value, (row, column)), shape=(int(ends[-1]), len(targets)))
    ranks = (
        [order_sums(targets == c, probabilities[:, c]) for c in np.unique(targets)] if set(metrics) & {*RANKED} else []
    )

    def of_counts(counts: Floats) -> Numbers:
        summed = adds @ counts.astype(np.float64)  # a sum of many losses in single precision would be a rough one
        support, said, both = (summed[start[name] : stop[name]] for name in ("support", "said", "both"))
        total = support.sum(0)
        held = support > 0
        areas = np.array([of_class(counts) for of_class in ranks])  # (classes that have examples, RANKED, batch)
        rows = []
        for name in metrics:
            if name == "accuracy":
                rows.append(both.sum(0) / total)
            elif name == "macro_precision":
                rows.append(mean_where(held, both / np.maximum(said, 1)))
            elif name in ("macro_recall", "balanced_accuracy"):
                rows.append(mean_where(held, both / np.maximum(support, 1)))
            elif name == "macro_f1":
                rows.append(mean_where(held, 2 * both / np.maximum(support + said, 1)))
            elif name == "ece":
                rows.append(np.abs(summed[start["gap"] : stop["gap"]]).sum(0) / total)
            elif name in RANKED:
                of_classes = areas[:, RANKED.index(name)]
                rows.append(mean_where(np.isfinite(of_classes), np.nan_to_num(of_classes)))
            else:
                rows.append(summed[start["hit" if name == "top_k_accuracy" else "loss"]] / total)
        return np.array(rows)

    return of_counts


def mean_where(held: npt.NDArray[np.bool_], values: Numbers) -> Numbers:
    """Return the mean of ``values`` (classes, batch) over the classes that are held; NaN where none is."""
    count = held.sum(0)
    return np.where(count > 0, (values * held).sum(0) / np.maximum(count, 1), np.nan)


def order_sums(positive: npt.NDArray[np.bool_], scores: Floats) -> Callable[[Floats], Numbers]:
    """Return a function of counts (N, batch) that gives AUROC and average precision of one class against the rest, (2, batch), NaN where undefined.

    Both curves change only at scores that a positive has: from the highest score down, the examples are cut into these ties and the stretches of
    negatives between them, and the counts are summed by piece. Below the last positive nothing is needed.
    """
    from scipy.sparse import csr_array

    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], positive[order]
    first = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))  # of each run of equal scores
    tie = np.logical_or.reduceat(hits, first)
    piece = tie | np.concatenate(
        [[True], tie[:-1]]
    )  # a run with no positive goes with the one before, if that has none either
    starts, tie = first[piece], tie[piece]
    used = int(np.flatnonzero(tie)[-1]) + 1  # the pieces down to the last positive
    starts, ends, tie = starts[:used], np.append(starts, len(order))[1 : used + 1], tie[:used]
    ones = np.ones(int(ends[-1]), np.float32)
    everything = csr_array(
        (ones, order[: ends[-1]].astype(np.int32), np.append(starts, ends[-1])), shape=(used, len(order))
    )
    hit_order = order[hits].astype(np.int32)
    hit_ends = np.cumsum(np.add.reduceat(hits.astype(np.int64), first)[np.logical_or.reduceat(hits, first)])
    hits_of_ties = csr_array(
        (ones[: len(hit_order)], hit_order, np.append(0, hit_ends)), shape=(len(hit_ends), len(order))
    )
    ties = np.flatnonzero(tie)

    def of_counts(counts: Floats) -> Numbers:
        total = counts.sum(0, dtype=np.float64)
        above = np.cumsum(everything @ counts, 0)  # as many are no lower than this piece
        here = hits_of_ties @ counts  # positives of each tie
        found = np.cumsum(here, 0)
        positives = found[-1].astype(np.float64)
        negatives = total - positives
        # Negatives down to this tie, and those above it: half of those within it count as below.
        no_lower = above[ties] - found
        before = np.where((ties > 0)[:, None], above[ties - 1], 0) - (found - here)
        beaten = negatives * positives - np.einsum("tb,tb->b", here, (no_lower + before) / 2, dtype=np.float64)
        precision = np.einsum("tb,tb->b", here, found / np.maximum(above[ties], 1), dtype=np.float64)
        defined = (positives > 0) & (negatives > 0)
        auroc = beaten / np.maximum(positives * negatives, 1)
        return np.where(defined, [auroc, precision / np.maximum(positives, 1)], np.nan)

    return of_counts


# Notes


def notes(
    targets: Ints, classes: Sequence[str], settings: EvaluateSettings, rank_resamples: int, found: Score
) -> list[str]:
    """Return sentences on what is undefined or weak in a Score, and why."""
    said = []
    held = np.bincount(targets, minlength=len(classes))
    if (held > 0).sum() == 1:
        said.append(
            f"all test examples are of one class ({classes[int(held.argmax())]}), so AUROC and average precision are undefined"
        )
    if len(targets) < FEW:
        few = f"{len(targets)} test example{'s' if len(targets) > 1 else ''}"
        said.append(f"only {few}: no figure here is certain, and intervals of so few are too narrow")
    absent = [name for name, n in zip(classes, held, strict=True) if n == 0]
    if absent:
        said.append(f"without test examples, and left out of the macro means: {listed(absent)}")
    scarce = [name for name, n in zip(classes, held, strict=True) if 0 < n < FEW_PER_CLASS]
    if scarce:
        said.append(f"fewer than {FEW_PER_CLASS} test examples, so that their own figures say little: {listed(scarce)}")
    alike = [name for name in HEADLINES if found[name] is not None and found[f"{name}_interval"] is None]
    if alike:
        said.append(f"every resample gives the same figure, so there is no interval: {', '.join(alike)}")
    if rank_resamples < settings.resamples:
        said.append(
            f"the intervals of AUROC and average precision are of {rank_resamples:,} resamples, not {settings.resamples:,}: "
            f"{len(targets):,} examples of {len(classes):,} classes would take too long"
        )
    return said


def listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
