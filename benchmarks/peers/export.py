"""Write the very examples that graftwork trains and tests on as a plain folder of images, train|val|test/CLASS/*.png, for every contestant to read.

Run with graftwork's Python. Exporting is not timed: no contestant does it.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

from graftwork.dataset import SPLITS, open_dataset
from graftwork.ingest import ingest
from graftwork.settings import IngestSettings


def export(seed: int, folder: Path) -> dict[str, int]:
    """Export Fashion-MNIST, 100 images a class to train, 25 to validate and 200 to test; return the images in each split."""
    settings = IngestSettings(data="fashion-mnist", train_per_class=100, test_per_class=200, seed=seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        ingest(settings, Path(temporary) / "dataset")
        dataset = open_dataset(Path(temporary) / "dataset")
        for split in SPLITS:
            rows = dataset.split(split)
            names = zip(rows["label"].to_pylist(), rows["id"].to_pylist(), strict=True)
            for (label, name), data in zip(names, dataset.read(rows), strict=True):
                path = folder / split / label / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)  # the bytes as graftwork packed them: nothing is encoded again
                counts[split] += 1
    return dict(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="must not exist: a leftover image would be trained on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    print(json.dumps(export(arguments.seed, arguments.folder)))
