"""Networks: a backbone, its preprocessing, pretrained weights, and a new head.

`--model_name` is a row of `table.MODELS`, or the path of a .keras file. Flags are checked,
and `--help` is printed, without TensorFlow and Keras.
"""

import collections
import difflib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.config import Config
from core.errors import RunError, UsageError
from models import keras_file
from models.freezing import freeze
from models.table import BACKBONES, MODELS

__all__ = [
    "BACKBONES", "MODELS", "Network", "assemble", "build", "check_flags",
    "check_input_size", "check_weights", "default_input_size", "files_to_fetch", "freeze", "known_name", "load_weights",
    "models_table", "prepare", "short_name", "wrap",
]  # fmt: skip

# Values of --weights that are not a path.
WEIGHTS_KEYWORDS = ("auto", "imagenet", "none")
WEIGHTS_EXTENSIONS = (".keras", ".weights.h5", ".h5")


@dataclass(frozen=True)
class Network:
    """A network with its candidate layers and weights.

    Attributes:
        model: keras.Model. Raw RGB images, float32 in 0..255, of shape
            (B, S, S, 3) to logits, float32 (B, num_classes).
        head: keras.Layer or None. The layer that computes the logits: a new Dense named
            `head`, or that of a model file with `--keep_head`. It always trains. A model
            from Python may have none.
        candidates: list of models.layers.Candidate. The layers that can be selected, in
            forward order, the head included.
        trainable_weights: list of keras.Variable. All weights that can train, those of
            no candidate included. Their paths are unique.
        backbone: keras.Model. The network without head, with the same layers.
        provenance: dict. Where the weights come from, JSON-ready: `source` (imagenet, file, none),
            `path`, `sha256`, `matched_layers`, `backbone_layers`, `note`.
        bn_stats: str or None. `stored`, `batch`, or None if the network has no batch
            normalization.
    """

    model: Any
    head: Any
    candidates: list
    trainable_weights: list
    backbone: Any = None
    provenance: dict | None = None
    bn_stats: str | None = None


def known_name(model_name: str) -> str:
    """Returns a `--model_name` that is a row of `MODELS` or the path of a .keras file.

    Raises:
        ValueError: if it is neither. The message has the closest known names.
    """
    if model_name in MODELS or keras_file.is_path(model_name):
        return model_name
    closest = difflib.get_close_matches(model_name.lower(), MODELS, cutoff=0.5)
    advice = f"the closest: {', '.join(closest)}; --list_models prints all" if closest else "--list_models prints them"
    raise ValueError(
        f"must be a known name or the path of a Keras model file (.keras). Received: {model_name!r}; {advice}"
    )


def short_name(cfg: Config) -> str:
    """Returns the network's name in names of runs and models: its own, or its file's, and a width other than 1."""
    name = cfg.model_name
    if keras_file.is_path(name):
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(name).stem).lstrip(".-")[:60] or "model"
    return f"{name}_alpha{cfg.model_alpha:g}" if cfg.model_alpha not in (None, 1.0) else name


def models_table() -> str:
    """Returns the names of `MODELS` as text, with candidate layers, minimum input size and widths."""
    lines = [f"{'--model_name':<20} {'layers':>6} {'min size':>10}  notes"]
    for name, row in MODELS.items():
        notes = [f"--model_alpha {', '.join(f'{alpha:g}' for alpha in row.alphas)}"] if row.alphas else []
        if row.size_multiple > 1:
            notes.append(f"sizes are multiples of {row.size_multiple}")
        lines.append(f"{name:<20} {row.candidates:>6} {row.min_size:>10}  {'; '.join(notes)}".rstrip())
    return "\n".join([*lines, "PATH.keras: a functional or Sequential model of your own, from RGB images"])


