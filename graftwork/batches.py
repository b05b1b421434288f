"""Examples of a Dataset artifact as batches: decoded by threads, held in memory when they fit, read from the shards when they do not."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import psutil
import pyarrow as pa
import torch

from graftwork.dataset import Dataset
from graftwork.modality import Array, Preprocess
from graftwork.parallel import bounded_map

MEMORY_SHARE = 0.3  # of the memory that is free now
WINDOW = 16  # batches among which examples of like length are brought together
Progress = Callable[[int, int], None]


def examples_of(dataset: Dataset, rows: pa.Table, preprocess: Preprocess) -> Iterator[Array]:
    """Yield the examples of ``rows`` as the network's preprocessing makes them, in order."""
    limit = int(dataset.info["settings"].get("max_pixels", 0))
    return bounded_map(lambda data: preprocess.example(data, limit), dataset.read(rows))


class Examples:
    """The examples of one split by position: ``[indices]`` gives a batch, as ``preprocess.stack`` makes it.

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
        self.held: list[Array] | None = None
        if len(self.rows) * preprocess.example_bytes <= memory_share * psutil.virtual_memory().available:
            self.held = []
            for example in examples_of(dataset, self.rows, preprocess):
                self.held.append(example)
                progress(len(self.held), len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Array]:
        return iter(self.held) if self.held is not None else examples_of(self.dataset, self.rows, self.preprocess)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        if self.held is not None:
            return self.preprocess.stack([self.held[n] for n in indices.tolist()])
        rows = self.rows.take(pa.array(indices.numpy()))
        return self.preprocess.stack(list(examples_of(self.dataset, rows, self.preprocess)))

    def in_order(self, batches: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (indices, batch) for every batch of indices; the next batch is made while the caller works on this one."""
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

    def by_length(self, order: torch.Tensor, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Return ``order`` with examples of like length in one batch, the batches in random order; as it is where all are of one length.

        Within windows of ``WINDOW`` batches, so that what meets in a batch stays random. A last batch that is not full stays the last.
        """
        if not len(order) or self.preprocess.lengths(self[order[:1]]) is None:
            return order
        # Of what is packed, in bytes: known of every example, held or not, so that the order is the same in either case.
        lengths = torch.from_numpy(self.rows["length"].to_numpy().copy())[order]
        full = len(order) // batch_size * batch_size
        batches: list[torch.Tensor] = []
        for window, cost in zip(
            order[:full].split(WINDOW * batch_size), lengths[:full].split(WINDOW * batch_size), strict=True
        ):
            batches += window[cost.argsort(stable=True)].split(batch_size)
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return torch.cat([*(batches[n] for n in shuffled), order[full:]])
