"""fastai's recommended way: ``vision_learner`` on a timm name, ``aug_transforms()``, ``fine_tune(5)``; everything unnamed is fastai's default.

fastai's defaults, as of 2.8: batches of 64, a worker process a core, the head that ``vision_learner`` makes (concat pooling, two linear layers,
dropout), Adam with weight decay 0.01, one epoch of the head alone at 2e-3 and then 5 of everything at 1e-5 to 1e-3 in one cycle, last epoch kept.

Differences from a tutorial, each forced: the weights come from a file (fastai would ask timm's hub), so ``pretrained=False`` and loaded right after,
and the normalisation, which fastai adds when ``pretrained=True``, is named. ``fine_tune`` freezes the body itself.
"""

import argparse
import json
import time
from pathlib import Path

from fastai.vision.all import (
    ImageDataLoaders,
    Normalize,
    Resize,
    accuracy,
    aug_transforms,
    get_image_files,
    set_seed,
    vision_learner,
)
from pretrained import MEAN, NETWORK, SIZE, STD, body_weights


def main(folder: Path, seed: int) -> dict[str, float]:
    set_seed(seed)
    loaders = ImageDataLoaders.from_folder(
        folder,
        valid="val",
        item_tfms=Resize(SIZE),
        batch_tfms=[*aug_transforms(), Normalize.from_stats(MEAN, STD)],
    )
    learner = vision_learner(loaders, NETWORK, pretrained=False, metrics=accuracy)
    learner.model[0].model.load_state_dict(body_weights())  # strict: every tensor of the body
    started = time.perf_counter()
    learner.fine_tune(5)
    train_seconds = time.perf_counter() - started
    files = get_image_files(folder / "test")
    _, test_accuracy = learner.validate(dl=loaders.test_dl(files, with_labels=True))
    return {
        "test_accuracy": float(test_accuracy),
        "train_seconds": train_seconds,
        "train_images": len(loaders.train_ds),
        "val_images": len(loaders.valid_ds),
        "test_images": len(files),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="train|val|test/CLASS/*.png")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(main(arguments.folder, arguments.seed)), flush=True)
