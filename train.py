"""One fine-tuning loop for every scheme, on Model.fit.

Read from top to bottom: the result, freezing, the loop, and the callbacks that
time it and keep its best epoch. Which weights train was decided before; nothing
here looks at a scheme's name.
"""

import contextlib
import logging
import math
import statistics
import sys
import time
import zlib
from dataclasses import dataclass, field

import keras
from tqdm import tqdm

from core import signals, strategy
from core.errors import RunError
from memory import estimate
from memory.measure import measured_peak, measured_training_step
from models.compiling import compile_model, make_optimizer
from models.freezing import changing_variables, freeze
from run import report
from training.checkpoint import Checkpointer, restore

log = logging.getLogger("adabet")


@dataclass
class Result:
    """What a fine-tuning came to. Fields that were never reached stay None.

    Attributes:
        status: str. done, diverged, or, as long as it runs, interrupted.
        accuracy: float. Percent on the test split, by the protocol.
        val_accuracy: float. Percent on the validation split, at the best epoch.
        epochs: list of dict. One row a finished epoch, as in metrics.csv.
        best_epoch: int. From 1.
        compile_s: float. Seconds of first steps beyond a median step.
        eval_s: float. Seconds of evaluation, all epochs and the last test.
        peak_bytes: int. The allocator's peak over a training step.
        device: str. Where that was measured.
        estimated_bytes: int. The same peak, estimated before the first step.
        budget_next_layer: str. Under --memory_budget_mb: the next layer of the ranking.
        budget_next_bytes: int. The estimated peak with that layer.
        later: list of (epoch from 1, selection.Selection). The re-selections.
        selection_s: float. Seconds that all selections took.
        selection_peak_bytes: int. The allocator's peak over them.
        checkpoint_s: float. Seconds that writing checkpoints took; no other figure has them.
        facts: dict. What the scheme adds to the summary.
    """

    status: str = "interrupted"
    accuracy: float | None = None
    val_accuracy: float | None = None
    epochs: list = field(default_factory=list)
    best_epoch: int | None = None
    compile_s: float | None = None
    eval_s: float = 0.0
    peak_bytes: int | None = None
    device: str | None = None
    advice: str | None = None
    estimated_bytes: int | None = None
    budget_next_layer: str | None = None
    budget_next_bytes: int | None = None
    later: list = field(default_factory=list)
    selection_s: float | None = None
    selection_peak_bytes: int | None = None
    checkpoint_s: float = 0.0
    facts: dict = field(default_factory=dict)


def checksums(network):
    """Returns {path: CRC-32 of the value} for all of the network's weights and statistics."""
    return {weight.path: zlib.crc32(weight.numpy().tobytes()) for weight in network.model.weights}


def check_what_moved(network, trained_weights, before):
    """Compares the weights with their checksums from before the training.

    Args:
        network: models.Network.
        trained_weights: collection of str. Paths of the weights that should move.
        before: dict, from `checksums`.

    Raises:
        RunError: a weight moved that should have stayed as it was.
    """
    after = checksums(network)
    moved = {path for path in before if after[path] != before[path]}
    may_move = set(trained_weights)
    if network.bn_stats == "batch":
        may_move |= {w.path for w in network.model.non_trainable_weights} - {w.path for w in network.trainable_weights}
    if moved - may_move:
        raise RunError(f"frozen weights must not move, but these did: {sorted(moved - may_move)[:3]}")
    still = set(trained_weights) - moved
    if still:
        log.warning(
            "%d of %d selected weights never moved, %s among them.", len(still), len(trained_weights), min(still)
        )


def carry_over(old, new, variables):
    """Builds an optimizer that goes on where another stopped.

    An optimizer knows the variables that it was built for and no others, so that a
    new selection needs a new one. Weights that train in both keep their slots, the
    others start from zero; the learning rate goes on.

    Args:
        old: keras.Optimizer.
        new: keras.Optimizer, not built yet.
        variables: list of keras.Variable. The weights that train from now on.
    """
    new.build(variables)
    # A slot's name is made of its weight's path.
    values = {slot.name: slot for slot in old.variables}
    for slot in new.variables:
        if slot.name in values:
            slot.assign(values[slot.name])


