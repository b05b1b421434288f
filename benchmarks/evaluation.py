"""What the metrics of an evaluation cost: every headline figure with its bootstrap interval, and a paired comparison of two models.

    python benchmarks/evaluation.py --output benchmarks/results

Each case is a process of its own, so that the memory is its own, and its first call, which imports scikit-learn and SciPy, is reported too. The
predictions are random with a gain for the label, so that all the examples, and not only a few, have to be put in order.

And how often the 95 % interval of the accuracy, and that of the calibration error, hold the truth: test sets are drawn from a model whose labels
are drawn by its own probabilities, made over-confident by a temperature; the truth is that of a million examples.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from graftwork.calibration import probabilities
from graftwork.metrics import HEADLINES, calibration, compare, distribution, intervals, score, sums_to_metrics
from graftwork.parallel import cores
from graftwork.settings import EvaluateSettings

CASES = ((150, 10), (2_000, 10), (10_000, 10), (10_000, 100), (50_000, 100))
SETTINGS = EvaluateSettings()  # what a run has: 2,000 resamples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*map(int, options.case.split(",")))))
        return
    report: dict[str, Any] = {
        "cores": cores(),
        "processor": processor(),
        "resamples": SETTINGS.resamples,
        "headlines": HEADLINES,
        "cases": [],
    }
    for examples, classes in CASES:
        command = [sys.executable, __file__, "--case", f"{examples},{classes}"]
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        report["cases"].append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(report["cases"][-1], flush=True)
    report["coverage"] = [
        coverage(temperature, examples) for temperature in (1.0, 0.8, 0.5) for examples in (150, 2000)
    ]
    write(report, options.output)
    print((options.output / "evaluation.md").read_text(encoding="utf-8"))


def measure(examples: int, classes: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, examples)
    logits, others = rng.normal(size=(2, examples, classes)).astype(np.float32)
    logits[np.arange(examples), targets] += 2.5
    others += 0.9 * logits
    names = [f"class {n}" for n in range(classes)]
    before = peak_mib()
    first, _ = timed(lambda: score(targets, logits, names, SETTINGS, 1.3))
    seconds, found = min((timed(lambda: score(targets, logits, names, SETTINGS, 1.3)) for _ in range(2)), key=first_of)
    peak = peak_mib() - before
    mine, theirs = probabilities(logits), probabilities(others)
    accuracy, _ = timed(lambda: compare(targets, mine, theirs, SETTINGS))
    auroc, _ = timed(lambda: compare(targets, mine, theirs, SETTINGS, "auroc"))
    return {
        "examples": examples,
        "classes": classes,
        "score_first_seconds": round(first, 2),
        "score_seconds": round(seconds, 2),
        "compare_accuracy_seconds": round(accuracy, 2),
        "compare_auroc_seconds": round(auroc, 2),
        "peak_mib_beyond_predictions": round(peak),
        "intervals": sum(found[f"{name}_interval"] is not None for name in HEADLINES),
        "notes": found["notes"],
        "load_average": round(os.getloadavg()[0], 1),  # of more than the cores: others worked too
    }


def coverage(temperature: float, examples: int, trials: int = 200) -> dict[str, Any]:
    """Return the shares of ``trials`` test sets whose interval holds the truth; "plain" is the percentile interval of the calibration error."""
    targets, chances = sample(np.random.default_rng(10**6), 1_000_000, temperature)
    truth = {"accuracy": float((chances.argmax(1) == targets).mean()), "ece": calibration(targets, chances)[0]}
    held = dict.fromkeys(("accuracy", "ece", "plain"), 0)
    for trial in range(trials):
        targets, chances = sample(np.random.default_rng(trial), examples, temperature)
        settings, said = EvaluateSettings(resamples=400, seed=trial), chances.argmax(1)
        points = {"accuracy": float((said == targets).mean()), "ece": calibration(targets, chances)[0]}
        found: dict[str, Any] = intervals(list(points), targets, said, chances, points, 400, settings)
        for name in points:
            held[name] += found[f"{name}_interval"][0] <= truth[name] <= found[f"{name}_interval"][1]
        drawn = distribution(sums_to_metrics(["ece"], targets, said, chances), examples, 400, settings)
        low, high = np.quantile(drawn, [0.025, 0.975])
        held["plain"] += bool(low <= truth["ece"] <= high)
    return {"examples": examples, "true_ece": truth["ece"]} | {name: count / trials for name, count in held.items()}


def sample(rng: np.random.Generator, examples: int, temperature: float) -> tuple[Any, Any]:
    logits = 2 * rng.normal(size=(examples, 5))
    honest = probabilities(logits.astype(np.float32))
    targets = (honest.cumsum(1) > rng.random((examples, 1)) * honest.sum(1, keepdims=True)).argmax(1)
    return targets, probabilities((logits / temperature).astype(np.float32))


def first_of(pair: tuple[float, Any]) -> float:
    return pair[0]


def timed(function: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def peak_mib() -> float:
    """Return the most memory that this process has held (ru_maxrss would count its parent's, before the exec)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(report: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"All {len(report['headlines'])} headline figures with intervals of {report['resamples']:,} resamples; "
        f"{report['cores']} cores, {report['processor']}:",
        "",
        "| test images | classes | `score` | its first call, with imports | paired accuracy | paired AUROC | peak memory beyond the predictions |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in report["cases"]:
        seconds = ("score_seconds", "score_first_seconds", "compare_accuracy_seconds", "compare_auroc_seconds")
        cells = [f"{case[key]:.2f} s" for key in seconds]
        lines.append(
            f"| {case['examples']:,} | {case['classes']} | {' | '.join(cells)} | {case['peak_mib_beyond_predictions']:,} MiB |"
        )
    notes = [
        f"- {case['examples']:,} x {case['classes']}: {note}" for case in report["cases"] for note in case["notes"]
    ]
    if notes:
        lines += ["", "What the evaluations note themselves:", "", *notes]
    lines += [
        "",
        "How often a 95 % interval holds the truth, of 200 test sets each (chance alone moves a share by 3 points):",
        "",
        "| test images | true calibration error | accuracy | calibration error | its plain percentile interval |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in report["coverage"]:
        shares = " | ".join(f"{row[key]:.0%}" for key in ("accuracy", "ece", "plain"))
        lines.append(f"| {row['examples']:,} | {row['true_ece']:.3f} | {shares} |")
    (output / "evaluation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
