"""One fine-tuning loop for every scheme, on Keras' `Model.fit`.

A scheme has decided which weights train before this module starts, and nothing
here looks at a scheme's name. `fine_tune` reads from top to bottom: it trains the
segments of the run (`training/segments.py`), restores the best epoch, and tests.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import keras

from core import signals, strategy
from core.config import Config
from core.log import log
from core.units import MB
from memory import budget, estimate
from memory.measure import measured_peak, measured_training_step
from models.compiling import compile_model, make_optimizer
from models.freezing import changing_variables, freeze
from run import report
from selection.ranking import Selection
from training import features
from training.callbacks import BestEpoch, Checkpointer, EpochClock, ProgressBar, StopEarly, StopWhenDiverged, restore
from training.checkpoint import Checkpoint
from training.moved import check_what_moved, checksums
from training.result import Result, largest_known
from training.segments import Segment, plan_segments


def fine_tune(run: report.Progress, saved: Checkpoint | None = None) -> None:
    """Trains the selected weights and measures the cost.

    Args:
        run: report.Progress with the first selection. Its folder receives metrics.csv, the events for
            TensorBoard, checkpoints, and selection.json after a re-selection; its result is filled in.
        saved: Checkpoint or None. The point of resumption. The result holds its record.

    Raises:
        RunError: if a frozen weight has changed.
    """
    cfg, network, data, result = run.cfg, run.network, run.images, run.result
    split = features.held_out_split(cfg)
    current, best = result.latest_selection(run.selection), BestEpoch(cfg.early_stopping, cfg.warmup_epochs)
    done = (saved.record["epoch"], saved.record["step"]) if saved else (0, 0)
    interval = (cfg.interval if current.reselect else None) or cfg.num_epochs
    optimizer = None
    for segment in plan_segments(cfg.num_epochs, interval, *done, cfg.warmup_epochs):
        if segment.selects:
            current = reselect(run, current, segment.first)
            for name, content in report.selection_files(cfg, run.selection, result.reselections).items():
                run.folder.write_json(name, content)
        freeze(network.model, current)
        model, batches = network.model, data
        if result.cached_in != "off":
            batches = features.load(network, data, cfg, result)
            model = batches.cut.suffix
            compile_model(network.model, make_optimizer(cfg, 1))  # for the test; this optimizer has no slots
        optimizer = compile_anew(model, cfg, cfg.num_epochs * data.steps_per_epoch, optimizer)
        # The best epoch may precede a later selection, so all that any selection trains has to be kept.
        selects_later = current.reselect or cfg.warmup_epochs
        best.variables = network.model.variables if selects_later else changing_variables(network)
        held_out = held_out_batches(network.model, data, split) if batches is data else batches.held_out_batches()
        train_segment(run, segment, current, model, batches, held_out, best, saved if segment.resumes else None)
        if result.status == "diverged":
            return
        if best.exhausted(len(result.epochs)):
            log.info("Training stopped after epoch %d; the best was epoch %d.", len(result.epochs), best.epoch)
            break

    best.restore()
    result.best_epoch = best.epoch
    result.facts = current.facts() if current.facts else result.facts  # of the model that is reported
    if split == "validation":
        result.val_accuracy = percent(best.accuracy, data.split_sizes["validation"])
        start = time.perf_counter()
        tested = network.model.evaluate(held_out_batches(network.model, data, "test"), verbose=0, return_dict=True)
        result.eval_s += time.perf_counter() - start
        result.accuracy = percent(tested["accuracy"], data.split_sizes["test"])
    else:
        result.accuracy = percent(best.accuracy, data.split_sizes["test"])
    result.status = "done"


def train_segment(
    run: report.Progress, segment: Segment, selection: Selection, model, data, held_out, best: BestEpoch, saved
) -> None:
    """Trains the epochs of one segment, and resumes within an epoch where a checkpoint was written.

    Args:
        run: report.Progress, its network frozen for the segment.
        segment: Segment.
        selection: Selection that holds in the segment.
        model: keras.Model, compiled: the network's, or with cached features its suffix.
        data: data.pipeline.Data or training.features.Features.
        held_out: tf.data.Dataset of the batches that choose the epoch.
        best: BestEpoch, kept over all segments.
        saved: Checkpoint or None. The checkpoint to restore.
    """
    cfg, network, result = run.cfg, run.network, run.result
    epoch, steps_done = segment.first, 0
    if saved:
        steps_done, before = saved.record["step"], saved.record["checksums"]
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)
            restore(saved, model, best)
    else:
        before = checksums(network)

    with penalties_and_constraints(network, selection) as penalties:
        first_step_s = (
            0.0 if saved else measure(network, model, data.train_batches(epoch, epoch + 1), result, data.outside_bytes)
        )

        def write_row(row):
            result.epochs.append(row)
            run.folder.write_csv("metrics.csv", result.epochs)
            log.info("%s", report.epoch_line(row, cfg.num_epochs))

        split = "val" if cfg.protocol == "validation" else "test"
        clock = EpochClock(split, write_row, first_step_s, saved.record["epoch_s"] if steps_done else 0.0)
        spent = result.compile_s, result.eval_s, result.checkpoint_s

        def account():
            seconds = clock.compile_s(), clock.eval_s, checkpointer.seconds
            result.compile_s, result.eval_s, result.checkpoint_s = map(sum, zip(spent, seconds, strict=True))

        def record():
            account()
            return {"selection": run.selection.to_record(), "checksums": before, "result": result.to_record()}

        checkpointer = Checkpointer(
            run.folder.path,
            60 * cfg.checkpoint_minutes,
            data.steps_per_epoch,
            record,
            best,
            clock,
            steps_done,
            list(saved.read("metric/")) if steps_done else None,
        )
        stop = StopWhenDiverged(data.steps_per_epoch)
        callbacks = [
            penalties,
            stop,
            clock,
            best,
            ProgressBar(cfg.num_epochs),
            keras.callbacks.TensorBoard(run.folder.path / "tensorboard", write_graph=False),
            checkpointer,
            StopEarly(best),
        ]
        try:
            if steps_done:
                finish_epoch(model, data, epoch, steps_done, held_out, callbacks)
                epoch += 1
            if epoch < segment.end and not stop.advice and not best.exhausted(epoch):
                batches = data.train_batches(epoch, segment.end)
                fit(model, batches, epoch, segment.end, data.steps_per_epoch, held_out, callbacks)
        finally:
            account()
        signals.release()

    check_what_moved(network, selection.trained_weights, before)
    result.facts = selection.facts() if selection.facts else result.facts
    if stop.advice:
        result.status, result.advice = "diverged", stop.advice


def fit(model, batches, first: int, end: int, steps_per_epoch: int, held_out, callbacks: list) -> None:
    """Trains epochs `first` to `end - 1`, counted from 0, with Keras' `fit`."""
    model.fit(
        batches,
        initial_epoch=first,
        epochs=end,
        steps_per_epoch=steps_per_epoch,
        validation_data=held_out,
        verbose=0,
        shuffle=False,  # the batches are shuffled already
        callbacks=callbacks,
    )


