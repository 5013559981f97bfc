"""Checks that training has moved the selected weights and no others."""

import zlib
from collections.abc import Collection

from core.errors import RunError
from core.log import log


def checksums(network) -> dict[str, int]:
    """Returns {path: CRC-32 of the value} for every weight and statistic of the network."""
    return {weight.path: zlib.crc32(weight.numpy().tobytes()) for weight in network.model.weights}


def check_what_moved(network, trained_weights: Collection[str], before: dict[str, int]) -> None:
    """Checks that training changed only the weights that were selected.

    Args:
        network: models.Network.
        trained_weights: collection of str. Paths of the selected weights.
        before: dict, from `checksums` before the training.

    Raises:
        RunError: if another weight has changed.
    """
    after = checksums(network)
    moved = {path for path in before if after[path] != before[path]}
    may_move = set(trained_weights)
    if network.bn_stats == "batch":
        may_move |= {w.path for w in network.model.non_trainable_weights} - {w.path for w in network.trainable_weights}
    if moved - may_move:
        raise RunError(
            f"training must not change frozen weights. Received: changes in {sorted(moved - may_move)[:3]}. This is a "
            "bug in this program; please report it."
        )
    still = set(trained_weights) - moved
    if still:
        log.warning(
            "%d of %d selected weights did not change, among them %s.", len(still), len(trained_weights), min(still)
        )
