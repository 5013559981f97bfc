"""Files that are complete or absent: written beside their name, flushed to disk, then renamed."""

import contextlib
import os
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
    temporary = path.with_name(f"{PARTIAL}{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
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
