"""Tracking: journals that cost a run nothing, and a follower that carries all of it to a real MLflow, or keeps it."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Server

import graftwork
from graftwork import tracking
from graftwork.tracking import Follower, Journal, JournalReader, quiet_mlflow, shown_uri, source_tags, tracking_uri
from graftwork.views import TAG, candidates_view

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """One try a request, and the environment as it was afterwards: quiet_mlflow sets it for the whole process."""
    before = dict(os.environ)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs, with an MLflow store in a SQLite file."""
    return tmp_path_factory.mktemp("runs é 1")


@pytest.fixture(scope="module")
def client(output: Path) -> Any:
    quiet_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(output), tracking_uri(output))


def follow(output: Path, journals: Path, name: str, **options: Any) -> Follower:
    journals.mkdir(parents=True, exist_ok=True)
    return Follower(journals, tracking_uri(output), output, name, {"graftwork.run": name, "team": "ants"}, **options)


def runs(client: Any, follower: Follower) -> dict[str, Any]:
    """Return {step: its run} under the follower's parent."""
    found = client.search_runs([follower.experiment_id], f"tags.mlflow.parentRunId = '{follower.parent_id}'")
    return {run.data.tags["graftwork.step"]: run for run in found}


@pytest.fixture(scope="module")
def followed(
    output: Path, client: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Follower, Any, dict[str, Any]]:
    """A run of three steps, followed while it goes on: one that ends well, one that fails, one that is killed."""
    journals = tmp_path_factory.mktemp("journals")
    follower = follow(output, journals, "run-1")
    follower.start()
    good = Journal(journals, "fine_tune")
    good.write("start", pid=1)
    good.params({"epochs": 3, "strategy": "full", "mean": [0.5], "long": "x" * 20_000})
    for epoch in range(3):
        good.metrics({"val_accuracy": 0.5 + epoch / 10, "loss": float("nan") if epoch == 2 else 1.0}, epoch)
        good.progress(epoch, 3)
    run_id = good.run_id(30)  # the run is made while the step goes on
    good.metrics({f"m{n}": n for n in range(1200)})  # more than a request may hold
    good.params({f"p{n}": n for n in range(150)})
    good.tags({"graftwork.backbone": "vgg11"})
    good.dataset("digits", "d" * 32, "digits", "training")
    for name, folder in (("model.json", ""), ("plot.png", "evaluation")):
        (journals / name).write_text(name)
        good.artifact(journals / name, folder)
    good.artifact(journals / "missing.txt")
    good.write("end", status="FINISHED")
    bad = Journal(journals, "evaluate_model")
    bad.write("start")
    bad.write("error", message="out of memory")
    bad.write("end", status="FAILED")
    killed = Journal(journals, "register_model")
    killed.write("start")
    killed.params({"min_gain": 0.0})
    follower.close(30)
    follower.finish("FINISHED")
    return follower, run_id, runs(client, follower)


def test_a_parent_and_a_nested_run_a_step(followed, client: Any) -> None:
    """A user would find the steps of all runs in one heap, or not find them at all."""
    follower, run_id, steps = followed
    assert (follower.error, follower.unsent) == ("", [])
    assert set(steps) == {"fine_tune", "evaluate_model", "register_model"}
    assert steps["fine_tune"].info.run_id == run_id and steps["fine_tune"].info.run_name == "fine_tune"
    parent = client.get_run(follower.parent_id)
    assert parent.info.run_name == "run-1" and parent.data.tags["graftwork.run"] == "run-1"
    assert all(run.data.tags["graftwork.run"] == "run-1" and run.data.tags["team"] == "ants" for run in steps.values())


def test_the_runs_end_as_the_steps_ended(followed, client: Any) -> None:
    """A user would see runs that go on for ever, or a failure that is shown as a success."""
    follower, _, steps = followed
    assert {name: run.info.status for name, run in steps.items()} == {
        "fine_tune": "FINISHED",
        "evaluate_model": "FAILED",
        "register_model": "FAILED",  # it never said how it ended
    }
    assert steps["evaluate_model"].data.tags["graftwork.error"] == "out of memory"
    assert client.get_run(follower.parent_id).info.status == "FINISHED"
    assert all(run.info.start_time <= run.info.end_time <= time.time() * 1000 for run in steps.values())


