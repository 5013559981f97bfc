"""Networks for the tests: small ones, and real ones with sensible statistics."""

import keras
import numpy as np

import models
from core.config import Config
from models.layers import find_candidates


def network_of(model, bn_stats=None):
    """Wraps any model whose last layer is called head as a `models.Network`."""
    return models.Network(
        model=model,
        head=model.get_layer("head"),
        provenance={"source": "none"},
        bn_stats=bn_stats,
        candidates=find_candidates(model),
        trainable_weights=list(model.trainable_weights),
    )


def tiny_model(batch_norm=True, input_size=16, num_classes=10):
    """A residual network in small: a block, a shortcut, a head."""
    images = keras.Input((input_size, input_size, 3))
    x = keras.layers.Rescaling(1 / 127.5, -1)(images)
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", name="stem")(x)
    y = keras.layers.Conv2D(8, 3, padding="same", name="branch")(x)
    if batch_norm:
        y = keras.layers.BatchNormalization(name="branch_bn")(y)
    x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    x = keras.layers.Conv2D(12, 3, strides=2, padding="same", name="deep")(x)
    if batch_norm:
        x = keras.layers.BatchNormalization(name="deep_bn")(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
    x = keras.layers.Dropout(0.2)(x)
    return keras.Model(images, keras.layers.Dense(num_classes, name="head")(x), name="tiny")


def backbone_network(model_name, seed=0, bn_stats="stored", input_size=32):
    """A real backbone with random weights."""
    keras.utils.set_random_seed(seed)
    cfg = Config(model_name=model_name, weights="none", input_size=input_size, bn_stats=bn_stats, head_init="glorot")
    return models.build(cfg, 10)


def small_vit_network(seed=0):
    """ViT-B/16's layers in small: two blocks, 32 wide, patches of 8 pixels."""
    import keras_hub

    keras.utils.set_random_seed(seed)
    images = keras.Input((32, 32, 3))
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3), patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, name="backbone"
    )
    tokens = backbone(keras.layers.Rescaling(1 / 127.5, -1)(images))
    return network_of(keras.Model(images, keras.layers.Dense(10, name="head")(tokens[:, 0])))


def digits_images(num_images, size, seed=0):
    """Real digits, RGB 0..255 float32 of shape (num_images, size, size, 3), and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(len(images))[:num_images]
    grey = images[chosen].reshape(-1, 8, 8, 1) * (255 / 16)
    rgb = keras.ops.image.resize(np.repeat(grey, 3, axis=-1).astype("float32"), (size, size))
    return np.asarray(rgb), labels[chosen]
