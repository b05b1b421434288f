"""Registration: the chosen Model becomes a version in MLflow's registry, and the champion only if the policy's rules say so.

The champion is evaluated again, now, on the same test examples: its recorded figures belong to another test set.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from graftwork.calibration import probabilities
from graftwork.card import model_card
from graftwork.dataset import Dataset
from graftwork.drift import profile
from graftwork.errors import UserError, one_line
from graftwork.gate import ChampionEvidence, Evidence, Policy, decide, parse_policy
from graftwork.metrics import HEADLINES, compare, score
from graftwork.modality import inputs, transforms
from graftwork.model import Floats, read_info
from graftwork.registry import (
    GATE,
    ROLLED_BACK,
    SAME_WEIGHTS,
    WAITING,
    answering,
    complete_promotion,
    described,
    find_champion,
    one_version,
    registry_name,
    settle,
)
from graftwork.report import markdown
from graftwork.settings import EvaluateSettings, RegisterSettings, parse
from graftwork.tracking import PIPELINE_RUN, source_tags, tracking_uri

TAGGED = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "auroc", "ece")  # MLflow's page lists every tag
__all__ = ["SAME_WEIGHTS", "download_version", "find_champion", "register", "registry_name"]


def register(
    dataset: Dataset,
    evaluation: Path,
    models: dict[str, Path],
    settings: RegisterSettings,
    run_id: Callable[[], str],
    validation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Register the evaluation's choice under the run that ``run_id`` gives, decide in its turn, and set the aliases.

    A model whose very weights are a version already makes no second one. ``validation`` holds the counts of the data's validation.

    Returns:
        {"chosen", "decision", "registered", "champion", "card"}; "champion" is the champion that it was compared with, evaluated now:
        {"version", "score", "comparison"}, or None.

    Raises:
        UserError: the policy is none, or the registry does not answer.
    """
    policy = parse_policy(settings.policy)
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    result = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    chosen, name = result["chosen"], registry_name(settings.register_as or dataset.info["name"])
    folder = models[chosen]
    info = read_info(folder)
    if result["dataset_digest"] != dataset.digest or result["candidates"][chosen]["sha256"] != info["sha256"]:
        raise UserError("register: the evaluation is of another dataset or model than these; evaluate again")
    with answering(uri):
        client = MlflowClient()
        champion = find_champion(client, name)
        if champion is not None and champion.tags.get(SAME_WEIGHTS) == info["sha256"]:
            # A try that was killed after the alias has promoted it: its decision holds, and what was left to do is done now.
            half_done = champion.tags.get(GATE) == WAITING
            decision = complete_promotion(client, champion)
            if not half_done:
                reason = f"this very model is version {champion.version}, the champion, already"
                decision = {"promoted": False, "reasons": [reason], "rules": [], "policy": policy.model_dump()}
            outcome = {
                "chosen": chosen,
                "decision": decision,
                "registered": described(client, name, champion.version),
                "champion": None,
            }
            card = champion.description or model_card(result, dataset.info, info, outcome, name)
            if not champion.description:
                client.update_model_version(name, champion.version, card)
            return outcome | {"card": card}
        version = one_version(
            client,
            name,
            info["sha256"],
            run_id(),
            lambda tags: log_version(name, folder, info, result, dataset, run_id(), tags),
        )
        seen: dict[str, Any] = {}

        def judge(against: Any) -> dict[str, Any]:
            seen.clear()
            mine = client.get_model_version(name, version)
            decision, seen["champion"] = judged(
                policy, dataset, evaluation, result, chosen, against, validation, ROLLED_BACK in mine.tags
            )
            return decision

        decision = settle(client, name, version, judge)
        outcome = {
            "chosen": chosen,
            "decision": decision,
            "registered": described(client, name, version),
            "champion": seen.get("champion"),
        }
        card = model_card(result, dataset.info, info, outcome, name)
        client.update_model_version(name, version, card)
        made_by = client.get_model_version(name, version).run_id
        if made_by:
            client.log_text(made_by, card, "model_card.md")
        return outcome | {"card": card}


