"""A custom layer as a user would write it, in a module of its own."""

import keras


class NormalizedConv(keras.layers.Layer):
    """A convolution, its batch normalization, and a learned scale that the layer itself owns."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.conv = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, name="inner_conv")
        self.norm = keras.layers.BatchNormalization(name="inner_norm")

    def build(self, shape):
        self.conv.build(shape)
        self.norm.build((*shape[:-1], self.filters))
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, inputs, training=None):
        return self.scale * keras.ops.relu(self.norm(self.conv(inputs), training=training))

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}
