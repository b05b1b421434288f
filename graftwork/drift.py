"""Drift: is this the kind of data that the champion was trained on? A profile of each dataset, and the population stability index between two."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from graftwork.dataset import Dataset, open_dataset
from graftwork.errors import UserError, one_line
from graftwork.modality import looks, name_of
from graftwork.sources.record import local_path

FORMAT = "graftwork-profile/1"


def profile(dataset: Dataset) -> dict[str, Any]:
    """Return what a dataset is like, JSON-ready: its digest, its training examples a class, and a histogram of each measure.

    Edges of the histograms are fixed, so that profiles made at any time can be compared.
    """
    own = looks(dataset.info)
    values = own.measures(dataset)
    return {
        "format": FORMAT,
        "modality": name_of(dataset.info),
        "digest": dataset.digest,
        "classes": dataset.info["counts"]["train"],
        f"{own.NOUN}s": {name: histogram(values[name], own.EDGES[name]) for name in own.EDGES},
    }


def histogram(values: npt.NDArray[Any], edges: npt.NDArray[np.float64]) -> list[int]:
    """Count ``values`` between ``edges``; what lies beyond them counts in the outer bins."""
    inside = np.clip(values, edges[0], np.nextafter(edges[-1], 0))
    return [int(n) for n in np.histogram(inside, edges)[0]]


def stability_index(now: npt.NDArray[np.int64], before: npt.NDArray[np.int64]) -> float:
    """Return the population stability index of two histograms, less what two samples of this size may differ by anyhow.

    PSI = sum (p - q) ln(p / q), the measure of credit scoring (Siddiqi 2006): under 0.1 no shift, above 0.2 a large one. Of two samples of the same
    distribution it follows chi-square with bins - 1 degrees of freedom, times 1 / n + 1 / m (Yurdakul 2018): what it exceeds in one pair of a thousand
    is taken off. Half an example is added to every bin.
    """
    from scipy.stats import chi2

    used = (now + before) > 0
    bins, n, m = int(used.sum()), int(now.sum()), int(before.sum())
    if bins < 2 or not n or not m:
        return 0.0
    p = (now[used] + 0.5) / (n + 0.5 * bins)
    q = (before[used] + 0.5) / (m + 0.5 * bins)
    chance = float(chi2.ppf(0.999, bins - 1)) * (1 / n + 1 / m)
    return max(0.0, float(((p - q) * np.log(p / q)).sum()) - chance)


def compare(now: dict[str, Any], before: dict[str, Any]) -> dict[str, float]:
    """Return {"class_shares" and each measure: stability index} of two profiles of one modality."""
    names = sorted({*now["classes"], *before["classes"]})
    shares = [np.array([one["classes"].get(name, 0) for name in names]) for one in (now, before)]
    found = {"class_shares": stability_index(*shares)}
    own = looks(now)
    for name in own.EDGES:
        found[name] = stability_index(*(np.array(one[f"{own.NOUN}s"][name]) for one in (now, before)))
    return found


def read_profile(where: str) -> dict[str, Any]:
    """Return the profile in the file ``where``, or of the Dataset artifact in the folder ``where``.

    Raises:
        UserError: there is none.
    """
    path = local_path(where)
    if path.is_dir():
        return profile(open_dataset(path))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"it is not of the format {FORMAT}")
        own = looks(found)
        for name, edges in own.EDGES.items():
            if len([int(n) for n in found[f"{own.NOUN}s"][name]]) != len(edges) - 1:
                raise ValueError(f"its {name} has other bins")
        if not all(isinstance(n, int) for n in found["classes"].values()):
            raise ValueError("its classes are not counts")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"reference {one_line(where)}: cannot be read ({one_line(error, 120)}); give a Dataset folder, a profile, or 'none'"
        ) from None


def champion_profile(name: str, uri: str) -> dict[str, Any] | None:
    """Return the profile of the data that the champion of the registered model ``name`` was trained on; None where there is none.

    Raises:
        UserError: the registry at ``uri`` does not answer.
    """
    import tempfile

    from graftwork.tracking import quiet_mlflow

    quiet_mlflow()
    import mlflow
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from graftwork.register import find_champion, registry_name

    try:
        mlflow.set_tracking_uri(uri)
        champion = find_champion(MlflowClient(uri, uri), registry_name(name))
        if champion is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = mlflow.artifacts.download_artifacts(
                    run_id=champion.run_id, artifact_path="profile.json", dst_path=folder, tracking_uri=uri
                )
            except (MlflowException, OSError):  # registered before profiles were kept
                return None
            return read_profile(path) | {"champion": f"{champion.name} version {champion.version}"}
    except UserError:
        raise
    except Exception as error:  # a damaged database, a proxy's page: MLflow hands on what its parts raise
        raise UserError(f"model registry: cannot be read ({one_line(error, 120)}); check MLFLOW_TRACKING_URI") from None
