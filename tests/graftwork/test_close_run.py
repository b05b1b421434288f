"""The end of a cluster's pipeline run: MLflow learns what became of it, and what steps could not tell while it was away."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Server

from graftwork import steps, tracking

STEP = """
import os, signal, sys, time
from graftwork import steps
steps.LAST_WAIT = 3.0 if sys.argv[2] == "away" else 60.0
with steps.step(sys.argv[1]) as journal:
    for epoch in range(3):
        journal.metrics({"train_loss": 1.0 / (epoch + 1)}, epoch)
    journal.parent({"test_accuracy": 0.5}, {"graftwork.chosen": "baseline"}, [])
    if sys.argv[2] == "killed":
        journal.run_id()
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    before = dict(os.environ)
    tracking.quiet_mlflow()
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def pod(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a pod of a run finds in its environment; the folder that outlives it is returned."""
    monkeypatch.delenv(tracking.JOURNALS, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv(tracking.PIPELINE_RUN, tmp_path.name)
    monkeypatch.setenv(tracking.KEPT_JOURNALS, str(tmp_path / "volume"))
    return tmp_path / "volume" / tmp_path.name


def run(step: str, how: str = "") -> int:
    return subprocess.run([sys.executable, "-c", STEP, step, how], timeout=120).returncode


def family(server: Server, run: str) -> tuple[Any, dict[str, Any]]:
    """The parent run of a pipeline run, and its steps' runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    found = client.search_runs([experiment.experiment_id], f"tags.`graftwork.run` = '{run}'")
    (parent,) = [one for one in found if one.data.tags.get("graftwork.parent") == "true"]
    nested = [one for one in found if one.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(found) == 1 + len(nested) == 1 + len({one.data.tags["graftwork.step"] for one in nested})
    return parent, {one.data.tags["graftwork.step"]: one for one in nested}


def history(server: Server, one: Any) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    found = MlflowClient(server.uri).get_metric_history(one.info.run_id, "train_loss")
    return [(metric.step, metric.value) for metric in found]


EPOCHS = [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]


def test_a_run_that_went_well(server: Server, pod: Path) -> None:
    """MLflow would show a finished run as running for ever, without its figures, under the name of an id."""
    assert run("ingest_data") == run("fine_tune") == 0
    assert not list(pod.rglob("*.jsonl"))  # in MLflow already
    steps.close_run("COMPLETE", "", data="s3://bucket/flowers", backbone="resnet50")
    parent, nested = family(server, pod.name)
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "flowers resnet50")
    assert parent.data.metrics == {"test_accuracy": 0.5} and parent.data.tags["graftwork.chosen"] == "baseline"
    assert {one.info.status for one in nested.values()} == {"FINISHED"} and set(nested) == {"ingest_data", "fine_tune"}
    assert history(server, nested["fine_tune"]) == EPOCHS
    assert not pod.exists()


def test_mlflow_is_away_and_comes_back(server: Server, pod: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A night's training would have no figures, because the tracking server was restarted when it ended."""
    assert run("ingest_data") == 0
    server.kill()
    try:
        assert run("fine_tune", "away") == 0, "a step does not fail by its tracking"
        assert [path.name for path in pod.rglob("*.jsonl")] == ["fine_tune.jsonl"]
        missing = tracking.close_run(server.uri, pod.name, "FINISHED", "x", [pod / "fine_tune"], timeout=3)
        assert missing and (pod / "fine_tune/fine_tune.jsonl").exists()
    finally:
        server.start()
    steps.close_run("SUCCEEDED", "", data="digits", backbone="resnet50")
    parent, nested = family(server, pod.name)
    assert parent.info.status == nested["fine_tune"].info.status == "FINISHED"
    assert history(server, nested["fine_tune"]) == EPOCHS
    assert not pod.exists()


@pytest.mark.parametrize(("state", "status"), [("FAILED", "FAILED"), ("CANCELED", "KILLED")])
def test_a_pod_that_was_deleted(server: Server, pod: Path, state: str, status: str) -> None:
    """The run of a step that could say nothing more would stay RUNNING, beside a parent that does so too."""
    assert run("fine_tune", "killed") == -signal.SIGKILL
    assert family(server, pod.name)[1]["fine_tune"].info.status == "RUNNING"
    steps.close_run(state, "pod deleted", data="digits", backbone="resnet50")
    parent, nested = family(server, pod.name)
    assert parent.info.status == nested["fine_tune"].info.status == status
    assert history(server, nested["fine_tune"]) == EPOCHS


def test_a_step_that_is_tried_again_goes_on_in_its_run(server: Server, pod: Path) -> None:
    """A retried step would be two runs, and its epochs twice as many."""
    run("fine_tune", "killed")
    assert run("fine_tune") == 0
    steps.close_run("COMPLETE", "", data="digits", backbone="resnet50")
    parent, nested = family(server, pod.name)
    assert parent.info.status == nested["fine_tune"].info.status == "FINISHED"
    assert history(server, nested["fine_tune"]) == EPOCHS


@pytest.mark.parametrize("without", ["MLFLOW_TRACKING_URI", tracking.PIPELINE_RUN])
def test_nothing_to_close(pod: Path, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without tracking would end as a failure."""
    monkeypatch.delenv(without)
    started = time.monotonic()
    steps.close_run("FAILED", "", data="digits", backbone="resnet50")
    assert time.monotonic() - started < 1