@contextlib.contextmanager
def additions(network, selection):
    """Lets the selection's penalties and constraints hold, by Keras's own hooks on single weights.

    Args:
        network: models.Network.
        selection: selection.Selection.

    Yields:
        keras.callbacks.Callback for `fit`, that keeps the penalties out of held-out losses.
    """
    weights = [weight for weight in network.trainable_weights if weight.trainable]

    def penalise(active):
        for weight in weights:
            weight.regularizer = selection.penalties.get(weight.path) if active else None

    try:
        for weight in weights:
            weight.constraint = selection.constraints.get(weight.path)
            if weight.constraint:
                weight.assign(weight.constraint(weight.value))
        penalise(True)
        yield keras.callbacks.LambdaCallback(
            on_test_begin=lambda logs: penalise(False), on_test_end=lambda logs: penalise(True)
        )
    finally:
        penalise(False)
        for weight in weights:
            weight.constraint = None


def fine_tune(network, selection, data, cfg, folder, result, saved=None):
    """Trains the selected weights and measures what it took.

    Where the selection wants to be asked again, the epochs are trained in segments
    of `cfg.interval`, each with a selection of its own.

    Args:
        network: models.Network.
        selection: selection.Selection.
        data: data.Data.
        cfg: Config.
        folder: run_folder.RunFolder. Takes metrics.csv, TensorBoard's events, and
            selection.json anew after a re-selection.
        result: Result. Filled in as the training goes on, so that an
            interrupted one can still be reported.
        saved: checkpoint.Checkpoint or None. Where to go on from; `result` has its
            record already.
    """
    model = network.model
    held_out, prefix = (
        (data.validation_batches(), "val") if cfg.protocol == "validation" else (data.test_batches(), "test")
    )
    split = "validation" if cfg.protocol == "validation" else "test"
    held_out = strategy.even_batches(model.distribute_strategy, held_out, data.split_sizes[split], data.batch_size)
    clock = EpochClock(result, cfg, prefix, folder)
    best = BestEpoch()
    checkpointer = Checkpointer(folder.path, cfg, data.steps_per_epoch, selection, result, best, clock)
    current, optimizer = result.later[-1][1] if result.later else selection, None
    segment = cfg.interval if current.reselect else cfg.num_epochs
    epoch, step = (saved.record["epoch"], saved.record["step"]) if saved else (0, 0)
    # Of an epoch that has just ended, the segment that it belongs to: the next begins with a selection.
    first = max(0, epoch - (step == 0)) // segment * segment
    for start in range(first, cfg.num_epochs, segment):
        goes_on = start == first and (epoch, step) != (0, 0)
        if start and not goes_on:
            current = reselect(current, start, result)
            folder.write_json("selection.json", report.selection_record(cfg, selection, result.later))
        freeze(network, current.trained_weights)
        with model.distribute_strategy.scope():
            previous, optimizer = optimizer, make_optimizer(cfg, cfg.num_epochs * data.steps_per_epoch)
        if previous:
            carry_over(previous, optimizer, model.trainable_variables)
        with model.distribute_strategy.scope():
            compile_model(model, optimizer)
        # What a later selection trains has to be put back too, if the best epoch came before it.
        best.variables = model.variables if current.reselect else changing_variables(network)
        if goes_on:
            with model.distribute_strategy.scope():
                optimizer.build(model.trainable_variables)
                restore(saved, model, best)
            checkpointer.checksums = saved.record["checksums"]
            clock.begin_segment(0.0)
        else:
            epoch, step = start, 0
            checkpointer.checksums = checksums(network)
        with additions(network, current) as penalties:
            if not goes_on:
                clock.begin_segment(measure(network, data.train_batches(start, start + 1), result))
            callbacks = [
                penalties,
                StopWhenDiverged(result, data.steps_per_epoch),
                clock,
                best,
                ProgressBar(cfg.num_epochs),
                keras.callbacks.TensorBoard(folder.path / "tensorboard", write_graph=False),
                checkpointer,
            ]
            end = min(start + segment, cfg.num_epochs)
            if step:
                clock.epoch_s_before = saved.record["epoch_s"]
                checkpointer.begin_at(step, list(saved.read("metric/")), saved.record["epoch_s"])
                finish_epoch(model, data, epoch, step, held_out, callbacks)
                epoch, step = epoch + 1, 0
            if epoch < end and result.status != "diverged":
                model.fit(
                    data.train_batches(epoch, end),
                    initial_epoch=epoch,
                    epochs=end,
                    steps_per_epoch=data.steps_per_epoch,
                    validation_data=held_out,
                    verbose=0,
                    shuffle=False,  # the data are shuffled already, and Keras warns of doing both
                    callbacks=callbacks,
                )
            signals.release()
        check_what_moved(network, current.trained_weights, checkpointer.checksums)
        if current.facts:
            result.facts = current.facts()
        if result.status == "diverged":
            break
    result.compile_s = clock.compile_s()
    if result.status == "diverged":
        return

    best.restore()
    result.best_epoch = best.epoch
    if current.facts:
        result.facts = current.facts()  # of the model as it is reported
    sizes = data.split_sizes
    if cfg.protocol == "validation":
        result.val_accuracy = percent(best.accuracy, sizes["validation"])
        start = time.perf_counter()
        test = strategy.even_batches(model.distribute_strategy, data.test_batches(), sizes["test"], data.batch_size)
        tested = model.evaluate(test, verbose=0, return_dict=True)["accuracy"]
        result.eval_s += time.perf_counter() - start
    else:
        tested = best.accuracy
    result.accuracy = percent(tested, sizes["test"])
    result.status = "done"


