"""Distances between the points of a cloud with many more dimensions than points.

Rows are images, columns the elements of one layer's activation. A distance is the
root of a sum of squared differences, in float64: the differences of float32 values
are then exact, and a point cloud far from the origin loses no digits, as it would
in a Gram matrix.
"""

from concurrent.futures import Executor

import numba
import numpy as np

_TILE = 4  # points per side of a tile: 16 sums, which a CPU's registers hold
_PIECE = 1024  # columns read at a time: those of all points stay in the cache
_PART = 16 * _PIECE  # columns that one call sums: enough to be worth handing to a thread


def pairwise_distances(cloud: np.ndarray, pool: Executor | None = None) -> np.ndarray:
    """Returns the Euclidean distances between the points of a cloud.

    Args:
        cloud: float32 array of shape (n, d).
        pool: concurrent.futures.Executor with threads that share the columns, or None.

    Returns:
        float64 array of shape (n, n), symmetric, zero on the diagonal. It contains
        NaN or infinity if the cloud does. Its bits do not depend on the number of
        threads, because parts of a fixed width are added in their order.
    """
    cloud = np.ascontiguousarray(cloud, np.float32)
    num_points, num_columns = cloud.shape
    starts = range(0, num_columns, _PART)
    run = pool.map if pool and len(starts) > 1 else map
    parts = run(lambda start: _squared_distances(cloud, start, min(start + _PART, num_columns)), starts)
    return _distances(sum(parts, np.zeros((num_points, num_points))))


def from_gram(gram: np.ndarray) -> np.ndarray:
    """Returns the distances, as `pairwise_distances` does, from a float64 Gram matrix of shape (n, n)."""
    norms = np.diagonal(gram)
    return _distances(np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0))


def _distances(squared):
    """Returns distances from an array whose upper triangle holds their squares."""
    upper = np.sqrt(np.triu(squared, 1))
    return upper + upper.T


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _squared_distances(cloud, first, last):
    """Sums the squared differences of the columns `first` to `last - 1` for every pair of points.

    Returns:
        float64 array of shape (n, n). Only its upper triangle is meaningful.
    """
    num_points = cloud.shape[0]
    end = num_points - 1
    sums = np.zeros((num_points + _TILE, num_points + _TILE))
    for start in range(first, last, _PIECE):
        stop = min(start + _PIECE, last)
        for i in range(0, num_points, _TILE):
            # Rows beyond the last repeat it. Their sums are cut off in the end.
            a0, a1 = cloud[i, start:stop], cloud[min(i + 1, end), start:stop]
            a2, a3 = cloud[min(i + 2, end), start:stop], cloud[min(i + 3, end), start:stop]
            for j in range(i, num_points, _TILE):
                b0, b1 = cloud[j, start:stop], cloud[min(j + 1, end), start:stop]
                b2, b3 = cloud[min(j + 2, end), start:stop], cloud[min(j + 3, end), start:stop]
                s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = 0.0
                s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = 0.0
                for k in range(stop - start):  # from 0: the compiler then vectorizes the loop
                    x0, x1, x2, x3 = np.float64(a0[k]), np.float64(a1[k]), np.float64(a2[k]), np.float64(a3[k])
                    y0, y1, y2, y3 = np.float64(b0[k]), np.float64(b1[k]), np.float64(b2[k]), np.float64(b3[k])
                    s00 += (x0 - y0) * (x0 - y0)
                    s01 += (x0 - y1) * (x0 - y1)
                    s02 += (x0 - y2) * (x0 - y2)
                    s03 += (x0 - y3) * (x0 - y3)
                    s10 += (x1 - y0) * (x1 - y0)
                    s11 += (x1 - y1) * (x1 - y1)
                    s12 += (x1 - y2) * (x1 - y2)
                    s13 += (x1 - y3) * (x1 - y3)
                    s20 += (x2 - y0) * (x2 - y0)
                    s21 += (x2 - y1) * (x2 - y1)
                    s22 += (x2 - y2) * (x2 - y2)
                    s23 += (x2 - y3) * (x2 - y3)
                    s30 += (x3 - y0) * (x3 - y0)
                    s31 += (x3 - y1) * (x3 - y1)
                    s32 += (x3 - y2) * (x3 - y2)
                    s33 += (x3 - y3) * (x3 - y3)
                tile = ((s00, s01, s02, s03), (s10, s11, s12, s13), (s20, s21, s22, s23), (s30, s31, s32, s33))
                for row in range(_TILE):
                    for column in range(_TILE):
                        sums[i + row, j + column] += tile[row][column]
    return sums[:num_points, :num_points]
