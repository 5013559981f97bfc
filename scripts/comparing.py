"""Statistics of paired runs: differences over seeds, agreement of selections, rank correlations."""

import itertools
import statistics
import warnings
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999
SAME_MEMORY = 0.05  # share by which two peaks may differ and count as the same


@dataclass(frozen=True)
class Difference:
    """A paired difference over seeds, ours minus theirs.

    Attributes:
        values: tuple of float, one per seed, in percentage points.
    """

    values: tuple

    @property
    def mean(self):
        return statistics.fmean(self.values)

    @property
    def interval(self):
        """(low, high) of the mean, by the percentile bootstrap over seeds; None for fewer than three."""
        if len(self.values) < 3:
            return None
        found = stats.bootstrap(
            (self.values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=0
        ).confidence_interval
        return float(found.low), float(found.high)

    @property
    def verdict(self):
        """`ahead` or `behind` if the interval excludes 0, else `undecided`."""
        low, high = self.interval or (0, 0)
        return "ahead" if low > 0 else "behind" if high < 0 else "undecided"


def at_same_rho(ours, theirs):
    """Pairs the accuracies of two schemes by rho and seed.

    Args:
        ours, theirs: dict from rho to dict from seed to (memory, accuracy).

    Returns:
        dict from each common rho to its Difference, and from None to that of each seed's
        mean over these rhos; empty if there is none.
    """
    by_rho = {}
    for rho in sorted(ours.keys() & theirs.keys()):
        seeds = sorted(ours[rho].keys() & theirs[rho].keys())
        if seeds:
            by_rho[rho] = {seed: ours[rho][seed][1] - theirs[rho][seed][1] for seed in seeds}
    found = {rho: Difference(tuple(differences.values())) for rho, differences in by_rho.items()}
    everywhere = sorted(set.intersection(*map(set, by_rho.values()))) if by_rho else []
    if everywhere:
        found[None] = Difference(tuple(statistics.fmean(d[seed] for d in by_rho.values()) for seed in everywhere))
    return found


def at_same_memory(ours, theirs):
    """Compares each of our runs with the other scheme's accuracy at the same memory, seed by seed.

    A seed's runs of the other scheme, by memory, are joined by straight lines. Our runs more
    than `SAME_MEMORY` outside them are left out, and those at most that far outside are
    compared with the end: nothing is extrapolated.

    Args:
        ours, theirs: dict from rho to dict from seed to (memory, accuracy).

    Returns:
        difference: Difference of each seed's mean over its compared runs, or None if no
            run could be compared.
        compared: int. Number of our runs that could be.
    """
    values, compared = [], 0
    for seed in sorted({seed for runs in ours.values() for seed in runs}):
        curve = {}
        for runs in theirs.values():
            if seed in runs:
                curve.setdefault(runs[seed][0], []).append(runs[seed][1])
        memory = sorted(curve)
        accuracy = [statistics.fmean(curve[m]) for m in memory]
        low, high = (memory[0] * (1 - SAME_MEMORY), memory[-1] * (1 + SAME_MEMORY)) if memory else (0, 0)
        inside = [runs[seed] for runs in ours.values() if seed in runs and low <= runs[seed][0] <= high]
        if inside:
            values.append(statistics.fmean(a - np.interp(m, memory, accuracy) for m, a in inside))
            compared += len(inside)
    return (Difference(tuple(map(float, values))) if values else None), compared


def jaccard(sets):
    """Returns the mean over pairs of |A and B| / |A or B|, or None for fewer than two sets."""
    pairs = list(itertools.combinations(map(set, sets), 2))
    return statistics.fmean(len(a & b) / len(a | b) for a, b in pairs) if pairs else None


def spearman(first, second):
    """Returns the rank correlation of two sequences, or None if it is undefined."""
    if len(first) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        found = float(stats.spearmanr(first, second).statistic)
    return None if np.isnan(found) else found


def mean_spearman(sequences):
    """Returns the mean rank correlation over pairs of sequences, or None if it is undefined."""
    found = [spearman(a, b) for a, b in itertools.combinations(sequences, 2)]
    return statistics.fmean(found) if found and None not in found else None
