"""The training step as TensorFlow will run it, traced and optimized, without computing it.

The trace has the step's operations with their shapes. TensorFlow then rewrites it: it
merges operations and removes duplicates, which changes what is kept. The same rewriting
is applied here. TensorFlow has no public interface to that graph, so this module uses
private ones.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass, field

import keras
import tensorflow as tf

from core import environment
from core.errors import UsageError
from memory.simulator import kernels
from models.layers import calls_replaced


@dataclass(frozen=True)
class Tensor:
    """Shape and type of a tensor; `num_bytes` is 0 for handles and strings."""

    shape: tuple
    dtype: tf.DType
    num_bytes: int


@dataclass(eq=False)
class Op:
    """One operation of a step.

    Attributes:
        index: int. The index in `Step.ops`.
        name, type: str.
        inputs, outputs: list of Tensor.
        consumers: for each output, the list of (op index, input slot) that read it.
        out_edges: list of op indices, one per edge, control edges included.
        num_in_edges: int.
        variable: key of the variable that it reads or changes, or None.
        resident: key of an output that is in memory (the batch, a constant), or None.
        part: str. The part of its outputs: activations, gradients or temporary.
        seconds: float. A rough duration.
    """

    index: int
    name: str
    type: str
    inputs: list
    outputs: list
    consumers: list
    out_edges: list = field(default_factory=list)
    num_in_edges: int = 0
    variable: str | None = None
    resident: str | None = None
    part: str = "temporary"
    seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """A step, ready for `executor.run`.

    Attributes:
        ops: list of Op, inputs first.
        variables: list of (key, part, bytes), in order of creation.
        resident: list of (key, bytes): the batch and the constants.
        layer_scopes: dict from a name scope to the path of the layer that computes in it.
    """

    ops: list
    variables: list
    resident: list
    layer_scopes: dict

    def layer_of(self, op):
        """Returns the path of the layer of an Op, `optimizer` for the optimizer's, or else the op's name.

        An operation outside of layers, such as a sum of gradients, belongs to the layer
        whose results it uses.
        """
        found, seen = [op], set()
        while found:
            for candidate in found:
                layer = self._scope_of(candidate.name.removeprefix("gradient_tape/"))
                if layer:
                    return layer
            seen.update(candidate.index for candidate in found)
            found = [p for p in self.ops if p.index not in seen and not seen.isdisjoint(p.out_edges)]
        return op.name

    def _scope_of(self, scope):
        while scope and scope not in self.layer_scopes:
            scope = scope.rpartition("/")[0]
        return self.layer_scopes.get(scope)


def trace(model, input_shape):
    """Traces and optimizes the training step of a compiled model.

    The trace is Keras' own, and the first `train_on_batch` with a batch of this shape
    uses it again.

    Args:
        model: keras.Model. Compiled, not trained yet, with one output.
        input_shape: tuple (B, ...), the shape of a batch; or a list or tuple of such tuples,
            one per input of the model, in the structure in which batches come.

    Returns:
        Step.
    """
    if not model.built:
        model.build(input_shape)
    inputs = _input_specs(model, input_shape)
    labels = _label_spec(model, inputs)
    # Creates the variables of model, metrics and loss, as train_on_batch does.
    model._symbolic_build(data_batch=(inputs, labels))
    model.optimizer.build(model.trainable_variables)
    model.make_train_function()
    with _noting(model) as notes:
        concrete = _step_function(model).get_concrete_function((inputs, labels, None))
    return _step(concrete, notes, _part_of_variables(model))


def _input_specs(model, input_shape):
    """Returns the tf.TensorSpec of the input, or one per input. The default dtype is float32."""
    several = isinstance(input_shape[0], (tuple, list))
    shapes = input_shape if several else [input_shape]
    dtypes = [one.dtype for one in getattr(model, "inputs", None) or []] or ["float32"] * len(shapes)
    specs = [tf.TensorSpec(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return type(input_shape)(specs) if several else specs[0]


def _label_spec(model, inputs):
    """Returns the tf.TensorSpec of the labels: class indices for a sparse loss, else like the output."""
    # Keras has the answer ready for an unknown batch size.
    symbols = tf.nest.map_structure(lambda spec: keras.KerasTensor((None, *spec.shape[1:]), spec.dtype.name), inputs)
    output = model.compute_output_spec(symbols)
    if not isinstance(output, keras.KerasTensor):
        raise ValueError(f"the model must have one output to be estimated. Received: {type(output).__name__}.")
    batch_size = tf.nest.flatten(inputs)[0].shape[0]
    loss = model.loss
    name = loss if isinstance(loss, str) else getattr(loss, "name", None) or getattr(loss, "__name__", "")
    if "sparse" in name:
        return tf.TensorSpec((batch_size, *output.shape[1:-1]), tf.int64)
    return tf.TensorSpec((batch_size, *output.shape[1:]), output.dtype)


def trace_inference(model, input_shape):
    """Traces and optimizes a forward pass in inference mode; arguments as in `trace`."""
    inputs = tf.TensorSpec(input_shape, model.inputs[0].dtype)
    forward = tf.function(lambda images: model(images, training=False), jit_compile=False)
    with _noting(model) as notes:
        concrete = forward.get_concrete_function(inputs)
    return _step(concrete, notes, _part_of_variables(model))


@dataclass
class _Notes:
    """What is recorded while a step is traced.

    Attributes:
        layer_scopes: dict, as in Step.
        forward: set of names of the operations before the first gradient.
        gradients: set of names of the operations that compute the weights' gradients.
        optimizer: str. The optimizer's name scope.
    """

    layer_scopes: dict = field(default_factory=dict)
    forward: set | None = None
    gradients: set = field(default_factory=set)
    optimizer: str = ""


@contextlib.contextmanager
def _noting(model):
    notes = _Notes()

    def note_scope(layer, call):
        def noted(*args, **kwargs):
            scope = tf.compat.v1.get_default_graph().get_name_scope()
            if scope:
                notes.layer_scopes.setdefault(scope, layer.path)
            return call(*args, **kwargs)

        return noted

    def note_loss(loss):
        notes.forward = {op.name for op in tf.compat.v1.get_default_graph().get_operations()}
        return type(optimizer).scale_loss(optimizer, loss)

    def note_gradients(pairs):
        pairs = list(pairs)
        notes.gradients = {gradient.op.name for gradient, _ in pairs if gradient is not None}
        return type(optimizer).apply_gradients(optimizer, pairs)

    optimizer = getattr(model, "optimizer", None)  # absent before the model is compiled
    layers = list(model._flatten_layers(include_self=False))
    with calls_replaced(layers, note_scope):
        if optimizer is None:
            yield notes
            return
        notes.optimizer = optimizer.name
        notes.layer_scopes[optimizer.name] = "optimizer"
        # Keras' own __setattr__ would track the function.
        object.__setattr__(optimizer, "scale_loss", note_loss)
        object.__setattr__(optimizer, "apply_gradients", note_gradients)
        try:
            yield notes
        finally:
            object.__delattr__(optimizer, "scale_loss")
            object.__delattr__(optimizer, "apply_gradients")


def _step_function(model):
    """Returns the tf.function of one training step inside Keras' train function, or an equal one."""
    found = _in_closure(_in_closure(model.train_function, "one_step_on_data"), "step_func")
    if hasattr(found, "get_concrete_function"):
        return found
    return tf.function(model.train_step, jit_compile=False)  # traces once more


