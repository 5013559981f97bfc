"""The longest prefix of a ranking that trains within a number of bytes.

Longer prefixes train more and need more, so a bisection finds the place with
few traces: the prefix it ends at fits, and the one with the next layer doesn't.
(Chunk sizes move an estimate by about a per cent, so that a still longer prefix
might slip under the budget by chance; none is looked for.)
"""

import logging

from core.errors import UsageError
from memory import estimate
from models.compiling import compile_model, make_optimizer
from models.freezing import freeze
from selection.ranking import with_first_layers

log = logging.getLogger("adabet")

MB = 10**6


def check(network, cfg, batch_size):
    """Refuses a budget in which not even the head could be trained.

    Args:
        network: models.Network, its policy of batch normalisation set.
        cfg: Config.
        batch_size: int. Images of a training batch.

    Raises:
        UsageError: see there.
    """
    needed = peak_bytes(network, [weight.path for weight in network.head.weights], cfg, batch_size)
    # A selection comes next, and some take gradients: they are to find the network as it was.
    freeze(network, [weight.path for weight in network.trainable_weights])
    if needed > cfg.memory_budget_mb * MB:
        raise UsageError(
            f"--memory_budget_mb must allow for training the classifier alone, which is estimated to need "
            f"{needed / MB:.1f} MB. Received: {cfg.memory_budget_mb:g}; raise it, or lower --batch_size or --input_size."
        )


def fit(network, selection, cfg, batch_size):
    """Shortens a selection until its estimated peak fits the budget.

    Args:
        network: models.Network.
        selection: selection.Selection with a ranking. No prefix longer than its own
            is tried.
        cfg: Config.
        batch_size: int. Images of a training batch.

    Returns:
        selection: selection.Selection, the longest that fits; the head alone, at
        worst.
        next_layer: str or None. The layer of the ranking that comes next.
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


def peak_bytes(network, trained_weights, cfg, batch_size):
    """Returns the estimated peak of a training step in bytes; leaves the network frozen so."""
    freeze(network, trained_weights)
    optimizer = make_optimizer(cfg, total_steps=1)
    compile_model(network.model, optimizer)
    try:
        return estimate.of_training(network.model, (batch_size, *network.model.inputs[0].shape[1:])).bytes
    finally:
        _free(optimizer.variables)


def _free(variables):
    """Gives back the memory of variables that nothing will read again.

    TensorFlow keeps a traced step's variables for as long as its graph, which may be
    as long as the process: with a few estimates the slots would be in the way of the
    very training that has to fit. A variable can't be deleted under a graph that
    knows it, but it can be left empty.
    """
    import tensorflow as tf

    for variable in variables:
        empty = tf.zeros([0], variable.dtype)
        tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=empty, validate_shape=False)
