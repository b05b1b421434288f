"""The same pipeline on this machine: ``kfp.local`` runs each step in a process of its own, a follower carries their journals to MLflow."""

import contextlib
import hashlib
import io
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console

import graftwork
from graftwork.errors import UserError, one_line
from graftwork.files import STORE, write_json
from graftwork.metrics import HEADLINES
from graftwork.modality import imports
from graftwork.pipelines import warm
from graftwork.pipelines.display import Display
from graftwork.tracking import (
    CHECKPOINTS,
    JOURNALS,
    Follower,
    JournalReader,
    dataset_input,
    shown_uri,
    source_tags,
    tracking_uri,
)

STEPS = [
    "ingest_data",
    "validate_data",
    "extract_features",
    "train_baseline",
    "fine_tune",
    "evaluate_model",
    "register_model",
]
# What each step leaves among the pipeline's outputs: tells where a reused step was run.
LEAVES = {
    "ingest_data": "dataset",
    "validate_data": "validation",
    "extract_features": "embeddings",
    "train_baseline": "baseline",
    "fine_tune": "fine_tuned",
    "train_scratch": "evaluation",
    "evaluate_model": "evaluation",
    "register_model": "decision",
}
RESULT_LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "scikit-learn",
    "numpy",
    "pillow",
    "scipy",
    "great-expectations",
    "kfp",
)


class StepError(Exception):
    """A step failed; the text names it and says why."""


class Runner(NamedTuple):
    """How the steps of a run are run: as processes here, or as ``pipelines/docker.py`` does."""

    # Of the run's folder: while entered, kfp's runner, and a digest of the code that it runs, which is part of every cache key.
    running: Callable[[Path], AbstractContextManager[tuple[Any, str]]]
    stop: Callable[[], None]  # ask the steps at work to stop, and wait until they have


