"""The scripts of infra/: what they ask of kubectl, and how they end. No cluster is here: a stand-in takes down what it is asked and answers
as told, so these tests prove the scripts' logic and messages, and nothing about Kubernetes. What can be real is: kubectl's own rendering, and
``graftwork submit`` over HTTP against the KFP server of the tests.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBECTL = shutil.which("kubectl")
with_kubectl = pytest.mark.skipif(not KUBECTL, reason="kubectl is not installed")

STAND_IN = """
import json, os, subprocess, sys
arguments, told = sys.argv[1:], json.load(open(os.environ["STAND_IN"]))
reads = "-f" in arguments and arguments[arguments.index("-f") + 1] == "-"
given = sys.stdin.read() if reads else ""
if "-f" in arguments and not reads:
    given = open(arguments[arguments.index("-f") + 1]).read()
with open(told["log"], "a") as log:
    log.write(json.dumps({"arguments": arguments, "given": given}) + "\\n")
if "--dry-run=client" in arguments or arguments[0] == "kustomize":  # needs no cluster: kubectl itself
    sys.exit(subprocess.run([told["kubectl"], *arguments]).returncode)
for asked, answer in told["answers"]:
    if asked in " ".join(arguments):
        if "pid" in answer:
            open(answer["pid"], "w").write(str(os.getpid()))
        sys.stdout.write(answer.get("out", ""))
        sys.stdout.flush()
        sys.stderr.write(answer.get("err", ""))
        if answer.get("stays"):
            import signal
            signal.pause()
        sys.exit(answer.get("status", 0))
"""


class Cluster:
    """The stand-in: ``answers`` by a part of what is asked, the first that fits; the rest succeeds and says nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.answers = folder, list[tuple[str, dict[str, Any]]]()
        tools = folder / "tools"
        tools.mkdir()
        (folder / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
        (tools / "kubectl").write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{folder}/stand_in.py" "$@"\n', encoding="utf-8"
        )
        (tools / "kubectl").chmod(0o755)
        self.log = folder / "log.jsonl"
        self.log.touch()

    def environment(self) -> dict[str, str]:
        told = {"log": str(self.log), "answers": self.answers, "kubectl": KUBECTL}
        (self.folder / "told.json").write_text(json.dumps(told), encoding="utf-8")
        return os.environ | {
            "PATH": f"{self.folder / 'tools'}:{os.environ['PATH']}",
            "STAND_IN": str(self.folder / "told.json"),
            "TMPDIR": str(self.folder),
            "PYTHON": sys.executable,
            "GRAFTWORK": str(graftwork(self.folder)),
            "NO_COLOR": "1",
        }

    def run(self, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(INFRA / script), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=self.environment(), cwd=self.folder
        )

    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text("utf-8").splitlines()]

    def lines(self) -> list[str]:
        return [" ".join(one["arguments"]) for one in self.asked()]


def graftwork(folder: Path) -> Path:
    path = folder / "graftwork"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m graftwork.pipelines.cli "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


# ---- secrets.sh ----------------------------------------------------------------------------------------------------------------


def test_generated_secrets_stay_as_they_are(cluster: Cluster) -> None:
    """A second `make kind-up` that made new passwords would lock everything out of what the first one set up."""
    first = cluster.run("secrets.sh", "--generate", "secrets")
    files = {p: p.read_text("utf-8") for p in (cluster.folder / "secrets").rglob("*.env")}
    assert first.returncode == 0 and len(files) == 7
    assert all(p.stat().st_mode & 0o077 == 0 for p in files)
    assert cluster.run("secrets.sh", "--generate", "secrets").stdout == ""
    assert {p: p.read_text("utf-8") for p in files} == files
    values = {line.partition("=")[2] for text in files.values() for line in text.splitlines()}
    passwords = {value for value in values if re.fullmatch(r"[a-zA-Z0-9]{20,}", value)}
    assert len(passwords) == 5 and not any(value in first.stdout + first.stderr for value in passwords)
    logins = [v for p, v in files.items() if p.stem in ("graftwork-mlflow", "kfp-mlflow-credentials", "mlflow-server")]
    assert len({re.search(r"_PASSWORD=(\w+)", text)[1] for text in logins}) == 1  # type: ignore[index]


