"""How TensorFlow's kernels use buffers, and how long they take.

Most kernels allocate their outputs. Some pass their input on without a copy.
Elementwise kernels write over an input if nothing else refers to it and its size and
type are those of the output. This follows TensorFlow's kernels and was checked against
the trace of the allocator.
"""

import math

# The output is the first input's buffer.
PASSES_ON = frozenset(
    "Identity IdentityN StopGradient PreventGradient Snapshot Reshape Squeeze ExpandDims Bitcast CheckNumerics "
    # On a TemporaryVariable, in which TensorFlow sums gradients:
    "Assign AssignAdd AssignSub DestroyTemporaryVariable".split()
)

# The output uses the buffer of one of these inputs if possible.
_UNARY = (
    "Abs Neg Square Sqrt Rsqrt Reciprocal Inv Exp Expm1 Log Log1p Sign Sin Cos Tanh Sigmoid Erf Erfc Floor Ceil Round "
    "Relu Relu6 LeakyRelu Elu Selu Softplus Softsign Softmax LogSoftmax LogicalNot BiasAdd Cast ClipByValue Cumsum"
)
_BINARY = (
    "Add AddV2 Sub Mul MulNoNan Div RealDiv DivNoNan Maximum Minimum Pow SquaredDifference FloorDiv FloorMod "
    "LogicalAnd LogicalOr BitwiseAnd BitwiseOr BitwiseXor "
    "ReluGrad Relu6Grad LeakyReluGrad EluGrad SeluGrad TanhGrad SigmoidGrad SqrtGrad RsqrtGrad ReciprocalGrad InvGrad "
    "SoftplusGrad SoftsignGrad"
)
WRITES_OVER = {
    **dict.fromkeys(_UNARY.split(), (0,)),
    **dict.fromkeys(_BINARY.split(), (0, 1)),
    "AddN": range(1000),  # any of them
    "Select": (1, 2),
}

# The executor runs these at once, not in the thread pool.
INEXPENSIVE = frozenset(
    [
        "_Arg",
        "Placeholder",
        "VarHandleOp",
        "Const",
        "NoOp",
        "Identity",
        "IdentityN",
        "Reshape",
        "Squeeze",
        "ExpandDims",
        "Shape",
        "ShapeN",
        "Size",
        "Rank",
        "StopGradient",
    ]
)

# These read only the shape of a tensor.
READS_SHAPE = frozenset({"Shape", "ShapeN", "Size", "Rank"})

# Rough speeds of one core, which determine which of two parallel operations ends first.
_BYTES_PER_S = 4e9
_FLOPS_PER_S = 4e10
_OVERHEAD_S = 5e-6

_MATRIX_PRODUCTS = frozenset({"MatMul", "_FusedMatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"})
_CONVOLUTIONS = frozenset({"Conv2D", "_FusedConv2D", "DepthwiseConv2dNative", "_FusedDepthwiseConv2dNative"})
_BACK_TO_INPUT = frozenset({"Conv2DBackpropInput", "DepthwiseConv2dNativeBackpropInput"})
_BACK_TO_FILTER = frozenset({"Conv2DBackpropFilter", "DepthwiseConv2dNativeBackpropFilter"})


def seconds(op):
    """Returns a rough duration of an operation in seconds.

    Args:
        op: step_graph.Op.
    """
    if op.type in PASSES_ON or op.type in INEXPENSIVE or op.type == "ReadVariableOp":
        return 1e-6
    num_bytes = sum(tensor.num_bytes for tensor in (*op.inputs, *op.outputs))
    return _OVERHEAD_S + num_bytes / _BYTES_PER_S + _flops(op) / _FLOPS_PER_S


def _flops(op):
    if op.type in _MATRIX_PRODUCTS and len(op.inputs) > 1:
        # m x k times k x n: the root of all three products is m k n.
        elements = [math.prod(tensor.shape) for tensor in (*op.inputs[:2], op.outputs[0])]
        batch = math.prod(op.outputs[0].shape[:-2]) if op.type.startswith("Batch") else 1
        return 2 * math.sqrt(math.prod(elements) / batch) if batch else 0
    if op.type in _CONVOLUTIONS:
        return _convolution(op.outputs[0].shape, op.inputs[1].shape, "Depthwise" in op.type)
    if op.type in _BACK_TO_INPUT:
        return _convolution(op.inputs[2].shape, op.inputs[1].shape, "Depthwise" in op.type)
    if op.type in _BACK_TO_FILTER:
        return _convolution(op.inputs[2].shape, op.outputs[0].shape, "Depthwise" in op.type)
    return 0


def _convolution(output, filters, depthwise):
    height, width, channels, _ = filters
    return 2 * math.prod(output) * height * width * (1 if depthwise else channels)
