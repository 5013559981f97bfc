"""How TensorFlow's kernels use buffers, and how long they take.

Most kernels allocate their outputs. Some pass their input on without a copy.
Elementwise kernels write over an input if nothing else refers to it and its size and
type are those of the output. This follows TensorFlow's kernels and was checked against
the trace of the allocator.
"""

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
    "_Arg Placeholder VarHandleOp Const NoOp Identity IdentityN Reshape Squeeze ExpandDims Shape ShapeN Size Rank "
    "StopGradient".split()
)

# These read only the shape of a tensor.
READS_SHAPE = frozenset({"Shape", "ShapeN", "Size", "Rank"})

# A rough duration determines which of two parallel operations ends first. Counting floating-point
# operations as well makes no estimate better.
_BYTES_PER_S = 4e9  # read and written by one core
_OVERHEAD_S = 5e-6


def seconds(op):
    """Returns a rough duration of an operation in seconds.

    Args:
        op: step_graph.Op.
    """
    if op.type in PASSES_ON or op.type in INEXPENSIVE or op.type == "ReadVariableOp":
        return 1e-6
    num_bytes = sum(tensor.num_bytes for tensor in (*op.inputs, *op.outputs))
    return _OVERHEAD_S + num_bytes / _BYTES_PER_S
