"""Features on disk: one folder per key, complete or absent, shared by runs under a lock.

CACHE_DIR/KEY/ holds one .npy file per tensor and `record.json`, which lists the
key's parts and the CRC-32 of every file. A folder receives its name once all of it
is on the disk. CACHE_DIR/KEY.lock is held by the run that writes, and shared by
the runs that read.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from core.config import Config
from core.errors import RunError
from core.files import PARTIAL, write_whole
from core.log import log
from core.units import GB

_RECORD = "record.json"
_PIECE = 2**24  # bytes read at once
_in_use: dict = {}  # lock files of the features that this process reads


def folder(cfg: Config) -> Path:
    """Returns the folder of cached features: `--cache_dir`, or a folder below XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cfg.cache_dir) if cfg.cache_dir else Path(base) / "adabet" / "features"


def load(cfg: Config, key: dict, parts: dict[str, Callable], sizes: dict, shapes: list, dtype) -> dict:
    """Returns the features of a key, mapped from disk. Missing or damaged features are written first.

    Args:
        cfg: Config. Reads cache_dir and cache_limit_gb.
        key: dict, JSON-ready. All that the features depend on.
        parts: dict from a role to a function that returns an iterator of (features, labels).
        sizes: dict from a role to its number of images.
        shapes: list of tuple. The shapes of one image's features.
        dtype: numpy.dtype of the features.

    Returns:
        dict from role to (list of array, labels).

    Raises:
        RunError: if the features exceed `--cache_limit_gb` or the free space of the disk.
    """
    cache = folder(cfg)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = _in_use[name] = open(cache / f"{name}.lock", "a")  # noqa: SIM115  held until the process ends, or `release`
    except OSError as error:
        raise RunError(f"--cache_dir must be a folder that can be written. Received: {cache}: {error}") from error
    fcntl.flock(lock, fcntl.LOCK_SH)
    if not _is_intact(cache / name):
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a run that writes the same features
        if not _is_intact(cache / name):
            _make_room(cfg, cache, name, sizes, shapes, dtype)
            _write(cache / name, key, parts, sizes, shapes, dtype)
    os.utime(cache / name)  # the least recently used features are deleted first
    features = {role: _mapped(cache / name, role, len(shapes)) for role in parts}
    fcntl.flock(lock, fcntl.LOCK_SH)  # mapped files stay readable, even if another run deletes them now
    log.info("Features: mapped from %s", cache / name)
    return features


def release() -> None:
    """Releases the features that this process reads, so that other runs may delete them."""
    while _in_use:
        _in_use.popitem()[1].close()


def clear(cfg: Config) -> int:
    """Deletes all features that no run uses, and returns the number of bytes that this frees."""
    cache = folder(cfg)
    return sum(_delete(cache, entry) for entry in _entries(cache)) + _delete_partial(cache)


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Returns the SHA-256 of arrays' shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype.str}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Returns {name: version} of the libraries that compute features."""
    from importlib.metadata import version

    return {name: version(name) for name in ("tensorflow", "keras", "numpy", "tensorflow-datasets")}


def _make_room(cfg, cache, name, sizes, shapes, dtype):
    """Deletes damaged and old features until the new ones fit.

    Raises:
        RunError: if they cannot fit.
    """
    per_image = 8 + sum(int(np.prod(shape)) for shape in shapes) * dtype.itemsize
    needed = sum(sizes.values()) * per_image
    if needed > cfg.cache_limit_gb * GB:
        raise RunError(
            f"--cache_limit_gb must allow for the features of this run, {needed / GB:.2f} GB. Received: "
            f"{cfg.cache_limit_gb:g}; raise it, or use --cache_features off."
        )
    shutil.rmtree(cache / name, ignore_errors=True)
    for left in cache.glob(f"{PARTIAL}{name}"):  # SIGKILL has interrupted its writing
        shutil.rmtree(left)
    for entry in sorted(_entries(cache), key=lambda entry: entry.stat().st_mtime):
        used = sum(map(_size, _entries(cache)))
        if used + needed <= cfg.cache_limit_gb * GB and needed <= shutil.disk_usage(cache).free:
            break
        _delete(cache, entry)
    if sum(map(_size, _entries(cache))) + needed > cfg.cache_limit_gb * GB:
        raise RunError(
            "--cache_limit_gb must allow for the features of this run and of the other active runs. Received: "
            f"{cfg.cache_limit_gb:g}, with {needed / GB:.2f} GB needed in addition; raise it, or use "
            "--cache_features off."
        )
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise RunError(
            f"the disk of --cache_dir must have room for the features, {needed / GB:.2f} GB. Received: {cache} with "
            f"{free / GB:.2f} GB free; free some space, choose another --cache_dir, or use --cache_features off."
        )


