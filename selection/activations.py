"""From a network and images to each layer's distances, in forward passes alone.

Every candidate's output is reduced to the distances between its images the
moment it appears, inside the traced pass, and then let go. The next layer waits
for that, so that no activation lives longer than in plain inference.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf

import runtime
from models.batchnorm import statistics_kept
from models.layers import watching
from selection.distances import from_gram, num_workers, pairwise_distances

# Columns that a device other than the CPU turns into double precision at a time.
_DEVICE_BLOCK = 1 << 16


@contextlib.contextmanager
def distance_pass(network):
    """Gives a function from a batch of images to the distances in every candidate's output.

    Dropout and augmentation are off, batch normalisation runs by the network's
    policy, and no weight or statistic changes.

    Args:
        network: models.Network.

    Yields:
        function: float32 images of shape (B, S, S, 3) -> list of float64 arrays
        of shape (B, B), one a candidate, in forward order. It is traced once a
        shape, at its first call.
    """
    workers = num_workers()
    with ThreadPoolExecutor(workers) as pool:
        if runtime.device().startswith("CPU"):
            # Several times faster here than TensorFlow's matrix product, and it sees the
            # activation without a copy.
            def reduce(cloud):
                return tf.numpy_function(
                    lambda points: pairwise_distances(points, pool, workers), [cloud], tf.float64, stateful=False
                )
        else:
            reduce = _gram_on_device

        reduced_pass = tf.function(lambda images: _watched_pass(network, images, reduce), jit_compile=False)

        def distances(images):
            matrices = [matrix.numpy() for matrix in reduced_pass(images)]
            if reduce is _gram_on_device:
                matrices = [from_gram(matrix) for matrix in matrices]
            return matrices

        yield distances


def _watched_pass(network, images, reduce):
    reduced = {}

    def observe(layer, output):
        if layer.path in reduced:  # a layer that the pass meets twice counts at its first meeting
            return output
        cloud = tf.cast(tf.reshape(output, (tf.shape(output)[0], -1)), tf.float32)
        reduced[layer.path] = matrix = reduce(cloud)
        with tf.control_dependencies([matrix]):
            return tf.identity(output)

    with statistics_kept(network.model, network.bn_stats), watching([c.layer for c in network.candidates], observe):
        network.model(images, training=False)
    return [reduced[candidate.path] for candidate in network.candidates]


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
