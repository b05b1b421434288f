"""Tracking: journals that cost a run nothing, and a follower that carries all of it to a real MLflow, or keeps it."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import graftwork
from graftwork.tracking import Follower, Journal, JournalReader, quiet_mlflow, source_tags, tracking_uri

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
    follower = follow(output, tmp_path, "run-beetles")
    follower.start()
    follower.close(20)
    assert client.get_experiment(follower.experiment_id).name == "beetles"


# ---- what goes wrong -----------------------------------------------------------------------------------------------------------


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
