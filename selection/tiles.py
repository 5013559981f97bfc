"""The one reading of a cloud under `selection.distances`: squared differences, tile by tile of rows.

Numba's loops are vectorised along one axis that LLVM picks. What is needed here
is another shape: lanes that stay on their columns, so that one pass gives both
the plain sum and a sum weighted by column. So the tile is written as vector
instructions, by Numba's `intrinsic`; LLVM splits vectors that a processor
doesn't have.

All addresses are int64, as `array.ctypes.data` gives them; the caller keeps the
arrays alive. The loops over tiles are in this file too because Numba's cache
looks at the file of a compiled function alone.
"""

import platform

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Rows on either side of a tile: 16 sums and 8 operands fit the registers.
SIDE = 4

# Vectors that a lane sums up in float32 before the sum goes to float64, at most.
STEPS = 16

# Bytes of the piece of a cloud that is worked on at a time. A common second-level
# cache holds that, the piece that comes next, and as much again.
_PIECE_BYTES = 1 << 18


def _lanes():
    """Returns how many float32 one SIMD register of this processor holds."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return 4
    return 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8


LANES = _lanes()
_VECTOR_BYTES = 4 * LANES

_FLOAT, _DOUBLE, _INT, _INDEX = ir.FloatType(), ir.DoubleType(), ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_FLOAT_BYTES, _DOUBLE_BYTES = 4, 8


def _tile(diagonal):
    """Returns the intrinsic for a tile off, or on, the diagonal of the pairs."""

    @intrinsic
    def tile(typing_context, a, b, row, steps, weights, total, weighted):
        """Adds the squared differences of 4 x 4 pairs of rows to their totals.

        Sums run over `steps` vectors a row in float32, then over the lanes, and
        are added to the totals in float64. On the diagonal (a is b) only pairs
        x <= y are summed, and a row paired with itself gives its squared norm.

        Args:
            a, b: addresses of the first of 4 rows of float32 vectors.
            row: int64. Vectors from one row to the next.
            steps: int64. Vectors of a row to sum over, at least 1.
            weights: address of float32 weights of the lanes, one vector.
            total: address of 16 float64, pair (x, y) at 4 x + y.
            weighted: the same for the weighted sums, or 0 where none are wanted.
        """
        return types.void(*[types.int64] * 7), _emit(diagonal)

    return tile


def _emit(diagonal):
    def generate(context, builder, signature, args):
        a, b, row, steps, weights, total, weighted = args
        fused = _intrinsic(builder, f"llvm.fma.v{LANES}f32", _VECTOR, [_VECTOR] * 3)
        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        pairs = [(x, y) for x in range(SIDE) for y in range(SIDE) if not diagonal or x <= y]

        before = builder.block
        loop, after = builder.append_basic_block("tile.loop"), builder.append_basic_block("tile.after")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_INT)
        step.add_incoming(_INT(0), before)
        sums = {}
        for pair in pairs:
            sums[pair] = builder.phi(_VECTOR)
            sums[pair].add_incoming(zero, before)

        def rows_at(base):
            first = builder.inttoptr(base, _VECTOR.as_pointer())
            return [_load(builder, first, builder.add(step, builder.mul(row, _INT(k))), 4) for k in range(SIDE)]

        left = rows_at(a)
        right = left if diagonal else rows_at(b)
        added = {}
        for x, y in pairs:
            difference = left[x] if diagonal and x == y else builder.fsub(left[x], right[y])
            added[x, y] = builder.call(fused, [difference, difference, sums[x, y]])
            sums[x, y].add_incoming(added[x, y], loop)
        following = builder.add(step, _INT(1))
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)

        builder.position_at_end(after)
        vectors = [added.get((x, y), zero) for x in range(SIDE) for y in range(SIDE)]
        _add_to(builder, total, vectors)
        with builder.if_then(builder.icmp_signed("!=", weighted, _INT(0))):
            factors = _load(builder, builder.inttoptr(weights, _VECTOR.as_pointer()), _INT(0), 4)
            _add_to(builder, weighted, [builder.fmul(vector, factors) for vector in vectors])
        return context.get_dummy_value()

    return generate


def _add_to(builder, address, vectors):
    """Adds the sum over the lanes of vector k to the float64 number k at `address`."""
    segment = LANES
    while segment > 1:  # each round adds the upper to the lower halves of two vectors' segments
        starts = range(0, 2 * LANES, segment)
        lower = [start + lane for start in starts for lane in range(segment // 2)]
        upper = [index + segment // 2 for index in lower]
        vectors = [
            builder.fadd(_shuffle(builder, *two, lower), _shuffle(builder, *two, upper))
            for two in zip(vectors[::2], vectors[1::2])
        ]
        segment //= 2
    wide = ir.VectorType(_DOUBLE, LANES)
    numbers = builder.inttoptr(address, wide.as_pointer())
    for k, vector in enumerate(vectors):
        place = builder.gep(numbers, [_INT(k)])
        found = builder.load(place)
        found.align = _DOUBLE_BYTES
        builder.store(builder.fadd(found, builder.fpext(vector, wide)), place).align = _DOUBLE_BYTES


def _shuffle(builder, first, second, indices):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INDEX, LANES), indices))


def _load(builder, pointer, index, align):
    loaded = builder.load(builder.gep(pointer, [index]))
    loaded.align = align
    return loaded


def _intrinsic(builder, name, returned, arguments):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(returned, arguments), name)


@intrinsic
def _copy_vector(typing_context, target, source):
    """Copies one float32 vector."""

    def generate(context, builder, signature, args):
        _store(builder, _load_at(builder, args[1]), args[0])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), generate


@intrinsic
def _ask_for(typing_context, address):
    """Asks for the cache line at an address, to be in the second-level cache when it is read."""

    def generate(context, builder, signature, args):
        pointer = ir.IntType(8).as_pointer()
        prefetch = _intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, _INDEX, _INDEX, _INDEX])
        # For reading, at level 2, as data.
        builder.call(prefetch, [builder.inttoptr(args[0], pointer), _INDEX(0), _INDEX(2), _INDEX(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _load_at(builder, address):
    return _load(builder, builder.inttoptr(address, _VECTOR.as_pointer()), _INT(0), _FLOAT_BYTES)


def _store(builder, vector, address):
    builder.store(vector, builder.inttoptr(address, _VECTOR.as_pointer())).align = _FLOAT_BYTES


_tile_of_pairs = _tile(diagonal=False)
_tile_on_diagonal = _tile(diagonal=True)


@numba.njit(nogil=True, cache=True)
def sums_of_rounds(cloud, start, stop, weights, is_weighted):
    """Sums squared differences over the rounds from `start` to `stop`.

    A round is len(weights) columns. The cloud is read piece by piece, some rounds
    by some lanes' groups: while one is summed, the next is on its way from memory.

    Returns:
        float64 array of shape (2, t, t, 4, 4): plain and weighted sums of tiles
        of 4 x 4 points, t of them a side; valid for points x <= y.
    """
    num_points, dimension = cloud.shape
    tiles = (num_points + SIDE - 1) // SIDE
    groups = len(weights) // LANES
    room = max(STEPS, _PIECE_BYTES // (num_points * _VECTOR_BYTES))  # vectors a row
    # Wide before deep: neighbours come from memory together.
    wide = min(groups, room // STEPS)
    deep = room // (STEPS * wide) * STEPS
    across = (groups + wide - 1) // wide
    pieces = across * ((stop - start + deep - 1) // deep)

    totals = np.zeros((2, tiles, tiles, SIDE, SIDE))
    # One vector more than needed: rows a power of two apart share their places in a cache.
    packed = np.empty((tiles * SIDE, STEPS + 1, LANES), np.float32)
    # Signed, all of them: Numba would make floats of a mixture.
    source, target = np.int64(cloud.ctypes.data), np.int64(packed.ctypes.data)
    lane_weights, plain = np.int64(weights.ctypes.data), np.int64(totals.ctypes.data)
    second = np.int64(totals[1].ctypes.data) if is_weighted else np.int64(0)
    from_row, from_round = 4 * dimension, groups * _VECTOR_BYTES
    for piece in range(pieces):
        begin, first = start + piece // across * deep, piece % across * wide
        here = (num_points, min(deep, stop - begin), min(wide, groups - first))
        at = source + begin * from_round + first * _VECTOR_BYTES
        factors = lane_weights + first * _VECTOR_BYTES
        begin, first = start + (piece + 1) // across * deep, (piece + 1) % across * wide
        ahead = (num_points, max(0, min(deep, stop - begin)), min(wide, groups - first))
        at_ahead = source + begin * from_round + first * _VECTOR_BYTES
        _add_piece(at, here, at_ahead, ahead, from_row, from_round, target, factors, plain, second)
    packed[0, 0, 0] = 0  # it has to live to here: the addresses alone don't keep it
    return totals


@numba.njit(nogil=True, cache=True)
def _add_piece(at, here, at_ahead, ahead, from_row, from_round, packed, weights, plain, second):
    """Adds a piece's squared differences to the totals, and asks for the next piece bit by bit.

    Args:
        at, at_ahead: addresses of this piece and of the next.
        here, ahead: rows, rounds and groups of lanes of either.
        from_row, from_round: int. Bytes from one to the next in the cloud.
        packed: address of float32 of shape (4 * tiles, STEPS + 1, LANES), to work in.
        weights: address of the groups' weights.
        plain, second: addresses of the totals; `second` is 0 where nothing is weighted.
    """
    num_rows, depth, width = here
    rows_ahead, depth_ahead, width_ahead = ahead
    tiles = (num_rows + SIDE - 1) // SIDE
    row, tile_bytes = STEPS + 1, SIDE * (STEPS + 1) * _VECTOR_BYTES
    calls = width * ((depth + STEPS - 1) // STEPS) * tiles * (tiles + 1) // 2
    vectors = rows_ahead * depth_ahead * width_ahead
    share = (vectors + calls - 1) // calls
    r, t, g = 0, 0, 0
    for h in range(width):
        for begin in range(0, depth, STEPS):
            count = min(STEPS, depth - begin)
            _pack(at + h * _VECTOR_BYTES + begin * from_round, num_rows, count, from_row, from_round, packed)
            factors = weights + h * _VECTOR_BYTES
            for i in range(tiles):
                a = packed + i * tile_bytes
                for j in range(i, tiles):
                    b = packed + j * tile_bytes
                    place = (i * tiles + j) * SIDE * SIDE * 8
                    sums = second + place if second else np.int64(0)
                    if i == j:
                        _tile_on_diagonal(a, b, row, count, factors, plain + place, sums)
                    else:
                        _tile_of_pairs(a, b, row, count, factors, plain + place, sums)
                    for _ in range(min(share, vectors)):
                        _ask_for(at_ahead + r * from_row + t * from_round + g * _VECTOR_BYTES)
                        g += 1
                        if g == width_ahead:
                            g = 0
                            t += 1
                            if t == depth_ahead:
                                t = 0
                                r += 1
                    vectors -= share


@numba.njit(nogil=True, cache=True)
def _pack(source, num_rows, count, from_row, from_round, packed):
    """Copies `count` vectors a row to where they lie behind each other.

    The tiles then read them in order and from the cache, wherever the rows of the
    cloud lie. Rows missing to whole tiles are the last one again.

    Args:
        source, packed: addresses; the rest as `_add_piece` has it.
    """
    for r in range((num_rows + SIDE - 1) // SIDE * SIDE):
        at, to = source + min(r, num_rows - 1) * from_row, packed + r * (STEPS + 1) * _VECTOR_BYTES
        for t in range(count):
            _copy_vector(to + t * _VECTOR_BYTES, at + t * from_round)
