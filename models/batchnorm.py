"""Which statistics batch normalization uses while a network trains.

Freezing is done on single variables (`variable.trainable`), never on layers: Keras ties
a layer's `trainable` to the use of its statistics, so freezing a layer would
silently change its mode.
"""

import contextlib
from collections.abc import Iterator

import keras

from models.layers import calls_replaced

# Keras' default. MobileNetV2's 0.999 is made for ImageNet's many thousand steps: in the
# few hundred steps of a fine-tuning the moving statistics would stay near their initial
# values, and evaluation near chance.
MAX_BATCH_MOMENTUM = 0.99


def resolve(bn_stats: str, pretrained: bool) -> str:
    """Returns `stored` or `batch` for a `--bn_stats` of auto, stored or batch.

    Args:
        bn_stats: str. The flag.
        pretrained: bool. Whether the network's statistics were learned.
    """
    if bn_stats == "auto":
        return "stored" if pretrained else "batch"
    return bn_stats


def layers(model: keras.Model) -> list:
    """Returns all BatchNormalization layers of `model`, those inside other layers and models included."""
    inside = model._flatten_layers(include_self=False)
    return [layer for layer in inside if isinstance(layer, keras.layers.BatchNormalization)]


def use_stored_statistics(model: keras.Model) -> None:
    """Makes every BatchNormalization use its moving statistics and never update them.

    This holds under `fit` too, while gamma and beta can train. The `call` of the
    instance is replaced, not the layer: a saved file holds a plain BatchNormalization. A
    copy of the model (`clone_model`, a file that is loaded again) does not have the
    replacement. Code that wraps `layer.call` must restore the one that it found.
    """
    for layer in layers(model):
        layer.call = _with_training(layer.call, False)


def use_batch_statistics(model: keras.Model) -> None:
    """Makes every BatchNormalization use and track the statistics of its batch in training.

    This is Keras' own behaviour for trainable layers. Only a momentum that is too slow
    for a fine-tuning is lowered.
    """
    for layer in layers(model):
        layer.momentum = min(layer.momentum, MAX_BATCH_MOMENTUM)


MODES = {"stored": use_stored_statistics, "batch": use_batch_statistics}


@contextlib.contextmanager
def statistics_kept(model: keras.Model, bn_stats: str | None) -> Iterator[None]:
    """Makes passes in inference mode normalize as training does, without updating anything.

    Within the context, `model(images, training=False)` has dropout off and, if
    `bn_stats` is `batch`, uses the statistics of its batch. Functions that are traced
    within it keep that.

    Args:
        model: keras.Model.
        bn_stats: str or None, as in `models.Network`.
    """
    changed = layers(model) if bn_stats == "batch" else []
    momenta = [layer.momentum for layer in changed]
    try:
        for layer in changed:
            layer.momentum = 1.0  # moving statistics are assigned their own values
        with calls_replaced(changed, lambda layer, call: _with_training(call, True)):
            yield
    finally:
        for layer, momentum in zip(changed, momenta, strict=True):
            layer.momentum = momentum


def calibrate(model: keras.Model, images) -> None:
    """Sets the moving statistics to those of `images`, whatever mode the layers run in.

    Otherwise the activations of random weights shrink or grow from layer to layer, until
    rounding determines their order. Nothing else changes.

    Args:
        model: keras.Model.
        images: float32 of shape (B, S, S, 3).
    """
    norms = layers(model)
    momenta = [layer.momentum for layer in norms]
    try:
        for layer in norms:
            layer.momentum = 0.0
        with calls_replaced(norms, lambda layer, call: _with_training(type(layer).call.__get__(layer), True)):
            model(images, training=False)
    finally:
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum


def _with_training(call, value):
    def call_in_fixed_mode(inputs, training=None, mask=None):
        return call(inputs, training=value, mask=mask)

    return call_in_fixed_mode
