"""What one writes by hand: all weights trained, 32-bit floats, AdamW at 1e-3, batches of 32, 5 epochs, mirrored images, best epoch on validation kept."""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from pretrained import MEAN, SIZE, STD, pretrained_network
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor


def measure(network: nn.Module, loader: DataLoader) -> float:
    """Return the accuracy on the images of ``loader``."""
    network.eval()
    with torch.inference_mode():
        right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in loader)
    return right / len(loader.dataset)


def train(network: nn.Module, loader: DataLoader, val: DataLoader) -> None:
    """Train for 5 epochs and leave the weights of the best in ``network``."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    best, kept = -1.0, network.state_dict()
    for _ in range(5):
        network.train()
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        reached = measure(network, val)
        if reached > best:
            best, kept = reached, copy.deepcopy(network.state_dict())
    network.load_state_dict(kept)


def main(folder: Path, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    end = [Resize(SIZE), CenterCrop(SIZE), ToTensor(), Normalize(MEAN, STD)]
    parts = {
        split: ImageFolder(folder / split, Compose([RandomHorizontalFlip(), *end] if split == "train" else end))
        for split in ("train", "val", "test")
    }
    loaders = {
        split: DataLoader(images, batch_size=32, shuffle=split == "train", num_workers=2)
        for split, images in parts.items()
    }
    network = pretrained_network(len(parts["train"].classes))
    started = time.perf_counter()
    train(network, loaders["train"], loaders["val"])
    train_seconds = time.perf_counter() - started
    return {
        "test_accuracy": measure(network, loaders["test"]),
        "train_seconds": train_seconds,
        **{f"{split}_images": len(images) for split, images in parts.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="train|val|test/CLASS/*.png")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(main(arguments.folder, arguments.seed)), flush=True)
