"""Look at what a pipeline run left in MLflow, from inside the cluster: the tree of runs, the metrics, the registered version.

    mlflow_check.py check RUN NAME     exit status 1 with a line a fault
    mlflow_check.py delete RUN NAME    remove the runs and the model NAME again

MLFLOW_TRACKING_URI and the login are in the environment, as for a step. infra/test-cluster.sh puts this into a pod.
"""

import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

STEPS = {
    "ingest_data",
    "validate_data",
    "extract_features",
    "train_baseline",
    "fine_tune",
    "evaluate_model",
    "register_model",
}
RESUMED = re.compile(r"goes on from a checkpoint: step \d+ of \d+")


def main(arguments: list[str]) -> int:
    what, run, name = arguments
    from mlflow import MlflowClient

    client = MlflowClient()
    if what == "delete":
        delete(client, run, name)
        return 0
    faults = check_runs(client, run) + check_registry(client, run, name)
    print(resumed(Path(os.environ.get("GRAFTWORK_VOLUME", "/checkpoints"))))
    for fault in faults:
        print(f"wrong: {fault}")
    return 1 if faults else 0


def runs_of(client: Any, run: str) -> list[Any]:
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`graftwork.run` = '{run}'", max_results=1000))


def check_runs(client: Any, run: str) -> list[str]:
    found = runs_of(client, run)
    parents = [r for r in found if r.data.tags.get("graftwork.parent") == "true"]
    steps = [r for r in found if r.data.tags.get("graftwork.step")]
    faults = []
    if len(parents) > 1:
        faults.append(f"{len(parents)} parent runs of {run}, not one")
    missing = STEPS - {r.data.tags["graftwork.step"] for r in steps}
    if missing:
        faults.append(f"no run of {', '.join(sorted(missing))}")
    for parent in parents:
        print(f"{parent.info.run_name}: {parent.info.status}")
        if parent.info.status != "FINISHED":
            faults.append(f"the parent run is {parent.info.status}")
    for one in sorted(steps, key=lambda r: int(r.info.start_time)):
        step = one.data.tags["graftwork.step"]
        print(f"  {step}: {one.info.status}")
        if one.info.status != "FINISHED":
            faults.append(f"the run of {step} is {one.info.status}")
        # A parent that is not among ours is that of KFP's plugin, whose run the step has joined.
        if parents and one.data.tags.get("mlflow.parentRunId") not in {p.info.run_id for p in parents}:
            faults.append(f"the run of {step} is not under the parent")
        faults += twice(client, one, step)
    return faults


def twice(client: Any, run: Any, step: str) -> list[str]:
    """Say which metrics have two values at one step: what a retried step must not leave."""
    faults = []
    for key in run.data.metrics:
        if key.startswith("system/"):
            continue
        counted = Counter(m.step for m in client.get_metric_history(run.info.run_id, key))
        faults += [f"{step}: {key} has {n} values at step {at}" for at, n in counted.items() if n > 1]
    return faults


def check_registry(client: Any, run: str, name: str) -> list[str]:
    versions = [v for v in client.search_model_versions(f"name='{name}'") if v.tags.get("graftwork.run") == run]
    if len(versions) != 1:
        return [f"{len(versions)} versions of {name} are of this run, not one"]
    aliases = client.get_registered_model(name).aliases
    print(f"registered: {name} version {versions[0].version} ({', '.join(aliases) or 'no alias'})")
    return [] if "champion" in aliases else [f"the first version of {name} is not champion"]


def resumed(volume: Path) -> str:
    """Say whether a journal on the volume tells of training that went on; none may be there."""
    found = [
        match[0]
        for path in volume.rglob("*.jsonl")
        if path.is_file()
        for match in RESUMED.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    return f"resumed: {found[-1]}" if found else "resumed: no journal on the volume says so"


def delete(client: Any, run: str, name: str) -> None:
    from mlflow.exceptions import MlflowException

    for one in runs_of(client, run):
        client.delete_run(one.info.run_id)
    try:
        client.delete_registered_model(name)
    except MlflowException as error:
        print(f"{name}: {error.error_code}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
