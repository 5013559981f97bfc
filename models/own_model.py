"""A model of the user's own: a .keras file in safe mode, under our head or its own.

`keras_file.check` has checked its input before. Here the model is loaded, its classifier
found, and its output checked.
"""

import collections
import importlib
import itertools
import os
import re
import sys

import keras
import numpy as np

import models
from core.config import Config
from core.errors import UsageError, one_line
from core.log import log
from models import backbones

# Layers and operations between the weights of a classifier and the model's output.
_AFTER_THE_CLASSIFIER = {"Activation", "Softmax", "Flatten", "Reshape", "Dropout", "Identity"}
# Activations of a classifier. Behind any other one, a Dense layer computes features.
_CLASSIFYING = {"linear", "softmax", "sigmoid"}


def assemble(cfg: Config, num_classes: int):
    """Returns the models.Network of a model file, as `models.assemble` describes it.

    The last classification layer is replaced by our head. With `--keep_head` it stays if
    it has one output per class and returns logits or their softmax, which is removed.

    Args:
        cfg: Config. Reads model_name, custom_objects, weights, preprocessing, input_size,
            dropout, head_init and keep_head.
        num_classes: int.

    Raises:
        UsageError: if the model cannot be loaded, or its output is not a batch of vectors or maps.
    """
    whole = load(cfg)
    features, classifier, activations = _split(whole)
    if len(whole.outputs) != 1 or len(features.shape) not in (2, 4) or features.shape[-1] is None:
        shapes = ", ".join(str(output.shape) for output in whole.outputs)
        raise UsageError(
            "--model_name needs a model with one output of vectors (None, C) or maps (None, H, W, C). Received: "
            f"{cfg.model_name}, with {shapes}; save a model with such an output."
        )
    backbone = keras.Model(whole.inputs[0], features, name="backbone")
    _check_paths(cfg, backbone)

    images = keras.Input((cfg.input_size, cfg.input_size, 3), name="images")
    output = backbone(backbones.PREPROCESSING[cfg.preprocessing or "none"](images))
    name = models.short_name(cfg)
    if cfg.keep_head and _fits(classifier, activations, num_classes):
        logits = _logits(classifier, output)
        return backbones.network_of(keras.Model(images, logits, name=name), classifier, backbone)
    return backbones.with_head(
        name, images, backbone, backbones.pooled(output), num_classes, cfg, _free_name("dropout", backbone)
    )


def load(cfg: Config) -> keras.Model:
    """Returns the model of a file; with `--weights none`, with new random weights.

    Raises:
        UsageError: if Keras cannot load it, or a weight is not finite.
    """
    objects = custom_objects(cfg.custom_objects)
    path = os.path.expanduser(cfg.model_name)
    try:
        model = keras.saving.load_model(path, custom_objects=objects, compile=False, safe_mode=True)
        if cfg.weights == "none":
            model = type(model).from_config(model.get_config(), custom_objects=objects)
    except Exception as error:  # Keras and custom classes raise anything
        raise UsageError(_why_not_loaded(cfg, error)) from error
    if not all(np.all(np.isfinite(weight)) for weight in model.weights):
        raise UsageError(
            f"--model_name needs finite weights. Received: {cfg.model_name}, with NaN or infinite values; train or "
            "save it again."
        )
    return model


def _why_not_loaded(cfg, error):
    missing = re.search(r"Could not locate (?:class|function) '(.+?)'", str(error))
    if missing:
        return (
            f"--custom_objects must name every custom class of the model. Received: {cfg.model_name}, which needs "
            f"{missing[1]}; add MODULE:{missing[1]}."
        )
    return (
        f"--model_name needs a model that Keras loads in safe mode. Received: {cfg.model_name} "
        f"({type(error).__name__}: {one_line(error)}); save it again with this version of Keras."
    )


