"""From a network and images to each layer's distances, in forward passes alone.

Every candidate's output is reduced to the distances between its images the
moment it appears, inside the traced pass, and then let go. The next layer waits
for that, so that no activation lives longer than in plain inference.
"""

import contextlib
import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from core import environment
from models.batchnorm import statistics_kept
from models.layers import calls_replaced
from selection.distances import from_gram, normalised_distances, num_workers, pairwise_distances
from selection.normalisation import normalisations_behind

log = logging.getLogger("adabet")

# Columns that a device other than the CPU turns into double precision at a time.
_DEVICE_BLOCK = 1 << 16


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
    on_cpu = environment.device().startswith("CPU")
    with ThreadPoolExecutor(num_workers()) as pool:
        reduce = _reduction_on_cpu(pool, num_workers()) if on_cpu else _reduction_on_device
        normalisations = normalisations_behind(network) if on_cpu else {}
        if normalisations and not _numpy_sees_tensors():
            log.info(
                "NumPy can't write to this TensorFlow's tensors: normalisations run in TensorFlow, which is slower."
            )
            normalisations = {}
        reduced_pass = tf.function(functools.partial(_reduced_pass, network, normalisations, reduce), jit_compile=False)
        make_room = functools.cache(functools.partial(_make_room, network))

        def distances(images):
            if on_cpu:
                make_room(len(images))
            matrices = [matrix.numpy() for matrix in reduced_pass(images)]
            return matrices if on_cpu else [from_gram(matrix) for matrix in matrices]

        yield distances


def _make_room(network, num_images):
    """Has the CPU's allocator get one region in which the largest activation and its successor fit.

    They would have regions of their own otherwise, beside those of the smaller
    ones before them: memory that the process has touched and the pass can't use.
    Pages count once they are written to, which nobody does here.
    """
    sizes = [
        candidate.activation_size * tf.as_dtype(candidate.layer.compute_dtype).size for candidate in network.candidates
    ]
    tf.raw_ops.Empty(shape=[2, num_images, max(sizes)], dtype=tf.uint8, init=False)


def _reduced_pass(network, normalisations, reduce, images):
    """Runs the network; returns each candidate's distances, in forward order."""
    reduced = {}  # path -> distances; a layer that the pass meets twice counts at its first meeting

    def reducing(layer, call):
        def call_and_reduce(*args, **kwargs):
            # Branches one after the other, so that their activations don't meet.
            with tf.control_dependencies(list(reduced.values())[-1:]):
                output = call(*args, **kwargs)
            normalisation = normalisations.get(layer.path)
            if layer.path in reduced and normalisation is None:
                return output
            matrices, output = reduce(output, normalisation)
            paths = [layer.path] if normalisation is None else [layer.path, normalisation.layer.path]
            for path, matrix in zip(paths, matrices, strict=True):
                reduced.setdefault(path, matrix)
            return output

        return call_and_reduce

    done_before = [
        layer for found in normalisations.values() for layer in (found.layer, found.clipping) if layer is not None
    ]
    layers = [candidate.layer for candidate in network.candidates if candidate.layer not in done_before]
    with (
        statistics_kept(network.model, network.bn_stats),
        calls_replaced(layers, reducing),
        calls_replaced(done_before, lambda layer, call: lambda inputs, *args, **kwargs: inputs),
    ):
        network.model(images, training=False)
    return [reduced[candidate.path] for candidate in network.candidates]


def _reduction_on_cpu(pool, workers):
    """Returns a function (output, normalisation or None) -> (its distances, what the pass goes on with).

    With a normalisation there are two distances, before and after it, and what
    the pass goes on with is normalised and clipped.
    """

    def reduce(output, normalisation):
        def in_numpy(activation, *scale_and_shift):
            cloud = activation.reshape(len(activation), -1)
            if normalisation is None:
                return pairwise_distances(cloud.astype(np.float32, copy=False), pool, workers)
            return normalised_distances(cloud, *scale_and_shift, normalisation.bounds, pool, workers)

        if normalisation is None:
            matrices = tf.numpy_function(in_numpy, [output], [tf.float64])
        else:
            matrices = tf.numpy_function(in_numpy, [output, *normalisation.scale_and_shift(output)], [tf.float64] * 2)
        with tf.control_dependencies(matrices):
            return matrices, tf.identity(output)

    return reduce


def _numpy_sees_tensors():
    """Returns whether what NumPy writes to a tensor that it is given is in that tensor.

    It always was on CPUs, but nobody promises it.
    """

    def write(array):
        if array.flags.writeable:
            array[:] = 1
        return np.float32(1)

    @tf.function
    def written(tensor):
        tensor = tensor + 1
        with tf.control_dependencies([tf.numpy_function(write, [tensor], tf.float32)]):
            return tf.identity(tensor)

    return bool(tf.reduce_all(written(tf.ones(64)) == 1))


def _reduction_on_device(output, _):
    gram = _gram_on_device(tf.cast(tf.reshape(output, (tf.shape(output)[0], -1)), tf.float32))
    with tf.control_dependencies([gram]):
        return [gram], tf.identity(output)


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
