"""Which weights train: the table of schemes.

A scheme looks at the network, and some also at training images, and returns a
`Selection`. It trains nothing: that is train.py's business, the same for all.
To add one, write a function with the arguments of those here and give it a row.

Nothing here loads TensorFlow before a scheme runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

from selection import fixed, topology
from selection.ranking import Selection

__all__ = ["SCHEMES", "Scheme", "Selection"]


@dataclass(frozen=True)
class Scheme:
    """One row of the table.

    Attributes:
        help: str. One line for `--help`.
        select: function (network, batches, cfg) -> Selection, where
            `batches(points, count)` gives batches of (images, labels).
        check: function (network, cfg, num_images), which raises UsageError for
            what the scheme can't work with, before anything is written.
        reads: frozenset of str. The flags of selection that it reads.
        rho: float. Default of `--rho`, for schemes that read it.
        learning_rate: float. Default of `--learning_rate`.
        uses_images: bool. It looks at training images, so its cost is measured.
    """

    help: str
    select: Callable
    check: Callable
    reads: frozenset
    learning_rate: float
    rho: float = 0.1
    uses_images: bool = False


# Flags that some schemes don't read: those warn of them, and record null.
SELECTION_FLAGS = frozenset({"rho", "interval", "num_betti_batches", "layers", "exclude_layers", "memory_budget_mb"})

_RANKING = frozenset({"rho", "num_betti_batches", "exclude_layers", "memory_budget_mb"})


def _topology(select, help):
    return Scheme(help, select, topology.check, _RANKING, learning_rate=1e-2, uses_images=True)


SCHEMES = {
    "act_norm_betti_train": _topology(
        topology.by_activation_size, "AdaBet: the top rho of the layers by b1 / activation size"
    ),
    "betti_train": _topology(topology.by_count, "the top rho by b1"),
    "weight_norm_betti_train": _topology(topology.by_num_weights, "the top rho by b1 / number of weights"),
    "full_training": Scheme(
        "every weight", fixed.everything, fixed.check_eligible, frozenset({"exclude_layers"}), learning_rate=1e-3
    ),
    "traditional_tl_training": Scheme(
        "the head alone", fixed.head_only, fixed.check_nothing, frozenset(), learning_rate=1e-2
    ),
    "listed_layers": Scheme(
        "the layers of --layers",
        fixed.listed,
        fixed.check_listed,
        frozenset({"layers", "exclude_layers"}),
        learning_rate=1e-2,
    ),
}

# Other names for the same scheme, as published.
ALIASES = {"bettitrain": "act_norm_betti_train"}
