"""Registration: the chosen Model becomes a version in MLflow's registry, and the champion only if it is proved better.

The champion is evaluated again, now, on the same test images: its recorded figures belong to another test set.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from graftwork.dataset import Dataset
from graftwork.drift import profile
from graftwork.errors import UserError, one_line
from graftwork.model import read_info
from graftwork.settings import RegisterSettings
from graftwork.tracking import tracking_uri

CHAMPION, CHALLENGER = "champion", "challenger"
SAME_WEIGHTS = "graftwork.model_sha256"


def register(
    dataset: Dataset, evaluation: Path, models: dict[str, Path], settings: RegisterSettings, run_id: Callable[[], str]
) -> dict[str, Any]:
    """Register the evaluation's choice under the run that ``run_id`` gives, and set an alias; return {"chosen", "decision", "registered"}.

    A model whose very weights are a version already makes no second one.
    """
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client = MlflowClient()
    result = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    chosen, name = result["chosen"], registry_name(settings.register_as or dataset.info["name"])
    folder = models[chosen]
    info = read_info(folder)
    champion = find_champion(client, name)
    if champion is not None and champion.tags.get(SAME_WEIGHTS) == info["sha256"]:
        reason = f"this very model is version {champion.version}, the champion, already"
        return {
            "chosen": chosen,
            "decision": {"promoted": False, "reasons": [reason]},
            "registered": described(client, name, champion.version),
        }
    decision = decide(result, chosen, dataset, champion, settings)
    version = find_version(client, name, info["sha256"]) or log_version(
        client, name, folder, info, result, dataset, run_id()
    )
    if decision["promoted"]:
        client.set_registered_model_alias(name, CHAMPION, version)
        if CHALLENGER in described(client, name, version)["aliases"]:
            client.delete_registered_model_alias(name, CHALLENGER)
    else:
        client.set_registered_model_alias(name, CHALLENGER, version)
    client.set_model_version_tag(name, version, "graftwork.decision", json.dumps(decision)[:5000])
    return {"chosen": chosen, "decision": decision, "registered": described(client, name, version)}


def decide(
    result: dict[str, Any], chosen: str, dataset: Dataset, champion: Any, settings: RegisterSettings
) -> dict[str, Any]:
    """Say whether the candidate becomes champion, and why: each rule with its figures."""
    accuracy = {name: c["test"]["accuracy"] for name, c in result["candidates"].items()}
    mine, reasons, promoted = accuracy[chosen], [], True
    if chosen != "baseline" and "baseline" in accuracy:
        better = mine > accuracy["baseline"]
        promoted &= better
        reasons.append(
            f"{chosen} has {mine:.2%} on {result['examples']:,} test images, {'more' if better else 'not more'} than the baseline's {accuracy['baseline']:.2%}"
        )
    elif chosen == "baseline":
        reasons.append(
            f"the baseline was chosen on validation; it has {mine:.2%} on {result['examples']:,} test images"
        )
    if champion is None:
        reasons.append("there was no champion before it")
        return {"promoted": promoted, "reasons": reasons}
    theirs, problem = champion_accuracy(champion, dataset)
    if problem:
        promoted = False
        reasons.append(
            f"the champion, version {champion.version}, cannot be compared ({problem}); set the alias by hand if it is to be replaced"
        )
    else:
        better = mine > theirs + settings.min_gain
        promoted &= better
        margin = f" by more than {settings.min_gain:.2%}" if settings.min_gain else ""
        reasons.append(
            f"the champion, version {champion.version}, has {theirs:.2%} on the same images: {'beaten' if better else 'not beaten'}{margin}"
        )
    return {"promoted": promoted, "reasons": reasons}


def champion_accuracy(champion: Any, dataset: Dataset) -> tuple[float, str]:
    """Return (the champion's accuracy on this dataset's test split, "") or (0, why it cannot be had)."""
    from graftwork.batches import SplitImages
    from graftwork.model import load_model, predict

    try:
        with tempfile.TemporaryDirectory() as temporary:
            model = load_model(download_version(champion, Path(temporary)))
    except (UserError, MlflowException, OSError) as error:
        return 0.0, one_line(error, 160)
    if model.classes != dataset.classes:
        gone, new = sorted(set(model.classes) - set(dataset.classes)), sorted(set(dataset.classes) - set(model.classes))
        return 0.0, one_line(
            f"its classes are others: {', '.join(['-' + c for c in gone] + ['+' + c for c in new])}", 160
        )
    test = SplitImages(dataset, "test", model.preprocess)
    return float((predict(model, test).argmax(1) == test.targets.numpy()).mean()), ""


def registry_name(name: str) -> str:
    """Return ``name`` as the registry takes it: no slash, colon or control character."""
    return "".join(c if c.isprintable() and c not in "/:" else "-" for c in name).strip()[:200] or "model"


def find_champion(client: MlflowClient, name: str) -> Any:
    """Return the version with the alias champion, or None."""
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise UserError(
            f"model registry: does not answer ({one_line(error, 120)}); check MLFLOW_TRACKING_URI"
        ) from None


def find_version(client: MlflowClient, name: str, sha256: str) -> str:
    """Return the version with these very weights, or ""."""
    escaped = name.replace("'", "\\'")
    found = client.search_model_versions(f"name = '{escaped}' and tags.`{SAME_WEIGHTS}` = '{sha256}'", max_results=1)
    return str(found[0].version) if found else ""


def log_version(
    client: MlflowClient,
    name: str,
    folder: Path,
    info: dict[str, Any],
    result: dict[str, Any],
    dataset: Dataset,
    run_id: str,
) -> str:
    """Log the Model artifact as a pyfunc in the run and register it; return the version."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    package = Path(__file__).parent
    versions = info["versions"]
    signature = ModelSignature(
        Schema([ColSpec(DataType.binary, "image")]),
        Schema([ColSpec(DataType.string, "label"), *(ColSpec(DataType.float, f"p_{c}") for c in info["classes"])]),
    )
    test = result["candidates"][result["chosen"]]["test"]
    with mlflow.start_run(run_id=run_id or None):
        mlflow.log_dict(profile(dataset), "profile.json")  # what later data is compared with
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "predictor.py"),
            artifacts={"model": str(folder)},
            code_paths=[str(package)],  # the version carries the code that it was trained with
            signature=signature,
            input_example=example_input(),
            pip_requirements=[f"{m}=={versions[m].split('+')[0]}" for m in ("torch", "timm", "numpy", "pillow")]
            + ["safetensors", "pydantic", "mlflow"],
            # log_model copies a run's metrics at this step; none has it.
            step=2**31 - 1,
        )
        made = mlflow.register_model(
            logged.model_uri,
            name,
            tags={
                SAME_WEIGHTS: info["sha256"],
                "graftwork.dataset_digest": info["dataset_digest"],
                "graftwork.backbone": info["backbone"],
                "graftwork.candidate": info["candidate"],
                "test_accuracy": f"{test['accuracy']:.6f}",
                "test_macro_f1": f"{test['macro_f1']:.6f}",
            },
        )
    return str(made.version)


def example_input() -> Any:
    """Return two small PNG images as a table: what a client sends."""
    import io

    import pandas as pd
    from PIL import Image

    pictures = []
    for shade in (64, 192):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (shade, shade, shade)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return pd.DataFrame({"image": pictures})


def described(client: MlflowClient, name: str, version: str) -> dict[str, Any]:
    found = client.get_model_version(name, version)
    return {"name": name, "version": int(version), "aliases": sorted(found.aliases)}


def download_version(version: Any, folder: Path) -> Path:
    """Fetch the files of a registered version and return the Model artifact among them."""
    from mlflow.artifacts import download_artifacts

    local = Path(download_artifacts(f"models:/{version.name}/{version.version}", dst_path=str(folder)))
    found = sorted(local.rglob("model.json"))
    if not found:
        raise UserError(f"model {version.name} version {version.version}: holds no Graftwork model")
    return found[0].parent