@with_kubectl
def test_secrets_are_applied_and_not_shown(cluster: Cluster) -> None:
    """A password on a command line is in every process list, and one in the output is in CI's log."""
    (cluster.folder / "secrets" / "kubeflow").mkdir(parents=True)
    (cluster.folder / "secrets" / "kubeflow" / "login.env").write_text(
        "USER=me\nPASSWORD=hunter2$x y\n", encoding="utf-8"
    )
    done = cluster.run("secrets.sh", "secrets")
    assert done.returncode == 0, done.stderr
    assert "hunter2" not in done.stdout + done.stderr + "\n".join(cluster.lines())
    applied = [one for one in cluster.asked() if one["arguments"][:2] == ["apply", "--server-side"]]
    made = yaml.safe_load(applied[0]["given"])
    import base64

    assert (
        made["metadata"] == {"name": "login", "namespace": "kubeflow"} | {"creationTimestamp": None} | made["metadata"]
    )
    assert {k: base64.b64decode(v).decode() for k, v in made["data"].items()} == {
        "USER": "me",
        "PASSWORD": "hunter2$x y",
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give a folder"),
        (["--all"], "give a folder"),
        (["nowhere"], "nowhere: no such folder; make it with --generate"),
        (["empty"], "empty: holds no NAMESPACE/NAME.env"),
        (["wrong"], "holds no KEY=VALUE"),
    ],
)
def test_secrets_that_cannot_be_made_are_one_line(cluster: Cluster, arguments: list[str], told: str) -> None:
    """An empty Secret is found out when the first step cannot log in."""
    (cluster.folder / "empty").mkdir()
    (cluster.folder / "wrong" / "kubeflow").mkdir(parents=True)
    (cluster.folder / "wrong" / "kubeflow" / "login.env").write_text("hunter2\n", encoding="utf-8")
    done = cluster.run("secrets.sh", *arguments)
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr and "hunter2" not in done.stderr
    )


# ---- install.sh and kind.sh ----------------------------------------------------------------------------------------------------


