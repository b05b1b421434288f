"""Registration while the MLflow server comes and goes: the next try ends in the right state."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Server

from graftwork import steps
from graftwork.errors import UserError
from graftwork.evaluate import evaluate
from graftwork.registry import AwayError
from graftwork.settings import EvaluateSettings, RegisterSettings
from graftwork.tracking import Journal


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from graftwork.tracking import quiet_mlflow

    before = dict(os.environ)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    server = Server(tmp_path_factory.mktemp("server"))
    os.environ["MLFLOW_TRACKING_URI"] = server.uri
    quiet_mlflow()
    yield server
    with contextlib.suppress(ProcessLookupError):
        server.kill()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def evaluation(dataset, baseline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outage") / "evaluation"
    evaluate(dataset, {"baseline": baseline}, EvaluateSettings(resamples=100), folder)
    return folder


def client_of(server: Server) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(server.uri, server.uri)


def register(dataset, evaluation: Path, baseline: Path, name: str, run_id: str) -> dict[str, Any]:
    from graftwork.register import register as do

    return do(dataset, evaluation, {"baseline": baseline}, RegisterSettings(register_as=name), lambda: run_id)


def test_a_server_that_is_away_is_one_line_and_the_next_try_registers(
    server: Server, dataset, evaluation: Path, baseline: Path
) -> None:
    """Two hours of training would end in a trace, or in a version without an alias."""
    client = client_of(server)
    run = client.create_run(client.create_experiment("away")).info.run_id
    server.kill()
    with pytest.raises(UserError, match="does not answer") as raised:
        register(dataset, evaluation, baseline, "away", run)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    server.start()
    found = register(dataset, evaluation, baseline, "away", run)
    assert found["registered"] == {"name": "away", "version": 1, "aliases": ["champion"]}
    assert found["decision"]["promoted"] is True


def test_a_server_that_comes_back_is_waited_for(
    server: Server, dataset, evaluation: Path, baseline: Path, tmp_path: Path
) -> None:
    """A night's run would fail at its last step, because the registry was being restarted."""
    client = client_of(server)
    run = client.create_run(client.create_experiment("back")).info.run_id
    journal = Journal(tmp_path, "register_model")
    server.kill()
    back = threading.Timer(3, server.start)
    back.start()
    found = steps.patiently(lambda: register(dataset, evaluation, baseline, "back", run), journal, 120)
    back.join()
    assert found["registered"] == {"name": "back", "version": 1, "aliases": ["champion"]}
    assert (tmp_path / "register_model.jsonl").read_text().count("it is tried again") == 1


def test_what_is_refused_is_not_tried_again(tmp_path: Path) -> None:
    """A wrong policy, or a password, would be told two minutes late."""
    calls = []

    def refuse() -> None:
        calls.append(1)
        raise UserError("policy: is none")

    with pytest.raises(UserError, match="is none"):
        steps.patiently(refuse, Journal(tmp_path, "register_model"), 120)
    with pytest.raises(AwayError):
        steps.patiently(lambda: (_ for _ in ()).throw(AwayError("away")), Journal(tmp_path, "register_model"), 0)
    assert calls == [1]


def try_once(arguments: Any) -> None:
    register(*arguments)


def test_killed_while_it_registers_the_next_try_ends_right(
    server: Server, dataset, evaluation: Path, baseline: Path
) -> None:
    """A pod that is evicted between version and alias would leave a model that nobody serves, or a second version of it."""
    client = client_of(server)
    run = client.create_run(client.create_experiment("killed")).info.run_id
    seen: set[str] = set()
    for n, wanted in enumerate(("version", "waiting", "alias")):
        name = f"killed {n}"
        arguments = (dataset, evaluation, baseline, name, run)
        process = multiprocessing.get_context("spawn").Process(target=try_once, args=(arguments,))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            versions = client.search_model_versions(f"name = '{name}'")
            tags = versions[0].tags if versions else {}
            if {
                "version": bool(versions),
                "waiting": "graftwork.heartbeat" in tags,
                "alias": bool(versions) and bool(client.get_registered_model(name).aliases),
            }[wanted]:
                seen.add(wanted)
                break
            time.sleep(0.005)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        found = register(*arguments)
        assert found["registered"] == {"name": name, "version": 1, "aliases": ["champion"]}
        version = client.get_model_version(name, "1")
        assert version.tags["graftwork.gate"] == "promoted" and "test images" in version.description
    assert seen == {"version", "waiting", "alias"}
