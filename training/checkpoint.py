"""Checkpoints: what a run that was cut off goes on from.

They lie in RUN_FOLDER/checkpoint/, a file each, named by the training steps done.
`step_0000000000` is written when the selection is, and has no arrays: the network
as built is the state to train from. Then come the last two of the training. Of a
file that a power cut or a bad disk has spoilt, the checksum tells, and the one
before it is used.

A file has the arrays' bytes one after the other, then one line of JSON with the
record and the arrays' names, types and shapes, then that line's length and the
CRC-32 of all before it. Variables are written one at a time, straight from where
they are, so that saving needs no second copy of them; frozen weights aren't
written: they are where the run found them.
"""

import json
import logging
import math
import struct
import time
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import keras
import numpy as np

from core import signals
from core.files import CHECKPOINTS, whole_file
from selection.ranking import Selection

log = logging.getLogger("adabet")


KEPT = 2  # of the training; the one before is for when the last is damaged
_END = struct.Struct("<QI")  # bytes of the JSON line, CRC-32
_BLOCK = 1 << 20  # bytes read at a time


class Damaged(Exception):
    """A checkpoint isn't what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        path: pathlib.Path.
        record: dict, as given to `save`.
        arrays: list of (name, dtype, shape), in the order of the file.
    """

    path: Path
    record: dict
    arrays: list

    def read(self, prefix):
        """Yields the arrays whose names start with `prefix`, numpy arrays in the order of the file."""
        with open(self.path, "rb") as file:
            for name, dtype, shape in self.arrays:
                count, dtype = math.prod(shape), np.dtype(dtype)
                if name.startswith(prefix):
                    yield np.fromfile(file, dtype, count).reshape(shape)
                else:
                    file.seek(count * dtype.itemsize, 1)


def save(run_folder, step, record, arrays=()):
    """Writes a checkpoint, whole or not at all, and removes those that are no longer needed.

    Args:
        run_folder: pathlib.Path.
        step: int. Training steps done.
        record: dict, JSON-ready.
        arrays: iterable of (name, numpy array); each is asked for when its turn has come.

    Raises:
        OSError: as the system has it; the checkpoints before stay.
    """
    folder = run_folder / CHECKPOINTS
    folder.mkdir(exist_ok=True)
    with whole_file(folder / f"step_{step:010d}") as file:
        crc, listed = 0, []

        def write(content):
            nonlocal crc
            crc = zlib.crc32(content, crc)
            file.write(content)

        for name, array in arrays:
            listed.append((name, array.dtype.name, array.shape))
            write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        line = json.dumps({"record": record, "arrays": listed}).encode()
        write(line)
        file.write(_END.pack(len(line), crc))
    for path in _of_training(folder)[:-KEPT]:
        path.unlink()


def latest(run_folder):
    """Returns the newest whole Checkpoint of a run, or None.

    Damaged ones are said and removed, so that they are in nobody's way.

    Args:
        run_folder: pathlib.Path.
    """
    for path in sorted((run_folder / CHECKPOINTS).glob("step_*"), reverse=True):
        try:
            return _open(path)
        except Damaged as error:
            log.warning("Checkpoint %s is damaged (%s): removed, going on from what is before it.", path.name, error)
            path.unlink()
    return None


def save_selection(run_folder, selection, result):
    """Writes the checkpoint from before the first step.

    Args:
        run_folder: pathlib.Path.
        selection: selection.Selection.
        result: train.Result. What the selection took.
    """
    save(run_folder, 0, {"epoch": 0, "step": 0, "selection": selection.to_record(), "result": record_of(result)})


def _of_training(folder):
    """Returns the checkpoints of the training, oldest first."""
    return sorted(path for path in folder.glob("step_*") if int(path.name.removeprefix("step_")))


def _open(path):
    """Checks a file and returns it as a Checkpoint.

    Raises:
        Damaged: see there.
    """
    left, crc = path.stat().st_size - _END.size, 0
    if left < 0:
        raise Damaged("cut short")
    with open(path, "rb") as file:
        while left:
            block = file.read(min(_BLOCK, left))
            crc, left = zlib.crc32(block, crc), left - len(block)
        length, expected = _END.unpack(file.read(_END.size))
        if crc != expected:
            raise Damaged("its checksum doesn't fit")
        file.seek(-_END.size - length, 2)
        found = json.loads(file.read(length))
    return Checkpoint(path, found["record"], found["arrays"])


# ---------------------------------------------------------------- records of results


def record_of(result):
    """Returns a train.Result as a JSON-ready dict."""
    record = {field.name: getattr(result, field.name) for field in fields(result)}
    return {**record, "later": [(epoch, selection.to_record()) for epoch, selection in result.later]}


def fill(result, record):
    """Puts what `record_of` returned back into a train.Result."""
    for name, value in record.items():
        setattr(result, name, value)
    result.later = [(epoch, Selection.from_record(plain)) for epoch, plain in record["later"]]


# ---------------------------------------------------------------- within a training


