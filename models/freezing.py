"""Which weights train, set on single weights."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

from core.errors import RunError, UsageError

if TYPE_CHECKING:
    import keras


def freeze(model: keras.Model, selection: Any) -> None:
    """Makes exactly the weights of a selection trainable, in any Keras model.

    The flag is set on each weight, not on its layer: a layer that is not trainable would
    also change the mode of its batch normalization. Compile the model afterwards: `fit`
    then trains these weights alone. A model can be frozen again for another selection.

    Args:
        model: keras.Model, the one that was ranked, or an equal one.
        selection: Selection, or a collection of str: paths of weights.

    Raises:
        UsageError: if a path belongs to no weight that can train, or to several.
        RunError: if the model's `trainable` keeps a selected weight frozen.
    """
    from models.layers import trainable_weights  # imports Keras

    wanted = set(getattr(selection, "trained_weights", selection))
    weights = trainable_weights(model)
    counts = collections.Counter(weight.path for weight in weights)
    wrong = sorted(path for path in wanted if counts[path] != 1)
    if wrong:
        raise UsageError(
            f"each selected path must belong to one weight that can train. Received: {wrong[0]}, which belongs to "
            f"{counts[wrong[0]]}; rank and freeze the same model, with unique layer names."
        )
    for weight in weights:
        weight.trainable = weight.path in wanted
    training = {weight.path for weight in model.trainable_weights}
    if training != wanted:
        raise RunError(
            f"the trained weights must be the selected ones. Received: a difference in {sorted(training ^ wanted)[:3]}."
        )


def changing_variables(network) -> list:
    """Returns the variables that a training step may change: all except the frozen weights."""
    frozen = {id(weight) for weight in network.trainable_weights if not weight.trainable}
    return [variable for variable in network.model.variables if id(variable) not in frozen]
