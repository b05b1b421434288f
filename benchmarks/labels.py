"""Baseline, fine-tuned and chosen model by labels a class: is the chosen one ever worse than frozen features?

    python benchmarks/labels.py --data fashion-mnist:96,digits:64 --per-class 5,10,30,100 --seeds 0,1,2 --output benchmarks/results
    python benchmarks/labels.py --curve runs/learning-curve-.../curve.json        # adds what a learning curve has measured

Rows that are there already stay, unless they are measured again. The settings are the pipeline's defaults. The choice is made on validation, as the
pipeline makes it; what is shown is the accuracy on the test images.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist:96,digits:64", help="NAME:PIXELS, with commas between them")
    parser.add_argument("--per-class", default="5,10,30,100,600")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--test-per-class", type=int, default=200)
    parser.add_argument("--curve", type=Path, help="curve.json of 'graftwork learning-curve'")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if options.curve:
        write(of_curve(json.loads(options.curve.read_text(encoding="utf-8"))), options.output)
        return
    rows: list[dict[str, Any]] = []
    for data in options.data.split(","):
        name, _, size = data.partition(":")
        for per_class in map(int, options.per_class.split(",")):
            for seed in map(int, options.seeds.split(",")):
                with tempfile.TemporaryDirectory(prefix="graftwork-labels-") as folder:
                    rows.append(measure(Path(folder), name, int(size), per_class, seed, options.test_per_class))
                print(rows[-1], flush=True)
                write(rows, options.output)


def measure(folder: Path, name: str, size: int, per_class: int, seed: int, test_per_class: int) -> dict[str, Any]:
    from graftwork.baseline import train_baseline
    from graftwork.dataset import open_dataset
    from graftwork.evaluate import evaluate
    from graftwork.features import extract_features
    from graftwork.finetune import fine_tune
    from graftwork.ingest import ingest
    from graftwork.settings import EvaluateSettings, FeatureSettings, FineTuneSettings, IngestSettings

    source = IngestSettings(data=name, train_per_class=per_class, test_per_class=test_per_class, seed=seed)
    ingest(source, folder / "data")
    data = open_dataset(folder / "data")
    embeddings = extract_features(data, FeatureSettings(image_size=size, seed=seed), folder / "embeddings")
    train_baseline(folder / "embeddings", folder / "baseline")
    info = fine_tune(data, folder / "baseline", FineTuneSettings(seed=seed), folder / "tuned")
    models = {"baseline": folder / "baseline", "fine_tuned": folder / "tuned"}
    result = evaluate(data, models, EvaluateSettings(), folder / "evaluation")
    test = {k: c["test"]["accuracy"] for k, c in result["candidates"].items()}
    val = {f"val_{k}": c["val"]["val"]["val_accuracy"] for k, c in result["candidates"].items()}
    return {
        "data": name,
        "per_class": per_class,
        "seed": seed,
        **test,
        "chosen": result["chosen"],
        "chosen_accuracy": test[result["chosen"]],
        **val,
        "flip": embeddings["augmentation"]["flip"],
        "training_seconds": round(info["training_seconds"], 1),
    }


def of_curve(curve: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows as ``measure`` gives them, of a learning curve: the control from scratch is no candidate here."""
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    for point in curve["points"]:
        cells.setdefault((point["per_class"], point["seed"]), {})[point["candidate"]] = point
    rows = []
    for (per_class, seed), by_candidate in cells.items():
        tried = {name: by_candidate[name] for name in ("baseline", "fine_tuned")}
        chosen = next((n for n, p in tried.items() if p["chosen"]), "")
        if not chosen:
            raise SystemExit(f"{per_class} a class, seed {seed}: the control was chosen; measure this one by itself")
        rows.append(
            {
                "data": curve["data"]["name"] if isinstance(curve["data"], dict) else curve["data"],
                "per_class": per_class,
                "seed": seed,
                **{n: p["test_accuracy"] for n, p in tried.items()},
                "chosen": chosen,
                "chosen_accuracy": tried[chosen]["test_accuracy"],
                **{f"val_{n}": p["val_accuracy"] for n, p in tried.items()},
                "training_seconds": round(tried["fine_tuned"]["seconds"], 1),
            }
        )
    return rows


def write(rows: list[dict[str, Any]], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    kept = json.loads((output / "labels.json").read_text(encoding="utf-8")) if (output / "labels.json").exists() else []
    merged = {(r["data"], r["per_class"], r["seed"]): r for r in [*kept, *rows]}
    rows = [merged[key] for key in sorted(merged, key=lambda k: (k[0] == "digits", *k))]
    (output / "labels.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lines = [
        "Test accuracy, mean (least–greatest) over seeds; difference of the chosen model to the baseline in points, mean and worst.",
        "",
        "| data | labels a class | seeds | frozen features | fine-tuned | chosen | chosen − frozen | worst |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, per_class in dict.fromkeys((r["data"], r["per_class"]) for r in rows):
        some = [r for r in rows if (r["data"], r["per_class"]) == (name, per_class)]
        gains = [100 * (r["chosen_accuracy"] - r["baseline"]) for r in some]
        cells = [spread([r[k] for r in some]) for k in ("baseline", "fine_tuned", "chosen_accuracy")]
        lines.append(
            f"| {name} | {per_class} | {len(some)} | {' | '.join(cells)} | {statistics.mean(gains):+.2f} | {min(gains):+.2f} |"
        )
    (output / "labels.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f}–{max(values):.4f})"


if __name__ == "__main__":
    main()
