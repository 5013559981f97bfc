"""Files that are complete or absent: written beside their name, flushed to disk, then renamed."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHECKPOINTS = "checkpoint"  # folder of the checkpoints inside a run folder
PARTIAL = ".partial-"  # prefix of the names of files that are still being written


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, so that a reader finds the old content or the new, never a part.

    Raises:
        OSError: if the file cannot be written. The old content stays.
    """
    with whole_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that receives the name `path` once it is complete and on the disk.

    Raises:
        OSError: if the file cannot be written. A file that had the name before stays.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{PARTIAL}{path.name}.")
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder may be gone
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # a power cut could undo the renaming otherwise
    finally:
        os.close(folder)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