def test_params_tags_and_metrics_by_step(followed, client: Any) -> None:
    """A user could not see with what a model was trained, nor the curve of its training."""
    _, run_id, steps = followed
    data = steps["fine_tune"].data
    assert {k: data.params[k] for k in ("epochs", "strategy", "mean")} == {
        "epochs": "3",
        "strategy": "full",
        "mean": "[0.5]",
    }
    assert len(data.params["long"]) == 6000 and [data.params[f"p{n}"] for n in range(150)] == [
        str(n) for n in range(150)
    ]
    assert data.tags["graftwork.backbone"] == "vgg11"
    assert [data.metrics[f"m{n}"] for n in range(1200)] == list(range(1200))
    history = client.get_metric_history(run_id, "val_accuracy")
    assert sorted((m.step, round(m.value, 3)) for m in history) == [(0, 0.5), (1, 0.6), (2, 0.7)]
    loss = {m.step: m.value for m in client.get_metric_history(run_id, "loss")}
    assert loss[0] == 1.0 and loss[2] != loss[2]


def test_the_dataset_is_an_input_of_the_run(followed, client: Any) -> None:
    """A user could not tell which data a model comes from."""
    (found,) = client.get_run(followed[1]).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("digits", "d" * 32)
    assert {t.key: t.value for t in found.tags} == {"mlflow.data.context": "training"}
    assert json.loads(found.dataset.source) == {"uri": "digits"}


def test_artifacts_are_stored_under_their_folder_beside_the_database(followed, client: Any, output: Path) -> None:
    """A user would find no report and no plot in MLflow, or find them strewn over the working directory."""
    _, run_id, _ = followed
    assert [a.path for a in client.list_artifacts(run_id) if not a.is_dir] == ["model.json"]
    assert [a.path for a in client.list_artifacts(run_id, "evaluation")] == ["evaluation/plot.png"]
    stored = list((output / "mlartifacts").rglob("plot.png"))
    assert len(stored) == 1 and stored[0].read_text() == "plot.png"


def test_the_experiment_opens_on_training_runs(followed, client: Any) -> None:
    """A user of MLflow 3 would land on an empty page of chat traces."""
    experiment = client.get_experiment(followed[0].experiment_id)
    assert experiment.name == "graftwork"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert experiment.tags[TAG] == candidates_view()


def test_an_interrupted_run_is_shown_as_killed(output: Path, client: Any, tmp_path: Path) -> None:
    """A user who pressed Ctrl-C would see the run go on for ever."""
    follower = follow(output, tmp_path, "run-killed")
    follower.start()
    Journal(tmp_path, "fine_tune").write("start")
    follower.close(20)
    follower.finish("KILLED")
    assert runs(client, follower)["fine_tune"].info.status == "KILLED"
    assert client.get_run(follower.parent_id).info.status == "KILLED"


def test_a_step_resumes_the_run_it_is_given(output: Path, client: Any, tmp_path: Path) -> None:
    """A user of Kubeflow's MLflow plugin would have each step twice: an empty run and one beside it."""
    experiment = client.get_experiment_by_name("graftwork")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("graftwork")
    run_id = client.create_run(experiment_id).info.run_id
    before = len(client.search_runs([experiment_id], max_results=1000))
    follower = follow(output, tmp_path, "run-resumed", resume=run_id, with_parent=False)
    follower.start()
    journal = Journal(tmp_path, "ingest_data")
    journal.write("start")
    journal.metrics({"train_examples": 5})
    assert journal.run_id(20) == run_id
    journal.write("end", status="FINISHED")
    follower.close(20)
    run = client.get_run(run_id)
    assert run.data.metrics == {"train_examples": 5} and run.info.status == "FINISHED"
    assert len(client.search_runs([experiment_id], max_results=1000)) == before


def test_followers_of_one_pipeline_run_share_its_parent(output: Path, client: Any, tmp_path: Path) -> None:
    """A user's steps on a cluster, each with its own follower, would each get a parent of their own."""
    followers = []
    for step in ("ingest_data", "fine_tune"):
        follower = follow(output, tmp_path / step, "run-shared")
        follower.start()
        Journal(tmp_path / step, step).write("start")
        follower.close(20)
        followers.append(follower)
    assert followers[0].parent_id == followers[1].parent_id != ""
    assert set(runs(client, followers[0])) == {"ingest_data", "fine_tune"}


def test_the_experiment_may_be_another(output: Path, client: Any, tmp_path: Path, monkeypatch) -> None:
    """A user's MLFLOW_EXPERIMENT_NAME would be passed over."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "beetles")
    client.create_experiment("beetles")
    follower = follow(output, tmp_path, "run-beetles")
    follower.start()
    follower.close(20)
    experiment = client.get_experiment(follower.experiment_id)
    assert experiment.name == "beetles"
    assert TAG in experiment.tags  # the user's own experiment shows the candidates side by side too


def test_an_experiment_that_may_not_be_changed_takes_runs(
    output: Path, client: Any, tmp_path: Path, monkeypatch
) -> None:
    """A team's experiment, which she may log to and not change, would take none of her runs for want of a view."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def refuse(*_: Any) -> None:
        raise MlflowException("Permission denied")

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "locked")
    client.create_experiment("locked")
    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    follower = follow(output, tmp_path, "run-locked")
    follower.start()
    follower.close(20)
    assert follower.parent_id and not follower.error


