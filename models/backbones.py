"""Builds the networks: preprocessing, backbone, pooling, head."""

import keras

from models import BACKBONES, Network
from models.layers import find_candidates

# Mean of the ImageNet images, in the order blue, green, red.
_IMAGENET_MEAN_BGR = (103.939, 116.779, 123.68)


def _caffe(images):
    """RGB to BGR, minus the mean, unscaled."""
    bgr = keras.ops.flip(images, axis=-1)
    offset = [-mean for mean in _IMAGENET_MEAN_BGR]
    return keras.layers.Rescaling(1.0, offset, name="preprocessing")(bgr)


def _symmetric(images):
    """0..255 to -1..1; what ViT writes as (x / 255 - 0.5) / 0.5 is the same."""
    return keras.layers.Rescaling(1 / 127.5, -1.0, name="preprocessing")(images)


# Each takes and returns a tensor (B, S, S, 3). Operations and built-in layers
# only: a saved network has to load without any code of ours.
PREPROCESSING = {"caffe": _caffe, "symmetric": _symmetric}


def assemble(cfg, num_classes):
    """Builds a Network without pretrained weights; see `models.assemble`."""
    images = keras.Input((cfg.input_size, cfg.input_size, 3), name="images")
    preprocessed = PREPROCESSING[BACKBONES[cfg.model_name].preprocessing](images)
    backbone, features = _FEATURES[cfg.model_name](preprocessed)
    features = keras.layers.Dropout(cfg.dropout, name="dropout")(features)  # (B, C)
    head = keras.layers.Dense(num_classes, name="head")
    model = keras.Model(images, head(features), name=cfg.model_name)
    return Network(
        model=model,
        head=head,
        candidates=find_candidates(model),
        trainable_weights=list(model.trainable_weights),
        backbone=backbone,
    )


def _cnn_features(application):
    """Returns a builder around one constructor of keras.applications.

    Given the preprocessed tensor as its input, it adds its layers to our graph
    one by one, so that `model.layers` lists them all and any of their outputs
    can be an output of a user's own model.
    """

    def features(preprocessed):
        backbone = application(
            include_top=False, weights=None, input_tensor=preprocessed, input_shape=tuple(preprocessed.shape[1:])
        )
        pooled = keras.layers.GlobalAveragePooling2D(name="pool")(backbone.output)
        return backbone, pooled

    return features


def _vit_features(preprocessed):
    from models import vit  # imports keras-hub, which takes seconds

    backbone = vit.make_backbone(preprocessed.shape[1])
    tokens = backbone(preprocessed)  # (B, 1 + patches, hidden)
    return backbone, tokens[:, 0]


# Each takes a tensor (B, S, S, 3) and returns the backbone, a keras.Model, and
# its features (B, C).
_FEATURES = {
    "resnet50": _cnn_features(keras.applications.ResNet50),
    "vgg16": _cnn_features(keras.applications.VGG16),
    "mobilenetv2": _cnn_features(keras.applications.MobileNetV2),
    "vit": _vit_features,
}
