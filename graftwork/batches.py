"""Images of a Dataset artifact as uint8 batches: decoded by threads, held in memory when they fit, read from the shards when they do not."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import torch

from graftwork.dataset import Dataset
from graftwork.images import Array, Preprocess, decode, fit
from graftwork.parallel import bounded_map

MEMORY_SHARE = 0.3  # of the memory that is free now
Progress = Callable[[int, int], None]


def images(dataset: Dataset, rows: pa.Table, preprocess: Preprocess) -> Iterator[Array]:
    """Yield the images of ``rows`` fitted to the network's input, each of shape (size, size, 3), in order."""
    limit = dataset.info["settings"]["max_pixels"]
    return bounded_map(lambda data: fit(decode(data, limit), preprocess), dataset.read(rows))


class SplitImages:
    """The examples of one split by position: ``[indices]`` gives uint8 of shape (len(indices), size, size, 3).

    Up to ``memory_share`` of the memory that is free now, they are decoded once and held; past it, they are read from the shards and
    decoded anew each time, by threads, and memory does not grow with their number.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        preprocess: Preprocess,
        progress: Progress = lambda done, total: None,
        memory_share: float = MEMORY_SHARE,
    ) -> None:
        self.dataset, self.preprocess = dataset, preprocess
        self.rows = dataset.split(split)
        self.targets = torch.from_numpy(dataset.targets(self.rows))
        weights = torch.from_numpy(self.rows["weight"].to_numpy().copy())
        self.weights = None if not len(weights) or (weights == weights[0]).all() else weights  # None: all count alike
        shape = (len(self.rows), preprocess.size, preprocess.size, 3)
        self.held: npt.NDArray[np.uint8] | None = None
        if np.prod(shape, dtype=np.int64) <= memory_share * psutil.virtual_memory().available:
            self.held = np.empty(shape, np.uint8)
            for n, image in enumerate(images(dataset, self.rows, preprocess)):
                self.held[n] = image
                progress(n + 1, len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Array]:
        return iter(self.held) if self.held is not None else images(self.dataset, self.rows, self.preprocess)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        if self.held is not None:
            return torch.from_numpy(self.held[indices.numpy()])
        rows = self.rows.take(pa.array(indices.numpy()))
        return torch.from_numpy(np.stack(list(images(self.dataset, rows, self.preprocess))))

    def in_order(self, batches: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (indices, pixels) for every batch of indices; the next batch is made while the caller works on this one."""
        if self.held is not None:
            yield from ((indices, self[indices]) for indices in batches)
            return
        with ThreadPoolExecutor(1) as pool:
            waiting: list[tuple[torch.Tensor, Future[torch.Tensor]]] = []
            for indices in batches:
                waiting.append((indices, pool.submit(self.__getitem__, indices)))
                if len(waiting) > 1:
                    first, future = waiting.pop(0)
                    yield first, future.result()
            yield from ((indices, future.result()) for indices, future in waiting)


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
