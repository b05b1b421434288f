"""``graftwork submit``, ``status``, ``logs`` and ``cancel``: the real client and the real compiler, over HTTP."""

import functools
import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp_server import Server, serve
from rich.console import Console
from typer.testing import CliRunner

from graftwork.errors import UserError
from graftwork.pipelines import cluster, compiling, submit, watching
from graftwork.pipelines.argo import node_number
from graftwork.pipelines.cli import app, pipeline_parameters
from graftwork.pipelines.cluster import cluster_at
from graftwork.pipelines.display import WORDS

DATA = "s3://bucket/photos"
STEPS = (
    "ingest-data",
    "validate-data",
    "extract-features",
    "train-baseline",
    "fine-tune",
    "evaluate-model",
    "register-model",
)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, compiled_once: Callable[..., None]) -> None:
    for name in (*cluster.HOST_VARIABLES, cluster.TOKEN_VARIABLE, "KF_PIPELINES_UI_ENDPOINT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(watching, "POLL", 0.05)
    monkeypatch.setattr(compiling, "compile_pipeline", compiled_once)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """The real compiler, which takes a second or two, asked once for each kind of pipeline."""
    folder, real = tmp_path_factory.mktemp("compiled"), compiling.compile_pipeline

    @functools.cache
    def kept(options: tuple[tuple[str, Any], ...]) -> Path:
        path = folder / f"{abs(hash(options))}.yaml"
        real(path, **dict(options))
        return path

    def compile_pipeline(output: Path, **options: Any) -> None:
        shutil.copy(kept(tuple(sorted(options.items()))), output)

    return compile_pipeline


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


def graftwork(server: Server, *arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments, "--host", server.host], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


def refused(server: Server, *arguments: str) -> str:
    """Run a command that must be refused, and return its line."""
    with pytest.raises(UserError) as error:
        CliRunner().invoke(app, [*arguments, "--host", server.host], catch_exceptions=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def submitted(server: Server, *arguments: str) -> dict[str, Any]:
    """Submit, and return the run as the server has it."""
    before = set(server.runs)
    graftwork(server, "submit", "--data", DATA, *arguments)
    (run_id,) = set(server.runs) - before
    return server.runs[run_id]


# ---- what is made --------------------------------------------------------------------------------------------------------------


def test_the_first_run_makes_what_is_missing_and_the_second_nothing(server: Server) -> None:
    """Each submission would leave another copy of the same pipeline, or another experiment, for a user to choose from."""
    graftwork(server, "submit", "--data", DATA)
    version = next(iter(server.versions.values()))["display_name"]
    assert [line.partition("?")[0].partition(" ->")[0] for line in server.changes()] == [
        "POST /apis/v2beta1/experiments",
        "POST /apis/v2beta1/pipelines",
        "POST /apis/v2beta1/pipelines/upload_version",
        "POST /apis/v2beta1/runs",
    ]
    server.log.clear()
    said = graftwork(server, "submit", "--data", DATA, "--set", "views=2")
    assert [line.partition(" ->")[0] for line in server.changes()] == ["POST /apis/v2beta1/runs"]
    assert f"version {version} (there already)" in said
    assert len(server.runs) == 2 and len(server.experiments) == len(server.pipelines) == len(server.versions) == 1


def test_another_pipeline_is_another_version(server: Server) -> None:
    """A user would run the pipeline of last month, whatever she has changed since."""
    submitted(server)
    run = submitted(server, "--with-scratch-control")
    assert len(server.versions) == 2 and len(server.pipelines) == 1
    newest = server.versions[run["pipeline_version_reference"]["pipeline_version_id"]]
    names = newest["pipeline_spec"]["pipeline_spec"]["components"]
    assert any(name.startswith("comp-fine-tune-2") for name in names)
    assert "image" in newest["description"]


def test_a_version_is_found_behind_a_page_of_others(server: Server) -> None:
    """From the hundredth version on, each submission would upload the same again, and be refused for its name."""
    run = submitted(server)
    pipeline = run["pipeline_version_reference"]["pipeline_id"]
    for n in range(150):
        server.versions[f"v{n}"] = {
            "pipeline_id": pipeline,
            "pipeline_version_id": f"v{n}",
            "display_name": f"another-{n}",
            "created_at": server.created(),
        }
    again = submitted(server)
    assert again["pipeline_version_reference"] == run["pipeline_version_reference"]


def test_many_that_submit_at_once_make_one_of_each(server: Server) -> None:
    """Two schedulers in the same minute would get 409 for their first submission."""
    wanted = submit.Wanted({}, False, "", "", "", "", "graftwork", "")
    places, barrier = [], threading.Barrier(6)
    with submit.packaged(wanted) as package:

        def one() -> None:
            with cluster_at(server.host) as opened:
                barrier.wait(20)
                places.append(submit.find_places(opened, wanted, package))

        threads = [threading.Thread(target=one) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(places) == 6 and len(set(places)) == 1
    assert len(server.experiments) == len(server.pipelines) == len(server.versions) == 1


def test_the_run_has_every_setting(server: Server) -> None:
    """What a run was made with would change with the defaults of a later version."""
    run = submitted(server, "--set", "views=2", "--epochs", "3", "--name", "mine", "--run-as", "graftwork-runner")
    expected = pipeline_parameters({"data": DATA}, ["views=2", "epochs=3"])
    assert run["runtime_config"]["parameters"] == json.loads(json.dumps(expected))
    assert (run["display_name"], run["service_account"]) == ("mine", "graftwork-runner")
    assert run["plugins_input"] == {"mlflow": {"experiment_name": "graftwork"}}


def test_settings_come_from_the_file_the_options_and_set_in_this_order(server: Server, tmp_path: Path) -> None:
    """A user could not change one setting of a file for one run."""
    file = tmp_path / "settings.yaml"
    file.write_text("epochs: 3\nviews: 4\nseed: 1\nimage-size: 64\nclasses: ['1', '2']\n")
    run = submitted(server, "--params", str(file), "--epochs", "5", "--set", "seed=7", "--set", "epochs=6")
    given = run["runtime_config"]["parameters"]
    wanted = {"data": DATA, "epochs": 6, "views": 4, "seed": 7, "image_size": 64, "classes": ["1", "2"]}
    assert {name: given[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", ["settings.yaml", "settings.json"])
def test_a_file_may_hold_everything(name: str, server: Server, tmp_path: Path) -> None:
    """What is run every week could not be kept in one file beside the code."""
    file = tmp_path / name
    held = {"data": "digits", "epochs": 3, "gpu_count": 2, "gpu_node_selector": {"pool": "big"}}
    file.write_text(json.dumps(held))  # JSON is YAML
    graftwork(server, "submit", "--params", str(file))
    (run,) = server.runs.values()
    given = run["runtime_config"]["parameters"]
    assert {name: given[name] for name in held} == held | {"gpu_count": "2"}


def test_the_texts_of_suite_and_policy_travel(server: Server, tmp_path: Path) -> None:
    """The cluster cannot see the files, and would judge by the defaults."""
    suite, policy = tmp_path / "suite.yaml", tmp_path / "policy.yaml"
    suite.write_text("settings: {min_side: 64}\n")
    policy.write_text("floor: 0.8\n")
    given = submitted(server, "--suite", str(suite), "--policy", str(policy))["runtime_config"]["parameters"]
    assert (given["suite"], given["policy"]) == (suite.read_text(), policy.read_text())


def test_a_pool_of_gpus_is_a_parameter_of_the_run(server: Server) -> None:
    """The GPU steps would wait for ever, or run on a CPU at a GPU's price."""
    plain = submitted(server)["runtime_config"]["parameters"]
    assert not set(submit.POOL) & set(plain)
    given = submitted(server, "--gpu-pool", "gke", "--gpu", "nvidia-l4", "--spot")["runtime_config"]["parameters"]
    assert given["gpu_node_selector"]["cloud.google.com/gke-accelerator"] == "nvidia-l4"
    assert given["gpu_node_selector"]["cloud.google.com/gke-spot"] == "true"
    assert given["gpu_count"] == "1" and given["gpu_tolerations"]
    assert len(server.versions) == 1, "the file is the same for every pool"
    own = submitted(server, "--gpu-pool", "gke", "--set", 'gpu_node_selector={"pool": "big"}', "--set", "gpu_count=2")
    given = own["runtime_config"]["parameters"]
    assert (given["gpu_node_selector"], given["gpu_count"]) == ({"pool": "big"}, "2")


# ---- what is refused before anything is made ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "."], "lies on this machine, and a cluster cannot see it; upload it"),
        (["--data", "/no/such/folder"], "lies on this machine"),
        (["--data", "photos.zip/"], "lies on this machine"),
        (["--data", "file:///photos"], "lies on this machine"),
        (["--data", "digit"], "did you mean digits?"),
        (["--data", "https://x.org/y.zip"], "is not s3:// and no named dataset; give one of the two"),
        ([], "--data: is not given"),
        (["--data", DATA, "--weights", "/w.safetensors"], "weights /w.safetensors: lie on this machine"),
        (["--data", DATA, "--set", "reference=/data/last"], "setting reference = /data/last: a cluster cannot see it"),
        (["--data", DATA, "--set", "learning_curve=curve.json"], "a cluster cannot see it; leave it out"),
        (["--data", DATA, "--set", "batchsize=3"], "there is no such setting; did you mean batch_size?"),
        (["--data", DATA, "--set", "batch_size=many"], "setting batch_size"),
        (["--data", DATA, "--epochs=-1"], "setting epochs"),
        (["--data", DATA, "--strategy", "magic"], "setting strategy"),
        (["--data", DATA, "--gpu-pool", "gcp"], "gpu pool 'gcp': there is none of this name; choose one of none, gke"),
        (["--data", DATA, "--gpu-pool", "gpu-operator", "--spot"], "knows no spot nodes"),
        (["--data", DATA, "--gpu", "nvidia-l4"], "need --gpu-pool"),
        (["--data", DATA, "--set", "gpu_node_selector=big"], "give labels"),
        (["--data", DATA, "--set", "gpu_tolerations={}"], "give a list"),
        (["--data", DATA, "--set", "training_memory=lots"], "give a quantity of Kubernetes, as 16Gi"),
        (["--data", DATA, "--set", "training_cpu=0"], "give a quantity of Kubernetes, as 4"),
        (["--data", DATA, "--queue", "Team A"], "is no name in Kubernetes"),
        (["--data", DATA, "--volume", "my_volume"], "is no name in Kubernetes"),
        (["--data", DATA, "--set", "gpu_count=many"], "give a number of GPUs"),
        (["--data", DATA, "--params", "gone.yaml"], "params gone.yaml: cannot be read (No such file"),
        (["--data", DATA, "--policy", "gone.yaml"], "policy gone.yaml: cannot be read"),
    ],
)
def test_a_mistake_is_told_before_the_first_request(
    arguments: list[str], message: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that cannot work would be found out in the cluster, after half an hour of waiting for a node."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(server, "submit", *arguments)
    assert server.log == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batchsize: 3", "'batchsize': there is no such setting; did you mean batch_size?"),
        ("epochs: many", "setting epochs"),
        ("- epochs", "holds no settings"),
        ("1: 2", "holds no settings"),
        ("", "holds no settings"),
        ("a: [", "is no YAML of plain values"),
        ("data: 2026-11-26", "is no YAML of plain values"),
        ("source_fingerprint: x", "there is no such setting"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(content: str, message: str, server: Server, tmp_path: Path) -> None:
    """A user with three files would not know which one to mend."""
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    line = refused(server, "submit", "--data", DATA, "--params", str(file))
    assert line.startswith(f"params {file}: ") and message in line
    assert server.log == []


def test_a_parameter_that_is_too_large_for_kfp(server: Server, tmp_path: Path) -> None:
    """KFP refuses it after the pipeline is uploaded, and does not say which it is."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("floor: 0.8\n#" + "x" * 10_000)
    line = refused(server, "submit", "--data", DATA, "--policy", str(policy))
    assert "setting policy: has 10,0" in line and "KFP takes 10,000" in line
    assert server.log == []
    policy.write_text("floor: 0.8\n#" + "x" * 9_900)
    submitted(server, "--policy", str(policy))


def test_an_experiment_that_may_not_be_made(server: Server) -> None:
    """A user would upload a pipeline that she may not run, and read a trace."""
    server.fail(
        403, "/experiments", "POST", message="User 'ada' is not authorized with reason: cannot create experiments"
    )
    line = refused(server, "submit", "--data", DATA, "--experiment", "theirs")
    assert "experiment 'theirs' cannot be made: not allowed (403: User 'ada' is not authorized" in line
    assert len(server.changes()) == 1 and not server.pipelines


def test_an_experiment_in_the_archive(server: Server) -> None:
    """KFP would put the run where nobody sees it."""
    submitted(server)
    next(iter(server.experiments.values()))["storage_state"] = "ARCHIVED"
    server.log.clear()
    assert "experiment 'graftwork': is archived" in refused(server, "submit", "--data", DATA)
    assert server.changes() == []


def test_a_connection_that_breaks_makes_no_second_run(server: Server) -> None:
    """A run that was made, but not confirmed, would be made again and paid for twice."""
    server.fail(0, "/runs", "POST")
    line = refused(server, "submit", "--data", DATA)
    assert "look with 'graftwork status' whether it is there" in line
    assert [entry.path for entry in server.log if entry.method == "POST"].count("/apis/v2beta1/runs") == 1


def test_a_server_without_plugins_runs_it_too(server: Server) -> None:
    """From KFP 2.0 to 2.16 nothing could be submitted; the steps find MLflow without the plugin."""
    server.plugins = False
    assert "plugins_input" not in submitted(server)
    assert len(server.runs) == 1


def test_a_tag_is_warned_of(server: Server) -> None:
    """A tag that was moved makes a cluster reuse what an older image has made."""
    result = CliRunner().invoke(app, ["submit", "--data", DATA, "--image", "x.org/graftwork:1", "--host", server.host])
    assert result.exit_code == 0 and "give the digest" in result.stderr


# ---- status --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_id(server: Server) -> str:
    return str(submitted(server, "--name", "flowers")["run_id"])


def kubectl(verb: str, server: Server, run_id: str) -> str:
    """Return the command that finds the pod of fine-tune by the run and by the number that its name ends with."""
    number = server.pod(run_id, "fine-tune").rpartition("-")[2]
    return f"kubectl -n kubeflow {verb} $(kubectl -n kubeflow get pods -o name -l pipeline/runid={run_id} | grep -- -{number})"


def failed_in(step: str, *tries: str) -> dict[str, list[str]]:
    before = {name: ["SUCCEEDED"] for name in STEPS[: STEPS.index(step)]}
    return before | {step: list(tries)}


def test_status_tells_each_step_its_tries_and_what_is_left(server: Server, run_id: str) -> None:
    """A user could not tell a run that retries from one that is stuck, nor what is still to come."""
    server.steps(run_id, failed_in("fine-tune", "FAILED", "FAILED", "RUNNING"), cached=("extract-features",))
    lines = graftwork(server, "status", run_id).splitlines()
    row = {name: next((line for line in lines if f"  {name}  " in line), "") for name in WORDS.values()}
    assert "succeeded" in row["ingest the data"]
    assert "reused" in row["extract frozen features"]
    assert "running" in row["fine-tune"] and "try 3" in row["fine-tune"]
    assert " - " in row["evaluate"] + " " and "✓" not in row["evaluate"]
    assert f"{server.host}/#/runs/details/{run_id}" in lines
    order = [n for n, line in enumerate(lines) for name in WORDS.values() if f"  {name}  " in line]
    assert order == sorted(order) and "RUNNING" in lines[1]


@pytest.mark.parametrize("where", ["error", "state_history"])
def test_status_tells_the_servers_reason(where: str, server: Server, run_id: str) -> None:
    """An image that cannot be pulled would be found with kubectl alone."""
    server.steps(run_id, failed_in("ingest-data", "FAILED"), "FAILED")
    told = {"code": 2, "message": "ImagePullBackOff: Back-off pulling image\n ghcr.io/no/such"}
    (task,) = server.tasks(run_id, "executor(0)")
    task |= {"error": told} if where == "error" else {"state_history": [{"state": "FAILED", "error": told}]}
    said = graftwork(server, "status", run_id)
    assert "ingest-data: ImagePullBackOff: Back-off pulling image" in said


def test_status_knows_its_nodes_on_a_cluster_that_retries_all(server: Server, run_id: str) -> None:
    """KFP's own defaults try every template again, which puts numbers into the names: each step would seem to be tried once."""
    server.steps(run_id, failed_in("fine-tune", "FAILED", "RUNNING"), cached=("extract-features",), defaults="(0)")
    said = graftwork(server, "status", run_id)
    assert re.search(r"fine-tune +running +try 2", said) and re.search(r"extract frozen features +reused", said)


def test_the_number_of_a_node_is_argos() -> None:
    """No try and no log would be found. The numbers are from a run of KFP 2.0, as Open Data Hub's dashboard keeps it for its tests."""
    root = "iris-training-pipeline-v4zp7.root"
    assert node_number(root) == "1033443722"
    assert node_number(f"{root}.create-dataset-driver") == "3569115838"
    assert node_number(f"{root}.train-model.executor") == "4001010741"


def test_status_takes_the_reason_from_the_log(server: Server, run_id: str) -> None:
    """KFP 2.17 keeps no reason for a step that failed: a user would have to look for the pod's log herself."""
    server.steps(run_id, failed_in("fine-tune", "FAILED", "FAILED"), "FAILED")
    server.pod_logs[server.pod(run_id, "fine-tune", 0)] = "graftwork: the first\n"
    server.pod_logs[server.pod(run_id, "fine-tune", 1)] = (
        "loading\ngraftwork: MLflow at https://u:pw@h refused the password\nI am last\n"
    )
    said = graftwork(server, "status", run_id)
    assert "fine-tune: graftwork: MLflow at https://***@h refused the password" in said and "pw@" not in said


def test_the_reason_is_pythons_last_line_and_not_kfps(server: Server, run_id: str) -> None:
    """KFP ends every log of a failure with the same words: "failed to execute component: exit status 1"."""
    server.steps(run_id, failed_in("ingest-data", "FAILED"), "FAILED")
    server.pod_logs[server.pod(run_id, "ingest-data")] = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
graftwork.errors.UserError: data s3://bucket/photos: access denied; check the credentials
I1126 00:00:00.000000 1 launcher_v2.go:185] publish success.
F1126 00:00:00.000000 1 main.go:76] failed to execute component: exit status 1
time="2026-11-26T00:00:00.000Z" level=info msg="sub-process exited" argo=true error="<nil>"
"""
    said = graftwork(server, "status", run_id)
    assert (
        "ingest-data: graftwork.errors.UserError: data s3://bucket/photos: access denied; check the credentials" in said
    )


def test_status_says_where_to_look_for_what_waits(server: Server, run_id: str) -> None:
    """A pool with no such node shows as RUNNING, for ever."""
    server.steps(run_id, failed_in("fine-tune", "PENDING"))
    said = graftwork(server, "status", run_id)
    assert f"fine-tune: waits for a node, or for its image; see {kubectl('describe', server, run_id)}" in said


def test_status_tells_that_mlflow_refused(server: Server, run_id: str) -> None:
    """A run whose MLflow refuses the password ends well, and its results are nowhere."""
    server.steps(run_id, failed_in("register-model", "SUCCEEDED"), "SUCCEEDED")
    server.runs[run_id]["plugins_output"] = {
        "mlflow": {
            "state": "PLUGIN_FAILED",
            "state_message": "401 Unauthorized: You are not authenticated",
            "entries": {},
        }
    }
    assert "MLflow did not take the run: 401 Unauthorized" in graftwork(server, "status", run_id)
    url = "http://mlflow.example.com/#/experiments/1/runs/2"
    server.runs[run_id]["plugins_output"] = {
        "mlflow": {"state": "PLUGIN_SUCCEEDED", "entries": {"run_url": {"value": url, "render_type": "URL"}}}
    }
    assert f"MLflow: {url}" in graftwork(server, "status", run_id)


def test_status_of_a_driver_that_failed(server: Server, run_id: str) -> None:
    """KFP's own pod before a step fails where a Secret or a volume is missing: the step itself never appears."""
    server.steps(run_id, failed_in("fine-tune", "FAILED"), "FAILED")
    details = server.runs[run_id]["run_details"]["task_details"]
    (executor,) = server.tasks(run_id, "fine-tune")
    keep = [task for task in details if task is not executor and task["state"] != "FAILED"]
    driver = next(task for task in keep if task["display_name"] == "fine-tune-driver")
    driver |= {"state": "FAILED", "error": {"code": 2, "message": "secret graftwork-s3 not found"}}
    server.runs[run_id]["run_details"]["task_details"] = keep
    assert "fine-tune: secret graftwork-s3 not found" in graftwork(server, "status", run_id)


def test_the_newest_runs_come_first_and_others_pipelines_are_left_out(server: Server, run_id: str) -> None:
    """On a shared server a user's runs would be lost among everybody's."""
    other = {**server.runs[run_id], "run_id": "theirs", "created_at": server.created()}
    other["pipeline_version_reference"] = {"pipeline_id": "x", "pipeline_version_id": "y"}
    server.runs["theirs"] = other
    second = str(submitted(server, "--name", "second")["run_id"])
    lines = graftwork(server, "status").splitlines()
    assert lines[1].startswith(second) and lines[2].startswith(run_id) and len(lines) == 3
    assert len(graftwork(server, "status", "--limit", "1").splitlines()) == 2


def test_a_run_is_found_by_its_name(server: Server, run_id: str) -> None:
    """Nobody remembers an id of 36 letters."""
    assert run_id in graftwork(server, "status", "flowers")
    assert "there is none at" in refused(server, "status", "roses")


# ---- logs ----------------------------------------------------------------------------------------------------------------------


def test_logs_are_those_of_the_failed_step_unless_another_is_named(server: Server, run_id: str) -> None:
    """A user would have to find the pod of the last try among some twenty."""
    server.steps(run_id, failed_in("fine-tune", "FAILED", "FAILED"), "FAILED")
    server.pod_logs[server.pod(run_id, "fine-tune", 1)] = "second [try]\n"
    server.pod_logs[server.pod(run_id, "ingest-data")] = "packed\n"
    assert "second [try]" in graftwork(server, "logs", run_id)
    assert "packed" in graftwork(server, "logs", "flowers", "ingest_data")


def test_a_log_that_the_server_has_not_is_told_how_to_get(server: Server, run_id: str) -> None:
    """KFP answers with status 200 and an error in the text, which would be taken for the log."""
    server.steps(run_id, failed_in("fine-tune", "FAILED"), "FAILED")
    line = refused(server, "logs", run_id)
    assert "log of fine-tune: the server does not have it" in line and kubectl("logs -c main", server, run_id) in line


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("fine-tun", "did you mean fine-tune?"),
        ("zzz", "it has ingest-data, validate-data"),
        ("evaluate-model", "has not begun"),
        ("extract-features", "was reused from an earlier run"),
    ],
)
def test_a_step_without_a_log(step: str, message: str, server: Server, run_id: str) -> None:
    """A typing mistake would show an empty log."""
    server.steps(run_id, failed_in("fine-tune", "RUNNING"), cached=("extract-features",))
    assert message in refused(server, "logs", run_id, step)


# ---- cancel --------------------------------------------------------------------------------------------------------------------


def test_cancel_stops_the_run_of_ours_alone(server: Server, run_id: str) -> None:
    """A run that was a mistake would go on at a GPU's price; or another team's run of the same name would be stopped."""
    other = {**server.runs[run_id], "run_id": "theirs", "created_at": server.created(), "state": "RUNNING"}
    other["pipeline_version_reference"] = {"pipeline_id": "x", "pipeline_version_id": "y"}
    server.runs["theirs"] = other
    assert "is being stopped" in graftwork(server, "cancel", "flowers")
    assert (server.runs[run_id]["state"], server.runs["theirs"]["state"]) == ("CANCELING", "RUNNING")


def test_a_run_that_has_ended_cannot_be_stopped(server: Server, run_id: str) -> None:
    """A user would think that she had stopped it in time."""
    server.steps(run_id, failed_in("register-model", "SUCCEEDED"), "SUCCEEDED")
    server.log.clear()
    assert "has ended already (SUCCEEDED)" in refused(server, "cancel", run_id)
    assert server.changes() == []


# ---- --wait --------------------------------------------------------------------------------------------------------------------


def play(server: Server, *scenes: Callable[[str], None]) -> threading.Thread:
    """Go through ``scenes``, each after some looks at the run that is there by then."""

    def act() -> None:
        for scene in scenes:
            start = len(server.log)
            while not server.runs or len([e for e in server.log[start:] if e.path.count("/runs/") == 1]) < 3:
                if stop.wait(0.02):
                    return
            scene(next(iter(server.runs)))
        if not stop.wait(30):
            server.fail(401)  # a wait that does not end by itself: the test fails, and does not hang

    stop = threading.Event()
    thread = threading.Thread(target=act, daemon=True)
    thread.stop = stop.set  # type: ignore[attr-defined]
    thread.start()
    return thread


def test_wait_ends_with_the_run_and_says_little(server: Server) -> None:
    """A scheduler's log would be filled with a line every five seconds, or the command would never end."""
    play(
        server,
        lambda run: server.steps(run, failed_in("fine-tune", "RUNNING")),
        lambda run: server.steps(run, failed_in("register-model", "SUCCEEDED"), "SUCCEEDED"),
    )
    said = graftwork(server, "submit", "--data", DATA, "--wait")
    assert "Succeeded" in said and "fine-tune" not in said and len(said.splitlines()) <= 6


def test_wait_tells_the_step_and_the_reason_and_fails(server: Server) -> None:
    """A script would go on after a training that failed."""

    def fail(run: str) -> None:
        server.pod_logs["x"] = ""
        server.steps(run, failed_in("fine-tune", "FAILED", "FAILED"), "FAILED")
        server.tasks(run, "executor(1)")[0]["error"] = {"code": 2, "message": "OOMKilled"}

    play(server, fail)
    result = CliRunner().invoke(
        app, ["submit", "--data", DATA, "--wait", "--host", server.host], catch_exceptions=False
    )
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("graftwork: run ") and line.endswith("failed in step fine-tune: OOMKilled")


def test_wait_ends_when_the_run_is_canceled(server: Server) -> None:
    """The SDK's own wait does not end then."""
    play(server, lambda run: server.steps(run, failed_in("fine-tune", "CANCELED"), "CANCELED"))
    result = CliRunner().invoke(
        app, ["submit", "--data", DATA, "--wait", "--host", server.host], catch_exceptions=False
    )
    assert result.exit_code == 1 and "was canceled" in result.stderr


def test_wait_outlasts_a_server_that_is_away(server: Server) -> None:
    """An update of KFP in the midst of a training of hours would end the wait, and the script with it."""

    def away(run: str) -> None:
        server.fail(503, "/runs/", "GET", times=5)
        server.fail(0, "/runs/", "GET", times=5)

    play(server, away, lambda run: server.steps(run, failed_in("register-model", "SUCCEEDED"), "SUCCEEDED"))
    assert "Succeeded" in graftwork(server, "submit", "--data", DATA, "--wait")


def test_wait_does_not_outlast_a_login_that_has_ended(server: Server) -> None:
    """It would wait for ever, for what only a new token can tell."""
    play(server, lambda run: server.fail(401, "/runs/"))
    assert "the login is not taken (401)" in refused(server, "submit", "--data", DATA, "--wait")


def test_ctrl_c_ends_the_wait_and_tells_that_the_run_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user would think that she has stopped it, and pay for it until it ends."""

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupted)
    result = CliRunner().invoke(app, ["submit", "--data", DATA, "--wait", "--host", server.host])
    (run_id,) = server.runs
    assert result.exit_code == 130 and f"the run goes on; 'graftwork cancel {run_id}' stops it" in result.stderr
    assert server.runs[run_id]["state"] == "PENDING"


def test_a_terminal_shows_the_steps_as_they_go(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user would look at a terminal that stands still for an hour."""
    screen = io.StringIO()
    monkeypatch.setattr(watching, "console", Console(file=screen, force_terminal=True, width=100))
    play(
        server,
        lambda run: server.steps(run, failed_in("fine-tune", "FAILED", "RUNNING")),
        lambda run: server.steps(run, failed_in("register-model", "SUCCEEDED"), "SUCCEEDED"),
    )
    graftwork(server, "submit", "--data", DATA, "--wait")
    assert "try 2" in screen.getvalue() and "register" in screen.getvalue()
