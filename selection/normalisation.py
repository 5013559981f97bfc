"""Batch normalisations that a pass can do itself, together with the reading of their input.

A normalisation is a product and a sum for each channel. It stands right behind a
convolution mostly, and a clipping (ReLU, ReLU6) behind it. Whoever reads the
convolution's output anyway can do both where it lies, and save the framework
three passes over it. The statistics are the stored ones, or those of the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

# Layers whose output is a new array that nothing else refers to. Layers are told by
# their very class: a subclass may compute something else.
_PRODUCERS = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)

# Channels have to come in multiples of this for their scales to fit SIMD lanes.
_CHANNELS = 4


@dataclass(frozen=True)
class Normalisation:
    """What a BatchNormalization does, and the clipping behind it.

    Attributes:
        layer: keras.layers.BatchNormalization.
        scale_and_shift: function (its input, a tensor of shape (B, ..., C)) -> two
            float32 tensors or arrays of shape (C,). Its output is scale * x + shift.
        clipping: keras.Layer or None. The one that has its output, and only clips it.
        bounds: pair of float32. What that clips to; infinite where nothing does.
    """

    layer: keras.Layer
    scale_and_shift: Callable
    clipping: keras.Layer | None
    bounds: tuple


def normalisations_behind(network):
    """Finds the candidates whose output a normalisation has to itself.

    Args:
        network: models.Network. Its weights have to stay as they are for as long
            as the result is used.

    Returns:
        dict from such a candidate's path to the Normalisation behind it.
    """
    within = network.model._flatten_layers(include_self=True)
    given_out = {id(output) for layer in within for output in getattr(layer, "outputs", None) or ()}
    found = {}
    for candidate in network.candidates:
        producer = candidate.layer
        layer = _only_consumer(producer, given_out)
        if type(producer) in _PRODUCERS and type(layer) is keras.layers.BatchNormalization and _is_simple(layer):
            clipping = _only_consumer(layer, given_out)
            found[candidate.path] = _normalisation(layer, network.bn_stats == "batch", clipping)
    return found


def _only_consumer(layer, given_out):
    """Returns the layer that has the output of `layer` to itself, or None."""
    # Keras's symbolic graph tells who feeds whom; a layer called twice, or
    # outside of a functional model, has no one place there.
    if len(layer._inbound_nodes) != 1 or len(layer._outbound_nodes) != 1 or id(layer.output) in given_out:
        return None
    consumer = layer._outbound_nodes[0].operation
    return consumer if len(consumer._inbound_nodes) == 1 else None


def _is_simple(layer):
    shape = layer.input.shape
    return (
        layer.axis in (-1, len(shape) - 1)
        and shape[-1] % _CHANNELS == 0
        and layer.compute_dtype == layer.input.dtype == "float32"
        and not layer.renorm
    )


def _normalisation(layer, by_batch, consumer):
    if by_batch and layer.trainable:  # one that isn't keeps to its stored statistics
        axes = list(range(len(layer.input.shape) - 1))

        def scale_and_shift(inputs):
            return _scale_and_shift(layer, *keras.ops.moments(inputs, axes))
    else:
        stored = [tensor.numpy() for tensor in _scale_and_shift(layer, layer.moving_mean, layer.moving_variance)]

        def scale_and_shift(inputs):
            return stored

    highest = _clips_at(consumer)
    clipping, bounds = (None, (-np.inf, np.inf)) if highest is None else (consumer, (0, highest))
    return Normalisation(layer, scale_and_shift, clipping, tuple(np.float32(bound) for bound in bounds))


def _scale_and_shift(layer, mean, variance):
    # As tf.nn.batch_normalization does it, by the same operations, to the last bit.
    scale = tf.math.rsqrt(variance + layer.epsilon)
    if layer.scale:
        scale = scale * layer.gamma
    return scale, layer.beta - mean * scale if layer.center else -mean * scale


def _clips_at(layer):
    """Returns the highest value that a layer lets through if it clips at zero and there only, else None."""
    if type(layer) is keras.layers.ReLU and not layer.negative_slope and not layer.threshold:
        return np.inf if layer.max_value is None else layer.max_value
    if type(layer) is keras.layers.Activation:
        return {keras.activations.relu: np.inf, keras.activations.relu6: 6}.get(layer.activation)
    return None