def run_local(
    parameters: dict[str, Any],
    output: Path,
    with_scratch_control: bool,
    console: Console,
    verbose: bool = False,
    runner: Runner | None = None,
) -> dict[str, Any]:
    """Run the pipeline in ``output``/RUN-ID and return its summary, which is ``summary.json`` too. Without ``runner``, steps are processes.

    Raises:
        StepError: a step failed. UserError: the output folder cannot be written. KeyboardInterrupt: the user stopped it.
    """
    started = time.time()
    runner = runner or Runner(partial(in_processes, modality=str(parameters["modality"])), stop_processes)
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = (output / run_id).resolve()
    journals = folder / "journals"
    try:
        journals.mkdir(parents=True)
        (folder / "log.txt").write_bytes(bytes(4096))  # a full disk takes folders, but no byte
    except OSError as error:
        raise UserError(
            f"output {one_line(output)}: cannot be written ({error.strerror}); give another with --output"
        ) from None
    uri = tracking_uri(output)
    # Children get these; no parameter carries them, so that a run's own id does not make every step's cache key new.
    os.environ |= {JOURNALS: str(journals), "MLFLOW_TRACKING_URI": uri}
    os.environ.setdefault(CHECKPOINTS, str((output / ".cache" / "checkpoints").resolve()))
    os.environ.setdefault(STORE, str((output / ".cache" / "packs").resolve()))
    tags = {
        "mlflow.source.name": "graftwork run",
        "mlflow.source.type": "LOCAL",
        "graftwork.run": run_id,
        "graftwork.backbone": str(parameters["backbone"]),
        "graftwork.process": process_name(os.getpid()),
        **source_tags(),
    }
    steps = [s for s in STEPS for s in ((s, "train_scratch") if s == "fine_tune" and with_scratch_control else (s,))]
    name = f"{Path(str(parameters['data'])).name} {parameters['backbone']}"  # what tells runs apart in MLflow's table
    follower = Follower(journals, uri, output.resolve(), name, tags)
    display = Display(console, journals, steps)
    with stoppable(runner.stop):
        follower.start()
        display.start()
        try:
            with quiet(folder / "log.txt", verbose):
                outputs = run_pipeline(parameters, folder, output, with_scratch_control, runner)
        except BaseException as error:
            with uninterrupted():
                display.close()
                abandon(follower, folder, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        with uninterrupted():
            mark_reused(steps, journals, outputs)
            display.close()
            return finish(follower, folder, steps, outputs, started, parameters)


def abandon(follower: Follower, folder: Path, status: str) -> None:
    """Leave nothing half-made of a run that did not end, and no run open in MLflow."""
    for path in folder.rglob("*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
    follower.close(10)
    if follower.parent_id:
        with contextlib.suppress(Exception):  # a server that is away: the journals stay where they are
            end_stale_runs(follower)
            follower.finish(status)


def run_pipeline(
    parameters: dict[str, Any], folder: Path, output: Path, with_scratch_control: bool, runner: Runner
) -> dict[str, Path]:
    """Run the DAG and return where its outputs lie; StepError if a step failed."""
    warnings.simplefilter("ignore")
    from kfp import local

    from graftwork.pipelines.image_classification import make_pipeline

    with runner.running(folder) as (kfps_runner, build):
        local.init(
            kfps_runner,
            pipeline_root=str(folder / "artifacts"),
            enable_caching=True,
            cache_root=str((output / ".cache").resolve()),
        )
        try:
            ran = make_pipeline(with_scratch_control, local=True, build=build)(**parameters)
        except RuntimeError as error:
            raise StepError(why(folder / "journals", str(error))) from None
    return {name: Path(artifact.uri) for name, artifact in ran.outputs.items()}


@contextlib.contextmanager
def in_processes(folder: Path, modality: str = "image") -> Iterator[tuple[Any, str]]:
    """Have kfp run each step as a process of this machine's Python."""
    from kfp import local
    from kfp.local import subprocess_task_handler

    with warm_process(modality) as command_for:
        subprocess_task_handler.replace_python_executable = command_for
        yield local.SubprocessRunner(use_venv=False), build_digest()


@contextlib.contextmanager
def warm_process(modality: str = "image") -> Iterator[Callable[[list[str], str], list[str]]]:
    """Yield what turns a step's command into this machine's, and have later steps forked from a process that has imported already.

    That process is started with the step that ingests: where its result is reused, so are most others, and importing would be in vain.
    """
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="graftwork-") as folder:
        address = f"{folder}/steps"

        def command_for(command: list[str], python: str) -> list[str]:
            if started:
                words = [python, "-I", "-S", warm.__file__, "ask", address]
            else:
                words = [python]
                if "ingest_data" in command and sys.platform == "linux":
                    serve = [python, "-m", warm.__name__, "serve", address, *to_import(modality)]
                    null = subprocess.DEVNULL
                    started.append(subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=null, stderr=null))
            return use_python(command, shlex.join(words))

        try:
            yield command_for
        finally:
            for process in started:
                process.kill()
                process.communicate()


def to_import(modality: str) -> list[str]:
    """Return what a run imports, in the order in which its steps need it."""
    before = warm.MODULES.index("graftwork.features")
    return [*warm.MODULES[:before], *imports(modality), *warm.MODULES[before:]]


def use_python(command: list[str], python: str) -> list[str]:
    """Name ``python`` in a step's command. kfp's own does so in the parameters too, and breaks every path that holds "python3"."""
    return [word.replace("python3", python) if n < 3 else word for n, word in enumerate(command)]


def why(journals: Path, otherwise: str) -> str:
    """Return "step NAME failed: REASON" from the journals; a step that was killed left no reason but its beginning."""
    events = JournalReader(journals).poll()
    for step, event in reversed(events):
        if event["event"] == "error":
            # What was finished is in the cache: worth knowing where minutes of training went before.
            kept = (
                ""
                if step in ("ingest_data", "validate_data", "extract_features")
                else "; the next run reuses what was finished"
            )
            return f"step {step} failed: {event['message']}{kept}"
    ended = {step for step, event in events if event["event"] == "end"}
    cut_off = [step for step, event in events if event["event"] == "start" and step not in ended]
    if cut_off:
        return f"step {cut_off[-1]} failed: its process was killed; if memory ran out, use a smaller batch_size or image_size"
    return f"a step failed: {one_line(otherwise)} (see log.txt in {journals.parent})"