def finish_epoch(model, data, epoch: int, steps_done: int, held_out, callbacks: list) -> None:
    """Trains the rest of an interrupted epoch and evaluates, as `fit` does at an epoch's end.

    Args:
        model: keras.Model, its variables as they were.
        data: data.pipeline.Data.
        epoch: int, counted from 0.
        steps_done: int. Finished steps of the epoch. If all are finished, only the
            evaluation is left.
        held_out: tf.data.Dataset.
        callbacks: list of keras.callbacks.Callback.
    """
    steps_left = data.steps_per_epoch - steps_done
    if steps_left:
        batches = data.train_batches(epoch, epoch + 1, steps_done)
        fit(model, batches, epoch, epoch + 1, steps_left, held_out, callbacks)
        return
    model.stop_training = False
    callbacks = keras.callbacks.CallbackList(callbacks, model=model, epochs=epoch + 1, steps=0)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(epoch)
    logs = model.get_metrics_result()
    found = model.evaluate(held_out, verbose=0, return_dict=True, callbacks=callbacks)
    callbacks.on_epoch_end(epoch, {**logs, **{f"val_{name}": value for name, value in found.items()}})
    callbacks.on_train_end()


def held_out_batches(model, data, split: str):
    """Returns the batches of `"validation"` or `"test"`, which a strategy's devices can share evenly."""
    batches = data.validation_batches() if split == "validation" else data.test_batches()
    return strategy.even_batches(model.distribute_strategy, batches, data.split_sizes[split], data.batch_size)


