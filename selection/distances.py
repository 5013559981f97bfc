"""Distances between the points of a cloud too large to keep.

A cloud of n points is an (n, d) matrix with n of tens and d of up to millions
(rows are images, columns the elements of one layer's activation). Its n x n
distances come from the Gram matrix of its shifted rows, summed over blocks of
columns in double precision: the cloud is read once and never copied.
"""

import os

import numpy as np

# A block of columns in double precision stays in a core's second-level cache.
_BLOCK_BYTES = 1 << 20

# A pair whose squared distance is a smaller share of its points' norms than this
# has lost too many of its 16 digits in the Gram matrix.
_CANCELLED = 1e-5


def num_workers():
    """Returns the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pairwise_distances(cloud, pool=None, num_parts=1):
    """Returns the Euclidean distances between the points of a cloud.

    The first point is moved to the origin: that changes no distance, and
    without it the digits in which near points differ would be lost (activations
    can have a spread of 1e-7 of their norm). Differences of float32 values are
    taken in float64, and so are products and sums, so that the result is good to
    about 11 digits.

    Args:
        cloud: float array of shape (n, d).
        pool: ThreadPoolExecutor that shares the columns out, or None.
        num_parts: int. Parts that the columns are shared out in; the same number
            gives the same sums to the last bit.

    Returns:
        float64 array of shape (n, n): symmetric, zero on the diagonal; NaN or
        infinite somewhere where the cloud is not finite.
    """
    distances, cancelled = from_gram(_gram(cloud, pool, num_parts))
    for i, j in zip(*cancelled):
        difference = np.subtract(cloud[i], cloud[j], dtype=np.float64)
        distances[i, j] = distances[j, i] = np.linalg.norm(difference)
    return distances


# What is not finite is for the caller to find in the result, not for NumPy to warn of.
_QUIET = np.errstate(invalid="ignore", over="ignore")


@_QUIET
def from_gram(gram):
    """Turns a Gram matrix into distances.

    Args:
        gram: float64 array of shape (n, n).

    Returns:
        distances: float64 array of shape (n, n), symmetric, zero on the diagonal.
        cancelled: the row and the column indices, row < column, of the pairs of
            distinct points whose distance lost most of its digits here.
    """
    norms = np.diagonal(gram)
    squared = norms[:, None] + norms[None, :] - 2 * gram
    cancelled = np.nonzero(np.triu(squared < _CANCELLED * np.maximum(norms[:, None], norms[None, :]), 1))
    distances = np.sqrt(np.maximum(squared, 0))
    distances = np.triu(distances, 1)
    return distances + distances.T, cancelled


def _gram(cloud, pool, num_parts):
    num_points, dimension = cloud.shape
    width = max(256, _BLOCK_BYTES // (8 * num_points))
    starts = range(0, dimension, width)
    parts = [starts[i * len(starts) // num_parts : (i + 1) * len(starts) // num_parts] for i in range(num_parts)]
    return sum((pool.map if pool else map)(lambda part: _gram_of_blocks(cloud, part, width), parts))


@_QUIET
def _gram_of_blocks(cloud, starts, width):
    num_points, dimension = cloud.shape
    gram = np.zeros((num_points, num_points))
    block = np.empty((num_points, min(width, dimension)))
    for start in starts:
        columns = cloud[:, start : start + width]
        shifted = block[:, : columns.shape[1]]
        shifted[:] = columns  # to float64 first: NumPy would take the difference in float32
        shifted -= shifted[0].copy()
        gram += shifted @ shifted.T
    return gram
