"""Augmentation of images: what is drawn, and whether a mirrored image keeps its label."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from graftwork.batches import Examples
from graftwork.settings import FeatureSettings

MIRRORED = 500  # images that are mirrored to decide whether a mirrored image keeps its label
BATCH = 256  # images that pass at once
Rows = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]
Run = Callable[[Tensor], Tensor]


def choose_augmentation(
    settings: FeatureSettings, examples: Examples, features: Rows, run: Run, note: Callable[[str], None]
) -> dict[str, Any]:
    """Return {"flip", "shift"}: what ``settings`` say, and for flip "auto", whether mirroring keeps the labels."""
    flip = settings.flip == "yes"
    if settings.flip == "auto":
        flip = label_survives_mirror(examples, features, run, note)
    return {"flip": flip, "shift": settings.shift}


def augment(batch: torch.Tensor, flip: bool, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of a uint8 batch (N, H, W, 3) and move each image by up to ``shift`` of its side; the border is repeated.

    Every image draws its own numbers, from ``generator``, on the CPU whatever the batch's device: an epoch's augmentation is
    fixed by the seed alone.
    """
    count, height, width = batch.shape[:3]
    rows = torch.arange(height).expand(count, -1)
    columns = torch.arange(width).expand(count, -1)
    if shift:
        reach = round(shift * min(height, width))
        dy, dx = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
        rows, columns = (rows + dy).clamp(0, height - 1), (columns + dx).clamp(0, width - 1)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    each, rows, columns = (part.to(batch.device) for part in (torch.arange(count), rows, columns))
    return batch[each[:, None, None], rows[:, :, None], columns[:, None, :]]


def label_survives_mirror(images: Examples, rows: Rows, run: Run, note: Callable[[str], None]) -> bool:
    """Tell whether a mirrored image still belongs to its class, by its nearest neighbour among the images as they are.

    Up to ``MIRRORED`` images look for their nearest neighbour among four times as many, themselves left out, as they are and mirrored.
    Where the mirrored ones find their class clearly less often (digits, letters, road signs), mirroring makes wrong examples. It
    needs no validation split. The drop that counts is 3 points, and more where so few images say little.
    """
    if len(images) < 2:
        return False
    places = torch.linspace(0, len(images) - 1, min(len(images), 4 * MIRRORED)).long().unique()
    asked = torch.linspace(0, len(places) - 1, min(len(places), MIRRORED)).long().unique()
    bank = torch.from_numpy(rows(places.numpy()))
    mirrored = torch.cat(
        [run(pixels.flip(2)) for _, pixels in images.in_order(places[asked].split(BATCH))]  # (N, H, W, 3): the columns
    )
    center, scale = bank.mean(0), bank.std(0) + 1e-6
    bank, mirrored = (nn.functional.normalize((x - center) / scale, dim=1) for x in (bank, mirrored))
    targets, agreement = images.targets[places], []
    for queries in (bank[asked], mirrored):
        similarity = queries @ bank.T
        similarity[torch.arange(len(asked)), asked] = -2.0  # itself
        agreement.append(float((targets[similarity.argmax(1)] == targets[asked]).float().mean()))
    plain, flipped = agreement
    keeps = plain - flipped <= 0.03 + 0.5 / len(asked) ** 0.5
    note(
        f"mirroring {'on' if keeps else 'off'}: the nearest neighbour has the right label for {plain:.1%} of the images, "
        f"mirrored for {flipped:.1%}"
    )
    return keeps
