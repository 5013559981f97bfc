"""Batch normalisations that a pass can do itself, together with the reading of their input.

By stored statistics a normalisation is a product and a sum for each channel. It
stands right behind a convolution mostly, and a clipping (ReLU, ReLU6) behind it.
Whoever reads the convolution's output anyway can do both where it lies, and save
the framework three passes over it.
"""

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
    """What a BatchNormalization does by its stored statistics, and the clipping behind it.

    Attributes:
        layer: keras.layers.BatchNormalization.
        scale, shift: float32 arrays of shape (C,). Its output is scale * x + shift.
        clipping: keras.Layer or None. The one that has its output, and only clips it.
        bounds: pair of float32. What that clips to; infinite where nothing does.
    """

    layer: keras.Layer
    scale: np.ndarray
    shift: np.ndarray
    clipping: keras.Layer | None
    bounds: tuple


def normalisations_behind(network):
    """Finds the candidates whose output a normalisation by stored statistics has to itself.

    Args:
        network: models.Network. Its weights have to stay as they are for as long
            as the result is used.

    Returns:
        dict from such a candidate's path to the Normalisation behind it.
    """
    if network.bn_stats != "stored":  # by the batch's statistics the scales are not known beforehand
        return {}
    within = network.model._flatten_layers(include_self=True)
    given_out = {id(output) for layer in within for output in getattr(layer, "outputs", None) or ()}
    found = {}
    for candidate in network.candidates:
        producer = candidate.layer
        layer = _only_consumer(producer, given_out)
        if type(producer) in _PRODUCERS and type(layer) is keras.layers.BatchNormalization and _is_simple(layer):
            found[candidate.path] = _normalisation(layer, _only_consumer(layer, given_out))
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


def _normalisation(layer, consumer):
    # As tf.nn.batch_normalization does it, by the same operations, to the last bit.
    scale = tf.math.rsqrt(layer.moving_variance + layer.epsilon)
    if layer.scale:
        scale = scale * layer.gamma
    shift = layer.beta - layer.moving_mean * scale if layer.center else -layer.moving_mean * scale
    highest = _clips_at(consumer)
    clipping, bounds = (None, (-np.inf, np.inf)) if highest is None else (consumer, (0, highest))
    return Normalisation(layer, scale.numpy(), shift.numpy(), clipping, tuple(np.float32(bound) for bound in bounds))


def _clips_at(layer):
    """Returns the highest value that a layer lets through if it clips at zero and there only, else None."""
    if type(layer) is keras.layers.ReLU and not layer.negative_slope and not layer.threshold:
        return np.inf if layer.max_value is None else layer.max_value
    if type(layer) is keras.layers.Activation:
        return {keras.activations.relu: np.inf, keras.activations.relu6: 6}.get(layer.activation)
    return None