# ---- what goes wrong -----------------------------------------------------------------------------------------------------------


def test_test_figures_go_to_the_run_that_trained_the_model(output: Path, client: Any, tmp_path: Path) -> None:
    """MLflow's table compares runs: a candidate without its test figures beside its training's cannot be compared."""
    follower = follow(output, tmp_path, "run-candidates")
    for step in ("train_baseline", "fine_tune"):
        journal = Journal(tmp_path, step)
        journal.write("start")
        journal.tags({"graftwork.model_sha256": step})
        journal.write("end", status="FINISHED")
    follower._round()
    evaluation = Journal(tmp_path, "evaluate_model")
    evaluation.write("start")
    evaluation.metrics({"test_accuracy": 0.9})
    evaluation.metrics_of("train_baseline", {"test_accuracy": 0.8})
    evaluation.metrics_of("fine_tune", {"test_accuracy": 0.9})
    evaluation.metrics_of("another", {"test_accuracy": 0.1})
    evaluation.write("end", status="FINISHED")
    follower.close(20)
    assert (follower.error, follower.unsent) == ("", [])
    found = {step: run.data.metrics.get("test_accuracy") for step, run in runs(client, follower).items()}
    assert found == {"train_baseline": 0.8, "fine_tune": 0.9, "evaluate_model": 0.9}


def test_a_server_that_is_away_costs_neither_the_run_nor_its_events(output: Path, client: Any, tmp_path: Path) -> None:
    """A user whose server was down for the night would lose the night's training, or all record of it."""
    follower = Follower(tmp_path, NOWHERE, output, "run-away", {"graftwork.run": "run-away"})
    follower.start()
    journal = Journal(tmp_path, "fine_tune")
    journal.write("start")
    for epoch in range(5):
        journal.metrics({"val_accuracy": epoch / 10}, epoch)
        time.sleep(0.15)
    journal.write("end", status="FINISHED")
    began = time.monotonic()
    follower.close(1)
    assert time.monotonic() - began < 10
    follower.finish("FAILED")
    assert "127.0.0.1" in follower.error
    assert [e["event"] for _, e in follower.unsent] == ["start", *["metrics"] * 5, "end"]
    assert [e["step"] for _, e in follower.unsent if e["event"] == "metrics"] == list(range(5))
    # The server is back (as a SQLite file): all that was kept is carried, once.
    follower.uri, follower._client = tracking_uri(output), None
    follower.close(20)
    assert (follower.error, follower.unsent) == ("", [])
    run = runs(client, follower)["fine_tune"]
    history = client.get_metric_history(run.info.run_id, "val_accuracy")
    assert [m.step for m in history] == list(range(5)) and run.info.status == "FINISHED"


def test_what_mlflow_refuses_holds_back_nothing_else(output: Path, client: Any, tmp_path: Path) -> None:
    """A user would lose the metrics, the ends and the later steps of a run for one value that MLflow does not take."""
    follower = follow(output, tmp_path, "run-refused")
    first, second = Journal(tmp_path, "a_step"), Journal(tmp_path, "b_step")
    first.write("start")
    first.params({"epochs": 3})
    follower._round()
    first.params({"epochs": 4})  # MLflow: a param may not be changed
    first.metrics({"loss": 1.0})
    first.tags({"graftwork.backbone": "vgg11"})
    first.write("end", status="FINISHED")
    second.write("start")
    second.metrics({"loss": 2.0})
    second.write("end", status="FINISHED")
    follower.start()
    follower.close(1)
    found = runs(client, follower)
    assert found["b_step"].data.metrics == {"loss": 2.0} and found["b_step"].info.status == "FINISHED"
    assert found["a_step"].data.metrics == {"loss": 1.0} and found["a_step"].data.params == {"epochs": "3"}
    assert found["a_step"].data.tags["graftwork.backbone"] == "vgg11" and found["a_step"].info.status == "FINISHED"
    assert {e["event"] for _, e in follower.unsent} == {"params"} and "epochs" in follower.error


def test_a_step_killed_in_the_midst_of_its_progress_does_not_delay_the_end(output: Path, tmp_path: Path) -> None:
    """A user whose step ran out of memory would wait a minute more for the one line that says so."""
    follower = follow(output, tmp_path, "run-progress")
    journal = Journal(tmp_path, "fine_tune")
    journal.write("start")
    follower._round()
    journal.progress(10, 10)
    follower.start()
    began = time.monotonic()
    follower.close(8)
    assert time.monotonic() - began < 6
    assert (follower.error, follower.unsent) == ("", [])


