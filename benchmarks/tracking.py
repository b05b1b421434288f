"""What tracking costs a training when MLflow's server is killed and restarted in its midst: seconds, and metrics.

    python benchmarks/tracking.py                 # about ten minutes on two cores
    python benchmarks/tracking.py --pairs 5 --seconds 90 --output /tmp/results

A small network is fine-tuned on handwritten digits, again and again from the same seed, with a follower in the same process, as on
a cluster. There are two servers, one that the follower knows and one that nobody uses. In every training one of the two is killed
with SIGKILL after a fifth of the time and started again at once: the first, or, in the undisturbed training of the pair, the
second, for a server that starts takes a core for ten seconds, which on a real machine is not the training's. Each step of the
optimiser and each epoch journals metrics, and system metrics run along. Training has one thread, the servers the lowest priority.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from graftwork.files import write_json, write_text
from graftwork.tracking import Follower, Journal, JournalReader, quiet_mlflow

NETWORK = (
    "test_resnet.r160_in1k"  # timm's own network for tests, with random weights: what it learns is beside the point
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="trainings undisturbed and disturbed, of each so many")
    parser.add_argument("--seconds", type=float, default=60, help="about how long a training takes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "GRAFTWORK_CHECKPOINTS"):
        os.environ.pop(name, None)
    quiet_mlflow()
    with tempfile.TemporaryDirectory(prefix="graftwork-tracking-") as folder:
        results = measure(Path(folder), options.pairs, options.seconds)
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "tracking.json", results)
    write_text(options.output / "tracking.md", table(results))
    print(table(results))


def measure(folder: Path, pairs: int, seconds: float) -> dict[str, Any]:
    dataset, baseline = prepare(folder)
    ports = {"used": free_port(), "unused": free_port()}
    servers: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, port in ports.items():
            servers[name] = start_server(folder / name, port)
            wait_until_up(port)
        train(folder / "warm", dataset, baseline, ports["used"], epochs=4)  # imports, and the first touch of everything
        sized = train(folder / "sized", dataset, baseline, ports["used"], epochs=20)
        epochs = max(4, round(seconds / (sized["seconds"] / 20)))
        trainings = []
        for pair in range(pairs):
            for disturbed in (False, True) if pair % 2 == 0 else (True, False):
                name = "used" if disturbed else "unused"
                restart = Restart(folder / name, ports[name], servers[name], after=seconds / 5)
                result = train(folder / f"pair{pair}-{disturbed}", dataset, baseline, ports["used"], epochs, restart)
                servers[name] = restart.server
                trainings.append({"pair": pair, "disturbed": disturbed, **result})
                print(json.dumps(trainings[-1]), flush=True)
    finally:
        for server in servers.values():
            kill(server)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "epochs": epochs,
        "trainings": trainings,
        **summary(trainings),
    }


def summary(trainings: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the time lost in per cent, by pairs, and the metrics of all trainings together."""
    lost, lost_cpu = [], []
    for pair in sorted({t["pair"] for t in trainings}):
        calm, stormy = sorted((t for t in trainings if t["pair"] == pair), key=lambda t: t["disturbed"])
        lost.append(100 * (stormy["seconds"] / calm["seconds"] - 1))
        lost_cpu.append(100 * (stormy["cpu_seconds"] / calm["cpu_seconds"] - 1))
    return {
        "time_lost_percent": statistics.median(lost),
        "time_lost_percent_by_pair": lost,
        "cpu_time_lost_percent": statistics.median(lost_cpu),
        "cpu_time_lost_percent_by_pair": lost_cpu,
        "tracking_percent": {
            "disturbed" if disturbed else "undisturbed": 100
            * sum(t["write_seconds"] + t["follower_cpu_seconds"] for t in trainings if t["disturbed"] == disturbed)
            / sum(t["seconds"] for t in trainings if t["disturbed"] == disturbed)
            for disturbed in (False, True)
        },
        **{k: sum(t[k] for t in trainings) for k in ("expected", "found", "missing", "doubled", "nested_runs")},
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "# Tracking: the MLflow server is killed and restarted in mid-training",
        "",
        "`python benchmarks/tracking.py` on " + results["machine"] + f"; {results['epochs']} epochs a training.",
        "",
        "| pair | server | training, s | its CPU, s | load average | writing the journal, s | longest write, ms | follower's CPU, s | server away, s "
        "| back before the end | close, s | metrics expected | found | missing | doubled | nested runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for t in results["trainings"]:
        away = f"{t['away_seconds']:.1f} | {'yes' if t['back_before_end'] else 'no'}" if t["disturbed"] else "– | –"
        written = f"{t['write_seconds']:.3f} | {1000 * t['longest_write']:.1f} | {t['follower_cpu_seconds']:.2f}"
        lines.append(
            f"| {t['pair'] + 1} | {'killed, restarted' if t['disturbed'] else 'undisturbed'} | {t['seconds']:.2f} "
            f"| {t['cpu_seconds']:.2f} | {t['load_average']:.1f} | {written} | {away} "
            f"| {t['close_seconds']:.1f} | {t['expected']} | {t['found']} | {t['missing']} | {t['doubled']} "
            f"| {t['nested_runs']} |"
        )
    by_pair = ", ".join(f"{lost:+.2f}" for lost in results["time_lost_percent_by_pair"])
    by_pair_cpu = ", ".join(f"{lost:+.2f}" for lost in results["cpu_time_lost_percent_by_pair"])
    lines += [
        "",
        f"Time lost, median of the pairs: **{results['time_lost_percent']:+.2f} %** ({by_pair}); "
        f"in CPU time of the training's process, {results['cpu_time_lost_percent']:+.2f} % ({by_pair_cpu}).",
        "What tracking can have cost, the writes to the journal and all of the follower's CPU time together: "
        f"{results['tracking_percent']['undisturbed']:.2f} % undisturbed, **{results['tracking_percent']['disturbed']:.2f} "
        f"%** disturbed. A load average above {os.cpu_count()} means that others used the machine, and seconds say less.",
        f"Metrics: {results['expected']} expected, {results['found']} found, **{results['missing']} missing, "
        f"{results['doubled']} doubled**.",
        "",
    ]
    return "\n".join(lines)


# ---- one training ----------------------------------------------------------------------------------------------------------------


def train(
    folder: Path, dataset: Any, baseline: Path, port: int, epochs: int, restart: "Restart | None" = None
) -> dict[str, Any]:
    """Fine-tune with a follower on the server; return the seconds, and what of the journal's metrics is in MLflow."""
    from graftwork.finetune import fine_tune
    from graftwork.settings import FineTuneSettings

    follower = Follower(
        folder / "journals", f"http://127.0.0.1:{port}", folder, folder.name, {"graftwork.run": folder.name}
    )
    journal = Journal(folder / "journals", "fine_tune")
    follower.start()
    journal.write("start")
    writes: list[float] = []

    def timed(values: dict[str, float], step: int) -> None:
        began = time.perf_counter()
        journal.metrics(values, step)
        writes.append(time.perf_counter() - began)

    settings = FineTuneSettings(epochs=epochs, patience=epochs, strategy="full", flip="no")
    if restart:
        restart.start()
    began, began_cpu = time.perf_counter(), time.process_time()
    with journal.system_metrics(5):
        fine_tune(
            dataset,
            baseline,
            settings,
            folder / "model",
            progress=lambda done, total: timed({"done": done, "share": done / total}, len(writes)),
            note=lambda message: journal.notes([message]),
            on_epoch=lambda epoch, values: timed(values, epoch),
        )
    load = os.getloadavg()[0]
    follower_cpu = next(
        thread.user_time + thread.system_time
        for thread in psutil.Process().threads()
        if thread.id == follower.native_id
    )
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    back = restart is not None and restart.back.is_set()
    journal.write("end", status="FINISHED")
    if restart:
        restart.join()
    closing = time.perf_counter()
    follower.close(60)
    close_seconds = time.perf_counter() - closing
    follower.finish("FINISHED")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "write_seconds": sum(writes),
        "longest_write": max(writes),
        "writes": len(writes),
        "away_seconds": restart.away if restart else 0.0,
        "back_before_end": back,
        "close_seconds": close_seconds,
        "load_average": load,
        "follower_cpu_seconds": follower_cpu,
        **compare(folder / "journals", follower),
    }


