"""First Betti numbers of point clouds: NumPy in, numbers out, no framework.

b1 of a cloud is the number of H1 bars of its Vietoris-Rips persistence over all scales,
Euclidean distances, coefficients in Z/2, every bar with death > birth, no threshold
(arXiv 2510.03101).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

COEFFICIENT_FIELD = 2  # gudhi's default is 11, ripser's is 2; they differ for spaces with torsion
MIN_POINTS = 4  # a Vietoris-Rips complex on fewer points has no loop

# Cost of counting the bars of one cloud of n points, fitted on random clouds of 128 to
# 2,048 points in 3 and 50 dimensions; within a factor of two of each.
_SECONDS_PER_POINT_CUBED = 6e-10
_BYTES_PER_POINT_SQUARED = 64

# Predicted work that is worth several threads.
_WORTH_THREADS_S = 0.05


def betti_1_of_each(matrices: Sequence[np.ndarray], num_threads: int = 1) -> list[int]:
    """Returns the first Betti number of each distance matrix.

    Args:
        matrices: list of arrays of shape (n, n), any real dtype. Finite, symmetric, zero on
            the diagonal, not negative.
        num_threads: int. The largest number of threads, for large clouds; gudhi
            releases the interpreter lock.

    Raises:
        ValueError: if a matrix breaks one of these rules.
    """
    from gudhi.sklearn.rips_persistence import RipsPersistence  # takes a second to import

    work_s = sum(predicted_cost(len(matrix), 1)[0] for matrix in matrices)
    num_threads = num_threads if work_s > _WORTH_THREADS_S else 1
    rips = RipsPersistence(
        homology_dimensions=1,
        input_type="full distance matrix",
        homology_coeff_field=COEFFICIENT_FIELD,
        n_jobs=num_threads,
    )
    with ThreadPoolExecutor(num_threads) as pool:
        ranks = list(pool.map(_ranks, matrices) if num_threads > 1 else map(_ranks, matrices))
    diagrams = rips.fit_transform(ranks)
    return [int(np.count_nonzero(bars[:, 1] > bars[:, 0])) for bars in diagrams]


def predicted_cost(num_points: int, num_clouds: int) -> tuple[float, int]:
    """Predicts the cost of counting the bars of some clouds on one processor.

    Args:
        num_points: int. Points per cloud.
        num_clouds: int. Clouds, one after the other.

    Returns:
        seconds: float.
        peak_bytes: int.
    """
    return _SECONDS_PER_POINT_CUBED * num_points**3 * num_clouds, _BYTES_PER_POINT_SQUARED * num_points**2


def _ranks(distances):
    """Returns `distances` with each value replaced by its rank among the distinct values.

    The complex changes at the distances in their order, so their ranks give the
    same number of bars. Ranks are small integers, which any engine represents exactly at
    any scale of the cloud. Values that are equal in float32 share a rank: activations
    are float32, so a smaller difference is rounding, and ties (an image that is in
    the batch twice) must stay ties.
    """
    distances = np.asarray(distances, dtype=np.float64)
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"distances must be a square matrix. Received: shape {distances.shape}")
    # gudhi returns an empty diagram for NaN, and crashes on negative values.
    if not np.isfinite(distances).all():
        raise ValueError("distances must be finite. Received: NaN or infinite values")
    if (distances < 0).any() or np.diagonal(distances).any():
        raise ValueError("distances must be non-negative, and zero on the diagonal")
    if not np.array_equal(distances, distances.T):
        raise ValueError("distances must be symmetric")
    # A power of two changes no digit and keeps every cloud within float32's range.
    _, exponent = np.frexp(distances.max(initial=0.0))
    rounded = np.ldexp(distances, -exponent).astype(np.float32)
    above = np.triu_indices(len(rounded), 1)
    values = rounded[above]
    order = np.argsort(values)
    ranks = np.empty(len(values))
    ranks[order] = np.cumsum(np.diff(values[order], prepend=np.float32(0)) > 0)  # zero has rank zero
    matrix = np.zeros(rounded.shape)
    matrix[above] = ranks
    return matrix + matrix.T
