"""The gate: how often it promotes a challenger that is no better than the champion, and how often one that is.

    python benchmarks/gate.py --output benchmarks/results

Pairs of models with predictions of 10 classes are drawn: each image is right for both, for one alone or for neither, independently of the others. The
champion's true accuracy is 87%; the share of images on which just one of the two is right (they disagree) and the challenger's true gain are given, so
that "no better" is known and not estimated. Every pair is decided by ``graftwork.gate.decide``, with nothing but the champion's rule to stop it. The
naive rule, "its figure is higher", is the policy ``champion: {by: margin}``. The last table asks of a bound on calibration: labels are drawn from the
probabilities themselves (perfectly calibrated) or from flatter ones (over-confident).
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from graftwork.gate import ChampionEvidence, Evidence, decide, parse_policy
from graftwork.metrics import measure_one, score
from graftwork.settings import EvaluateSettings

CLASSES, ACCURACY = 10, 0.87
NAIVE = "champion: {by: margin}"
# 2 x 0.87 x 0.13: what two models have that know nothing of each other.
INDEPENDENT = 0.2262


class Case(NamedTuple):
    policy: str
    gain: float  # the challenger's true accuracy less the champion's
    disagreement: float
    images: int
    pairs: int


CASES = [
    *(Case(policy, 0.0, d, 2000, 2000) for d in (0.02, 0.05, 0.1, INDEPENDENT) for policy in ("", NAIVE)),
    *(Case("", 0.03, d, 2000, 2000) for d in (0.05, 0.1, INDEPENDENT)),
    *(Case("", gain, 0.1, 2000, 2000) for gain in (0.01, 0.02, -0.01)),
    *(Case("", gain, 0.1, images, 2000) for images in (200, 500) for gain in (0.0, 0.03)),
    *(Case("champion: {margin: 0.01}", gain, 0.1, 2000, 200) for gain in (0.01, 0.03)),
    *(Case("champion: {by: not-worse, margin: 0.01}", gain, 0.05, 2000, 200) for gain in (-0.01, 0.0)),
    *(Case("metric: macro_f1", gain, 0.1, 2000, 200) for gain in (0.0, 0.03)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of pairs")
    options = parser.parse_args()
    began = time.monotonic()
    report: dict[str, Any] = {"cases": [], "calibration": []}
    with ProcessPoolExecutor() as pool:
        jobs = [case._replace(pairs=max(10, round(case.pairs * options.scale))) for case in CASES]
        for found in pool.map(promoted, jobs):
            report["cases"].append(found)
            print(found, flush=True)
        shapes = [(n, flat, max(10, round(100 * options.scale))) for flat in (1.0, 2.0) for n in (50, 200, 2000)]
        for found in pool.map(refused_for_calibration, shapes):
            report["calibration"].append(found)
            print(found, flush=True)
    report["seconds"] = round(time.monotonic() - began, 1)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gate.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.output / "gate.md").write_text(table(report), encoding="utf-8")
    print(f"{report['seconds']} s; in {options.output}/gate.md")


def promoted(case: Case) -> dict[str, Any]:
    """Decide every pair of a case; return how many were promoted, of the first 200 and of all."""
    policy = parse_policy(case.policy)
    generator = np.random.default_rng([int(1e4 * (1 + case.gain)), int(1e4 * case.disagreement), case.images])
    verdicts = []
    for _ in range(case.pairs):
        targets, mine, theirs = pair(generator, case)
        # What other rules look at is left out, so that the champion's alone decides.
        figures = {policy.metric: measure_one(policy.metric, targets, mine), "per_class": [], "ece": 0.0}
        champion = ChampionEvidence("1", theirs, "")
        evidence = Evidence("fine_tuned", targets, mine, figures, None, champion, None, 1.0, None)
        verdicts.append(decide(policy, evidence)["promoted"])
    held = binomtest(sum(verdicts), len(verdicts)).proportion_ci(method="wilson")
    return case._asdict() | {
        "promoted": sum(verdicts),
        "promoted_of_first_200": sum(verdicts[:200]),
        "interval": [round(float(held.low), 4), round(float(held.high), 4)],
    }


def pair(
    generator: np.random.Generator, case: Case
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Draw targets (N,) and both models' probabilities (N, classes)."""
    only_mine = (case.disagreement + case.gain) / 2
    only_theirs = case.disagreement - only_mine
    both = ACCURACY - only_theirs
    kind = generator.choice(4, case.images, p=[both, only_mine, only_theirs, 1 - both - case.disagreement])
    targets = generator.integers(0, CLASSES, case.images)
    made = []
    for right in (kind <= 1, (kind == 0) | (kind == 2)):
        wrong = (targets + generator.integers(1, CLASSES, case.images)) % CLASSES
        chances = np.full((case.images, CLASSES), 0.1 / (CLASSES - 1), np.float32)
        chances[np.arange(case.images), np.where(right, targets, wrong)] = 0.9
        made.append(chances)
    return targets, made[0], made[1]


def refused_for_calibration(shape: tuple[int, float, int]) -> dict[str, Any]:
    """Score models whose logits are ``flat`` times too large; return how many the default bound of 0.1 refuses."""
    images, flat, models = shape
    generator, policy = np.random.default_rng([images, int(flat * 10)]), parse_policy("")
    classes, refused, errors = [str(c) for c in range(CLASSES)], 0, []
    for _ in range(models):
        true = generator.normal(0, 3, (images, CLASSES))
        # The largest of logits with Gumbel noise is a draw from their softmax.
        targets = (true + generator.gumbel(size=true.shape)).argmax(1)
        logits = (true * flat).astype(np.float32)
        figures = score(targets, logits, classes, EvaluateSettings(resamples=300))
        unjudged = ChampionEvidence("1", None, "not compared here")
        evidence = Evidence("baseline", targets, logits, figures, None, unjudged, None, 1.0, None)
        rule = next(r for r in decide(policy, evidence)["rules"] if r["rule"] == "max_ece")
        refused += rule["passed"] is False
        errors.append(figures["ece"])
    return {"images": images, "logits_times": flat, "models": models, "refused": refused, "ece": float(np.mean(errors))}


def table(report: dict[str, Any]) -> str:
    lines = [
        "# The gate: who is promoted",
        "",
        "Written by `benchmarks/gate.py`, which says how the pairs are drawn. Champion: 87% accurate, 10 classes.",
        "",
        "| policy | true gain, points | one alone is right | test images | pairs | promoted | 95% interval | of the first 200 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in report["cases"]:
        rule = f"`{c['policy']}`" if c["policy"] else "default"
        lines.append(
            f"| {rule} | {100 * c['gain']:+.0f} | {c['disagreement']:.0%} | {c['images']:,} | {c['pairs']:,} | {c['promoted'] / c['pairs']:.1%}"
            f" | {c['interval'][0]:.1%} to {c['interval'][1]:.1%} | {c['promoted_of_first_200']} |"
        )
    lines += [
        "",
        "Calibration, by the default `max_ece: 0.1`:",
        "",
        "| logits | test images | models | mean ECE | refused |",
        "|---|---|---|---|---|",
    ]
    for c in report["calibration"]:
        logits = "calibrated" if c["logits_times"] == 1 else f"{c['logits_times']:g} times too large"
        lines.append(
            f"| {logits} | {c['images']:,} | {c['models']} | {c['ece']:.3f} | {c['refused'] / c['models']:.0%} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