def test_a_damaged_line_does_not_stop_the_follower(output: Path, client: Any, tmp_path: Path) -> None:
    """A user would lose the record of a whole run for one line that a dying process left unfinished."""
    follower = follow(output, tmp_path, "run-damaged")
    journal = Journal(tmp_path, "fine_tune")
    journal.write("start")
    with (tmp_path / "fine_tune.jsonl").open("a") as file:
        file.write('{"event": "metr\n')
    journal.metrics({"loss": 1.0})
    journal.write("end", status="FINISHED")
    follower.start()
    follower.close(10)
    run = runs(client, follower)["fine_tune"]
    assert run.data.metrics == {"loss": 1.0} and run.info.status == "FINISHED"


# ---- a real server, that dies, is slow, or whose answers are lost ------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def served(server: Server) -> Any:
    quiet_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(server.uri, server.uri)


class Proxy(ThreadingHTTPServer):
    """Stands before the server: late with requests or answers, or losing answers to requests that were carried out."""

    daemon_threads = True

    def __init__(self, server: Server) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.behind = server.port
        self.uri = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        self.lost: list[str] = []
        self.delay = 0.0
        self.hold: Callable[[str], Any] = lambda path: None  # returns when a request is to be passed on
        self.loses: Callable[[str], bool] = lambda path: False
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what these tests are about."""


class ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = f"{self.command} {self.path.partition('?')[0]}"
        lose = self.server.loses(path)
        self.server.asked.append(path)
        self.server.hold(path)
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        behind.request(self.command, self.path, body, dict(self.headers))
        answer = behind.getresponse()
        content = answer.read()
        behind.close()
        time.sleep(self.server.delay)
        if lose:
            self.server.lost.append(path)
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def follow_server(uri: str, journals: Path, name: str, **options: Any) -> Follower:
    return Follower(journals, uri, journals, name, {"graftwork.run": name}, **options)


class Training(threading.Thread):
    """A step that journals two metrics, forty times a second, until it is stopped."""

    def __init__(self, journals: Path, at_least: int = 0) -> None:
        super().__init__(daemon=True)
        self.journal, self.at_least = Journal(journals, "fine_tune"), at_least
        self.seconds: list[float] = []  # that each write took
        self.stop = threading.Event()
        self.journal.write("start")

    def run(self) -> None:
        while not self.stop.wait(0.025) or len(self.seconds) < self.at_least:
            began = time.monotonic()
            step = len(self.seconds)
            self.journal.metrics({"loss": 1 / (1 + step), "val_accuracy": step / 10_000}, step)
            self.seconds.append(time.monotonic() - began)

    def end(self) -> None:
        self.stop.set()
        self.join()
        self.journal.write("end", status="FINISHED")

    def was_not_slowed(self) -> bool:
        """A write takes microseconds. Bounds are far above those, for busy machines, and far below a server's silence."""
        return sorted(self.seconds)[int(0.99 * len(self.seconds))] < 0.05 and max(self.seconds) < 0.5


def all_of_it_is_there_once(client: Any, follower: Follower, training: Training) -> str:
    """Check the only nested run of the only parent against what was journaled, and return its id."""
    assert (follower.error, follower.unsent) == ("", [])
    where = f"tags.`graftwork.run` = '{follower.parent_tags['graftwork.run']}'"
    found = client.search_runs([follower.experiment_id], where)
    assert sorted(run.data.tags.get("graftwork.step", "") for run in found) == ["", "fine_tune"]
    (nested,) = (run for run in found if "graftwork.step" in run.data.tags)
    assert nested.data.tags["mlflow.parentRunId"] == follower.parent_id and nested.info.status == "FINISHED"
    for name in ("loss", "val_accuracy"):
        steps = Counter(metric.step for metric in client.get_metric_history(nested.info.run_id, name))
        assert steps == Counter(range(len(training.seconds)))
    return str(nested.info.run_id)


def test_a_server_killed_and_restarted_in_mid_training(server: Server, served: Any, tmp_path: Path) -> None:
    """A user whose server is restarted would find gaps or double points in the curves, or a training that waited for it."""
    follower = follow_server(server.uri, tmp_path, "run-restarted")
    training = Training(tmp_path)
    follower.start()
    training.start()
    assert training.journal.run_id(60)
    time.sleep(1)  # so that it dies while metrics are on their way
    server.kill()
    began, before = time.monotonic(), len(training.seconds)
    time.sleep(2)
    assert follower.error and len(training.seconds) > before + 20
    server.start()
    away = time.monotonic() - began
    time.sleep(1)
    training.end()
    follower.close(60)
    all_of_it_is_there_once(served, follower, training)
    assert training.was_not_slowed(), max(training.seconds)
    assert len(training.seconds) - before > away / 0.025 / 4