def measure(network, batches, result):
    """Estimates and measures the memory of a training step, and undoes it.

    Args:
        network: models.Network, compiled.
        batches: tf.data.Dataset, of which the first batch is taken.
        result: Result. Takes the peaks.

    Returns:
        float. Seconds of the first step.
    """
    model = network.model
    images, labels = next(iter(batches))
    share = len(labels) // model.distribute_strategy.num_replicas_in_sync  # what one device sees of a batch
    images, labels = images[:share], labels[:share]
    result.estimated_bytes = max_known(result.estimated_bytes, estimate.bytes_of_training(model, images.shape))
    peak, first_step_s = measured_training_step(model, images, labels, changing_variables(network))
    result.peak_bytes, result.device = max_known(result.peak_bytes, peak.bytes), peak.device
    return first_step_s


def finish_epoch(model, data, epoch, step, held_out, callbacks):
    """Trains the rest of an epoch that was broken off, and evaluates as `fit` does at its end.

    Args:
        model: keras.Model, its variables as they were then.
        data: data.Data.
        epoch: int, from 0.
        step: int. Steps of the epoch that are done; where all are, the evaluation is what is left.
        held_out: tf.data.Dataset of batches.
        callbacks: list of keras.callbacks.Callback.
    """
    left = data.steps_per_epoch - step
    if left:
        model.fit(
            data.train_batches(epoch, epoch + 1, step),
            initial_epoch=epoch,
            epochs=epoch + 1,
            steps_per_epoch=left,
            validation_data=held_out,
            verbose=0,
            shuffle=False,
            callbacks=callbacks,
        )
        return
    callbacks = keras.callbacks.CallbackList(callbacks, model=model, epochs=epoch + 1, steps=0)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(epoch)
    logs = model.get_metrics_result()
    found = model.evaluate(held_out, verbose=0, return_dict=True, callbacks=callbacks)
    callbacks.on_epoch_end(epoch, {**logs, **{f"val_{name}": value for name, value in found.items()}})
    callbacks.on_train_end()


def max_known(*values):
    """Returns the largest of the values that aren't None, or None."""
    return max((value for value in values if value is not None), default=None)


def percent(accuracy, num_images):
    """Returns an accuracy in percent; Keras's own is a float32, of which the count of images is left exact."""
    return 100 * round(accuracy * num_images) / num_images


def reselect(selection, epoch, result):
    """Asks a selection for the one that follows it, and accounts for what that took.

    Args:
        selection: selection.Selection with `reselect`.
        epoch: int, from 0.
        result: Result.

    Returns:
        selection.Selection.
    """
    start = time.perf_counter()
    with measured_peak() as peak:
        following = selection.reselect(epoch)
    result.selection_s = (result.selection_s or 0.0) + time.perf_counter() - start
    result.selection_peak_bytes = max_known(result.selection_peak_bytes, peak.bytes)
    result.later.append((epoch + 1, following))
    left, came = (
        set(a.trained_weights) - set(b.trained_weights) for a, b in ((selection, following), (following, selection))
    )
    log.info(
        "Epoch %d: selected anew, %d weights train, %d of them new, %d no more",
        epoch + 1, len(following.trained_weights), len(came), len(left),
    )  # fmt: skip
    return following


