"""Two ways in which what a step told came too early, or was turned away, and must not be dropped for it."""

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from graftwork import registry
from graftwork.errors import UserError
from graftwork.tracking import Follower, Journal, quiet_mlflow, tracking_uri


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    quiet_mlflow()
    yield
    os.environ.clear()
    os.environ.update(before)


def test_figures_of_a_model_whose_step_was_reused(tmp_path: Path) -> None:
    """MLflow's table would show a reused baseline without its test accuracy: its run is made at the end, after the evaluation's."""
    follower = Follower(tmp_path / "journals", tracking_uri(tmp_path), tmp_path, "late", {"graftwork.run": "late"})
    evaluation = Journal(tmp_path / "journals", "evaluate_model")
    evaluation.write("start")
    evaluation.metrics_of("abc", {"test_accuracy": 0.8})
    evaluation.write("end", status="FINISHED")
    follower.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "journals" / "evaluate_model.run").exists() or any(follower._waiting.values()):
        assert time.monotonic() < deadline, follower.error
        time.sleep(0.1)
    reused = Journal(tmp_path / "journals", "train_baseline")
    reused.write("start")
    reused.tags({"graftwork.model_sha256": "abc"})
    reused.write("end", status="FINISHED")
    follower.close(20)
    assert (follower.error, follower.unsent) == ("", [])
    found = follower.client().search_runs([follower.experiment_id], "tags.`graftwork.step` = 'train_baseline'")
    history = follower.client().get_metric_history(found[0].info.run_id, "test_accuracy")
    assert [point.value for point in history] == [0.8]


class Door(BaseHTTPRequestHandler):
    """Says what MLflow's server says to a wrong password."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        text = b"You are not authenticated."
        self.send_response(401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = do_DELETE = answer

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def door() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_password_that_is_refused_for_a_while_costs_no_event(door: str, tmp_path: Path) -> None:
    """A password that is changed in mid-training would cost the rest of the training's metrics, though it is mended an hour later."""
    journals = tmp_path / "journals"
    journal = Journal(journals, "fine_tune")
    journal.write("start")
    journal.metrics({"val_accuracy": 0.1})
    follower = Follower(journals, tracking_uri(tmp_path), tmp_path, "changed", {"graftwork.run": "changed"})
    follower._round()
    assert follower.unsent == []
    right = follower._client
    from mlflow import MlflowClient

    follower._client = MlflowClient(door, door)
    for epoch in range(1, 4):
        journal.metrics({"val_accuracy": epoch / 10}, epoch)
    follower._round()
    assert follower.refused == [] and len(follower.unsent) == 3
    assert "MLFLOW_TRACKING_PASSWORD" in follower.error
    follower._client = right
    journal.write("end", status="FINISHED")
    follower.close(20)
    assert (follower.error, follower.unsent) == ("", [])
    history = right.get_metric_history(follower._runs["fine_tune"], "val_accuracy")
    assert sorted(point.step for point in history) == [0, 1, 2, 3]


def test_the_registry_says_which_variable_holds_the_wrong_password(door: str) -> None:
    """A user would check the address, which is right, and read MLflow's documentation on how to authenticate."""
    from mlflow import MlflowClient

    client = MlflowClient(door, door)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD"):
        registry.find_champion(client, "any")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD"), registry.answering(door):
        client.get_registered_model("any")
