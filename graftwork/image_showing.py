"""Images in the report: the mistakes as pictures with what the network looked at, and the test repeated on distorted images.

See ``graftwork.modality.Showing``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from graftwork.corruptions import check_kinds, robustness
from graftwork.modality import Index
from graftwork.model import Model
from graftwork.saliency import overlay, saliency

if TYPE_CHECKING:
    import pyarrow as pa

    from graftwork.batches import Examples
    from graftwork.dataset import Dataset
    from graftwork.execution import Execution

ROBUSTNESS_EXAMPLES = 2000  # that are distorted, spread over the test split


def mistakes(
    dataset: "Dataset", rows: "pa.Table", predicted: Index, model: Model, folder: Path, attributions: bool = False
) -> list[dict[str, Any]]:
    """Write a picture of each of ``rows``, and where the network looked, under ``folder``/mistakes; return their names.

    With or without ``attributions``: where a network looked belongs to the picture of every mistake.
    """
    import torch

    from graftwork.batches import Examples

    test = Examples(dataset._replace(manifest=rows), "test", model.preprocess)
    pixels = test[torch.arange(len(rows))].numpy()
    heat = saliency(model, pixels, predicted)
    (folder / "mistakes").mkdir()
    listed = []
    for n in range(len(rows)):
        picture, looked = f"mistakes/{n:02d}.png", f"mistakes/{n:02d}-saliency.png"
        Image.fromarray(pixels[n]).save(folder / picture)
        overlay(pixels[n], heat[n]).save(folder / looked)
        listed.append({"picture": picture, "saliency": looked})
    return listed


def check_corruptions(kinds: list[str]) -> None:
    check_kinds(kinds)


def distorted(
    model: Model,
    test: "Examples",
    targets: Index,
    kinds: list[str],
    execution: "Execution",
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return the accuracy on distorted test images, at most ``ROBUSTNESS_EXAMPLES`` of them."""
    import torch

    some = np.unique(np.linspace(0, len(test) - 1, min(len(test), ROBUSTNESS_EXAMPLES)).astype(np.int64))
    pixels = np.concatenate(
        [test[torch.from_numpy(part)].numpy() for part in np.array_split(some, len(some) // 256 + 1)]
    )
    note(f"corruptions: {', '.join(kinds)} on {len(some):,} test images")
    return robustness(model, pixels, targets[some], kinds, execution)
