"""Cuts a partly frozen network in two: a prefix that training never changes, and the suffix that trains.

Both parts are Keras models on the layers and variables of the whole network, so
that training the suffix trains the network.
"""

import math
from dataclasses import dataclass
from typing import Any

import keras

# Reading a byte of a cached feature costs about as much time as this many operations of a forward
# pass: 1 GB/s from the cache to a batch, 20 GFLOP/s. An elementwise layer is not worth a larger cut.
FLOPS_PER_BYTE = 20


@dataclass(frozen=True)
class Cut:
    """A network in two parts.

    Attributes:
        prefix: keras.Model. Images (B, S, S, 3) to the features, float32, each (B, ...).
        suffix: keras.Model. The features, a tensor or a tuple of several, to logits (B, classes).
        layers: tuple of str. The layers whose outputs are the features.
        bytes_per_image: int. Size of the features of one image.
        saved: float. Share of the operations of a forward pass that the prefix computes.
        step_share: float. Operations of a training step behind the cut, as a share of those of the
            same step of the whole network.
        full_step_share: float. The same as a share of a step that trains every weight.
    """

    prefix: Any
    suffix: Any
    layers: tuple[str, ...]
    bytes_per_image: int
    saved: float
    step_share: float
    full_step_share: float

    def outside_bytes(self, part: keras.Model) -> int:
        """Returns the size of the weights that stay in memory while only `part` computes.

        Args:
            part: keras.Model. The prefix or the suffix.
        """
        inside = {id(variable) for variable in part.weights}
        weights = {id(variable): variable for variable in [*self.prefix.weights, *self.suffix.weights]}
        return sum(4 * math.prod(weight.shape) for key, weight in weights.items() if key not in inside)

    @property
    def name(self) -> str:
        """str. The layers whose outputs are kept, for logs and records."""
        return " + ".join(self.layers)


def find_cut(model: keras.Model) -> Cut | None:
    """Returns the cut of a frozen network that costs least, or None if no cut saves anything.

    The prefix may contain nothing that trains and nothing random. Among the places
    where that holds, the cut minimizes the operations behind it plus
    `FLOPS_PER_BYTE` for each byte that crosses it. Where residual branches cross,
    each of their tensors counts.

    Args:
        model: keras.Model, functional. Its weights are frozen one by one
            (`weight.trainable`), and its batch normalization does not use batch
            statistics.
    """
    flat = flattened(model)
    nodes = _nodes_in_order(flat)
    flops = [_forward_flops(node) for node in nodes]
    total = sum(flops)
    last_use = {}
    for place, node in enumerate(nodes):
        last_use.update({id(tensor): place for tensor in node.input_tensors})

    best, best_cost = (), total + FLOPS_PER_BYTE * sum(map(_num_bytes, flat.inputs))
    done, crossing = 0, list(flat.inputs)
    for place, node in enumerate(nodes[:-1]):
        if _changes(node.operation):
            break
        done += flops[place]
        crossing = [tensor for tensor in [*crossing, *node.output_tensors] if last_use[id(tensor)] > place]
        if any(tensor is image for tensor in crossing for image in flat.inputs):
            continue
        cost = total - done + FLOPS_PER_BYTE * sum(map(_num_bytes, crossing))
        if cost <= best_cost:
            best, best_cost = (tuple(crossing), done, place + 1), cost
    if not best:
        return None
    tensors, done, first = best
    step = _step_flops(nodes[first:], lambda variable: variable.trainable)
    return Cut(
        prefix=keras.Model(flat.inputs[0], list(tensors), name="prefix"),
        suffix=keras.Model(tensors[0] if len(tensors) == 1 else tensors, flat.outputs[0], name="suffix"),
        layers=tuple(_layer_name(tensor) for tensor in tensors),
        bytes_per_image=sum(map(_num_bytes, tensors)),
        saved=done / total,
        step_share=step / (done + step),
        full_step_share=step / _step_flops(nodes, lambda variable: True),
    )


