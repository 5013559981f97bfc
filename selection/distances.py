"""Distances between the points of a cloud too large to keep.

A cloud of n points is an (n, d) matrix with n of tens and d of up to millions:
rows are images, columns the elements of one layer's activation. Reading it is
what costs, so it is read once, in single precision and by all cores; the few
distances whose order that can't settle are then taken again in double
precision. Betti numbers hang on the order of the distances alone, so they are
those of double precision throughout.
"""

import os

import numba
import numpy as np

# Columns that one tile of 4 x 4 pairs sums up in float32 before it adds to the
# float64 total; 32 rows of them stay in a core's cache.
_BLOCK = 512

# Largest relative error of a squared distance so computed: each of 8 SIMD lanes
# or more adds up to _BLOCK / 8 non-negative terms, with a rounding of 2**-24
# each, and a term has three of its own. (With 4 lanes the worst case is twice
# that, if all roundings went one way.)
_ERROR = (_BLOCK / 8 + 4) * 2.0**-24

# Squared distances outside of this range may have lost terms to float32's ends.
_SMALLEST, _LARGEST = 1e-25, 1e30

# What keeps NaN and infinity as they are, and lets sums go over SIMD lanes.
_FAST = {"reassoc", "contract", "nsz"}


def num_workers():
    """Returns the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pairwise_distances(cloud, pool=None, num_parts=1):
    """Returns the Euclidean distances between the points of a cloud.

    Args:
        cloud: float32 array of shape (n, d).
        pool: ThreadPoolExecutor that the work is shared out to, or None.
        num_parts: int. Parts that it is shared out in; the same number gives the
            same result to the last bit.

    Returns:
        float64 array of shape (n, n): symmetric, zero on the diagonal, in the
        order of the true distances (up to float64's rounding); NaN or infinite
        somewhere where the cloud is not finite.
    """
    cloud = np.ascontiguousarray(cloud)
    num_points, dimension = cloud.shape
    run = pool.map if pool else map
    bounds = [dimension * part // num_parts // _BLOCK * _BLOCK for part in range(num_parts)] + [dimension]
    squared = sum(run(lambda part: _squared_in_tiles(cloud, bounds[part], bounds[part + 1]), range(num_parts)))
    rows, columns = np.triu_indices(num_points, 1)
    values = squared[rows, columns]
    unsure = _unsure(values)
    shares = [unsure[part::num_parts] for part in range(num_parts)]
    for share, exact in zip(shares, run(lambda share: _squared_of_pairs(cloud, rows[share], columns[share]), shares)):
        values[share] = exact
    distances = np.zeros((num_points, num_points))
    distances[rows, columns] = distances[columns, rows] = np.sqrt(values)
    return distances


def from_gram(gram):
    """Returns the distances, as `pairwise_distances` does, from a float64 Gram matrix of shape (n, n)."""
    norms = np.diagonal(gram)
    squared = np.triu(norms[:, None] + norms[None, :] - 2 * gram, 1)
    distances = np.sqrt(np.maximum(squared, 0))
    return distances + distances.T


def _unsure(squared):
    """Returns the indices of squared distances that could change places with another one.

    Args:
        squared: float64 array of shape (pairs,), each good to a relative _ERROR.
    """
    order = np.argsort(squared)
    ordered = squared[order]
    # Written so that NaN is unsure.
    apart = ordered[1:] * (1 - _ERROR) > ordered[:-1] * (1 + _ERROR)
    sure = (ordered > _SMALLEST) & (ordered < _LARGEST)
    sure[1:] &= apart
    sure[:-1] &= apart
    return order[~sure]


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _squared_of_pairs(cloud, rows, columns):
    """Returns the squared distances of the points rows[k] and columns[k] in float64, shape (pairs,)."""
    squared = np.empty(len(rows))
    for k in range(len(rows)):
        a, b = cloud[rows[k]], cloud[columns[k]]
        total = 0.0
        for c in range(cloud.shape[1]):
            difference = np.float64(a[c]) - np.float64(b[c])
            total += difference * difference
        squared[k] = total
    return squared


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _squared_in_tiles(cloud, start, stop):
    """Sums the squared differences of the columns from `start` to `stop`, for all pairs of points.

    Differences are taken before they are squared, so that no digits cancel,
    wherever the cloud lies. A tile of 4 x 4 pairs is what keeps its 16 sums and
    8 operands in SIMD registers.

    Args:
        cloud: float32 array of shape (n, d), C order.

    Returns:
        float64 array of shape (m, m), m being n rounded up to whole tiles; valid
        in the upper triangle of the first n rows and columns.
    """
    num_points = cloud.shape[0]
    last = num_points - 1
    padded = (num_points + 3) // 4 * 4
    total = np.zeros((padded, padded))
    for begin in range(start, stop, _BLOCK):
        end = min(begin + _BLOCK, stop)
        for i in range(0, padded, 4):
            a0, a1 = cloud[i, begin:end], cloud[min(i + 1, last), begin:end]
            a2, a3 = cloud[min(i + 2, last), begin:end], cloud[min(i + 3, last), begin:end]
            for j in range(i, padded, 4):
                b0, b1 = cloud[j, begin:end], cloud[min(j + 1, last), begin:end]
                b2, b3 = cloud[min(j + 2, last), begin:end], cloud[min(j + 3, last), begin:end]
                zero = np.float32(0)
                s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = zero
                s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = zero
                for c in range(end - begin):
                    u0, u1, u2, u3 = a0[c], a1[c], a2[c], a3[c]
                    v0, v1, v2, v3 = b0[c], b1[c], b2[c], b3[c]
                    s00 += (u0 - v0) * (u0 - v0)
                    s01 += (u0 - v1) * (u0 - v1)
                    s02 += (u0 - v2) * (u0 - v2)
                    s03 += (u0 - v3) * (u0 - v3)
                    s10 += (u1 - v0) * (u1 - v0)
                    s11 += (u1 - v1) * (u1 - v1)
                    s12 += (u1 - v2) * (u1 - v2)
                    s13 += (u1 - v3) * (u1 - v3)
                    s20 += (u2 - v0) * (u2 - v0)
                    s21 += (u2 - v1) * (u2 - v1)
                    s22 += (u2 - v2) * (u2 - v2)
                    s23 += (u2 - v3) * (u2 - v3)
                    s30 += (u3 - v0) * (u3 - v0)
                    s31 += (u3 - v1) * (u3 - v1)
                    s32 += (u3 - v2) * (u3 - v2)
                    s33 += (u3 - v3) * (u3 - v3)
                total[i, j] += s00
                total[i, j + 1] += s01
                total[i, j + 2] += s02
                total[i, j + 3] += s03
                total[i + 1, j] += s10
                total[i + 1, j + 1] += s11
                total[i + 1, j + 2] += s12
                total[i + 1, j + 3] += s13
                total[i + 2, j] += s20
                total[i + 2, j + 1] += s21
                total[i + 2, j + 2] += s22
                total[i + 2, j + 3] += s23
                total[i + 3, j] += s30
                total[i + 3, j + 1] += s31
                total[i + 3, j + 2] += s32
                total[i + 3, j + 3] += s33
    return total