@pytest.mark.parametrize("retries", [0, 2])
def test_lost_answers_lose_nothing_and_double_nothing(
    retries: int, proxy: Proxy, served: Any, tmp_path: Path, monkeypatch
) -> None:
    """A user would see runs, points and files twice: the server did what it was asked, and its answer never came.

    MLflow's client itself asks again, without a look: that it is told to (retries) must change nothing.
    """
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(retries))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"lossy-{retries}")
    monkeypatch.setattr(tracking, "LONGEST_PAUSE", 0.2)
    # The first answer of each kind is lost, and every third.
    proxy.loses = lambda path: path not in proxy.asked or len(proxy.asked) % 3 == 2
    follower = follow_server(proxy.uri, tmp_path, f"run-lossy-{retries}")
    training = Training(tmp_path, at_least=100)
    follower.start()
    training.start()
    (tmp_path / "plot.png").write_text("plot")
    training.journal.params({"epochs": 3})
    training.journal.tags({"graftwork.backbone": "vgg11"})
    training.journal.dataset("digits", "d" * 32, "digits", "training")
    training.journal.artifact(tmp_path / "plot.png", "evaluation")
    assert training.journal.run_id(60)
    training.end()
    follower.close(60)
    follower._client = served  # to look and to end without losses
    follower.finish("FINISHED")
    run_id = all_of_it_is_there_once(served, follower, training)
    lost = {path.rpartition("/mlflow/")[2] for path in proxy.lost}
    assert {"experiments/create", "runs/create", "runs/log-batch", "runs/log-inputs", "runs/update"} <= lost
    assert any("mlflow-artifacts" in path for path in proxy.lost)
    run = served.get_run(run_id)
    assert run.data.params == {"epochs": "3"} and run.data.tags["graftwork.backbone"] == "vgg11"
    assert len(run.inputs.dataset_inputs) == 1
    assert [file.path for file in served.list_artifacts(run_id, "evaluation")] == ["evaluation/plot.png"]


def test_a_run_that_is_made_late_does_not_stay_beside_the_other(
    proxy: Proxy, served: Any, tmp_path: Path, monkeypatch
) -> None:
    """A user of a server that stalls would find an empty run beside each true one, shown as running for ever."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setattr(tracking, "LONGEST_PAUSE", 0.2)
    late = threading.Event()
    # The first request for a parent and the first for a step are given up by the client, and carried out when all is done.
    proxy.hold = lambda path: path.endswith("runs/create") and proxy.asked.count(path) in (1, 3) and late.wait(60)
    follower = follow_server(proxy.uri, tmp_path, "run-late")
    training = Training(tmp_path)
    follower.start()
    training.start()
    assert training.journal.run_id(60)
    training.end()
    late.set()
    deadline, made = time.monotonic() + 30, 0
    while made < 4 and time.monotonic() < deadline:  # a parent and a step, and what was given up
        made = len(served.search_runs([follower.experiment_id], "tags.`graftwork.run` = 'run-late'"))
    assert made == 4
    follower.close(60)
    follower.finish("FINISHED")
    all_of_it_is_there_once(served, follower, training)


def test_a_slow_server_slows_nothing(proxy: Proxy, served: Any, tmp_path: Path) -> None:
    """A user's training would wait for MLflow at each epoch, and its end for as long as the server likes."""
    proxy.delay = 2.0
    follower = follow_server(proxy.uri, tmp_path, "run-slow")
    training = Training(tmp_path)
    follower.start()
    training.start()
    time.sleep(4)
    training.end()
    assert training.was_not_slowed(), max(training.seconds)
    assert len(training.seconds) > 60
    began = time.monotonic()
    follower.close(1)
    assert time.monotonic() - began < 1.5
    assert follower.error and follower.unsent
    # What was not carried in time is kept, and can be carried later, once.
    proxy.delay = 0.0
    follower.close(60)
    all_of_it_is_there_once(served, follower, training)


def test_metrics_go_in_batches(proxy: Proxy, tmp_path: Path) -> None:
    """A user's team would have its server flooded with a request for every metric."""
    follower = follow_server(proxy.uri, tmp_path, "run-batches")
    journal = Journal(tmp_path, "fine_tune")
    journal.write("start")
    journal.params({"epochs": 3})
    journal.tags({"graftwork.backbone": "vgg11"})
    for epoch in range(1000):
        journal.metrics({"loss": 1 / (1 + epoch)}, epoch)
    journal.write("end", status="FINISHED")
    follower.close(60)
    assert (follower.error, follower.unsent) == ("", [])
    assert sum(path.endswith("log-batch") for path in proxy.asked) == 3  # 1002 values
    assert len(proxy.asked) <= 11


# ---- a step that is tried again ----------------------------------------------------------------------------------------------------


