"""``infra/check.py``: it passes what is here, and catches each kind of fault in a copy."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    """Import a script of infra/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"infra_{name}", ROOT / "infra" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


check = load("check")


@pytest.fixture
def tree(tmp_path: Path) -> Any:
    """A copy of infra/ that may be broken."""
    shutil.copytree(ROOT / "infra", tmp_path / "infra", ignore=shutil.ignore_patterns("__pycache__"))
    return check.Tree(tmp_path)


def faults(tree: Any, name: str) -> list[str]:
    """Return what a check says; a missing tool skips the test."""
    try:
        built = check.build(tree)
        return (built.faults if name == "kustomize builds" else []) + check.CHECKS[name](tree).faults
    except check.NotDoneError as missing:
        pytest.skip(str(missing))


def change(tree: Any, file: str, old: str, new: str) -> None:
    path = tree.root / "infra" / file
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{file} has changed: the fault cannot be planted"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


BUILDS, KUBERNETES, CUSTOM, PODS, PINNED, SECRETS, RETRIES, DOCKER, YAML, SHELL = check.CHECKS
RUNTIME = "serving/runtime.yaml"
PLANTED = [
    (BUILDS, "graftwork/base/kustomization.yaml", "- quota.yaml", "- quotas.yaml", "quotas.yaml"),
    (BUILDS, "kfp/component/kustomization.yaml", "[config.json]", "[konfig.json]", "konfig.json"),
    (KUBERNETES, "graftwork/base/quota.yaml", "hard:", "hrad:", "hrad"),
    (KUBERNETES, "graftwork/base/runner.yaml", "verbs: [create, patch]", "verbs: create", "create"),
    (KUBERNETES, "graftwork/base/networkpolicy.yaml", "port: 53,", "prot: 53,", "prot"),
    (KUBERNETES, "kfp/component/api-server.yaml", "mountPath: /config", "mountpath: /config", "mount"),
    (CUSTOM, "kueue/queues.yaml", "nominalQuota", "nominalQuotta", "nominalQuotta"),
    (CUSTOM, "kueue/queues.yaml", "withinClusterQueue: LowerPriority", "withinClusterQueue: Lower", "Lower"),
    (CUSTOM, "kueue/queues.yaml", "- {name: memory, nominalQuota: 256Gi}", "", "graftwork-cpu lists ['cpu']"),
    (CUSTOM, "kueue/queues.yaml", 'nominalQuota: "64"', "nominalQuota: many", "many"),
    (CUSTOM, "kueue/flavors.yaml", "v1beta2", "v1beta1", "no schema of kueue.x-k8s.io/v1beta1"),
    (CUSTOM, "kueue/flavors.yaml", "  name: graftwork-cpu", "  name: graftwork-cpu\n  namespace: kubeflow", "namespace"),
    (CUSTOM, "kueue/flavors.yaml", "operator: Exists,", "operator: Exists, value: yes,", "should not be valid"),
    (CUSTOM, "kueue/priorities.yaml", "value: 1000", "valu: 1000", "value"),
    (CUSTOM, "gpu-pools/eks/nodepools.yaml", "consolidateAfter: 10m", "consolidateAfter: 10 minutes", "10 minutes"),
    (CUSTOM, "gpu-pools/eks/nodepools.yaml", "effect: NoSchedule", "effect: NoWay", "NoWay"),
    (CUSTOM, "gpu-pools/eks/nodeclass.yaml", "amiSelectorTerms", "amiSelector", "amiSelector"),
    (CUSTOM, "serving/inference.yaml", "storageUri: s3://", "storageUri: models:/", "models:/"),
    (CUSTOM, RUNTIME, "path: /ping", "pathh: /ping", "pathh"),
    (PODS, RUNTIME, "runAsNonRoot: true", "runAsNonRoot: false", "runAsNonRoot is not true"),
    (PODS, RUNTIME, "runAsUser: 1000", "runAsUser: 0", "runAsUser is 0"),
    (PODS, RUNTIME, "seccompProfile: {type: RuntimeDefault}", "seccompProfile: {type: Unconfined}", "seccompProfile"),
    (PODS, RUNTIME, "allowPrivilegeEscalation: false", "privileged: true", "allowPrivilegeEscalation is not false"),
    (PODS, RUNTIME, "allowPrivilegeEscalation: false", "privileged: true", "privileged"),
    (PODS, RUNTIME, "drop: [ALL]", "drop: [NET_RAW]", "not all dropped"),
    (PODS, RUNTIME, "drop: [ALL]", "drop: [ALL], add: [SYS_ADMIN]", "capabilities are added"),
    (PODS, RUNTIME, "emptyDir: {sizeLimit: 2Gi}", "hostPath: {path: /}", "volume tmp is of type hostPath"),
    (PODS, RUNTIME, "containerPort: 8080,", "containerPort: 8080, hostPort: 8080,", "host port"),
    (PODS, RUNTIME, "  containers:\n", "  hostIPC: true\n  containers:\n", "hostIPC is set"),
    (PINNED, "kfp/kustomization.yaml", "?ref=2.17.0", "", "names no version"),
    (PINNED, "kfp/kustomization.yaml", "?ref=2.17.0", "?ref=master", "names no version"),
    (PINNED, "kueue/controller/kustomization.yaml", "download/v0.19.2", "latest/download", "names no version"),
    (PINNED, RUNTIME, "graftwork-python:0.1.0", "graftwork-python:latest", "graftwork-python:latest"),
    (PINNED, RUNTIME, "graftwork-python:0.1.0", "graftwork-python", "graftwork-python'"),
    (PINNED, "kind/cluster.yaml", "kindest/node:v1.36.1", "kindest/node", "kindest/node"),
    (SECRETS, "kfp/component/config.json", '"AccessKey": ""', '"AccessKey": "minio"', "object store"),
    (RETRIES, "kfp/component/workflow-controller.yaml", 'limit: "0"', 'limit: "2"', "retryStrategy is"),
    (RETRIES, "kfp/component/kustomization.yaml", "path: workflow-controller.yaml", "path: install-config.yaml", "OnError"),
    (YAML, "kueue/flavors.yaml", "spec: {}", "spec: {}\nspec: {}", "duplication"),
    (SHELL, "install.sh", 'say "Secrets"', "say $secrets", "SC2086"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "old", "new", "told"), PLANTED)
