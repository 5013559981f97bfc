"""Peak memory as the paper's figure counts it: a convention, not a measurement.

It is here so that the published figure can be reproduced and its assumptions be
seen. None of them holds for a real step: weights that don't train are counted
with 4 bits, gradients and optimizer state not at all, and activations of an
eighth of a batch of 8. The assumptions, one a line below, are all there is.
"""

import math

import keras

TRAINED_WEIGHT_BITS = 32
OTHER_WEIGHT_BITS = 4  # moving statistics too, trained or not
ACTIVATION_BYTES = 4
BATCH = 8  # part of the convention, whatever the batch size of a run
MB = 10**6


def megabytes(network, trained_weights):
    """Returns the peak memory by the published convention, in MB of 10^6 bytes.

    The layers are walked in the order of `model.layers`, and a layer's input is
    taken to be the output of the entry before it, whatever that is. Of them only
    Conv2D, Dense, BatchNormalization and ReLU count; depthwise convolutions and
    all that is inside a transformer's blocks don't.

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


def _walk(network):
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
    """Returns the convolution that a nested network, such as a ViT's, begins with; else None."""
    inside = layer._flatten_layers(include_self=False)
    return next((inner for inner in inside if isinstance(inner, keras.layers.Conv2D)), None)


def _elements(shape):
    return math.prod(shape[1:])


def _counts(layer):
    # DepthwiseConv2D is no Conv2D in Keras.
    return isinstance(
        layer, (keras.layers.Conv2D, keras.layers.Dense, keras.layers.BatchNormalization, keras.layers.ReLU)
    ) or (isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.relu)