class EpochClock(keras.callbacks.Callback):
    """Times steps, epochs and evaluations apart, and writes an epoch's row the moment it ends.

    Attributes:
        epoch_s_before: float. Seconds that an epoch had already taken when it was broken off.
    """

    def __init__(self, result, cfg, prefix, folder):
        super().__init__()
        self.result, self.cfg, self.prefix, self.folder = result, cfg, prefix, folder
        self.compile_s_before = result.compile_s or 0.0  # of the processes before this one
        self.step_s, self.first_steps, self.epoch_s_before = [], [], 0.0

    def begin_segment(self, first_step_s):
        """Tells that the next step is the first with this selection, and what the measured one before it took."""
        self.first_steps.append((first_step_s, len(self.step_s)))

    def compile_s(self):
        """Returns the seconds of all first steps so far beyond median ones."""
        if not self.step_s:
            return self.compile_s_before
        step_s = statistics.median(self.step_s)
        firsts = [first_s for first_s, _ in self.first_steps] + [
            self.step_s[i] for _, i in self.first_steps if i < len(self.step_s)
        ]
        return self.compile_s_before + sum(max(0.0, first_s - step_s) for first_s in firsts)

    def seconds_so_far(self):
        """Returns what the running epoch has taken, without evaluation and checkpoints."""
        return self.epoch_s_before + time.perf_counter() - self.epoch_start - self.left_out_s

    def leave_out(self, seconds):
        """Takes seconds out of the running epoch's account."""
        self.left_out_s += seconds

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch_start = time.perf_counter()
        self.left_out_s = 0.0

    def on_train_batch_begin(self, batch, logs=None):
        self.step_start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.step_s.append(time.perf_counter() - self.step_start)

    def on_test_begin(self, logs=None):
        self.test_start = time.perf_counter()

    def on_test_end(self, logs=None):
        evaluation_s = time.perf_counter() - self.test_start
        self.result.eval_s += evaluation_s
        self.leave_out(evaluation_s)

    def on_epoch_end(self, epoch, logs=None):
        if self.result.status == "diverged":
            return
        seconds = self.seconds_so_far()
        self.epoch_s_before = 0.0
        row = {
            "epoch": epoch + 1,
            "train_loss": logs["loss"],
            "train_accuracy": logs["accuracy"],
            f"{self.prefix}_loss": logs["val_loss"],
            f"{self.prefix}_accuracy": logs["val_accuracy"],
            "seconds": seconds,
            "learning_rate": float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)),
        }
        self.result.epochs.append(row)
        self.folder.write_metrics(self.result.epochs)
        log.info(
            "Epoch %d/%d: loss %.4f, accuracy %.2f %%, %s loss %.4f, %s accuracy %.2f %%, %.1f s",
            epoch + 1, self.cfg.num_epochs, logs["loss"], 100 * logs["accuracy"], self.prefix, logs["val_loss"],
            self.prefix, 100 * logs["val_accuracy"], seconds,
        )  # fmt: skip


class BestEpoch(keras.callbacks.Callback):
    """Keeps what training has changed, as it stood after the best epoch, in host memory.

    Best is the highest held-out accuracy; ties go to the lower held-out loss,
    then to the earlier epoch.

    Attributes:
        variables: list of keras.Variable. What to keep.
    """

    variables = ()

    def __init__(self):
        super().__init__()
        self.best = (-math.inf, -math.inf)
        self.epoch = None

    @property
    def accuracy(self):
        return self.best[0]

    def on_epoch_end(self, epoch, logs=None):
        this = (logs["val_accuracy"], -logs["val_loss"])
        if this > self.best:
            self.best, self.epoch = this, epoch + 1
            self.values = [(variable, variable.numpy()) for variable in self.variables]

    def restore(self):
        for variable, value in self.values:
            variable.assign(value)


class StopWhenDiverged(keras.callbacks.Callback):
    """Stops at the first step whose mean loss so far is no number."""

    def __init__(self, result, steps_per_epoch):
        super().__init__()
        self.result, self.steps_per_epoch = result, steps_per_epoch

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            step = self.steps_per_epoch - self.params["steps"] + batch + 1  # `fit` may have begun within the epoch
            self.result.status = "diverged"
            self.result.advice = (
                f"the loss must stay finite. Received: {logs['loss']} in epoch {self.epoch}, step {step}; "
                "try a lower --learning_rate, or --global_clipnorm 1."
            )
            self.model.stop_training = True

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch + 1


class ProgressBar(keras.callbacks.Callback):
    """A bar of the epoch's steps on stderr, where that is a terminal."""

    def __init__(self, num_epochs):
        super().__init__()
        self.num_epochs = num_epochs

    def on_epoch_begin(self, epoch, logs=None):
        total = self.params["steps"]
        self.bar = tqdm(total=total, desc=f"Epoch {epoch + 1}/{self.num_epochs}", unit="step", leave=False,
                        disable=not sys.stderr.isatty())  # fmt: skip

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update()

    def on_test_begin(self, logs=None):
        self.bar.close()

    def on_epoch_end(self, epoch, logs=None):
        self.bar.close()
