"""Labels that are likely wrong, by confident learning (Northcutt, Jiang and Chuang 2021, https://arxiv.org/abs/1911.00068).

What is judged by are probabilities from a model that has not seen the example: those of the test split, or cross-validated ones for
the examples that are trained on.
"""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Suspect = tuple[int, int, float]  # position, the class that the model suggests, quality of the label
SPLITS = ("train", "val")
# cleanlab's rule. Measured on digits with 5 % of the labels changed, 600 and 1,797 of them: this one's precision is 0.95 to 1.0 at a
# recall of 0.70 to 0.75; pruning by noise rate 0.82 to 0.88 at 0.77 to 0.83. A person who looks in vain stops looking.
RULE = "confident_learning"


class OutOfSample(NamedTuple):
    """Probabilities of examples by models that have not seen them."""

    rows: pa.Table  # id, label, weight and split
    targets: Ints  # (N,)
    probabilities: Floats  # (N, classes)


def likely_label_errors(targets: Ints, probabilities: Floats, limit: int = 50) -> tuple[int, list[Suspect]]:
    """Return how many labels are likely wrong, and the ``limit`` most suspicious, the worst first.

    ``targets`` (N,), ``probabilities`` (N, classes), out of sample. The quality of a label is the probability that the model gives to
    it. A class that no example is labelled with is never suggested: how sure the model is of it where it is right is not known. With
    fewer than two classes there is nothing that a label could be instead.
    """
    present = np.unique(targets)
    if len(present) < 2:
        return 0, []
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    known = probabilities[:, present].astype(np.float64) + 1e-12  # a row may give nothing to those that are present
    known /= known.sum(1, keepdims=True)
    labels = np.searchsorted(present, targets)
    quality = get_label_quality_scores(labels, known, method="self_confidence")
    # In one process: a fork of one that has threads may hang.
    with warnings.catch_warnings(action="ignore"):  # of classes with few examples, to stderr
        found = np.flatnonzero(find_label_issues(labels, known, filter_by=RULE, n_jobs=1))
    found = found[np.argsort(quality[found], kind="stable")]
    return len(found), [(int(n), int(present[known[n].argmax()]), float(quality[n])) for n in found[:limit]]


def crossvalidated(embeddings: Path, strength: float, limit: int = 20_000, folds: int = 5) -> OutOfSample | None:
    """Return out-of-sample probabilities of the training and validation examples, by the baseline's probe on the first view.

    ``strength`` is the baseline's ``C`` in its ``model.json``, which is that of all views; where there are more examples than
    ``limit``, as many are taken, evenly spread. Classes with fewer than ``folds`` examples are left out; None where fewer than two
    remain.
    """
    from scipy.special import softmax
    from sklearn.model_selection import StratifiedKFold

    from graftwork.baseline import fit_probe, logits_of

    info: dict[str, Any] = json.loads((embeddings / "embeddings.json").read_text(encoding="utf-8"))
    index = pa.concat_tables(
        table.append_column("split", pa.array([split] * len(table), pa.string()))
        for split in SPLITS
        for table in (pq.read_table(embeddings / f"index-{split}.parquet"),)
    )
    targets = pa.compute.index_in(index["label"], value_set=pa.array(info["classes"])).to_numpy().astype(np.int64)
    # Each split is sorted by label: evenly spread, every class keeps its share.
    kept = np.unique(np.linspace(0, len(targets) - 1, min(limit, len(targets))).astype(np.int64))
    counts = np.bincount(targets[kept], minlength=len(info["classes"]))
    kept = kept[counts[targets[kept]] >= folds]
    targets = targets[kept]
    if len(np.unique(targets)) < 2:
        return None
    views, first = 1, []
    start = 0
    for split in SPLITS:
        stored = np.load(embeddings / f"features-{split}.npy", mmap_mode="r", allow_pickle=False)
        views = max(views, stored.shape[0])
        here = kept[(kept >= start) & (kept < start + stored.shape[1])] - start
        if len(here):
            first.append(stored[0, here])
        start += stored.shape[1]
    features = np.concatenate(first)
    logits = np.zeros((len(targets), len(info["classes"])), np.float32)
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=0).split(features, targets):
        # V views of each example want a V-th of the strength that one view wants, as in the baseline.
        probe, _ = fit_probe(features[train], targets[train], strength * views, len(info["classes"]))
        logits[test] = logits_of(probe, features[test])
    rows = index.take(pa.array(kept))
    return OutOfSample(rows, targets, softmax(logits.astype(np.float64), axis=1).astype(np.float32))
