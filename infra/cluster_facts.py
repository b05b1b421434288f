"""What ``kubectl get ... -o json`` says, as far as infra/test-cluster.sh asks; and the state of a run of KFP.

kubectl get nodes -o json | cluster_facts.py gpu-nodes          nodes with a GPU to give, a line each
kubectl get storageclass -o json | cluster_facts.py class       the default class of volumes, or nothing
kubectl get pod NAME -o json | cluster_facts.py pod             its phase, and why it does not start
kubectl get pods -o json | cluster_facts.py tries STEP          the pods of a step of a run, oldest first: name and phase
kubectl get pods -o json | cluster_facts.py placement NODE...   where steps ran; exit status 1 if one that takes a GPU ran elsewhere
cluster_facts.py run-state HOST RUN                             PENDING, RUNNING, SUCCEEDED, FAILED, ...
cluster_facts.py delete-run HOST RUN
"""

import json
import re
import sys
import urllib.request
from typing import Any

Object = dict[str, Any]
GPU = "nvidia.com/gpu"
# Of a pod of Argo: the node of the graph, as in "x(0).root(0).fine-tune(0).executor(1)"; numbers are there where a template is retried.
NODE_NAME = "workflows.argoproj.io/node-name"
EXECUTOR = re.compile(r"\.(?P<step>[a-z0-9-]+)(\(\d+\))?\.executor(\(\d+\))?$")


def gpu_nodes(nodes: list[Object]) -> list[str]:
    return [n["metadata"]["name"] for n in nodes if int(n["status"].get("allocatable", {}).get(GPU, 0)) > 0]


def default_class(classes: list[Object]) -> list[str]:
    key = "storageclass.kubernetes.io/is-default-class"
    return [c["metadata"]["name"] for c in classes if c["metadata"].get("annotations", {}).get(key) == "true"][:1]


def pod_state(pod: Object) -> str:
    """Return the phase, and for a pod that waits the reason: no node, no image, no volume."""
    status = pod.get("status", {})
    why = [
        f"{c.get('reason')}: {c.get('message')}"
        for c in status.get("conditions", [])
        if c.get("reason") == "Unschedulable"
    ]
    for container in status.get("initContainerStatuses", []) + status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            why.append(f"{waiting['reason']}: {waiting.get('message', '')}")
    return " ".join(" ".join([str(status.get("phase", "Unknown")), *why]).split())[:400]


def step_of(pod: Object) -> str:
    match = EXECUTOR.search(pod["metadata"].get("annotations", {}).get(NODE_NAME, ""))
    return match["step"] if match else ""


def tries(pods: list[Object], step: str) -> list[str]:
    own = sorted((p for p in pods if step_of(p) == step), key=lambda p: str(p["metadata"].get("creationTimestamp")))
    return [f"{p['metadata']['name']} {p.get('status', {}).get('phase', 'Unknown')}" for p in own]


def gpus_of(pod: Object) -> int:
    return sum(int(c.get("resources", {}).get("limits", {}).get(GPU, 0)) for c in pod["spec"]["containers"])


def placement(pods: list[Object], with_gpu: set[str]) -> tuple[list[str], list[str]]:
    """Return a line a step, and what is wrong: a step with a GPU elsewhere, one without on a GPU's node, or none that takes one."""
    rows, faults, seen = [], [], 0
    for pod in sorted(pods, key=step_of):
        step, node = step_of(pod), pod["spec"].get("nodeName", "")
        if not step or not node:
            continue
        takes = gpus_of(pod)
        seen += takes > 0
        rows.append(f"{step:24} {node:32} {takes} GPU" + ("" if takes == 1 else "s"))
        if takes and node not in with_gpu:
            faults.append(f"{step} takes a GPU and ran on {node}, which has none")
        if not takes and node in with_gpu:
            faults.append(f"{step} takes no GPU and ran on {node}, which has one")
    if not seen:
        faults.append("no step took a GPU")
    return rows, faults


def request(method: str, url: str) -> Object:
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as answer:
        content: Object = json.loads(answer.read() or b"{}")
    return content


def main(arguments: list[str]) -> int:
    what, *rest = arguments
    if what in ("run-state", "delete-run"):
        url = f"{rest[0].rstrip('/')}/apis/v2beta1/runs/{rest[1]}"
        answer = request("DELETE" if what == "delete-run" else "GET", url)
        print(answer.get("state", "") or "PENDING")
        return 0
    given = json.load(sys.stdin)
    items = given.get("items", [])
    if what == "gpu-nodes":
        print("\n".join(gpu_nodes(items)))
    elif what == "class":
        print("\n".join(default_class(items)))
    elif what == "pod":
        print(pod_state(given))
    elif what == "tries":
        print("\n".join(tries(items, rest[0])))
    elif what == "placement":
        rows, faults = placement(items, set(rest))
        print("\n".join(rows))
        for fault in faults:
            print(fault, file=sys.stderr)
        return 1 if faults else 0
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
