"""Builds the known networks: preprocessing, backbone, pooling, head."""

import collections
import contextlib
import math
from collections.abc import Iterator

import keras
from keras.src.backend.common import global_state

import models
from core.config import Config
from models.layers import find_candidates, trainable_weights
from models.table import MODELS

# Of the ImageNet images: the mean in the order blue, green, red, for values in 0..255, and mean
# and standard deviation in the order red, green, blue, for values in 0..1.
_MEAN_BGR = (103.939, 116.779, 123.68)
_MEAN_RGB = (0.485, 0.456, 0.406)
_STD_RGB = (0.229, 0.224, 0.225)


def _rescaled(images, scale, offset):
    return keras.layers.Rescaling(scale, offset, name="preprocessing")(images)


def _efficientnet(images):
    """Completes the normalization inside EfficientNet, which divides by the root of the standard deviation.

    Keras adds the second division only when it loads the ImageNet weights itself:
    https://github.com/tensorflow/tensorflow/issues/49930. This one comes before the
    network's own y -> (y / 255 - mean) / sqrt(std) and gives the same values after it.
    """
    roots = [math.sqrt(std) for std in _STD_RGB]
    offset = [255 * mean * (1 - 1 / root) for mean, root in zip(_MEAN_RGB, roots)]
    return _rescaled(images, [1 / root for root in roots], offset)


# Each takes and returns a tensor (B, S, S, 3). Operations and built-in layers
# only: a saved network has to load without any code of ours.
PREPROCESSING = {
    "none": lambda images: images,
    "unit": lambda images: _rescaled(images, 1 / 255, 0.0),
    "symmetric": lambda images: _rescaled(images, 1 / 127.5, -1.0),  # of ViT, too: (x / 255 - 0.5) / 0.5
    "caffe": lambda images: _rescaled(keras.ops.flip(images, axis=-1), 1.0, [-mean for mean in _MEAN_BGR]),
    "torch": lambda images: _rescaled(
        images, [1 / (255 * std) for std in _STD_RGB], [-mean / std for mean, std in zip(_MEAN_RGB, _STD_RGB)]
    ),
    "efficientnet": _efficientnet,
}

# Of the new head's kernel. The gradients that reach the backbone are proportional to it: with
# Keras's default, the first steps can undo the pretraining (Kumar et al. 2022, arXiv 2202.10054)
# and leave a network that answers the same for every image. Zeros, as BiT and ViT have (arXiv
# 1912.11370, 2010.11929), would give fisher, rgn and ElasticTrainer no gradient to rank by.
HEAD_INITIALIZERS = {
    "small": lambda: keras.initializers.RandomNormal(stddev=1e-3),
    "glorot": keras.initializers.GlorotUniform,
}


def assemble(cfg: Config, num_classes: int):
    """Returns a models.Network without pretrained weights, as `models.assemble` describes it."""
    row = MODELS[cfg.model_name]
    images = keras.Input((cfg.input_size, cfg.input_size, 3), name="images")
    preprocessed = PREPROCESSING[row.preprocessing](images)
    if row.constructor:
        backbone, features = _application_features(row, cfg.model_alpha, preprocessed)
    else:
        backbone, features = _vit_features(preprocessed)
    return with_head(models.short_name(cfg), images, backbone, features, num_classes, cfg)


def with_head(
    name: str, images, backbone: keras.Model, features, num_classes: int, cfg: Config, dropout_name: str = "dropout"
):
    """Returns the models.Network of a backbone under a new head.

    Args:
        name: str. The name of the Keras model.
        images: KerasTensor of shape (B, S, S, 3), the input.
        backbone: keras.Model.
        features: KerasTensor of shape (B, C), computed from `images`.
        num_classes: int. Width of the head.
        cfg: Config. Reads dropout, the rate before the head, and head_init.
        dropout_name: str. Name of the dropout layer.
    """
    features = keras.layers.Dropout(cfg.dropout, name=dropout_name)(features)
    head = keras.layers.Dense(num_classes, kernel_initializer=HEAD_INITIALIZERS[cfg.head_init](), name="head")
    return network_of(keras.Model(images, head(features), name=name), head, backbone)


def network_of(model: keras.Model, head: keras.Layer, backbone: keras.Model):
    """Returns the models.Network of a model and its parts."""
    return models.Network(model, head, find_candidates(model), trainable_weights(model), backbone)


def _application_features(row, alpha, preprocessed):
    """Returns a network of keras.applications, a keras.Model, and its features (B, C).

    The preprocessed tensor is its input, so the layers are added to our graph one by
    one: `model.layers` lists them all, and any of their outputs can be an output of a
    user's own model.
    """
    arguments = {} if alpha is None else {"alpha": alpha}
    with _names_from_the_start():
        backbone = getattr(keras.applications, row.constructor)(
            include_top=False,
            weights=None,
            input_tensor=preprocessed,
            input_shape=tuple(preprocessed.shape[1:]),
            pooling=row.pooling,
            **arguments,
        )
    return backbone, pooled(backbone.output)


def pooled(features):
    """Returns a tensor (B, C): global averages of maps (B, H, W, C), vectors as they are."""
    return keras.layers.GlobalAveragePooling2D(name="pool")(features) if len(features.shape) == 4 else features


def _vit_features(preprocessed):
    import keras_hub  # takes seconds

    from models.vit import HYPERPARAMETERS

    shape = tuple(preprocessed.shape[1:])
    backbone = keras_hub.models.ViTBackbone(image_shape=shape, name="backbone", **HYPERPARAMETERS)
    tokens = backbone(preprocessed)  # (B, 1 + patches, hidden)
    return backbone, tokens[:, 0]


@contextlib.contextmanager
def _names_from_the_start() -> Iterator[None]:
    """Numbers the layers that keras.applications leaves unnamed from the start.

    Otherwise their names, and with them the paths in selection.json, would depend on what
    else the process has built.
    """
    key = "object_name_uids"
    before = global_state.get_global_attribute(key) or {}
    inside: dict = collections.defaultdict(int)
    global_state.set_global_attribute(key, inside)
    try:
        yield
    finally:
        both = {name: max(before.get(name, 0), inside.get(name, 0)) for name in {**before, **inside}}
        global_state.set_global_attribute(key, collections.defaultdict(int, both))
