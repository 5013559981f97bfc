"""Channels: their axes in a layer's kernel, what follows them, what they cost.

Data are channels-last throughout.
"""

import math
import re

import keras
import tensorflow as tf

from models.layers import calls_replaced, leaf_layers

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
_PLAIN = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D, keras.layers.Dense)


def output_axes(layer: keras.Layer) -> tuple[int, ...]:
    """Returns the axes of `layer.kernel` that number its output channels.

    A convolution or a dense layer has one, a depthwise convolution two (input channel
    and multiplier), and so have the query, key and value projections of attention
    (head and width). A layer without such a kernel has none.
    """
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, output = re.split(",|->", layer.equation)
        return tuple(axis for axis, letter in enumerate(kernel) if letter in output and letter not in inputs)
    if isinstance(layer, _DEPTHWISE):
        return (len(layer.kernel.shape) - 2, len(layer.kernel.shape) - 1)
    if isinstance(layer, _PLAIN):
        return (len(layer.kernel.shape) - 1,)
    return ()


def input_axes(layer: keras.Layer) -> tuple[int, ...]:
    """Returns the axes of `layer.kernel` that number its input channels, empty for a layer without such a kernel."""
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, output = re.split(",|->", layer.equation)
        return tuple(axis for axis, letter in enumerate(kernel) if letter in inputs and letter not in output)
    if isinstance(layer, (*_DEPTHWISE, *_PLAIN)):
        return (len(layer.kernel.shape) - 2,)
    return ()


def is_depthwise(layer: keras.Layer) -> bool:
    """Returns whether a layer is a depthwise convolution."""
    return isinstance(layer, _DEPTHWISE)


def channel_rank(layer: keras.Layer) -> int:
    """Returns how many last axes of the output number channels: 2 for attention's projections, else 1."""
    return len(output_axes(layer)) if isinstance(layer, keras.layers.EinsumDense) else 1


def num_channels(layer: keras.Layer) -> int:
    """Returns the number of the layer's output channels, 0 without a kernel."""
    axes = output_axes(layer)
    return math.prod(layer.kernel.shape[axis] for axis in axes) if axes else 0


def forward_flops(candidate) -> int:
    """Returns the floating-point operations of a layer's forward pass for one image.

    A kernel takes a multiplication and an addition per element and output position, a
    bias one addition per element of the output, and a layer without a kernel two
    operations per element of the output (scale and shift).

    Args:
        candidate: models.layers.Candidate.
    """
    layer = candidate.layer
    if not output_axes(layer):
        return 2 * candidate.activation_size
    positions = candidate.activation_size // num_channels(layer)
    return 2 * positions * math.prod(layer.kernel.shape) + (layer.bias is not None) * candidate.activation_size


def input_shapes(model: keras.Model, batch_size: int) -> dict[str, tuple]:
    """Returns {layer path: shape of its input} for the leaf layers with weights.

    Args:
        model: keras.Model.
        batch_size: int. The first axis of the shapes.
    """
    shapes: dict[str, tuple] = {}

    def noting(layer, call):
        def noted(inputs, *args, **kwargs):
            shapes.setdefault(layer.path, tuple(inputs.shape))
            return call(inputs, *args, **kwargs)

        return noted

    _symbolic_pass(model, leaf_layers(model), noting, batch_size)
    return shapes


def following_norms(model: keras.Model) -> dict[str, keras.layers.BatchNormalization]:
    """Returns {layer path: BatchNormalization} for layers whose output goes to a BatchNormalization directly."""
    made_by: dict[int, tuple] = {}
    found: dict[str, keras.layers.BatchNormalization] = {}

    def linking(layer, call):
        def linked(inputs, *args, **kwargs):
            maker, _ = made_by.get(id(inputs), (None, None))
            if maker is not None and isinstance(layer, keras.layers.BatchNormalization):
                found[maker.path] = layer
            output = call(inputs, *args, **kwargs)
            made_by[id(output)] = (layer, output)  # keeps the output alive, and with it its id
            return output

        return linked

    _symbolic_pass(model, leaf_layers(model), linking, None)
    return found


def _symbolic_pass(model, layers, replace, batch_size):
    with calls_replaced(layers, replace):
        tf.function(lambda images: model(images, training=False)).get_concrete_function(
            tf.TensorSpec((batch_size, *model.inputs[0].shape[1:]), model.inputs[0].dtype)
        )