def test_a_step_tried_again_goes_on_in_its_run(output: Path, client: Any, tmp_path: Path) -> None:
    """A user of a cluster would have two runs of a step whose pod was lost, or every epoch before the checkpoint twice."""
    tries = []
    for n, last in enumerate((3, 5)):  # the second goes on from a checkpoint, and tells the first epochs again
        follower = follow(output, tmp_path / str(n), "run-again")
        journal = Journal(tmp_path / str(n), "fine_tune")
        journal.write("start")
        for epoch in range(last):
            journal.metrics({"val_accuracy": epoch / 7, "loss": float("nan")}, epoch)
        if last == 5:
            journal.metrics({"val_accuracy": 4 / 7, "parameters": 5e5}, 4)  # as a step does for the epoch it keeps
            journal.write("end", status="FINISHED")
        follower.close(20)
        assert (follower.error, follower.unsent) == ("", [])
        follower.finish("FAILED" if last == 3 else "FINISHED")
        tries.append(follower)
    assert tries[0].parent_id == tries[1].parent_id
    found = client.search_runs([tries[1].experiment_id], "tags.`graftwork.run` = 'run-again'")
    assert len(found) == 2 and {run.info.status for run in found} == {"FINISHED"}
    run = runs(client, tries[1])["fine_tune"]
    for name in ("val_accuracy", "loss"):
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
        assert sorted(steps) == list(range(5))


def test_a_metric_that_changes_and_changes_back(output: Path, client: Any, tmp_path: Path) -> None:
    """A user would be shown the value before the last, for the last was known already."""
    follower = follow(output, tmp_path, "run-back")
    journal = Journal(tmp_path, "fine_tune")
    journal.write("start")
    for value in (1.0, 1.0, 2.0, 1.0, 1.0):
        journal.metrics({"images": value})
        time.sleep(0.01)
        if value == 2.0:
            follower._round()
    follower.close(10)
    run = runs(client, follower)["fine_tune"]
    history = sorted(client.get_metric_history(run.info.run_id, "images"), key=lambda m: m.timestamp)
    assert [m.value for m in history] == [1.0, 2.0, 1.0]
    assert run.data.metrics == {"images": 1.0}


def test_a_step_tried_again_in_the_same_journal(output: Path, client: Any, tmp_path: Path) -> None:
    """A user would see as FAILED, or RUNNING for ever, a step that was tried again and ended well."""
    follower = follow(output, tmp_path, "run-same-journal")
    for status in ("FAILED", "FINISHED"):
        for again in range(2):  # once within a round of the follower, once between two
            journal = Journal(tmp_path, "fine_tune")
            journal.write("start")
            journal.metrics({"loss": 1.0}, again)
            if not again:
                journal.write("end", status="FAILED")
        follower._round()
        assert runs(client, follower)["fine_tune"].info.status == "RUNNING"
        journal.write("end", status=status)
        follower._round()
        assert runs(client, follower)["fine_tune"].info.status == status
    follower.close(5)
    assert (follower.error, follower.unsent) == ("", [])
    run = runs(client, follower)["fine_tune"]
    assert sorted(m.step for m in client.get_metric_history(run.info.run_id, "loss")) == [0, 1]


def test_a_store_of_artifacts_that_fails_holds_back_nothing_else(
    output: Path, client: Any, tmp_path: Path, monkeypatch
) -> None:
    """A user whose bucket is full or forbidden would see neither the metrics nor the ends of all later steps."""
    (tmp_path / "bucket").write_text("no folder")
    client.create_experiment("broken-store", (tmp_path / "bucket" / "artifacts").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "broken-store")
    follower = follow(output, tmp_path, "run-store")
    for step in ("a_step", "b_step"):
        journal = Journal(tmp_path, step)
        journal.write("start")
        journal.artifact(tmp_path / "bucket")
        journal.metrics({"loss": 1.0})
        journal.write("end", status="FINISHED")
    follower.close(1)
    found = runs(client, follower)
    assert [(run.data.metrics, run.info.status) for run in found.values()] == [({"loss": 1.0}, "FINISHED")] * 2
    assert [(step, e["event"]) for step, e in follower.unsent] == [("a_step", "artifact"), ("b_step", "artifact")]
    assert "bucket" in follower.error


