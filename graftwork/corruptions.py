"""Robustness: accuracy on test images that are blurred, noisy, darker or brighter, or compressed hard, as cameras and networks make them.

The kinds are four of those by Hendrycks and Dietterich 2019 (https://arxiv.org/abs/1903.12261), at three severities of our own: the
blur goes with the image's side, since theirs is for 224 pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graftwork.errors import UserError, one_line
from graftwork.images import Array
from graftwork.model import Model, predict_logits
from graftwork.parallel import bounded_map

if TYPE_CHECKING:
    from graftwork.execution import Execution

STRENGTHS: dict[str, tuple[float, float, float]] = {  # by severity
    "gaussian-blur": (0.005, 0.01, 0.02),  # standard deviation, as a share of the side, and ``LEAST`` pixels
    "noise": (0.04, 0.08, 0.16),  # standard deviation, of values in 0..1
    "brightness": (1.25, 1.6, 2.2),  # factor; every other image is made darker by it instead
    "jpeg": (60, 30, 10),  # quality
}
LEAST = 0.3  # a blur by less changes no pixel, however small the image
KINDS = tuple(STRENGTHS)
SEVERITIES = (1, 2, 3)
Ints = npt.NDArray[np.int64]


def robustness(
    model: Model,
    images: Iterable[Array],
    targets: Ints,
    kinds: list[str],
    execution: "Execution | None" = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return a row for every corruption of ``kinds`` and severity: corruption, severity, accuracy, its interval, and ``drop``.

    ``images`` are uint8 (size, size, 3), fitted, read once; ``targets`` (N,). The interval is Wilson's at ``confidence``; ``drop`` is
    the accuracy on the same images as they are, less this one. The numbers drawn depend on ``seed`` and the image's place alone.

    Raises:
        UserError: a kind is none of ``KINDS``.
    """
    from scipy.stats import binomtest

    check_kinds(kinds)
    if not kinds or not len(targets):
        return []
    wanted = [(kind, severity) for kind in dict.fromkeys(kinds) for severity in SEVERITIES]

    def variants(place: int, image: Array) -> list[Array]:
        return [image, *(corrupt(image, kind, severity, place, seed) for kind, severity in wanted)]

    # One after the other, so that each image is decoded once and none is held.
    total = (1 + len(wanted)) * len(targets)
    stream: Iterator[Array] = (
        one
        for each in bounded_map(
            lambda job: variants(*job), enumerate(images), size=lambda made: sum(a.nbytes for a in made)
        )
        for one in each
    )
    logits = predict_logits(model, stream, lambda done: progress(done, total), execution)
    correct = logits.argmax(1).reshape(len(targets), 1 + len(wanted)) == np.asarray(targets)[:, None]
    rows = []
    for (kind, severity), right in zip(wanted, correct[:, 1:].sum(0).tolist(), strict=True):
        interval = binomtest(right, len(targets)).proportion_ci(confidence, method="wilson")
        rows.append(
            {
                "corruption": kind,
                "severity": severity,
                "accuracy": right / len(targets),
                "interval": [float(interval.low), float(interval.high)],
                "drop": float(correct[:, 0].mean()) - right / len(targets),
            }
        )
    return rows


def check_kinds(kinds: Iterable[str]) -> None:
    """Refuse a kind that there is not, before an hour of training has gone by."""
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"corruptions: {one_line(kind, 60)!r} is none of {', '.join(KINDS)}")


def corrupt(image: Array, kind: str, severity: int, place: int = 0, seed: int = 0) -> Array:
    """Return ``image``, uint8 (H, W, 3), corrupted; ``place`` is its position in the test, from which, with ``seed``, chance is drawn."""
    import torch
    from torchvision.transforms import v2

    strength = STRENGTHS[kind][severity - 1]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if kind == "gaussian-blur":
        sigma = LEAST + strength * min(image.shape[:2])
        made = v2.GaussianBlur(2 * max(1, round(3 * sigma)) + 1, (sigma, sigma))(pixels)
    elif kind == "noise":
        # v2.GaussianNoise draws from the one generator of the whole process, which threads share: an image's noise would depend on the others.
        generator = torch.Generator().manual_seed(hash((seed, place, severity)) % 2**63)
        drawn = torch.randn(pixels.shape, generator=generator)
        made = v2.functional.to_dtype(
            (v2.functional.to_dtype(pixels, torch.float32, scale=True) + strength * drawn).clamp(0, 1),
            torch.uint8,
            scale=True,
        )
    elif kind == "brightness":
        made = v2.functional.adjust_brightness(pixels, strength if place % 2 == 0 else 1 / strength)
    else:
        made = v2.JPEG(int(strength))(pixels)
    return np.ascontiguousarray(made.permute(1, 2, 0).numpy())
