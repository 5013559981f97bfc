"""Gradients that LiteRT computes with its built-in operations alone.

TensorFlow's own gradients of convolutions, poolings and activations are operations that
LiteRT lacks, such as Conv2DBackpropFilter. Each function here writes one of them in
operations that it has. `overridden` makes `tf.gradients` use them.

All tensors are channels-last with static shapes, float32. A gradient function takes the
operation and the gradient of its output, and returns one gradient per input.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf


class Unsupported(Exception):
    """An operation whose gradient cannot be written in built-in operations."""


@contextlib.contextmanager
def overridden(graph: tf.Graph) -> Iterator[None]:
    """Gives the operations that are created in the context the gradients of `GRADIENTS`.

    Args:
        graph: tf.Graph that is being traced. The gradients have to be taken by
            `tf.gradients`: `tf.GradientTape` does not look at the override.
    """
    with graph.gradient_override_map({name: _PREFIX + name for name in GRADIENTS}):
        yield


class _Axis(NamedTuple):
    """How a window moves along one spatial axis; all sizes in elements."""

    size: int  # of the input
    output: int  # of the output
    window: int
    stride: int
    dilation: int
    before: int  # padding
    after: int

    @property
    def dilated(self) -> int:
        """int. Size of the output with stride - 1 zeros between its elements."""
        return (self.output - 1) * self.stride + 1

    def positions(self, offset: int) -> slice:
        """Returns the slice of the padded input that the window's element number `offset` meets."""
        start = offset * self.dilation
        return slice(start, start + self.dilated, self.stride)


