"""Which statistics batch normalisation uses while a network trains.

Freezing is done on single variables (`variable.trainable`), never on layers:
Keras ties a layer's `trainable` to its statistics, so freezing a layer would
silently change its mode.
"""

import contextlib

import keras

from models.layers import calls_replaced

# Keras's own default. MobileNetV2's 0.999 is made for ImageNet's many thousand
# steps: in the few hundred of a fine-tuning the moving statistics would stay
# near their initial values, and evaluation would be near chance.
MAX_BATCH_MOMENTUM = 0.99


def resolve(bn_stats, pretrained):
    """Returns ``stored`` or ``batch`` for a `--bn_stats` of auto, stored or batch.

    Args:
        bn_stats: str. The flag.
        pretrained: bool. Whether the network's statistics were learnt.
    """
    if bn_stats == "auto":
        return "stored" if pretrained else "batch"
    return bn_stats


def layers(model):
    """Returns all BatchNormalization layers of `model`, nested ones included."""
    found = []
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            found.append(layer)
        elif isinstance(layer, keras.Model):
            found += layers(layer)
    return found


def use_stored_statistics(model):
    """Lets every BatchNormalization run on its moving statistics and never update them.

    That holds under `fit` too, while gamma and beta can train. The instance's
    `call` is replaced, not the layer: a saved file holds a plain
    BatchNormalization. A copy of the model (`clone_model`, a reloaded file) is
    without it, and whoever wraps `layer.call` has to put the found one back.
    """
    for layer in layers(model):
        layer.call = _with_training(layer.call, False)


def use_batch_statistics(model):
    """Lets every BatchNormalization use and follow the statistics of its batch in training.

    That is Keras's own behaviour for layers that are `trainable`; only a
    momentum too slow for a fine-tuning is lowered.
    """
    for layer in layers(model):
        layer.momentum = min(layer.momentum, MAX_BATCH_MOMENTUM)


MODES = {"stored": use_stored_statistics, "batch": use_batch_statistics}


@contextlib.contextmanager
def statistics_kept(model, bn_stats):
    """Lets passes in inference mode normalise as training does, and update nothing.

    For the length of the context, `model(images, training=False)` has dropout
    off but, where `bn_stats` is ``batch``, the statistics of its batch. Functions
    traced within it keep that.

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


def calibrate(model, images):
    """Sets the moving statistics to those of `images`, whatever mode the layers run in.

    Without that, the activations of random weights shrink or grow from layer to
    layer until rounding decides over their order. Nothing else changes.

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
