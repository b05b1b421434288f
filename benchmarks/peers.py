"""Graftwork beside fastai, the Hugging Face Trainer and a hand-written loop: whole processes, same weights, same images, one machine.

    python benchmarks/peers.py --peer-python /tmp/x/peers/bin/python --seeds 0,1,2 --output benchmarks/results

benchmarks/peers/requirements.txt says how the peers' environment is made. For each seed the images are exported once, untimed, and every contestant
reads that folder, one after the other, in an order that rotates with the seed. What is timed is a process from its start to its end: imports,
training, choosing and the accuracy on the test images; for graftwork also validation, the baseline, intervals, the report and MLflow.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
EXPECTED = {"train": 1000, "val": 250, "test": 2000}
PEERS = {
    "fastai fine_tune(5)": ["fastai_fine_tune.py"],
    "HF Trainer, its example's settings": ["hf_trainer.py"],
    "HF Trainer, learning rate 1e-3": ["hf_trainer.py", "--learning-rate", "1e-3"],
    "hand-written loop": ["plain_loop.py"],
}
GRAFTWORK = "graftwork run"
LIBRARIES = ("torch", "torchvision", "timm", "fastai", "transformers", "accelerate", "mlflow", "kfp", "pillow", "numpy")


def main() -> None:
    options = parse_arguments()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    names = [name for name in (GRAFTWORK, *PEERS) if any(word in name for word in options.only.split(","))]
    warm_up(options)
    report: dict[str, Any] = {"machine": machine(options), "versions": versions(options), "runs": []}
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        for turn, seed in enumerate(seeds):
            data = Path(temporary) / f"fashion-{seed}"
            command = [options.graftwork_python, HERE / "peers/export.py", data, "--seed", str(seed)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                report["runs"].append(run(name, data, seed, Path(temporary), options))
                write(report, options.output)  # after every run: an interrupted benchmark keeps what it has


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of the peers' environment")
    parser.add_argument("--graftwork-python", default=str(REPOSITORY / ".venv/bin/python"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="contestants whose name holds one of these words; default: all")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument(
        "--passive-peers",
        action="store_true",
        help="start the peers with OMP_WAIT_POLICY=PASSIVE, which graftwork sets itself: matters on a shared machine",
    )
    return parser.parse_args()


def warm_up(options: argparse.Namespace) -> None:
    """Import everything once, so that the first contestant does not pay for a cold disk and for compiling to bytecode."""
    imports = {
        options.peer_python: "import fastai.vision.all, timm, transformers.trainer, accelerate",
        options.graftwork_python: "import kfp.local, mlflow, timm, torchvision, great_expectations",
    }
    for python, line in imports.items():
        subprocess.run([python, "-c", line], check=True, stdout=subprocess.DEVNULL)


# ---- one run -------------------------------------------------------------------------------------------------------------------


def run(name: str, data: Path, seed: int, temporary: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant and return its seconds, its processors' seconds and its test accuracy."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "GRAFTWORK_"))}
    environment["HF_HUB_OFFLINE"] = "1"  # nobody waits for a hub: all weights are on the disk
    output = Path(tempfile.mkdtemp(dir=temporary))  # new each time: nothing can be reused
    if name == GRAFTWORK:
        environment["GRAFTWORK_CACHE"] = str(
            output / "cache"
        )  # it measures this machine anew, in its time, like a first run
        command = [str(Path(options.graftwork_python).parent / "graftwork"), "run", "--data", str(data)]
        command += ["--image-size", "96", "--seed", str(seed), "--output", str(output / "runs")]
    else:
        script, *rest = PEERS[name]
        command = [options.peer_python, str(HERE / "peers" / script), str(data), "--seed", str(seed), *rest]
        if options.passive_peers:
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
    load = os.getloadavg()[0]
    times = timed(command, environment, output)
    result = graftwork_result(output / "runs") if name == GRAFTWORK else peer_result(output)
    if result["images"] != EXPECTED:
        sys.exit(f"{name}: saw {result['images']} images, not {EXPECTED}")
    print(f"seed {seed}  {name}: {times['seconds']:.1f} s, test accuracy {result['test_accuracy']:.4f}", flush=True)
    shutil.rmtree(output)
    return {"contestant": name, "seed": seed, **times, **result, "load_before": load}


def timed(command: list[str], environment: dict[str, str], output: Path) -> dict[str, float]:
    """Run ``command`` in ``output`` and return wall-clock seconds, and processor seconds of it and all its children that it waited for."""
    with (output / "stdout").open("wb") as stdout, (output / "stderr").open("wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=output, env=environment, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        text = (output / "stdout").read_text()[-2000:] + (output / "stderr").read_text()[-4000:]
        sys.exit(f"{text}\n{' '.join(command)}: ended with {process.returncode}")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def graftwork_result(runs: Path) -> dict[str, Any]:
    (path,) = runs.glob("*/summary.json")
    summary = json.loads(path.read_text())
    chosen = summary["chosen"]
    return {
        "test_accuracy": summary["candidates"][chosen]["test"]["accuracy"],
        "images": {split: summary["data"][split] for split in EXPECTED},
        "chosen": chosen,
        "own_seconds": summary["seconds"],
    }


def peer_result(output: Path) -> dict[str, Any]:
    line = json.loads((output / "stdout").read_text().strip().splitlines()[-1])
    return {
        "test_accuracy": line["test_accuracy"],
        "images": {split: line[f"{split}_images"] for split in EXPECTED},
        "train_seconds": line["train_seconds"],
    }


# ---- the report ----------------------------------------------------------------------------------------------------------------


def machine(options: argparse.Namespace) -> dict[str, Any]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
        "nice": os.nice(0),
        "load_at_start": os.getloadavg(),
        "passive_peers": options.passive_peers,
    }


def versions(options: argparse.Namespace) -> dict[str, Any]:
    code = (
        "import json, platform, sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n    try: found[name] = version(name)\n    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )

    def ask(python: str) -> dict[str, str]:
        answer = subprocess.run([python, "-c", code, *LIBRARIES], check=True, capture_output=True, text=True)
        return json.loads(answer.stdout)

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()

    changed = bool(git("status", "--porcelain", "--", "graftwork", "components", "pipelines"))
    commit = git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    return {"commit": commit, "graftwork": ask(options.graftwork_python), "peers": ask(options.peer_python)}


def write(report: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "peers.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "peers.md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """Return the page: a row a contestant, medians over the seeds and, in brackets, the least and the greatest."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in report["runs"]:
        by_name.setdefault(entry["contestant"], {})[entry["seed"]] = entry
    ours = by_name.get(GRAFTWORK, {})
    rows = []
    for name in [n for n in (GRAFTWORK, *PEERS) if n in by_name]:
        runs = by_name[name]
        cells = [
            spread([r["seconds"] for r in runs.values()], "{:.0f}"),
            spread([r["cpu_seconds"] for r in runs.values()], "{:.0f}"),
            spread([100 * r["test_accuracy"] for r in runs.values()], "{:.2f} %"),
        ]
        both = [seed for seed in runs if seed in ours]
        if name == GRAFTWORK or not both:
            cells += ["", ""]
        else:
            ratio = statistics.median(ours[s]["seconds"] for s in ours) / statistics.median(
                r["seconds"] for r in runs.values()
            )
            gains = [100 * (ours[s]["test_accuracy"] - runs[s]["test_accuracy"]) for s in both]
            cells += [f"{ratio:.2f}", spread(gains, "{:+.2f}")]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    at, found = report["machine"], report["versions"]
    seeds = sorted({entry["seed"] for entry in report["runs"]})
    load = max(entry["load_before"] for entry in report["runs"])
    libraries = {
        who: ", ".join(f"{name} {number}" for name, number in found[who].items()) for who in ("graftwork", "peers")
    }
    return f"""# Graftwork beside its peers

Fashion-MNIST, {EXPECTED["train"]:,} images to train, {EXPECTED["val"]} to validate, {EXPECTED["test"]:,} to test, 96 pixels; ImageNet-pretrained
tf_efficientnet_lite0; seeds {", ".join(map(str, seeds))}. Median (least – greatest). Seconds are of whole processes, from start to end.

| | seconds | processor seconds | test accuracy | graftwork's time / its | graftwork's accuracy − its, points |
|---|---|---|---|---|---|
{chr(10).join(rows)}

- A time ratio under 1: graftwork was faster. Accuracy differences are by seed: same images to train, same images to test.
- With 2,000 test images one accuracy is known to ± 1.7 points (95 %, at 83 %); the test images are the same for every seed.
- `graftwork run` does more in its time: validation, a baseline, intervals, a report, registering in MLflow. Peers train and test.
- The learning rate of Hugging Face's example is for a ViT; the row with 1e-3 is the same script with the rate of the hand-written loop.
- Settings and where they come from: the docstrings in `benchmarks/peers/`. No peer's setting was chosen by its test accuracy.
- Graftwork's defaults were made by people who ran this very dataset often; the peers' defaults were not.

{at["date"]}, {at["processor"]}, {at["cores"]} cores, {at["memory_gib"]} GiB, {at["system"]}. Load before a run: at most {load:.2f}. Nice {at["nice"]}.
Peers waited {"passively (OMP_WAIT_POLICY=PASSIVE), as graftwork does" if at["passive_peers"] else "as OpenMP does by default"}.

- graftwork: commit {found["commit"]}; {libraries["graftwork"]}
- peers: {libraries["peers"]}
"""


def spread(values: list[float], form: str) -> str:
    middle, least, greatest = (form.format(f(values)) for f in (statistics.median, min, max))
    return f"{middle} ({least} – {greatest})"


if __name__ == "__main__":
    main()
