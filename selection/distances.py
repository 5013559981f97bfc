"""Distances between the points of a cloud too large to keep.

A cloud of n points is an (n, d) matrix with n of tens and d of up to millions:
rows are images, columns the elements of one layer's activation. Reading it is
what costs, so it is read once, in single precision and by all cores; the few
distances whose order that can't settle are then taken again in double
precision. Betti numbers hang on the order of the distances alone, so they are
those of double precision throughout.

A batch normalisation by stored statistics scales and shifts each channel of its
input. The same reading that gives the input's distances gives the output's too,
as sums weighted by channel; of the output only what stays in doubt is read.
"""

import os
from dataclasses import dataclass

import numba
import numpy as np

from selection.tiles import LANES, SIDE, copy_vector, tile_of_pairs, tile_on_diagonal

# Vectors that a lane sums up in float32 before the sum goes to float64, at most.
_STEPS = 16

# Bytes of the packed part of a cloud that is worked on at a time: half of a
# common second-level cache.
_PACKED_BYTES = 1 << 19

_UNIT = 2.0**-24  # float32's unit roundoff

# Largest relative error of a squared distance so computed, terms being
# non-negative: one rounding of the difference counts twice, one of each step,
# one of each halving of the lanes, and two of a weight and its product.
_ERROR = (2 + _STEPS + np.log2(LANES) + 2) * _UNIT

# Squared distances outside of this range may have lost terms to float32's ends.
_SMALLEST, _LARGEST = 1e-25, 1e30

# Where more pairs than _SAMPLE are in doubt by the worst case, so many are summed
# again first. Roundings hardly ever all go one way: the error is then taken to
# be at most _MARGIN times the largest that these show.
_SAMPLE, _MARGIN = 32, 4

# Elements that are worth a second thread.
_SHARE = 1 << 20


@dataclass(frozen=True)
class Sums:
    """Sums over the columns of a cloud, good to a relative error known beforehand.

    Attributes:
        plain: float64 array of shape (n, n). Above the diagonal the squared
            distances of the points, on it their squared norms.
        weighted: the same with each column's terms weighted, or None.
    """

    plain: np.ndarray
    weighted: np.ndarray | None


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
    return settled(cloud, sums_of_squares(cloud, None, pool, num_parts).plain, pool=pool, num_parts=num_parts)


