"""Files that are complete or absent: written beside their name, flushed to disk, then renamed."""

import contextlib
import os
import tempfile

CHECKPOINTS = "checkpoint"  # folder of the checkpoints inside a run folder
PARTIAL = ".partial-"  # prefix of the names of files that are still being written


def write_whole(path, text):
    """Writes a text file so that a reader finds the old content or the new, never a part.

    Args:
        path: pathlib.Path.
        text: str.

    Raises:
        OSError: as the system has it; the old content stays.
    """
    with whole_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def whole_file(path):
    """Gives a binary file to write that takes its name when it is whole and on the disk.

    Args:
        path: pathlib.Path.

    Raises:
        OSError: as the system has it; what had the name before stays.
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
        os.fsync(folder)  # without which a power cut may undo the renaming
    finally:
        os.close(folder)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