def flattened(model: keras.Model) -> keras.Model:
    """Returns a functional model on the same layers in which composite layers are replaced by their parts.

    Args:
        model: keras.Model, functional. Returned as it is if it contains no composite layer, or if
            parts of two of them have the same name.
    """
    if not any(_parts(node.operation) for node in _nodes_in_order(model)):
        return model
    image = keras.Input(batch_shape=model.inputs[0].shape, dtype=model.inputs[0].dtype)
    output = _recalled(model, image)
    try:
        return keras.Model(image, output, name=model.name)
    except ValueError:  # layers of two nested models have the same name
        return model


def _recalled(model, image):
    """Returns the output of `model` for the Keras tensor `image`, composite layers in parts."""
    found = {id(model.inputs[0]): image}
    for node in _nodes_in_order(model):
        args, kwargs = node.arguments.fill_in(found)
        parts = _parts(node.operation)
        output = parts(node.operation, *args) if parts else node.operation(*args, **kwargs)
        found.update(zip(map(id, node.output_tensors), keras.tree.flatten(output), strict=True))
    return found[id(model.outputs[0])]


def _vit_encoder(encoder, tokens):
    tokens = encoder.dropout(tokens)
    for block in encoder.encoder_layers:
        tokens = block(tokens)
    return encoder.layer_norm(tokens)


def _parts(operation):
    """Returns the function that computes a composite layer part by part, or None for any other layer."""
    if isinstance(operation, keras.Model) and hasattr(_graph(operation), "_nodes_by_depth"):
        return _recalled if len(operation.inputs) == len(operation.outputs) == 1 else None
    return {"ViTEncoder": _vit_encoder}.get(type(operation).__name__)


def _nodes_in_order(model):
    """Returns the nodes of a functional model in the order in which it computes them, without the inputs."""
    by_depth = _graph(model)._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]


def _graph(model):
    """Returns the functional model that a Sequential holds, or the model itself."""
    return getattr(model, "_functional", None) or model


def _changes(operation):
    """Returns whether training changes the operation's weights, or the operation draws random numbers."""
    variables = getattr(operation, "variables", [])
    return any(variable.trainable or "seed_generator" in variable.path for variable in variables)


def _step_flops(nodes, trains):
    """Returns the operations of a training step on consecutive nodes, for one image.

    A gradient of a node's input costs as much as the node, and is needed if something before the node
    trains; a gradient of a kernel costs as much as applying it.

    Args:
        nodes: list of nodes, in the order in which they are computed.
        trains: function of a variable that returns whether it trains.
    """
    total, need_gradient = 0, set()
    for node in nodes:
        total += _forward_flops(node) + _kernel_flops(node, trains)
        before = any(id(tensor) in need_gradient for tensor in node.input_tensors)
        total += _forward_flops(node) if before else 0
        if before or any(map(trains, getattr(node.operation, "variables", []))):
            need_gradient.update(map(id, node.output_tensors))
    return total


def _forward_flops(node):
    """Returns the operations of a node's forward pass for one image.

    A kernel is applied once at every position of the output, two operations for each
    of its elements. All else costs one operation for each element of the output.
    """
    return sum(math.prod(tensor.shape[1:]) for tensor in node.output_tensors) + _kernel_flops(node, lambda kernel: True)


def _kernel_flops(node, counts):
    """Returns the operations of applying those kernels of a node for which `counts` is true."""
    positions = math.prod(node.output_tensors[0].shape[1:-1])
    kernels = [weight for weight in getattr(node.operation, "weights", []) if weight.name == "kernel"]
    return 2 * positions * sum(math.prod(kernel.shape) for kernel in kernels if counts(kernel))


def _num_bytes(tensor):
    return 4 * math.prod(tensor.shape[1:])  # float32


def _layer_name(tensor):
    operation = tensor._keras_history.operation
    return getattr(operation, "path", None) or operation.name
