"""Checkpoints: what an interrupted run resumes from.

RUN_FOLDER/checkpoint/ holds one file per checkpoint, named by the number of
finished training steps. `step_0000000000.zip` is written after the selection and
has no arrays, because training starts from the network as it was built. The last
two checkpoints of the training follow. If a power cut or a bad disk damages one,
the one before it is used.

A checkpoint is a zip archive, not compressed: `record.json`, then one .npy member
per array. The archive's CRC-32 sums show damage, and the record lists the arrays'
names, dtypes and shapes. Arrays are written one at a time, so saving needs
no second copy of the network. Frozen weights are not written: they are as they
were when the run began.
"""

import errno
import json
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import UsageError
from core.files import CHECKPOINTS, whole_file
from core.log import log
from selection.ranking import Selection
from training.result import Result

KEPT = 2  # checkpoints of the training; the older one serves if the newer one is corrupt
_RECORD = "record.json"
_CORRUPT = (
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: pathlib.Path.
        record: dict, as given to `save`.
        names: list of str. The names of the arrays, in the order of the file.
    """

    path: Path
    record: dict
    names: list

    def read(self, prefix: str) -> Iterator[np.ndarray]:
        """Yields the arrays whose names start with `prefix`, in the order of the file."""
        with zipfile.ZipFile(self.path) as archive:
            for name in self.names:
                if name.startswith(prefix):
                    with archive.open(f"{name}.npy") as member:
                        yield np.lib.format.read_array(member, allow_pickle=False)


def save(run_folder: Path, step: int, record: dict, arrays: Iterable[tuple[str, np.ndarray]] = ()) -> None:
    """Writes a checkpoint, complete or not at all, and deletes those that are no longer needed.

    Args:
        run_folder: pathlib.Path.
        step: int. Finished training steps.
        record: dict, JSON-ready.
        arrays: iterable of (str, numpy.ndarray). Each array is written before the
            next one is requested.

    Raises:
        OSError: if the file cannot be written. Earlier checkpoints stay.
    """
    folder = run_folder / CHECKPOINTS
    folder.mkdir(exist_ok=True)
    with whole_file(folder / f"step_{step:010d}.zip") as file, zipfile.ZipFile(file, "w") as archive:
        listed = []
        for name, array in arrays:
            listed.append((name, array.dtype.str, array.shape))
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
        archive.writestr(_RECORD, json.dumps({"record": record, "arrays": listed}))
    for path in [path for path in _newest_first(folder) if _step(path) > 0][KEPT:]:
        path.unlink()


def save_selection(run_folder: Path, selection: Selection, result: Result) -> None:
    """Writes the checkpoint that precedes the first training step."""
    save(run_folder, 0, {"epoch": 0, "step": 0, "selection": selection.to_record(), "result": result.to_record()})


def latest(run_folder: Path) -> Checkpoint | None:
    """Returns a run's newest checkpoint that is intact, or None.

    Corrupt checkpoints are logged and deleted.

    Raises:
        UsageError: if the run's checkpoints have the format of an earlier version.
    """
    folder = run_folder / CHECKPOINTS
    for path in folder.glob("step_*"):
        if path.suffix != ".zip":
            raise UsageError(
                f"--resume reads the checkpoints of this version (step_*.zip). Received: {path}, written by an earlier "
                "version; finish the run with that version, or start a new run."
            )
    for path in _newest_first(folder):
        try:
            return _open(path)
        except _CORRUPT as error:
            reason = error
        except OSError as error:  # a corrupt directory sends zipfile to a place before the file's start
            if error.errno != errno.EINVAL:
                raise
            reason = error
        log.warning("Checkpoint %s is corrupt (%s) and deleted; the one before it, if any, is used.", path.name, reason)
        path.unlink()
    return None


def _open(path):
    """Returns the Checkpoint in a file after reading all of it once, or raises one of `_CORRUPT`."""
    with zipfile.ZipFile(path) as archive:
        corrupt = archive.testzip()
        if corrupt is not None:
            raise zipfile.BadZipFile(f"the CRC-32 of {corrupt} does not match")
        content = json.loads(archive.read(_RECORD))
        names = [name for name, _, _ in content["arrays"]]
        if archive.namelist() != [*(f"{name}.npy" for name in names), _RECORD]:
            raise zipfile.BadZipFile("its members are not those that its record lists")
        for name, dtype, shape in content["arrays"]:
            with archive.open(f"{name}.npy") as member:
                np.lib.format.read_magic(member)
                found_shape, _, found_dtype = np.lib.format.read_array_header_1_0(member)
            if (found_dtype.str, list(found_shape)) != (dtype, shape):
                raise zipfile.BadZipFile(f"{name} is not the array that its record lists")
    return Checkpoint(path, content["record"], names)


def _newest_first(folder):
    return sorted(folder.glob("step_*.zip"), reverse=True)


def _step(path):
    return int(path.stem.removeprefix("step_"))
