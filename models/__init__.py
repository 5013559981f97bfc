"""Networks: a backbone, its preprocessing, pretrained weights, and a new head.

The tables import neither TensorFlow nor Keras, so that flags are checked and `--help` is
printed without them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from core.config import Config
from core.errors import RunError, UsageError


@dataclass(frozen=True)
class Imagenet:
    """Where a backbone's ImageNet weights come from.

    A `url` is a legacy .h5 file without top, kept in Keras' cache; `{size}` in it is one
    of `sizes`. keras-hub downloads a `preset` to the cache of kagglehub.
    """

    url: str  # the file, or the host of the preset
    md5: str | None = None  # None if Keras publishes none
    sizes: tuple[int, ...] = ()  # input sizes with a file of their own; others use the last
    preset: str | None = None


@dataclass(frozen=True)
class Backbone:
    """One row of `BACKBONES`."""

    help: str
    min_size: int  # pixels
    size_multiple: int
    preprocessing: str  # a key of models.backbones.PREPROCESSING
    has_batch_norm: bool
    imagenet: Imagenet


_KERAS_FILES = "https://storage.googleapis.com/tensorflow/keras-applications/"

BACKBONES = {
    "resnet50": Backbone(
        help="ResNet50, 107 layers with head",
        min_size=32,
        size_multiple=1,
        preprocessing="caffe",
        has_batch_norm=True,
        imagenet=Imagenet(
            url=_KERAS_FILES + "resnet/resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
            md5="4d473c1dd8becc155b73f8504c6f6626",
        ),
    ),
    "vgg16": Backbone(
        help="VGG16, 14 layers with head",
        min_size=32,
        size_multiple=1,
        preprocessing="caffe",
        has_batch_norm=False,
        imagenet=Imagenet(
            url=_KERAS_FILES + "vgg16/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
            md5="6d6bbae143d832006294945121d1f1fc",
        ),
    ),
    "mobilenetv2": Backbone(
        help="MobileNetV2 1.00, 105 layers with head",
        min_size=32,
        size_multiple=1,
        preprocessing="symmetric",
        has_batch_norm=True,
        imagenet=Imagenet(
            url=_KERAS_FILES + "mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_{size}_no_top.h5",
            sizes=(96, 128, 160, 192, 224),
        ),
    ),
    "vit": Backbone(
        help="ViT-B/16, 99 layers with head; input sizes are multiples of 16",
        min_size=16,
        size_multiple=16,
        preprocessing="symmetric",
        has_batch_norm=False,
        imagenet=Imagenet(url="https://www.kaggle.com", preset="vit_base_patch16_224_imagenet"),
    ),
}

# Values of --weights that are not a path.
WEIGHTS_KEYWORDS = ("auto", "imagenet", "none")
WEIGHTS_EXTENSIONS = (".keras", ".weights.h5", ".h5")


@dataclass(frozen=True)
class Network:
    """A network with its candidate layers and weights.

    Attributes:
        model: keras.Model. Raw RGB images, float32 in 0..255, of shape
            (B, S, S, 3) to logits, float32 (B, num_classes).
        head: keras.layers.Dense. The new layer, named `head`.
        candidates: list of models.layers.Candidate. The layers that can be selected, in
            forward order, the head included.
        trainable_weights: list of keras.Variable. All weights that can train, those of
            no candidate included. Their paths are unique.
        backbone: keras.Model. The network without preprocessing and head, with the same
            layers.
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


def check_input_size(model_name: str, input_size: int) -> None:
    """Raises UsageError if `model_name` cannot process images of `input_size` pixels."""
    row = BACKBONES[model_name]
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
    """Builds the network of `cfg` with random weights, which depend on Keras' global seed.

    Args:
        cfg: Config. Reads model_name, input_size and dropout.
        num_classes: int. Width of the head.

    Returns:
        Network whose `provenance` and `bn_stats` are None.

    Raises:
        UsageError: if the backbone cannot process the input size.
    """
    check_input_size(cfg.model_name, cfg.input_size)
    from models import backbones  # imports Keras

    return backbones.assemble(cfg, num_classes)


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
    if BACKBONES[cfg.model_name].has_batch_norm:
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
    from models import imagenet  # imports Keras

    source = BACKBONES[cfg.model_name].imagenet
    try:
        return imagenet.fetch_preset(source)[1] if source.preset else imagenet.fetch_file(source, cfg.input_size)
    except imagenet.Unavailable as error:
        raise RunError(f"the ImageNet weights of {cfg.model_name} are unavailable: {error}") from error


def files_to_fetch(cfg: Config) -> list:
    """Returns [(url, path)] of the files that `prepare` downloads, and where each can be saved by hand."""
    from models import imagenet

    return imagenet.files_to_fetch(BACKBONES[cfg.model_name].imagenet, cfg.input_size)


def build(cfg: Config, num_classes: int) -> Network:
    """Returns the Network of `cfg`, ready to train: `assemble`, then `load_weights`."""
    return load_weights(assemble(cfg, num_classes), cfg)