def default_input_size(model_name: str, of_data: int) -> int:
    """Returns the default of `--input_size`: the size that a model file fixes, or else the data set's.

    Args:
        model_name: str. A valid one.
        of_data: int. Pixels, the data set's default. A network with a greater minimum takes that.

    Raises:
        UsageError: if `model_name` is a file that is not a valid model.
    """
    if keras_file.is_path(model_name):
        return keras_file.check(model_name) or of_data
    return max(of_data, MODELS[model_name].min_size)


def check_flags(cfg: Config) -> None:
    """Checks the flags of the network against each other, without Keras.

    Raises:
        UsageError: if a flag does not belong to `--model_name`, or has an invalid value.
    """
    if keras_file.is_path(cfg.model_name):
        if cfg.model_alpha is not None:
            raise UsageError(
                f"--model_alpha sets the width of a MobileNet. Received: --model_name {cfg.model_name}; leave it out."
            )
        if cfg.weights == "imagenet":
            raise UsageError(
                f"--weights imagenet needs a known --model_name. Received: {cfg.model_name}; leave --weights out to "
                "use the file's own weights."
            )
    else:
        given = [name for name in _OF_FILES if getattr(cfg, name)]
        if given:
            raise UsageError(
                f"--{given[0]} needs --model_name PATH.keras. Received: --model_name {cfg.model_name}; leave it out."
            )
        widths = MODELS[cfg.model_name].alphas
        if cfg.model_alpha is not None and cfg.model_alpha not in widths:
            rule = f"must be one of {', '.join(f'{alpha:g}' for alpha in widths)}" if widths else "needs a MobileNet"
            raise UsageError(
                f"--model_alpha {rule}. Received: {cfg.model_alpha:g} for {cfg.model_name}; "
                f"{'choose one of these' if widths else 'leave it out'}."
            )
    check_input_size(cfg.model_name, cfg.input_size)
    check_weights(cfg.weights)


_OF_FILES = ("custom_objects", "keep_head", "preprocessing")  # flags that only a model file reads


def check_input_size(model_name: str, input_size: int) -> None:
    """Raises UsageError if `model_name` cannot process images of `input_size` pixels."""
    if keras_file.is_path(model_name):
        fixed = keras_file.check(model_name)
        if fixed not in (None, input_size):
            raise UsageError(
                f"--input_size must be the {fixed} pixels that the model fixes. Received: {input_size} for "
                f"{model_name}; leave it out."
            )
        return
    row = MODELS[model_name]
    if input_size >= row.min_size and input_size % row.size_multiple == 0:
        return
    rule = f"at least {row.min_size}"
    if row.size_multiple > 1:
        rule += f" and a multiple of {row.size_multiple}"
    nearest = max(row.min_size, round(input_size / row.size_multiple) * row.size_multiple)
    raise UsageError(
        f"--input_size must be {rule} for {model_name}. Received: {input_size}; the nearest valid size is {nearest}."
    )


def check_weights(weights: str) -> None:
    """Raises UsageError if `--weights` is neither a keyword nor a readable weights file.

    `load_weights` checks whether the file's layers fit the network.
    """
    if weights in WEIGHTS_KEYWORDS:
        return
    rule = (
        f"--weights takes {', '.join(WEIGHTS_KEYWORDS)} or the path of a Keras weights file "
        f"({', '.join(WEIGHTS_EXTENSIONS)})"
    )
    if not weights.lower().endswith(WEIGHTS_EXTENSIONS):
        raise UsageError(f"{rule}. Received: {weights!r}, with another extension.")
    path = os.path.expanduser(weights)
    if not os.path.isfile(path):
        raise UsageError(f"{rule}. Received: {weights!r}; there is no such file, check the path.")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{rule}. Received: {weights!r}; change its permissions.")
    from models import weight_files  # imports h5py

    with weight_files.open_layers(path):
        pass  # finds a damaged file before a data set is downloaded


