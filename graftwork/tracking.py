"""Tracking: a step writes what happens to a local journal, and a follower carries the journal to MLflow.

Writing a line to a file cannot fail because a server is slow or away, and a step need not import MLflow at all. On a laptop one
follower, in the process that runs the pipeline, serves every step; on a cluster each step follows its own journal.

A journal is ``STEP.jsonl``, an event a line: start, working, params, metrics, tags, artifact, dataset, progress, error, end.
"""

import contextlib
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

JOURNALS = "GRAFTWORK_JOURNALS"  # environment variable: the folder for the journals of a local run
PIPELINE_RUN = (
    "GRAFTWORK_PIPELINE_RUN"  # environment variable: the id of the pipeline run that a cluster's step belongs to
)
EXPERIMENT = "graftwork"
METRICS_IN_A_BATCH = 500


class Journal:
    """The journal of one step, open for appending."""

    def __init__(self, folder: Path, step: str) -> None:
        self.step = step
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{step}.jsonl").open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._last_progress = 0.0

    def write(self, event: str, **content: Any) -> None:
        """Append one event. A full disk loses the event, not the run."""
        line = json.dumps({"event": event, "time": time.time(), **content}, default=str)
        with self._lock, contextlib.suppress(OSError):
            self._file.write(line + "\n")
            self._file.flush()

    def params(self, values: dict[str, Any]) -> None:
        self.write("params", values=values)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        self.write("metrics", values={k: float(v) for k, v in values.items()}, step=step)

    def tags(self, values: dict[str, str]) -> None:
        self.write("tags", values=values)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Have the file at ``path`` stored under ``folder`` of the run's artifacts. It must stay where it is."""
        self.write("artifact", path=str(path.resolve()), folder=folder)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        self.write("dataset", name=name, digest=digest, source=source, context=context)

    def notes(self, messages: list[str]) -> None:
        """Have messages shown to the user."""
        for message in messages:
            self.write("note", message=message)

    def progress(self, done: int, total: int) -> None:
        """Tell how far the step is; more than five times a second is not written."""
        now = time.monotonic()
        if now - self._last_progress >= 0.2 or done >= total:
            self._last_progress = now
            self.write("progress", done=done, total=total)

    def run_id(self, timeout: float = 60.0) -> str:
        """Wait for the MLflow run that the follower made for this step, and return its id; "" if there is none in time."""
        path = self.folder / f"{self.step}.run"
        deadline = time.monotonic() + timeout
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return path.read_text(encoding="utf-8") if path.exists() else ""


class JournalReader:
    """Reads the journals of a folder from where it stopped the last time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets: dict[str, int] = defaultdict(int)

    def poll(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the new events, as (step, event), in the order of their time."""
        found: list[tuple[str, dict[str, Any]]] = []
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._offsets[path.stem])
                content = file.read()
            complete = content.rfind(b"\n") + 1  # a line that is still being written waits for the next time
            self._offsets[path.stem] += complete
            for line in content[:complete].split(b"\n"):
                with contextlib.suppress(ValueError):  # empty, or left unfinished by a process that died
                    found.append((path.stem, json.loads(line)))
        return sorted(found, key=lambda item: item[1]["time"])


def tracking_uri(output: str | Path = "runs") -> str:
    """Return MLflow's address: ``MLFLOW_TRACKING_URI``, else a SQLite file in the output folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{quote(str(Path(output).resolve() / 'mlflow.db'))}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file that a ``sqlite:`` address names; None for a server's address."""
    return Path(unquote(uri.removeprefix("sqlite:///"))) if uri.startswith("sqlite:") else None


def source_tags() -> dict[str, str]:
    """Return the tags that say which code ran: MLflow's own names for the commit and the image, as far as they are known."""
    import subprocess

    commit = os.environ.get("GRAFTWORK_COMMIT", "")
    if not commit:
        here = Path(__file__).resolve().parent
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            top, commit = subprocess.run(
                ["git", "rev-parse", "--show-toplevel", "HEAD"],
                cwd=here,
                capture_output=True,
                text=True,
                timeout=5,
                check=True,
            ).stdout.split("\n")[:2]
            if (
                Path(top) != here.parent
            ):  # installed inside some other repository, whose commit says nothing of this code
                commit = ""
    tags = {"mlflow.source.git.commit": commit, "mlflow.docker.image.uri": os.environ.get("GRAFTWORK_IMAGE", "")}
    return {k: v for k, v in tags.items() if v}


