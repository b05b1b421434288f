"""The pipeline's steps, in order: each reads its artifacts, calls the library, writes its artifacts, and journals what happened.

KFP components call these functions; so can anyone. Artifacts are paths; settings are the fields of the step's settings model.
A step that fails prints one line, leaves nothing that looks finished, and exits with status 1.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from graftwork import settings as s
from graftwork import tracking
from graftwork.errors import UserError, one_line
from graftwork.files import write_json, write_text
from graftwork.tracking import Journal

T = TypeVar("T")


def ingest_data(dataset: str, **settings: Any) -> str:
    """Pack a source into the Dataset artifact ``dataset``; return its digest."""
    with step("ingest_data") as journal:
        chosen = s.parse(s.IngestSettings, settings)
        from graftwork.ingest import ingest

        journal.write("working")
        info = ingest(chosen, Path(dataset), journal.progress)
        counts = {split: sum(by_class.values()) for split, by_class in info["counts"].items()}
        journal.params(chosen.model_dump())
        journal.metrics(
            {f"{split}_examples": n for split, n in counts.items()} | {"broken_images": len(info["broken"])}
        )
        journal.tags({"graftwork.dataset_digest": info["digest"]})
        journal.dataset(info["name"], info["digest"], info["source"], "training")
        journal.artifact(Path(dataset) / "dataset.json")
        return str(info["digest"])


def validate_data(dataset: str, dataset_digest: str, report: str, metrics: str, **settings: Any) -> dict[str, float]:
    """Check the dataset; write an HTML page ``report`` and counts ``metrics``. A critical finding stops the run."""
    with step("validate_data") as journal:
        chosen = s.parse(s.ValidateSettings, settings)
        import great_expectations  # noqa: F401  imported here, before the work is timed

        from graftwork.validate import validate

        journal.write("working")
        data = _open(dataset, dataset_digest, journal)
        reference = _reference(chosen, data, journal)
        result = validate(data, chosen, reference)
        write_text(Path(report), result.html)
        details = Path(report).with_name(f"{Path(report).name}.json")
        write_json(details, result.summary)
        _keep(journal, Path(report), "validation.html")
        _keep(journal, details, "validation.json")
        counts = {f"validation_{k}": float(v) for k, v in result.summary["counts"].items()}
        journal.params(chosen.model_dump())
        journal.metrics(counts)
        # A few at a time: the page has them all.
        journal.notes(
            result.warnings[:5]
            + ([f"and {len(result.warnings) - 5} more warnings"] if len(result.warnings) > 5 else [])
        )
        if result.critical:
            raise UserError(
                f"{result.critical[0]}"
                + (f" (and {len(result.critical) - 1} more, see the report)" if len(result.critical) > 1 else "")
            )
        write_json(Path(metrics), counts)
        return counts


def extract_features(dataset: str, dataset_digest: str, embeddings: str, **settings: Any) -> str:
    """Run the pretrained backbone over train and validation; write the Embeddings artifact and return its digest."""
    with step("extract_features") as journal:
        chosen = s.parse(s.FeatureSettings, settings)
        from graftwork.features import extract_features as extract

        journal.write("working")
        data = _open(dataset, dataset_digest, journal)
        info = extract(data, chosen, Path(embeddings), journal.progress, note=lambda message: journal.notes([message]))
        journal.params(
            {
                **chosen.model_dump(),
                **{f"preprocess_{k}": v for k, v in info["preprocess"].items()},
                **info["plan"],
                **info["augmentation"],
                "backbone": info["backbone"],
                "weights_source": info["weights"]["source"],
            }
        )
        journal.metrics(info["remarks"])
        journal.tags({"graftwork.backbone": info["backbone"]})
        return digest_of_embeddings(embeddings)


def train_baseline(embeddings: str, model: str, metrics: str, digest: str = "") -> dict[str, float]:
    """Fit the linear probe on the Embeddings artifact; write a Model artifact."""
    with step("train_baseline") as journal:
        import sklearn.linear_model  # noqa: F401  imported here, before the work is timed

        from graftwork.baseline import train_baseline as train

        journal.write("working")
        _check("the embeddings", digest_of_embeddings(embeddings), digest)
        info = train(Path(embeddings), Path(model))
        for n, point in enumerate(info["history"]):
            journal.metrics(
                {"C": point["C"], "val_accuracy_at_C": point["val_accuracy"], "val_loss_at_C": point["val_loss"]}, n
            )
        journal.params(info["hyperparameters"])
        return _log_model(journal, info, Path(model), Path(metrics))


def fine_tune(
    dataset: str,
    dataset_digest: str,
    baseline: str,
    model: str,
    metrics: str,
    baseline_digest: str = "",
    **settings: Any,
) -> dict[str, float]:
    """Fine-tune from the baseline, or train from scratch as a control; write a Model artifact."""
    with step("train_scratch" if settings.get("strategy") == "scratch" else "fine_tune") as journal:
        chosen = s.parse(s.FineTuneSettings, settings)
        from graftwork.finetune import fine_tune as train

        journal.write("working")
        data = _open(dataset, dataset_digest, journal)
        _check("the baseline", model_digest(baseline), baseline_digest)
        info = train(
            data,
            Path(baseline),
            chosen,
            Path(model),
            journal.progress,
            note=lambda message: journal.notes([message]),
            on_epoch=lambda epoch, values: journal.metrics(values, epoch),
        )
        journal.params(
            info["hyperparameters"] | info["plan"] | {f"average_{k}": v for k, v in info["averages"].items()}
        )
        return _log_model(journal, info, Path(model), Path(metrics))


def evaluate_model(
    dataset: str,
    dataset_digest: str,
    models: dict[str, str],
    evaluation: str,
    report: str,
    metrics: str,
    embeddings: str = "",
    digests: dict[str, str] | None = None,
    embeddings_digest: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate every Model artifact in ``models`` on the test split and choose one; write the evaluation and its page."""
    with step("evaluate_model") as journal:
        chosen = s.parse(s.EvaluateSettings, settings)
        from graftwork.evaluate import evaluate

        journal.write("working")
        data = _open(dataset, dataset_digest, journal)
        for name, model in models.items():
            if model:
                _check(f"the model {name}", model_digest(model), (digests or {}).get(name, ""))
        if embeddings:
            _check("the embeddings", digest_of_embeddings(embeddings), embeddings_digest)
        result = evaluate(
            data,
            {name: Path(path) for name, path in models.items() if path},
            chosen,
            Path(evaluation),
            journal.progress,
            note=lambda message: journal.notes([message]),
            embeddings=Path(embeddings) if embeddings else None,
        )
        journal.notes(result["notes"])
        write_text(Path(report), (Path(evaluation) / "report.html").read_text(encoding="utf-8"))
        journal.params({**chosen.model_dump(), "chosen": result["chosen"]})
        found = test_metrics(result["candidates"][result["chosen"]]["test"])
        journal.metrics(found)
        # Beside what was logged in its training: the candidates' runs are what MLflow's table compares.
        # Once where two are the same weights: a fine-tuned candidate may be the baseline, if no epoch beat it.
        for sha256, test in {one["sha256"]: one["test"] for one in result["candidates"].values()}.items():
            journal.metrics_of(sha256, test_metrics(test))
        for path in sorted(Path(evaluation).iterdir()):
            journal.artifact(path, "evaluation")
        write_json(Path(metrics), found)
        best = result["candidates"][result["chosen"]]["test"]
        return {"metrics": found, "labels": result["classes"], "confusion": best["confusion"], "roc": best["roc"]}


