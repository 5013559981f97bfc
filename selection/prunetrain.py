"""PruneTrain: every weight trains under group lasso, and channels that it empties are pruned.

From the source (Lym et al., SC 2019, and its code):

* A group holds the weights of one output channel or one input channel of a kernel. The
  inputs of the first layer, the outputs of the head (the classes) and the channels of
  depthwise convolutions are not grouped.
* The penalty is the sum of the groups' Euclidean norms, not weighted by their sizes,
  times one coefficient. The coefficient is set once, before the first step, so that
  penalty / (penalty + loss) is 0.2.
* A channel is pruned when all its weights are below 1e-4 in absolute value.

What differs:

* The source rebuilds a smaller network. Here a pruned channel is set to zero, with its
  bias and the scale and shift of the normalization that follows, and stays zero: the
  masked network is neither smaller nor faster. `flops_remaining` is what a smaller
  network would compute.
* Channels are pruned every `--interval` epochs (4 by default). The source prunes every
  10 epochs on CIFAR and every 5 on ImageNet.
* The source keeps the union of the channels of a residual node's branches. Here each
  branch is pruned by itself, because zeros add up to zeros.
* Dense layers inside a network and attention's projections are grouped like
  convolutions; the source knows convolutional networks only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from core.config import Config
from core.log import log
from selection.baselines import everything
from selection.ranking import Selection

PENALTY_SHARE = 0.2  # of penalty + loss, before the first step
THRESHOLD = 1e-4  # absolute value of a weight
FACTS = ("channels", "channels_pruned", "flops_remaining")


@dataclass(frozen=True)
class Groups:
    """The input or output channels of one layer.

    Attributes:
        candidate: models.layers.Candidate.
        axes: tuple of int. The axes of the kernel that number the channels.
        is_output: bool.
        companions: tuple of keras.Variable. For output channels, the bias, gamma and
            beta with one entry per channel.
    """

    candidate: Any
    axes: tuple[int, ...]
    is_output: bool
    companions: tuple = ()

    @property
    def path(self) -> str:
        return self.candidate.path

    @property
    def kernel(self):
        return self.candidate.layer.kernel

    @property
    def others(self) -> tuple[int, ...]:
        """The axes of the kernel within a group."""
        return tuple(axis for axis in range(len(self.kernel.shape)) if axis not in self.axes)

    @property
    def largest(self) -> np.ndarray:
        """The largest absolute weight of each channel, a float array with one axis for each of `axes`."""
        return np.abs(self.kernel.numpy()).max(axis=self.others)


def prunetrain(network, batches: Callable, cfg: Config) -> Selection:
    """Selects every weight, with a penalty, and prunes at each re-selection."""
    all_weights = everything(network, batches, cfg)
    groups = channel_groups(network, set(all_weights.trained_weights))
    coefficient = penalty_coefficient(network, groups, *next(iter(batches(cfg.batch_size, 1))))
    log.info("Group lasso over %d groups, coefficient %.3e", sum(g.largest.size for g in groups), coefficient)
    return _pruned(network, all_weights, groups, coefficient, {"output": {}, "input": {}})


def restore(network, batches: Callable, cfg: Config, selection: Selection) -> Selection:
    """Gives a selection from a checkpoint its penalties, its constraints and its pruning."""
    groups = channel_groups(network, set(selection.trained_weights))
    return _pruned(network, selection, groups, selection.details["penalty_coefficient"], selection.state["pruned"])


def _pruned(network, selection, groups, coefficient, pruned):
    """Returns a selection under group lasso, whose pruned channels stay zero.

    Args:
        network: models.Network.
        selection: Selection. Which weights train.
        groups: list of Groups.
        coefficient: float, of the penalty.
        pruned: dict. For "output" and "input", a dict from layer path to the indices
            of its pruned channels, flattened if several axes number them.
    """

    def prune(epoch):
        found = {"output": {}, "input": {}}
        for group in groups:
            alive = group.largest >= THRESHOLD
            if not alive.all():
                found[_side(group)][group.path] = np.flatnonzero(~alive).tolist()
            if not alive.any():
                log.warning(
                    "All channels of %s are pruned; only a branch that bypasses it carries a signal.", group.path
                )
        counts = {side: sum(map(len, channels.values())) for side, channels in found.items()}
        log.info("Pruned so far: %d output channels and %d input channels", counts["output"], counts["input"])
        return _pruned(network, selection, groups, coefficient, found)

    def counts(side):
        return {path: len(channels) for path, channels in pruned[side].items()}

    return replace(
        selection,
        penalties=_penalties(groups, coefficient),
        constraints=_constraints(groups, pruned),
        details={
            "penalty_coefficient": coefficient,
            "pruned_channels": counts("output"),
            "pruned_inputs": counts("input"),
        },
        state={"pruned": pruned},
        reselect=prune,
        facts=lambda: _facts(network, groups),
    )


def channel_groups(network, trained_weights: set[str]) -> list[Groups]:
    """Returns the Groups of every layer whose channels can be pruned, in forward order.

    Args:
        network: models.Network.
        trained_weights: set of weight paths. A layer has output groups only if its
            kernel, its bias and the normalization that follows it train, and input
            groups if its kernel trains.
    """
    from models.channels import following_norms, input_axes, is_depthwise, num_channels, output_axes

    norms, found = following_norms(network.model), []
    layers = [c for c in network.candidates if output_axes(c.layer) and not is_depthwise(c.layer)]
    for candidate in layers:
        layer = candidate.layer
        if layer.kernel.path not in trained_weights:
            continue
        norm = norms.get(candidate.path)
        weights = [layer.bias, *([norm.gamma, norm.beta] if norm else [])]
        companions = tuple(weight for weight in weights if weight is not None)
        fits = all(np.prod(weight.shape) == num_channels(layer) for weight in companions)
        if layer is not network.head and fits and {weight.path for weight in companions} <= trained_weights:
            found.append(Groups(candidate, output_axes(layer), is_output=True, companions=companions))
        if candidate is not layers[0]:
            found.append(Groups(candidate, input_axes(layer), is_output=False))
    return found


def penalty_coefficient(network, groups: list[Groups], images, labels) -> float:
    """Returns the coefficient at which the penalty is `PENALTY_SHARE` of this batch's penalty and loss."""
    import keras

    from models.batchnorm import statistics_kept

    with statistics_kept(network.model, network.bn_stats):
        logits = network.model(images, training=False)
    loss = float(np.mean(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)))
    norms = sum(float(np.sqrt((g.kernel.numpy().astype(np.float64) ** 2).sum(axis=g.others)).sum()) for g in groups)
    return PENALTY_SHARE / (1 - PENALTY_SHARE) * loss / norms


