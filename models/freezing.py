"""Which weights train, set on single weights."""

from __future__ import annotations

from collections.abc import Collection

from core.errors import RunError


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


def changing_variables(network) -> list:
    """Returns the variables that a training step may change: all except the frozen weights."""
    frozen = {id(weight) for weight in network.trainable_weights if not weight.trainable}
    return [variable for variable in network.model.variables if id(variable) not in frozen]
