"""Labelling images in bulk: images a second from JPEG files to a Parquet table, beside the bare network's on batches that are ready in memory.

    python benchmarks/prediction.py MODEL --images 2000 --output benchmarks/results

The JPEGs, of 256 x 256 pixels, are Fashion-MNIST's, scaled up. Both run the network by the same plan, in turns, and the figures are the
medians of the rounds: reading, decoding, fitting and writing are what the difference is. The plan is made before; "plain" is the network
as a plain script runs it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
SIDE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Model folder")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="graftwork-prediction-") as temporary:
        found = measure(options.model, options.images, options.rounds, Path(temporary))
    print(json.dumps(found, indent=2))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "prediction.json").write_text(json.dumps(found, indent=2) + "\n")
    (options.output / "prediction.md").write_text(table(found))


def make(folder: Path, number: int) -> None:
    from PIL import Image

    from graftwork.sources.arrays import fashion_mnist

    images = fashion_mnist().splits["test"][0]
    for n in range(number):
        picture = Image.fromarray(images[n % len(images)]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        place = folder / f"{n // 1000:03d}" / f"{n:06d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.convert("RGB").save(place, quality=85)


def measure(folder: Path, number: int, rounds: int, work: Path) -> dict[str, Any]:
    import numpy as np
    import torch

    from graftwork.execution import Inference, machine, plain
    from graftwork.modality import inputs
    from graftwork.model import load_model
    from graftwork.predicting import find_examples, how_to_run, label_examples, loaded, table_writer

    before = os.getloadavg()
    make(work / "images", number)
    model = load_model(folder)
    images = find_examples([str(work / "images")], "image")
    first = [item for part in images.parts for item in part.items]
    execution = how_to_run(model, first, number, print)
    found = loaded(find_examples([str(work / "images")], "image").parts, model.preprocess, inputs("image"))
    ready = [one.example for one in found]
    pixels = torch.from_numpy(np.stack(ready))  # type: ignore[arg-type]
    runs = {
        name: Inference(model.network, model.preprocess, model.device, how)
        for name, how in {"bare": execution, "plain": plain(execution)}.items()
    }
    seconds: dict[str, list[float]] = {"bare": [], "plain": [], "predict": []}
    for n in range(rounds):
        for name, run in runs.items():
            if name == "plain" and n:  # slow, and beside the point
                continue
            run.module.to(memory_format=torch.channels_last if name == "bare" else torch.contiguous_format)
            run(pixels[:128])
            began = time.perf_counter()
            run(pixels)
            seconds[name].append(time.perf_counter() - began)
        began = time.perf_counter()
        with table_writer(work / "labels.parquet", model.classes) as write:
            for rows in label_examples(
                model, find_examples([str(work / "images")], "image"), lambda name, reason: None
            ):
                write(rows)
        seconds["predict"].append(time.perf_counter() - began)
    rate = {name: number / statistics.median(taken) for name, taken in seconds.items()}
    return {
        "images": number,
        "machine": machine(model.device),
        "backbone": model.info["backbone"],
        "size": model.preprocess.size,
        "execution": str(execution),
        "images_per_second": {name: round(value, 1) for name, value in rate.items()},
        "share_of_bare": round(rate["predict"] / rate["bare"], 3),
        "share_of_plain": round(rate["predict"] / rate["plain"], 3),
        "seconds": {name: [round(s, 2) for s in taken] for name, taken in seconds.items()},
        "load_before": [round(load, 2) for load in before],  # of other processes: more than 0 makes all of it noise
    }


def table(found: dict[str, Any]) -> str:
    rate = found["images_per_second"]
    return f"""# Labelling images in bulk

{found["images"]:,} JPEGs of {SIDE} x {SIDE} pixels, {found["backbone"]} at {found["size"]} pixels, {found["execution"]}; {found["machine"]}.

| | images/s | predict's share |
|---|---|---|
| JPEG files to a Parquet table (`graftwork predict`) | {rate["predict"]:.0f} | |
| the network alone, same plan, batches ready in memory | {rate["bare"]:.0f} | {found["share_of_bare"]:.0%} |
| the network alone, as a plain script runs it | {rate["plain"]:.0f} | {found["share_of_plain"]:.0%} |

`python benchmarks/prediction.py MODEL --images {found["images"]}`
"""


if __name__ == "__main__":
    main()
