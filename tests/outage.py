"""Outages of the tracking server during a run, and an audit of what is in it afterwards against the journals of the steps.

A round is one ``graftwork run`` in which PostgreSQL, the object store and MLflow are each killed once with SIGKILL, at random moments,
and started again. A run that could not register, since the registry was away, ends with one line and status 1; the same command is
given again, as a user or KFP's retry does, and reuses what was finished. The journals say what there must be: each value once.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from tracking_server import Server

TINY = "test_resnet.r160_in1k"
NAME = "digits"  # in the registry
MOST_TRIES = 4


class Kill(threading.Thread):
    """Kills a server after so many seconds, and starts it again after so many more."""

    def __init__(self, name: str, server: Any, after: float, away: float) -> None:
        super().__init__(daemon=True, name=f"kill-{name}")
        self.server, self.told = server, {"server": name, "after": round(after, 1), "away": round(away, 1)}
        self.after, self.away, self.error = after, away, ""

    def run(self) -> None:
        time.sleep(self.after)
        began = time.monotonic()
        self.server.kill()
        time.sleep(self.away)
        try:
            self.server.restart()
        except Exception as error:
            self.error = str(error)
        self.told["away"] = round(time.monotonic() - began, 1)


def command(weights: Path, epochs: int, number: int) -> list[str]:
    """Return the command of a round. Every fifth round has a seed of its own, and with it all steps to do; the others train anew."""
    return [
        *(sys.executable, "-m", "graftwork.pipelines.cli", "run", "--data", NAME, "--seed", str(number // 5)),
        *("--train-per-class", "60", "--test-per-class", "20", "--backbone", TINY, "--weights", str(weights)),
        *("--image-size", "32", "--strategy", "full", "--epochs", str(epochs), "--set", "batch_size=8"),
        *("--set", "patience=999", "--set", "plan_seconds=0", "--set", f"label_smoothing={number / 1000}"),
    ]


def run_once(
    server: Server, folder: Path, words: list[str], variables: dict[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], float]:
    """Give the command in ``folder``; return what came of it and the seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "PG", "GRAFTWORK_"))}
    cache = {"GRAFTWORK_CACHE": str(folder.parent)}
    began = time.monotonic()
    done = subprocess.run(
        words,
        cwd=folder,
        env=kept | cache | server.client_environment | (variables or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    return done, time.monotonic() - began


def play(server: Server, folder: Path, words: list[str], span: float, chance: random.Random) -> dict[str, Any]:
    """Play one round, of about ``span`` seconds; return what was killed when, and how often the command was given.

    The servers all run again at its end.
    """
    servers = [("PostgreSQL", server.postgres), ("SeaweedFS", server.s3), ("MLflow", server)]
    kills = [Kill(name, one, chance.uniform(0.1, 0.85) * span, chance.uniform(0.2, 6)) for name, one in servers]
    for kill in kills:
        kill.start()
    tries = []
    while not tries or (tries[-1]["status"] != 0 and len(tries) < MOST_TRIES):
        done, seconds = run_once(server, folder, words)
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        tries.append({"status": done.returncode, "seconds": round(seconds, 1)})
        if done.returncode:
            tries[-1] |= {"said": said[-1][:300] if said else "", "trace": "Traceback" in done.stdout + done.stderr}
            for kill in kills:
                kill.join()
            # As KFP backs off. SeaweedFS was seen to answer "no writable volumes" for half a minute after a SIGKILL.
            time.sleep(10 * len(tries))
    for kill in kills:
        kill.join()
    errors = [kill.error for kill in kills if kill.error]
    assert not errors, errors
    return {"kills": sorted((kill.told for kill in kills), key=lambda told: told["after"]), "tries": tries}


# ---- the audit -------------------------------------------------------------------------------------------------------------------


def audit(server: Server, folder: Path, but: Set[str] = frozenset()) -> dict[str, Any]:
    """Compare what the server has with the journals of all runs that were made in ``folder``.

    ``but``: runs whose values and files were looked at before; runs, versions and aliases are always looked at as a whole.

    Returns:
        {"counts": {what: number}, "wrong": [a line each]}; nothing wrong means nothing lost and nothing doubled.
    """
    from mlflow import MlflowClient

    from graftwork.tracking import quiet_mlflow

    quiet_mlflow()
    os.environ |= server.client_environment
    client = MlflowClient(server.uri, server.uri)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    experiment = client.get_experiment_by_name("graftwork")
    ids = [experiment.experiment_id]
    runs = _all(lambda token: client.search_runs(ids, max_results=500, page_token=token))
    by_run: dict[str, list[Any]] = defaultdict(list)
    for run in runs:
        by_run[run.data.tags.get("graftwork.run", "")].append(run)
    for journals in sorted((folder / "runs").glob("*/journals")):
        told = _Auditor(client, journals, by_run.pop(journals.parent.name, []))
        told.whole_run(journals.parent.name not in but)
        counts.update(told.counts)
        wrong += [f"{journals.parent.name}: {line}" for line in told.wrong]
    wrong += [f"a run of nobody: {run.info.run_id} {run.info.run_name}" for rest in by_run.values() for run in rest]
    paths = sorted((folder / "runs").glob("*/summary.json"))
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    deep = [path.parent.name not in but for path in paths]
    found = _registry(client, ids, summaries, deep)
    counts.update(found[0])
    return {"counts": dict(counts), "wrong": wrong + found[1]}


class _Auditor:
    """One run: a parent, and a nested run a step, each against its journal."""

    def __init__(self, client: Any, journals: Path, runs: list[Any]) -> None:
        self.client, self.journals, self.runs = client, journals, runs
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.failed = not (journals.parent / "summary.json").exists()
        self.events = {
            path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            for path in sorted(journals.glob("*.jsonl"))
        }

    def expect(self, what: str, holds: bool, line: str, doubled: bool = False) -> None:
        """Count what was looked at. What a try that failed left in its journal is told anew by the next, and is no loss of it."""
        if not holds and self.failed and not doubled:
            self.counts["left in the journals of failed tries"] += 1
            return
        self.counts[what] += 1
        if not holds:
            self.wrong.append(line)

    def whole_run(self, deep: bool) -> None:
        parents = [run for run in self.runs if "graftwork.parent" in run.data.tags]
        steps = Counter(run.data.tags["graftwork.step"] for run in self.runs if "graftwork.step" in run.data.tags)
        twice = [step for step, number in steps.items() if number > 1 or step not in self.events]
        self.expect("runs", len(parents) <= 1 and not twice, f"DOUBLED: {len(parents)} parents, {dict(steps)}", True)
        self.expect("runs", len(parents) == 1, "LOST: the parent run")
        self.expect("runs", set(steps) == set(self.events), f"LOST: runs of {sorted(set(self.events) - set(steps))}")
        if not parents:
            return
        for run in self.runs:
            step = run.data.tags.get("graftwork.step")
            if step in self.events:
                above = run.data.tags.get("mlflow.parentRunId")
                self.expect("runs", above == parents[0].info.run_id, f"{step}: hangs under {above}")
                if deep:
                    self.step(step, run)
        if deep:
            self.parent(parents[0])

    def step(self, step: str, run: Any) -> None:
        tags: dict[str, str] = {}
        metrics: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for event in self.events[step]:
            if event["event"] == "params":
                for key, value in event["values"].items():
                    got = run.data.params.get(key)
                    self.expect("params", got == str(value)[:6000], f"{step}: LOST param {key}: {got!r}, not {value!r}")
            elif event["event"] == "tags":
                tags |= event["values"]
            elif event["event"] == "metrics":
                for name, value in event["values"].items():
                    if metrics[name][event["step"]][-1:] != [value]:
                        metrics[name][event["step"]].append(value)
            elif event["event"] == "metrics_of":
                self.metrics_of(step, event)
            elif event["event"] == "artifact":
                self.artifact(step, run, Path(event["path"]), event["folder"])
            elif event["event"] == "dataset":
                found = Counter(i.dataset.digest for i in run.inputs.dataset_inputs)
                self.expect("datasets", found[event["digest"]] == 1, f"{step}: LOST or DOUBLED dataset: {found}")
        for key, value in tags.items():
            self.expect("tags", run.data.tags.get(key) == value, f"{step}: LOST tag {key}: {run.data.tags.get(key)!r}")
        for name, by_step in metrics.items():
            self.metric(step, run, name, by_step)
        ended = [event["status"] for event in self.events[step] if event["event"] == "end"]
        self.expect("ends", run.info.status == (ended or ["FAILED"])[-1], f"{step}: LOST end: is {run.info.status}")

    def metric(self, step: str, run: Any, name: str, by_step: dict[int, list[float]]) -> None:
        history: dict[int, list[float]] = defaultdict(list)
        for point in sorted(self.client.get_metric_history(run.info.run_id, name), key=lambda p: p.timestamp):
            history[point.step].append(point.value)
        for index, values in by_step.items():
            got = history.get(index, [])
            missing = [v for v in values if v not in got]
            self.expect("metrics", not missing, f"{step}: LOST metric {name} at {index}: {missing}")
            # A later step's figures (metrics_of) are told at 0 in this run: other names than those of the training.
            self.expect("points", len(got) <= len(values), f"{step}: DOUBLED metric {name} at {index}: {got}", True)

    def metrics_of(self, step: str, event: dict[str, Any]) -> None:
        makers = [run for run in self.runs if run.data.tags.get("graftwork.model_sha256") == event["sha256"]]
        self.expect("metrics", bool(makers), f"{step}: LOST: nobody has made the model {event['sha256'][:12]}")
        for run in makers:
            for name, value in event["values"].items():
                got = [point.value for point in self.client.get_metric_history(run.info.run_id, name)]
                self.expect("metrics", got == [value], f"{step}: LOST or DOUBLED {name} of a candidate: {got}")

    def artifact(self, step: str, run: Any, path: Path, folder: str) -> None:
        name = f"{folder}/{path.name}" if folder else path.name
        with tempfile.TemporaryDirectory() as temporary:
            try:
                got = _bytes(Path(self.client.download_artifacts(run.info.run_id, name, temporary)))
            except Exception as error:
                self.expect("artifacts", False, f"{step}: LOST artifact {name} ({str(error)[:100]})")
                return
        self.expect("artifacts", got == _bytes(path), f"{step}: LOST or changed: artifact {name}")

    def parent(self, run: Any) -> None:
        path = self.journals.parent / "summary.json"
        if not path.exists():  # a run that failed
            self.expect(
                "ends", run.info.status in ("FAILED", "KILLED"), f"parent of a failed run: is {run.info.status}"
            )
            return
        summary = json.loads(path.read_text(encoding="utf-8"))
        self.expect("ends", run.info.status == "FINISHED", f"parent: LOST end: is {run.info.status}")
        self.expect(
            "ends",
            "error" not in summary["mlflow"],
            f"LOST, as the summary says: {summary['mlflow'].get('error', '')[:200]}",
        )
        for key, value in summary["parameters"].items():
            got = run.data.params.get(key)
            self.expect("params", got == str(value), f"parent: LOST param {key}: {got!r}, not {value!r}")
        for name, candidate in summary["candidates"].items():
            got = [p.value for p in self.client.get_metric_history(run.info.run_id, f"{name}_accuracy")]
            self.expect(
                "metrics", got == [candidate["test"]["accuracy"]], f"parent: LOST or DOUBLED {name}_accuracy: {got}"
            )
        for page in ("report.html", "validation.html"):
            self.artifact("parent", run, self.journals.parent / page, "")


def _bytes(path: Path) -> dict[str, bytes]:
    """Return the content of a file, or of every file of a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def _registry(
    client: Any, experiments: list[str], summaries: list[dict[str, Any]], deep: list[bool]
) -> tuple[Counter[str], list[str]]:
    """Check that each model that a run registered is one version, with its decision, its files and the right alias."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []

    def expect(what: str, holds: bool, line: str) -> None:
        counts[what] += 1
        if not holds:
            wrong.append(f"registry: {line}")

    found = _all(lambda token: client.search_model_versions(f"name = '{NAME}'", max_results=500, page_token=token))
    by_sha = Counter(version.tags.get("graftwork.model_sha256", "") for version in found)
    wanted, looked_at = {}, set()
    for summary, look in zip(summaries, deep, strict=True):
        info = json.loads((Path(summary["files"][summary["chosen"]]) / "model.json").read_text(encoding="utf-8"))
        wanted[info["sha256"]] = summary
        if look:
            looked_at.add(info["sha256"])
    for sha256, summary in wanted.items():
        expect("versions", by_sha.pop(sha256, 0) == 1, f"model {sha256[:12]} is not one version")
        number = str(summary["registered"]["version"])
        mine = [version for version in found if str(version.version) == number]
        if not mine:
            expect("versions", False, f"LOST version {number}")
            continue
        tags = mine[0].tags
        gate = "promoted" if _promoted(summary) else "refused"
        expect("decisions", tags.get("graftwork.gate") == gate, f"{number}: {tags.get('graftwork.gate')}, not {gate}")
        expect("decisions", bool(mine[0].description), f"version {number}: no model card")
        if sha256 in looked_at:
            expect("models", _weights_of(mine[0]) == sha256, f"version {number}: LOST or other weights")
    expect("versions", not by_sha, f"DOUBLED or of nobody: {dict(by_sha)}")
    promoted = [str(s["registered"]["version"]) for s in summaries if _promoted(s)]
    promoted = list(dict.fromkeys(promoted))
    aliases = {alias: str(number) for alias, number in client.get_registered_model(NAME).aliases.items()}
    expect("aliases", aliases.get("champion") == (promoted[-1:] or [None])[0], f"{aliases}; promoted: {promoted}")
    expect("aliases", aliases.get("previous") == (promoted[-2:-1] or [None])[0], f"{aliases}; promoted: {promoted}")
    refused = [str(s["registered"]["version"]) for s in summaries if not _promoted(s)]
    expect("aliases", aliases.get("challenger") == (refused[-1:] or [None])[0], f"{aliases}; refused: {refused}")
    logged = _all(lambda token: client.search_logged_models(experiments, max_results=50, page_token=token))
    counts["logged models without a version"] = len(logged) - len(found)
    return counts, wrong


def _promoted(summary: dict[str, Any]) -> bool:
    """Whether the run's model was promoted, by this try or by one whose last request was cut off: then it is the champion already."""
    decision = summary["decision"]
    return bool(decision["promoted"] or any("the champion, already" in reason for reason in decision["reasons"]))


def _weights_of(version: Any) -> str:
    """Return the digest of a version's weights, as downloaded, by the rule of ``model.json``; "" if it cannot be had."""
    from graftwork.register import download_version

    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = download_version(version, Path(temporary))
        except Exception:
            return ""
        info = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        return info["sha256"] if digest == info["sha256"] else ""


def _all(page: Callable[[Any], Any]) -> list[Any]:
    found, token = [], None
    while True:
        some = page(token)
        found += some
        token = some.token
        if not token:
            return found
