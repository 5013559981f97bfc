"""Which layers can be chosen, found on the true forward pass.

A candidate is a leaf layer (no layers inside) with trainable weights whose
output has the batch as its first axis. The pass itself is what lists them:
every leaf's `call` is watched for the length of one pass, so residual
branches, nested models and the layers inside a transformer's blocks are met in
the order, and with the inputs, that they really have.
"""

import contextlib
import math
from dataclasses import dataclass

import keras
import tensorflow as tf


@dataclass(frozen=True)
class Candidate:
    """A layer that can be chosen for training.

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


def leaf_layers(model):
    """Returns the layers of `model`, at any depth, that hold weights but no other layers."""
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if layer.weights and not list(layer._flatten_layers(include_self=False))
    ]


@contextlib.contextmanager
def calls_replaced(layers, replace):
    """Lets each layer compute by another function while the context lasts.

    Args:
        layers: list of keras.Layer.
        replace: function (layer, call) -> function that takes call's place.

    The instance's `call` is shadowed, not the class's, so that other networks in
    the process aren't touched. Whatever stood there before is put back.
    """
    shadowed = []
    try:
        for layer in layers:
            shadowed.append((layer, vars(layer).get("call")))
            # Past Keras's own __setattr__, which tracks and wraps what it is given.
            object.__setattr__(layer, "call", replace(layer, layer.call))
        yield
    finally:
        for layer, before in shadowed:
            if before is None:
                object.__delattr__(layer, "call")
            else:
                object.__setattr__(layer, "call", before)


def watching(layers, observe):
    """Gives a context in which `observe` sees, and may replace, each layer's output.

    Args:
        layers: list of keras.Layer.
        observe: function (layer, output) -> output that the network goes on with.
    """

    def watched(layer, call):
        return lambda *args, **kwargs: observe(layer, call(*args, **kwargs))

    return calls_replaced(layers, watched)


def find_candidates(model):
    """Returns the model's candidate layers, in the order in which the forward pass meets them.

    One symbolic pass with an open batch axis; nothing is computed. To be called
    before anything is frozen.

    Args:
        model: keras.Model with one input of known shape but for the batch.

    Returns:
        list of Candidate. A layer that the pass meets twice stands at its first
        meeting.
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
