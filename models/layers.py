"""The layers that can be selected, found on the network's forward pass.

A candidate is a leaf layer (without layers inside) with trainable weights whose output
has the batch as its first axis. The `call` of every leaf is watched during one pass, so
that residual branches, nested models and the layers inside a transformer's blocks appear
in their true order and with their true inputs.
"""

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


def trainable_weights(model: keras.Model) -> list:
    """Returns the weights that can train, in the model's order, whether they are frozen or not.

    Weights of a layer whose `trainable` is False cannot train.
    """
    can_train = {id(weight) for layer in model._flatten_layers() for weight in _own_trainable_weights(layer)}
    return [weight for weight in model.weights if id(weight) in can_train]


def _own_trainable_weights(layer):
    # Unlike `trainable_weights`, Keras' own list does not depend on the `trainable` of single weights.
    return layer._trainable_variables if layer.trainable else []


def find_candidates(model: keras.Model, inputs=None) -> list[Candidate]:
    """Returns the model's candidate layers, in the order of the forward pass.

    It traces one symbolic pass with an open batch axis, and computes nothing. A layer
    inside a loop, such as the cell of a recurrent layer, is not a candidate.

    Args:
        model: keras.Model, built.
        inputs: tensor of shape (B, ...), or the structure of tensors that the model takes,
            for its shapes and dtypes. None uses those of the model's only input.

    Returns:
        list of Candidate. A layer that is called twice has the place of its first call.
    """
    sizes: dict = {}
    graphs: list = []

    def note_size(layer, output):
        if id(layer) not in sizes and isinstance(output, tf.Tensor) and output.graph is graphs[0]:
            batch, *rest = output.shape
            if batch is None and None not in rest:
                sizes[id(layer)] = (layer, math.prod(rest))
        return output

    def forward(inputs):
        graphs.append(tf.compat.v1.get_default_graph())
        return model(inputs, training=False)

    inputs = model.inputs[0] if inputs is None else inputs
    specs = tf.nest.map_structure(lambda one: tf.TensorSpec((None, *one.shape[1:]), one.dtype), inputs)
    with watching(leaf_layers(model), note_size):
        tf.function(forward).get_concrete_function(specs)

    return [
        Candidate(layer, layer.path, size, tuple(_own_trainable_weights(layer)))
        for layer, size in sizes.values()
        if _own_trainable_weights(layer)
    ]
