"""``infra/cluster_facts.py`` and ``mlflow_check.py``: what the cluster test reads off a cluster, and how it judges."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"infra_{name}", ROOT / "infra" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


facts, mlflow_check = load("cluster_facts"), load("mlflow_check")


def pod(
    node_name: str, node: str = "cpu-1", gpus: int = 0, made: str = "2026-11-26T01:00:00Z", phase: str = "Succeeded"
) -> Any:
    limits = {"memory": "1Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {
        "metadata": {
            "name": node_name.replace("(", "-").replace(")", "").replace(".", "-"),
            "creationTimestamp": made,
            "annotations": {"workflows.argoproj.io/node-name": node_name},
        },
        "spec": {"nodeName": node, "containers": [{"name": "main", "resources": {"limits": limits}}, {"name": "wait"}]},
        "status": {"phase": phase},
    }


@pytest.mark.parametrize(
    ("node_name", "step"),
    [
        ("graftwork-x.root.fine-tune.executor", "fine-tune"),
        ("graftwork-x(0).root(0).fine-tune(0).executor(1)", "fine-tune"),
        ("graftwork-x(0).root(0).exit-handler-1(0).fine-tune(0).executor(0)", "fine-tune"),
        ("graftwork-x.root.fine-tune-driver", ""),
        ("graftwork-x.root-driver", ""),
    ],
)
def test_a_pod_is_known_by_its_place_in_the_graph(node_name: str, step: str) -> None:
    """Argo's pods have names of numbers; the driver's pod, deleted instead of the step's, would prove nothing."""
    assert facts.step_of(pod(node_name)) == step


def test_tries_of_a_step_are_in_order() -> None:
    """The newest one is the one that trains."""
    pods = [
        pod("x.root.fine-tune.executor(1)", made="2026-11-26T01:05:00Z", phase="Running"),
        pod("x.root.fine-tune.executor(0)", phase="Failed"),
        pod("x.root.ingest-data.executor(0)"),
    ]
    assert facts.tries(pods, "fine-tune") == [
        "x-root-fine-tune-executor-0 Failed",
        "x-root-fine-tune-executor-1 Running",
    ]


@pytest.mark.parametrize(
    ("pods", "told"),
    [
        ([pod("x.root.fine-tune.executor", "gpu-1", 1), pod("x.root.ingest-data.executor")], []),
        ([pod("x.root.fine-tune.executor", "cpu-1", 1)], ["fine-tune takes a GPU and ran on cpu-1, which has none"]),
        (
            [pod("x.root.fine-tune.executor", "gpu-1", 1), pod("x.root.ingest-data.executor", "gpu-1")],
            ["ingest-data takes no GPU and ran on gpu-1, which has one"],
        ),
        ([pod("x.root.fine-tune.executor", "cpu-1")], ["no step took a GPU"]),
    ],
)
def test_placement_is_judged(pods: list[Any], told: list[str]) -> None:
    """A step that waits for a GPU on a node without one pays for the whole pool and uses none of it."""
    assert facts.placement(pods, {"gpu-1"})[1] == told


