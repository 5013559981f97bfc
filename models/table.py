"""The networks that `--model_name` knows, as plain data: nothing here imports TensorFlow or Keras.

`BACKBONES` holds the four networks of the paper, `APPLICATIONS` the other classifiers of
keras.applications, and `MODELS` both. Numbers of layers, input sizes, addresses and
checksums are those of Keras 3.15; `tests/test_applications.py` compares them with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

_KERAS_FILES = "https://storage.googleapis.com/tensorflow/keras-applications/"


@dataclass(frozen=True)
class Imagenet:
    """Where a network's ImageNet weights come from.

    A `url` is a legacy .h5 file without top, kept in Keras' cache. `{size}` in it is one
    of `sizes`, and `{alpha}` a text of the model's `alphas`. keras-hub downloads a
    `preset` to the cache of kagglehub.
    """

    url: str  # the file, or the host of the preset
    checksum: str | None = None  # MD5 or SHA-256; None if Keras publishes none
    sizes: tuple[int, ...] = ()  # input sizes with a file of their own; others use the last
    preset: str | None = None


@dataclass(frozen=True)
class Backbone:
    """One row of `MODELS`."""

    help: str
    candidates: int  # layers that can be selected, the head included
    preprocessing: str  # a key of models.backbones.PREPROCESSING
    imagenet: Imagenet
    constructor: str | None = None  # in keras.applications
    min_size: int = 32  # pixels
    size_multiple: int = 1
    pooling: str | None = None  # the constructor's own; None adds global average pooling
    # Width -> (its text in the address of the weights, their checksum).
    alphas: Mapping[float, tuple[str, str | None]] = field(default_factory=dict)


def _family(url: str, preprocessing: str, members: dict, **settings) -> dict[str, Backbone]:
    """Returns the rows of constructors that differ in size only.

    Args:
        url: str. Address of the weights, in full or below Keras' own; `{file}` is a member's.
        preprocessing: str. That of the family's module, or `none` if the network contains it.
        members: dict. Constructor -> (candidate layers, file, checksum).
        settings: further fields of Backbone.
    """
    address = url if url.startswith("https:") else _KERAS_FILES + url
    return {
        constructor.lower(): Backbone(
            help=f"{constructor}, {candidates} layers with head",
            candidates=candidates,
            preprocessing=preprocessing,
            constructor=constructor,
            imagenet=Imagenet(address.replace("{file}", file), checksum),
            **settings,
        )
        for constructor, (candidates, file, checksum) in members.items()
    }


_KERNELS = "{file}_weights_tf_dim_ordering_tf_kernels_notop.h5"

BACKBONES = {
    **_family(
        "resnet/" + _KERNELS, "caffe", members={"ResNet50": (107, "resnet50", "4d473c1dd8becc155b73f8504c6f6626")}
    ),
    **_family("vgg16/" + _KERNELS, "caffe", members={"VGG16": (14, "vgg16", "6d6bbae143d832006294945121d1f1fc")}),
    "mobilenetv2": Backbone(
        help="MobileNetV2 1.00, 105 layers with head",
        candidates=105,
        preprocessing="symmetric",
        constructor="MobileNetV2",
        imagenet=Imagenet(
            url=_KERAS_FILES + "mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{alpha}_{size}_no_top.h5",
            sizes=(96, 128, 160, 192, 224),
        ),
        alphas={alpha: (str(alpha), None) for alpha in (0.35, 0.5, 0.75, 1.0, 1.3, 1.4)},
    ),
    "vit": Backbone(
        help="ViT-B/16, 99 layers with head; input sizes are multiples of 16",
        candidates=99,
        preprocessing="symmetric",
        min_size=16,
        size_multiple=16,
        imagenet=Imagenet(url="https://www.kaggle.com", preset="vit_base_patch16_224_imagenet"),
    ),
}


APPLICATIONS = {
    **_family(
        "convnext/convnext_{file}_notop.h5", "none", pooling="avg", members={
            "ConvNeXtTiny": (100, "tiny", "d547c096cabd03329d7be5562c5e14798aa39ed24b474157cef5e85ab9e49ef1"),
            "ConvNeXtSmall": (190, "small", "6fc8009faa2f00c1c1dfce59feea9b0745eb260a7dd11bee65c8e20843da6eab"),
            "ConvNeXtBase": (190, "base", "40a20c5548a5e9202f69735ecc06c990e6b7c9d2de39f0361e27baeb24cb7c45"),
            "ConvNeXtLarge": (190, "large", "96f02b6f0753d4f543261bc9d09bed650f24dd6bc02ddde3066135b63d23a1cd"),
            "ConvNeXtXLarge": (190, "xlarge", "de3f8a54174130e0cecdc71583354753d557fcf1f4487331558e2a16ba0cfe05"),
        },
    ),
    **_family(
        "densenet/" + _KERNELS, "torch", members={
            "DenseNet121": (242, "densenet121", "30ee3e1110167f948a6b9946edeeb738"),
            "DenseNet169": (338, "densenet169", "b8c4d4c20dd625c148057b9ff1c1176b"),
            "DenseNet201": (402, "densenet201", "c13680b51ded0fb44dff2d8f86ac8bb1"),
        },
    ),
    **_family(
        "https://storage.googleapis.com/keras-applications/efficientnet{file}_notop.h5", "efficientnet", members={
            "EfficientNetB0": (131, "b0", "50bc09e76180e00e4465e1a485ddc09d"),
            "EfficientNetB1": (185, "b1", "74c4e6b3e1f6a1eea24c589628592432"),
            "EfficientNetB2": (185, "b2", "111f8e2ac8aa800a7a99e3239f7bfb39"),
            "EfficientNetB3": (209, "b3", "af6d107764bb5b1abb91932881670226"),
            "EfficientNetB4": (257, "b4", "ebc24e6d6c33eaebbd558eafbeedf1ba"),
            "EfficientNetB5": (311, "b5", "38879255a25d3c92d5e44e04ae6cec6f"),
            "EfficientNetB6": (359, "b6", "9ecce42647a20130c1f39a5d4cb75743"),
            "EfficientNetB7": (437, "b7", "cbcfe4450ddf6f3ad90b1b398090fe4a"),
        },
    ),
    **_family(
        "efficientnet_v2/efficientnetv2-{file}_notop.h5", "none", members={
            "EfficientNetV2B0": (151, "b0", "893217f2bb855e2983157299931e43ff"),
            "EfficientNetV2B1": (185, "b1", "0e80663031ca32d657f9caa404b6ec37"),
            "EfficientNetV2B2": (193, "b2", "1dfe2e7a5d45b6632553a8961ea609eb"),
            "EfficientNetV2B3": (225, "b3", "f6abf7b5849ac99a89b50dd3fd532856"),
            "EfficientNetV2S": (281, "s", "af0682fb74e8c54910f2d4393339c070"),
            "EfficientNetV2M": (403, "m", "1b8dc055df72dde80d614482840fe342"),
            "EfficientNetV2L": (557, "l", "b0b66b5c863aef5b46e8608fe1711615"),
        },
    ),
    **_family(
        "inception_v3/" + _KERNELS, "symmetric", min_size=75, members={
            "InceptionV3": (189, "inception_v3", "bcbd6486424b2319ff4ef7d526e38f63"),
        },
    ),
    **_family(
        "inception_resnet_v2/" + _KERNELS, "symmetric", min_size=75, members={
            "InceptionResNetV2": (449, "inception_resnet_v2", "d19885ff4a710c122648d3b5c3b684e4"),
        },
    ),
    "mobilenet": Backbone(
        help="MobileNet 1.00, 55 layers with head",
        candidates=55,
        preprocessing="symmetric",
        constructor="MobileNet",
        imagenet=Imagenet(_KERAS_FILES + "mobilenet/mobilenet_{alpha}_{size}_tf_no_top.h5", sizes=(128, 160, 192, 224)),
        alphas={0.25: ("2_5", None), 0.5: ("5_0", None), 0.75: ("7_5", None), 1.0: ("1_0", None)},
    ),
    **_family(
        "mobilenet_v3/weights_mobilenet_v3_small_224_{alpha}_float_no_top_v2.h5", "none", members={
            "MobileNetV3Small": (87, "", None),
        },
        alphas={0.75: ("0.75", "ebdb5cc8e0b497cd13a7c275d475c819"), 1.0: ("1.0", "d3e8ec802a04aa4fc771ee12a9a9b836")},
    ),
    **_family(
        "mobilenet_v3/weights_mobilenet_v3_large_224_{alpha}_float_no_top_v2.h5", "none", members={
            "MobileNetV3Large": (109, "", None),
        },
        alphas={0.75: ("0.75", "40af19a13ebea4e2ee0c676887f69a2e"), 1.0: ("1.0", "07fb09a5933dd0c8eaafa16978110389")},
    ),
    **_family(
        "nasnet/NASNet-{file}-no-top.h5", "symmetric", members={
            "NASNetMobile": (389, "mobile", "1ed92395b5b598bdda52abe5c0dbfd63"),
            "NASNetLarge": (533, "large", "d81d89dc07e6e56530c4e77faddd61b5"),
        },
    ),
    **_family(
        "resnet/" + _KERNELS, "caffe", members={
            "ResNet101": (209, "resnet101", "88cf7a10940856eca736dc7b7e228a21"),
            "ResNet152": (311, "resnet152", "ee4c566cf9a93f14d82f913c2dc6dd0c"),
        },
    ),
    **_family(
        "resnet/" + _KERNELS, "symmetric", members={
            "ResNet50V2": (103, "resnet50v2", "fac2f116257151a9d068a22e544a4917"),
            "ResNet101V2": (205, "resnet101v2", "c0ed64b8031c3730f411d2eb4eea35b5"),
            "ResNet152V2": (307, "resnet152v2", "ed17cf2e0169df9d443503ef94b23b33"),
        },
    ),
    **_family("vgg19/" + _KERNELS, "caffe", members={"VGG19": (17, "vgg19", "253f8cb515780f3b799900260a226db6")}),
    **_family(
        "xception/" + _KERNELS, "symmetric", min_size=71, members={
            "Xception": (81, "xception", "b0042744bf5b25fce3cb969f33bebb97"),
        },
    ),
}  # fmt: skip

MODELS = {**BACKBONES, **APPLICATIONS}

# Values of --preprocessing, for a model file; keys of models.backbones.PREPROCESSING.
FILE_PREPROCESSING = ("none", "unit", "symmetric", "caffe", "torch")