def test_a_line_after_a_torn_one_is_not_lost(tmp_path: Path) -> None:
    """A user's step, killed in the midst of a line, would lose the first event of its second try."""
    torn = """
import os, signal, sys
from pathlib import Path
from graftwork.tracking import Journal
journal = Journal(Path(sys.argv[1]), "fine_tune")
journal.metrics({"loss": 1.0}, 0)
os.write(journal._file.fileno(), b'{"event": "metrics", "time": 17')
os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", torn, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    journal = Journal(tmp_path, "fine_tune")
    journal.metrics({"loss": 0.5}, 1)
    assert [e["step"] for _, e in JournalReader(tmp_path).poll()] == [0, 0, 1]
    assert b"\n\n" not in (tmp_path / "fine_tune.jsonl").read_bytes()


# ---- what the machine is doing -------------------------------------------------------------------------------------------------


def system_metrics(journals: Path) -> list[dict[str, Any]]:
    return [e for _, e in JournalReader(journals).poll() if e["event"] == "metrics"]


def test_system_metrics_under_mlflows_own_names(tmp_path: Path) -> None:
    """A user would look in vain for memory and processor on the run's page of system metrics."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    with Journal(tmp_path, "fine_tune").system_metrics(0.1):
        busy = time.monotonic() + 1
        while time.monotonic() < busy:
            pass
    found = system_metrics(tmp_path)
    assert [e["step"] for e in found] == list(range(len(found))) and 2 <= len(found) <= 11
    mlflows = CPUMonitor()
    mlflows.collect_metrics()
    for event in found:
        values = event["values"]
        assert {f"system/{name}" for name in mlflows.metrics} | {"system/process_memory_megabytes"} <= set(values)
        assert 0 <= values["system/cpu_utilization_percentage"] <= 100
        assert 10 < values["system/process_memory_megabytes"] < values["system/system_memory_usage_megabytes"] * 2
    assert max(e["values"]["system/cpu_utilization_percentage"] for e in found) > 10


def test_system_metrics_of_a_short_step_and_of_one_tried_again(tmp_path: Path) -> None:
    """A user would see nothing of a step of seconds, and of a step that was tried again two curves in one."""
    for _ in range(2):
        with Journal(tmp_path, "fine_tune").system_metrics():
            pass
    assert [e["step"] for e in system_metrics(tmp_path)] == [0, 1]


def test_system_metrics_end_with_the_step(tmp_path: Path) -> None:
    """A user's failed step would go on writing, and take seconds to die."""
    before = threading.active_count()
    began = time.monotonic()
    with pytest.raises(ValueError, match="bad"), Journal(tmp_path, "fine_tune").system_metrics():
        raise ValueError("bad")
    assert threading.active_count() == before and time.monotonic() - began < 2


def test_system_metrics_import_nothing_heavy_and_keep_no_process_alive(tmp_path: Path) -> None:
    """A user would wait seconds more for each step's start, and for its end until the next sample."""
    code = """
import sys, time
from pathlib import Path
from graftwork.tracking import Journal
sampling = Journal(Path(sys.argv[1]), "fine_tune").system_metrics(0.05)
sampling.__enter__()
time.sleep(0.3)
print(sorted({"torch", "mlflow", "numpy", "pandas"} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[]\n", "") and system_metrics(tmp_path)


def test_system_metrics_cost_less_than_a_thousandth_of_a_core(tmp_path: Path) -> None:
    """A user's training would pay for the curves that nobody looks at."""
    journal = Journal(tmp_path, "fine_tune")
    began = time.thread_time()
    for n in range(100):
        journal.metrics({f"system/{name}": value for name, value in tracking._system_usage().items()}, n)
    assert (time.thread_time() - began) / 100 < 10.0 / 1000


def test_system_metrics_of_the_gpu_in_use(tmp_path: Path) -> None:
    """A user could not see that a GPU idles, or that its memory is nearly full."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    held = torch.zeros(64 * 2**20, device="cuda")
    usage = tracking._system_usage()
    assert usage["gpu_0_memory_usage_megabytes"] > held.numel() * 4 / 1e6
    assert 0 < usage["gpu_0_memory_usage_percentage"] <= 100


# ---- journals ------------------------------------------------------------------------------------------------------------------


def test_a_half_written_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    """A user would lose the event that was being written when the follower looked, or see it twice."""
    path = tmp_path / "step.jsonl"
    lines = [
        json.dumps({"event": "params", "time": n, "n": "é中"}, ensure_ascii=False).encode() + b"\n" for n in range(3)
    ]
    reader = JournalReader(tmp_path)
    assert reader.poll() == []
    whole = b"".join(lines)
    seen = []
    for start in range(0, len(whole), 7):  # cuts inside lines, and inside letters
        with path.open("ab") as file:
            file.write(whole[start : start + 7])
        seen += reader.poll()
    assert [(step, e["time"], e["n"]) for step, e in seen] == [("step", n, "é中") for n in range(3)]
    assert reader.poll() == []


def test_events_of_several_steps_come_in_the_order_of_their_time(tmp_path: Path) -> None:
    """A user's run would be told in the wrong order: the step that failed first would not be the one named."""
    for step, times in (("a", (3, 5)), ("b", (1, 4)), ("c", (2,))):
        (tmp_path / f"{step}.jsonl").write_text("".join(json.dumps({"event": "x", "time": t}) + "\n" for t in times))
    assert [(step, e["time"]) for step, e in JournalReader(tmp_path).poll()] == [
        ("b", 1),
        ("c", 2),
        ("a", 3),
        ("b", 4),
        ("a", 5),
    ]


