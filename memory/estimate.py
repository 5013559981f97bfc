"""Predicts the peak memory of a training step, its parts, and the layer at which it occurs."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from core.errors import one_line
from core.log import log
from memory.simulator import executor, step_graph
from memory.simulator.allocator import Allocator

PARTS = ("weights", "gradients", "optimizer", "activations", "temporary")


@dataclass(frozen=True)
class Estimate:
    """A predicted peak.

    Attributes:
        bytes: int. The peak as TensorFlow's allocator counts it.
        split: dict from each of PARTS to its bytes at the peak; they add up to `bytes`.
        peak_at: str. Path of the layer at which the peak occurs, or `optimizer`.
    """

    bytes: int
    split: dict
    peak_at: str


def of_training(model, input_shape: tuple | list) -> Estimate:
    """Predicts the peak of a training step on one batch that is already in memory.

    Args:
        model: keras.Model. Compiled, not trained yet, with its weights frozen as they will be.
        input_shape: tuple (B, ...), the shape of a batch; or a list of such tuples, one
            per input of the model.
    """
    return of_step(step_graph.trace(model, input_shape))


def of_inference(model, input_shape: tuple) -> Estimate:
    """Predicts the peak of a forward pass in inference mode; arguments as in `of_training`."""
    return of_step(step_graph.trace_inference(model, input_shape))


def of_step(step, allocator=None) -> Estimate:
    """Simulates a step twice; the second run, which reuses the free chunks of the first, counts.

    Args:
        step: step_graph.Step.
        allocator: object with `allocate`, `release` and `in_use`. None uses one like
            TensorFlow's.
    """
    memory = executor.Memory(allocator or Allocator())
    for key, part, num_bytes in step.variables:
        memory.variables[key] = memory.allocate(num_bytes, part)
    for key, num_bytes in step.resident:
        memory.variables[key] = memory.allocate(num_bytes, "activations")
    for _ in range(2):
        memory.forget_peak()
        executor.run(step, memory, num_threads())
    split = {part: memory.peak_parts.get(part, 0) for part in PARTS}
    return Estimate(memory.peak, split, step.layer_of(memory.peak_op) if memory.peak_op else "")


def num_threads() -> int:
    """Returns how many operations TensorFlow's executor runs at the same time."""
    return tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count() or 1


def batch_shape(model, batch_size: int) -> tuple:
    """Returns the shape of a batch of the model's input, or a tuple of one shape per input."""
    shapes = tuple((batch_size, *one.shape[1:]) for one in model.inputs)
    return shapes if len(shapes) > 1 else shapes[0]


def bytes_or_none(predict: Callable, model, batch_size: int) -> int | None:
    """Returns the bytes of `of_training` or `of_inference` for a batch, or None if they cannot be estimated.

    A step that cannot be simulated is logged: a missing estimate must not end a run.
    Training on several devices is not simulated.
    """
    if model.distribute_strategy.num_replicas_in_sync > 1:
        return None
    try:
        return predict(model, batch_shape(model, batch_size)).bytes
    except Exception as error:
        log.warning("The peak memory cannot be estimated: %s", one_line(error))
        return None
