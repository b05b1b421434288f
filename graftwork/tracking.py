"""Tracking: a step writes what happens to a local journal, and a follower carries the journal to MLflow.

Writing a line to a file cannot fail because a server is slow or away, and a step need not import MLflow at all. On a laptop one
follower, in the process that runs the pipeline, serves every step; on a cluster each step follows its own journal.

A server that dies may have done what it never answered, so everything is sent until it is confirmed, and nothing sent twice is there
twice: runs are looked up by their tags; metrics carry the time of their event, by which MLflow's databases know them again (its
file store, which MLflow gave up, does not); params, tags, dataset inputs, artifacts and ends are the same if they come again.

A journal is ``STEP.jsonl``, an event a line: start, working, params, metrics, metrics_of, tags, artifact, dataset, progress, error, end.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from graftwork import views

CHECKPOINTS = (
    "GRAFTWORK_CHECKPOINTS"  # environment variable: where checkpoints lie; on a cluster, a volume that outlives the pod
)
JOURNALS = "GRAFTWORK_JOURNALS"  # environment variable: the folder for the journals of a local run
PIPELINE_RUN = (
    "GRAFTWORK_PIPELINE_RUN"  # environment variable: the id of the pipeline run that a cluster's step belongs to
)
# Environment variable: where a cluster's steps keep their journals, a folder a pipeline run, until MLflow has them; on a volume, MLflow may be away.
KEPT_JOURNALS = "GRAFTWORK_KEPT_JOURNALS"
EXPERIMENT = "graftwork"
METRICS_IN_A_BATCH = 500  # MLflow takes 1000 values in a request, and a megabyte
PARAMS_IN_A_BATCH = 90  # of 100, and as many tags
PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds between rounds, and up to which it grows while a server is away
FOLLOWER = "graftwork.follower"  # tag: which follower made a run
Event = dict[str, Any]


class Journal:
    """The journal of one step, open for appending."""

    def __init__(self, folder: Path, step: str) -> None:
        self.step = step
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{step}.jsonl"
        torn = _is_torn(path)
        self._file = path.open("a", encoding="utf-8")
        if torn:  # a process was killed while it wrote: its half line must not swallow the next
            with contextlib.suppress(OSError):
                self._file.write("\n")
                self._file.flush()
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

    def metrics_of(self, sha256: str, values: dict[str, float]) -> None:
        """Add metrics to the run, under the same parent, of the step that trained the model with these weights."""
        self.write("metrics_of", sha256=sha256, values={k: float(v) for k, v in values.items()})

    def parent(self, metrics: dict[str, float], tags: dict[str, str], artifacts: list[Path]) -> None:
        """Put on the parent run what pipeline runs are compared by, and its pages."""
        self.write("parent", metrics=metrics, tags=tags, artifacts=[str(path.resolve()) for path in artifacts])

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

    @contextlib.contextmanager
    def system_metrics(self, interval: float = 10.0) -> Iterator[None]:
        """Journal what the machine is doing, every ``interval`` seconds and at the end, under the names of MLflow's own system metrics."""
        stop = threading.Event()
        thread = threading.Thread(
            target=self._sample, args=(interval, stop), daemon=True, name="graftwork-system-metrics"
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(2)

    def _sample(self, interval: float, stop: threading.Event) -> None:
        with contextlib.suppress(Exception):  # a machine that does not tell costs the figures, not the run
            import psutil

            psutil.cpu_percent()  # the first call tells nothing: the others tell of the time since the last
            with (self.folder / f"{self.step}.jsonl").open("rb") as file:  # a step that was killed goes on counting
                index = sum(b'"system/cpu_utilization_percentage"' in line for line in file)
            stopped = False
            while not stopped:
                stopped = stop.wait(interval)
                self.metrics({f"system/{name}": round(value, 1) for name, value in _system_usage().items()}, index)
                index += 1

    def forget(self) -> None:
        """Remove the journal, which is in MLflow."""
        for suffix in ("jsonl", "run"):
            with contextlib.suppress(OSError):
                (self.folder / f"{self.step}.{suffix}").unlink()

    def run_id(self, timeout: float = 60.0) -> str:
        """Wait for the MLflow run that the follower made for this step, and return its id; "" if there is none in time."""
        path = self.folder / f"{self.step}.run"
        deadline = time.monotonic() + timeout
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return path.read_text(encoding="utf-8") if path.exists() else ""


def _is_torn(path: Path) -> bool:
    """Whether the file's last line has no end."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    return False


def _system_usage() -> dict[str, float]:
    """Return the use of processor, memory and, where this process computes on them, GPUs: {MLflow's name of it: figure}."""
    import psutil

    memory = psutil.virtual_memory()
    usage = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.used / memory.total * 100,
        "process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
    }
    torch = sys.modules.get("torch")  # importing it takes seconds, and asking an idle GPU takes memory of it
    with contextlib.suppress(Exception):
        if torch and torch.cuda.is_initialized():
            for n in range(torch.cuda.device_count()):
                if torch.cuda.memory_reserved(n):
                    free, total = torch.cuda.mem_get_info(n)
                    usage[f"gpu_{n}_memory_usage_megabytes"] = (total - free) / 1e6
                    usage[f"gpu_{n}_memory_usage_percentage"] = (total - free) / total * 100
                    with contextlib.suppress(Exception):  # wants the package nvidia-ml-py
                        usage[f"gpu_{n}_utilization_percentage"] = float(torch.cuda.utilization(n))
    return usage


class JournalReader:
    """Reads the journals of a folder from where it stopped the last time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets: dict[str, int] = defaultdict(int)

    def poll(self) -> list[tuple[str, Event]]:
        """Return the new events, as (step, event), in the order of their time."""
        found: list[tuple[str, Event]] = []
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


def shown_uri(uri: str) -> str:
    """Return an address, or a text with addresses, without the passwords that they may hold: for messages, logs and files."""
    return re.sub(r"(?<=://)[^/\s]*@", "***@", uri)


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
        self.refused: list[tuple[str, Event]] = []
        self.error = self.refusal = ""
        self._id = uuid.uuid4().hex
        self._waiting: dict[str, list[Event]] = {}
        self._runs: dict[str, str] = {}
        self._ended: set[str] = set()
        self._early: list[tuple[str, dict[str, float], int]] = []  # metrics of models whose runs are not there yet
        # What a step's run has: {(metric, step): the last value}.
        self._known: dict[str, dict[tuple[str, int], str]] = defaultdict(dict)
        self._unread: dict[str, set[str]] = defaultdict(set)  # names of metrics that an earlier process left in it
        self._disturbed = False
        self._reader = JournalReader(journals)
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._client: Any = None
        self._connecting, self._carrying = threading.Lock(), threading.Lock()
        self._began = int(time.time() * 1000)

    @property
    def unsent(self) -> list[tuple[str, Event]]:
        """What is not in MLflow, as (step, event): refused by it, or still waiting."""
        return self.refused + [(step, event) for step, events in list(self._waiting.items()) for event in events]

    def run(self) -> None:
        pause = PAUSE
        while not self._closing.wait(pause):
            self._round()
            pause = min(2 * pause, LONGEST_PAUSE) if self.error else PAUSE

    def close(self, timeout: float = 60.0) -> None:
        """Carry what is left and stop, within ``timeout`` seconds even where a request hangs."""
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        last = threading.Thread(target=self._carry_the_rest, daemon=True, name="graftwork-tracking-rest")
        last.start()
        last.join(timeout)
        if last.is_alive():
            self.error = self.error or f"{shown_uri(self.uri)} has not answered within {timeout:.0f} s"

    def client(self) -> Any:
        """Return a client, with the parent run made, waiting for the thread where it is still at it."""
        while self.is_alive() and not self._connected() and not self.error and not self._closing.is_set():
            time.sleep(0.05)
        if self.is_alive() and not self._connected() and self._closing.is_set():
            raise ConnectionError(self.error)  # the thread hangs in the request that this one would have to make
        self._connect()
        return self._client

    def finish(self, status: str) -> None:
        """End the runs of steps that could not end theirs, and the parent: FINISHED, FAILED or KILLED."""
        for step, run_id in self._runs.items():
            if step not in self._ended:
                said = [event["status"] for event in self._waiting.get(step, []) if event["event"] == "end"]
                self._client.set_terminated(run_id, (said or ["FAILED" if status == "FINISHED" else status])[-1])
        if self.parent_id:
            self._client.set_terminated(self.parent_id, status)

    # ---- rounds: all that waits, step by step -----------------------------------------------------------------------------------

    def _carry_the_rest(self) -> None:
        if self.is_alive():
            self.join()  # its last round ends at the deadline, or with the request that it is in
        self._round()
        while (any(self._waiting.values()) or (self._early and self.error)) and time.monotonic() < self._deadline:
            time.sleep(min(PAUSE, LONGEST_PAUSE))
            self._round()
        if self._disturbed:  # a server may have made, late, the run of a request that was given up
            runs = [] if self.resume else [(self._step_where(step), run_id) for step, run_id in self._runs.items()]
            runs += [(self._parent_where(), self.parent_id)] if self.parent_id else []
            with contextlib.suppress(Exception):
                for where, run_id in runs:
                    self._in_time()
                    self._one_run(where, run_id)

    def _round(self) -> None:
        with self._carrying:
            try:
                for step, event in self._reader.poll():
                    if event["event"] != "progress":  # which is for the display alone
                        self._waiting.setdefault(step, []).append(event)
                self._connect()
                failures = [self._carry(step) for step, events in list(self._waiting.items()) if events]
                # A step whose results were reused has a run at the end alone, after the evaluation that tells its figures.
                self._early = [one for one in self._early if not self._log_elsewhere(*one)]
                self.error = "".join(failures[:1]) or self.refusal
            except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and operating system errors
                self.error = why_not(error)
                self._disturbed = True

    def _in_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"{shown_uri(self.uri)} is too slow: not everything was carried in time")

    def _carry(self, step: str) -> str:
        """Carry what waits of a step; raise where MLflow is away. Return why artifacts still wait, "" if none does.

        A store of artifacts may fail where the server itself is well, and must not hold back the rest.
        """
        events, sent, failure = self._waiting[step], set[int](), ""
        try:
            run_id = self._runs.get(step) or self._start(step, events)
            for batch in _requests(events):
                self._in_time()
                try:
                    self._send(step, run_id, batch, sent)
                except Exception as error:
                    if batch[0]["event"] not in ("artifact", "parent"):
                        raise
                    failure = failure or str(error)
        finally:
            self._waiting[step] = [event for event in events if id(event) not in sent]
        return failure

    def _send(self, step: str, run_id: str, events: list[Event], sent: set[int]) -> None:
        """Send what MLflow takes; what it refuses is kept apart, since another try would change nothing. Both count as ``sent``."""
        try:
            self._log(step, run_id, events)
        except Exception as error:
            if not _is_refusal(error):
                raise
            if len(events) > 1:  # one of them is refused, with all of them: find it by halves
                for half in (events[: len(events) // 2], events[len(events) // 2 :]):
                    self._send(step, run_id, half, sent)
                return
            self.refusal = str(error)
            self.refused.append((step, events[0]))
        sent.update(id(event) for event in events)

    def _log(self, step: str, run_id: str, events: list[Event]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        metrics, inputs = [], []
        told: dict[tuple[str, int], str] = {}
        self._read_history(step, run_id, {n for e in events if e["event"] == "metrics" for n in e["values"]})
        for event in events:
            kind, when = event["event"], int(event["time"] * 1000)
            if kind == "start" and step in self._ended:  # it was killed or failed, and is tried again
                self._client.update_run(run_id, "RUNNING")
                self._ended.discard(step)
            elif kind == "params":
                params |= {str(k): str(v)[:6000] for k, v in event["values"].items()}
            elif kind == "metrics":
                for name, value in event["values"].items():
                    key, text = (name, event["step"]), repr(float(value))
                    if told.get(key, self._known[step].get(key)) != text:  # what is told again unchanged is no news
                        metrics.append(Metric(name, value, when, event["step"]))
                        told[key] = text
            elif kind == "metrics_of":
                if not self._log_elsewhere(event["sha256"], event["values"], when):
                    self._early.append((event["sha256"], event["values"], when))
            elif kind == "parent":
                self._log_parent(event, when)
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
                self._client.set_terminated(run_id, event["status"], when)
                self._ended.add(step)
        batches: Iterator[tuple[list[Any], ...]] = zip_longest(
            _chunks(metrics, METRICS_IN_A_BATCH),
            _chunks([Param(*item) for item in params.items()], PARAMS_IN_A_BATCH),
            _chunks([RunTag(name, str(value)) for name, value in tags.items()], PARAMS_IN_A_BATCH),
            fillvalue=[],
        )
        for batch in batches:
            self._client.log_batch(run_id, *batch)
        self._known[step].update(told)
        if inputs:
            self._client.log_inputs(run_id, datasets=inputs)

    def _log_parent(self, event: Event, when: int) -> None:
        if not self.parent_id:
            return
        from mlflow.entities import Metric, RunTag

        self._client.log_batch(
            self.parent_id,
            metrics=[Metric(name, float(value), when, 0) for name, value in event["metrics"].items()],
            tags=[RunTag(name, value) for name, value in event["tags"].items()],
        )
        for path in event["artifacts"]:
            with contextlib.suppress(FileNotFoundError):
                self._client.log_artifact(self.parent_id, path)

    def _log_elsewhere(self, sha256: str, values: dict[str, float], when: int) -> bool:
        """Log metrics in the runs of this parent that made the model ``sha256``; return whether there is one.

        Where there is none to the end, the step's own run has to do.
        """
        if not self.parent_id:
            return True
        from mlflow.entities import Metric

        where = f"tags.`mlflow.parentRunId` = '{self.parent_id}' and tags.`graftwork.model_sha256` = '{sha256}'"
        found = self._client.search_runs([self.experiment_id], where)
        for run in found:
            self._client.log_batch(run.info.run_id, [Metric(name, value, when, 0) for name, value in values.items()])
        return bool(found)

    def _read_history(self, step: str, run_id: str, names: set[str]) -> None:
        """Learn what an earlier process logged of these metrics: a step that goes on from a checkpoint tells again what it told."""
        for name in names & self._unread[step]:
            history = sorted(self._client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp)
            self._known[step].update({(name, metric.step): repr(metric.value) for metric in history})
            self._unread[step].discard(name)

    # ---- runs: each of them one ------------------------------------------------------------------------------------------------

    def _connected(self) -> bool:
        return bool(self._client and self.experiment_id and (self.parent_id or not self.with_parent))

    def _connect(self) -> None:
        with self._connecting:
            if self._client is None:
                quiet_mlflow()
                from mlflow import MlflowClient

                self._client = MlflowClient(self.uri, self.uri)
            if not self.experiment_id:
                self.experiment_id = experiment_id(self._client, self.uri, self.output)
            if self.with_parent and not self.parent_id:
                tags = {**self.parent_tags, **self._parent_where()}
                run = self._find_or_create(self.parent_name, tags, self._parent_where(), self._began)
                self.parent_id = str(run.info.run_id)

    def _start(self, step: str, events: list[Event]) -> str:
        if self.resume:
            run = self._client.get_run(self.resume)
        else:
            tags = {**self.parent_tags, **self._step_where(step)}
            # Steps of several pipelines lie side by side in MLflow's comparisons: the name tells which network.
            name = f"{step} {tags.get('graftwork.backbone', '')}".strip()
            run = self._find_or_create(
                name, tags, self._step_where(step), int(min(event["time"] for event in events) * 1000)
            )
        run_id = str(run.info.run_id)
        if run.data.tags.get(FOLLOWER) != self._id:  # of an earlier try of this step, in another process
            self._unread[step] = set(run.data.metrics)
            if run.info.status != "RUNNING":
                self._client.update_run(run_id, "RUNNING")
        self._runs[step] = run_id
        path = self.journals / f"{step}.run"
        path.with_suffix(".partial").write_text(run_id, encoding="utf-8")
        path.with_suffix(".partial").replace(path)
        return run_id

    def _parent_where(self) -> dict[str, str]:
        return {"graftwork.run": self.parent_tags["graftwork.run"], "graftwork.parent": "true"}

    def _step_where(self, step: str) -> dict[str, str]:
        parent = {"mlflow.parentRunId": self.parent_id} if self.parent_id else {FOLLOWER: self._id}
        return {**parent, "graftwork.step": step}

    def _find_or_create(self, name: str, tags: dict[str, str], where: dict[str, str], started: int) -> Any:
        """Return the run with the tags ``where``; searching first, a lost answer makes no second one."""
        run = self._one_run(where)
        if not run:
            asked = time.monotonic()
            made = self._client.create_run(self.experiment_id, started, {**tags, FOLLOWER: self._id}, name)
            run = self._one_run(where) or made  # MLflow's client asks again by itself, and may have made two
            self._disturbed |= time.monotonic() - asked > 1  # or may make the other later
        return run

    def _one_run(self, where: dict[str, str], kept: str = "") -> Any:
        """Return the run with the tags ``where``, ``kept`` if it is one of them, and delete what this follower made beside it."""
        found = self._client.search_runs(
            [self.experiment_id],
            " and ".join(f"tags.`{name}` = '{value}'" for name, value in where.items()),
            order_by=["attributes.start_time"],
        )
        chosen = next((run for run in found if run.info.run_id == kept), found[0] if found else None)
        for run in found:
            if run is not chosen and run.data.tags.get(FOLLOWER) == self._id:
                with contextlib.suppress(Exception):  # a server may allow no deletion: an empty run stays
                    self._client.delete_run(run.info.run_id)
        return chosen


def close_run(uri: str, run: str, status: str, name: str, journals: list[Path], timeout: float = 120.0) -> str:
    """End the parent run of the pipeline run ``run`` of a cluster, and the runs of steps that could not end theirs; first carry ``journals``.

    Returns "" or, where MLflow did not take it within ``timeout`` seconds, why.
    """
    deadline = time.monotonic() + timeout
    for folder in journals:
        follower = Follower(folder, uri, Path("runs"), name, {"graftwork.run": run} | source_tags())
        follower.start()
        follower.close(max(1.0, deadline - time.monotonic()))
        if follower.unsent or not follower.parent_id:
            return follower.error or "it did not take everything"
    try:
        client = follower.client()
        where = f"tags.`mlflow.parentRunId` = '{follower.parent_id}' and attributes.status = 'RUNNING'"
        for nested in client.search_runs([follower.experiment_id], where):
            client.set_terminated(nested.info.run_id, "FAILED" if status == "FINISHED" else status)
        client.set_tag(follower.parent_id, "mlflow.runName", name)
        client.set_terminated(follower.parent_id, status)
    except Exception as error:  # MLflow raises its own, requests' and operating system errors
        return shown_uri(str(error))
    return ""


def _requests(events: list[Event]) -> Iterator[list[Event]]:
    """Group events by the request that carries them: what is recorded, the datasets, each artifact, and the end if it is the last word."""
    turns = [event for event in events if event["event"] in ("start", "end")]
    end = turns[-1] if turns and turns[-1]["event"] == "end" else None
    batch: list[Event] = []
    size = 0
    for event in events:
        if event["event"] in ("dataset", "artifact", "parent") or event is end:
            continue
        values = len(event.get("values", ()))
        if batch and size + values > METRICS_IN_A_BATCH:
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += values
    datasets = [event for event in events if event["event"] == "dataset"]
    artifacts = [[event] for event in events if event["event"] in ("artifact", "parent")]
    yield from filter(None, [batch, datasets, *artifacts, [end] if end else []])


def dataset_input(name: str, digest: str, source: str, context: str) -> Any:
    """Return MLflow's record of a dataset as a run's input; ``context`` is "training" or "evaluation"."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entity = Dataset(name, digest, "local", json.dumps({"uri": source}))
    return DatasetInput(entity, [InputTag("mlflow.data.context", context)])


def experiment_id(client: Any, uri: str, output: Path) -> str:
    """Return the experiment's id; it is made where there is none, with its artifacts beside a SQLite file and a view of the candidates."""
    name = experiment_name()
    # The kind says what the experiment is for, so that MLflow's pages need not guess.
    tags = {"mlflow.experimentKind": "custom_model_development", views.TAG: views.candidates_view()}
    found = client.get_experiment_by_name(name)
    if not found:
        where = (output / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite:") else None
        try:
            return str(client.create_experiment(name, where, tags))
        except Exception:  # another run made it a moment ago
            found = client.get_experiment_by_name(name)
            if not found:
                raise
    if views.TAG not in found.tags:  # the user's own experiment, or one of an earlier release
        with contextlib.suppress(Exception):  # she may log runs there, and not change it: the view is a convenience
            client.set_experiment_tag(found.experiment_id, views.TAG, tags[views.TAG])
    return str(found.experiment_id)


def experiment_name() -> str:
    """Return the experiment that runs are filed under: ``MLFLOW_EXPERIMENT_NAME``, or "graftwork"."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow is there and says no: a status 4xx, but for those that say nothing of what was sent.

    These are "not authenticated", which another password mends, "request timeout" and "too many requests".
    """
    from mlflow.exceptions import MlflowException

    return (
        isinstance(error, MlflowException)
        and 400 <= error.get_http_status_code() < 500
        and error.get_http_status_code() not in (401, 408, 429)
    )


def why_not(error: Exception) -> str:
    """Return in a few words why MLflow did not do what it was asked, without passwords in addresses."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException) and error.get_http_status_code() == 401:
        return "refuses the user or the password: check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return shown_uri(str(error))


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[n : n + size] for n in range(0, len(items), size))