def compare(journals: Path, follower: Follower) -> dict[str, Any]:
    """Count the metrics of the journal, by name and step, that are in MLflow once, not at all, or more than once."""
    client = follower.client()
    expected = {
        (name, event["step"])
        for _, event in JournalReader(journals).poll()
        if event["event"] == "metrics"
        for name in event["values"]
    }
    runs = client.search_runs([follower.experiment_id], f"tags.`mlflow.parentRunId` = '{follower.parent_id}'")
    found = Counter(
        (name, metric.step)
        for run in runs
        for name in {name for name, _ in expected}
        for metric in client.get_metric_history(run.info.run_id, name)
    )
    return {
        "expected": len(expected),
        "found": sum(found.values()),
        "missing": len(expected - set(found)),
        "doubled": sum(n - 1 for n in found.values()),
        "nested_runs": len(runs),
        "error": follower.error,
    }


def prepare(folder: Path) -> tuple[Any, Path]:
    """Return 240 digits to train and 60 to validate, and the probe on the network's features to start from."""
    import timm
    import torch
    from safetensors.torch import save_file

    from graftwork.baseline import train_baseline
    from graftwork.dataset import open_dataset
    from graftwork.features import extract_features
    from graftwork.ingest import ingest
    from graftwork.settings import FeatureSettings, IngestSettings

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = timm.create_model(NETWORK, pretrained=False)
    weights = folder / "tiny.safetensors"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, weights)
    ingest(IngestSettings(data="digits", train_per_class=24, test_per_class=15), folder / "digits")
    dataset = open_dataset(folder / "digits")
    chosen = FeatureSettings(backbone=NETWORK, weights=str(weights), image_size=64, flip="no", views=1)
    extract_features(dataset, chosen, folder / "embeddings")
    train_baseline(folder / "embeddings", folder / "baseline")
    return dataset, folder / "baseline"


# ---- the server ------------------------------------------------------------------------------------------------------------------


class Restart(threading.Thread):
    """Kills the server after some seconds and starts it again at once; ``away`` is how long it did not answer."""

    def __init__(self, folder: Path, port: int, server: "subprocess.Popen[bytes]", after: float) -> None:
        super().__init__(daemon=True)
        self.folder, self.port, self.server, self.after = folder, port, server, after
        self.back = threading.Event()
        self.away = 0.0

    def run(self) -> None:
        time.sleep(self.after)
        kill(self.server)
        began = time.perf_counter()
        self.server = start_server(self.folder, self.port)
        wait_until_up(self.port)
        self.away = time.perf_counter() - began
        self.back.set()


def start_server(folder: Path, port: int) -> "subprocess.Popen[bytes]":
    folder.mkdir(exist_ok=True)
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "server.log").open("a") as log:
        return subprocess.Popen(
            ["nice", "-n", "19", sys.executable, "-m", "mlflow", "server", *where, *store],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_until_up(port: int, timeout: float = 300.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.5)
    raise TimeoutError(f"mlflow server does not answer on port {port}")


def kill(server: "subprocess.Popen[bytes]") -> None:
    os.killpg(server.pid, signal.SIGKILL)  # and the workers it started
    server.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    main()
