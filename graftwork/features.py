"""Frozen features: one pass of the pretrained network over the examples that are trained and selected on."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from graftwork.backbones import load_backbone
from graftwork.batches import Progress, SplitImages, augment
from graftwork.dataset import Dataset
from graftwork.files import finished_folder, write_json
from graftwork.model import batches, ready_device, save_model, to_input
from graftwork.settings import FeatureSettings

SPLITS = ("train", "val")


def extract_features(
    dataset: Dataset, settings: FeatureSettings, folder: Path, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Write the Embeddings artifact; return its ``embeddings.json``.

    ``features-SPLIT.npy``: float32 (V, N, D), what the network gives to its head, for V views of each image, the first as it
    is; ``index-SPLIT.parquet``: id and label, a row each; ``backbone/``: a Model artifact, the pretrained network with a zero
    head, so that no later step looks for weights again.
    """
    started = time.perf_counter()
    backbone = load_backbone(settings, len(dataset.classes))
    device = ready_device()
    network = backbone.network.to(device, memory_format=torch.channels_last).eval()
    splits = {split: SplitImages(dataset, split, backbone.preprocess) for split in SPLITS}
    views = settings.views or choose_views(len(splits["train"]))
    if not settings.flip and not settings.shift:
        views = 1  # all would be the same
    generator = torch.Generator().manual_seed(settings.seed)
    total, done = views * sum(map(len, splits.values())), 0
    with finished_folder(folder) as partial:
        for split, images in splits.items():
            found: list[npt.NDArray[np.float32]] = []
            for view in range(views):
                for batch in batches(iter(images)):
                    pixels = torch.from_numpy(batch)
                    if view:
                        pixels = augment(pixels, settings.flip, settings.shift, generator)
                    found.append(penultimate(network, to_input(pixels, backbone.preprocess, device)))
                    done += len(batch)
                    progress(done, total)
            features = (
                np.concatenate(found).reshape(views, len(images), -1) if found else np.zeros((views, 0, 0), np.float32)
            )
            np.save(partial / f"features-{split}.npy", features, allow_pickle=False)
            pq.write_table(images.rows.select(["id", "label"]), partial / f"index-{split}.parquet")
        info = {
            "backbone": settings.backbone,
            "backbone_args": backbone.args,
            "head": backbone.head,
            "classes": dataset.classes,
            "preprocess": backbone.preprocess.model_dump(),
            "weights": backbone.weights,
            "candidate": "backbone",
            "dataset_digest": dataset.digest,
            "selection": None,
            "views": views,
            "seconds": time.perf_counter() - started,
        }
        save_model(partial / "backbone", {k: v.cpu().numpy() for k, v in network.state_dict().items()}, info)
        write_json(partial / "embeddings.json", {"format": "graftwork-embeddings/1", **info})
    return info


@torch.inference_mode()
def penultimate(network: Any, x: torch.Tensor) -> npt.NDArray[np.float32]:
    """Return what ``network`` gives to its head for the input ``x``: float32 (N, D)."""
    features = network.forward_head(network.forward_features(x), pre_logits=True)
    return features.flatten(1).float().cpu().numpy()


def choose_views(examples: int) -> int:
    """Return how many views of each training image the probe learns from: several where labels are few, one where they are many.

    For few labels, augmented views are the cheapest gain there is. Measured on Fashion-MNIST with 1,250 labels, mean of three draws,
    5,000 test images: 0.830 with one view, 0.832 with two, 0.833 with four, 0.835 with six.
    """
    return max(1, min(6, 6000 // max(examples, 1)))
