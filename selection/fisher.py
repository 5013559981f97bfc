"""Fisher: layers ranked by the Fisher information of their activations.

The score of a layer with output a, of C channels at P positions, on images n with
losses L_n (Theis et al. 2018, arXiv 1801.05787, and its users since):

    1 / (2 N)  sum_n  sum_c  ( sum_p  a_npc * dL_n / da_npc )^2

that is: summed over the positions of a channel, squared for each image, averaged
over images, halved, summed over channels. A dense layer has one position, a
transformer's layer one a token.

dL_n / da_n is read off one backward pass of the summed loss. With normalisation on
stored statistics the images of a batch are independent, and so it is exact. On
batch statistics they aren't, and the gradient is that of the batch's summed loss,
an image's effect on the others included.
"""

import numpy as np
from tqdm import tqdm

from core.errors import RunError
from selection.ranking import kendall_stability, select_top


def fisher(network, batches, cfg):
    """Scores a layer by the Fisher information of its output, on labelled training images."""
    scores = information(network, batches(cfg.batch_size, cfg.num_betti_batches), cfg.num_betti_batches)
    return select_top(network, cfg, scores.mean(axis=0).tolist(), stability=kendall_stability(scores))


def information(network, batches, num_batches):
    """Returns the Fisher information of every candidate's output on every batch.

    Dropout is off, batch normalisation runs by the network's policy, and nothing
    is updated.

    Args:
        network: models.Network.
        batches: iterable of (images, labels).
        num_batches: int. How many there may be, for the bar.

    Returns:
        float64 array of shape (batches, candidates).

    Raises:
        RunError: a score is not finite.
    """
    from models.batchnorm import statistics_kept  # loads TensorFlow

    rows = []
    with statistics_kept(network.model, network.bn_stats):
        pass_ = _backward_pass(network)
        for images, labels in tqdm(batches, "Selection", num_batches, unit="batch", leave=False, disable=None):
            rows.append(np.array([np.mean(squares, dtype=np.float64) / 2 for squares in pass_(images, labels)]))
            for candidate, score in zip(network.candidates, rows[-1]):
                if not np.isfinite(score):
                    raise RunError(
                        f"Fisher information must be finite to be ranked. Received: {score} in {candidate.path}, batch "
                        f"{len(rows)}; check the weights, or try --bn_stats batch."
                    )
    return np.array(rows)


def _backward_pass(network):
    """Returns a function from images and labels to float32 tensors (B,), one a candidate.

    Each output goes through an identity that also takes a slot of zeros, one an
    image. In the backward pass the identity has the output and its gradient in
    hand, and gives their reduced product out as the slot's gradient; the product
    itself goes before the next layer's comes.
    """
    import tensorflow as tf

    from models.channels import channel_rank
    from models.layers import watching

    index = {id(candidate.layer): i for i, candidate in enumerate(network.candidates)}

    @tf.function
    def squares(images, labels):
        slots = [tf.zeros(tf.shape(images)[:1]) for _ in network.candidates]

        def through_slot(layer, output):
            rank = len(output.shape)
            channels = list(range(rank - channel_rank(layer), rank))
            positions = [axis for axis in range(1, rank) if axis not in channels]

            @tf.custom_gradient
            def identity(activation, slot):
                def gradient(error):
                    per_channel = tf.reduce_sum(activation * error, positions, keepdims=True)
                    return error, tf.reduce_sum(per_channel**2, list(range(1, rank)))

                return tf.identity(activation), gradient

            return identity(output, slots[index[id(layer)]])

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(slots)
            with watching([candidate.layer for candidate in network.candidates], through_slot):
                logits = network.model(images, training=False)
            loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        return tape.gradient(loss, slots, unconnected_gradients="zero")

    return squares
