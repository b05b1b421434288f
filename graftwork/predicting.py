"""Prediction from the command line: a model from a folder or the registry, images from files and folders."""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftwork.errors import UserError, one_line
from graftwork.files import write_text
from graftwork.images import Array, BrokenImageError, decode, fit
from graftwork.model import Floats, Model, load_model, predict
from graftwork.sources.record import IMAGE_SUFFIXES, regular
from graftwork.tracking import quiet_mlflow, sqlite_file

Row = tuple[Path, Floats]


def predict_files(model: str, inputs: list[Path], uri: str) -> tuple[list[Row], list[str], list[tuple[Path, str]]]:
    """Return ((path, probabilities) an image, the classes, (path, reason) of what cannot be decoded).

    Raises:
        UserError: there is no such model or no such input.
    """
    paths = list(expand(inputs))
    loaded = load_model(model_folder(model, uri))
    broken: list[tuple[Path, str]] = []
    good: list[Path] = []
    probabilities = predict(loaded, pixels(loaded, paths, good, broken))
    return list(zip(good, probabilities, strict=True)), loaded.classes, broken


def expand(inputs: list[Path]) -> Iterator[Path]:
    """Yield files as they are, and the images in folders."""
    for path in inputs:
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
            )
            if not found:
                raise UserError(
                    f"input {one_line(path)}: this folder holds no images; give image files, or a folder of them"
                )
            yield from found
        elif not path.exists():
            raise UserError(f"input {one_line(path)}: no such file; check the path")
        else:
            yield path


def pixels(model: Model, paths: list[Path], good: list[Path], broken: list[tuple[Path, str]]) -> Iterator[Array]:
    for path in paths:
        try:
            image = fit(decode(regular(path).read_bytes()), model.preprocess)
        except (BrokenImageError, OSError) as error:
            broken.append((path, one_line(getattr(error, "strerror", None) or error, 120)))
            continue
        good.append(path)
        yield image


def model_folder(model: str, uri: str) -> Path:
    """Return the local folder of ``model``; a registered version is fetched once and kept.

    Raises:
        UserError: the registry has no such model, version or alias.
    """
    if not model.startswith("models:/"):
        if not Path(model).is_dir():
            raise UserError(f"model {one_line(model)}: no such folder; give a Model folder or models:/NAME@champion")
        return Path(model)
    match = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))", model)
    if not match:
        raise UserError(f"model {one_line(model)}: write models:/NAME@ALIAS or models:/NAME/VERSION")
    database = sqlite_file(uri)
    if database and not database.is_file():
        raise UserError(
            f"model {one_line(model)}: there is no registry at {uri}; give the folder of the runs with --output, or set MLFLOW_TRACKING_URI"
        )
    quiet_mlflow()
    os.environ["MLFLOW_TRACKING_URI"] = uri
    import mlflow
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri, uri)
    name = match["name"]
    try:
        version: Any = (
            client.get_model_version_by_alias(name, match["alias"])
            if match["alias"]
            else client.get_model_version(name, match["version"])
        )
    except MlflowException as error:
        raise UserError(
            f"model {one_line(model)}: the registry at {uri} has none ({one_line(error, 120)}); give a name, version or alias that it has"
        ) from None
    return fetch_version(version, uri)


def fetch_version(version: Any, uri: str) -> Path:
    """Return a local copy of a registered version's Model artifact, from the cache where its weights are there already."""
    import tempfile

    from graftwork.files import finished_folder
    from graftwork.register import SAME_WEIGHTS, download_version
    from graftwork.sources.arrays import cache_folder

    kept = cache_folder() / "models" / (version.tags.get(SAME_WEIGHTS) or f"{version.name}-{version.version}")
    if (kept / "model.json").is_file() and version.tags.get(SAME_WEIGHTS):
        return kept
    with tempfile.TemporaryDirectory() as temporary:
        found = download_version(version, Path(temporary))
        with finished_folder(kept) as partial:
            for file in found.iterdir():
                (partial / file.name).write_bytes(file.read_bytes())
    return kept


def write_csv(path: Path, rows: list[Row], classes: list[str]) -> None:
    """Write a row an image: image, label, and the probability of every class."""
    import io

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", "label", *(f"p_{c}" for c in classes)])
    for image, probabilities in rows:
        writer.writerow([str(image), classes[int(probabilities.argmax())], *(f"{p:.6f}" for p in probabilities)])
    try:
        write_text(path, text.getvalue())
    except OSError as error:
        raise UserError(f"csv {one_line(path)}: cannot be written ({error.strerror}); give another path") from None
