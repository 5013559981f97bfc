"""From a network and images to the distances in each layer's output, by forward passes alone.

Each candidate's output is reduced to the distances between its images as soon as it
appears in the traced pass, and is then released. The next layer waits for that, so
that no activation lives longer than in plain inference.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from core import environment
from models.batchnorm import statistics_kept
from models.layers import calls_replaced
from selection.distances import from_gram, pairwise_distances

_DEVICE_COLUMNS = 1 << 16  # columns that a GPU turns into float64 at a time


@contextlib.contextmanager
def distance_pass(network) -> Iterator[Callable]:
    """Provides a function from a batch of images to the distances in every candidate's output.

    Dropout and augmentation are off, batch normalization runs by the network's policy,
    and no weight or statistic changes.

    On a CPU, distances are sums of squared differences (`pairwise_distances`). On
    another device they come from a Gram matrix in float64, of the cloud shifted to its
    first point: the last digits can differ there.

    Args:
        network: models.Network.

    Yields:
        function: float32 images of shape (B, S, S, 3) -> list of float64 arrays of
        shape (B, B), one per candidate, in forward order. It is traced once per shape,
        at its first call.
    """
    on_cpu = environment.device().startswith("CPU")
    with ThreadPoolExecutor(environment.num_workers()) as pool:

        def distances_in_numpy(output):
            cloud = output.reshape(len(output), -1).astype(np.float32, copy=False)
            return pairwise_distances(cloud, pool)

        def reduce_on_cpu(output):
            return tf.numpy_function(distances_in_numpy, [output], tf.float64)

        reduce = reduce_on_cpu if on_cpu else _gram_on_device
        reduced_pass = tf.function(lambda images: _reduced_pass(network, reduce, images), jit_compile=False)

        def distances(images):
            matrices = [matrix.numpy() for matrix in reduced_pass(images)]
            return matrices if on_cpu else [from_gram(matrix) for matrix in matrices]

        yield distances


def _reduced_pass(network, reduce, images):
    """Runs the network and returns what `reduce` makes of each candidate's output, in forward order."""
    reduced: dict = {}  # by path; a layer called twice is counted at its first call

    def reducing(layer, call):
        def call_and_reduce(*args, **kwargs):
            # Branches run one after the other, so that their activations do not add up.
            with tf.control_dependencies(list(reduced.values())[-1:]):
                output = call(*args, **kwargs)
            if layer.path in reduced:
                return output
            reduced[layer.path] = reduce(output)
            with tf.control_dependencies([reduced[layer.path]]):
                return tf.identity(output)

        return call_and_reduce

    layers = [candidate.layer for candidate in network.candidates]
    with statistics_kept(network.model, network.bn_stats), calls_replaced(layers, reducing):
        network.model(images, training=False)
    return [reduced[candidate.path] for candidate in network.candidates]


def _gram_on_device(output):
    """Returns the float64 Gram matrix, shape (B, B), of an output's point cloud shifted to its first point."""
    cloud = tf.cast(tf.reshape(output, (tf.shape(output)[0], -1)), tf.float32)
    num_points, num_columns = tf.shape(cloud)[0], tf.shape(cloud)[1]

    def add_columns(start, gram):
        columns = tf.cast(cloud[:, start : start + _DEVICE_COLUMNS], tf.float64)
        columns -= columns[:1]
        return start + _DEVICE_COLUMNS, gram + tf.matmul(columns, columns, transpose_b=True)

    _, gram = tf.while_loop(
        lambda start, gram: start < num_columns,
        add_columns,
        (0, tf.zeros((num_points, num_points), tf.float64)),
        parallel_iterations=1,
    )
    return gram
