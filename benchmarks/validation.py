"""Validation at 1,000 to 1,000,000 rows: seconds and peak memory; and how many of the faults planted in a dataset it finds.

    python benchmarks/validation.py --rows 1000,10000,100000,1000000 --planted 20000 --output benchmarks/results

Rows are made: a manifest and signatures of different pictures, without the pictures (a rule looks at none). Planted faults are in real pictures,
Fashion-MNIST's, scaled to 96 pixels, packed and validated as a user's are: exact copies across the splits, pictures under two labels, groups on two
sides, blank ones, a shift in the shares of the classes. Near duplicates have a benchmark of their own (``near_duplicates.py``).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000,10000,100000,1000000")
    parser.add_argument("--planted", type=int, default=20_000, help="pictures among which faults are planted; 0: none")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "NEAR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(Path(options.child[0]), options.child[1] == "near")))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="graftwork-validation-") as temporary:
        for number in map(int, filter(None, options.rows.split(","))):
            folder = Path(temporary) / str(number)
            make(folder, number)
            for near in ("near", "far"):
                command = [sys.executable, __file__, "--child", str(folder), near]
                found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                rows.append({"rows": number, "near_duplicates": near == "near", **json.loads(found.splitlines()[-1])})
                print(rows[-1], flush=True)
        faults = planted(Path(temporary) / "planted", options.planted) if options.planted else []
    write(rows, faults, options.output)


def make(folder: Path, number: int) -> None:
    """Write a Dataset artifact of ``number`` rows in 100 classes, a thousandth of them copies, with a smooth random thumbnail each."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from graftwork.dataset import FORMAT, SCHEMA, SPLITS
    from graftwork.duplicates import SIDE
    from graftwork.image_looks import SIGNATURE

    random = np.random.default_rng(0)
    classes = [f"class {n:03d}" for n in range(100)]
    labels = random.integers(0, 100, number)
    splits = np.array(["train", "val", "test"])[np.searchsorted([0.64, 0.8], random.random(number))]
    sha256 = np.array([f"{n:064x}" for n in random.integers(0, 2**62, number)])
    folder.mkdir(parents=True)
    with pq.ParquetWriter(folder / "signatures.parquet", SIGNATURE, compression="zstd") as writer:
        for start in range(0, number, 10_000):
            count = min(10_000, number - start)
            small = random.normal(size=(count, 9, 9))
            edges = np.linspace(0, 8, SIDE)
            low = np.minimum(edges.astype(int), 7)
            part = edges - low
            wide = small[:, :, low] * (1 - part) + small[:, :, low + 1] * part
            tall = wide[:, low] * (1 - part)[:, None] + wide[:, low + 1] * part[:, None]
            thumbs = np.clip(128 + 50 * tall, 0, 255).astype(np.uint8).reshape(count, -1)
            looks = {
                "thumb": pa.array([t.tobytes() for t in thumbs], SIGNATURE.field("thumb").type),
                "colour": pa.array([bytes(c) for c in random.integers(60, 200, (count, 3), np.uint8)], pa.binary(3)),
                "brightness": pa.array(thumbs.mean(1), pa.float32()),
                "contrast": pa.array(thumbs.std(1), pa.float32()),
                "saturation": pa.array(random.uniform(0, 90, count), pa.float32()),
            }
            writer.write_table(pa.table(looks, schema=SIGNATURE))
    columns: dict[str, Any] = {
        "id": [s[-20:] for s in sha256],
        "label": np.array(classes)[labels],
        "split": splits,
        "source": [f"{classes[c]}/{n:08d}.jpg" for n, c in enumerate(labels)],
        "sha256": sha256,
        "width": np.full(number, 256),
        "height": random.integers(150, 400, number),
        "mode": ["RGB"] * number,
        "bytes": np.full(number, 15_000),
        "shard": ["00000.tar"] * number,
        "offset": np.arange(number) * 16_384,
        "length": np.full(number, 15_000),
        "group": [f"group {n // 5}" for n in range(number)],
        "time": [""] * number,
        "weight": np.ones(number),
        "signature": np.arange(number),
    }
    # Five rows a group, all of one side.
    columns["split"] = splits[np.arange(number) // 5 * 5]
    table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in SCHEMA}, schema=SCHEMA)
    pq.write_table(table, folder / "manifest.parquet")
    counts: dict[str, dict[str, int]] = {s: dict.fromkeys(classes, 0) for s in SPLITS}
    for split, label in zip(columns["split"], columns["label"], strict=True):
        counts[split][label] += 1
    info = {"format": FORMAT, "name": "made", "source": "made", "digest": "0" * 32, "classes": classes, "counts": counts,
            "broken": [], "skipped": {}, "settings": {"max_pixels": 10**8}}  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(info), encoding="utf-8")


def child(folder: Path, near: bool) -> dict[str, Any]:
    started = time.time()
    from graftwork.dataset import open_dataset
    from graftwork.settings import ValidateSettings
    from graftwork.validate import validate

    result = validate(open_dataset(folder), ValidateSettings(near_duplicates=near))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    failed = [r["rule"] for r in result.summary["rules"] if not r["passed"]]
    return {"seconds": round(time.time() - started, 2), "peak_mib": round(peak), "failed": failed}


