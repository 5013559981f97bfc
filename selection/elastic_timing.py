"""The cost of a backward pass per tensor for ElasticTrainer: measured on this device, or counted in FLOPs.

Tensors are the weights of the candidates, in forward order. `t_dw` is the cost of a
tensor's own gradient. `t_dy` is the cost of passing the error to a tensor from the one
after it: through the whole next layer for the last weight of a layer, and nothing for
the layer's other weights, which share the error of its output. The backward pass for a
set of tensors costs their t_dw, and the t_dy of all tensors from the output to the
earliest of the set. Branches count as one chain, as published.

Operations without weights (activations, pooling, the products of attention) belong to
no tensor. Measured times are scaled so that their total is the whole backward pass,
which distributes these operations over the layers in proportion.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from core.config import Config
from core.log import log

# The fastest call counts: other load only makes a call slower.
_REPEATS = 3  # at least
_REPEATS_S = 0.5  # more calls while they take no longer
_MOST_REPEATS = 20
_known: dict[str, Timings] = {}  # this process's measurements; the cache folder may not be writable


@dataclass(frozen=True)
class Timings:
    """The cost of the passes of one network on one batch.

    Attributes:
        source: str. measured or flops.
        unit: str. s or FLOP.
        forward: float. The forward pass.
        backward: float. The full backward pass: all of `t_dw` and `t_dy`.
        t_dw: dict from weight path to float, in forward order.
        t_dy: dict from weight path to float, in forward order.
        conditions: dict. The network, sizes, device and versions of a measurement.
    """

    source: str
    unit: str
    forward: float
    backward: float
    t_dw: dict
    t_dy: dict
    conditions: dict


def tensors(network) -> list:
    """Returns the weights of all candidates, from input to output."""
    return [weight for candidate in network.candidates for weight in candidate.weights]


def timings(network, cfg: Config, batch_size: int) -> Timings:
    """Returns the Timings of a network, measured or counted as `cfg.timing` says.

    Measurements are kept in the user's cache folder and used again for the same model,
    sizes, device and versions.

    Args:
        network: models.Network. The values of its weights do not matter.
        cfg: Config. Reads timing, model_name and input_size.
        batch_size: int. Images of a batch.
    """
    if cfg.timing == "flops":
        return counted(network, batch_size)
    conditions = _conditions(network, cfg, batch_size)
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:24]
    if key not in _known:
        file = cache_folder() / f"{key}.txt"
        found = _read(file, conditions)
        if found is None:
            log.info("Measuring the training time of each weight; the result is kept in %s", file)
            found = measured(network, batch_size, conditions)
            _write(file, found)
        _known[key] = found
    return _known[key]


def cache_folder() -> Path:
    """Returns the folder of measured timings, in XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "adabet" / "timings"


def counted(network, batch_size: int) -> Timings:
    """Returns Timings in FLOPs: each of the two gradients of a kernel costs as much as its forward pass.

    A bias, a scale or a shift costs one operation per element of the output, and passing
    the error through a layer without a kernel costs two.
    """
    from models.channels import forward_flops, output_axes  # loads TensorFlow

    own, through, forward = {}, [], 0
    for candidate in network.candidates:
        flops = batch_size * forward_flops(candidate)
        forward += flops
        through.append(flops)
        for weight in candidate.weights:
            is_kernel = output_axes(candidate.layer) and weight is candidate.layer.kernel
            own[weight.path] = flops if is_kernel else batch_size * candidate.activation_size
    return _timings(network, "flops", "FLOP", forward, None, own, through, {"batch_size": batch_size})


def measured(network, batch_size: int, conditions: dict) -> Timings:
    """Returns Timings in seconds, measured on random images.

    The forward pass and a full step are timed as a whole, and each layer's two gradients
    in functions of their own, once for layers of the same configuration and shape.
    Normalization uses its stored statistics.
    """
    import tensorflow as tf

    from models.channels import input_shapes

    model = network.model
    images = tf.random.stateless_uniform((batch_size, *model.inputs[0].shape[1:]), (0, 1), 0, 255)
    labels = tf.zeros(batch_size, tf.int64)
    forward = tf.function(lambda images, labels: model(images, training=False))
    step = gradient_function(network, tensors(network))
    forward_s, step_s = seconds_of([forward, step], images, labels)

    shapes, by_kind = input_shapes(model, batch_size), {}
    own: dict[str, float] = {}
    through = []
    for candidate in network.candidates:
        shape = shapes[candidate.path]
        kind = _kind(candidate.layer, shape)
        if kind not in by_kind:
            by_kind[kind] = _layer_seconds(candidate, shape)
        own_s, through_s = by_kind[kind]
        own.update(zip((weight.path for weight in candidate.weights), own_s))
        through.append(through_s)
    # Noise of the clock must not make a backward pass free.
    backward_s = max(step_s - forward_s, 0.1 * step_s)
    return _timings(network, "measured", "s", forward_s, backward_s, own, through, conditions)


