"""``graftwork run --runner docker``: the steps of a local run in containers, each in one of its own.

``kfp.local.DockerRunner`` starts a container with the folder of the run's artifacts, and little else. Here a step finds what it finds as a process:
every path under its own name, the caller's user, and of the environment what it needs, secrets for those steps alone that use them.

The container of the next step is started while this one works, and has imported when its command comes (``warm.stand_by``).

A container is waited for and removed here, not by kfp, whose way has the engine remove it at its end: a container that ends at once is gone before
its exit status was read, and passes for a success (kubeflow/pipelines#13332).
"""

import codecs
import contextlib
import itertools
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import psutil

from graftwork import __version__
from graftwork.errors import UserError, one_line
from graftwork.files import STORE
from graftwork.modality import imports
from graftwork.pipelines import warm
from graftwork.pipelines.local import Runner, process_name
from graftwork.tracking import CHECKPOINTS, sqlite_file, tracking_uri

if TYPE_CHECKING:
    from graftwork.sources.record import DataSource

DEFAULT_IMAGE = f"ghcr.io/graftwork/graftwork-python:{__version__}"
RUN, STEP, PROCESS = "graftwork.run", "graftwork.step", "graftwork.process"  # labels of the containers
VERSION = "org.opencontainers.image.version"  # label of the image
PATIENCE = 15  # seconds for a step that was asked to stop