def _in_closure(function, name):
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or name not in code.co_freevars:
        return None
    return cells[code.co_freevars.index(name)].cell_contents


def _part_of_variables(model):
    """Returns a function from a tf.Variable to its part."""
    optimizer = getattr(model, "optimizer", None)
    slots = {id(v.value) for v in optimizer.variables} if optimizer else set()
    return lambda variable: "optimizer" if id(variable) in slots else "weights"


def _step(concrete, notes, part_of):
    graph_def = concrete.graph.as_graph_def()
    by_handle = {id(v.handle): v for v in concrete.graph.variables}
    captured = {placeholder.op.name: by_handle.get(id(tensor)) for tensor, placeholder in concrete.graph.captures}
    variables = {}
    for node in graph_def.node:
        node.device = f"/job:localhost/replica:0/task:0/device:{environment.device()}"
        variable = captured.get(node.name)
        if variable is not None:  # a handle with a known shape
            node.op = "VarHandleOp"
            node.attr.clear()
            node.attr["dtype"].type = variable.dtype.as_datatype_enum
            node.attr["shape"].shape.CopyFrom(variable.shape.as_proto())
            node.attr["shared_name"].s = node.name.encode()
            variables[node.name] = variable
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(_optimized(graph_def, concrete), name="")

    ops = _ops(graph, variables)
    _name_parts(ops, notes)
    return Step(
        ops=ops,
        variables=[(key, part_of(v), math.prod(v.shape) * v.dtype.size) for key, v in variables.items()],
        resident=[(op.resident, op.outputs[0].num_bytes) for op in ops if op.resident],
        layer_scopes=notes.layer_scopes,
    )


