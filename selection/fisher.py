"""Layers ranked by the Fisher information of their outputs, with labels and gradients.

For a layer with output a on images n with losses L_n, let p = a * dL_n/da, element by
element. There are two scores:

* `fisher`, the baseline published with AdaBet: the mean of p^2 / 2 over all images and
  elements. It divides by the size of the output.
* `fisher_channels` (Theis et al. 2018, arXiv 1801.05787): p is summed over the positions
  of a channel, squared, summed over the channels, averaged over images, and halved. A
  dense layer has one position, a layer of a transformer one per token.

dL_n/da comes from one backward pass of the summed loss. If normalization uses stored
statistics, the images of a batch are independent and the gradients are those of single
images. On batch statistics an image also influences the losses of the others, and that
is included. The published program differentiates the mean loss, which scales all
scores by one constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from tqdm import tqdm

from core.config import Config
from core.errors import RunError
from selection.ranking import Selection, kendall_stability, select_top


def fisher(network, batches: Callable, cfg: Config) -> Selection:
    """Selects by the mean over all elements of (activation * gradient)^2 / 2."""
    return _select(network, batches, cfg, _mean_of_squares)


def fisher_channels(network, batches: Callable, cfg: Config) -> Selection:
    """Selects by the Fisher information of the layer's channels."""
    return _select(network, batches, cfg, _sum_over_channels)


def _select(network, batches, cfg, reduce):
    scores = information(network, batches(cfg.batch_size, cfg.num_betti_batches), cfg.num_betti_batches or 1, reduce)
    return select_top(network, cfg, scores.mean(axis=0).tolist(), stability=kendall_stability(scores))


def _mean_of_squares(product, layer):
    """Returns the mean over all but the first axis of `product` squared: (B, ...) -> (B,)."""
    import tensorflow as tf

    return tf.reduce_mean(product**2, list(range(1, len(product.shape))))


def _sum_over_channels(product, layer):
    """Returns the sum over channels of the squared sum over positions: (B, ...) -> (B,)."""
    import tensorflow as tf

    from models.channels import channel_rank

    rank = len(product.shape)
    positions = list(range(1, rank - channel_rank(layer)))
    per_channel = tf.reduce_sum(product, positions, keepdims=True)
    return tf.reduce_sum(per_channel**2, list(range(1, rank)))


def information(network, batches: Iterable, num_batches: int, reduce: Callable) -> np.ndarray:
    """Returns the Fisher information of every candidate's output on every batch.

    Dropout is off, batch normalization runs by the network's policy, and nothing is
    updated.

    Args:
        network: models.Network.
        batches: iterable of (images, labels).
        num_batches: int. The largest number of batches, for the progress bar.
        reduce: function (product of activation and gradient, float32 tensor of shape
            (B, ...); layer) -> float32 tensor of shape (B,).

    Returns:
        float64 array of shape (batches, candidates).

    Raises:
        RunError: if a score is not finite.
    """
    from models.batchnorm import statistics_kept

    rows: list[np.ndarray] = []
    with statistics_kept(network.model, network.bn_stats):
        backward_pass = _backward_pass(network, reduce)
        for images, labels in tqdm(batches, "Selection", num_batches, unit="batch", leave=False, disable=None):
            rows.append(np.array([np.mean(values, dtype=np.float64) / 2 for values in backward_pass(images, labels)]))
            for candidate, score in zip(network.candidates, rows[-1], strict=True):
                if not np.isfinite(score):
                    raise RunError(
                        f"Fisher information must be finite. Received: {score} in {candidate.path}, batch {len(rows)}; "
                        "check the weights, or try --bn_stats batch."
                    )
    return np.array(rows)


def _backward_pass(network, reduce):
    """Returns a function from images and labels to float32 tensors of shape (B,), one per candidate.

    Each output passes through an identity that also takes a slot of zeros, one per
    image. In the backward pass the identity has the output and its gradient, and
    returns their reduced product as the slot's gradient. So no product outlives its
    layer.
    """
    import tensorflow as tf

    from models.layers import watching

    index = {id(candidate.layer): i for i, candidate in enumerate(network.candidates)}

    @tf.function
    def reduced_products(images, labels):
        slots = [tf.zeros(tf.shape(images)[:1]) for _ in network.candidates]

        def through_slot(layer, output):
            @tf.custom_gradient
            def identity(activation, slot):
                return tf.identity(activation), lambda error: (error, reduce(activation * error, layer))

            return identity(output, slots[index[id(layer)]])

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(slots)
            with watching([candidate.layer for candidate in network.candidates], through_slot):
                logits = network.model(images, training=False)
            loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        return tape.gradient(loss, slots, unconnected_gradients="zero")

    return reduced_products
