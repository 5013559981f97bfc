"""Distances between the points of a cloud too large to keep.

A cloud of n points is an (n, d) matrix with n of tens and d of up to millions:
rows are images, columns the elements of one layer's activation. Reading it is
what costs, so it is read once, in single precision and by all cores; the few
distances whose order that can't settle are then taken again in double
precision. Betti numbers hang on the order of the distances, and on ties to
float32's last digit, alone: so they are those of double precision throughout.

A batch normalisation scales and shifts each channel of its input. The same
reading that gives the input's distances gives the output's too, as sums weighted
by channel. Then the input can be turned into the output, and a clipping behind it
be done, where it lies.
"""

import os
from typing import NamedTuple

import numba
import numpy as np

from selection.tiles import LANES, SIDE, STEPS, sums_of_rounds

_UNIT = 2.0**-24  # float32's unit roundoff

# Largest relative error of a squared distance so computed, terms being
# non-negative: one rounding of the difference counts twice, one of each step,
# one of each halving of the lanes, and two of a weight and its product.
_ERROR = (2 + STEPS + np.log2(LANES) + 2) * _UNIT

# Squared distances outside of this range may have lost terms to float32's ends
# (a weighted sum, where it is smaller than _SMALLEST times the largest weight).
_SMALLEST, _LARGEST = 1e-25, 1e30

# Where more pairs than _SAMPLE are in doubt by the worst case, at least so many
# are summed again first. Roundings hardly ever all go one way: every pair's error is
# then taken to be at most _MARGIN times that share of its worst case that these
# show. No proof, but a good wager; smaller clouds do without it.
_SAMPLE, _MARGIN = 32, 4
_SAMPLED_POINTS = 16

# Columns that are read again, or normalised, at a time, at least.
_BLOCK = 1024

_AS_IT_IS = np.empty((2, 0), np.float32)  # no scaling of columns

# Elements that are worth a second thread.
_SHARE = 1 << 20


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
    cloud = np.ascontiguousarray(cloud, np.float32)
    plain, _ = _sums(cloud, None, pool, num_parts)

    def sum_again(ends):
        return _sum_again(cloud, _AS_IT_IS, ends, pool, num_parts)

    pairs = _pairs(plain, None, _SMALLEST, sum_again)
    pairs.values[pairs.unsure] = sum_again(pairs.ends[:, pairs.unsure])
    return _symmetric(pairs, len(cloud))


