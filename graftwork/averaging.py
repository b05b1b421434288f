"""Averages of weights, taken after training and kept only where validation gains by them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graftwork.selection import better

State = dict[str, Tensor]
Measure = Callable[[State], dict[str, float]]
SHARES = (0.25, 0.5, 0.75)  # of the fine-tuned weights


def wise_ft(
    probe: State, tuned: State, measured: dict[str, float], metric: str, measure: Measure
) -> tuple[State, dict[str, float], float]:
    """Return the best of ``tuned`` and its averages with ``probe``, its metrics, and the share of the fine-tuned weights in it.

    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models". ``measured`` are the metrics of ``tuned``.
    """
    best, best_metrics, best_share = tuned, measured, 1.0
    for share in SHARES:
        mixed = average([(1 - share, probe), (share, tuned)])
        found = measure(mixed)
        if better(metric, found, best_metrics):
            best, best_metrics, best_share = mixed, found, share
    return best, best_metrics, best_share


def greedy_soup(
    checkpoints: list[tuple[dict[str, float], State]], metric: str, measure: Measure
) -> tuple[State, dict[str, float], int]:
    """Return the soup of ``checkpoints`` (metrics, weights; the best first), its metrics, and how many are in it.

    Wortsman et al. 2022, "Model soups", greedy: one after the other is added, and stays in where the average is better for it.
    """
    metrics, soup = checkpoints[0]
    members = [soup]
    for _, state in checkpoints[1:]:
        mixed = average([(1 / (len(members) + 1), s) for s in (*members, state)])
        found = measure(mixed)
        if better(metric, found, metrics):
            members, metrics, soup = [*members, state], found, mixed
    return soup, metrics, len(members)


def average(parts: list[tuple[float, State]]) -> State:
    """Return the weighted sum of states of one network; what is no floating-point tensor (a counter) comes from the last."""
    result: State = {}
    for name, last in parts[-1][1].items():
        if last.is_floating_point():
            total: Any = sum(weight * state[name].double() for weight, state in parts)
            result[name] = total.to(last.dtype)
        else:
            result[name] = last
    return {name: torch.clone(tensor) for name, tensor in result.items()}