def test_a_fault_is_told(tree: Any, name: str, file: str, old: str, new: str, told: str) -> None:
    """A manifest that the cluster refuses, or a pod that it does not admit, would be found out at two in the morning instead."""
    part = tree.root / "infra" / file.partition("/")[0]
    for other in (tree.root / "infra").iterdir():  # what the file has no part in costs time alone
        if other.is_dir() and other != part:
            shutil.rmtree(other)
    change(tree, file, old, new)
    found = faults(tree, name)
    assert any(told in fault for fault in found), found


def test_a_secret_in_a_file_is_told(tree: Any) -> None:
    """A password that is committed once is out for good."""
    path = tree.root / "infra" / "serving" / "login.yaml"
    path.write_text("apiVersion: v1\nkind: Secret\nmetadata: {name: login}\nstringData: {password: hunter2}\n", "utf-8")
    assert any("Secret login holds values" in fault for fault in faults(tree, SECRETS))


def test_a_dockerfile_with_a_fault_is_told(tree: Any) -> None:
    """An image from an unpinned base is another one every day."""
    (tree.root / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && apt-get install curl\n", encoding="utf-8")
    found = faults(tree, DOCKER)
    assert any("DL3006" in fault for fault in found) and all("Dockerfile:" in fault for fault in found)


def run(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "CI"} | environment
    command = [sys.executable, str(ROOT / "infra" / "check.py"), str(root)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def test_what_is_here_passes(tree: Any) -> None:
    """`make lint` is what stands between a slip and a cluster; it must list what it looked at, and be silent about the rest."""
    done = run(tree.root)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == len(check.CHECKS)
    if shutil.which("kubectl") or shutil.which("kustomize"):
        assert "4 more need the network" in done.stdout
        assert " 0 objects" not in done.stdout and ": 0 pods" not in done.stdout


def test_a_fault_is_one_line_and_a_status(tree: Any) -> None:
    """CI goes by the exit status, and a person by the line."""
    change(tree, "kfp/kustomization.yaml", "?ref=2.17.0", "")
    done = run(tree.root)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("infra/check: infra/kfp/kustomization.yaml: https://") and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("ci", [False, True])
def test_a_missing_tool_is_named(tree: Any, tmp_path_factory: pytest.TempPathFactory, ci: bool) -> None:
    """A check that was silently left out looks like one that passed."""
    empty = str(tmp_path_factory.mktemp("no-tools"))
    done = run(tree.root, PATH=empty, **({"CI": "true"} if ci else {}))
    assert "kustomize builds: not done: neither kustomize nor kubectl" in done.stdout
    assert done.returncode == (1 if ci else 0)
    assert ("not done, and CI must" in done.stderr) is ci


# ---- what kustomize makes of it ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> Any:
    tree = check.Tree(ROOT)
    try:
        result = check.build(tree)
    except check.NotDoneError as missing:
        pytest.skip(str(missing))
    assert not [fault for fault in result.faults if "infra/" in fault]
    return {tree.shown(folder): objects for folder, objects in tree.built.items()}


def one(objects: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"].startswith(name)]
    assert len(found) == 1, [f"{o['kind']} {o['metadata']['name']}" for o in objects]
    return found[0]


def test_kfp_takes_our_settings(built: Any) -> None:
    """KFP 2.17's own configuration asks an MLflow that is not there, and its object store has a login that everyone knows."""
    objects = built["infra/kfp/check"]
    assert not [o for o in objects if o["kind"] == "Secret"]
    settings = one(objects, "ConfigMap", "graftwork-kfp-config")
    pod = one(objects, "Deployment", "ml-pipeline")["spec"]["template"]["spec"]
    mounted = {volume["name"]: volume for volume in pod["volumes"]}
    mount = pod["containers"][0]["volumeMounts"][0]
    assert mounted[mount["name"]]["configMap"]["name"] == settings["metadata"]["name"]  # a change restarts the server
    assert mount["mountPath"] == "/config/config.json"
    config = yaml.safe_load(settings["data"]["config.json"])
    assert (
        config["DEFAULTPIPELINERUNNERSERVICEACCOUNT"]
        == one(built["infra/graftwork/standalone"], "ServiceAccount")["metadata"]["name"]
    )
    assert config["plugins"]["mlflow"]["settings"]["injectUserEnvVars"] is False


def test_the_joined_variant_differs_in_what_it_says(built: Any) -> None:
    """Two copies of a long file drift apart, and one of them is wrong then."""
    import json

    plain, joined = (
        json.loads((ROOT / "infra" / "kfp" / name / "config.json").read_text("utf-8"))
        for name in ("component", "joined")
    )
    plain["plugins"]["mlflow"]["settings"] |= {"injectUserEnvVars": True, "defaultExperimentName": "graftwork"}
    assert joined == plain


def test_the_joined_variant_replaces_the_settings(tree: Any) -> None:
    """Two ConfigMaps of which the server reads the other would leave everything as it was."""
    change(tree, "kfp/joined/kustomization.yaml", "  - ..\n", "  - ../check\n")  # ".." needs the network
    faults(tree, "kustomize builds")
    objects = tree.built[tree.root / "infra" / "kfp" / "joined"]
    settings = one(objects, "ConfigMap", "graftwork-kfp-config")
    assert '"injectUserEnvVars": true' in settings["data"]["config.json"]
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    assert pod["volumes"][0]["configMap"]["name"] == settings["metadata"]["name"]


def test_the_runner_may_little(built: Any) -> None:
    """A step runs what data and a network bring; with KFP's own account it could read every password of the namespace."""
    rules = one(built["infra/graftwork/standalone"], "Role", "graftwork-runner")["rules"]
    for rule in rules:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        if "secrets" in rule["resources"]:
            assert rule["verbs"] == ["get"] and rule["resourceNames"]
        assert not {"pods/exec", "deployments", "roles", "rolebindings"} & set(rule["resources"])


def test_namespaces_say_their_level(built: Any) -> None:
    """Without the labels, Pod Security admits anything; with too much of them, KFP's own pods are not let in again."""
    levels = {
        name: one(built[f"infra/graftwork/{name}"], "Namespace")["metadata"]["labels"]
        for name in ("standalone", "profile", "kind", "gke", "eks", "aks")
    }
    enforce = "pod-security.kubernetes.io/enforce"
    assert {name: labels[enforce] for name, labels in levels.items()} == dict.fromkeys(levels, "baseline") | {
        "profile": "restricted"
    }
    assert all(labels["pod-security.kubernetes.io/warn"] == "restricted" for labels in levels.values())
    queue = one(built["infra/kueue"], "ClusterQueue")["spec"]["namespaceSelector"]["matchLabels"]
    assert all(queue.items() <= labels.items() for labels in levels.values())


def test_checkpoints_can_follow_a_step_to_another_node(built: Any) -> None:
    """A volume that one node alone can mount keeps a step waiting for that node after it is gone."""
    classes = {}
    for name in ("standalone", "kind", "gke", "eks", "aks"):
        claim = one(built[f"infra/graftwork/{name}"], "PersistentVolumeClaim")["spec"]
        assert claim["accessModes"] == ["ReadWriteMany"]
        classes[name] = claim.get("storageClassName")
    assert classes == {
        "standalone": None,
        "kind": "",
        "gke": "standard-rwx",
        "eks": "graftwork-efs",
        "aks": "azurefile-csi",
    }


def test_pools_and_queues_speak_of_the_same_nodes(built: Any) -> None:
    """A flavor whose label no pool carries admits a pod that no node takes; one whose toleration is missing, the same."""
    flavors = {o["metadata"]["name"]: o["spec"] for o in built["infra/kueue"] if o["kind"] == "ResourceFlavor"}
    for pool in (o for o in built["infra/gpu-pools/eks"] if o["kind"] == "NodePool"):
        template = pool["spec"]["template"]
        flavor = flavors[pool["metadata"]["name"]]
        assert flavor["nodeLabels"] == template["metadata"]["labels"]
        tolerated = {t["key"] for t in flavor["tolerations"]}
        assert {t["key"] for t in template["spec"]["taints"]} <= tolerated
    for cloud in ("gke", "aks"):
        script = (ROOT / "infra" / "gpu-pools" / cloud / "create-pools.sh").read_text("utf-8")
        assert "graftwork/pool=" in script and "gpu-spot" in script
    kind = yaml.safe_load((ROOT / "infra" / "kind" / "cluster.yaml").read_text("utf-8"))
    assert [node["labels"]["graftwork/pool"] for node in kind["nodes"] if "labels" in node] == ["gpu"]
    queue = one(built["infra/kueue"], "ClusterQueue")["spec"]
    assert {f["name"] for g in queue["resourceGroups"] for f in g["flavors"]} == set(flavors)
    assert {r for g in queue["resourceGroups"] for r in g["coveredResources"]} == {"cpu", "memory", "nvidia.com/gpu"}
    values = {o["metadata"]["name"]: o["value"] for o in built["infra/kueue"] if o["kind"] == "WorkloadPriorityClass"}
    assert values["graftwork-interactive"] > values["graftwork-scheduled"]


def test_presets_reach_the_nodes_of_the_cluster_on_this_machine() -> None:
    """`--gpu-pool gpu-operator` is what `make kind-test` submits with: its label and toleration must be those of kind's GPU node."""
    from graftwork.pipelines.pools import pool_parameters

    nodes = yaml.safe_load((ROOT / "infra" / "kind" / "cluster.yaml").read_text("utf-8"))["nodes"]
    node = next(n for n in nodes if "labels" in n)
    joined = yaml.safe_load(node["kubeadmConfigPatches"][0])
    asked = pool_parameters("gpu-operator", node["labels"]["nvidia.com/gpu.product"])
    assert asked["gpu_node_selector"].items() <= node["labels"].items()
    for taint in joined["nodeRegistration"]["taints"]:
        assert any(t["key"] == taint["key"] and t["effect"] == taint["effect"] for t in asked["gpu_tolerations"])
