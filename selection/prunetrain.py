"""PruneTrain: everything trains under group lasso, and channels that it empties are pruned (SC 2019).

A group is one output channel of a convolution or dense kernel: of a depthwise
convolution the small kernel of one channel, of attention's projections one
column of one head. The head is left alone, its channels being the classes. The
penalty is the plain sum of the groups' Euclidean norms, without weights for their
sizes, times one coefficient for the whole network, as published. The coefficient is
set once, on one training batch, so that the penalty starts as `PENALTY_SHARE` of
loss and penalty together.

Every `--interval` epochs, a channel whose weights are all under `THRESHOLD` is set
to zero, with its bias and its entries in the normalisation that follows, so that the
two give exactly zero; there it stays. The network keeps its shapes: residual
branches then need no care, and the FLOPs that remain are what a smaller network
would have.
"""

import logging
from dataclasses import dataclass, replace

import numpy as np

from selection.baselines import everything

log = logging.getLogger("adabet")

PENALTY_SHARE = 0.2  # of (loss + penalty), at the start
THRESHOLD = 1e-4  # absolute


@dataclass(frozen=True)
class Groups:
    """The output channels of one layer.

    Attributes:
        candidate: models.layers.Candidate.
        axes: tuple of int. The axes of the kernel that number them.
        companions: list of keras.Variable. Bias, gamma and beta, one entry a channel.
    """

    candidate: object
    axes: tuple
    companions: list

    @property
    def kernel(self):
        return self.candidate.layer.kernel

    @property
    def others(self):
        """tuple of int. The axes within a group."""
        return tuple(axis for axis in range(len(self.kernel.shape)) if axis not in self.axes)

    @property
    def largest(self):
        """float array, the largest absolute weight of each channel; one axis for each of `axes`."""
        return np.abs(self.kernel.numpy()).max(axis=self.others)


def prunetrain(network, batches, cfg):
    """Trains everything, with a penalty, and prunes when asked again."""
    all_weights = everything(network, batches, cfg)
    groups = channel_groups(network, set(all_weights.trained_weights))
    coefficient = penalty_coefficient(network, groups, *next(iter(batches(cfg.batch_size, 1))))
    log.info("Group lasso over %d channels, coefficient %.3e", sum(g.largest.size for g in groups), coefficient)
    return _pruned(network, all_weights, groups, coefficient, {})


def restore(network, batches, cfg, selection):
    """Gives a selection from a checkpoint its penalties and constraints, and lets it prune on."""
    groups = channel_groups(network, set(selection.trained_weights))
    return _pruned(network, selection, groups, selection.details["penalty_coefficient"], selection.state["pruned"])


def _pruned(network, selection, groups, coefficient, pruned):
    """Returns a selection under group lasso, whose pruned channels stay zero.

    Args:
        network: models.Network.
        selection: Selection. Which weights train.
        groups: list of Groups.
        coefficient: float, of the penalty.
        pruned: dict from layer path to the numbers of its pruned channels, counted
            through where several axes number them.
    """
    constraints = {}
    for group in groups:
        if group.candidate.path in pruned:
            alive = np.ones(group.largest.shape, bool)
            alive.flat[pruned[group.candidate.path]] = False
            constraints[group.kernel.path] = _zeroing(np.expand_dims(alive, group.others))
            for weight in group.companions:
                constraints[weight.path] = _zeroing(alive.reshape(weight.shape))

    def prune(epoch):
        now, channels = {}, 0
        for group in groups:
            alive = group.largest >= THRESHOLD
            channels += alive.size
            if not alive.all():
                now[group.candidate.path] = np.flatnonzero(~alive).tolist()
            if not alive.any():
                log.warning(
                    "All channels of %s are pruned: without a branch around it, nothing passes.", group.candidate.path
                )
        log.info("Pruned so far: %d of %d channels", sum(map(len, now.values())), channels)
        return _pruned(network, selection, groups, coefficient, now)

    counts = {path: len(channels) for path, channels in pruned.items()}
    return replace(
        selection,
        penalties={group.kernel.path: _penalty(group, coefficient) for group in groups},
        constraints=constraints,
        details={"penalty_coefficient": coefficient, "pruned_channels": counts},
        state={"pruned": pruned},
        reselect=prune,
        facts=lambda: _pruned_facts(network, groups),
    )


def channel_groups(network, trained_weights):
    """Returns the Groups of every layer whose channels can be pruned, in forward order.

    Args:
        network: models.Network.
        trained_weights: set of weight paths. A layer whose kernel isn't among them,
            or whose normalisation isn't, keeps its channels.
    """
    from models.channels import following_norms, num_channels, output_axes  # loads TensorFlow

    norms, found = following_norms(network.model), []
    for candidate in network.candidates:
        layer = candidate.layer
        axes = output_axes(layer)
        if not axes or layer is network.head:
            continue
        norm = norms.get(candidate.path)
        companions = [layer.bias] + ([norm.gamma, norm.beta] if norm else [])
        companions = [weight for weight in companions if weight is not None]
        fits = all(np.prod(weight.shape) == num_channels(layer) for weight in companions)
        if fits and {w.path for w in (layer.kernel, *companions)} <= trained_weights:
            found.append(Groups(candidate, axes, companions))
    return found


def penalty_coefficient(network, groups, images, labels):
    """Returns the coefficient at which the penalty is `PENALTY_SHARE` of this batch's loss and penalty."""
    import keras

    from models.batchnorm import statistics_kept

    with statistics_kept(network.model, network.bn_stats):
        logits = network.model(images, training=False)
    loss = float(np.mean(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)))
    norms = sum(float(np.sqrt((g.kernel.numpy().astype(np.float64) ** 2).sum(axis=g.others)).sum()) for g in groups)
    return PENALTY_SHARE / (1 - PENALTY_SHARE) * loss / norms


def _penalty(group, coefficient):
    def penalty(kernel):
        import tensorflow as tf

        squares = tf.reduce_sum(tf.square(tf.convert_to_tensor(kernel)), axis=group.others)
        # The root has no derivative at zero, where pruned channels stand: there it gets zero.
        return coefficient * tf.reduce_sum(tf.sqrt(tf.maximum(squares, 1e-24)))

    return penalty


def _zeroing(alive):
    def zeroed(value):
        import tensorflow as tf

        return tf.where(alive, value, 0.0)

    return zeroed


def _pruned_facts(network, groups):
    """Counts the channels that are zero now, and the FLOPs of one image that the others take.

    A pruned channel saves what computing it takes; what it also spares the next
    layer isn't counted, so that the figure is an upper bound.
    """
    from models.channels import forward_flops

    kept = {group.candidate.path: np.mean(group.largest > 0) for group in groups}
    flops = [(forward_flops(c), kept.get(c.path, 1.0)) for c in network.candidates]
    return {
        "channels": sum(group.largest.size for group in groups),
        "channels_pruned": sum(int((group.largest == 0).sum()) for group in groups),
        "flops_remaining": float(sum(f * share for f, share in flops) / sum(f for f, _ in flops)),
    }
