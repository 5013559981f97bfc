"""The longest prefix of a ranking that trains within a number of bytes.

Longer prefixes need more memory, so that a bisection needs few traces. The prefix that
it finds fits, and the one with the next layer does not. (The sizes of chunks change an
estimate by about one percent, so that a longer prefix may fit by chance; the search
ignores that.)
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from core.config import Config
from core.errors import UsageError
from core.units import MB
from memory import estimate
from models.compiling import compile_model, make_optimizer
from models.freezing import freeze
from selection.ranking import Selection, with_first_layers

log = logging.getLogger("adabet")


def head_peak_bytes(network, cfg: Config, batch_size: int) -> int:
    """Returns the estimated peak, in bytes, of training the head alone: the least that any selection needs.

    Args:
        network: models.Network, its mode of batch normalization set.
        cfg: Config.
        batch_size: int. Images per training batch.
    """
    needed = peak_bytes(network, [weight.path for weight in network.head.weights], cfg, batch_size)
    freeze(network, [weight.path for weight in network.trainable_weights])  # a selection may need all gradients
    return needed


def check(cfg: Config, needed: int) -> None:
    """Checks that the budget allows for training the head.

    Args:
        cfg: Config. Reads memory_budget_mb.
        needed: int. Bytes, from `head_peak_bytes`.

    Raises:
        UsageError: if it does not.
    """
    if needed > cfg.memory_budget_mb * MB:
        raise UsageError(
            f"--memory_budget_mb must allow for training the classifier alone, estimated at {needed / MB:.1f} MB. "
            f"Received: {cfg.memory_budget_mb:g}; raise it, or lower --batch_size or --input_size."
        )


def fit(network, selection: Selection, cfg: Config, batch_size: int) -> tuple[Selection, str | None, int | None]:
    """Shortens a selection until its estimated peak fits the budget.

    Args:
        network: models.Network.
        selection: Selection with a ranking. It bounds the length.
        cfg: Config.
        batch_size: int. Images per training batch.

    Returns:
        selection: Selection, the longest that fits, at least the head.
        next_layer: str or None. The next layer of the ranking.
        next_bytes: int or None. The estimated peak with that layer.
    """
    ranked = sorted((row for row in selection.layers if row["rank"] is not None), key=lambda row: row["rank"])
    estimates = {}

    def needs(length):
        if length not in estimates:
            weights = with_first_layers(network, selection, length).trained_weights
            estimates[length] = peak_bytes(network, weights, cfg, batch_size)
            log.info("Estimated peak with the first %d layers: %.1f MB", length, estimates[length] / MB)
        return estimates[length]

    fits, too_long = 0, len(selection.selected) + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if needs(middle) <= cfg.memory_budget_mb * MB:
            fits = middle
        else:
            too_long = middle
    if fits == len(ranked):
        return with_first_layers(network, selection, fits), None, None
    return with_first_layers(network, selection, fits), ranked[fits]["path"], needs(fits + 1)


def peak_bytes(network, trained_weights: Collection[str], cfg: Config, batch_size: int) -> int:
    """Freezes all but the given weights, and returns the estimated peak of a training step in bytes."""
    freeze(network, trained_weights)
    optimizer = make_optimizer(cfg, total_steps=1)
    compile_model(network.model, optimizer)
    try:
        return estimate.of_training(network.model, (batch_size, *network.model.inputs[0].shape[1:])).bytes
    finally:
        _free(optimizer.variables)


def _free(variables):
    """Releases the memory of variables that nothing reads again.

    TensorFlow keeps the variables of a traced step as long as its graph, possibly as
    long as the process: the slots of a few estimates would take the memory that the
    training needs. A variable cannot be deleted while a graph refers to it, but it can
    be emptied.
    """
    import tensorflow as tf

    for variable in variables:
        empty = tf.zeros([0], variable.dtype)
        tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=empty, validate_shape=False)