def gradient_function(network, weights: list) -> Callable:
    """Returns a traced function (images, labels) -> gradients of the mean loss, one per weight, without dropout.

    Its time stands for that of a training step, to which the optimizer adds little.

    Args:
        network: models.Network.
        weights: list of keras.Variable.
    """
    import tensorflow as tf

    values = [weight.value for weight in weights]

    @tf.function
    def gradients(images, labels):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            logits = network.model(images, training=False)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        return tape.gradient(loss, values, unconnected_gradients="zero")

    return gradients


def _timings(network, source, unit, forward, backward, own, through, conditions):
    """Assigns each layer's cost of passing the error to the tensor that receives it, and scales to `backward`."""
    t_dw, t_dy = {}, {}
    for i, candidate in enumerate(network.candidates):
        for weight in candidate.weights:
            t_dw[weight.path], t_dy[weight.path] = float(own[weight.path]), 0.0
        if i + 1 < len(network.candidates):
            t_dy[candidate.weights[-1].path] = float(through[i + 1])
    total = math.fsum(t_dw.values()) + math.fsum(t_dy.values())
    if backward is not None:
        t_dw, t_dy = ({path: t * backward / total for path, t in times.items()} for times in (t_dw, t_dy))
    return Timings(source, unit, float(forward), float(backward or total), t_dw, t_dy, conditions)


def _kind(layer, shape):
    config = {key: value for key, value in layer.get_config().items() if key not in ("name", "trainable")}
    weights = [tuple(weight.shape) for weight in layer.weights]
    return json.dumps([type(layer).__name__, config, shape, weights], sort_keys=True, default=str)


def _layer_seconds(candidate, shape):
    """Returns the seconds of the gradient of each weight of a layer, a list, and of the gradient of its input."""
    import tensorflow as tf

    layer = candidate.layer
    inputs = tf.random.stateless_normal(shape, (0, 1))
    error = tf.random.stateless_normal(layer(inputs, training=False).shape, (0, 2))

    def gradient_of(target):
        @tf.function
        def gradient(inputs, error):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(inputs if target is None else target)
                output = layer(inputs, training=False)
            return tape.gradient(output, inputs if target is None else target, output_gradients=error)

        return seconds_of([gradient], inputs, error)[0]

    return [gradient_of(weight.value) for weight in candidate.weights], gradient_of(None)


def seconds_of(functions: list[Callable], *args) -> list[float]:
    """Returns the seconds of the fastest of a few calls of each function, after one that traces it.

    The functions are called in turn, so that other load on the machine affects all.
    """
    import tensorflow as tf

    for function in functions:
        function(*args)
    fastest = [math.inf] * len(functions)
    first, repeats = time.perf_counter(), 0
    while repeats < _REPEATS or (repeats < _MOST_REPEATS and time.perf_counter() - first < _REPEATS_S * len(functions)):
        repeats += 1
        for i, function in enumerate(functions):
            tf.test.experimental.sync_devices()
            start = time.perf_counter()
            function(*args)
            tf.test.experimental.sync_devices()
            fastest[i] = min(fastest[i], time.perf_counter() - start)
    return fastest


def _conditions(network, cfg, batch_size):
    """Returns all that measured times depend on, JSON-ready."""
    import keras
    import tensorflow as tf

    from core import environment

    return {
        "model_name": cfg.model_name,
        "input_size": cfg.input_size,
        "batch_size": batch_size,
        "weights": hashlib.sha256(
            repr([(weight.path, tuple(weight.shape)) for weight in tensors(network)]).encode()
        ).hexdigest()[:16],
        **environment.device_facts(),
        "host": platform.node(),
        "processor": platform.processor() or platform.machine(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }


def _read(file, conditions):
    """Returns the Timings in a cache file, or None if it has none for these conditions or is corrupt."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["crc32"] != _checksum(record["timings"]):
            raise ValueError("its checksum does not match")
        found = Timings(**record["timings"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("The timings in %s are corrupt (%s); measuring again.", file, error)
        return None
    return found if found.conditions == conditions else None


def _checksum(record):
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _write(file, found):
    from core.files import write_whole

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        record = asdict(found)
        write_whole(file, json.dumps({"crc32": _checksum(record), "timings": record}, indent=1) + "\n")
    except OSError as error:
        log.warning("The timings cannot be kept in %s (%s); the next run will measure again.", file.parent, error)
