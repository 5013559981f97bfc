"""Which weights train, set on single weights."""

from core.errors import RunError


def freeze(network, trained_weights):
    """Lets exactly the weights with these paths train.

    The switch is each weight's own, not its layer's: a layer that is not
    trainable would also change how its batch normalisation runs.

    Args:
        network: models.Network.
        trained_weights: collection of str, weight paths.

    Raises:
        RunError: a path belongs to no weight.
    """
    wanted = set(trained_weights)
    unknown = wanted - {weight.path for weight in network.trainable_weights}
    if unknown:
        raise RunError(f"every selected weight must be in the network. Received: {sorted(unknown)[:3]}")
    for weight in network.trainable_weights:
        weight.trainable = weight.path in wanted
    training = {weight.path for weight in network.model.trainable_variables}
    if training != wanted:
        raise RunError(f"the trained weights must be the selected ones; they differ in {sorted(training ^ wanted)[:3]}")


def changing_variables(network):
    """Returns the variables that a training step may change: all but the frozen weights."""
    frozen = {id(weight) for weight in network.trainable_weights if not weight.trainable}
    return [variable for variable in network.model.variables if id(variable) not in frozen]
