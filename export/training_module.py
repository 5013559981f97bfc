"""The signatures of an exported network: train, infer, save and restore.

A step is the one that `models.compiling` configures for SGD, without dropout and
augmentation: mean cross-entropy, gradients clipped by their global norm, decoupled weight
decay, momentum. The caller gives the learning rate of every step.
"""

import contextlib
import re
from collections.abc import Collection

import keras
import tensorflow as tf

from core.config import Config
from export import gradients
from models import Network


def identifiers(paths: Collection[str]) -> dict[str, str]:
    """Returns {weight path: name}, the names that `save` and `restore` give the weights.

    A name is the path with every character but letters and digits replaced by `_`,
    and a number where two paths would share it.
    """
    names: dict[str, str] = {}
    for path in sorted(paths):
        name = base = re.sub(r"[^0-9A-Za-z]", "_", path)
        number = 1
        while name in names.values():
            number += 1
            name = f"{base}_{number}"
        names[path] = name
    return names


def make(network: Network, trained_weights: Collection[str], cfg: Config, frozen: dict | None = None):
    """Returns a tf.Module that trains some of a network's weights, and its signatures.

    The trained weights and their momentum slots are variables of the module; every other
    weight and statistic is a constant.

    Args:
        network: models.Network without batch statistics, see `bn_stats`.
        trained_weights: collection of str. The paths of the weights that train.
        cfg: Config. Reads `momentum`, `weight_decay`, `global_clipnorm`, `batch_size` and the two of these that start
            with `litert_`, which have precedence.
        frozen: dict of {weight path: array} or None. Values that replace those of the frozen weights.

    Returns:
        module: tf.Module.
        signatures: dict of {name: tf.function}.
            `train` takes `images`, float32 (B, S, S, 3), RGB in 0..255, `labels`, int32 (B,), and
            `learning_rate`, float32 (), and returns `loss` and `accuracy` of the batch, float32 (),
            from before the step.
            `infer` takes `images`, float32 (B, S, S, 3), and returns `logits`, float32 (B, classes).
            `save` takes nothing and returns the trained weights by name, see `identifiers`.
            `restore` takes them, zeroes the momentum, and returns `restored`, int32 (), their number.
    """
    batch_size = cfg.litert_batch or cfg.batch_size
    momentum = cfg.momentum if cfg.litert_momentum is None else cfg.litert_momentum
    model = network.model
    names = identifiers(trained_weights)
    module = tf.Module(name="network")
    keras_weights = {weight.path: weight for weight in model.weights}
    frozen = {path: weight.numpy() for path, weight in keras_weights.items()} | (frozen or {})
    module.weights = {
        names[path]: tf.Variable(keras_weights[path].numpy(), name=names[path]) for path in sorted(trained_weights)
    }
    module.slots = {}
    if momentum:
        module.slots = {
            name: tf.Variable(tf.zeros_like(weight), name=f"{name}_momentum") for name, weight in module.weights.items()
        }

    def logits_of(images, values):
        mapping = [
            (weight, values[names[path]] if path in names else tf.constant(frozen[path]))
            for path, weight in keras_weights.items()
        ]
        with keras.StatelessScope(state_mapping=mapping), _activations_replaced(model):
            return model(images, training=False)

    images_spec = tf.TensorSpec((batch_size, *model.input_shape[1:]), tf.float32, "images")
    labels_spec = tf.TensorSpec((batch_size,), tf.int32, "labels")
    rate_spec = tf.TensorSpec((), tf.float32, "learning_rate")

    @tf.function(input_signature=[images_spec, labels_spec, rate_spec], autograph=False)
    def train(images, labels, learning_rate):
        values = {name: tf.identity(weight) for name, weight in module.weights.items()}
        with gradients.overridden(tf.compat.v1.get_default_graph()):
            logits = logits_of(images, values)
            loss = _cross_entropy(logits, labels)
        # The gradient of a lookup is sparse until it is converted.
        grads = [tf.convert_to_tensor(grad) for grad in tf.gradients(loss, list(values.values()))]
        if cfg.global_clipnorm:
            grads = _clipped(grads, cfg.global_clipnorm)
        for (name, value), grad in zip(values.items(), grads):
            change = -learning_rate * grad
            if momentum:
                change += momentum * module.slots[name]
                module.slots[name].assign(change)
            module.weights[name].assign(value * (1 - cfg.weight_decay * learning_rate) + change)
        hits = tf.equal(tf.argmax(logits, 1, output_type=tf.int32), labels)
        return {"loss": loss, "accuracy": tf.reduce_mean(tf.cast(hits, tf.float32))}

    @tf.function(input_signature=[images_spec], autograph=False)
    def infer(images):
        return {"logits": logits_of(images, {name: tf.identity(weight) for name, weight in module.weights.items()})}

    @tf.function(input_signature=[], autograph=False)
    def save():
        return {name: tf.identity(weight) for name, weight in module.weights.items()}

    def restore(**values):
        for name, value in values.items():
            module.weights[name].assign(value)
        for slot in module.slots.values():
            slot.assign(tf.zeros_like(slot))
        return {"restored": tf.constant(len(values))}

    restore = tf.function(restore, autograph=False).get_concrete_function(
        **{name: tf.TensorSpec(weight.shape, tf.float32, name) for name, weight in module.weights.items()}
    )
    return module, {"train": train, "infer": infer, "save": save, "restore": restore}


def _cross_entropy(logits, labels):
    """Returns the mean cross-entropy of `logits` (B, classes) and int32 `labels` (B,)."""
    shifted = logits - tf.stop_gradient(tf.reduce_max(logits, 1, keepdims=True))
    log_sum = tf.math.log(tf.reduce_sum(tf.exp(shifted), 1))  # (B,)
    chosen = tf.reduce_sum(shifted * tf.one_hot(labels, logits.shape[1]), 1)
    return tf.reduce_mean(log_sum - chosen)


def _clipped(grads, largest):
    """Returns `grads`, scaled down together if their global norm exceeds `largest`."""
    norm = tf.sqrt(tf.add_n([tf.reduce_sum(grad * grad) for grad in grads]))
    scale = largest / tf.maximum(norm, largest)
    return [grad * scale for grad in grads]


@contextlib.contextmanager
def _activations_replaced(model):
    """Lets the layers use activations whose gradients consist of built-in operations."""
    layers = [
        layer for layer in model._flatten_layers() if getattr(layer, "activation", None) is keras.activations.gelu
    ]
    try:
        for layer in layers:
            layer.activation = gradients.gelu
        yield
    finally:
        for layer in layers:
            layer.activation = keras.activations.gelu
