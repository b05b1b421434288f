"""Near-duplicates across splits: how many planted ones are found, how many clean images are flagged, seconds and memory by count.

    python benchmarks/near_duplicates.py --output benchmarks/results

The planted set is Fashion-MNIST (70,000 pictures, scaled to 256 pixels, half PNG and half JPEG) and 30,000 copies of its pictures in another
split, each scaled, encoded anew, cropped to 95 % of both sides, or all of that. The clean sets are Fashion-MNIST itself, scikit-learn's digits,
and patches, which share no pixel, of scikit-learn's two photographs; the last two have copies planted as well. A million images are mixtures of
two pictures each, a tenth of them twice, with noise. Fashion-MNIST has true duplicates of its own, across splits: ``--sheet`` draws the flagged
pairs of the clean set, and those in which the eye sees one product are listed below.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from graftwork.duplicates import SIDE, Pairs, near_duplicates, signature

SIZE = 256
KINDS = ["scaled", "PNG", "JPEG 95", "JPEG 75", "JPEG 50", "JPEG 30", "cropped", "scaled, cropped, JPEG 30-95"]
FILTERS = [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]
# Pairs of the clean Fashion-MNIST (positions in train, then test) that show the same product, looked at one by one, in doubt left out.
SAME_PRODUCT = {
    (21295, 43549), (21295, 29413), (20554, 36357), (58762, 69867), (62115, 64926), (12981, 50759), (753, 21295),
    (5453, 31038), (24633, 51970), (65886, 68859), (40753, 44342), (59025, 64926), (5503, 28024), (24208, 56477),
    (18494, 64926), (2782, 46995), (61168, 62063), (1021, 29806), (3350, 53657), (3116, 36319), (334, 4849),
    (14768, 66748), (18015, 31235), (45560, 69883), (40709, 68340),
}  # fmt: skip
Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]  # thumbnails and mean colours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1000,10000,100000,1000000")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--sheet", type=Path, help="a PNG file for the flagged pairs of clean Fashion-MNIST")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker)))
        return
    report: dict[str, Any] = {"signature": signature_cost(), "sets": {}, "cost": []}
    with ProcessPoolExecutor() as pool:
        order = np.random.default_rng(0).permutation(len(fashion()))
        bases = order[: len(order) * 3 // 7]
        clean = signatures(pool, fashion_signature, range(len(order)))
        copies = signatures(pool, fashion_copy, [(int(base), n % len(KINDS)) for n, base in enumerate(bases)])
        report["sets"]["Fashion-MNIST"] = judged("fashion", clean, copies, bases, options.sheet)
        print(report["sets"]["Fashion-MNIST"], flush=True)
        for name, images in (("digits", digits()), ("patches of photographs", patches())):
            everyone = np.arange(len(images))
            whole = signatures(pool, signature_of, images)
            changed = signatures(pool, copy_of, [(image, n, n % len(KINDS)) for n, image in enumerate(images)])
            report["sets"][name] = judged(name, whole, changed, everyone, None)
            print(report["sets"][name], flush=True)
    for count in map(int, options.counts.split(",")):
        with tempfile.TemporaryDirectory(prefix="graftwork-duplicates-") as temporary:
            planted = count * 3 // 10 if count <= len(order) + len(bases) else count // 10
            if count <= len(order) + len(bases):
                rows = order[: count - planted]
                thumbs, colours = (np.concatenate([a[rows], b[:planted]]) for a, b in zip(clean, copies, strict=True))
                splits = np.concatenate([random_splits(len(fashion()))[rows], other_splits(bases[:planted])])
            else:
                thumbs, colours, splits = mixtures(clean[0], count)
            np.savez(Path(temporary) / "set.npz", thumbs=thumbs, colours=colours, splits=splits)
            del thumbs, colours, splits
            command = [sys.executable, __file__, "--worker", str(Path(temporary) / "set.npz")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        report["cost"].append({"images": count, "planted": planted, **json.loads(done.stdout.strip().splitlines()[-1])})
        print(report["cost"][-1], flush=True)
    write(report, options.output)


# Data


@cache
def fashion() -> npt.NDArray[np.uint8]:
    from graftwork.sources.arrays import fashion_mnist

    splits = fashion_mnist().splits
    return np.concatenate([splits["train"][0], splits["test"][0]])


def fashion_image(number: int) -> Image.Image:
    picture = Image.fromarray(fashion()[number]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return encoded(picture, 90 if number % 2 else None)


def digits() -> list[Image.Image]:
    from sklearn.datasets import load_digits

    return [
        Image.fromarray((d * (255 / 16)).round().astype(np.uint8)).resize((128, 128), Image.Resampling.BICUBIC)
        for d in load_digits().images
    ]


def patches() -> list[Image.Image]:
    """Patches of 64 x 64 and of 128 x 128 pixels; those of clear sky, a contrast of six grey levels and less, show nothing to find again."""
    from sklearn.datasets import load_sample_images

    found = []
    for photo in load_sample_images().images:
        image = Image.fromarray(photo)
        for side in (64, 128):
            for top in range(0, image.height - side + 1, side):
                found += [
                    image.crop((left, top, left + side, top + side)) for left in range(0, image.width - side + 1, side)
                ]
    return [patch for patch in found if signature(patch).contrast > 6]


def encoded(image: Image.Image, quality: int | None) -> Image.Image:
    buffer = io.BytesIO()
    if quality:
        image.save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "PNG", compress_level=1)
    return Image.open(buffer)


def changed(image: Image.Image, kind: int, seed: int) -> Image.Image:
    name, random = KINDS[kind], np.random.default_rng(seed)
    if "cropped" in name:
        width, height = round(0.95 * image.width), round(0.95 * image.height)
        left, top = int(random.integers(image.width - width + 1)), int(random.integers(image.height - height + 1))
        image = image.crop((left, top, left + width, top + height))
    if "scaled" in name:
        factor = 2 ** random.uniform(-1, 1)
        size = round(image.width * factor), round(image.height * factor)
        image = image.resize(size, FILTERS[random.integers(3)])
    if "JPEG" in name:
        return encoded(image, int(random.integers(30, 96)) if "-" in name else int(name.split()[-1]))
    return encoded(image, None)


def signature_of(image: Image.Image) -> tuple[bytes, bytes]:
    return signature(image)[:2]


def copy_of(task: tuple[Image.Image, int, int]) -> tuple[bytes, bytes]:
    image, seed, kind = task
    return signature_of(changed(image, kind, seed))


def fashion_signature(number: int) -> tuple[bytes, bytes]:
    return signature_of(fashion_image(number))


def fashion_copy(task: tuple[int, int]) -> tuple[bytes, bytes]:
    number, kind = task
    return signature_of(changed(fashion_image(number), kind, number))


def signatures(pool: ProcessPoolExecutor, make: Callable[[Any], tuple[bytes, bytes]], items: Any) -> Arrays:
    made = list(pool.map(make, items, chunksize=100))
    thumbs = np.frombuffer(b"".join(thumb for thumb, _ in made), np.uint8).reshape(len(made), SIDE * SIDE)
    return thumbs, np.frombuffer(b"".join(colour for _, colour in made), np.uint8).reshape(len(made), 3)


def random_splits(count: int) -> npt.NDArray[np.int8]:
    """80 % train, 10 % each of the others."""
    return np.random.default_rng(1).choice(np.array([0, 1, 2], np.int8), count, p=[0.8, 0.1, 0.1])


def other_splits(bases: npt.NDArray[np.int64], count: int = 0) -> npt.NDArray[np.int8]:
    """For a copy of each of ``bases``: of train in val or test, of val and test in train."""
    own = random_splits(count or len(fashion()))[bases]
    return np.where(own == 0, 1 + bases % 2, 0).astype(np.int8)


def mixtures(pictures: npt.NDArray[np.uint8], count: int) -> tuple[npt.NDArray[np.uint8], Any, npt.NDArray[np.int8]]:
    random = np.random.default_rng(2)
    thumbs = np.empty((count, SIDE * SIDE), np.uint8)
    splits = random_splits(count)
    twice = count // 10
    for start in range(0, count, 20_000):
        part = thumbs[start : start + 20_000]
        one, other = random.integers(0, len(pictures), (2, len(part)))
        weight = random.uniform(0.2, 0.8, (len(part), 1)).astype(np.float32)
        part[:] = pictures[one] * weight + pictures[other] * (1 - weight)
    noise = random.integers(-2, 3, (20_000, SIDE * SIDE))
    for start in range(0, twice, 20_000):
        part = thumbs[start : min(start + 20_000, twice)]
        thumbs[-twice + start :][: len(part)] = np.clip(part + noise[: len(part)], 0, 255)
    splits[-twice:] = np.where(splits[:twice] == 0, 1, 0)
    return thumbs, np.repeat(thumbs.mean(1).round().astype(np.uint8)[:, None], 3, 1), splits


# Measurements


def judged(
    name: str, clean: Arrays, copies: Arrays, bases: npt.NDArray[np.int64], sheet: Path | None
) -> dict[str, Any]:
    """Search the set with and without its copies; ``bases`` are the originals of the copies, whose kinds take turns."""
    count = len(clean[0])
    splits = random_splits(count)
    found = search(clean, splits)
    flagged = np.unique(np.concatenate([found.first, found.second]))
    result: dict[str, Any] = {"clean": {"images": count, "pairs": len(found.first), "flagged": len(flagged)}}
    result["clean"]["flagged_share"] = len(flagged) / count
    if name == "fashion":
        pairs = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
        others = [pair for pair in pairs if pair not in SAME_PRODUCT]
        result["clean"] |= {
            "same_product_pairs": len(pairs) - len(others),
            "flagged_wrongly": len({image for pair in others for image in pair}),
            "flagged_wrongly_share": len({image for pair in others for image in pair}) / count,
        }
        if sheet:
            draw(clean[0], found, sheet)
    both: Any = tuple(np.concatenate([a, b]) for a, b in zip(clean, copies, strict=True))
    found = search(both, np.concatenate([splits, other_splits(bases, count)]))
    hits = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    recall: dict[str, Any] = {}
    got = np.array([(int(base), count + n) in hits for n, base in enumerate(bases)])
    for kind, title in enumerate(KINDS):
        of_kind = got[np.arange(len(got)) % len(KINDS) == kind]
        recall[title] = {"planted": len(of_kind), "found": int(of_kind.sum()), "recall": float(of_kind.mean())}
    recall["all"] = {"planted": len(got), "found": int(got.sum()), "recall": float(got.mean())}
    return result | {"planted": recall}


def search(arrays: Arrays, splits: npt.NDArray[np.int8]) -> Pairs:
    return near_duplicates(*arrays, splits, np.arange(len(splits)))


def measure(file: Path) -> dict[str, Any]:
    """Search one set in this process, three times up to 100,000 images; the first, which pays for starting up, sets the peak."""
    with np.load(file) as arrays:
        thumbs, colours, splits = arrays["thumbs"], arrays["colours"], arrays["splits"]
    before = peak_mib()
    runs = []
    for _ in range(3 if len(thumbs) <= 100_000 else 1):
        wall, cpu = time.perf_counter(), time.process_time()
        found = search((thumbs, colours), splits)
        runs.append((time.perf_counter() - wall, time.process_time() - cpu))
    seconds, cpu_seconds = min(runs)
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "input_mib": round(thumbs.nbytes / 2**20),
        "peak_mib_beyond_input": round(peak_mib() - before),
        "pairs": len(found.first),
        "load_average": round(
            os.getloadavg()[0], 1
        ),  # of more than the cores: others worked too, and the CPU seconds say more
    }


def peak_mib() -> float:
    """Return the most memory that this process has held (ru_maxrss would count its parent's, before the exec)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def signature_cost() -> dict[str, float]:
    """Microseconds for one decoded image, by its side: the best of many, since others use the machine too."""
    random, result = np.random.default_rng(0), {}
    for side in (64, 128, 256):
        image = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        result[f"{side} x {side}"] = round(1e6 * min(map(partial(timed, signature, image), range(500))), 1)
    return result


def timed(function: Callable[[Any], Any], argument: Any, _: int) -> float:
    began = time.perf_counter()
    function(argument)
    return time.perf_counter() - began


# Reporting


def draw(thumbs: npt.NDArray[np.uint8], found: Pairs, file: Path) -> None:
    columns, width, height = 8, 150, 84
    rows = -(-len(found.first) // columns)
    sheet = Image.new("L", (columns * width, rows * height), 128)
    pen = ImageDraw.Draw(sheet)
    for number, (first, second, score) in enumerate(zip(*found, strict=True)):
        left, top = number % columns * width, number // columns * height
        pen.text((left, top), f"{first} {second} {score:.3f}", fill=255)
        for side, image in enumerate((first, second)):
            picture = Image.fromarray(thumbs[image].reshape(SIDE, SIDE)).resize((68, 68))
            sheet.paste(picture, (left + side * 70, top + 13))
    sheet.save(file)


def write(report: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "near_duplicates.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sets = report["sets"]
    lines = ["Planted near-duplicates that were found, by kind:", "", "| | " + " | ".join(sets) + " |"]
    lines.append("|---|" + "---:|" * len(sets))
    for kind in [*KINDS, "all"]:
        cells = [sets[s]["planted"][kind] for s in sets]
        lines.append(f"| {kind} | " + " | ".join(f"{c['recall']:.2%} of {c['planted']:,}" for c in cells) + " |")
    lines += ["", "Clean images that were flagged:", "", "| | images | flagged | share |", "|---|---:|---:|---:|"]
    for name, results in sets.items():
        clean = results["clean"]
        lines.append(f"| {name} | {clean['images']:,} | {clean['flagged']} | {clean['flagged_share']:.3%} |")
        if "flagged_wrongly" in clean:
            wrong, share = clean["flagged_wrongly"], clean["flagged_wrongly_share"]
            lines.append(f"| {name}, less pairs of the same product | {clean['images']:,} | {wrong} | {share:.3%} |")
    lines += ["", "| images | planted | pairs | seconds | CPU seconds | input | peak memory beyond it |"]
    lines.append("|" + "---:|" * 7)
    for c in report["cost"]:
        counts = " | ".join(f"{c[key]:,}" for key in ("images", "planted", "pairs"))
        memory = " | ".join(f"{c[key]:,} MiB" for key in ("input_mib", "peak_mib_beyond_input"))
        lines.append(f"| {counts} | {c['seconds']} | {c['cpu_seconds']} | {memory} |")
    cost = ", ".join(f"{microseconds} µs at {size}" for size, microseconds in report["signature"].items())
    lines += ["", f"A signature costs {cost}, beside decoding."]
    (output / "near_duplicates.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