def custom_objects(flag: str | None) -> dict:
    """Imports the classes of `--custom_objects MODULE:NAME,...`.

    Modules are found as Python finds them, and in the current folder.

    Returns:
        dict: name -> object.

    Raises:
        UsageError: if the text has another form, or an import fails.
    """
    if flag and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it hides no module
    found = {}
    for entry in flag.split(",") if flag else []:
        module, colon, name = entry.strip().partition(":")
        try:
            if not (module and colon and name):
                raise ValueError("not MODULE:NAME")
            found[name] = getattr(importlib.import_module(module), name)
        except Exception as error:  # a module can raise anything
            raise UsageError(
                f"--custom_objects must list importable classes as MODULE:NAME,.... Received: {entry.strip()!r} "
                f"({type(error).__name__}: {' '.join(str(error).split())}); check the names, and PYTHONPATH."
            ) from error
    return found


def _split(model):
    """Finds the features that a model's classifier gets.

    Args:
        model: keras.Model, functional or Sequential.

    Returns:
        features: KerasTensor. The input of the classifier, or the output of a model
            without one, in the graph of `model`.
        classifier: keras.Layer or None. A Dense layer on vectors, or a convolution of a
            single pixel.
        activations: set of str. Names of the activation functions from the classifier on.
    """
    output = model.outputs[0]
    tensor, activations = output, set()
    while len(output.shape) == 2:
        operation, node_index, _ = tensor._keras_history
        inputs = operation._inbound_nodes[node_index].input_tensors
        if len(inputs) != 1:
            break
        activations |= _activation_names(operation)
        if isinstance(operation, keras.Model):
            inner, classifier, inner_activations = _split(operation)
            if classifier is None:
                break
            features = keras.Model(operation.inputs[0], inner, name=f"{operation.name}_features")(inputs[0])
            return features, classifier, activations | inner_activations
        if _is_classifier(operation, inputs[0]) and activations <= _CLASSIFYING:
            return inputs[0], operation, activations
        if type(operation).__name__ not in _AFTER_THE_CLASSIFIER:
            break
        tensor = inputs[0]
    return output, None, set()


def _activation_names(operation):
    """Returns a set with the name of an operation's activation function, empty if it has none."""
    if type(operation).__name__ == "Softmax":
        return {"softmax"}
    activation = getattr(operation, "activation", None)
    return {getattr(activation, "__name__", str(activation))} if activation is not None else set()


def _is_classifier(operation, features):
    """Returns whether a layer is a Dense layer on vectors, or a convolution of one pixel to one pixel."""
    if type(operation) is keras.layers.Dense:
        return len(features.shape) == 2
    return type(operation) is keras.layers.Conv2D and tuple(features.shape[1:3]) == operation.kernel_size == (1, 1)


def _fits(classifier, activations, num_classes):
    """Returns whether `--keep_head` can keep the classifier, and logs why not."""
    if classifier is None:
        reason = "the model has no classification layer"
    else:
        width = classifier.bias.shape[0] if classifier.use_bias else classifier.kernel.shape[-1]
        if width == num_classes and activations <= {"linear", "softmax"}:
            return True
        reason = f"it has {width} outputs, but the data have {num_classes} classes"
        if width == num_classes:
            reason = f"its activation is {', '.join(sorted(activations))}, not linear or softmax"
    log.warning("--keep_head cannot keep the model's own head: %s. A new head replaces it.", reason)
    return False


def _logits(classifier, features):
    """Returns what the model's own classifier computes from the features, without an activation."""
    classifier.activation = keras.activations.linear
    logits = classifier(features)
    return keras.layers.Flatten(name="logits")(logits) if len(logits.shape) == 4 else logits


def _free_name(name, model):
    """Returns a name like `name` that no layer at any depth of `model` has, so that `models.cut` can take it apart."""
    taken = {layer.name for layer in model._flatten_layers()}
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)


def _check_paths(cfg, backbone):
    """Checks that each weight has a path of its own, by which it is selected and saved."""
    counts = collections.Counter(weight.path for weight in backbone.weights)
    twice = sorted(path for path, count in counts.items() if count > 1)
    taken = sorted(path for path in counts if path.startswith("head/"))
    if twice or taken:
        raise UsageError(
            "--model_name needs weights with unique paths, and none below head/. Received: "
            f"{cfg.model_name}, with {', '.join([*twice, *taken][:3])}; rename these layers."
        )