def test_a_pod_that_does_not_start_says_why() -> None:
    """Half an hour of "Pending" is no answer."""
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x:1"'}}}
    assert facts.pod_state({"status": {"phase": "Pending", "containerStatuses": [waiting]}}) == (
        'Pending ImagePullBackOff: Back-off pulling image "x:1"'
    )
    condition = {"reason": "Unschedulable", "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}
    assert "Insufficient nvidia.com/gpu" in facts.pod_state({"status": {"phase": "Pending", "conditions": [condition]}})
    creating = {"state": {"waiting": {"reason": "ContainerCreating"}}}
    assert facts.pod_state({"status": {"phase": "Pending", "containerStatuses": [creating]}}) == "Pending"


def test_nodes_and_classes() -> None:
    """A node whose GPU is not allocatable has none to give."""
    nodes = [
        {"metadata": {"name": "a"}, "status": {"allocatable": {"nvidia.com/gpu": "2"}}},
        {"metadata": {"name": "b"}, "status": {"allocatable": {"nvidia.com/gpu": "0"}}},
        {"metadata": {"name": "c"}, "status": {}},
    ]
    assert facts.gpu_nodes(nodes) == ["a"]
    marked = {"name": "fast", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}
    assert facts.default_class([{"metadata": {"name": "slow"}}, {"metadata": marked}]) == ["fast"]


# ---- MLflow, the real one ------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a run leaves: a parent, a run a step, a version that is champion."""
    from graftwork.tracking import quiet_mlflow

    quiet_mlflow()
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    made = MlflowClient(uri, uri)
    experiment = made.create_experiment("graftwork")
    parent = made.create_run(experiment, tags={"graftwork.run": "r1", "graftwork.parent": "true"})
    made.set_terminated(parent.info.run_id)
    for step in sorted(mlflow_check.STEPS):
        tags = {"graftwork.run": "r1", "graftwork.step": step, "mlflow.parentRunId": parent.info.run_id}
        run = made.create_run(experiment, tags=tags)
        for epoch in range(3):
            made.log_metric(run.info.run_id, "val_accuracy", 0.5, step=epoch)
        made.set_terminated(run.info.run_id)
    made.create_registered_model("m")
    version = made.create_model_version("m", "/nowhere", tags={"graftwork.run": "r1"})
    made.set_registered_model_alias("m", "champion", version.version)
    return made


def run_of(client: Any, step: str) -> Any:
    return next(r for r in mlflow_check.runs_of(client, "r1") if r.data.tags.get("graftwork.step") == step)


def judged(client: Any) -> list[str]:
    return mlflow_check.check_runs(client, "r1") + mlflow_check.check_registry(client, "r1", "m")


def test_a_whole_run_passes_and_can_be_removed(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The test must not cry wolf, and must not leave its runs among the user's."""
    assert judged(client) == []
    assert mlflow_check.main(["check", "r1", "m"]) == 0
    assert "m version 1 (champion)" in capsys.readouterr().out
    assert mlflow_check.main(["delete", "r1", "m"]) == 0
    assert mlflow_check.runs_of(client, "r1") == [] and not client.search_registered_models()
    assert mlflow_check.main(["check", "r1", "m"]) == 1


def test_a_metric_that_a_retried_step_logged_twice_is_told(client: Any) -> None:
    """A curve that jumps back is what a retry without a journal leaves."""
    client.log_metric(run_of(client, "fine_tune").info.run_id, "val_accuracy", 0.6, step=1)
    assert judged(client) == ["fine_tune: val_accuracy has 2 values at step 1"]


def test_what_is_missing_or_stuck_is_told(client: Any) -> None:
    """A run that stays RUNNING for ever, a step that left nothing, a second version: each is a promise broken."""
    client.update_run(run_of(client, "evaluate_model").info.run_id, status="RUNNING")
    client.delete_run(run_of(client, "ingest_data").info.run_id)
    client.set_tag(run_of(client, "validate_data").info.run_id, "mlflow.parentRunId", "another")
    client.create_model_version("m", "/nowhere", tags={"graftwork.run": "r1"})
    told = "\n".join(judged(client))
    for words in (
        "no run of ingest_data",
        "evaluate_model is RUNNING",
        "validate_data is not under",
        "2 versions of m",
    ):
        assert words in told


def test_a_journal_on_the_volume_tells_of_a_resume(tmp_path: Path) -> None:
    """That the step was tried again does not say that it went on: only its journal does."""
    assert mlflow_check.resumed(tmp_path) == "resumed: no journal on the volume says so"
    (tmp_path / "jobs").mkdir()
    line = '{"kind": "note", "message": "goes on from a checkpoint: step 40 of 190"}\n'
    (tmp_path / "jobs" / "fine_tune.jsonl").write_text(line, encoding="utf-8")
    assert mlflow_check.resumed(tmp_path) == "resumed: goes on from a checkpoint: step 40 of 190"