def test_a_journal_keeps_what_was_written_word_for_word(tmp_path: Path) -> None:
    """A user's class names, paths or messages would be changed, or break the journal's lines."""
    journal = Journal(tmp_path, "step")
    text = 'two\nlines\u2028 "é" \\ 中 \x00'
    journal.write("error", message=text)
    journal.tags({"path": Path("a b")})
    journal.notes([text, "x"])
    found = [e for _, e in JournalReader(tmp_path).poll()]
    assert [e.get("message", e.get("values")) for e in found] == [text, {"path": "a b"}, text, "x"]


def test_a_journal_takes_events_from_many_threads(tmp_path: Path) -> None:
    """A user's events would be torn into one another where a step writes from several threads."""
    journal = Journal(tmp_path, "step")

    def write(thread: int) -> None:
        for n in range(100):
            journal.metrics({"loss": n, "x" * 3000: thread}, n)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(e["values"]["x" * 3000], e["step"]) for _, e in JournalReader(tmp_path).poll()]
    assert sorted(found) == [(thread, n) for thread in range(8) for n in range(100)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_events_and_not_the_run(tmp_path: Path) -> None:
    """A user's training would die for want of room for a line of its journal."""
    (tmp_path / "step.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path, "step")
    for n in range(50):
        journal.metrics({"loss": 1.0, "x" * 1000: 2.0}, n)
    journal.write("end", status="FINISHED")


def test_progress_is_written_seldom_and_at_the_end(tmp_path: Path) -> None:
    """A user's disk would fill with the progress of a million images, or the bar stop short of its end."""
    journal = Journal(tmp_path, "step")
    for n in range(1, 20_001):
        journal.progress(n, 20_000)
    events = [e for _, e in JournalReader(tmp_path).poll()]
    assert 1 <= len(events) < 200 and events[-1]["done"] == events[-1]["total"] == 20_000


def test_a_step_does_not_wait_for_ever_for_its_run(tmp_path: Path) -> None:
    """A user's registration would hang where MLflow is away."""
    journal = Journal(tmp_path, "step")
    began = time.monotonic()
    assert journal.run_id(0.2) == "" and time.monotonic() - began < 5
    (tmp_path / "step.run").write_text("abc")
    assert journal.run_id(0.2) == "abc"


# ---- where and by what code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["runs", "my runs é", "50% of #1", "what?", "a%20b", "me@home:8"])
def test_the_address_is_a_file_in_the_output_folder(name: str, tmp_path: Path, monkeypatch) -> None:
    """A user's runs would be written to another file, or nowhere, for a character in the folder's name."""
    from sqlalchemy.engine import make_url  # what MLflow reads the address with

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for output in (name, tmp_path / name):
        assert make_url(tracking_uri(output)).database == str(tmp_path / name / "mlflow.db")


def test_the_users_server_comes_first(tmp_path: Path, monkeypatch) -> None:
    """A user's team would not see the run: it went to a file on the laptop."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert tracking_uri(tmp_path) == "http://mlflow.example:5000"


def test_the_commit_and_the_image_are_tags(monkeypatch) -> None:
    """A user could not find the code that made a model."""
    monkeypatch.setenv("GRAFTWORK_COMMIT", "abc123")
    monkeypatch.setenv("GRAFTWORK_IMAGE", "registry/graftwork:1")
    assert source_tags() == {"mlflow.source.git.commit": "abc123", "mlflow.docker.image.uri": "registry/graftwork:1"}
    monkeypatch.delenv("GRAFTWORK_IMAGE")
    assert source_tags() == {"mlflow.source.git.commit": "abc123"}


def test_the_commit_is_graftworks_own(tmp_path: Path, monkeypatch) -> None:
    """A user's own repository, in which the run was started, would be named as the code that ran."""
    monkeypatch.delenv("GRAFTWORK_COMMIT", raising=False)
    monkeypatch.delenv("GRAFTWORK_IMAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    house = Path(graftwork.__file__).resolve().parents[1]
    head = subprocess.run(["git", "-C", str(house), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    expected = {"mlflow.source.git.commit": head.stdout.strip()} if (house / ".git").exists() else {}
    assert source_tags() == expected


def test_no_password_is_shown() -> None:
    """A password in an address would end in the log of every step and in summary.json."""
    assert shown_uri("postgresql://ann:s3@cret@db:5432/mlflow") == "postgresql://***@db:5432/mlflow"
    assert shown_uri("https://ann@mlflow.example") == "https://***@mlflow.example"
    for plain in ("sqlite:////tmp/a@b/mlflow.db", "http://127.0.0.1:5000", "https://mlflow.example/x@y"):
        assert shown_uri(plain) == plain