def stop_processes() -> None:
    """Ask the processes that this one started to stop, and wait; who does not is killed."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.Error):
            # The shell that kfp starts is left alone: it ends with the Python process it waits for.
            if child.name() not in ("sh", "bash", "dash"):
                child.terminate()
    _, alive = psutil.wait_procs(children, timeout=15)
    for child in alive:
        with contextlib.suppress(psutil.Error):
            child.kill()


@contextlib.contextmanager
def stoppable(stop_steps: Callable[[], None] = stop_processes) -> Iterator[None]:
    """Turn Ctrl-C and ``kill`` into KeyboardInterrupt, after the steps were asked to stop and have stopped."""

    def stop(signum: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop_steps()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Finish writing up what is done, which takes seconds, before a signal counts."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Tee(io.TextIOBase):
    """Writes to several files at once; one that is full loses the text, not the run."""

    def __init__(self, *files: Any) -> None:
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            with contextlib.suppress(OSError):
                file.write(text)
        return len(text)

    def flush(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):
                file.flush()


@contextlib.contextmanager
def quiet(log: Path, verbose: bool) -> Iterator[None]:
    """Send what KFP and the steps print to ``log``, and to the terminal as well if ``verbose``."""
    file = log.open("w", encoding="utf-8", errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(Tee(file, sys.stdout) if verbose else Tee(file)):
            yield
    finally:
        with contextlib.suppress(OSError):  # on a full disk, closing fails as well
            file.close()


def build_digest() -> str:
    """Hash the code of this package and the versions of what results depend on: a change of either must not reuse old results."""
    digest = hashlib.sha256(sys.version.encode())
    package = Path(graftwork.__file__).parent
    for path in sorted(
        [
            *package.rglob("*.py"),
            *package.rglob("*.html"),
            *package.rglob("*.md"),
            *(Path(__file__).parent.parent / "components").glob("*.py"),
        ]
    ):
        digest.update(path.name.encode() + path.read_bytes())
    for name in RESULT_LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"{name}={version(name)}".encode())
    return digest.hexdigest()[:16]


def mark_reused(steps: list[str], journals: Path, outputs: dict[str, Path]) -> None:
    """Write a journal for every step whose results were reused, from that of the run that made them, so that MLflow shows it in this run too."""
    for step in steps:
        own = journals / f"{step}.jsonl"
        if own.exists():
            continue
        origin = origin_of(outputs[LEAVES[step]])
        old = (origin / "journals" / f"{step}.jsonl") if origin else None
        events = [e for s, e in JournalReader(old.parent).poll() if s == step] if old and old.exists() else []
        now = time.time()
        lines = [
            {"event": "start", "time": now},
            {"event": "tags", "time": now, "values": {"graftwork.reused_from": origin.name if origin else ""}},
        ]
        lines += [
            {**e, "time": now}
            for e in events
            if e["event"] in ("params", "metrics", "metrics_of", "tags", "dataset")
            # What the machine did then is no property of this run.
            and not (e["event"] == "metrics" and any(k.startswith("system/") for k in e["values"]))
        ]
        lines += [{"event": "end", "time": now, "status": "FINISHED"}]
        own.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def origin_of(artifact: Path) -> Path | None:
    """Return the folder of the run that made ``artifact``."""
    return next((p.parent for p in artifact.parents if p.name == "artifacts"), None)


def finish(
    follower: Follower,
    folder: Path,
    steps: list[str],
    outputs: dict[str, Path],
    started: float,
    parameters: dict[str, Any],
) -> dict[str, Any]:
    """Write the summary, carry it to MLflow and end the parent run."""
    dataset = json.loads((outputs["dataset"] / "dataset.json").read_text(encoding="utf-8"))
    evaluation = json.loads((outputs["evaluation"] / "evaluation.json").read_text(encoding="utf-8"))
    decision = json.loads(outputs["decision"].read_text(encoding="utf-8"))
    shutil.copyfile(outputs["report"], folder / "report.html")
    shutil.copyfile(outputs["validation"], folder / "validation.html")
    timings = step_timings(folder / "journals", steps)
    tested = {
        name: {
            "seconds": candidate["seconds"],
            "val_accuracy": candidate["val"]["value"],
            "test": {key: candidate["test"][key] for name in HEADLINES for key in (name, f"{name}_interval")},
            "latency_ms": candidate["latency_ms"],
            "size_mb": candidate["size_mb"],
        }
        for name, candidate in evaluation["candidates"].items()
    }
    summary: dict[str, Any] = {
        "run_id": folder.name,
        "seconds": 0.0,
        "backbone": parameters["backbone"],
        "mlflow": {"tracking_uri": shown_uri(follower.uri), "experiment_id": "", "parent_run_id": ""},
        "data": {
            "name": dataset["name"],
            "digest": dataset["digest"],
            "classes": dataset["classes"],
            **{split: sum(by_class.values()) for split, by_class in dataset["counts"].items()},
            "broken": len(dataset["broken"]),
        },
        "steps": timings,
        "candidates": tested,
        "chosen": evaluation["chosen"],
        "decision": decision["decision"],
        "champion": decision["champion"]
        and {"version": decision["champion"]["version"], "accuracy": decision["champion"]["score"]["accuracy"]},
        "registered": decision["registered"],
        "parameters": parameters,
        "files": {name: str(path) for name, path in outputs.items()},
    }
    follower.close(20)
    try:
        client = follower.client()
        summary["mlflow"] |= {"experiment_id": follower.experiment_id, "parent_run_id": follower.parent_id}
        log_parent(client, follower.parent_id, summary, evaluation, decision, folder)
        end_stale_runs(follower)
        follower.finish("FINISHED")
    except Exception as error:  # a server that is away costs the tracking, not the run
        follower.error = follower.error or str(error)
    summary["seconds"] = time.time() - started
    summary["overhead_seconds"] = summary["seconds"] - sum(t["work_seconds"] for t in timings.values())
    if follower.error:
        summary["mlflow"]["error"] = one_line(follower.error)
    write_json(folder / "summary.json", summary)
    return summary


def step_timings(journals: Path, steps: list[str]) -> dict[str, Any]:
    """Return, for every step, its seconds from process start to end, and those of its own work: imports and starts excepted."""
    moments: dict[str, dict[str, Any]] = {step: {} for step in steps}
    for step, event in JournalReader(journals).poll():
        if event["event"] == "tags" and "graftwork.reused_from" in event["values"]:
            moments[step].setdefault("reused_from", event["values"]["graftwork.reused_from"])
        moments[step][event["event"]] = event.get("created", event["time"])
    timings = {}
    for step, at in moments.items():
        reused = "reused_from" in at
        timings[step] = {
            "seconds": 0.0 if reused else round(at["end"] - at["start"], 3),
            "work_seconds": 0.0 if reused else round(at["end"] - at.get("working", at["end"]), 3),
        } | ({"reused_from": at["reused_from"]} if reused else {})
    return timings


def log_parent(
    client: Any,
    run_id: str,
    summary: dict[str, Any],
    evaluation: dict[str, Any],
    decision: dict[str, Any],
    folder: Path,
) -> None:
    """Put on the parent run what runs are compared by: parameters, the chosen candidate's figures, the reports."""
    from mlflow.entities import Metric, Param, RunTag

    from graftwork.register import for_the_parent

    now = int(time.time() * 1000)
    metrics, tags = for_the_parent(evaluation, decision)
    client.log_batch(
        run_id,
        [Metric(k, float(v), now, 0) for k, v in metrics.items()],
        [Param(k, str(v)) for k, v in summary["parameters"].items()],
        [RunTag(k, v) for k, v in tags.items()],
    )
    data = summary["data"]
    client.log_inputs(run_id, [dataset_input(data["name"], data["digest"], summary["parameters"]["data"], "training")])
    for page in ("report.html", "validation.html"):
        client.log_artifact(run_id, str(folder / page))


def process_name(pid: int) -> str:
    """Name a process so that it can be told, later, whether it still runs: host, id and start."""
    return f"{socket.gethostname()}:{pid}:{psutil.Process(pid).create_time():.0f}"


def end_stale_runs(follower: Follower) -> None:
    """End the runs that were left RUNNING by a process of this machine that is no more (killed with -9, or the power went)."""
    client = follower.client()
    for run in client.search_runs([follower.experiment_id], "attributes.status = 'RUNNING'", max_results=200):
        host, _, rest = run.data.tags.get("graftwork.process", "").partition(":")
        pid, _, created = rest.partition(":")
        if host != socket.gethostname() or not pid.isdigit():
            continue
        try:
            alive = f"{psutil.Process(int(pid)).create_time():.0f}" == created
        except psutil.Error:
            alive = False
        if not alive:
            client.set_terminated(run.info.run_id, "KILLED")
