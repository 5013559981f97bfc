"""ElasticTrainer's choice of tensors: the most importance within a time budget (arXiv 2312.14227).

Tensors are numbered from the output. A selected tensor costs its own t_dw, and all from
the first to the farthest selected one cost t_dy, the time to pass the error on from the
tensor before. NumPy in, indices out.
"""

from collections.abc import Sequence

import numpy as np

RESOLUTION = 1000  # steps into which the time budget is divided


def backward_share(rho: float, forward: float, backward: float) -> float:
    """Returns the share of a full backward pass that the share `rho` of a full training step leaves.

    Args:
        rho: float. Share of the time of forward and backward pass together.
        forward: float. Time of the forward pass, which every step needs.
        backward: float. Time of the full backward pass, in the same unit.

    Returns:
        float, zero or less if the forward pass alone takes longer.
    """
    ratio = forward / backward
    return rho * (1 + ratio) - ratio


def most_important(importance, t_dw, t_dy, time_budget: float, resolution: int = RESOLUTION) -> list[int]:
    """Returns the subset with the largest total importance whose backward pass fits the time budget.

    The farthest selected tensor determines the sum of t_dy. The rest is a knapsack
    problem over the tensors before it, and one table over (tensors, time) serves every
    choice of the farthest. Times are rounded to the nearest of `resolution` steps of the
    budget, t_dy as a cumulative sum.

    Args:
        importance: float array of shape (n,), from the output. Tensors without positive
            importance are not selected; -inf excludes a tensor.
        t_dw: float array of shape (n,).
        t_dy: float array of shape (n,).
        time_budget: float, in the unit of the times.
        resolution: int.

    Returns:
        list of int. Indices from the output, empty if no tensor of positive importance fits.
    """
    if time_budget <= 0 or len(importance) == 0:
        return []
    step = time_budget / resolution
    # All times beyond the budget are the same: they do not fit.
    own = np.minimum(np.rint(np.asarray(t_dw, np.float64) / step), resolution + 1).astype(int)
    reach = np.minimum(np.rint(np.cumsum(t_dy, dtype=np.float64) / step), resolution + 1).astype(int)

    most = np.zeros(resolution + 1)  # by time, of the tensors so far, without t_dy
    taken = np.zeros((len(own), resolution + 1), bool)
    best, farthest, left = 0.0, None, 0
    for k, (worth, cost) in enumerate(zip(importance, own)):
        if not worth > 0 or cost > resolution:
            continue
        remaining = resolution - reach[k] - cost
        if remaining >= 0 and most[remaining] + worth > best:
            best, farthest, left = most[remaining] + worth, k, remaining
        with_it = most[: resolution + 1 - cost] + worth
        taken[k, cost:] = with_it > most[cost:]
        most[cost:] = np.maximum(most[cost:], with_it)

    if farthest is None:
        return []
    chosen = [farthest]
    for k in range(farthest - 1, -1, -1):
        if taken[k, left]:
            chosen.append(k)
            left -= own[k]
    return sorted(chosen)


def backward_time(chosen: Sequence[int], t_dw, t_dy) -> float:
    """Returns the time of the backward pass that trains the tensors `chosen`, indices from the output."""
    if not chosen:
        return 0.0
    return float(np.sum(np.asarray(t_dw)[chosen]) + np.sum(t_dy[: max(chosen) + 1]))