def compile_anew(model, cfg: Config, total_steps: int, previous=None):
    """Compiles a model for the weights that train now, and returns the new optimizer.

    An optimizer serves only the variables that it was built for, so every
    selection needs a new one. Weights that trained before keep their slots, the
    others start from zero, and the learning rate continues.

    Args:
        model: keras.Model.
        cfg: Config.
        total_steps: int. Steps of the whole run, for the learning rate.
        previous: keras.Optimizer or None. The optimizer of the segment before.
    """
    with model.distribute_strategy.scope():
        optimizer = make_optimizer(cfg, total_steps)
        if previous:
            carry_over(previous, optimizer, model.trainable_variables)
        compile_model(model, optimizer)
    return optimizer


def carry_over(old, new, variables: list) -> None:
    """Builds the optimizer `new` for `variables` and copies the slots that `old` has for them."""
    new.build(variables)
    slots = {slot.name: slot for slot in old.variables}  # a slot's name contains its weight's path
    for slot in new.variables:
        if slot.name in slots:
            slot.assign(slots[slot.name])


def measure(network, model, batches, result: Result, outside_bytes: int = 0) -> float:
    """Estimates and measures the memory of a training step, and undoes the step.

    Args:
        network: models.Network.
        model: keras.Model, compiled: the network's, or its suffix.
        batches: tf.data.Dataset. The first batch is used.
        result: Result. Receives the peaks.
        outside_bytes: int. Size of weights in memory that are not the model's: those of a
            cached prefix.

    Returns:
        float. Seconds of the first step, tracing included.
    """
    images, labels = next(iter(batches))
    devices = model.distribute_strategy.num_replicas_in_sync
    if devices > 1:  # one device's part of the batch; features are never shared among devices
        images, labels = images[: len(labels) // devices], labels[: len(labels) // devices]
    estimated = estimate.bytes_or_none(estimate.of_training, model, len(labels))
    if estimated is not None:
        result.estimated_bytes = largest_known(result.estimated_bytes, estimated + outside_bytes)
    peak, first_step_s = measured_training_step(model, images, labels, changing_variables(network))
    result.peak_bytes, result.device = largest_known(result.peak_bytes, peak.bytes), peak.device
    return first_step_s


def select(run: report.Progress, choose: Callable[[], Selection]) -> Selection:
    """Returns the selection that `choose` returns, within the memory budget, and accounts for its cost."""
    result, start = run.result, time.perf_counter()
    with measured_peak() as peak:
        selection = choose()
    result.selection_s = (result.selection_s or 0.0) + time.perf_counter() - start
    result.selection_peak_bytes = largest_known(result.selection_peak_bytes, peak.bytes)
    if run.cfg.memory_budget_mb is not None:
        peak_bytes = functools.partial(features.peak_bytes, run.network, run.images, run.cfg)
        found = budget.fit(run.network, selection, run.cfg.memory_budget_mb * MB, peak_bytes)
        selection, result.budget_next_layer, result.budget_next_bytes = found
    return selection


def reselect(run: report.Progress, selection: Selection, epoch: int) -> Selection:
    """Returns the selection for the epochs from `epoch` on, counted from 0."""
    following = select(run, lambda: selection.reselect(epoch))
    run.result.reselections.append((epoch + 1, following))
    before, after = set(selection.trained_weights), set(following.trained_weights)
    log.info(
        "Epoch %d: new selection; %d weights train, %d of them new, %d frozen again",
        epoch + 1, len(after), len(after - before), len(before - after),
    )  # fmt: skip
    return following


@contextlib.contextmanager
def penalties_and_constraints(network, selection: Selection) -> Iterator[keras.callbacks.Callback]:
    """Applies the selection's penalties and constraints by Keras' own hooks on single weights.

    Args:
        network: models.Network.
        selection: Selection.

    Yields:
        keras.callbacks.Callback for `fit`. It keeps the penalties out of held-out losses.
    """
    weights = [weight for weight in network.trainable_weights if weight.trainable]

    def penalize(active):
        for weight in weights:
            weight.regularizer = selection.penalties.get(weight.path) if active else None

    try:
        for weight in weights:
            weight.constraint = selection.constraints.get(weight.path)
            if weight.constraint:
                weight.assign(weight.constraint(weight.value))
        penalize(True)
        yield keras.callbacks.LambdaCallback(
            on_test_begin=lambda logs: penalize(False), on_test_end=lambda logs: penalize(True)
        )
    finally:
        penalize(False)
        for weight in weights:
            weight.constraint = None


def percent(accuracy: float, num_images: int) -> float:
    """Returns an accuracy in percent, exact from the count of images: Keras' accuracy is a float32."""
    return 100 * round(accuracy * num_images) / num_images
