"""Keras callbacks of the fine-tuning loop: times, the best epoch, divergence, progress, checkpoints.

None of them knows the run's Result. train.py reads what they hold.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from tqdm import tqdm

from core import signals
from training import checkpoint


class EpochClock(keras.callbacks.Callback):
    """Times the steps, epochs and evaluations of a segment, and reports each epoch when it ends.

    Attributes:
        eval_s: float. Seconds of evaluation so far.
    """

    def __init__(self, split: str, write_row: Callable[[dict], None], first_step_s: float, epoch_s: float = 0.0):
        """
        Args:
            split: str. The name of the held-out split in the columns, `"val"` or `"test"`.
            write_row: function of a dict, the row of metrics.csv.
            first_step_s: float. Seconds of the step that traced the training function.
            epoch_s: float. Seconds that an interrupted epoch had already taken.
        """
        super().__init__()
        self.split, self.write_row = split, write_row
        self.first_step_s, self.epoch_s_before = first_step_s, epoch_s
        self.step_s: list[float] = []
        self.eval_s = 0.0

    def compile_s(self) -> float:
        """Returns the seconds of the first steps, the tracing one and the first of `fit`, beyond a median step."""
        if not self.step_s:
            return 0.0
        median = statistics.median(self.step_s)
        return sum(max(0.0, first - median) for first in (self.first_step_s, self.step_s[0]))

    def seconds_so_far(self) -> float:
        """Returns the seconds of the current epoch, without evaluation and checkpoints."""
        return self.epoch_s_before + time.perf_counter() - self.epoch_start - self.excluded_s

    def exclude(self, seconds: float) -> None:
        """Excludes seconds from the current epoch."""
        self.excluded_s += seconds

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch_start = time.perf_counter()
        self.excluded_s = 0.0

    def on_train_batch_begin(self, batch, logs=None):
        self.step_start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.step_s.append(time.perf_counter() - self.step_start)

    def on_test_begin(self, logs=None):
        self.test_start = time.perf_counter()

    def on_test_end(self, logs=None):
        seconds = time.perf_counter() - self.test_start
        self.eval_s += seconds
        self.exclude(seconds)

    def on_epoch_end(self, epoch, logs=None):
        if self.model.stop_training:  # the loss diverged
            return
        seconds = self.seconds_so_far()
        self.epoch_s_before = 0.0
        self.write_row(
            {
                "epoch": epoch + 1,
                "train_loss": logs["loss"],
                "train_accuracy": logs["accuracy"],
                f"{self.split}_loss": logs["val_loss"],
                f"{self.split}_accuracy": logs["val_accuracy"],
                "seconds": seconds,
                "learning_rate": float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)),
            }
        )


class BestEpoch(keras.callbacks.Callback):
    """Keeps a copy, in host memory, of what training changes as it was after the best epoch.

    The best epoch has the highest held-out accuracy. Ties go to the lower held-out
    loss, then to the earlier epoch.

    Attributes:
        variables: list of keras.Variable. The variables to copy.
        score: (float, float). Held-out accuracy and negative loss of the best epoch.
        epoch: int or None. The best epoch, counted from 1.
        values: list of (keras.Variable, numpy.ndarray). The copy.
    """

    def __init__(self, patience: int | None = None, warmup_epochs: int = 0):
        """
        Args:
            patience: int or None. Epochs without improvement before training stops; None never stops.
            warmup_epochs: int. First epochs that do not count.
        """
        super().__init__()
        self.patience, self.warmup_epochs = patience, warmup_epochs
        self.variables = []
        self.score = (-math.inf, -math.inf)
        self.epoch = None
        self.values = []

    @property
    def accuracy(self) -> float:
        return self.score[0]

    def on_epoch_end(self, epoch, logs=None):
        score = (logs["val_accuracy"], -logs["val_loss"])
        if score > self.score:
            self.score, self.epoch = score, epoch + 1
            self.values = [(variable, variable.numpy()) for variable in self.variables]

    def exhausted(self, epochs_done: int) -> bool:
        """Returns whether the last `patience` of the finished epochs did not improve on the best."""
        since = epochs_done - max(self.epoch or 0, self.warmup_epochs)
        return self.patience is not None and since >= self.patience

    def restore(self) -> None:
        """Assigns the copy to the variables."""
        for variable, value in self.values:
            variable.assign(value)


class StopEarly(keras.callbacks.Callback):
    """Stops the training when `best` is exhausted. It follows the Checkpointer, so that the epoch is saved."""

    def __init__(self, best: BestEpoch):
        super().__init__()
        self.best = best

    def on_epoch_end(self, epoch, logs=None):
        if self.best.exhausted(epoch + 1):
            self.model.stop_training = True


class StopWhenDiverged(keras.callbacks.Callback):
    """Stops the training at the first step whose mean loss is not finite.

    Attributes:
        advice: str or None. What happened and what to try, once it has.
    """

    def __init__(self, steps_per_epoch: int):
        super().__init__()
        self.steps_per_epoch = steps_per_epoch
        self.advice = None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch + 1

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            step = self.steps_per_epoch - self.params["steps"] + batch + 1  # `fit` may have started within the epoch
            self.advice = (
                f"the loss must stay finite. Received: {logs['loss']} in epoch {self.epoch}, step {step}; "
                "try a lower --learning_rate, or --global_clipnorm 1."
            )
            self.model.stop_training = True


class ProgressBar(keras.callbacks.Callback):
    """Shows the epoch's steps as a bar on stderr if that is a terminal."""

    def __init__(self, num_epochs: int):
        super().__init__()
        self.num_epochs = num_epochs

    def on_epoch_begin(self, epoch, logs=None):
        self.bar = tqdm(
            total=self.params["steps"],
            desc=f"Epoch {epoch + 1}/{self.num_epochs}",
            unit="step",
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update()

    def on_test_begin(self, logs=None):
        self.bar.close()

    def on_epoch_end(self, epoch, logs=None):
        self.bar.close()


class Checkpointer(keras.callbacks.Callback):
    """Saves between steps: when an epoch ends, at a time interval, and when a signal has arrived.

    It follows the other callbacks, so that it saves what the others have made of a step.

    Attributes:
        seconds: float. Seconds spent saving.
    """

    def __init__(
        self,
        run_folder: Path,
        interval_s: float,
        steps_per_epoch: int,
        record: Callable[[], dict],
        best: BestEpoch,
        clock: EpochClock,
        first_step: int = 0,
        metrics: list[np.ndarray] | None = None,
    ):
        """
        Args:
            run_folder: pathlib.Path.
            interval_s: float. Seconds between two checkpoints within an epoch.
            steps_per_epoch: int.
            record: function that returns the run's part of a record: selection,
                checksums and result.
            best: BestEpoch.
            clock: EpochClock.
            first_step: int. Steps of the first epoch that an interrupted run had finished.
            metrics: list of numpy.ndarray. The values of the metrics' variables after them.
        """
        super().__init__()
        self.run_folder, self.interval_s, self.steps_per_epoch = run_folder, interval_s, steps_per_epoch
        self.record, self.best, self.clock = record, best, clock
        self.first_step, self.metrics = first_step, metrics
        self.epoch_s = clock.epoch_s_before
        self.saved_at = time.monotonic()
        self.seconds = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.step = epoch, self.first_step
        if self.metrics is not None:  # Keras has just reset them
            for variable, value in zip(self.model.metrics_variables, self.metrics, strict=True):
                variable.assign(value)

    def on_train_batch_end(self, batch, logs=None):
        # Until the first step ends, a signal raises at once: tracing takes long, and nothing can be lost.
        signals.hold()
        if self.model.stop_training:
            return
        self.step = self.first_step + batch + 1
        if self.step == self.steps_per_epoch:  # the evaluation resets the metrics
            self.metrics, self.epoch_s = self._metric_values(), self.clock.seconds_so_far()
        if signals.pending() or time.monotonic() - self.saved_at >= self.interval_s:
            self.save(self.epoch, self.step)
        signals.check()

    def on_test_batch_end(self, batch, logs=None):
        if signals.pending():
            if not self.model.stop_training:
                self.save(self.epoch, self.step)
            signals.check()

    def on_epoch_end(self, epoch, logs=None):
        if self.model.stop_training:
            return
        self.first_step, self.metrics, self.epoch_s = 0, None, 0.0
        self.save(epoch + 1, 0)
        signals.check()

    def save(self, epoch: int, step: int) -> None:
        """Saves the training as it is.

        Args:
            epoch: int. Finished epochs.
            step: int. Finished steps of the next epoch.
        """
        start = time.perf_counter()
        record = {
            "epoch": epoch,
            "step": step,
            "best": self.best.score,
            "best_epoch": self.best.epoch,
            "epoch_s": self.epoch_s if step in (0, self.steps_per_epoch) else self.clock.seconds_so_far(),
            **self.record(),
        }
        checkpoint.save(self.run_folder, epoch * self.steps_per_epoch + step, record, self._arrays(epoch, step))
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.clock.exclude(seconds)
        self.saved_at = time.monotonic()

    def _arrays(self, epoch, step):
        for number, variable in enumerate(_changed_by_training(self.model, self.best)):
            yield f"variable/{number}", variable.numpy()
        if step:
            metrics = self.metrics if step == self.steps_per_epoch else self._metric_values()
            for number, value in enumerate(metrics):
                yield f"metric/{number}", value
        is_best = step == 0 and self.best.epoch == epoch  # the variables are the best epoch's
        if self.best.epoch is not None and not is_best:
            for number, (_, value) in enumerate(self.best.values):
                yield f"best/{number}", value

    def _metric_values(self):
        return [variable.numpy() for variable in self.model.metrics_variables]


def restore(saved: checkpoint.Checkpoint, model: keras.Model, best: BestEpoch) -> None:
    """Restores a training's variables, bit for bit, and the best epoch's values.

    Args:
        saved: Checkpoint.
        model: keras.Model. Compiled, with its optimizer built.
        best: BestEpoch, with its variables set.
    """
    # Matched by order: Keras counts in the names of random states and slots what a process has created before.
    for variable, value in zip(_changed_by_training(model, best), saved.read("variable/"), strict=True):
        variable.assign(value)
    # Keras creates the metrics' variables when they are first used.
    model.compute_metrics(None, keras.ops.zeros(1, "int64"), keras.ops.zeros((1, model.output_shape[-1])))
    best.score, best.epoch = tuple(saved.record["best"]), saved.record["best_epoch"]
    if best.epoch is not None:
        values = list(saved.read("best/")) or [variable.numpy() for variable in best.variables]
        best.values = list(zip(best.variables, values, strict=True))


def _changed_by_training(model, best):
    """Returns all that training changes except the metrics: weights, statistics, random states, optimizer slots."""
    return [*best.variables, *model.optimizer.variables]
