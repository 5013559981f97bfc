"""Peak memory as the paper's plot counts it: a convention, not a measurement.

It serves to reproduce the plot and to show its assumptions. None of them holds for a
real step: frozen weights count 4 bits, gradients and optimizer slots nothing, and a
layer keeps one image's input.

The 8 below belongs to the plot: it multiplies the peak by 8 and counts the outputs of
8 images, whatever the batch size of a run. The published program instead multiplies by
the batch size that it is given, so its figures for another batch are different.
"""

import math
from collections.abc import Collection, Iterator

import keras

from core.units import MB

TRAINED_WEIGHT_BITS = 32
OTHER_WEIGHT_BITS = 4  # moving statistics included
ACTIVATION_BYTES = 4
BATCH = 8  # of the plot, whatever the batch size of a run


def note(batch_size: int) -> str | None:
    """Returns a sentence on the batch size of the convention, or None if the run has that batch size.

    Args:
        batch_size: int. Images per training batch of the run.
    """
    if batch_size == BATCH:
        return None
    return (
        f"The convention is that of the paper's plot, batch {BATCH}. The published program multiplies by the batch "
        f"size of a run instead, here {batch_size}."
    )


def megabytes(network, trained_weights: Collection[str]) -> float:
    """Returns the peak memory by the published convention, in MB of 10^6 bytes.

    The layers are visited in the order of `model.layers`, and the output of the entry
    before a layer counts as its input, whatever it is. Only Conv2D, Dense,
    BatchNormalization and ReLU count; depthwise convolutions and everything inside the
    blocks of a transformer do not.

    Args:
        network: models.Network.
        trained_weights: collection of str. Paths of the weights that train.
    """
    trained = set(trained_weights)
    bits = sum(
        math.prod(weight.shape) * (TRAINED_WEIGHT_BITS if weight.path in trained else OTHER_WEIGHT_BITS)
        for weight in network.model.weights
    )
    kept = peak = 0  # bytes
    for layer, inputs, outputs in _walk(network):
        temporary = ACTIVATION_BYTES * inputs  # of one image
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            temporary += ACTIVATION_BYTES * outputs * BATCH
        peak = max(peak, kept + temporary)
        if any(weight.path in trained for weight in layer.weights):
            kept += ACTIVATION_BYTES * inputs
    return (bits / 8 + BATCH * peak) / MB


def _walk(network) -> Iterator[tuple]:
    """Yields (layer, input elements per image, output elements per image) of the layers that count."""
    shape = network.model.inputs[0].shape
    for layer in network.model.layers:
        before, shape = shape, layer.output.shape
        patches = _patch_embedding(layer)
        if patches is not None:
            yield patches, _elements(before), _elements(patches.compute_output_shape(before))
        elif _counts(layer):
            yield layer, _elements(before), _elements(shape)


def _patch_embedding(layer):
    """Returns the convolution at the start of a nested network, such as ViT's, or None."""
    inside = layer._flatten_layers(include_self=False)
    return next((inner for inner in inside if isinstance(inner, keras.layers.Conv2D)), None)


def _elements(shape):
    return math.prod(shape[1:])


def _counts(layer):
    # In Keras, DepthwiseConv2D is not a subclass of Conv2D.
    return isinstance(
        layer, (keras.layers.Conv2D, keras.layers.Dense, keras.layers.BatchNormalization, keras.layers.ReLU)
    ) or (isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.relu)
