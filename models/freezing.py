"""Which weights train, set on single weights."""

from __future__ import annotations

import collections
from collections.abc import Collection

from core.errors import RunError, UsageError


def freeze(network, trained_weights: Collection[str]) -> None:
    """Makes exactly the weights with these paths trainable.

    The flag is set on each weight, not on its layer: a layer that is not trainable would
    also change the mode of its batch normalization.

    Args:
        network: models.Network.
        trained_weights: collection of str. Paths of weights.

    Raises:
        RunError: if a path belongs to no weight.
    """
    wanted = set(trained_weights)
    unknown = wanted - {weight.path for weight in network.trainable_weights}
    if unknown:
        raise RunError(f"every selected weight must be in the network. Received: {sorted(unknown)[:3]}.")
    for weight in network.trainable_weights:
        weight.trainable = weight.path in wanted
    training = {weight.path for weight in network.model.trainable_variables}
    if training != wanted:
        raise RunError(
            f"the trained weights must be the selected ones. Received: a difference in {sorted(training ^ wanted)[:3]}."
        )


def freeze_model(model, selection) -> None:
    """Makes exactly the weights of a selection trainable, in any Keras model.

    Compile the model afterwards: `fit` then trains these weights alone. The mode of batch
    normalization does not change.

    Args:
        model: keras.Model, the one that was ranked, or an equal one.
        selection: Selection, or a collection of str: paths of weights.

    Raises:
        UsageError: if a path belongs to no weight of the model, or to several.
    """
    wanted = set(getattr(selection, "trained_weights", selection))
    paths = collections.Counter(weight.path for weight in model.weights)
    wrong = sorted(path for path in wanted if paths[path] != 1)
    if wrong:
        raise UsageError(
            f"each selected path must belong to one weight of the model. Received: {wrong[0]}, which belongs to "
            f"{paths[wrong[0]]}; rank and freeze the same model, with unique layer names."
        )
    for weight in model.weights:
        if weight.trainable or weight.path in wanted:
            weight.trainable = weight.path in wanted


def changing_variables(network) -> list:
    """Returns the variables that a training step may change: all except the frozen weights."""
    frozen = {id(weight) for weight in network.trainable_weights if not weight.trainable}
    return [variable for variable in network.model.variables if id(variable) not in frozen]