def restore(saved, model, best):
    """Puts a training's variables back, bit for bit, and the best epoch's values.

    Args:
        saved: Checkpoint.
        model: keras.Model, compiled, its optimizer built.
        best: train.BestEpoch, its variables set.
    """
    # By their order: in the names of random states and slots Keras counts what a process has made before.
    for variable, value in zip(_variables(model, best), saved.read("variable/"), strict=True):
        variable.assign(value)
    # Keras makes the metrics' variables at their first use.
    model.compute_metrics(None, keras.ops.zeros(1, "int64"), keras.ops.zeros((1, model.output_shape[-1])))
    best.best, best.epoch = tuple(saved.record["best"]), saved.record["best_epoch"]
    if best.epoch is not None:
        values = list(saved.read("best/")) or [variable.numpy() for variable in best.variables]
        best.values = list(zip(best.variables, values, strict=True))


def _variables(model, best):
    """Returns all that training changes but the metrics: weights, statistics, random states, slots."""
    return [*best.variables, *model.optimizer.variables]


class Checkpointer(keras.callbacks.Callback):
    """Saves between steps: when an epoch ends, every so many minutes, and when a signal asks to end.

    It comes last of the callbacks: what it saves is what the others have made of the step.

    Attributes:
        seconds: float. What the savings took.
    """

    def __init__(self, run_folder, cfg, steps_per_epoch, selection, result, best, clock):
        """Args:
        run_folder: pathlib.Path.
        cfg: Config. Reads checkpoint_minutes.
        steps_per_epoch: int.
        selection: selection.Selection, the first.
        result: train.Result.
        best: train.BestEpoch.
        clock: train.EpochClock.
        """
        super().__init__()
        self.run_folder, self.interval_s, self.steps_per_epoch = (
            run_folder,
            60 * cfg.checkpoint_minutes,
            steps_per_epoch,
        )
        self.selection, self.result, self.best, self.clock = selection, result, best, clock
        self.checksums = {}
        self.begin_at(0)
        self.saved_at = time.monotonic()

    def begin_at(self, step, metrics=None, epoch_s=0.0):
        """Tells of an epoch that is entered in its middle.

        Args:
            step: int. Steps of it that are done.
            metrics: list of numpy arrays. What the metrics had gathered by then.
            epoch_s: float. Seconds that these steps took.
        """
        self.first_step, self.metrics, self.epoch_s = step, metrics, epoch_s

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.step = epoch, self.first_step
        if self.metrics is not None:  # Keras has just emptied them
            for variable, value in zip(self.model.metrics_variables, self.metrics, strict=True):
                variable.assign(value)

    def on_train_batch_end(self, batch, logs=None):
        # Before the first step there is nothing to lose, and tracing may take long: so far a signal broke in.
        signals.hold()
        if self.result.status == "diverged":
            return
        self.step = self.first_step + batch + 1
        if self.step == self.steps_per_epoch:  # the evaluation will empty the metrics
            self.metrics, self.epoch_s = self._metrics(), self.clock.seconds_so_far()
        if signals.pending() or time.monotonic() - self.saved_at >= self.interval_s:
            self.save(self.epoch, self.step)
        signals.check()

    def on_test_batch_end(self, batch, logs=None):
        if signals.pending():
            if self.result.status != "diverged":
                self.save(self.epoch, self.step)
            signals.check()

    def on_epoch_end(self, epoch, logs=None):
        if self.result.status == "diverged":
            return
        self.begin_at(0)
        self.save(epoch + 1, 0)
        signals.check()

    def save(self, epoch, step):
        """Saves the training as it stands.

        Args:
            epoch: int. Epochs done.
            step: int. Steps of the next one that are done.
        """
        start = time.perf_counter()
        record = {
            "epoch": epoch,
            "step": step,
            "selection": self.selection.to_record(),
            "best": self.best.best,
            "best_epoch": self.best.epoch,
            "checksums": self.checksums,
            "epoch_s": self.epoch_s if step in (0, self.steps_per_epoch) else self.clock.seconds_so_far(),
            "result": {**record_of(self.result), "compile_s": self.clock.compile_s()},
        }
        save(self.run_folder, epoch * self.steps_per_epoch + step, record, self._arrays(epoch, step))
        taken = time.perf_counter() - start
        self.result.checkpoint_s += taken
        self.clock.leave_out(taken)
        self.saved_at = time.monotonic()

    def _arrays(self, epoch, step):
        for number, variable in enumerate(_variables(self.model, self.best)):
            yield f"variable/{number}", variable.numpy()
        if step:
            metrics = self.metrics if step == self.steps_per_epoch else self._metrics()
            for number, value in enumerate(metrics):
                yield f"metric/{number}", value
        if self.best.epoch is not None and not (step == 0 and self.best.epoch == epoch):  # else they are the variables
            for number, (_, value) in enumerate(self.best.values):
                yield f"best/{number}", value

    def _metrics(self):
        return [variable.numpy() for variable in self.model.metrics_variables]