# The environment of every step: settings, and what decides the number of threads and the kernels, and so the last bit of a result.
PASSED = ("GRAFTWORK_", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "NUMEXPR_", "PYTORCH_", "CUDA_")
PASSED_NAMES = ("LANG", "LC_ALL", "TZ")
OWN = ("GRAFTWORK_COMMIT",)  # the image's, not this machine's
# Those that reach a network, and what each may know for it. The others have neither a network nor a secret.
NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "ALL_PROXY", "all_proxy")
CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")
FILES_OF_AWS = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
REACHES = {
    "ingest_data": ("AWS_",),
    "extract_features": ("AWS_", "HF_"),
    "register_model": ("MLFLOW_", "AWS_"),
}
# The steps in their order, and what each imports before its command comes.
IMPORTS = {
    "ingest_data": ("graftwork.ingest",),
    "validate_data": ("graftwork.validate", "great_expectations"),
    "extract_features": ("graftwork.features",),
    "train_baseline": ("graftwork.baseline", "sklearn.linear_model"),
    "fine_tune": ("graftwork.finetune",),
    "evaluate_model": ("graftwork.evaluate", "captum.attr", "cleanlab.filter"),
    "register_model": ("graftwork.register", "mlflow.pyfunc"),
}
# And what of its modality each imports beside.
PARTS = {
    "ingest_data": ("looks",),
    "validate_data": ("looks",),
    "extract_features": ("transforms", "backbones"),
    "train_baseline": ("transforms",),
    "fine_tune": ("transforms", "backbones"),
    "evaluate_model": ("transforms", "backbones", "showing"),
    "register_model": ("transforms", "backbones", "inputs"),
}
# What a mount may not hide, since the container runs on it.
IMAGES_OWN = ("/opt/graftwork", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
MOST_MOUNTS = 64  # of data; past that, the folder above them all


class Engine(NamedTuple):
    """A container engine that answers, and an image on it that fits."""

    client: Any  # docker.DockerClient
    image: str  # as it was named
    image_id: str  # sha256:...: what its contents are known by
    user: str  # as whom a container writes files that are the caller's
    options: dict[str, Any]  # of docker.containers.create, as this engine needs them


def find_engine(image: str = "") -> Engine:
    """Return the engine of this machine with ``image`` on it.

    Raises:
        UserError: no engine answers, or it may not be used, or it has no such image, or one of another version.
    """
    try:
        import docker
        from docker.errors import DockerException, ImageNotFound
    except ImportError:
        raise UserError("--runner docker: the Python package docker is missing; pip install docker") from None
    name = image or os.environ.get("GRAFTWORK_IMAGE") or DEFAULT_IMAGE
    address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    if not address.startswith(("unix://", "npipe://", "http+unix://")):
        raise UserError(
            f"DOCKER_HOST {one_line(address, 80)}: is another machine, which has not this one's files; use an engine on this machine"
        )
    try:
        client = docker.from_env()
        told = client.info()
    except DockerException as error:
        raise UserError(f"--runner docker: {why_no_engine(str(error), address)}") from None
    try:
        found = client.images.get(name)
    except ImageNotFound:
        raise UserError(
            f"image {one_line(name)}: the engine has none of that name; docker pull it, or build it as docs/image.md says"
        ) from None
    except DockerException as error:  # a name that cannot be one
        raise UserError(
            f"image {one_line(name)}: {one_line(getattr(error, 'explanation', '') or error, 120)}; give NAME:TAG"
        ) from None
    labels = found.attrs.get("Config", {}).get("Labels") or {}
    version = labels.get(VERSION, "")
    if version.split("-")[0].split("+")[0] != __version__:
        raise UserError(
            f"image {one_line(name)}: holds {f'version {one_line(version, 40)}' if version else 'no graftwork'}, this is graftwork "
            f"{__version__}; use the image of this version, or build it as docs/image.md says"
        )
    return Engine(client, name, found.id, *fitting(told, found.attrs))


def why_no_engine(error: str, address: str) -> str:
    """Return what is wrong with the engine at ``address``, and what to do."""
    socket = one_line(address.removeprefix("unix://"), 80)
    if "Permission denied" in error:
        return f"you may not use the container engine at {socket}; have yourself added to its group (usually docker), and log in again"
    if "FileNotFoundError" in error or "No such file" in error:
        return f"no container engine at {socket}; install one (Debian, Ubuntu: apt-get install docker.io) and start it, or run without --runner"
    return (
        f"the container engine at {socket} does not answer ({one_line(error, 120)}); start it, or run without --runner"
    )


def fitting(told: dict[str, Any], image: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the user of the containers and the options that depend on the engine, from what it tells of itself and of the image."""
    security = " ".join(told.get("SecurityOptions") or [])
    options: dict[str, Any] = {"security_opt": ["no-new-privileges"], "cap_drop": ["ALL"]}
    # Where the engine itself is the caller's, root in a container is the caller, and any other user somebody else.
    user = "0:0" if "name=rootless" in security else f"{os.getuid()}:{os.getgid()}"
    if user.startswith("0:"):
        options["cap_add"] = ["DAC_OVERRIDE"]  # root reads and writes other users' files, in a process as well
    else:
        options["group_add"] = [str(group) for group in os.getgroups()]
    if "name=userns" in security:
        options["userns_mode"] = "host"
    if "name=selinux" in security:  # the mounts are the user's own folders: they are not relabelled
        options["security_opt"].append("label=disable")
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        options["cpuset_cpus"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    # The image for GPUs asks for them by its environment; an engine without NVIDIA's runtime could not start it with them.
    wants_gpu = any(line.startswith("NVIDIA_VISIBLE_DEVICES=") for line in image.get("Config", {}).get("Env") or [])
    if wants_gpu and "nvidia" in (told.get("Runtimes") or {}):
        from docker.types import DeviceRequest

        options["device_requests"] = [DeviceRequest(count=-1, capabilities=[["gpu"]])]
    return user, options


def places(parameters: dict[str, Any], source: "DataSource", output: Path) -> dict[Path, bool]:
    """Return the folders and files that the steps of a run need, and whether they write there.

    Raises:
        UserError: one would hide what the image is made of.
    """
    from graftwork.sources.arrays import cache_folder

    cache = cache_folder()
    found: dict[Path, bool] = dict.fromkeys(data_places(parameters["data"], source), False)
    found |= dict.fromkeys(certificates(), False)
    if parameters["data"] == "fashion-mnist":
        found[FASHION_MNIST] = False
    for path in (parameters["weights"], parameters["learning_curve"]):
        if path and "://" not in path:
            found[Path(path)] = False
    for name, file in FILES_OF_AWS.items():
        found[Path(os.environ.get(name) or Path.home() / ".aws" / file)] = False
    written = [output.resolve(), cache, Path(os.environ.get("HF_HOME") or cache.parent / "huggingface")]
    written += [
        Path(os.environ[name]) for name in (CHECKPOINTS, STORE, "GRAFTWORK_TORCHVISION_ROOT") if os.environ.get(name)
    ]
    if os.environ.get("GRAFTWORK_CACHE"):
        written.append(Path(os.environ["GRAFTWORK_CACHE"]) / "graftwork")
    for folder in (*written, *tracking_places(tracking_uri(output))):
        with contextlib.suppress(OSError):  # a home that cannot be written costs a download or a measurement
            folder.mkdir(parents=True, exist_ok=True)
            found[folder.absolute()] = True
    for path in found:
        for own in map(Path, IMAGES_OWN):
            if path == own or path in own.parents:
                raise UserError(
                    f"{one_line(path)}: cannot be given to a container, where {own} is the image's; move it into a folder of its own"
                )
    return {path: writes for path, writes in found.items() if path.exists()}


def data_places(data: str, source: "DataSource") -> set[Path]:
    """Return the folders, the fewest, in which the data's files lie, those that links lead to as well."""
    from graftwork.sources.folder import FolderSource
    from graftwork.sources.manifest import ManifestSource
    from graftwork.sources.record import File

    found = (
        {Path(data)} if Path(data).is_absolute() else set()
    )  # what is no named dataset and no s3:// was made absolute
    parents: set[Path] = set()
    if isinstance(source, FolderSource | ManifestSource):
        for record in source.records():
            if isinstance(record.content, File):
                path = record.content.path.absolute()
                parents.add(path.parent)
                if path.is_symlink():
                    found.add(path.resolve().parent)
    for folder in parents:
        found |= {folder, folder.resolve()}
    kept = fewest(path for path in found if path.exists())
    return kept if len(kept) <= MOST_MOUNTS else {Path(os.path.commonpath(kept))}


def fewest(folders: Iterable[Path]) -> set[Path]:
    """Leave out the folders that lie in another."""
    kept: set[Path] = set()
    for folder in sorted(set(folders), key=lambda path: len(path.parts)):
        if not kept.intersection(folder.parents):
            kept.add(folder)
    return kept


def certificates() -> list[Path]:
    return [Path(os.environ[name]) for name in CERTIFICATES if os.environ.get(name)]


def tracking_places(uri: str) -> list[Path]:
    """Return the folders that registering a model writes to, where MLflow's store is one of files."""
    database = sqlite_file(uri)
    if database is None:
        return [] if urlsplit(uri).scheme not in ("", "file") else [Path(unquote(uri.removeprefix("file://")))]
    found = [database.parent]
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection,
    ):
        for (address,) in connection.execute("select distinct artifact_location from experiments"):
            if str(address).startswith("file://"):
                found.append(Path(unquote(urlsplit(address).path)))
    return found


def in_containers(engine: Engine, parameters: dict[str, Any], source: "DataSource", output: Path) -> Runner:
    """Return the runner whose steps are containers. UserError: a path cannot be given to one."""
    remove_stale(engine)
    mounted = places(parameters, source, output)

    @contextlib.contextmanager
    def running(folder: Path) -> Iterator[tuple[Any, str]]:
        from docker.types import Mount
        from kfp import local
        from kfp.local import docker_task_handler

        settings = engine.options | {
            "user": engine.user,
            "labels": labels(folder.name),
            "mounts": [Mount(str(path), str(path), "bind", read_only=not writes) for path, writes in mounted.items()]
            # On the disk, and gone with the container; the rest of the image's files cannot be written.
            + [Mount("/tmp", None, "volume")],
            "read_only": True,
            "shm_size": psutil.virtual_memory().total // 2,  # what a machine gives its processes
        }
        kfps, workers = docker_task_handler.run_docker_container, ThreadPoolExecutor(1)
        docker_task_handler.run_docker_container = run_container(engine, parameters, workers)
        try:
            # The key of kfp's cache holds the image's name, behind which another image may stand tomorrow.
            yield local.DockerRunner(**settings), engine.image_id.removeprefix("sha256:")[:16]
        finally:
            docker_task_handler.run_docker_container = kfps
            workers.shutdown()
            remove(engine, f"{RUN}={folder.name}")

    return Runner(running, lambda: stop_all(f"{PROCESS}={process_name(os.getpid())}"))


def labels(run: str) -> dict[str, str]:
    return {RUN: run, PROCESS: process_name(os.getpid())}


def run_container(engine: Engine, parameters: dict[str, Any], workers: Executor) -> Any:
    """Return what stands in for kfp's function of the same job: it runs one step to its end, and returns 0 if that left its outputs."""
    ahead: dict[str, Future[Any]] = {}

    def start(step: str, settings: dict[str, Any]) -> Any:
        """Start the container of a step, which imports and then waits for its command."""
        settings = settings | {"network_mode": network_for(step), "labels": settings["labels"] | {STEP: step}}
        settings["environment"] = environment_for(step, parameters) | settings.get("environment", {})
        stand_by = ["python3", "-m", warm.__name__, "stand-by", *IMPORTS.get(step, ())]
        stand_by += imports(str(parameters["modality"]), *PARTS[step]) if step in PARTS else []
        container = engine.client.containers.create(engine.image_id, stand_by, stdin_open=True, **settings)
        container.start()
        return container

    def run(client: Any, image: str, command: list[str], volumes: dict[str, Any], **settings: Any) -> int:
        from docker.errors import DockerException

        step, outputs = told_by(command)
        try:
            container = (ahead.pop(step, None) or workers.submit(start, step, settings)).result()
            following = dict(itertools.pairwise(IMPORTS)).get(step)
            if following and following not in ahead:
                ahead[following] = workers.submit(start, following, settings)
            try:
                tell(container, json.dumps(command).encode() + b"\n")
                decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
                for piece in container.logs(stream=True, follow=True):
                    print(decoder.decode(piece), end="")
                status = int(container.wait(timeout=None)["StatusCode"])
            finally:
                container.remove(v=True, force=True)
        except (DockerException, OSError) as error:  # OSError: the engine has gone
            print(f"graftwork: {step}: {one_line(getattr(error, 'explanation', '') or error)}")
            return 1
        return status or int(not outputs.is_file())

    return run


def tell(container: Any, text: bytes) -> None:
    """Write to a container's standard input."""
    stream = container.attach_socket(params={"stdin": 1, "stream": 1})
    try:
        while text:
            text = text[os.write(stream.fileno(), text) :]
    finally:
        stream.close()


def told_by(command: list[str]) -> tuple[str, Path]:
    """Return from a step's command its name, and the file that it writes when it has come to its end."""
    words = dict(itertools.pairwise(command))
    return words["--function_to_execute"], Path(json.loads(words["--executor_input"])["outputs"]["outputFile"])


def network_for(step: str) -> str:
    """Return the network of a step: none, the engine's, or this machine's where one of its addresses means this machine."""
    if step not in REACHES:
        return "none"
    addresses = [value for name, value in os.environ.items() if name.endswith(("_URI", "_URL", "_ENDPOINT", *NETWORK))]
    here = {"localhost", "127.0.0.1", "::1"}
    return "host" if any((hostname(address) or "") in here for address in addresses) else "bridge"


def hostname(address: str) -> str | None:
    with contextlib.suppress(ValueError):  # a broken address is told of by whoever uses it
        return urlsplit(address if "://" in address else f"//{address}").hostname
    return None


def environment_for(step: str, parameters: dict[str, Any]) -> dict[str, str]:
    """Return the environment of a step: settings for all, addresses and secrets for those that use them."""
    from graftwork.sources.arrays import cache_folder

    may_know = REACHES.get(step, ())
    # Images or weights at S3; a tracking server whose artifacts are there.
    remote = {"ingest_data": parameters["data"], "extract_features": parameters["weights"]}
    if "AWS_" in may_know and step in remote and not uses_s3(remote[step]):
        may_know = tuple(prefix for prefix in may_know if prefix != "AWS_")
    found = {
        name: value
        for name, value in os.environ.items()
        if name not in OWN
        and (
            name.startswith((*PASSED, *may_know))
            or name in PASSED_NAMES
            or (step in REACHES and name in (*NETWORK, *CERTIFICATES))
        )
    }
    if "AWS_" in may_know:
        found |= {name: str(Path.home() / ".aws" / file) for name, file in FILES_OF_AWS.items() if name not in found}
    # No user of the image's: a home that can be written, and a name for those who look for one.
    return found | {"HOME": "/tmp", "USER": "graftwork", "XDG_CACHE_HOME": str(cache_folder().parent)}


def uses_s3(uri: str) -> bool:
    """Whether what is named lies at S3, or may name what does, as a manifest."""
    return uri.startswith("s3://") or uri.lower().endswith((".csv", ".csv.gz", ".tsv", ".parquet"))


def stop_all(label: str) -> None:
    """Ask the steps in the containers with ``label`` to stop, as Ctrl-C asks a process, and wait; who does not is killed."""
    import docker
    from docker.errors import DockerException

    with contextlib.suppress(DockerException, OSError), contextlib.closing(docker.from_env()) as client:
        for container in client.containers.list(filters={"label": label}):
            with contextlib.suppress(DockerException):
                container.kill("SIGTERM")
        deadline = time.monotonic() + PATIENCE
        while (running := client.containers.list(filters={"label": label})) and time.monotonic() < deadline:
            time.sleep(0.1)
        for container in running:
            with contextlib.suppress(DockerException):
                container.kill()


def remove(engine: Engine, label: str) -> None:
    """Remove the containers with ``label``, running or not."""
    from docker.errors import DockerException

    with contextlib.suppress(DockerException, OSError):
        for container in engine.client.containers.list(all=True, filters={"label": label}):
            with contextlib.suppress(DockerException):
                container.remove(v=True, force=True)


def remove_stale(engine: Engine) -> None:
    """Remove the containers of runs of this machine whose process is no more: killed with -9, it could not."""
    from docker.errors import DockerException

    with contextlib.suppress(DockerException, OSError):
        for container in engine.client.containers.list(all=True, filters={"label": PROCESS}):
            host, _, rest = container.labels[PROCESS].partition(":")
            pid = rest.partition(":")[0]
            if host != process_name(os.getpid()).partition(":")[0] or not pid.isdigit():
                continue
            with contextlib.suppress(psutil.Error, DockerException):
                if not psutil.pid_exists(int(pid)) or process_name(int(pid)) != container.labels[PROCESS]:
                    container.remove(v=True, force=True)