def test_things_are_installed_in_order(cluster: Cluster) -> None:
    """KFP's pods start with the login of the object store: made after them, they wait for it for ever; before its namespace, it has no place."""
    (cluster.folder / "secrets").mkdir()
    done = cluster.run("install.sh", "--dry-run", "--secrets", "secrets", "--overlay", "gke")
    assert done.returncode == 0 and cluster.lines() == []
    order = ["kfp/cluster-scoped", "crd/applications", "secrets.sh secrets", "infra/kfp\n"]
    order += ["mlflow/kustomize", "graftwork/gke", "kueue/controller", "infra/kueue\n"]
    places = [done.stdout.index(part) for part in order]
    assert places == sorted(places)
    less = cluster.run("install.sh", "--dry-run", "--secrets", "secrets", "--without", "kueue,mlflow").stdout
    assert "kueue" not in less and "mlflow" not in less and "infra/kfp" in less


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--secrets: give the folder"),
        (["--secrets", "nowhere"], "--secrets nowhere: no such folder"),
        (
            ["--secrets", ".", "--overlay", "azure"],
            "--overlay azure: there is none in infra/graftwork; choose of standalone",
        ),
        (["--secrets", ".", "--overlay", "eks"], "--overlay eks: set FILE_SYSTEM_ID"),
        (["--secret", "."], "--secret: no such option"),
    ],
)
def test_a_wrong_installation_is_one_line(cluster: Cluster, arguments: list[str], told: str) -> None:
    """Half an installation is harder to mend than none."""
    done = cluster.run("install.sh", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr
    assert cluster.lines() == []


def test_a_failed_step_ends_the_installation(cluster: Cluster) -> None:
    """What goes on after a failure hides it under the next ten."""
    (cluster.folder / "secrets").mkdir()
    cluster.answers = [("kfp/cluster-scoped", {"status": 1, "err": "forbidden\n"})]
    done = cluster.run("install.sh", "--secrets", "secrets")
    assert done.returncode == 1 and "forbidden" in done.stderr
    assert not any("graftwork/standalone" in line for line in cluster.lines())


def test_the_cluster_on_this_machine_is_planned(cluster: Cluster) -> None:
    """The GPU that is not there, the folder that steps may write to, our images in the nodes: each is what `make kind-test` stands on."""
    plan = cluster.run("kind/kind.sh", "up", "--dry-run").stdout
    parts = ["kind create cluster", "chown 1000:1000", "nvidia.com~1gpu"]
    parts += ["load docker-image ghcr.io/graftwork/graftwork-python:", "--overlay kind"]
    places = [plan.index(part) for part in parts]
    assert places == sorted(places)
    named = yaml.safe_load((INFRA / "kind" / "cluster.yaml").read_text("utf-8"))
    assert f"--name {named['name']}" in plan and f"{named['name']}-worker2" in plan
    assert [bool(node.get("labels")) for node in named["nodes"]] == [False, False, True]  # the third is worker2
    done = cluster.run("kind/kind.sh", "sideways")
    assert done.returncode == 2 and done.stderr == "kind: sideways: say up or down\n"


# ---- test-cluster.sh -----------------------------------------------------------------------------------------------------------


def load_check() -> Any:
    spec = importlib.util.spec_from_file_location("infra_check_for_scripts", INFRA / "check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@with_kubectl
def test_the_plan_touches_nothing_and_its_pod_is_restricted(cluster: Cluster) -> None:
    """A pod that Pod Security refuses fails the test on every cluster that is worth testing."""
    done = cluster.run("test-cluster.sh", "--dry-run", "--gpu-pool", "eks")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in cluster.lines()] == ["kustomize"]
    assert (
        "LimitRange Namespace NetworkPolicy ResourceQuota" in done.stdout
        and "PersistentVolumeClaim " not in done.stdout
    )
    assert "fine-tune" in done.stdout and "--gpu-pool eks" in done.stdout
    text = done.stdout.partition("the pod of a component:\n")[2].partition("\npipeline:")[0]
    pod = yaml.safe_load(text)
    check = load_check()
    assert check.unrestricted(pod["spec"]) == []
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    assert check.invalid(kubernetes_validate, pod) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "2"], "--gpus: no such option"),
        (["--gpu-pool", "azure"], "--gpu-pool azure: choose one of none, gke, eks, aks, gpu-operator"),
        (["--image"], "--image: give a value"),
    ],
)
def test_wrong_options_are_one_line(cluster: Cluster, arguments: list[str], told: str) -> None:
    """A misspelt option that is passed over tests something else for an hour."""
    done = cluster.run("test-cluster.sh", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr
    assert cluster.lines() == []


def test_no_cluster_is_one_line(cluster: Cluster) -> None:
    """The likeliest mistake of all: KUBECONFIG of yesterday."""
    cluster.answers = [
        ("version", {"status": 1}),
        ("config view", {"out": "https://10.0.0.1:6443"}),
    ]
    done = cluster.run("test-cluster.sh")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == "test-cluster: https://10.0.0.1:6443: no cluster answers there; set KUBECONFIG, or make one with 'make kind-up'\n"
    )


NODES = json.dumps({"items": [{"metadata": {"name": "n1"}, "status": {"allocatable": {"cpu": "8"}}}]})
CLASS = {"name": "standard", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}
CLASSES = json.dumps({"items": [{"metadata": CLASS}]})
EMPTY = json.dumps({"items": []})
NOTHING = [
    ("get nodes", {"out": NODES}),
    ("get storageclass", {"out": EMPTY}),
    ("get deployment ml-pipeline", {"status": 1}),
    ("get secret graftwork-mlflow", {"status": 1}),
    ("get persistentvolumeclaim", {"status": 1}),
]