def planted(folder: Path, number: int) -> list[dict[str, Any]]:
    """Plant one percent of each fault, pack and validate; return how many were found, and how many sound pictures were named."""
    import numpy as np
    from PIL import Image

    from graftwork.dataset import open_dataset
    from graftwork.drift import profile
    from graftwork.ingest import ingest
    from graftwork.settings import IngestSettings, ValidateSettings
    from graftwork.sources.arrays import fashion_mnist
    from graftwork.validate import standard_rules, tables

    random = np.random.default_rng(0)
    arrays = fashion_mnist()
    images, labels = arrays.splits["train"]
    some = number // 100
    (folder / "images").mkdir(parents=True)
    rows: list[list[str]] = []

    def add(name: str, picture: Any, label: str, split: str, group: str = "") -> str:
        picture.save(folder / "images" / name, quality=90)
        rows.append([f"images/{name}", label, split, group])
        return f"images/{name}"

    def picture(n: int) -> Any:
        return Image.fromarray(images[n]).resize((96, 96), Image.Resampling.BICUBIC)

    splits = np.array(["train", "val", "test"])[np.searchsorted([0.64, 0.8], random.random(number))]
    for n in range(number):
        add(f"{n}.jpg", picture(n), arrays.classes[labels[n]], splits[n])
    faults: dict[str, set[str]] = {"content_in_one_split": set(), "content_has_one_label": set(), "not_blank": set(), "group_in_one_split": set()}  # fmt: skip
    chosen = random.permutation(number)
    for n in chosen[:some]:
        other = "test" if splits[n] == "train" else "train"
        faults["content_in_one_split"] |= {add(f"leak{n}.jpg", picture(n), rows[n][1], other), rows[n][0]}
    for n in chosen[some : 2 * some]:
        other = arrays.classes[(labels[n] + 1) % 10]
        faults["content_has_one_label"] |= {add(f"conflict{n}.jpg", picture(n), other, splits[n]), rows[n][0]}
    for n in range(some):
        shade = Image.new("L", (96, 96), int(random.integers(0, 256)))
        shade.putpixel((n % 96, n // 96), 128)  # no two are the same file
        faults["not_blank"].add(add(f"blank{n}.png", shade, arrays.classes[n % 10], "train"))
    for n in chosen[2 * some : 3 * some]:
        for split in ("train", "test"):
            m = number + int(n) + (30_000 if split == "test" else 0)
            faults["group_in_one_split"].add(
                add(
                    f"group{m}.jpg",
                    picture(m % len(images)).rotate(7),
                    arrays.classes[labels[m % len(images)]],
                    split,
                    f"patient {n}",
                )
            )
    lines = ["path,label,split,group", *(",".join(row) for row in rows)]
    (folder / "all.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ingest(IngestSettings(data=str(folder / "all.csv")), folder / "dataset")
    data = open_dataset(folder / "dataset")
    settings = ValidateSettings(near_duplicates=False)
    found = tables(data, settings, None)
    names = found.examples["source"]
    results = []
    for rule in standard_rules(found, data, settings, None):
        if rule.name in faults and rule.bad is not None:
            named, wanted = set(names.iloc[rule.bad]), faults[rule.name]
            results.append(
                {"fault": rule.name, "planted": len(wanted), "found": len(named & wanted), "false": len(named - wanted), "sound": len(names) - len(wanted)}
            )  # fmt: skip
    # A shift: three quarters of two classes left out.
    kept = [r for n, r in enumerate(rows) if r[1] not in arrays.classes[:2] or n % 4 == 0]
    (folder / "shifted.csv").write_text("\n".join([lines[0], *(",".join(r) for r in kept)]) + "\n", encoding="utf-8")
    ingest(IngestSettings(data=str(folder / "shifted.csv")), folder / "shifted")
    again = random.permutation(len(rows))[: len(rows) // 2]
    (folder / "half.csv").write_text(
        "\n".join([lines[0], *(",".join(rows[n]) for n in sorted(again))]) + "\n", encoding="utf-8"
    )
    ingest(IngestSettings(data=str(folder / "half.csv")), folder / "half")
    settings = ValidateSettings(near_duplicates=False)
    for name, expected in (("shifted", 1), ("half", 0)):
        other = open_dataset(folder / name)
        whole = tables(other, settings, profile(data)).dataset.iloc[0]
        drifted = [k for k in whole.index if k.startswith("drift_") and whole[k] > settings.max_drift]
        print(name, dict(whole), flush=True)
        shares = "drift_class_shares" in drifted
        others = len(set(drifted) - {"drift_class_shares"})
        false = others + (shares and not expected)
        results.append(
            {
                "fault": f"class shares, {name}",
                "planted": expected,
                "found": int(shares and bool(expected)),
                "false": false,
                "sound": 6 - expected,
            }
        )
    for row in results:
        print(row, flush=True)
    return results


def write(rows: list[dict[str, Any]], faults: list[dict[str, Any]], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "validation.json").write_text(
        json.dumps({"rows": rows, "planted": faults}, indent=1) + "\n", encoding="utf-8"
    )
    lines = ["| rows | near duplicates looked for | seconds | peak memory, MiB |", "|---:|---|---:|---:|"]
    lines += [
        f"| {r['rows']:,} | {'yes' if r['near_duplicates'] else 'no'} | {r['seconds']:.1f} | {r['peak_mib']:,} |"
        for r in rows
    ]
    if faults:
        lines += ["", "| planted fault | planted | found | sound ones named |", "|---|---:|---:|---:|"]
        lines += [
            f"| {f['fault']} | {f['planted']:,} | {f['found']:,} | {f['false']:,} of {f['sound']:,} |" for f in faults
        ]
    (output / "validation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