def _penalties(groups, coefficient):
    """Returns {kernel path: function from the kernel to its penalty}."""
    others_of: dict[str, list] = {}
    for group in groups:
        others_of.setdefault(group.kernel.path, []).append(group.others)

    def penalty_over(all_others):
        def penalty(kernel):
            import tensorflow as tf

            squares = tf.square(tf.convert_to_tensor(kernel))
            sums = [tf.reduce_sum(squares, axis=others) for others in all_others]
            # The root has no derivative at zero, where pruned channels are. It gets zero there.
            norms = [tf.reduce_sum(tf.sqrt(tf.maximum(one, 1e-24))) for one in sums]
            return coefficient * tf.add_n(norms)

        return penalty

    return {path: penalty_over(all_others) for path, all_others in others_of.items()}


def _constraints(groups, pruned):
    """Returns {weight path: function that sets the weight's pruned channels to zero}."""
    alive_of: dict[str, np.ndarray] = {}
    for group in groups:
        channels = pruned[_side(group)].get(group.path)
        if not channels:
            continue
        alive = np.ones(group.largest.shape, bool)
        alive.flat[channels] = False
        alive_of[group.kernel.path] = alive_of.get(group.kernel.path, True) & np.expand_dims(alive, group.others)
        for weight in group.companions:
            alive_of[weight.path] = alive.reshape(weight.shape)

    def zeroing(alive):
        def zeroed(value):
            import tensorflow as tf

            return tf.where(alive, value, 0.0)

        return zeroed

    return {path: zeroing(alive) for path, alive in alive_of.items()}


def _side(group):
    return "output" if group.is_output else "input"


def _facts(network, groups):
    """Counts output channels, those of them that are zero, and the FLOPs per image that the others need.

    A layer's FLOPs shrink by its own zero outputs and zero inputs. What a zero channel
    would save in the next layer is not counted, so the figure is an upper bound.
    """
    from models.channels import forward_flops

    kept: dict[str, float] = {}
    for group in groups:
        kept[group.path] = kept.get(group.path, 1.0) * float(np.mean(group.largest > 0))
    outputs = [group.largest for group in groups if group.is_output]
    flops = [(forward_flops(c), kept.get(c.path, 1.0)) for c in network.candidates]
    return {
        "channels": sum(largest.size for largest in outputs),
        "channels_pruned": sum(int((largest == 0).sum()) for largest in outputs),
        "flops_remaining": float(sum(f * share for f, share in flops) / sum(f for f, _ in flops)),
    }
