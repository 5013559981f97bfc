"""Networks: a backbone, its preprocessing, pretrained weights, and a new head.

The tables here import neither TensorFlow nor Keras, so that flags can be
checked, and `--help` printed, without waiting for them.
"""

import os
from dataclasses import dataclass
from typing import Any

from errors import UsageError


@dataclass(frozen=True)
class Imagenet:
    """Where a backbone's ImageNet weights come from.

    A `url` is a legacy .h5 file without top, kept in Keras's cache; `{size}` in
    it is one of `sizes`. A `preset` is fetched by keras-hub into kagglehub's.
    """

    url: str  # the file, or the host that has to answer for the preset
    md5: str | None = None  # None where Keras publishes none
    sizes: tuple[int, ...] = ()  # pixels that have a file of their own; others take the last
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
            url=_KERAS_FILES
            + "mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_{size}_no_top.h5",
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

# Values of --weights that are no path.
WEIGHTS_KEYWORDS = ("auto", "imagenet", "none")
WEIGHTS_EXTENSIONS = (".keras", ".weights.h5", ".h5")


@dataclass(frozen=True)
class Network:
    """What `build` returns.

    Attributes:
        model: keras.Model. Raw RGB images, float32 in 0..255, of shape
            (B, S, S, 3) to logits, float32 (B, num_classes).
        head: keras.layers.Dense. The new layer, named ``head``.
        weights: dict. Provenance, JSON-ready: `source` (imagenet, file, none),
            `path`, `sha256`, `matched_layers`, `backbone_layers`, `note`.
        bn_stats: str or None. ``stored``, ``batch``, or None where the network
            has no batch normalisation.
        candidates: list of models.layers.Candidate. The layers that can be
            chosen, in forward order, the head among them.
        trainable_weights: list of keras.Variable. All weights that can train,
            those of no candidate too; their paths are unique.
    """

    model: Any
    head: Any
    weights: dict
    bn_stats: str | None
    candidates: list
    trainable_weights: list


def check_input_size(model_name, input_size):
    """Raises UsageError where `model_name` can't take images of `input_size` pixels."""
    row = BACKBONES[model_name]
    if input_size >= row.min_size and input_size % row.size_multiple == 0:
        return
    rule = f"at least {row.min_size}"
    if row.size_multiple > 1:
        rule += f" and a multiple of {row.size_multiple}"
    nearest = max(row.min_size, round(input_size / row.size_multiple) * row.size_multiple)
    raise UsageError(
        f"--input_size must be {rule} for {model_name}; received {input_size}; "
        f"the nearest that works is {nearest}"
    )


def check_weights(weights):
    """Raises UsageError where `--weights` names neither a keyword nor a readable weights file.

    Only the name and the presence of the file are checked; its contents are
    `build`'s business.
    """
    if weights in WEIGHTS_KEYWORDS:
        return
    rule = (
        f"--weights takes {', '.join(WEIGHTS_KEYWORDS)} or the path of a Keras weights file "
        f"({', '.join(WEIGHTS_EXTENSIONS)})"
    )
    if not weights.lower().endswith(WEIGHTS_EXTENSIONS):
        raise UsageError(f"{rule}; received {weights!r}: unknown extension")
    path = os.path.expanduser(weights)
    if not os.path.isfile(path):
        raise UsageError(f"{rule}; received {weights!r}: no such file, check the path")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{rule}; received {weights!r}: no permission to read it")


def build(cfg, num_classes):
    """Builds the network that `cfg` asks for, with its weights loaded.

    Initial weights follow Keras's global seed, which the caller sets.

    Args:
        cfg: config.Config. Reads model_name, input_size, weights, bn_stats and
            dropout.
        num_classes: int. Width of the head.

    Returns:
        A Network.

    Raises:
        errors.UsageError: a size the backbone can't take, or a weights file that
            is missing, damaged, or of another network.
        errors.RunError: `--weights imagenet`, and they can't be had.
    """
    check_input_size(cfg.model_name, cfg.input_size)
    check_weights(cfg.weights)
    from models import backbones  # imports Keras

    return backbones.build_network(cfg, num_classes)
