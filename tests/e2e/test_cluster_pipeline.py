"""The pipeline that a cluster gets, exit handler and all, through kfp's local runner, with every step its own follower as in a pod."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Server

pytestmark = pytest.mark.e2e

RUN = """
import json, sys, warnings
warnings.simplefilter("ignore")
from kfp import local
from graftwork.pipelines.image_classification import Cluster, make_pipeline
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1])
make_pipeline(cluster=Cluster(volume=""))(**json.loads(sys.argv[2]))
"""
STEPS = {
    "ingest_data",
    "validate_data",
    "extract_features",
    "train_baseline",
    "fine_tune",
    "evaluate_model",
    "register_model",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


def run(folder: Path, server: Server, run_id: str, **parameters: Any) -> subprocess.CompletedProcess[str]:
    import json

    environment = os.environ | {
        "MLFLOW_TRACKING_URI": server.uri,
        "GRAFTWORK_PIPELINE_RUN": run_id,
        "GRAFTWORK_KEPT_JOURNALS": str(folder / "journals"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    settings = {"data": "digits", "train_per_class": 20, "test_per_class": 20, "image_size": 32, "epochs": 1}
    settings |= {"plan_seconds": 0.0, "resamples": 100} | parameters
    return subprocess.run(
        [sys.executable, "-c", RUN, str(folder / "artifacts"), json.dumps(settings)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )


def family(server: Server, run_id: str) -> tuple[Any, dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("graftwork").experiment_id
    found = client.search_runs([experiment], f"tags.`graftwork.run` = '{run_id}'")
    (parent,) = [one for one in found if one.data.tags.get("graftwork.parent") == "true"]
    nested = {one.data.tags["graftwork.step"]: one for one in found if one is not parent}
    assert len(found) == 1 + len(nested)
    return parent, nested


def test_steps_in_pods_make_the_same_tree(tmp_path: Path, server: Server) -> None:
    """Runs of a cluster could not be compared with those of a laptop, or with each other."""
    from mlflow import MlflowClient

    found = run(tmp_path, server, "run-well")
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    parent, nested = family(server, "run-well")
    assert set(nested) == STEPS and {one.info.status for one in (parent, *nested.values())} == {"FINISHED"}
    assert parent.info.run_name == "digits tf_efficientnet_lite0"
    for candidate in ("baseline", "fine_tuned"):
        assert f"{candidate}_accuracy" in parent.data.metrics
    assert nested["fine_tune"].data.metrics["test_accuracy"] == parent.data.metrics["fine_tuned_accuracy"]
    assert parent.data.tags["graftwork.promoted"] == "true" and "ECE" in parent.data.tags["mlflow.note.content"]
    client = MlflowClient(server.uri)
    assert [one.path for one in client.list_artifacts(parent.info.run_id)] == ["report.html"]
    version = client.get_model_version_by_alias("digits", "champion")
    assert version.tags["graftwork.run"] == "run-well"
    assert not list((tmp_path / "journals").rglob("*.jsonl"))


def test_a_run_that_fails_is_closed_as_failed(tmp_path: Path, server: Server) -> None:
    """A failed run would be RUNNING in MLflow for ever, and the reason nowhere."""
    found = run(tmp_path, server, "run-badly", classes=["cat", "dog"])
    assert found.returncode != 0
    parent, nested = family(server, "run-badly")
    assert set(nested) == {"ingest_data", "validate_data"}
    assert parent.info.status == nested["validate_data"].info.status == "FAILED"
    assert "classes" in nested["validate_data"].data.tags["graftwork.error"]
