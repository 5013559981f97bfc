"""Predicts the peak memory of a training step, and says what it is made of."""

import logging
import os
from dataclasses import dataclass

import tensorflow as tf

from memory.simulator import executor, step_graph
from memory.simulator.allocator import Allocator

log = logging.getLogger("adabet")

PARTS = ("weights", "gradients", "optimizer", "activations", "temporary")


@dataclass(frozen=True)
class Estimate:
    """A predicted peak.

    Attributes:
        bytes: int. As the allocator would count it.
        split: dict from each of PARTS to its bytes at the peak; they add up to `bytes`.
        peak_at: str. Path of the layer at which the peak stands, or ``optimizer``.
    """

    bytes: int
    split: dict
    peak_at: str


def of_training(model, input_shape):
    """Predicts a training step on one resident batch, as `memory_utils` measures it.

    Args:
        model: compiled keras.Model, not yet trained, frozen as it will train.
        input_shape: tuple (B, ...). The shape of a batch.
    """
    return of_step(step_graph.trace(model, input_shape))


def of_inference(model, input_shape):
    """Predicts a forward pass in inference mode; arguments as in `of_training`."""
    return of_step(step_graph.trace_inference(model, input_shape))


def of_step(step, repetitions=2, allocator=None):
    """Simulates a step on an allocator of its own; the last repetition counts.

    Args:
        step: step_graph.Step.
        repetitions: int. How often the step runs; the second meets the free chunks
            that the first has left.
        allocator: object with `allocate`, `release` and `in_use`; None takes one
            like TensorFlow's.
    """
    memory = executor.Memory(allocator or Allocator())
    for key, part, num_bytes in step.variables:
        memory.variables[key] = memory.allocate(num_bytes, part)
    for key, num_bytes in step.resident:
        memory.variables[key] = memory.allocate(num_bytes, "activations")
    for _ in range(repetitions):
        memory.forget_peak()
        executor.run(step, memory, num_threads())
    split = {part: memory.peak_parts.get(part, 0) for part in PARTS}
    return Estimate(memory.peak, split, step.layer_of(memory.peak_op) if memory.peak_op else "")


def num_threads():
    """Returns how many operations the executor runs side by side."""
    return tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count() or 1


def bytes_of_training(model, input_shape):
    """Returns the estimated peak of a training step in bytes, before any has run; None where there is no estimate.

    What a run reports besides is not worth ending it: a step that can't be traced
    or followed is said, and leaves no figure. Several devices at work are not
    followed.
    """
    if model.distribute_strategy.num_replicas_in_sync > 1:
        return None
    return _bytes_or_none(of_training, model, input_shape)


def bytes_of_inference(model, input_shape):
    """Returns the estimated peak of a forward pass in bytes, or None where there is no estimate."""
    return _bytes_or_none(of_inference, model, input_shape)


def _bytes_or_none(predict, model, input_shape):
    try:
        return predict(model, tuple(input_shape)).bytes
    except Exception as error:
        log.warning("The peak memory can't be estimated: %s", " ".join(str(error).split()))
        return None
