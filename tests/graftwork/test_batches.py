"""Images of a split as batches: the same pixels in the same order, held in memory or streamed."""

import pytest
import torch

from graftwork.batches import Examples
from graftwork.images import Preprocess

PREPROCESS = Preprocess(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def both(dataset) -> tuple[Examples, Examples]:
    return Examples(dataset, "val", PREPROCESS), Examples(dataset, "val", PREPROCESS, memory_share=0)


def test_a_share_of_nothing_holds_nothing(both) -> None:
    """On a machine with little memory, the kernel would end the run."""
    held, streamed = both
    assert held.held is not None and streamed.held is None
    assert len(held) == len(streamed) == 60 and torch.equal(held.targets, streamed.targets)


@pytest.mark.parametrize("size", [1, 7, 32, 60, 100])
def test_streamed_batches_are_the_held_ones(size: int, both) -> None:
    """Images read ahead under the wrong indices would train the network on the labels of others."""
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    found = [list(images.in_order(order.split(size))) for images in both]
    assert len(found[0]) == len(found[1]) == -(-60 // size)
    for (a, held), (b, streamed) in zip(*found, strict=True):
        assert torch.equal(a, b) and torch.equal(held, streamed)
    assert torch.equal(torch.cat([indices for indices, _ in found[1]]), order)
    assert torch.equal(found[1][0][1][0], both[0][order[:1]][0]), "the pixels are those of the index"


def test_one_example_twice_in_a_batch(both) -> None:
    """Balanced sampling draws an image of a rare class several times in a row."""
    indices = torch.tensor([3, 3, 59, 3])
    held, streamed = (images[indices] for images in both)
    assert torch.equal(held, streamed) and torch.equal(streamed[0], streamed[1]) and streamed.dtype == torch.uint8


def test_nothing_to_do_yields_nothing(both) -> None:
    """A run that goes on at the end of an epoch has no batch left."""
    assert [list(images.in_order(())) for images in both] == [[], []]


def test_iterated_in_the_order_of_the_split(both) -> None:
    """Predictions would be written beside the labels of other images."""
    held, streamed = ([torch.tensor(image) for image in images] for images in both)
    assert torch.equal(torch.stack(held), torch.stack(streamed))
    assert torch.equal(torch.stack(held), both[0][torch.arange(60)])


def test_an_error_while_reading_ahead_is_raised(both) -> None:
    """A shard that cannot be read would end an epoch early, in silence."""
    with pytest.raises(IndexError):
        list(both[1].in_order(torch.tensor([0, 1, 99]).split(1)))


def test_a_reader_that_stops_leaves_no_thread_waiting(both) -> None:
    """A run stopped by Ctrl-C in mid-epoch would hang."""
    for _, _ in both[1].in_order(torch.arange(60).split(5)):
        break
    assert len(both[1][torch.arange(3)]) == 3
