"""Smaller storage of frozen kernels in a LiteRT file: float16 or int8, dequantized when the file is loaded.

Kernels are quantized before the conversion, symmetrically, with one scale per output
channel. The converter transposes kernels and multiplies them by the scales of frozen
normalizations, channel by channel, so its constants still are whole multiples of one scale
per channel, on some axis. `packed` finds that axis and stores the integers.
"""

import numpy as np
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

from models import Network, channels

SMALLEST = 1024  # elements; smaller constants stay float32
_GRAPHS = (b"train", b"infer")  # the others hold the initial values of variables
_LEVELS = 127
_TOLERANCE = 1e-5  # of a constant's largest element: float32 rounding of a product


def quantized_kernels(network: Network, trained_weights) -> dict[str, np.ndarray]:
    """Returns {weight path: float32 array} of the frozen kernels, rounded to 255 levels per output channel."""
    quantized = {}
    for candidate in network.candidates:
        kernel, axes = getattr(candidate.layer, "kernel", None), channels.output_axes(candidate.layer)
        if kernel is None or kernel.path in trained_weights:
            continue
        value = kernel.numpy()
        others = tuple(axis for axis in range(value.ndim) if axis not in axes)
        integers, scale = _to_integers(value, others)
        quantized[kernel.path] = (integers * scale).astype(np.float32)
    return quantized


def packed(content: bytes, precision: str) -> bytes:
    """Returns a .tflite file whose large float32 constants are stored in `precision`, float16 or int8.

    A constant that int8 does not represent exactly stays float32, as do the initial values
    of variables.
    """
    model = flatbuffer_utils.convert_bytearray_to_object(content)
    dequantize = len(model.operatorCodes)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
    code.version = 5
    model.operatorCodes.append(code)
    buffers: dict[int, tuple | None] = {}  # number of the float32 buffer -> its packed form, if any
    for graph in model.subgraphs:
        if graph.name not in _GRAPHS:
            continue
        consumers = _first_consumers(graph)
        insertions = []
        for number, tensor in list(enumerate(graph.tensors)):
            if tensor.type != schema.TensorType.FLOAT32 or number not in consumers:
                continue
            if tensor.buffer not in buffers:
                buffers[tensor.buffer] = _pack_buffer(model, tensor, _PACKERS[precision])
            if buffers[tensor.buffer] is None:
                continue
            buffer, kind, quantization = buffers[tensor.buffer]
            stored = schema.TensorT()
            stored.name, stored.shape, stored.hasRank = tensor.name + b"_stored", tensor.shape, True
            stored.type, stored.buffer, stored.quantization = kind, buffer, quantization
            graph.tensors.append(stored)
            tensor.buffer = 0  # the empty buffer: the tensor is computed
            operator = schema.OperatorT()
            operator.opcodeIndex, operator.inputs, operator.outputs = dequantize, [len(graph.tensors) - 1], [number]
            insertions.append((consumers[number], operator))
        for position, operator in sorted(insertions, key=lambda item: -item[0]):
            graph.operators.insert(position, operator)
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    for number in buffers.keys() - used:
        model.buffers[number].data = None
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _first_consumers(graph):
    """Returns {number of a tensor: position of the first operator that reads it}."""
    consumers = {}
    for position, operator in enumerate(graph.operators):
        for number in operator.inputs:
            consumers.setdefault(int(number), position)
    return consumers


def _pack_buffer(model, tensor, pack):
    """Appends the packed form of a constant's buffer. Returns (buffer, type, quantization), or None if it stays."""
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) < 4 * SMALLEST:
        return None
    found = pack(np.frombuffer(bytes(bytearray(data)), np.float32).reshape(tensor.shape))
    if found is None:
        return None
    value, kind, quantization = found
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(value.tobytes(), np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1, kind, quantization


def _to_float16(value):
    return value.astype(np.float16), schema.TensorType.FLOAT16, None


def _to_int8(value):
    for axis in reversed(range(value.ndim)):
        others = tuple(other for other in range(value.ndim) if other != axis)
        integers, scale = _to_integers(value, others)
        if np.abs(integers * scale - value).max() <= _TOLERANCE * np.abs(value).max():
            quantization = schema.QuantizationParametersT()
            quantization.scale = scale.ravel().astype(np.float32)
            quantization.zeroPoint = np.zeros(scale.size, np.int64)
            quantization.quantizedDimension = axis
            return integers.astype(np.int8), schema.TensorType.INT8, quantization
    return None


def _to_integers(value, axes):
    """Returns whole numbers of at most 127 and the scale, constant over `axes`, that they are multiples of."""
    scale = np.abs(value).max(axis=axes, keepdims=True) / _LEVELS
    scale = np.where(scale == 0, 1, scale)  # a pruned channel
    return np.rint(value / scale), scale


_PACKERS = {"float16": _to_float16, "int8": _to_int8}
