"""Peak memory of extracting features and of fine-tuning, with ten times the images, past the share that may be held in memory.

    python benchmarks/memory.py --counts 10000,100000 --output benchmarks/results

Each measurement is a process of its own; its peak is the kernel's own figure for it (maximum resident set size).
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

BACKBONE, SIZE = "test_resnet", 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="10000,100000")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker[0], Path(options.worker[1]))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="graftwork-memory-") as temporary:
        os.environ |= {"GRAFTWORK_CACHE": temporary, "OMP_WAIT_POLICY": "PASSIVE"}
        for count in map(int, options.counts.split(",")):
            folder = Path(temporary) / str(count)
            make_dataset(folder, count)
            for step in ("extract_features", "fine_tune"):
                done = subprocess.run(
                    [sys.executable, __file__, "--worker", step, str(folder)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                rows.append({"step": step, "images": count, **json.loads(done.stdout.strip().splitlines()[-1])})
                print(rows[-1], flush=True)
    write(rows, options.output)


def make_dataset(folder: Path, count: int) -> None:
    """Write a Dataset artifact of ``count`` small random images, a hundredth for validation, without going through a source of files."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from graftwork.dataset import FORMAT, SCHEMA

    random = np.random.default_rng(0)
    classes = [f"class {n}" for n in range(10)]
    (folder / "data" / "shards").mkdir(parents=True)
    rows = []
    for start in range(0, count, 10_000):
        shard = f"train-{start // 10_000:05d}.tar"
        with tarfile.open(folder / "data" / "shards" / shard, "w") as tar:
            for n in range(start, min(start + 10_000, count)):
                buffer = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(
                    buffer, "PNG", compress_level=0
                )
                entry = tarfile.TarInfo(f"{n:08d}.png")
                entry.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(entry, buffer)
                rows.append(
                    {
                        "id": f"{n:08d}",
                        "label": classes[n % 10],
                        "split": "val" if n % 100 < 10 and n % 1000 < 100 else "train",
                        "source": f"{n:08d}.png",
                        "sha256": f"{n:064x}",
                        "width": SIZE,
                        "height": SIZE,
                        "mode": "RGB",
                        "bytes": entry.size,
                        "shard": shard,
                        "offset": tar.offset - -(-entry.size // 512) * 512,
                        "length": entry.size,
                    }
                )
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "data" / "manifest.parquet")
    info = {"format": FORMAT, "name": "random", "source": "random", "digest": f"random-{count}", "classes": classes}
    info |= {"settings": {"max_pixels": 10**8}, "counts": {}, "broken": []}
    (folder / "data" / "dataset.json").write_text(json.dumps(info), encoding="utf-8")


def work(step: str, folder: Path) -> None:
    from graftwork.dataset import open_dataset

    data = open_dataset(folder / "data")
    began = time.perf_counter()
    if step == "extract_features":
        import timm
        import torch
        from safetensors.torch import save_file

        from graftwork.features import extract_features
        from graftwork.settings import FeatureSettings

        torch.manual_seed(0)
        state = timm.create_model(BACKBONE, pretrained=False).state_dict()
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "weights.safetensors")
        features = FeatureSettings(
            backbone=BACKBONE, weights=str(folder / "weights.safetensors"), image_size=SIZE, views=1, memory_share=0
        )
        extract_features(data, features, folder / "embeddings")
    else:
        from safetensors.torch import load_file, save_file

        from graftwork.finetune import fine_tune
        from graftwork.model import read_info
        from graftwork.settings import FineTuneSettings

        # A probe of zeros: what fitting one needs is no part of this measurement.
        backbone = folder / "embeddings" / "backbone"
        head = read_info(backbone)["head"]
        state = load_file(backbone / "model.safetensors")
        save_file(
            {k.removeprefix(f"{head}."): v for k, v in state.items() if k.startswith(head)},
            backbone / "probe.safetensors",
        )
        settings = FineTuneSettings(strategy="full", epochs=1, batch_size=64, memory_share=0)
        fine_tune(data, backbone, settings, folder / "model")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": round(peak), "seconds": round(time.perf_counter() - began, 1)}))


def write(rows: list[dict[str, Any]], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "memory.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lines = ["| step | images | peak memory | seconds |", "|---|---:|---:|---:|"]
    lines += [f"| {r['step']} | {r['images']:,} | {r['peak_mib']:,} MiB | {r['seconds']} |" for r in rows]
    (output / "memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