def _optimized(graph_def, concrete):
    """Returns the graph after TensorFlow's graph optimizer."""
    from tensorflow.core.protobuf import config_pb2, meta_graph_pb2
    from tensorflow.python.grappler import tf_optimizer

    meta_graph = meta_graph_pb2.MetaGraphDef()
    meta_graph.graph_def.CopyFrom(graph_def)
    meta_graph.meta_info_def.tensorflow_version = tf.__version__
    wanted = [tensor.name for tensor in concrete.outputs] + [op.name for op in concrete.graph.control_outputs]
    meta_graph.collection_def["train_op"].node_list.value.extend(wanted)
    return tf_optimizer.OptimizeGraph(config_pb2.ConfigProto(), meta_graph)


_ON_VARIABLES = ("ReadVariableOp", "AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp", "ResourceApply")


def _ops(graph, variables):
    tf_ops = graph.get_operations()
    for op in tf_ops:
        if op.node_def.attr["_XlaMustCompile"].b:
            raise UsageError(
                "the memory of a step can be estimated if TensorFlow's own kernels compute it. Received: "
                f"{op.name}, a grouped convolution that Keras compiles with XLA, whose workspace is not known; train "
                "without --memory_budget_mb."
            )
    index = {op.name: i for i, op in enumerate(tf_ops)}
    ops = [
        Op(
            i,
            op.name,
            op.type,
            [_tensor(t) for t in op.inputs],
            [_tensor(t) for t in op.outputs],
            [[] for _ in op.outputs],
        )
        for i, op in enumerate(tf_ops)
    ]
    for op, tf_op in zip(ops, tf_ops):
        for slot, tensor in enumerate(tf_op.inputs):
            producer = ops[index[tensor.op.name]]
            producer.consumers[tensor.value_index].append((op.index, slot))
            producer.out_edges.append(op.index)
        for control in tf_op.control_inputs:
            ops[index[control.name]].out_edges.append(op.index)
        op.num_in_edges = len(tf_op.inputs) + len(tf_op.control_inputs)
        if op.type.startswith(_ON_VARIABLES):
            op.variable = tf_op.inputs[0].op.name
            if op.variable not in variables:
                raise NotImplementedError(
                    f"the variables of a step must have known handles. Received: {op.name} with {op.variable}."
                )
        if op.type in ("Placeholder", "Const"):
            op.resident = op.name
        op.seconds = kernels.seconds(op)
    return ops


def _tensor(tensor):
    """Returns the Tensor of a symbolic one. An unknown size counts as 1, an unknown shape as no bytes."""
    dtype = tensor.dtype.base_dtype
    shape = tuple(size or 1 for size in tensor.shape.as_list()) if tensor.shape.rank is not None else (0,)
    unsized = dtype in (tf.resource, tf.variant, tf.string)
    return Tensor(shape, dtype, 0 if unsized else math.prod(shape) * dtype.size)


def _name_parts(ops, notes):
    """Sets the part of each operation's output in the split."""
    if notes.forward is None:
        return
    forward = [op.name in notes.forward for op in ops]

    def read_by_backward(op):
        for consumer, _ in itertools.chain(*op.consumers):
            if ops[consumer].type in kernels.READS_SHAPE:
                continue
            if not forward[consumer] or (ops[consumer].type in kernels.PASSES_ON and read_by_backward(ops[consumer])):
                return True
        return False

    for op in ops:
        if forward[op.index]:
            op.part = "activations" if read_by_backward(op) else "temporary"
        elif op.name in notes.gradients:
            op.part = "gradients"
    # Clipping multiplies each gradient by a number. Its results are the gradients afterwards.
    for op in ops:
        if op.part == "gradients":
            for consumer, slot in itertools.chain(*op.consumers):
                scaled = ops[consumer]
                if (
                    scaled.type == "Mul"
                    and not scaled.inputs[1 - slot].shape
                    and not scaled.name.startswith(f"{notes.optimizer}/")
                ):
                    scaled.part = "gradients"
