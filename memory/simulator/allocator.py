"""TensorFlow's best-fit-with-coalescing allocator, for its byte counts.

The measured peak counts chunks, not requests. A free chunk is split only if it is at
least twice the request (or 128 MiB too large), so a request may occupy almost twice
its size: an eighth of the peak in a training step of MobileNetV2. The rules are those of
TensorFlow's bfc_allocator.cc.
"""

from bisect import bisect_left, insort

_ALIGNMENT = 256  # bytes; every chunk is a multiple
_MAX_WASTE = 128 << 20  # bytes that a chunk may exceed a request by before it is split anyway
_FIRST_REGION = 2 << 20  # bytes


class Chunk:
    """A piece of a region, in use or free, with its neighbours in address order."""

    __slots__ = ("address", "after", "before", "free", "size")

    def __init__(self, size, address, before=None, after=None):
        self.size, self.address, self.before, self.after = size, address, before, after
        self.free = True


class Allocator:
    """Hands out chunks and counts their bytes.

    Attributes:
        in_use: int. Bytes of the chunks in use.
    """

    def __init__(self):
        self.in_use = 0
        # One sorted list gives the order of the real bins: the smallest chunk that fits, and the
        # lowest address among equals.
        self._free = []  # (size, address, chunk), sorted
        self._region_bytes = _FIRST_REGION
        self._next_address = 0

    def allocate(self, num_bytes):
        """Returns a Chunk of at least `num_bytes`, or None for no bytes."""
        if num_bytes == 0:
            return None
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if not self._free or self._free[-1][0] < size:
            self._extend(size)
        place = bisect_left(self._free, (size, -1))
        chunk = self._free.pop(place)[2]
        if chunk.size >= 2 * size or chunk.size - size >= _MAX_WASTE:
            rest = Chunk(chunk.size - size, chunk.address + size, chunk, chunk.after)
            if chunk.after:
                chunk.after.before = rest
            chunk.after, chunk.size = rest, size
            self._put_back(rest)
        chunk.free = False
        self.in_use += chunk.size
        return chunk

    def release(self, chunk):
        """Frees a chunk and merges it with free neighbours."""
        if chunk is None:
            return
        self.in_use -= chunk.size
        chunk.free = True
        if chunk.after and chunk.after.free:
            self._take_out(chunk.after)
            self._merge(chunk, chunk.after)
        if chunk.before and chunk.before.free:
            self._take_out(chunk.before)
            chunk = self._merge(chunk.before, chunk)
        self._put_back(chunk)

    def _extend(self, size):
        grown = False
        while self._region_bytes < size:
            self._region_bytes *= 2
            grown = True
        self._put_back(Chunk(self._region_bytes, self._next_address))
        self._next_address += 2 * self._region_bytes  # a gap, because regions never merge
        if not grown:
            self._region_bytes *= 2

    def _put_back(self, chunk):
        insort(self._free, (chunk.size, chunk.address, chunk))

    def _take_out(self, chunk):
        del self._free[bisect_left(self._free, (chunk.size, chunk.address))]

    @staticmethod
    def _merge(left, right):
        left.size += right.size
        left.after = right.after
        if right.after:
            right.after.before = left
        return left
