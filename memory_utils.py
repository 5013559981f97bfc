"""Peak memory, measured by the framework's allocator on the device in use.

On a CPU this takes the allocator that runtime.py chooses; on a GPU every
allocator counts. What counts is all that TensorFlow holds on the device:
weights, optimizer state, activations, gradients and workspace. Memory of NumPy
and gudhi doesn't; the process's peak resident size, beside it, has everything.
"""

import contextlib
import logging
import resource
import sys
import time
from dataclasses import dataclass

import runtime

log = logging.getLogger("adabet")


@dataclass
class Peak:
    """What a `measured_peak` block found.

    Attributes:
        bytes: int or None. The allocator's peak inside the block; None where
            this device's allocator doesn't count.
        device: str. Where, e.g. ``CPU:0``.
    """

    bytes: int | None
    device: str


@contextlib.contextmanager
def measured_peak():
    """Measures the allocator's peak over the block.

    Yields:
        Peak, filled in when the block ends.
    """
    import tensorflow as tf

    peak = Peak(None, runtime.device())
    try:
        tf.config.experimental.reset_memory_stats(peak.device)
    except ValueError as error:
        log.warning("The memory of %s can't be measured: %s", peak.device, error)
        yield peak
        return
    yield peak
    peak.bytes = tf.config.experimental.get_memory_info(peak.device)["peak"]


def peak_rss_bytes():
    """Returns the largest resident size that this process has had so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # kibibytes everywhere but on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured_training_step(model, images, labels, changing):
    """Measures one training step on one resident batch, and undoes it.

    The first step traces and warms up, the second is measured. Afterwards every
    weight, statistic, random state and optimizer slot has its former value, to
    the last bit.

    Args:
        model: compiled keras.Model.
        images: float32 tensor of shape (B, S, S, 3).
        labels: int tensor of shape (B,).
        changing: list of keras.Variable. All of the model's that a training
            step can change.

    Returns:
        peak: Peak of the second step.
        first_step_s: float. Seconds of the first step, tracing included.
    """
    with model.distribute_strategy.scope():
        model.optimizer.build(model.trainable_variables)
    state = [*changing, *model.optimizer.variables]
    before = [variable.numpy() for variable in state]

    start = time.perf_counter()
    model.train_on_batch(images, labels)
    first_step_s = time.perf_counter() - start
    with measured_peak() as peak:
        model.train_on_batch(images, labels)

    for variable, value in zip(state, before):
        variable.assign(value)
    model.reset_metrics()
    return peak, first_step_s
