"""What a cluster gets: the compiled pipeline, compared whole with the one that was reviewed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from graftwork.errors import UserError
from graftwork.pipelines.compiling import compile_pipeline

GOLDEN = Path(__file__).parent / "golden"
IMAGE = "registry.example.com/graftwork-python@sha256:" + "0" * 64


def compiled(folder: Path, *options: str) -> str:
    path = folder / "pipeline.yaml"
    subprocess.run(
        [sys.executable, "-m", "graftwork.pipelines.cli", "compile", "--output", str(path), "--image", IMAGE, *options],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pipeline", []),
        (
            "pipeline-with-scratch",
            ["--with-scratch-control", "--queue", "graftwork", "--priority", "graftwork-scheduled"],
        ),
        ("manifests", ["--format", "manifests", "--volume", ""]),
    ],
)
def test_compiled_pipeline_is_the_reviewed_one(name: str, options: list[str], tmp_path: Path) -> None:
    """A change of what runs on clusters must be seen by a person: GOLDEN_UPDATE=1 writes the files anew, for review."""
    text = compiled(tmp_path, *options)
    golden = GOLDEN / f"{name}.yaml"
    if os.environ.get("GOLDEN_UPDATE"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    spec, platform = yaml.safe_load_all(compiled(tmp_path_factory.mktemp("compiled"), "--with-scratch-control"))
    return spec, platform


def pods(platform: dict) -> dict[str, dict]:
    return platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def steps_of(spec: dict) -> dict[str, dict]:
    """The steps' tasks: they are a pipeline of their own, in the group of the exit handler."""
    return spec["components"]["comp-graftwork-image-classification"]["dag"]["tasks"]


