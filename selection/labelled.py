"""Layers ranked by labels and gradients: the Fisher information of their outputs, and relative gradient norms.

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

`rgn` is the norm of the gradient of a layer's weights over the norm of the weights (Lee et
al. 2023, arXiv 2210.11466, "Surgical Fine-Tuning Improves Adaptation to Distribution
Shifts"). What differs from the source:

* There the ratio scales each layer's learning rate and is computed again during training
  (Auto-RGN). Here it is computed once, and the top rho of the layers train at one rate.
* The weights of one layer count as one vector: a kernel and its bias have one score.

Dropout is off, batch normalization runs by the network's policy, and nothing is updated.
"""

from collections.abc import Callable, Iterable

import numpy as np
from tqdm import tqdm

from core.config import Config
from core.errors import RunError
from selection.elastic_timing import gradient_function, tensors
from selection.ranking import Selection, kendall_stability, select_top

_LEAST_NORM = 1e-12  # of weights; keeps the score of a layer of zeros finite


def fisher(network, batches: Callable, cfg: Config) -> Selection:
    """Selects by the mean over all elements of (activation * gradient)^2 / 2."""
    return _select(network, batches, cfg, information, _mean_of_squares)


def fisher_channels(network, batches: Callable, cfg: Config) -> Selection:
    """Selects by the Fisher information of the layer's channels."""
    return _select(network, batches, cfg, information, _sum_over_channels)


def rgn(network, batches: Callable, cfg: Config) -> Selection:
    """Selects by gradient norm / weight norm, averaged over batches."""
    return _select(network, batches, cfg, relative_gradient_norms)


def _select(network, batches, cfg, score, *more):
    num_batches = cfg.num_betti_batches or 1
    scores = score(network, batches(cfg.batch_size, num_batches), num_batches, *more)
    return select_top(network, cfg, scores.mean(axis=0).tolist(), stability=kendall_stability(scores))


def _on_batches(network, batches, num_batches, scores_of, what):
    """Returns `scores_of(images, labels)` of every batch, float64 of shape (batches, candidates)."""
    from models.batchnorm import statistics_kept  # loads Keras

    rows: list[np.ndarray] = []
    with statistics_kept(network.model, network.bn_stats):
        for images, labels in tqdm(batches, "Selection", num_batches, unit="batch", leave=False, disable=None):
            rows.append(np.array(scores_of(images, labels)))
            for candidate, score in zip(network.candidates, rows[-1], strict=True):
                if not np.isfinite(score):
                    raise RunError(
                        f"{what} must be finite. Received: {score} in {candidate.path}, batch {len(rows)}; check the "
                        "weights, or try --bn_stats batch."
                    )
    return np.array(rows)


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
    backward_pass = _backward_pass(network, reduce)

    def scores_of(images, labels):
        return [np.mean(values, dtype=np.float64) / 2 for values in backward_pass(images, labels)]

    return _on_batches(network, batches, num_batches, scores_of, "Fisher information")


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


def relative_gradient_norms(network, batches: Iterable, num_batches: int) -> np.ndarray:
    """Returns ||dL/dw|| / ||w|| of every candidate on every batch, for the mean loss L; the rest as `information`."""
    weight_norms = np.maximum(_layer_norms(network, [weight.numpy() for weight in tensors(network)]), _LEAST_NORM)
    gradients_of = gradient_function(network, tensors(network))

    def scores_of(images, labels):
        return _layer_norms(network, [gradient.numpy() for gradient in gradients_of(images, labels)]) / weight_norms

    return _on_batches(network, batches, num_batches, scores_of, "relative gradient norms")


def _layer_norms(network, arrays):
    """Returns the Euclidean norm of every candidate, from one array per tensor: float64 of shape (candidates,)."""
    squares = iter([np.sum(np.square(array, dtype=np.float64)) for array in arrays])
    return np.sqrt([sum(next(squares) for _ in candidate.weights) for candidate in network.candidates])