def assemble(cfg: Config, num_classes: int) -> Network:
    """Builds the network of `cfg`, with random weights that depend on Keras' global seed, or a model file's own.

    Args:
        cfg: Config. Reads the flags of the network.
        num_classes: int. Width of the head.

    Returns:
        Network whose `provenance` and `bn_stats` are None.

    Raises:
        UsageError: if the network cannot process the input size, or a model file is unsuitable.
    """
    check_input_size(cfg.model_name, cfg.input_size)
    from models import backbones, own_model  # import Keras

    return (own_model if keras_file.is_path(cfg.model_name) else backbones).assemble(cfg, num_classes)


def load_weights(network: Network, cfg: Config) -> Network:
    """Loads the backbone's weights and sets the mode of batch normalization.

    Args:
        network: Network, from `assemble`.
        cfg: Config. Reads model_name, input_size, weights and bn_stats.

    Returns:
        Network with its `provenance` and `bn_stats`.

    Raises:
        UsageError: if the weights file is missing, damaged, or of another network.
        RunError: if ImageNet weights are required and unavailable.
    """
    check_weights(cfg.weights)
    from models import batchnorm, weights  # import Keras

    provenance = weights.load(network.backbone, cfg)
    bn_stats = None
    if batchnorm.layers(network.model):
        bn_stats = batchnorm.resolve(cfg.bn_stats, pretrained=provenance["source"] != "none")
        batchnorm.MODES[bn_stats](network.model)
    return replace(network, provenance=provenance, bn_stats=bn_stats)


def prepare(cfg: Config) -> str:
    """Downloads the ImageNet weights of `cfg` if they are not in the cache.

    Returns:
        str. The path of their file.

    Raises:
        RunError: if they are unavailable.
    """
    if keras_file.is_path(cfg.model_name):
        return cfg.model_name
    from models import imagenet  # imports Keras

    source = imagenet.source_of(cfg)
    try:
        return imagenet.fetch_preset(source)[1] if source.preset else imagenet.fetch_file(source, cfg.input_size)
    except imagenet.Unavailable as error:
        raise RunError(f"the ImageNet weights of {cfg.model_name} are unavailable: {error}") from error


def files_to_fetch(cfg: Config) -> list:
    """Returns [(url, path)] of the files that `prepare` downloads, and where each can be saved by hand."""
    if keras_file.is_path(cfg.model_name):
        return []
    from models import imagenet

    return imagenet.files_to_fetch(imagenet.source_of(cfg), cfg.input_size)


def wrap(model: Any, inputs: Any, head: Any, bn_stats: str) -> Network:
    """Returns the Network of any Keras model.

    Args:
        model: keras.Model. It is built if it is not yet.
        inputs: array or tensor of shape (B, ...), or the structure of them that the model takes.
        head: keras.Layer or None. A candidate layer.
        bn_stats: str. `stored` or `batch`.

    Raises:
        UsageError: if the model has no candidate layer, or not this head, or two weights with
            one path.
    """
    from models.layers import find_candidates, trainable_weights  # imports Keras

    if not model.built:
        model(inputs, training=False)
    candidates, weights = find_candidates(model, inputs), trainable_weights(model)
    if not candidates:
        raise UsageError(
            f"a model needs a layer that can train and computes one output per example. Received: {model.name}, "
            "without one; set `trainable` of its layers to True."
        )
    if head is not None and head.path not in {candidate.path for candidate in candidates}:
        raise UsageError(f"`head` must be a layer that can train. Received: {head.path}; give a layer of the model.")
    path, count = collections.Counter(weight.path for weight in weights).most_common(1)[0]
    if count > 1:
        raise UsageError(f"a model needs weights with unique paths. Received: {count} weights {path}; rename layers.")
    return Network(model, head, candidates, weights, bn_stats=bn_stats)


def build(cfg: Config, num_classes: int) -> Network:
    """Returns the Network of `cfg`, ready to train: `assemble`, then `load_weights`."""
    return load_weights(assemble(cfg, num_classes), cfg)