def sums_of_squares(cloud, weights=None, pool=None, num_parts=1):
    """Reads a cloud once and returns its `Sums`.

    Args:
        cloud: float32 array of shape (n, d).
        weights: float32 array of shape (c,), not negative, or None: d is a
            multiple of c, and column k has weight k modulo c.
        pool, num_parts: see `pairwise_distances`.
    """
    cloud = np.ascontiguousarray(cloud)
    num_points, dimension = cloud.shape
    if weights is None:
        lanes_weights, is_weighted = np.ones(4 * LANES, np.float32), False
    else:
        lanes_weights, is_weighted = np.tile(weights, np.lcm(len(weights), LANES) // len(weights)), True
    period = len(lanes_weights)
    rounds = dimension // period
    parts = num_parts if cloud.size > _SHARE else 1
    bounds = [rounds * part // parts for part in range(parts + 1)]

    def part(k):
        return _sums_of_rounds(cloud, bounds[k], bounds[k + 1], lanes_weights, is_weighted)

    totals = sum((pool.map if pool and parts > 1 else map)(part, range(parts)))
    plain, weighted = _add_rest(cloud, rounds * period, lanes_weights, totals)
    return Sums(plain, weighted if is_weighted else None)


def settled(cloud, squared, noise=None, pool=None, num_parts=1):
    """Returns distances from squared ones, reading `cloud` again where their order is in doubt.

    Args:
        cloud: float32 array of shape (n, d).
        squared: float64 array of shape (n, n), as `Sums` holds.
        noise: float64 array of shape (n,), or None. How far each row of `cloud`
            may lie, in Euclidean norm, from the point that `squared` speaks of.
        pool, num_parts: see `pairwise_distances`.

    Returns:
        float64 array of shape (n, n), see `pairwise_distances`.
    """
    rows, columns, values = _pairs_above(squared)

    def sum_again(which):
        parts = num_parts if pool and len(which) * cloud.shape[1] > _SHARE else 1
        which = np.sort(which)  # by rows, so that one of the two is in the cache mostly
        shares = np.array_split(which, parts)
        again = (pool.map if parts > 1 else map)(lambda pairs: _squared_of_pairs(cloud, rows[pairs], columns[pairs]), shares)
        for share, exact in zip(shares, again):
            values[share] = exact

    error = _worst_errors(values, rows, columns, np.zeros(len(squared)) if noise is None else noise)
    unsure = _in_doubt(values, error)
    if len(unsure) > _SAMPLE:
        sample = unsure[:: len(unsure) // _SAMPLE]
        estimates = values[sample]
        sum_again(sample)
        apart = values[sample] > 0  # points that are one have no relative error
        seen = np.abs(estimates[apart] / values[sample][apart] - 1).max(initial=0)
        error = np.minimum(error, _MARGIN * seen)
        error[sample] = 0
        unsure = np.setdiff1d(_in_doubt(values, error), sample, assume_unique=True)
    sum_again(unsure)
    return _symmetric(values, rows, columns, len(squared))


def normalised_noise(weighted, shift, offset, positions):
    """Bounds what float32 does to the rows of a normalised cloud.

    A normalisation computes y = s x + (b - s m), or s (x - m) + b, by channel:
    products and sums of at most |s x| + |s m| + |b|, four roundings in all;
    another four are left to s itself, whose reciprocal root may be off by as
    many.

    Args:
        weighted: float64 array of shape (n, n). Weighted `Sums`, the weights
            being s * s.
        shift: float. Euclidean norm of s m over the channels.
        offset: float. The same of b.
        positions: int. Columns of a channel.

    Returns:
        float64 array of shape (n,), for `settled`.
    """
    return 8 * _UNIT * (np.sqrt(np.diagonal(weighted)) + np.sqrt(positions) * (shift + offset))


def from_gram(gram):
    """Returns the distances, as `pairwise_distances` does, from a float64 Gram matrix of shape (n, n)."""
    norms = np.diagonal(gram)
    squared = np.triu(norms[:, None] + norms[None, :] - 2 * gram, 1)
    distances = np.sqrt(np.maximum(squared, 0))
    return distances + distances.T


@numba.njit(nogil=True, cache=True)
def _sums_of_rounds(cloud, start, stop, weights, is_weighted):
    """Sums squared differences over the rounds from `start` to `stop`.

    A round is len(weights) columns. Some are packed at a time, each lane's
    vectors behind each other, so that the tiles read them in order and from the
    cache, wherever the rows of the cloud lie.

    Returns:
        float64 array of shape (2, t, t, 4, 4): plain and weighted sums of tiles
        of 4 x 4 points, t of them a side; valid for points x <= y.
    """
    num_points, dimension = cloud.shape
    tiles = (num_points + SIDE - 1) // SIDE
    groups = len(weights) // LANES
    vector_bytes = 4 * LANES
    room = max(1, _PACKED_BYTES // (tiles * SIDE * vector_bytes))  # vectors a row
    steps = max(min(_STEPS, room), 1)
    if is_weighted:
        together = max(1, min(groups, room // steps))
        deep = steps * max(1, min(8, room // (steps * together)))
    else:
        together = groups
        deep = steps * max(1, room // (steps * together))

    totals = np.zeros((2, tiles, tiles, SIDE, SIDE))
    row = deep + 1  # not a power of two, which would map all rows to the same cache lines
    packed = np.empty((together, tiles * SIDE, row, LANES), np.float32)
    source, target, lane_weights = cloud.ctypes.data, packed.ctypes.data, weights.ctypes.data
    plain = totals.ctypes.data
    second = totals[1].ctypes.data
    for begin in range(start, stop, deep):
        depth = min(deep, stop - begin)
        for first in range(0, groups, together):
            last = min(first + together, groups)
            for r in range(tiles * SIDE):
                at = source + 4 * (min(r, num_points - 1) * dimension + begin * len(weights))
                ahead = 4 * dimension if r < num_points - 1 else 0
                for t in range(depth):
                    for g in range(first, last):
                        element = at + t * 4 * len(weights) + g * vector_bytes
                        copy_vector(
                            target + (((g - first) * tiles * SIDE + r) * row + t) * vector_bytes, element, element + ahead
                        )
            for g in range(first, last):
                for t in range(0, depth, steps):
                    base = target + ((g - first) * tiles * SIDE * row + t) * vector_bytes
                    count = min(steps, depth - t)
                    factors = lane_weights + g * vector_bytes
                    for i in range(tiles):
                        a = base + i * SIDE * row * vector_bytes
                        for j in range(i, tiles):
                            b = base + j * SIDE * row * vector_bytes
                            place = (i * tiles + j) * SIDE * SIDE * 8
                            sums = second + place if is_weighted else 0
                            if i == j:
                                tile_on_diagonal(a, b, row, count, factors, plain + place, sums)
                            else:
                                tile_of_pairs(a, b, row, count, factors, plain + place, sums)
    packed[0, 0, 0, 0] = 0  # it has to live to here: the addresses alone don't keep it
    return totals


@numba.njit(nogil=True, cache=True)
def _add_rest(cloud, start, weights, totals):
    """Adds the columns from `start`, fewer than a round, to tiled totals.

    Returns:
        plain, weighted: float64 arrays of shape (n, n), valid on and above the
        diagonal, which has the squared norms.
    """
    num_points, dimension = cloud.shape
    plain, weighted = np.zeros((num_points, num_points)), np.zeros((num_points, num_points))
    for i in range(num_points):
        for j in range(i, num_points):
            tile = totals[:, i // SIDE, j // SIDE, i % SIDE, j % SIDE]
            rest, rest_weighted = tile[0], tile[1]
            for c in range(start, dimension):
                difference = np.float64(cloud[i, c]) - (np.float64(cloud[j, c]) if i != j else 0.0)
                term = difference * difference
                rest += term
                rest_weighted += term * weights[c - start]
            plain[i, j] = rest
            weighted[i, j] = rest_weighted
    return plain, weighted


@numba.njit(nogil=True, cache=True)
def _pairs_above(matrix):
    """Returns the rows, columns and values above a matrix' diagonal, each of shape (pairs,)."""
    num_points = len(matrix)
    pairs = num_points * (num_points - 1) // 2
    rows, columns, values = np.empty(pairs, np.int64), np.empty(pairs, np.int64), np.empty(pairs)
    k = 0
    for i in range(num_points):
        for j in range(i + 1, num_points):
            rows[k], columns[k], values[k] = i, j, matrix[i, j]
            k += 1
    return rows, columns, values


@numba.njit(nogil=True, cache=True)
def _worst_errors(squared, rows, columns, noise):
    """Bounds the relative error of each squared distance, given `noise` as in `settled`."""
    errors = np.empty(len(squared))
    for k in range(len(squared)):
        far = noise[rows[k]] + noise[columns[k]]
        errors[k] = (1 + _ERROR) * (1 + far / np.sqrt(squared[k])) ** 2 - 1 if far > 0 else _ERROR
    return errors


@numba.njit(nogil=True, cache=True)
def _in_doubt(squared, errors):
    """Returns the indices of the squared distances that could change places, or tie, with another one.

    Args:
        squared, errors: float64 arrays of shape (pairs,). Values, and how much
            each may be off, relatively.
    """
    pairs = len(squared)
    order = np.argsort(squared)
    # What lies above each place at least. NaN compares false, and so is in doubt.
    above = np.empty(pairs + 1)
    above[pairs] = np.inf
    for k in range(pairs - 1, -1, -1):
        pair = order[k]
        above[k] = min(above[k + 1], squared[pair] * (1 - errors[pair]))
    unsure = np.empty(pairs, np.int64)
    count = 0
    below = -1.0
    for k in range(pairs):
        pair = order[k]
        value = squared[pair]
        sure = below < value * (1 - errors[pair]) and value * (1 + errors[pair]) < above[k + 1]
        if not (sure and value > _SMALLEST and value < _LARGEST):
            unsure[count] = pair
            count += 1
        below = max(below, value * (1 + errors[pair]))
    return unsure[:count]


@numba.njit(nogil=True, cache=True)
def _symmetric(squared, rows, columns, num_points):
    distances = np.zeros((num_points, num_points))
    for k in range(len(squared)):
        distances[rows[k], columns[k]] = distances[columns[k], rows[k]] = np.sqrt(squared[k])
    return distances


# What keeps NaN and infinity as they are, and lets sums go over SIMD lanes.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
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