def test_every_step_has_what_a_cluster_needs(documents: tuple[dict, dict]) -> None:
    """A step without resources, a deadline or a user is evicted, hangs for ever, or is refused by the admission policy."""
    spec, platform = documents
    executors = spec["deploymentSpec"]["executors"]
    assert len(executors) == 9 and set(pods(platform)) == set(executors)
    for name, executor in executors.items():
        container, pod = executor["container"], pods(platform)[name]
        assert container["image"] == IMAGE
        assert container["resources"]["resourceMemoryLimit"] and container["resources"]["resourceCpuRequest"], name
        assert pod["activeDeadlineSeconds"] in ("7200", "86400")
        assert pod["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        assert {one["secretName"] for one in pod["secretAsEnv"]} == {"graftwork-mlflow", "graftwork-s3"}
        assert all(one["optional"] is True for one in pod["secretAsEnv"])
        assert pod["pvcMount"][0]["mountPath"] == "/checkpoints"
        environment = {one["name"]: one["value"] for one in container["env"]}
        assert environment["GRAFTWORK_IMAGE"] == IMAGE and environment["GRAFTWORK_CHECKPOINTS"] == "/checkpoints/jobs"
    for task in (*steps_of(spec).values(), spec["root"]["dag"]["tasks"]["close-run"]):
        assert task["retryPolicy"]["maxRetryCount"] == 2


def test_steps_with_a_network_run_where_the_run_says(documents: tuple[dict, dict]) -> None:
    """A GPU that is asked for by the wrong steps costs dollars an hour; one that is fixed in the file cannot be left out on a laptop's cluster."""
    spec, platform = documents
    executors, inputs = spec["deploymentSpec"]["executors"], spec["components"]["comp-graftwork-image-classification"]
    declared = inputs["inputDefinitions"]["parameters"]
    on_gpu = {name for name, one in executors.items() if "accelerator" in one["container"]["resources"]}
    assert on_gpu == {"exec-extract-features", "exec-fine-tune", "exec-fine-tune-2", "exec-evaluate-model"}
    for name in on_gpu:
        accelerator, pod = executors[name]["container"]["resources"]["accelerator"], pods(platform)[name]
        assert accelerator == {
            "resourceCount": "{{$.inputs.parameters['pipelinechannel--gpu_count']}}",
            "resourceType": "{{$.inputs.parameters['pipelinechannel--gpu_type']}}",
        }
        task = steps_of(spec)[name.removeprefix("exec-")]["inputs"]["parameters"]
        assert task["pipelinechannel--gpu_count"] == {"componentInputParameter": "gpu_count"}
        assert pod["nodeSelector"] == {"nodeSelectorJson": {"componentInputParameter": "gpu_node_selector"}}
        assert pod["tolerations"] == [{"tolerationJson": {"componentInputParameter": "gpu_tolerations"}}]
        assert pod["emptyDirMounts"][0]["mountPath"] == "/dev/shm"
    # KFP leaves an empty count, selector or list out of the pod; the count is a text, for KFP reads a number there as "".
    root = spec["root"]["inputDefinitions"]["parameters"]
    assert (root["gpu_count"]["defaultValue"], root["gpu_count"]["parameterType"]) == ("", "STRING")
    assert root["gpu_node_selector"]["defaultValue"] == {} and root["gpu_tolerations"]["defaultValue"] == []
    assert {"gpu_count", "gpu_type", "gpu_node_selector", "gpu_tolerations", "training_cpu", "training_memory"} < set(
        declared
    )
    for name in set(executors) - on_gpu:
        assert "nodeSelector" not in pods(platform)[name] and "tolerations" not in pods(platform)[name]


def test_the_end_comes_whatever_happened(documents: tuple[dict, dict]) -> None:
    """A run that failed would be RUNNING in MLflow for ever."""
    spec, _ = documents
    end = spec["root"]["dag"]["tasks"]["close-run"]
    assert end["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    group = end["dependentTasks"][0]
    assert end["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": group}}
    assert list(spec["components"][f"comp-{group}"]["dag"]["tasks"]) == ["graftwork-image-classification"]
    assert spec["root"]["inputDefinitions"]["parameters"].keys() == (
        spec["components"]["comp-graftwork-image-classification"]["inputDefinitions"]["parameters"].keys()
    )


def test_a_queue_is_a_label_of_every_pod(tmp_path: Path) -> None:
    """A pod without the label passes Kueue by, and takes what was promised to others."""
    options = ["--queue", "team-a", "--priority", "graftwork-interactive", "--volume", ""]
    _, platform = yaml.safe_load_all(compiled(tmp_path, *options))
    for pod in pods(platform).values():
        assert pod["podMetadata"]["labels"] == {
            "kueue.x-k8s.io/queue-name": "team-a",
            "kueue.x-k8s.io/priority-class": "graftwork-interactive",
        }
        assert "pvcMount" not in pod


def test_manifests_are_named_by_their_contents(tmp_path: Path) -> None:
    """A version whose name stays when its contents change is refused by the cluster, or kept as it was."""
    one, same, other = (
        list(yaml.safe_load_all(compiled(tmp_path, "--format", "manifests", *options)))
        for options in ([], [], ["--queue", "q"])
    )
    assert [document["kind"] for document in one] == ["Pipeline", "PipelineVersion"]
    assert one == same
    names = [documents[1]["metadata"]["name"] for documents in (one, other)]
    assert names[0] != names[1] and all(name.startswith("graftwork-image-classification-") for name in names)
    assert one[1]["spec"]["pipelineName"] == one[0]["metadata"]["name"]


def test_what_may_change_is_never_cached(documents: tuple[dict, dict]) -> None:
    """A cluster's cache knows artifacts by name: a cached ingest or training would give last month's model for new data."""
    tasks = steps_of(documents[0]) | {"close-run": documents[0]["root"]["dag"]["tasks"]["close-run"]}
    cached = {name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")}
    assert set(tasks) - cached == {"ingest-data", "validate-data", "register-model", "close-run"}
    for name in cached:
        inputs = tasks[name]["inputs"]
        for artifact in inputs["artifacts"]:
            assert f"{artifact}_digest" in inputs["parameters"], "KFP would not see what is in it"


def test_no_secret_and_no_path_of_this_machine_is_in_the_file(documents: tuple[dict, dict], tmp_path: Path) -> None:
    """The file goes to a shared server: what is in it is read by others."""
    text = compiled(tmp_path)
    assert str(Path(__file__).parent.parent.parent) not in text and str(tmp_path) not in text
    assert "GRAFTWORK_BUILD" not in text and "GRAFTWORK_JOURNALS" not in text


@pytest.mark.parametrize(
    "options", [["--queue", "bad label!"], ["--priority", "High"], ["--volume", "my_volume"], ["--image", "a b"]]
)
def test_a_name_that_kubernetes_refuses(options: list[str], tmp_path: Path) -> None:
    """The file would be taken, and every pod of the run refused."""
    with pytest.raises(UserError, match="is no ") as raised:
        compile_pipeline(tmp_path / "p.yaml", **{options[0].removeprefix("--"): options[1]})
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())