def _axes(op: Any, window: tuple[int, int], dilations: list[int]) -> tuple[_Axis, _Axis]:
    """Returns the geometry of a convolution or pooling along height and width."""
    padding = op.get_attr("padding").decode()
    if op.get_attr("data_format") != b"NHWC" or padding not in ("SAME", "VALID"):
        raise Unsupported(f"{op.type} must be channels-last with padding SAME or VALID")
    axes = []
    for axis in (1, 2):
        size, output = op.inputs[0].shape[axis], op.outputs[0].shape[axis]
        stride, dilation = op.get_attr("strides")[axis], dilations[axis]
        reach = (output - 1) * stride + (window[axis - 1] - 1) * dilation + 1
        total = max(reach - size, 0) if padding == "SAME" else 0
        axes.append(_Axis(size, output, window[axis - 1], stride, dilation, total // 2, total - total // 2))
    return axes[0], axes[1]


def _padded(x, axes, value=0.0):
    """Returns `x` with the padding of its convolution or pooling, (B, H + padding, W + padding, C)."""
    margins = [(0, 0), *((axis.before, axis.after) for axis in axes), (0, 0)]
    return tf.pad(x, margins, constant_values=value) if np.any(margins) else x


def _windows(axes):
    """Yields, for each element of the window, its two offsets and the index of the padded input that it meets."""
    for offsets in itertools.product(*(range(axis.window) for axis in axes)):
        rows, columns = (axis.positions(offset) for axis, offset in zip(axes, offsets))
        yield offsets, (slice(None), rows, columns)


def _dilate(x, strides):
    """Returns `x` (B, H, W, C) with stride - 1 zeros between its elements, (B, (H - 1) * s + 1, (W - 1) * s + 1, C).

    In reshapes and paddings of at most four axes, because LiteRT pads no more than five.
    """
    batch, height, width, channels = x.shape
    if strides[1] > 1:
        x = tf.pad(tf.reshape(x, (batch * height, width, 1, channels)), [(0, 0), (0, 0), (0, strides[1] - 1), (0, 0)])
        x = tf.reshape(x, (batch, height, width * strides[1], channels))[:, :, : (width - 1) * strides[1] + 1]
        width = x.shape[2]
    if strides[0] > 1:
        x = tf.pad(tf.reshape(x, (batch, height, 1, width * channels)), [(0, 0), (0, 0), (0, strides[0] - 1), (0, 0)])
        x = tf.reshape(x, (batch, height * strides[0], width, channels))[:, : (height - 1) * strides[0] + 1]
    return x


def _spread(grad, axes, offsets):
    """Returns (B, H, W, C): the input's gradient of a window's element with output gradient `grad` (B, OH, OW, C)."""
    spread = _dilate(grad, [axis.stride for axis in axes])
    before = [offset * axis.dilation for axis, offset in zip(axes, offsets)]
    after = [axis.before + axis.size + axis.after - axis.dilated - start for axis, start in zip(axes, before)]
    spread = tf.pad(spread, [(0, 0), *zip(before, after), (0, 0)])
    rows, columns = (slice(axis.before, axis.before + axis.size) for axis in axes)
    return spread[:, rows, columns]


def _facing_kernel(grad, axes):
    """Returns the dilated output gradient, padded so that a convolution of it with stride 1 has the input's size."""
    margins = []
    for axis in axes:
        margins.append(((axis.window - 1) * axis.dilation - axis.before, axis.size + axis.before - axis.dilated))
    return tf.pad(_dilate(grad, [axis.stride for axis in axes]), [(0, 0), *margins, (0, 0)])


def conv2d(op, grad):
    """Gradients of Conv2D: x (B, H, W, C), kernel (h, w, C, F), output (B, OH, OW, F)."""
    x, kernel = op.inputs
    height, width, channels, filters = kernel.shape
    if x.shape[-1] != channels:
        raise Unsupported("Conv2D must have a single group")
    axes = _axes(op, (height, width), op.get_attr("dilations"))

    transposed = tf.transpose(kernel, (0, 1, 3, 2))
    if (height, width) == (1, 1):  # the convolution before the dilation: fewer positions
        x_grad = _spread(tf.nn.conv2d(grad, transposed, 1, "VALID"), axes, (0, 0))
    else:
        flipped = tf.reverse(transposed, (0, 1))
        dilations = [axis.dilation for axis in axes]
        x_grad = tf.nn.conv2d(_facing_kernel(grad, axes), flipped, 1, "VALID", dilations=dilations)

    padded, flat_grad = _padded(x, axes), tf.reshape(grad, (-1, filters))
    products = [
        tf.matmul(tf.reshape(padded[index], (-1, channels)), flat_grad, transpose_a=True) for _, index in _windows(axes)
    ]
    return x_grad, tf.reshape(tf.concat(products, 0), kernel.shape)


def depthwise_conv2d(op, grad):
    """Gradients of DepthwiseConv2dNative: x (B, H, W, C), kernel (h, w, C, M), output (B, OH, OW, C * M)."""
    x, kernel = op.inputs
    height, width, channels, multiplier = kernel.shape
    axes = _axes(op, (height, width), op.get_attr("dilations"))

    flipped = tf.reshape(tf.reverse(kernel, (0, 1)), (height, width, channels * multiplier, 1))
    dilations = [axis.dilation for axis in axes]
    x_grad = tf.nn.depthwise_conv2d(_facing_kernel(grad, axes), flipped, [1, 1, 1, 1], "VALID", dilations=dilations)
    if multiplier > 1:
        x_grad = tf.reduce_sum(tf.reshape(x_grad, (-1, channels, multiplier)), 2)
        x_grad = tf.reshape(x_grad, x.shape)

    padded, flat_grad = _padded(x, axes), tf.reshape(grad, (-1, channels, multiplier))
    products = [
        tf.reduce_sum(tf.reshape(padded[index], (-1, channels, 1)) * flat_grad, 0, keepdims=True)
        for _, index in _windows(axes)
    ]
    return x_grad, tf.reshape(tf.concat(products, 0), kernel.shape)


def max_pool(op, grad):
    """Gradient of MaxPool: the first of a window's largest elements, in the order of rows, takes all of it."""
    (x,), (largest,) = op.inputs, op.outputs
    axes = _axes(op, op.get_attr("ksize")[1:3], [1, 1, 1, 1])
    padded = _padded(x, axes, value=x.dtype.min)
    x_grad, free = 0.0, tf.ones_like(largest)
    for offsets, index in _windows(axes):
        takes = tf.cast(padded[index] == largest, grad.dtype) * free
        free -= takes
        x_grad += _spread(grad * takes, axes, offsets)
    return x_grad


def avg_pool(op, grad):
    """Gradient of AvgPool: equal shares for a window's elements, the padding left out."""
    axes = _axes(op, op.get_attr("ksize")[1:3], [1, 1, 1, 1])
    counts = []
    for axis in axes:
        inside = np.pad(np.ones(axis.size), (axis.before, axis.after))
        counts.append(sum(inside[axis.positions(offset)] for offset in range(axis.window)))
    share = grad / tf.constant(np.outer(*counts)[None, :, :, None], grad.dtype)
    return tf.add_n([_spread(share, axes, offsets) for offsets, _ in _windows(axes)])


def _masked(grad, passes):
    return grad * tf.cast(passes, grad.dtype)


def _leaky_relu(op, grad):
    slope = op.get_attr("alpha")
    return grad * (slope + (1 - slope) * tf.cast(op.inputs[0] > 0, grad.dtype))


def strided_slice(op, grad):
    """Gradient of StridedSlice with stride 1 and without new axes: the output's gradient between zeros."""
    x, *limits = op.inputs
    begins, ends, strides = (tf.get_static_value(limit) for limit in limits)
    if op.get_attr("ellipsis_mask") or op.get_attr("new_axis_mask") or begins is None or (strides != 1).any():
        raise Unsupported("StridedSlice must have constant limits, stride 1 and no new axes")
    margins = [(0, 0)] * x.shape.rank
    for axis, (begin, end) in enumerate(zip(begins, ends)):
        size, bit = x.shape[axis], 1 << axis
        if op.get_attr("shrink_axis_mask") & bit:
            start = int(begin) % size
            margins[axis] = (start, size - start - 1)
            continue
        first = None if op.get_attr("begin_mask") & bit else int(begin)
        last = None if op.get_attr("end_mask") & bit else int(end)
        start, stop, _ = slice(first, last).indices(size)
        margins[axis] = (start, size - stop)
    shape = [size - sum(margin) for size, margin in zip(x.shape, margins)]
    return tf.pad(tf.reshape(grad, shape), margins), None, None, None


@tf.custom_gradient
def gelu(x):
    """Returns the exact GELU, x times the normal distribution function, whose gradient needs no error function."""
    y = tf.nn.gelu(x, approximate=False)

    def gradient(grad):
        at_zero = x == 0
        distribution = tf.where(at_zero, 0.5, y / tf.where(at_zero, 1.0, x))
        density = tf.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return grad * (distribution + x * density)

    return y, gradient


GRADIENTS = {
    "Conv2D": conv2d,
    "DepthwiseConv2dNative": depthwise_conv2d,
    "MaxPool": max_pool,
    "AvgPool": avg_pool,
    "Relu": lambda op, grad: _masked(grad, op.outputs[0] > 0),
    "Relu6": lambda op, grad: _masked(grad, (op.outputs[0] > 0) & (op.outputs[0] < 6)),
    "LeakyRelu": _leaky_relu,
    "Sigmoid": lambda op, grad: grad * op.outputs[0] * (1 - op.outputs[0]),
    "Tanh": lambda op, grad: grad * (1 - op.outputs[0] * op.outputs[0]),
    "Sqrt": lambda op, grad: grad * 0.5 / op.outputs[0],
    "Rsqrt": lambda op, grad: grad * -0.5 * op.outputs[0] ** 3,
    "StridedSlice": strided_slice,
}

_PREFIX = "AdabetBuiltIn"
for _name, _gradient in GRADIENTS.items():
    tf.RegisterGradient(_PREFIX + _name)(_gradient)