def normalised_distances(cloud, scale, shift, bounds, pool=None, num_parts=1):
    """Returns the distances in a cloud, and in the same normalised by channel.

    Column k belongs to channel k modulo c. Normalised, an element x is
    scale * x + shift in float32, rounded after the product and after the sum.
    The cloud itself is left normalised and clipped to `bounds`.

    Args:
        cloud: float32 array of shape (n, d), C-contiguous, d a multiple of c;
            written to.
        scale, shift: float32 arrays of shape (c,).
        bounds: float32 pair. Lowest and highest value left; the distances don't
            know of them.
        pool, num_parts: see `pairwise_distances`.

    Returns:
        two float64 arrays of shape (n, n), as `pairwise_distances` gives them.

    Raises:
        ValueError: an array is not as said above.
    """
    dimension = cloud.shape[1]
    if not cloud.flags.c_contiguous or {cloud.dtype, scale.dtype, shift.dtype} != {np.dtype(np.float32)}:
        raise ValueError("cloud, scale and shift must be float32, and cloud C-contiguous")
    if dimension % len(scale):
        raise ValueError(f"a cloud's columns must be a multiple of its channels. Received: {dimension}, {len(scale)}")
    repeats = -(-_BLOCK // len(scale))
    scaling = np.tile(np.stack([scale, shift]), repeats)
    plain, weighted = _sums(cloud, scale, pool, num_parts)
    # An element is off by one rounding of s x and one of the sum, at most |s x| + |t|.
    offset = np.sqrt(dimension // len(shift)) * np.linalg.norm(shift.astype(np.float64))
    noise = (1 + 1e-6) * _UNIT * (2 * np.sqrt(np.diagonal(weighted)) + offset)
    smallest = _SMALLEST * max(1, float(np.abs(scale).max()) ** 2)
    before = _pairs(plain, None, _SMALLEST, lambda ends: _sum_again(cloud, _AS_IT_IS, ends, pool, num_parts))
    after = _pairs(weighted, noise, smallest, lambda ends: _sum_again(cloud, scaling, ends, pool, num_parts))

    before_ends, after_ends = (np.ascontiguousarray(pairs.ends[:, pairs.unsure]) for pairs in (before, after))

    def last_reading(first, last):
        return _normalise(cloud, scaling, *bounds, before_ends, after_ends, first, last)

    parts = _shared_out(last_reading, -(-dimension // scaling.shape[1]), cloud.size, pool, num_parts)
    for pairs, squared in zip((before, after), zip(*parts)):
        pairs.values[pairs.unsure] = sum(squared)
    return _symmetric(before, len(cloud)), _symmetric(after, len(cloud))


def from_gram(gram):
    """Returns the distances, as `pairwise_distances` does, from a float64 Gram matrix of shape (n, n)."""
    norms = np.diagonal(gram)
    squared = np.triu(norms[:, None] + norms[None, :] - 2 * gram, 1)
    distances = np.sqrt(np.maximum(squared, 0))
    return distances + distances.T


def _sums(cloud, scale, pool, num_parts):
    """Reads a cloud once.

    Args:
        cloud: float32 array of shape (n, d), C-contiguous.
        scale: float32 array of shape (c,), see `normalised_distances`, or None.
        pool, num_parts: see `pairwise_distances`.

    Returns:
        plain, weighted: float64 arrays of shape (n, n), good to a relative error
        of `_ERROR`. Above the diagonal the squared distances of the points, on
        it their squared norms; the second with each column's terms weighted by
        its squared scale, or with no meaning where there is none.
    """
    dimension = cloud.shape[1]
    is_weighted = scale is not None
    if is_weighted:
        with np.errstate(over="ignore"):  # an infinite weight shows in the distances
            weights = np.tile(scale * scale, np.lcm(len(scale), LANES) // len(scale))
    else:
        weights = np.ones(4 * LANES, np.float32)
    period = len(weights)
    rounds = dimension // period

    def part(start, stop):
        return sums_of_rounds(cloud, start, stop, weights, is_weighted)

    totals = sum(_shared_out(part, rounds, cloud.size, pool, num_parts))
    return _add_rest(cloud, rounds * period, weights, totals)


def _shared_out(function, count, elements, pool, num_parts):
    """Calls function(start, stop) on `num_parts` parts of range(count), or on all of it where that is little.

    Args:
        elements: int. Elements of clouds that are read in all.
        pool, num_parts: see `pairwise_distances`.

    Returns:
        list of what it returned, in the parts' order.
    """
    parts = num_parts if elements > _SHARE else 1
    ends = [count * part // parts for part in range(parts + 1)]
    futures = [pool.submit(function, *ends[part : part + 2]) for part in range(1, parts)] if pool else []
    here = [function(*ends[part : part + 2]) for part in range(parts - len(futures))]
    return here + [future.result() for future in futures]


class _Pairs(NamedTuple):
    """The pairs of points of a cloud, first below second.

    Attributes:
        ends: int array of shape (2, pairs). The two points of each.
        values: float64 array of shape (pairs,). Squared distances.
        unsure: int array. Indices of those that could change places, or tie, with
            another one, and have to be taken again.
    """

    ends: np.ndarray
    values: np.ndarray
    unsure: np.ndarray


def _pairs(squared, noise, smallest, sum_again):
    """Returns the `_Pairs` of squared distances that are good to some error.

    Args:
        squared: float64 array of shape (n, n), as `_sums` returns.
        noise: float64 array of shape (n,). How far each point may lie, in
            Euclidean norm, from the one that `squared` speaks of. None is zero.
        smallest: float. Below this a value has no known error.
        sum_again: function (ends) -> the exact values of some pairs.
    """
    ends, values, low, high = _pairs_above(squared, np.zeros(len(squared)) if noise is None else noise)
    unsure = _in_doubt(values, low, high, np.argsort(values), smallest)
    if len(unsure) > _SAMPLE:
        # A value without a known error is no measure for others.
        sample = _sample(ends, values, unsure[~(values[unsure] <= smallest)], len(squared))
        exact = sum_again(ends[:, sample])
        worst = np.maximum(values - low, high - values)[sample]
        off = np.abs(values[sample] - exact) / worst
        share = min(1, _MARGIN * np.nan_to_num(off, nan=1).max()) if len(sample) >= _SAMPLE else 1
        values = _put(values, sample, exact)
        low = _put(values - share * (values - low), sample, exact)
        high = _put(values + share * (high - values), sample, exact)
        unsure = np.setdiff1d(_in_doubt(values, low, high, np.argsort(values), smallest), sample, assume_unique=True)
    return _Pairs(ends, values, unsure)


def _sample(ends, values, known, num_points):
    """Returns some of the pairs `known`, at least `_SAMPLE` of them where there are as many.

    From all over the cloud: near points are no measure for far ones, and what an
    image that is there twice gives twice counts once. And from few points, where
    that does, for few rows to be read.
    """
    few = known[(ends[:, known] % max(1, num_points // _SAMPLED_POINTS) == 0).all(axis=0)]
    for pairs in (few, known):
        pairs = pairs[np.unique(values[pairs], return_index=True)[1]]
        if len(pairs) >= _SAMPLE:
            break
    return pairs[:: max(1, len(pairs) // _SAMPLE)]


def _put(values, where, new):
    """Returns a copy of `values` with `new` at the indices `where`."""
    changed = values.copy()
    changed[where] = new
    return changed


def _sum_again(cloud, scaling, ends, pool, num_parts):
    """Returns the squared distances of some pairs of points in float64, shape (pairs,).

    Args:
        cloud: float32 array of shape (n, d).
        scaling: float32 array of shape (2, p). Scales and shifts of the columns,
            which repeat every p columns, or `_AS_IT_IS`.
        ends: int array of shape (2, pairs).
        pool, num_parts: see `pairwise_distances`.
    """

    ends = np.ascontiguousarray(ends)  # Numba compiles for each layout

    def part(first, last):
        return _squared_of_pairs(cloud, scaling, ends, first, last)

    num_pairs, dimension = ends.shape[1], cloud.shape[1]
    if not num_pairs:
        return np.empty(0)
    blocks = -(-dimension // max(_BLOCK, scaling.shape[1]))
    return sum(_shared_out(part, blocks, num_pairs * 2 * dimension, pool, num_parts))


@numba.njit(nogil=True, cache=True)
def _add_rest(cloud, start, weights, totals):
    """Adds the columns from `start`, fewer than a round, to tiled totals.

    Returns:
        plain, weighted: as `_sums` does.
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
def _pairs_above(squared, noise):
    """Returns the ends, values and the values' lower and upper bounds of the pairs above the diagonal.

    `noise` as in `_pairs`; where that or the value is NaN, so are the bounds.
    """
    num_points = len(squared)
    pairs = num_points * (num_points - 1) // 2
    ends = np.empty((2, pairs), np.int64)
    values, low, high = np.empty(pairs), np.empty(pairs), np.empty(pairs)
    k = 0
    for i in range(num_points):
        for j in range(i + 1, num_points):
            far = noise[i] + noise[j]
            ends[0, k], ends[1, k], values[k] = i, j, squared[i, j]
            nearest = np.sqrt(squared[i, j] / (1 + _ERROR)) - far
            low[k] = 0.0 if nearest < 0 else nearest * nearest
            high[k] = (np.sqrt(squared[i, j] / (1 - _ERROR)) + far) ** 2
            k += 1
    return ends, values, low, high


@numba.njit(nogil=True, cache=True)
def _in_doubt(values, low, high, order, smallest):
    """Returns the indices of the values whose place among the others is not settled by their bounds.

    That is: which are smaller, which are larger, and which are the same distance
    in float32, for those tie (betti.py).

    Args:
        values, low, high: float64 arrays of shape (pairs,). Squared distances, and
            bounds of each.
        order: int array of shape (pairs,). What sorts the values; NumPy sorts
            faster than Numba.
        smallest: see `_pairs`.
    """
    pairs = len(values)
    # What lies above each place at least. NaN compares false, and so is in doubt.
    above = np.empty(pairs + 1)
    above[pairs] = np.inf
    for k in range(pairs - 1, -1, -1):
        above[k] = min(above[k + 1], low[order[k]])
    unsure = np.empty(pairs, np.int64)
    count = 0
    below = -1.0
    nearest_below = np.float32(-1)
    for k in range(pairs):
        pair = order[k]
        nearest, farthest = np.float32(np.sqrt(low[pair])), np.float32(np.sqrt(high[pair]))
        ordered = below < low[pair] and high[pair] < above[k + 1]
        apart = nearest_below < nearest and farthest < np.float32(np.sqrt(above[k + 1]))
        sure = ordered and (nearest == farthest or apart)
        if not (sure and smallest < values[pair] < _LARGEST):
            unsure[count] = pair
            count += 1
        below = max(below, high[pair])
        nearest_below = max(nearest_below, farthest)
    return unsure[:count]


def _symmetric(pairs, num_points):
    distances = np.zeros((num_points, num_points))
    first, second = pairs.ends
    distances[first, second] = distances[second, first] = np.sqrt(pairs.values)
    return distances


@numba.njit(nogil=True, cache=True)
def _squared_of_pairs(cloud, scaling, ends, first, last):
    """Sums the squared differences of pairs of points over some blocks of columns in float64.

    Block by block, so that a row that is in many pairs is in the cache for all.

    Args:
        cloud, scaling, ends: see `_sum_again`.
        first, last: int. Blocks, of `_BLOCK` columns or as many as `scaling` has.

    Returns:
        float64 array of shape (pairs,).
    """
    num_points, dimension = cloud.shape
    scales, shifts = scaling[0], scaling[1]
    width = max(_BLOCK, len(scales))
    is_end = _ends_among(num_points, ends)
    block = np.empty((num_points, width), np.float32)
    squared = np.zeros(ends.shape[1])
    for k in range(first, last):
        start, stop = k * width, min((k + 1) * width, dimension)
        for r in range(num_points):
            if is_end[r]:
                # Slices: an index that might be negative keeps a loop from SIMD lanes.
                source, target = cloud[r, start:stop], block[r, : stop - start]
                if len(scales):
                    _scale(source, scales, shifts, target)
                else:
                    target[:] = source
        _add_squared(squared, block, 0, stop - start, ends)
    return squared


@numba.njit(nogil=True, cache=True)
def _normalise(cloud, scaling, lowest, highest, ends, scaled_ends, first, last):
    """Scales, shifts and clips some blocks of columns where they lie.

    From the end, which was read last and may still be in the cache.

    Args:
        cloud, scaling: see `_sum_again`.
        lowest, highest: float32.
        ends, scaled_ends: int arrays of shape (2, pairs). Pairs of points to sum
            the squared differences of, as they were, and scaled but not clipped.
        first, last: int. Blocks, of as many columns as `scaling` has.

    Returns:
        float64 arrays of shape (pairs,), for `ends` and for `scaled_ends`.
    """
    num_points, dimension = cloud.shape
    scales, shifts = scaling[0], scaling[1]
    width = len(scales)
    is_end = _ends_among(num_points, scaled_ends)
    block = np.empty((num_points + 1, width), np.float32)  # the last row is for those that nobody asks for
    squared, squared_scaled = np.zeros(ends.shape[1]), np.zeros(scaled_ends.shape[1])
    for k in range(last - 1, first - 1, -1):
        start, stop = k * width, min((k + 1) * width, dimension)
        _add_squared(squared, cloud, start, stop, ends)
        for r in range(num_points):
            part, scaled = cloud[r, start:stop], block[r if is_end[r] else num_points]
            for c in range(len(part)):
                value = part[c] * scales[c] + shifts[c]
                scaled[c] = value
                value = lowest if value < lowest else value
                part[c] = highest if value > highest else value
        _add_squared(squared_scaled, block, 0, stop - start, scaled_ends)
    return squared, squared_scaled


@numba.njit(nogil=True, cache=True)
def _ends_among(num_points, ends):
    is_end = np.zeros(num_points, np.bool_)
    for k in range(ends.shape[1]):
        is_end[ends[0, k]] = is_end[ends[1, k]] = True
    return is_end


@numba.njit(nogil=True, cache=True)
def _scale(source, scales, shifts, target):
    for c in range(len(source)):
        target[c] = source[c] * scales[c] + shifts[c]


@numba.njit(nogil=True, cache=True)
def _add_squared(squared, points, start, stop, ends):
    for k in range(len(squared)):
        squared[k] += _squared_distance(points[ends[0, k], start:stop], points[ends[1, k], start:stop])


# What keeps NaN and infinity as they are, and lets sums go over SIMD lanes.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _squared_distance(a, b):
    total = 0.0
    for c in range(len(a)):
        difference = np.float64(a[c]) - np.float64(b[c])
        total += difference * difference
    return total
