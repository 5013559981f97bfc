"""From a network and images to each layer's distances, in forward passes alone.

Every candidate's output is reduced to the distances between its images the
moment it appears, inside the traced pass, and then let go. The next layer waits
for that, so that no activation lives longer than in plain inference.
"""

import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

import runtime
from models.batchnorm import statistics_kept
from models.layers import watching
from selection.distances import (
    from_gram,
    normalised_noise,
    num_workers,
    pairwise_distances,
    settled,
    sums_of_squares,
)

# Columns that a device other than the CPU turns into double precision at a time.
_DEVICE_BLOCK = 1 << 16

# Channels have to come in multiples of this for their weights to fit SIMD lanes.
_CHANNELS = 4


@dataclass(frozen=True)
class Normalisation:
    """What a BatchNormalization does by its stored statistics, y = scale * (x - mean) + beta.

    Attributes:
        squared_scales: float32 array of shape (C,).
        shift: float. Euclidean norm of scale * mean over the channels.
        offset: float. The same of beta.
    """

    squared_scales: np.ndarray
    shift: float
    offset: float


@contextlib.contextmanager
def distance_pass(network):
    """Gives a function from a batch of images to the distances in every candidate's output.

    Dropout and augmentation are off, batch normalisation runs by the network's
    policy, and no weight or statistic changes.

    Args:
        network: models.Network. Its weights have to stay as they are while the
            context lasts.

    Yields:
        function: float32 images of shape (B, S, S, 3) -> list of float64 arrays
        of shape (B, B), one a candidate, in forward order. It is traced once a
        shape, at its first call.
    """
    on_cpu = runtime.device().startswith("CPU")
    with ThreadPoolExecutor(num_workers()) as pool:
        # On a CPU NumPy sees the activation without a copy.
        reduce = _reduction(_normalisations(network), pool, num_workers()) if on_cpu else _reduction_on_device
        reduced_pass = tf.function(lambda images: _watched_pass(network, images, reduce), jit_compile=False)

        def distances(images):
            matrices = [matrix.numpy() for matrix in reduced_pass(images)]
            return matrices if on_cpu else [from_gram(matrix) for matrix in matrices]

        yield distances


def _watched_pass(network, images, reduce):
    reduced = {}

    def observe(layer, output):
        if layer.path in reduced:  # a layer that the pass meets twice counts at its first meeting
            return output
        reduced[layer.path] = matrix = reduce(layer, output)
        with tf.control_dependencies([matrix]):
            return tf.identity(output)

    with statistics_kept(network.model, network.bn_stats), watching([c.layer for c in network.candidates], observe):
        network.model(images, training=False)
    return [reduced[candidate.path] for candidate in network.candidates]


def _normalisations(network):
    """Finds the candidates whose output goes to a BatchNormalization that only scales and shifts it.

    Returns:
        dict from such a candidate's path to (the BatchNormalization's path, its
        Normalisation).
    """
    if network.bn_stats != "stored":  # by the batch's statistics the scales are not known beforehand
        return {}
    # Keras's symbolic tensors tell who feeds whom; a layer called twice, or
    # outside of a functional model, has no one `output`, and is left out.
    feeds = {
        id(candidate.layer.output): candidate.path
        for candidate in network.candidates
        if len(candidate.layer._inbound_nodes) == 1
    }
    found = {}
    for candidate in network.candidates:
        layer = candidate.layer
        if not isinstance(layer, keras.layers.BatchNormalization) or len(layer._inbound_nodes) != 1:
            continue
        fed_by = feeds.get(id(layer.input))
        by_channel = layer.axis in (-1, len(layer.input.shape) - 1) and layer.input.shape[-1] % _CHANNELS == 0
        if fed_by and by_channel:
            found[fed_by] = (candidate.path, _normalisation(layer))
    return found


def _normalisation(layer):
    mean = np.asarray(layer.moving_mean, np.float64)
    scale = 1 / np.sqrt(np.asarray(layer.moving_variance, np.float64) + layer.epsilon)
    if layer.scale:
        scale = scale * np.asarray(layer.gamma, np.float64)
    beta = np.asarray(layer.beta, np.float64) if layer.center else np.zeros_like(mean)
    return Normalisation((scale * scale).astype(np.float32), math.hypot(*(scale * mean)), math.hypot(*beta))


def _reduction(normalisations, pool, workers):
    """Returns a function (layer, output) -> distances, to be called in the order of a pass.

    Where a normalisation follows a layer, reading the layer's output gives both
    their sums, and the normalisation's output is read where it is in doubt only.
    """
    sums_of_input = {}  # path of a normalisation -> (its Normalisation, sums over its input weighted by it)

    def reduce(layer, output):
        if layer.path in sums_of_input:
            normalisation, weighted = sums_of_input.pop(layer.path)

            def settle(weighted, activation):
                cloud = _cloud(activation)
                positions = cloud.shape[1] // len(normalisation.squared_scales)
                noise = normalised_noise(weighted, normalisation.shift, normalisation.offset, positions)
                return settled(cloud, weighted, noise, pool, workers)

            return tf.numpy_function(settle, [weighted, output], tf.float64, stateful=False)

        if layer.path in normalisations:
            following, normalisation = normalisations[layer.path]

            def sum_both(activation):
                cloud = _cloud(activation)
                sums = sums_of_squares(cloud, normalisation.squared_scales, pool, workers)
                return settled(cloud, sums.plain, None, pool, workers), sums.weighted

            distances, weighted = tf.numpy_function(sum_both, [output], [tf.float64] * 2, stateful=False)
            sums_of_input[following] = (normalisation, weighted)
            return distances

        return tf.numpy_function(
            lambda activation: pairwise_distances(_cloud(activation), pool, workers), [output], tf.float64, stateful=False
        )

    return reduce


def _cloud(activation):
    """Returns an activation of shape (B, ...) as float32 points of shape (B, d)."""
    return activation.reshape(len(activation), -1).astype(np.float32, copy=False)


def _reduction_on_device(layer, output):
    return _gram_on_device(tf.cast(tf.reshape(output, (tf.shape(output)[0], -1)), tf.float32))


def _gram_on_device(cloud):
    """Returns the float64 Gram matrix, shape (B, B), of a cloud (B, d) shifted to its first point."""
    num_points = tf.shape(cloud)[0]
    dimension = tf.shape(cloud)[1]

    def add_block(start, gram):
        block = tf.cast(cloud[:, start : start + _DEVICE_BLOCK], tf.float64)
        block -= block[:1]
        return start + _DEVICE_BLOCK, gram + tf.matmul(block, block, transpose_b=True)

    _, gram = tf.while_loop(
        lambda start, gram: start < dimension,
        add_block,
        (0, tf.zeros((num_points, num_points), tf.float64)),
        parallel_iterations=1,
    )
    return gram
