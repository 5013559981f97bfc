"""The longest prefix of a ranking that trains within a number of bytes.

Longer prefixes need more memory, so a bisection needs few traces. The prefix that
it finds fits, and the one with the next layer does not. (The sizes of chunks change an
estimate by about one percent, so a longer prefix may fit by chance; the search
ignores that.)
"""

from collections.abc import Callable, Collection

from core.config import Config
from core.errors import UsageError
from core.log import log
from core.units import MB
from memory import estimate
from models.compiling import compile_model, make_optimizer
from selection.ranking import Selection, with_first_layers


def check(cfg: Config, needed: int) -> None:
    """Checks that the budget allows for training the head.

    Args:
        cfg: Config. Reads memory_budget_mb.
        needed: int. The estimated peak, in bytes, of training the head alone: the least that any
            selection needs.

    Raises:
        UsageError: if it does not.
    """
    if needed > cfg.memory_budget_mb * MB:
        raise UsageError(
            f"--memory_budget_mb must allow for training the classifier alone, estimated at {needed / MB:.1f} MB. "
            f"Received: {cfg.memory_budget_mb:g}; raise it, or lower --batch_size or --input_size."
        )


def fit(
    network, selection: Selection, budget_bytes: float, peak_bytes: Callable[[Collection[str]], int]
) -> tuple[Selection, str | None, int | None]:
    """Shortens a selection until its estimated peak fits the budget.

    Args:
        network: models.Network.
        selection: Selection with a ranking. It bounds the length.
        budget_bytes: float.
        peak_bytes: function that returns the estimated peak, in bytes, of training the weights with
            these paths.

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
            estimates[length] = peak_bytes(weights)
            log.info("Estimated peak with the first %d layers: %.1f MB", length, estimates[length] / MB)
        return estimates[length]

    fits, too_long = 0, len(selection.selected) + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if needs(middle) <= budget_bytes:
            fits = middle
        else:
            too_long = middle
    if fits == len(ranked):
        return with_first_layers(network, selection, fits), None, None
    return with_first_layers(network, selection, fits), ranked[fits]["path"], needs(fits + 1)


def step_bytes(model, cfg: Config, batch_size: int) -> int:
    """Compiles a model that is frozen already, and returns the estimated peak of a training step in bytes."""
    optimizer = make_optimizer(cfg, total_steps=1)
    compile_model(model, optimizer)
    try:
        return estimate.of_training(model, estimate.batch_shape(model, batch_size)).bytes
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
