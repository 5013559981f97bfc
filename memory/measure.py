"""Peak memory as TensorFlow's allocator counts it, on the device in use.

On a CPU only the allocator that `core/environment.py` chooses counts; on a GPU every
allocator does. The figure contains all that TensorFlow holds there: weights, optimizer
slots, activations, gradients and workspace, but not the memory of NumPy and gudhi. The
process's peak resident size contains everything.
"""

import contextlib
import functools
import gc
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from core import environment
from core.log import log

MEASURED_STEPS = 3
MEASURING_S = 10.0  # no further step starts after this many seconds


@dataclass
class Peak:
    """The result of a `measured_peak` block.

    Attributes:
        bytes: int or None. The allocator's peak inside the block, or None if the
            device's allocator does not count.
        device: str. The device, e.g. `CPU:0`.
    """

    bytes: int | None
    device: str


@contextlib.contextmanager
def measured_peak() -> Iterator[Peak]:
    """Measures the allocator's peak over the block.

    Yields:
        Peak, filled in when the block ends.
    """
    import tensorflow as tf

    peak = Peak(None, environment.device())
    try:
        tf.config.experimental.reset_memory_stats(peak.device)
    except ValueError:
        _warn_of_no_counting(peak.device)
        yield peak
        return
    yield peak
    peak.bytes = tf.config.experimental.get_memory_info(peak.device)["peak"]


@functools.cache  # one warning per process and device
def _warn_of_no_counting(device):
    log.warning(
        "The peak memory of %s is not measured: its allocator keeps no statistics. Import memory_utils before "
        "tensorflow, or set TF_CPU_ALLOCATOR_USE_BFC=true.",
        device,
    )


def peak_rss_bytes() -> int:
    """Returns the peak resident size of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, other systems kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured_training_step(model, inputs, labels, changing: list) -> tuple[Peak, float]:
    """Measures training steps on one resident batch, and undoes them.

    The first step traces. The second to fourth are measured, fewer if they take long,
    and their median counts: a single step depends on how threads interleave. The head of
    ResNet50 took 185 MB in one process and 233 MB in the next. Afterwards every weight,
    statistic, random state and optimizer slot has its former value, to the last bit.

    Args:
        model: compiled keras.Model.
        inputs: tensor of shape (B, ...), or the structure of tensors that the model takes.
        labels: tensor of shape (B, ...), or the structure of tensors that the loss takes.
        changing: list of keras.Variable. All variables of the model that a training
            step can change.

    Returns:
        peak: Peak, the median of the measured steps.
        first_step_s: float. Seconds of the first step, tracing included.
    """
    gc.collect()  # earlier compilations, such as a budget's, are in reference cycles
    with model.distribute_strategy.scope():
        model.optimizer.build(model.trainable_variables)
    state = [*changing, *model.optimizer.variables]
    before = [variable.numpy() for variable in state]

    start = time.perf_counter()
    model.train_on_batch(inputs, labels)
    first_step_s = time.perf_counter() - start
    peaks: list[Peak] = []
    start = time.perf_counter()
    while len(peaks) < MEASURED_STEPS and (not peaks or time.perf_counter() - start < MEASURING_S):
        with measured_peak() as peak:
            model.train_on_batch(inputs, labels)
        peaks.append(peak)

    for variable, value in zip(state, before, strict=True):
        variable.assign(value)
    model.reset_metrics()
    if peak.bytes is not None:
        peak = Peak(statistics.median_low(one.bytes for one in peaks), peak.device)
    return peak, first_step_s