def verdicts(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Read the list at the end."""
    listed = done.stdout.partition(", image ")[2].partition("== clean up")[0]
    return {m[1]: m[2] for m in re.finditer(r"^  (\w+) +(.+)$", listed, re.MULTILINE)}


def test_what_is_missing_is_said(cluster: Cluster) -> None:
    """A green list of which four fifths were left out must not look like a green list."""
    cluster.answers = NOTHING
    done = cluster.run("test-cluster.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(done) == {
        "cluster": "ok",
        "components": "skipped: there is no default class of volumes",
        "pipeline": "skipped: there is no KFP in namespace kubeflow",
        "resume": "skipped: no run",
        "placement": "skipped: no run",
        "mlflow": "skipped: no run",
    }
    for words in (
        "GPU placement cannot be tried",
        "the pipeline cannot be tried",
        "runs are not tracked",
        "nothing resumes",
    ):
        assert words in done.stdout
    assert "delete namespace graftwork-test-" in cluster.lines()[-1]
    assert not list(cluster.folder.glob("tmp.*"))


PENDING = {"phase": "Pending"}


def components(state: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    pods = [
        ("get pod ", {"out": json.dumps({"status": state})}),
        ("logs ", {"out": "RuntimeError: the disk is on fire\n"}),
    ]
    return [("get storageclass", {"out": CLASSES}), *pods, *NOTHING]


@with_kubectl
def test_each_component_gets_its_pod(cluster: Cluster) -> None:
    """A component that is never tried fails first on the night's run."""
    cluster.answers = components({"phase": "Succeeded"})
    done = cluster.run("test-cluster.sh")
    assert done.returncode == 0 and verdicts(done)["components"] == "ok", done.stdout + done.stderr
    pods = [yaml.safe_load(one["given"]) for one in cluster.asked() if "kind: Pod" in one["given"]]
    names = [pod["metadata"]["name"] for pod in pods]
    assert names[0] == "ingest-data" and {"validate-data", "fine-tune", "evaluate-model", "register-model"} <= set(
        names
    )
    assert all(pod["metadata"]["namespace"].startswith("graftwork-test-") for pod in pods)
    plan = next(line for line in cluster.lines() if line.startswith("create configmap plan"))
    assert "pipeline.yaml" in plan and "component_step.py" in plan


@with_kubectl
def test_a_component_that_fails_is_told_and_cleaned_up(cluster: Cluster) -> None:
    """The reason belongs into the list; and a failed test that leaves its pods behind pays for them all night."""
    cluster.answers = components({"phase": "Failed"})
    done = cluster.run("test-cluster.sh")
    assert done.returncode == 1
    assert verdicts(done)["components"] == "FAILED: ingest-data: RuntimeError: the disk is on fire"
    assert verdicts(done)["pipeline"].startswith("skipped")
    assert any(line.startswith("delete namespace graftwork-test-") for line in cluster.lines())


@with_kubectl
def test_a_stopped_test_cleans_up(cluster: Cluster) -> None:
    """Ctrl-C is how most of these tests end."""
    cluster.answers = components(PENDING)
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([str(INFRA / "test-cluster.sh")], env=cluster.environment(), **options)
    deadline = time.monotonic() + 60
    while not any("get pod " in line for line in cluster.lines()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "== clean up" in out
    assert any(line.startswith("delete namespace graftwork-test-") for line in cluster.lines())
    assert not list(cluster.folder.glob("tmp.*"))


# ---- the pipeline, over HTTP against the KFP server of the tests -----------------------------------------------------------------


@pytest.fixture
def kfp() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        import kfp_server
    finally:
        sys.path.pop(0)
    with kfp_server.serve() as server:
        yield server


def executor(step: str, node: str, gpus: int, phase: str, number: int = 0) -> dict[str, Any]:
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    return {
        "metadata": {
            "name": f"g-{step}-{number}",
            "creationTimestamp": f"2026-11-26T01:0{number}:00Z",
            "annotations": {"workflows.argoproj.io/node-name": f"g(0).root(0).{step}(0).executor({number})"},
        },
        "spec": {"nodeName": node, "containers": [{"name": "main", "resources": {"limits": limits}}]},
        "status": {"phase": phase},
    }


def with_kfp(kfp: Any, cluster: Cluster, pods: list[Any]) -> None:
    nodes = {"items": [{"metadata": {"name": "gpu-1"}, "status": {"allocatable": {"nvidia.com/gpu": "1"}}}]}
    port = kfp.host.rpartition(":")[2]
    cluster.answers = [
        ("get nodes", {"out": json.dumps(nodes)}),
        ("get storageclass", {"out": EMPTY}),
        ("get secret graftwork-mlflow", {"status": 1}),
        (
            "port-forward",
            {
                "out": f"Forwarding from 127.0.0.1:{port} -> 8888\n",
                "stays": True,
                "pid": str(cluster.folder / "forward.pid"),
            },
        ),
        ("get pods", {"out": json.dumps({"items": pods})}),
    ]


def end_runs(kfp: Any, state: str) -> threading.Thread:
    """Let each run end as soon as it is there."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while not kfp.runs and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        for run in kfp.runs.values():
            run["state"] = state

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text("utf-8").split()[2] == "Z"


def test_the_pipeline_is_submitted_judged_and_removed(cluster: Cluster, kfp: Any) -> None:
    """The run is submitted as a user's would be, under the narrow account and onto GPUs; and no port stays open after it."""
    pods = [executor("fine-tune", "gpu-1", 1, "Running"), executor("ingest-data", "cpu-1", 0, "Succeeded")]
    with_kfp(kfp, cluster, pods)
    end_runs(kfp, "SUCCEEDED")
    done = cluster.run("test-cluster.sh")
    found = verdicts(done)
    assert found["pipeline"] == "ok", done.stdout + done.stderr
    assert found["placement"] == "ok"
    assert any(line.startswith("delete pod --namespace kubeflow g-fine-tune-0") for line in cluster.lines())
    # The one pod that is told here is still the first: nothing was tried again, and the test must say so.
    assert found["resume"].startswith("FAILED: fine-tune was not tried again") and done.returncode == 1
    created = next(one for one in kfp.log if one.method == "POST" and one.path.endswith("/runs"))
    assert created.body["service_account"] == "graftwork-runner"
    parameters = created.body["runtime_config"]["parameters"]
    assert parameters["data"] == "digits" and parameters["gpu_count"] == "1"
    assert any(one.method == "DELETE" and "/runs/" in one.path for one in kfp.log)
    assert gone(int((cluster.folder / "forward.pid").read_text("utf-8")))


def test_a_failed_run_is_told(cluster: Cluster, kfp: Any) -> None:
    """The run's own reason, not "exit 1"."""
    with_kfp(kfp, cluster, [executor("fine-tune", "cpu-1", 1, "Failed")])
    end_runs(kfp, "FAILED")
    done = cluster.run("test-cluster.sh", "--gpu-pool", "gpu-operator", "--gpu", "Fake-GPU")
    found = verdicts(done)
    assert done.returncode == 1 and found["pipeline"].startswith("FAILED: the run is FAILED"), done.stdout + done.stderr
    assert "fine-tune takes a GPU and ran on cpu-1, which has none" in found["placement"]
    created = next(one for one in kfp.log if one.method == "POST" and one.path.endswith("/runs"))
    assert created.body["runtime_config"]["parameters"]["gpu_node_selector"] == {"nvidia.com/gpu.product": "Fake-GPU"}