def quiet_mlflow() -> None:
    """Set MLflow's environment: no telemetry, no model that unpickles, few retries, since the journal keeps what a server missed."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    import logging

    for logger in ("alembic", "mlflow", "mlflow.store.db.utils", "urllib3"):
        logging.getLogger(logger).setLevel(logging.ERROR)


class Follower(threading.Thread):
    """Carries journals to MLflow in the background: a parent run, and a nested run a step.

    ``resume`` is the run of a step that already exists (KFP's MLflow plugin makes it). Nothing raised by MLflow leaves the
    thread: what could not be carried waits for the next round, and ``unsent`` tells what never could.
    """

    def __init__(
        self,
        journals: Path,
        uri: str,
        output: Path,
        name: str,
        tags: dict[str, str],
        resume: str = "",
        with_parent: bool = True,
    ) -> None:
        super().__init__(daemon=True, name="graftwork-tracking")
        self.journals, self.uri, self.output = journals, uri, output
        self.parent_name, self.parent_tags, self.resume, self.with_parent = name, tags, resume, with_parent
        self.experiment_id = self.parent_id = ""
        self.unsent: list[tuple[str, dict[str, Any]]] = []
        self.refused: list[tuple[str, dict[str, Any]]] = []
        self.error = self.refusal = ""
        self._runs: dict[str, str] = {}
        self._ended: set[str] = set()
        self._reader = JournalReader(journals)
        self._closing = threading.Event()
        self._client: Any = None
        self._began = int(time.time() * 1000)

    def run(self) -> None:
        pause = 0.5
        while not self._closing.wait(pause):
            self._round()
            pause = min(2 * pause, 10.0) if self.error else 0.5

    def close(self, timeout: float = 60.0) -> None:
        """Carry what is left and stop."""
        deadline = time.monotonic() + timeout
        self._closing.set()
        self.join(timeout)
        self._round()
        while self.unsent and time.monotonic() < deadline:
            time.sleep(1)
            self._round()
        self.unsent = self.refused + self.unsent

    def client(self) -> Any:
        """Return a client, with the parent run made, waiting for the thread where it is still at it."""
        while self.is_alive() and not (self.parent_id or not self.with_parent) and not self.error:
            time.sleep(0.05)
        self._connect()
        return self._client

    def _round(self) -> None:
        # Progress is for the display alone.
        waiting = self.unsent + [item for item in self._reader.poll() if item[1]["event"] != "progress"]
        try:
            self._connect()
            for step, events in _by_step(waiting).items():
                try:
                    self._carry(step, events)
                except Exception as error:
                    if not _is_refusal(error):
                        raise
                    self._carry_one_by_one(step, events)
                waiting = [item for item in waiting if item[0] != step]
            self.error = self.refusal
        except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and operating system errors
            self.error = str(error)
        self.unsent = waiting

    def _carry_one_by_one(self, step: str, events: list[dict[str, Any]]) -> None:
        """Carry all that MLflow takes; what it refuses is kept apart, since another try would change nothing."""
        for event in events:
            try:
                self._carry(step, [event])
            except Exception as error:
                if not _is_refusal(error):
                    raise
                self.refusal = str(error)
                self.refused.append((step, event))

    def _connect(self) -> None:
        if self._client is None:
            quiet_mlflow()
            from mlflow import MlflowClient

            self._client = MlflowClient(self.uri, self.uri)
        if not self.experiment_id:
            self.experiment_id = experiment_id(self._client, self.uri, self.output)
        if self.with_parent and not self.parent_id:
            self.parent_id = find_or_create(
                self._client, self.experiment_id, self.parent_name, self.parent_tags, self._began
            )

    def _carry(self, step: str, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id = self._runs.get(step) or self._start(step, events)
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        metrics, inputs = [], []
        status, ended = "", 0
        for event in events:
            kind, when = event["event"], int(event["time"] * 1000)
            if kind == "params":
                params |= {str(k): str(v)[:6000] for k, v in event["values"].items()}
            elif kind == "metrics":
                metrics += [Metric(k, v, when, event["step"]) for k, v in event["values"].items()]
            elif kind == "tags":
                tags |= event["values"]
            elif kind == "error":
                tags |= {"graftwork.error": event["message"][:5000]}
            elif kind == "dataset":
                inputs.append(dataset_input(event["name"], event["digest"], event["source"], event["context"]))
            elif kind == "artifact":
                with contextlib.suppress(FileNotFoundError):
                    self._client.log_artifact(run_id, event["path"], event["folder"] or None)
            elif kind == "end":
                status, ended = event["status"], when
        for chunk in _chunks(metrics, METRICS_IN_A_BATCH):
            self._client.log_batch(run_id, metrics=chunk)
        for some in _chunks(list(params.items()), 90):
            self._client.log_batch(run_id, params=[Param(*p) for p in some])
        if tags:
            self._client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in tags.items()])
        if inputs:
            self._client.log_inputs(run_id, datasets=inputs)
        if status:
            self._client.set_terminated(run_id, status, ended)
            self._ended.add(step)

    def _start(self, step: str, events: list[dict[str, Any]]) -> str:
        if self.resume:
            run_id = self.resume
        else:
            tags = {**self.parent_tags, "graftwork.step": step}
            if self.parent_id:
                tags["mlflow.parentRunId"] = self.parent_id
            started = int(min(e["time"] for e in events) * 1000)
            run_id = self._client.create_run(self.experiment_id, started, tags, step).info.run_id
        self._runs[step] = run_id
        path = self.journals / f"{step}.run"
        path.with_suffix(".partial").write_text(run_id, encoding="utf-8")
        path.with_suffix(".partial").replace(path)
        return run_id

    def finish(self, status: str) -> None:
        """End the runs of steps that could not end theirs, and the parent: FINISHED, FAILED or KILLED."""
        for step, run_id in self._runs.items():
            if step not in self._ended:
                self._client.set_terminated(run_id, "FAILED" if status == "FINISHED" else status)
        if self.parent_id:
            self._client.set_terminated(self.parent_id, status)


def dataset_input(name: str, digest: str, source: str, context: str) -> Any:
    """Return MLflow's record of a dataset as a run's input; ``context`` is "training" or "evaluation"."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entity = Dataset(name, digest, "local", json.dumps({"uri": source}))
    return DatasetInput(entity, [InputTag("mlflow.data.context", context)])


def experiment_id(client: Any, uri: str, output: Path) -> str:
    """Return the experiment's id; it is made where there is none, with its artifacts beside a SQLite file."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    where = (output / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite:") else None
    try:
        # Says what the experiment is for, so that MLflow's pages need not guess.
        return str(client.create_experiment(name, where, {"mlflow.experimentKind": "custom_model_development"}))
    except Exception:  # another run made it a moment ago
        found = client.get_experiment_by_name(name)
        if not found:
            raise
        return str(found.experiment_id)


def find_or_create(client: Any, experiment: str, name: str, tags: dict[str, str], started: int) -> str:
    """Return the run with the tag ``graftwork.run``; searching first, a lost answer makes no second one."""
    key = tags["graftwork.run"]
    found = client.search_runs(
        [experiment], f"tags.`graftwork.run` = '{key}' and tags.`graftwork.parent` = 'true'", max_results=1
    )
    if found:
        return str(found[0].info.run_id)
    return str(client.create_run(experiment, started, {**tags, "graftwork.parent": "true"}, name).info.run_id)


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow is there and says no: a status 4xx, but for "too many requests"."""
    from mlflow.exceptions import MlflowException

    return (
        isinstance(error, MlflowException)
        and 400 <= error.get_http_status_code() < 500
        and error.get_http_status_code() != 429
    )


def _by_step(items: list[tuple[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for step, event in items:
        grouped.setdefault(step, []).append(event)
    return grouped


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[n : n + size] for n in range(0, len(items), size))
