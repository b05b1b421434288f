"""Fifty registrations at once, each a process of its own against one MLflow server: how many versions, and which is champion?

    python benchmarks/registry.py [--registrations 50]

Models are stand-ins of known, distinct quality; what decides and what sets the aliases is the registry's own code. Beside it, the rule
that most pipelines follow: compare with the champion, then set the alias.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--registrations", type=int, default=50)
    number = parser.parse_args().registrations
    from graftwork.tracking import quiet_mlflow

    quiet_mlflow()
    with tempfile.TemporaryDirectory(prefix="graftwork-") as folder, server(Path(folder)) as uri:
        result = {"registrations": number, "ours": race(uri, "ours", number), "naive": race(uri, "naive", number)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "registry.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        f"# {number} registrations at once",
        "",
        "Each is a process of its own against one MLflow server (SQLite); quality is known and distinct. Naive: compare with the champion, then set the alias.",
        "",
        "| | versions | decided | champions | the champion is the best | seconds |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for name in ("ours", "naive"):
        found = result[name]
        best = "yes" if found["best"] else f"no, {found['better']} versions are better"
        lines.append(
            f"| {name} | {found['versions']} | {found['decided']} | {found['champions']} | {best} | {found['seconds']:.0f} |"
        )
    (RESULTS / "registry.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


@contextlib.contextmanager
def server(folder: Path) -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_MODEL_CATALOG_URI": ""}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | quiet, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=5):
                break
            time.sleep(0.1)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def race(uri: str, name: str, number: int) -> dict[str, Any]:
    from mlflow import MlflowClient

    from graftwork import registry

    client = MlflowClient(uri, uri)
    client.create_registered_model(name)
    qualities = [n / 1000 for n in range(1, number + 1)]
    random.Random(0).shuffle(qualities)
    context = multiprocessing.get_context("fork")
    gate = context.Event()
    processes = [context.Process(target=one, args=(uri, name, quality, gate)) for quality in qualities]
    for process in processes:
        process.start()
    time.sleep(2)
    began = time.monotonic()
    gate.set()
    for process in processes:
        process.join(600)
    seconds = time.monotonic() - began
    assert all(process.exitcode == 0 for process in processes), "a registration failed"
    versions = registry.search(client, name)
    champion = client.get_model_version_by_alias(name, "champion")
    better = sum(float(v.tags["quality"]) > float(champion.tags["quality"]) for v in versions)
    return {
        "versions": len(versions),
        "decided": sum(v.tags.get(registry.GATE) in ("promoted", "refused") for v in versions),
        "champions": sum(alias == "champion" for alias in client.get_registered_model(name).aliases),
        "best": better == 0,
        "better": better,
        "seconds": seconds,
    }


def one(uri: str, name: str, quality: float, gate: Any) -> None:
    from mlflow import MlflowClient

    from graftwork import registry

    client = MlflowClient(uri, uri)
    gate.wait()

    def create(tags: dict[str, str]) -> Any:
        return client.create_model_version(
            name, f"s3://models/{name}/{quality}", tags={**tags, "quality": str(quality)}
        )

    version = registry.one_version(client, name, f"{quality}", "", create)

    def decide(champion: Any) -> dict[str, Any]:
        time.sleep(0.1)  # evaluating the champion takes its time
        theirs = float(champion.tags["quality"]) if champion else 0.0
        return {"promoted": quality > theirs, "reasons": [f"{quality} against {theirs}"], "rules": []}

    if name == "ours":
        registry.settle(client, name, version, decide)
    else:
        champion = registry.find_champion(client, name)
        if decide(champion)["promoted"]:
            client.set_registered_model_alias(name, "champion", version)
            client.set_model_version_tag(name, version, registry.GATE, "promoted")
        else:
            client.set_model_version_tag(name, version, registry.GATE, "refused")


if __name__ == "__main__":
    main()