def model_digest(model: str) -> str:
    """Return the SHA-256 of a Model artifact's weights.

    Steps hand digests on as parameters: a cluster's cache knows artifacts by name, and parameters by value.
    """
    from graftwork.model import read_info

    return str(read_info(model)["sha256"])


def digest_of_embeddings(embeddings: str) -> str:
    """Return a digest of what made an Embeddings artifact: the dataset, the settings, the weights, and how it went."""
    return hashlib.sha256((Path(embeddings) / "embeddings.json").read_bytes()).hexdigest()


def _check(what: str, found: str, wanted: str) -> None:
    if wanted and found != wanted:
        raise UserError(
            f"{what}: has the digest {found[:12]}, not {wanted[:12]}; it is of another run, run again without the cache"
        )


def test_metrics(score: dict[str, Any]) -> dict[str, float]:
    """Return the headline figures of a test as MLflow's metrics: those that are defined."""
    from graftwork.metrics import HEADLINES

    return {f"test_{name}": score[name] for name in HEADLINES if score[name] is not None}


def register_model(
    dataset: str,
    dataset_digest: str,
    evaluation: str,
    models: dict[str, str],
    decision: str,
    report: str,
    validation: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Register the chosen Model in MLflow and decide which alias it gets; write the decision as JSON, and the report that begins with it."""
    with step("register_model") as journal:
        chosen = s.parse(s.RegisterSettings, settings)
        tracking.quiet_mlflow()
        import mlflow.pyfunc  # noqa: F401

        from graftwork.register import for_the_parent, register

        journal.write("working")
        data = _open(dataset, dataset_digest, journal)
        folders = {k: Path(v) for k, v in models.items() if v}
        counts = read_validation(validation) if validation else None
        result = patiently(
            lambda: register(data, Path(evaluation), folders, chosen, journal.run_id, counts), journal, REGISTRY_WAIT
        )
        write_text(Path(report), final_report(data, Path(evaluation), folders, result))
        write_json(Path(decision), result)
        journal.params(chosen.model_dump())
        journal.tags({"graftwork.promoted": str(result["decision"]["promoted"]).lower()})
        _keep(journal, Path(decision), "decision.json")
        page = _keep(journal, Path(report), "report.html")
        if not os.environ.get(tracking.JOURNALS):  # a local run puts on its parent what it has in its summary
            judged = json.loads((Path(evaluation) / "evaluation.json").read_text(encoding="utf-8"))
            journal.parent(*for_the_parent(judged, result), [page])
        return result


def patiently(call: Callable[[], T], journal: Journal, seconds: float) -> T:
    """Call, and where the registry is away call again, for so many seconds: what one try began, the next finishes."""
    from graftwork.registry import AwayError

    deadline, pause = time.monotonic() + seconds, 1.0
    while True:
        try:
            return call()
        except AwayError as error:
            if time.monotonic() + pause > deadline:
                raise
            if pause == 1.0:
                journal.notes([f"{error}; it is tried again for {seconds:.0f} s"])
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


def close_run(state: str, message: str, data: str, backbone: str) -> None:
    """On a cluster, last and whatever happened: end the pipeline run's parent run in MLflow, with what steps could not tell it.

    ``state`` is KFP's. Where MLflow is away, or KFP's own plugin keeps the runs, nothing is to be done here; a run does not fail by its tracking.
    """
    uri, run = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get(tracking.PIPELINE_RUN, "")
    if not uri or not run or os.environ.get("MLFLOW_RUN_ID"):
        return
    status = CLOSED.get(state.upper(), "FAILED")
    folder = _kept_journals(run)
    waiting = sorted(path.parent for path in folder.glob("*/*.jsonl")) if folder else []
    # An empty folder last: the parent is ended where no journal waits as well.
    with tempfile.TemporaryDirectory(prefix="graftwork-") as nothing:
        missing = tracking.close_run(uri, run, status, f"{Path(data).name} {backbone}", [*waiting, Path(nothing)])
    if missing:
        kept = f"; journals that wait for it are in {folder}" if waiting else ""
        print(f"graftwork: MLflow at {tracking.shown_uri(uri)} was not told of the end: {one_line(missing)}{kept}")
    elif folder:
        shutil.rmtree(folder, ignore_errors=True)
    if message:
        print(f"graftwork: the run ended as {state}: {one_line(message, 500)}")


def read_validation(path: str) -> dict[str, float]:
    """Return the counts that ``validate_data`` wrote: {"critical": 0, "warnings": 2, ...}."""
    counts = json.loads(Path(path).read_text(encoding="utf-8"))
    return {name.removeprefix("validation_"): value for name, value in counts.items()}


def final_report(data: Any, evaluation: Path, models: dict[str, Path], outcome: dict[str, Any]) -> str:
    """Return the evaluation's page once more, with the decision first."""
    from graftwork.model import read_info
    from graftwork.report import render_evaluation

    result = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    return render_evaluation(result, data.info, read_info(models[result["chosen"]]), evaluation, outcome)


# ---- what all steps share ------------------------------------------------------------------------------------------------------


_interrupted = threading.Event()
REGISTRY_WAIT = 120.0  # seconds for which registration is tried where MLflow is away: hours of training are behind it
LAST_WAIT = 60.0  # seconds that a cluster's step waits, when it is done, for an MLflow that is away
# KFP's final states, "SUCCEEDED" in local runs and "COMPLETE" on a cluster, as MLflow's.
CLOSED = {
    "SUCCEEDED": "FINISHED",
    "COMPLETE": "FINISHED",
    "SKIPPED": "FINISHED",
    "CANCELED": "KILLED",
    "CANCELLED": "KILLED",
}


@contextmanager
def step(name: str) -> Iterator[Journal]:
    """Run one step: its journal, its follower where no other process follows, and what becomes of each way to end."""
    folder = os.environ.get(tracking.JOURNALS)
    kept = _kept_journals(os.environ.get(tracking.PIPELINE_RUN, ""))
    own = kept / name if kept else Path(tempfile.mkdtemp(prefix="graftwork-"))  # each follows its own journal alone
    journal = Journal(Path(folder) if folder else own, name)
    follower = None if folder else _own_follower(journal)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    journal.write("start", pid=os.getpid(), created=_process_start())
    status = "FAILED"
    try:
        with journal.system_metrics():
            yield journal
        status = "FINISHED"
    except BaseException as error:
        # A library, or we, may have made another error of the interruption: an import that was cut off, a pipe whose other end was stopped as well.
        if isinstance(error, KeyboardInterrupt) or _interrupted.is_set():
            status = "KILLED"
            _stopped(journal)
        if isinstance(error, Exception):
            _failed(journal, name, error)
        raise
    finally:
        journal.write("end", status=status)
        if follower:
            follower.close(LAST_WAIT)
            if not follower.unsent and not follower.error:
                journal.forget()


def _kept_journals(run: str) -> Path | None:
    """Return the folder where the steps of a cluster's pipeline run keep their journals; None where there is no place that outlives a pod."""
    place = os.environ.get(tracking.KEPT_JOURNALS)
    return Path(place) / run if place and run else None


def _stopped(journal: Journal) -> NoReturn:
    journal.write("error", message="interrupted")
    sys.exit(130)


def _failed(journal: Journal, name: str, error: Exception) -> NoReturn:
    if isinstance(error, UserError):
        _fail(journal, str(error))
    if isinstance(error, MemoryError):
        _fail(journal, f"{name}: out of memory; use a smaller batch_size or image_size")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = one_line(error.filename or "the output folder")
        _fail(journal, f"disk full while writing {where}; free some space and run again")
    _crash(journal, name, error)  # a mistake of ours: the trace goes to the log, one line to the user


def _fail(journal: Journal, message: str) -> NoReturn:
    journal.write("error", message=message)
    print(f"graftwork: error: {message}", flush=True)
    sys.exit(1)


def _crash(journal: Journal, name: str, error: Exception) -> NoReturn:
    if "No space left on device" in str(error):  # libraries wrap the operating system's error in their own
        _fail(journal, f"disk full in {name}; free some space and run again")
    traceback.print_exc(file=sys.stdout)
    _fail(
        journal,
        f"{name}: {type(error).__name__}: {one_line(error)} (a defect of graftwork or a setting it should have refused; the trace is in the log)",
    )


def _interrupt(signum: int, frame: object) -> NoReturn:
    # Once is enough: another in the midst of ending would turn the end into a crash.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _interrupted.set()
    raise KeyboardInterrupt


def _process_start() -> float:
    import psutil

    return float(psutil.Process().create_time())


def _own_follower(journal: Journal) -> "tracking.Follower | None":
    """On a cluster: follow this step's journal, under the run that KFP's plugin made, or under a parent that the steps share."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    run = os.environ.get(tracking.PIPELINE_RUN, "")
    resume = os.environ.pop("MLFLOW_RUN_ID", "")
    follower = tracking.Follower(
        journal.folder,
        os.environ["MLFLOW_TRACKING_URI"],
        Path("runs"),
        name=run or "graftwork",
        tags={"graftwork.run": run} | tracking.source_tags(),
        resume=resume,
        with_parent=bool(run) and not resume,
    )
    follower.start()
    return follower


def _open(dataset: str, digest: str, journal: Journal) -> Any:
    from graftwork.dataset import open_dataset

    data = open_dataset(dataset, digest)
    journal.tags({"graftwork.dataset_digest": data.digest})
    journal.dataset(
        data.info["name"],
        data.digest,
        data.info["source"],
        "evaluation" if journal.step in ("evaluate_model", "register_model") else "training",
    )
    return data


def _reference(settings: s.ValidateSettings, data: Any, journal: Journal) -> "dict[str, Any] | None":
    """Return the profile that drift is judged against. A registry that does not answer costs that judgement, not the run."""
    from graftwork import drift

    if settings.reference in ("", "none"):
        return None
    if settings.reference != "champion":
        return drift.read_profile(settings.reference)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    try:
        return drift.champion_profile(settings.register_as or data.info["name"], tracking.tracking_uri())
    except UserError as error:
        journal.notes([f"drift was not judged: {error}"])
        return None


def _keep(journal: Journal, path: Path, name: str) -> Path:
    """Have ``path`` stored as ``name``: KFP's artifacts have no suffix, and the MLflow page shows files by theirs."""
    copy = journal.folder / journal.step / name
    write_text(copy, path.read_text(encoding="utf-8"))
    journal.artifact(copy)
    return copy


def _log_model(journal: Journal, info: dict[str, Any], model: Path, metrics: Path) -> dict[str, float]:
    found = {**info["selection"]["val"], "parameters": float(info["parameters"])}
    # After the last epoch: MLflow's table shows a metric's last value, which has to be that of the weights that are kept.
    epochs = [int(entry["epoch"]) for entry in info["history"] if "epoch" in entry]
    journal.metrics(found, max(epochs, default=-1) + 1)
    journal.tags(
        {
            "graftwork.backbone": info["backbone"],
            "graftwork.candidate": info["candidate"],
            "graftwork.model_sha256": info["sha256"],
        }
    )
    journal.artifact(model / "model.json")
    write_json(metrics, found)
    return found
