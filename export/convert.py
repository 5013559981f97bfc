"""Conversion of a traced network to a LiteRT model of built-in operations."""

import re
import tempfile

import keras
import tensorflow as tf

from core.errors import RunError
from export.gradients import GRADIENTS

# Operations that a training step may consist of: those that LiteRT has built in, and those
# that the converter writes in them or folds away when shapes are static.
CONVERTED = frozenset(GRADIENTS) | {
    "Add", "AddN", "AddV2", "ArgMax", "AssignVariableOp", "BatchMatMulV2", "BiasAdd", "BiasAddGrad",
    "BroadcastGradientArgs", "BroadcastTo", "Cast", "ConcatOffset", "ConcatV2", "Const", "Einsum", "Equal", "Erfc",
    "Exp", "ExpandDims", "Fill", "FloorDiv", "FloorMod", "GatherV2", "Greater", "Identity", "IdentityN", "Less",
    "Log", "LogicalAnd", "MatMul", "Max", "Maximum", "Mean", "Minimum", "Mul", "Neg", "NoOp", "OneHot", "Pack",
    "Pad", "PadV2", "Placeholder", "Pow", "Prod", "Range", "ReadVariableOp", "RealDiv", "Reciprocal", "Reshape",
    "ReverseV2", "SelectV2", "Shape", "Slice", "Softmax", "Split", "Square", "SquaredDifference", "Squeeze",
    "StopGradient", "StridedSlice", "Sub", "Sum", "Tile", "Transpose", "UnsortedSegmentSum", "ZerosLike",
}  # fmt: skip


def unknown_operations(graph: tf.Graph, model: keras.Model) -> list[str]:
    """Returns the operations of a traced function that are not in `CONVERTED`, with their layers, each type once."""
    layers = {layer.name for layer in model._flatten_layers(include_self=False)}
    found: dict[str, str] = {}
    for operation in graph.get_operations():
        if operation.type not in CONVERTED:
            found.setdefault(operation.type, f"{operation.type} in {_layer_of(operation.name, layers)}")
    return list(found.values())


def _layer_of(name, layers):
    """Returns the name of the innermost layer in an operation's name, whose scopes may have a number added."""
    for scope in reversed(name.split("/")[:-1]):
        for layer in (scope, re.sub(r"_\d+$", "", scope)):
            if layer in layers:
                return f"layer {layer}"
    return f"operation {name}"


def to_litert(module: tf.Module, signatures: dict) -> bytes:
    """Returns the content of a .tflite file with the signatures of `training_module.make`.

    Raises:
        RunError: if the converter needs operations that are not built into LiteRT.
    """
    with tempfile.TemporaryDirectory(prefix="adabet-litert-") as folder:
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        tf.saved_model.save(module, folder, signatures=signatures, options=options)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=list(signatures))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.experimental_enable_resource_variables = True
        try:
            return converter.convert()
        except Exception as error:
            found = re.findall(r"(?:Flex|Custom) ops: ([^\n]*)", str(error))
            raise RunError(
                f"the network must convert to LiteRT's built-in operations. Received: {found}; leave out --save_litert."
            ) from error
