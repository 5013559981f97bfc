"""Output channels: where they lie in a layer's kernel, what follows them, what they cost.

Data are channels-last throughout, as in all of `models.BACKBONES`.
"""

import math
import re

import keras
import tensorflow as tf

from models.layers import calls_replaced, leaf_layers

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_PLAIN = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D, keras.layers.Dense)


def output_axes(layer):
    """Returns the axes of `layer.kernel` that number its output channels.

    One for a convolution or a dense layer; two for a depthwise convolution
    (input channel and multiplier) and for the query, key and value projections of
    attention (head and its width).

    Args:
        layer: keras.Layer.

    Returns:
        tuple of int, empty for a layer without such a kernel.
    """
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, output = re.split(",|->", layer.equation)
        return tuple(axis for axis, letter in enumerate(kernel) if letter in output and letter not in inputs)
    if isinstance(layer, _DEPTHWISE):
        return (len(layer.kernel.shape) - 2, len(layer.kernel.shape) - 1)
    if isinstance(layer, _PLAIN):
        return (len(layer.kernel.shape) - 1,)
    return ()


def channel_rank(layer):
    """Returns how many of the last axes of the layer's output number channels: one, but for attention's projections."""
    return len(output_axes(layer)) if isinstance(layer, keras.layers.EinsumDense) else 1


def num_channels(layer):
    """Returns the layer's output channels; of a layer without a kernel, 0."""
    axes = output_axes(layer)
    return math.prod(layer.kernel.shape[axis] for axis in axes) if axes else 0


def forward_flops(candidate):
    """Returns the floating-point operations of a layer's forward pass for one image.

    A multiplication and an addition for every element of the kernel at every
    output position, and one a bias; two an element of output (scale and shift)
    for a layer without a kernel.

    Args:
        candidate: models.layers.Candidate.
    """
    layer = candidate.layer
    if not output_axes(layer):
        return 2 * candidate.activation_size
    positions = candidate.activation_size // num_channels(layer)
    return 2 * positions * math.prod(layer.kernel.shape) + (layer.bias is not None) * candidate.activation_size


def input_shapes(model, batch_size):
    """Returns {layer path: shape of its input, tuple of int} of the leaf layers with weights.

    Args:
        model: keras.Model.
        batch_size: int. First axis of the shapes.
    """
    shapes = {}

    def noting(layer, call):
        def noted(inputs, *args, **kwargs):
            shapes.setdefault(layer.path, tuple(inputs.shape))
            return call(inputs, *args, **kwargs)

        return noted

    _symbolic_pass(model, leaf_layers(model), noting, batch_size)
    return shapes


def following_norms(model):
    """Returns {layer path: BatchNormalization} for layers whose output a BatchNormalization takes as it is."""
    made_by, found = {}, {}

    def linking(layer, call):
        def linked(inputs, *args, **kwargs):
            maker, _ = made_by.get(id(inputs), (None, None))
            if maker is not None and isinstance(layer, keras.layers.BatchNormalization):
                found[maker.path] = layer
            output = call(inputs, *args, **kwargs)
            made_by[id(output)] = (layer, output)  # the output too: an id is good as long as its object lives
            return output

        return linked

    _symbolic_pass(model, leaf_layers(model), linking, None)
    return found


def _symbolic_pass(model, layers, replace, batch_size):
    with calls_replaced(layers, replace):
        tf.function(lambda images: model(images, training=False)).get_concrete_function(
            tf.TensorSpec((batch_size, *model.inputs[0].shape[1:]), model.inputs[0].dtype)
        )