def _write(target, key, parts, sizes, shapes, dtype):
    """Writes the features to a folder of another name, which receives its own at the end."""
    temporary = target.with_name(f"{PARTIAL}{target.name}")
    temporary.mkdir()
    try:
        sums = {}
        for role, batches in parts.items():
            with contextlib.ExitStack() as open_files:
                writers = [
                    _Writer(open_files.enter_context(open(temporary / name, "wb")), (sizes[role], *shape), kind)
                    for name, shape, kind in [
                        *((f"{role}_{i}.npy", shape, dtype) for i, shape in enumerate(shapes)),
                        (f"{role}_labels.npy", (), np.dtype(np.int64)),
                    ]
                ]
                for features, labels in batches():
                    for writer, array in zip(writers, [*features, labels], strict=True):
                        writer.append(array)
                for writer in writers:
                    writer.file.flush()
                    os.fsync(writer.file.fileno())
                    sums[Path(writer.file.name).name] = writer.crc
        write_whole(temporary / _RECORD, json.dumps({"key": key, "crc32": sums}))
        os.rename(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(
                f"the disk of --cache_dir must have room for the features. Received: {target.parent}, which became "
                "full; free some space and continue with --resume."
            ) from error
        raise


class _Writer:
    """Writes one .npy file from start to end, and keeps its CRC-32.

    A file mapped to memory would be shorter, but a full disk kills a process that writes to one.
    """

    def __init__(self, file, shape, dtype):
        self.file, self.crc = file, 0
        np.lib.format.write_array_header_1_0(self, {"descr": dtype.str, "fortran_order": False, "shape": shape})

    def write(self, content):
        self.crc = zlib.crc32(content, self.crc)
        self.file.write(content)

    def append(self, array):
        self.write(np.ascontiguousarray(array).tobytes())


def _is_intact(path):
    """Returns whether a folder of features exists and all its bytes are as they were written."""
    if not path.is_dir():
        return False
    try:
        sums = json.loads((path / _RECORD).read_text())["crc32"]
        intact = all(_crc32(path / name) == crc for name, crc in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        log.warning("The cached features %s are corrupt; they are computed again.", path)
    return intact


def _crc32(path):
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def _mapped(path, role, count):
    tensors = [np.load(path / f"{role}_{i}.npy", mmap_mode="r") for i in range(count)]
    return tensors, np.load(path / f"{role}_labels.npy")


def _entries(cache):
    return [path for path in cache.glob("*") if path.is_dir() and not path.name.startswith(PARTIAL)]


def _size(path):
    return sum(file.stat().st_size for file in path.glob("*"))


def _delete(cache, entry):
    """Deletes features unless a run uses them. Returns the number of bytes freed."""
    with open(cache / f"{entry.name}.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        freed = _size(entry)
        shutil.rmtree(entry)
    log.info("Features: deleted %s", entry)
    return freed


def _delete_partial(cache):
    """Deletes features whose writing was interrupted. Returns the number of bytes freed."""
    freed = 0
    for entry in cache.glob(f"{PARTIAL}*"):
        lock_file = cache / f"{entry.name.removeprefix(PARTIAL)}.lock"
        with open(lock_file, "a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            freed += _size(entry)
            shutil.rmtree(entry)
    return freed
