"""The layers that can be selected, found on the network's forward pass.

A candidate is a leaf layer (without layers inside) with trainable weights whose output
has the batch as its first axis. The `call` of every leaf is watched during one pass, so
that residual branches, nested models and the layers inside a transformer's blocks appear
in their true order and with their true inputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import keras
import tensorflow as tf


@dataclass(frozen=True)
class Candidate:
    """A layer that can be selected for training.

    Attributes:
        layer: keras.Layer.
        path: str. The layer's path, unique in the model.
        activation_size: int. Elements of its output per image.
        weights: tuple of keras.Variable. Its trainable weights.
    """

    layer: keras.Layer
    path: str
    activation_size: int
    weights: tuple

    @property
    def type(self):
        """str. The layer's class name."""
        return type(self.layer).__name__

    @property
    def num_weights(self):
        """int. Elements of its trainable weights, trained or not."""
        return sum(math.prod(weight.shape) for weight in self.weights)


def leaf_layers(model: keras.Model) -> list:
    """Returns the layers of `model`, at any depth, that hold weights but no other layers."""
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if layer.weights and not list(layer._flatten_layers(include_self=False))
    ]


@contextlib.contextmanager
def calls_replaced(layers: list, replace: Callable) -> Iterator[None]:
    """Replaces the function by which each layer computes, within the context.

    Args:
        layers: list of keras.Layer.
        replace: function (layer, call) -> function that replaces `call`.

    The `call` of the instance is replaced, not that of the class, so that other networks
    in the process are not affected. The former one is restored.
    """
    shadowed = []
    try:
        for layer in layers:
            shadowed.append((layer, vars(layer).get("call")))
            # Keras' own __setattr__ would track and wrap the function.
            object.__setattr__(layer, "call", replace(layer, layer.call))
        yield
    finally:
        for layer, before in shadowed:
            if before is None:
                object.__delattr__(layer, "call")
            else:
                object.__setattr__(layer, "call", before)


def watching(layers: list, observe: Callable):
    """Returns a context in which `observe` sees and may replace each layer's output.

    Args:
        layers: list of keras.Layer.
        observe: function (layer, output) -> output that the network continues with.
    """

    def watched(layer, call):
        return lambda *args, **kwargs: observe(layer, call(*args, **kwargs))

    return calls_replaced(layers, watched)


def find_candidates(model: keras.Model) -> list[Candidate]:
    """Returns the model's candidate layers, in the order of the forward pass.

    It traces one symbolic pass with an open batch axis, and computes nothing. Call it
    before anything is frozen.

    Args:
        model: keras.Model with one input of known shape but for the batch.

    Returns:
        list of Candidate. A layer that is called twice has the place of its first call.
    """
    sizes = {}

    def note_size(layer, output):
        if id(layer) not in sizes and isinstance(output, tf.Tensor):
            batch, *rest = output.shape
            if batch is None and None not in rest:
                sizes[id(layer)] = (layer, math.prod(rest))
        return output

    with watching(leaf_layers(model), note_size):
        tf.function(lambda images: model(images, training=False)).get_concrete_function(
            tf.TensorSpec(model.inputs[0].shape, model.inputs[0].dtype)
        )

    return [
        Candidate(layer, layer.path, size, tuple(layer.trainable_weights))
        for layer, size in sizes.values()
        if layer.trainable_weights
    ]