def judged(
    policy: Policy,
    dataset: Dataset,
    evaluation: Path,
    result: dict[str, Any],
    chosen: str,
    champion: Any,
    validation: dict[str, Any] | None,
    rolled_back: bool,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the decision on the candidate against the champion as it is now, and what the champion's own evaluation gave."""
    targets = dataset.targets(dataset.split("test"))
    found = {name: read_logits(evaluation, name, result) for name in {chosen, "baseline"} & set(result["candidates"])}
    evidence = Evidence(
        candidate=chosen,
        targets=targets,
        probabilities=found[chosen],
        score=result["candidates"][chosen]["test"],
        baseline=found.get("baseline") if chosen != "baseline" else None,
        champion=None,
        validation=validation,
        size_mb=result["candidates"][chosen]["size_mb"],
        latency_ms=result["candidates"][chosen]["latency_ms"],
        rolled_back=rolled_back,
    )
    if champion is None:
        return decide(policy, evidence), None
    logits, temperature, problem = champion_logits(champion, dataset)
    version = str(champion.version)
    if logits is None:
        return decide(policy, evidence._replace(champion=ChampionEvidence(version, None, problem))), None
    theirs = probabilities(logits, temperature)
    settings = parse(EvaluateSettings, {"confidence": result["confidence"]})
    told = {
        "version": int(version),
        "score": score(targets, logits, dataset.classes, settings, temperature),
        "comparison": compare(targets, found[chosen], theirs, settings),
    }
    return decide(policy, evidence._replace(champion=ChampionEvidence(version, theirs, ""))), told


def read_logits(evaluation: Path, name: str, result: dict[str, Any]) -> Floats:
    logits = np.load(evaluation / f"logits-{name}.npy", allow_pickle=False)
    return probabilities(logits, result["candidates"][name]["temperature"])


def champion_logits(champion: Any, dataset: Dataset) -> tuple[Floats | None, float, str]:
    """Return (the champion's logits on this dataset's test split, its temperature, ""), or (None, 1, why they cannot be had)."""
    from graftwork.batches import Examples
    from graftwork.model import load_model, predict_logits

    try:
        with tempfile.TemporaryDirectory() as temporary:
            model = load_model(download_version(champion, Path(temporary)))
    except (UserError, MlflowException, OSError) as error:
        return None, 1.0, one_line(error, 160)
    if model.classes != dataset.classes:
        gone, new = sorted(set(model.classes) - set(dataset.classes)), sorted(set(dataset.classes) - set(model.classes))
        return (
            None,
            1.0,
            one_line(f"its classes are others: {', '.join(['-' + c for c in gone] + ['+' + c for c in new])}", 160),
        )
    return predict_logits(model, Examples(dataset, "test", model.preprocess)), model.temperature, ""


def log_version(
    name: str,
    folder: Path,
    info: dict[str, Any],
    result: dict[str, Any],
    dataset: Dataset,
    run_id: str,
    tags: dict[str, str],
) -> None:
    """Log the Model artifact as a pyfunc in the run and register it, with ``tags`` and those that say where it comes from."""
    package = Path(__file__).parent
    versions = info["versions"]
    test = result["candidates"][result["chosen"]]["test"]
    with mlflow.start_run(run_id=run_id or None):
        mlflow.log_dict(profile(dataset), "profile.json")  # what later data is compared with
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "predictor.py"),
            artifacts={"model": str(folder)},
            code_paths=[str(package)],  # the version carries the code that it was trained with
            signature=signature(info),
            input_example=inputs(info).example_table(),
            pip_requirements=[
                f"{m}=={versions[m].split('+')[0]}" for m in ("torch", "numpy", *transforms(info).LIBRARIES)
            ]
            + ["safetensors", "pydantic", "mlflow"],
            # log_model copies a run's metrics at this step; none has it.
            step=2**31 - 1,
        )
        run = mlflow.active_run()
        pipeline = os.environ.get(PIPELINE_RUN) or run.data.tags.get("graftwork.run", "")
        mlflow.register_model(
            logged.model_uri,
            name,
            tags={
                **tags,
                **source_tags(),
                "graftwork.dataset_digest": info["dataset_digest"],
                "graftwork.backbone": info["backbone"],
                "graftwork.candidate": info["candidate"],
                **({"graftwork.run": pipeline} if pipeline else {}),
                **{f"test_{key}": f"{test[key]:.6f}" for key in TAGGED if test[key] is not None},
            },
        )


def signature(info: dict[str, Any]) -> Any:
    """Return the signature of the registered model: one column in; the label and the probabilities out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    kind = inputs(info)
    return ModelSignature(
        Schema([ColSpec(DataType[kind.COLUMN_TYPE], kind.COLUMN)]),
        Schema([ColSpec(DataType.string, "label"), *(ColSpec(DataType.float, f"p_{c}") for c in info["classes"])]),
    )


def download_version(version: Any, folder: Path) -> Path:
    """Fetch the files of a registered version and return the Model artifact among them."""
    from mlflow.artifacts import download_artifacts

    local = Path(download_artifacts(f"models:/{version.name}/{version.version}", dst_path=str(folder)))
    found = sorted(local.rglob("model.json"))
    if not found:
        raise UserError(f"model {version.name} version {version.version}: holds no Graftwork model")
    return found[0].parent


def for_the_parent(result: dict[str, Any], outcome: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the metrics and tags by which pipeline runs are compared, from ``evaluation.json`` and the decision."""
    best = result["candidates"][result["chosen"]]
    metrics = {
        "val_accuracy": best["val"]["value"],
        **{f"test_{key}": best["test"][key] for key in HEADLINES if best["test"][key] is not None},
    }
    for name, candidate in result["candidates"].items():
        metrics |= {f"{name}_accuracy": candidate["test"]["accuracy"], f"{name}_seconds": candidate["seconds"]}
    tags = {
        "graftwork.dataset_digest": result["dataset_digest"],
        "graftwork.chosen": result["chosen"],
        "graftwork.promoted": str(outcome["decision"]["promoted"]).lower(),
        "mlflow.note.content": "\n".join(f"- {markdown(reason, 400)}" for reason in outcome["decision"]["reasons"]),
    }
    return metrics, tags
