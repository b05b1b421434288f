"""Averages of weights: kept only where validation gains by them."""

import pytest
import torch

from graftwork.averaging import average, greedy_soup, wise_ft


def state(value: float, count: int = 1):
    return {
        "w": torch.full((2,), value),
        "half": torch.full((1,), value, dtype=torch.bfloat16),
        "n": torch.tensor(count),
    }


def closeness(to: float):
    """Return a measure by which the best weight is ``to``."""
    measured: list[float] = []

    def measure(candidate) -> dict[str, float]:
        measured.append(float(candidate["w"][0]))
        off = abs(measured[-1] - to)
        return {"val_accuracy": 1 - off, "val_loss": off}

    return measure, measured


@pytest.mark.parametrize(
    ("best", "share"), [(1.0, 1.0), (0.75, 0.75), (0.5, 0.5), (0.2, 0.25), (0.0, 0.25), (2.0, 1.0)]
)
def test_wise_ft_takes_the_share_that_validation_likes_best(best: float, share: float) -> None:
    """An average that validation does not like would replace what she trained for hours."""
    measure, measured = closeness(best)
    tuned = state(1.0)
    found, metrics, chosen = wise_ft(state(0.0), tuned, measure(tuned), "accuracy", measure)
    assert chosen == share and float(found["w"][0]) == share
    assert metrics == measure(found) and metrics["val_accuracy"] >= 1 - abs(1 - best)
    assert measured[1:4] == [0.25, 0.5, 0.75]


def test_a_tie_keeps_the_tuned_weights() -> None:
    """Weights that were never trained would be mixed in for nothing."""
    tuned = state(1.0)
    same = {"val_accuracy": 0.9, "val_loss": 0.1}
    assert wise_ft(state(0.0), tuned, same, "accuracy", lambda s: same)[2] == 1.0
    assert wise_ft(state(0.0), tuned, same, "accuracy", lambda s: same)[0] is tuned


def test_greedy_soup_takes_what_helps_and_leaves_the_rest() -> None:
    """A soup of all epochs, the bad ones among them, would be worse than the best of them."""
    measure, _ = closeness(0.0)
    epochs = [state(v, n) for n, v in enumerate((0.3, -0.3, 5.0, 0.09))]
    ranked = [(measure(s), s) for s in epochs]
    soup, metrics, members = greedy_soup(ranked, "accuracy", measure)
    assert members == 2 and float(soup["w"][0]) == pytest.approx(0.0, abs=1e-7)
    assert metrics["val_accuracy"] == pytest.approx(1.0)
    alone, metrics, members = greedy_soup([(measure(epochs[0]), epochs[0]), ranked[2]], "accuracy", measure)
    assert members == 1 and torch.equal(alone["w"], epochs[0]["w"]) and metrics == ranked[0][0]


def test_average_is_the_weighted_mean_and_keeps_every_type() -> None:
    """A counter of BatchNorm's averaged to 0.5 no longer loads; a sum in bf16 loses what was learnt."""
    found = average([(0.25, state(0.0, 3)), (0.75, state(1.0, 7))])
    assert float(found["w"][0]) == 0.75 and found["w"].dtype == torch.float32
    assert found["half"].dtype == torch.bfloat16 and float(found["half"]) == 0.75
    assert found["n"].dtype == torch.int64 and int(found["n"]) == 7
    thirds = average([(1 / 3, state(0.1))] * 3)
    assert torch.equal(thirds["w"], state(0.1)["w"]), "summed in double precision"
    first = state(1.0)
    average([(1.0, first)])["w"].zero_()
    assert float(first["w"][0]) == 1.0, "a copy"
