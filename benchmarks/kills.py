"""Kill -9 at random moments of a whole training, in every phase, and compare the final weights.

    python benchmarks/kills.py --kills 30 --output benchmarks/results

A worker extracts features, fits the probe, fine-tunes and saves, as the steps do, with checkpoints. An undisturbed run gives the weights
to expect and the time it takes. Then, once for every kill, a new worker in a folder of its own is killed at a random moment; the same command
is given again until it ends, and must end with the same weights, byte for byte.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

BACKBONE = "test_resnet"  # timm's own for tests: what is proved is the machinery, and a kill may come every second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="graftwork-kills-") as temporary:
        root = Path(temporary)
        os.environ |= {"GRAFTWORK_CACHE": str(root), "OMP_WAIT_POLICY": "PASSIVE"}
        prepare(root)
        run(root / "reference")  # warms the plan's cache
        began = time.perf_counter()
        expected = run(root / "reference-2")
        span = time.perf_counter() - began
        log: list[dict[str, Any]] = []
        for number in range(options.kills):
            folder = root / f"kill-{number}"
            phase = None
            while phase is None:
                at = chance.uniform(0.05, 1.0) * span
                began = time.perf_counter()
                phase = start_and_kill(folder, at)
                if phase is None:  # it had ended by itself: the machine has become faster, and the kill does not count
                    span = time.perf_counter() - began
                    shutil.rmtree(folder)
            found = run(folder)
            log.append({"kill": number + 1, "after_seconds": round(at, 2), "phase": phase, **found})
            log[-1]["identical"] = found["sha256"] == expected["sha256"]
            print(
                f"kill {number + 1:2d} at {at:5.1f} s in {phase:24s} {found['sha256'][:16]} "
                f"{'identical' if log[-1]['identical'] else 'OTHER WEIGHTS'}; {found['said']}",
                flush=True,
            )
            shutil.rmtree(folder)
    write({"expected": expected["sha256"], "span_seconds": round(span, 1), "kills": log}, options.output)
    sys.exit(not all(entry["identical"] for entry in log))


def prepare(root: Path) -> None:
    """Make what all workers share: the dataset and a weights file."""
    import timm
    import torch
    from safetensors.torch import save_file

    from graftwork.ingest import ingest
    from graftwork.settings import IngestSettings

    ingest(IngestSettings(data="digits", train_per_class=24, test_per_class=10), root / "data")
    torch.manual_seed(0)
    state = timm.create_model(BACKBONE, pretrained=False).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, root / "weights.safetensors")


def work(folder: Path) -> None:
    """Do what the steps do; what is finished is not done again, as the pipeline's cache has it."""
    folder.mkdir(exist_ok=True)
    os.environ["GRAFTWORK_CHECKPOINTS"] = str(folder / "checkpoints")
    say = (folder / "phases").open("a", encoding="utf-8")

    def phase(name: str) -> None:
        say.write(f"{name}\n")
        say.flush()

    phase("start and imports")
    from graftwork.baseline import train_baseline
    from graftwork.dataset import open_dataset
    from graftwork.features import extract_features
    from graftwork.finetune import fine_tune
    from graftwork.settings import FeatureSettings, FineTuneSettings

    data = open_dataset(folder.parent / "data")
    if not (folder / "embeddings").exists():
        phase("extracting features")
        features = FeatureSettings(
            backbone=BACKBONE, weights=str(folder.parent / "weights.safetensors"), image_size=32, views=4, threads=1
        )
        extract_features(data, features, folder / "embeddings", note=phase_note(phase))
    if not (folder / "baseline").exists():
        phase("fitting the probe")
        train_baseline(folder / "embeddings", folder / "baseline")
    phase("before training")
    settings = FineTuneSettings(
        strategy="full", epochs=6, batch_size=8, soup=2, mixup=0.1, patience=99, checkpoint_seconds=0.3, threads=1
    )
    fine_tune(
        data,
        folder / "baseline",
        settings,
        folder / "model",
        progress=lambda done, total: phase(f"training, step {done} of {total}"),
        note=phase_note(phase),
        on_epoch=lambda epoch, metrics: phase(f"checkpoint of epoch {epoch}"),
    )
    phase("done")


def phase_note(phase: Any) -> Any:
    return lambda message: phase(f"note: {message}") if "checkpoint" in message else None


def run(folder: Path) -> dict[str, Any]:
    """Run the worker to its end, and return the weights' digest and whether it went on from a checkpoint."""
    subprocess.run([sys.executable, __file__, "--worker", str(folder)], check=True, stdout=subprocess.DEVNULL)
    phases = (folder / "phases").read_text(encoding="utf-8").splitlines()
    resumed = [line.removeprefix("note: ") for line in phases if line.startswith("note: goes on")]
    info = json.loads((folder / "model" / "model.json").read_text(encoding="utf-8"))
    return {"sha256": info["sha256"], "said": resumed[-1] if resumed else "from the start of the step"}


def start_and_kill(folder: Path, after: float) -> str | None:
    """Start the worker, kill it with SIGKILL ``after`` seconds, and return the phase it was in; None where it had ended."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--worker", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if process.returncode != -signal.SIGKILL:
        return None
    path = folder / "phases"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ["start and imports"]
    return [line for line in lines if not line.startswith("note:")][-1]


def write(report: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "kills.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    kills = report["kills"]
    phases = Counter(entry["phase"].split(",")[0].split(" of epoch")[0] for entry in kills)
    lines = [
        f"{len(kills)} kills with SIGKILL, {sum(entry['identical'] for entry in kills)} with final weights identical byte for byte; "
        f"an undisturbed run takes {report['span_seconds']} s.",
        "",
        "| killed in | times |",
        "|---|---:|",
        *(f"| {phase} | {count} |" for phase, count in phases.most_common()),
    ]
    (output / "kills.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
