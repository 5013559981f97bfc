"""Which weights train: the table of schemes.

A scheme looks at the network, and some also at training images, and returns a
`Selection`. It never trains: train.py does that in the same way for all schemes. To add
one, write a function with the arguments of those here and give it a row.

No module here imports TensorFlow before a scheme runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from selection import baselines, elastic, labelled, prunetrain, spectrum, topology
from selection.ranking import Selection
from selection.topology import rank_layers

__all__ = ["ALIASES", "SCHEMES", "SELECTION_FLAGS", "SUMMARY_FACTS", "Scheme", "Selection", "rank_layers"]


@dataclass(frozen=True)
class Scheme:
    """One row of the table.

    Attributes:
        help: str. One line for `--help`.
        select: function (network, batches, cfg) -> Selection, where
            `batches(points, count)` gives batches of (images, labels).
        reads: frozenset of str. The flags of selection that the scheme reads.
        learning_rate: float. Default of `--learning_rate`.
        rho: float. Default of `--rho`, for schemes that read it.
        check: function (network, cfg, num_images) that raises UsageError for what the
            scheme cannot work with, before anything is written. It only compares.
        measure: function (network, cfg, num_images) that measures what `check` and
            `select` compare, and keeps it for this process.
        restore: function (network, batches, cfg, Selection) -> Selection that gives a
            selection from a checkpoint its functions.
        facts: tuple of str. What the scheme adds to summary.json.
    """

    help: str
    select: Callable[..., Selection]
    reads: frozenset[str]
    learning_rate: float = 1e-2
    rho: float = 0.1
    check: Callable[..., None] = baselines.check_eligible
    measure: Callable[..., None] = lambda network, cfg, num_images: None
    restore: Callable[..., Selection] = lambda network, batches, cfg, selection: selection
    facts: tuple[str, ...] = ()


# Flags that not every scheme reads. A warning names those that the chosen one ignores.
SELECTION_FLAGS = frozenset(
    ("rho", "interval", "timing", "num_betti_batches", "betti_points", "layers", "exclude_layers", "memory_budget_mb")
)

_RANKING = frozenset({"rho", "num_betti_batches", "exclude_layers", "memory_budget_mb"})
_ELASTIC = frozenset({"rho", "interval", "timing", "exclude_layers"})
_CONTROL = frozenset({"rho", "exclude_layers", "memory_budget_mb"})
_EXCLUDE = frozenset({"exclude_layers"})


def _topology(scheme, help):
    return Scheme(help, partial(topology.select, scheme=scheme), _RANKING | {"betti_points"}, check=topology.check)


def _elastic(importance, help):
    return Scheme(
        help,
        partial(elastic.select, importance=importance),
        _ELASTIC,
        rho=0.533,
        check=elastic.check,
        measure=elastic.measure,
        restore=partial(elastic.restore, importance=importance),
        facts=elastic.FACTS,
    )


SCHEMES = {
    "act_norm_betti_train": _topology(
        "act_norm_betti_train", "AdaBet: the top rho of the layers by b1 / activation size"
    ),
    "betti_train": _topology("betti_train", "the top rho by b1"),
    "weight_norm_betti_train": _topology("weight_norm_betti_train", "the top rho by b1 / number of weights"),
    "full_training": Scheme("every weight", baselines.everything, _EXCLUDE),
    "traditional_tl_training": Scheme(
        "the head alone", baselines.head_only, frozenset(), check=baselines.check_nothing
    ),
    "bn_plus_bias_training": Scheme(
        "scales, shifts and biases of all layers, and the head",
        baselines.norms_and_biases,
        _EXCLUDE,
        learning_rate=3e-2,
    ),
    "fisher": Scheme(
        "the top rho by mean (activation x gradient)^2 / 2, as published; uses labels", labelled.fisher, _RANKING
    ),
    "fisher_channels": Scheme(
        "the top rho by Fisher information of channels (Theis et al.); uses labels", labelled.fisher_channels, _RANKING
    ),
    # The learning rates of rgn and spectrum are those of similar schemes; they were not searched.
    "rgn": Scheme("the top rho by gradient norm / weight norm; uses labels", labelled.rgn, _RANKING),
    "spectrum": Scheme(
        "the top rho by signal-to-noise of the kernels' singular values; uses no image", spectrum.spectrum, _CONTROL
    ),
    "elastic_training": _elastic(
        elastic.update_importance,
        "ElasticTrainer: weights by importance and time, selected again; rho is a share of time",
    ),
    "elastic_training_weight_magnitude": _elastic(
        elastic.weight_magnitude, "the same; importance is the weights' magnitude"
    ),
    "elastic_training_grad_magnitude": _elastic(
        elastic.gradient_magnitude, "the same; importance is the gradients' magnitude"
    ),
    "prunetrain": Scheme(
        "PruneTrain: every weight, under group lasso; emptied channels are pruned",
        prunetrain.prunetrain,
        _EXCLUDE | {"interval"},
        restore=prunetrain.restore,
        facts=prunetrain.FACTS,
    ),
    "random_layers": Scheme("control: rho of the layers, at random by --seed", baselines.at_random, _CONTROL),
    "last_layers": Scheme("control: the rho of the layers nearest the output", baselines.nearest_the_output, _CONTROL),
    "smallest_activations": Scheme(
        "control: the rho of the layers with the smallest activations", baselines.smallest_activation, _CONTROL
    ),
    "listed_layers": Scheme(
        "the layers of --layers", baselines.listed, _EXCLUDE | {"layers"}, check=baselines.check_listed
    ),
}

# Other names for the same scheme, as published.
ALIASES = {"bettitrain": "act_norm_betti_train"}

# Every name that a scheme may add to summary.json, in the order of the table.
SUMMARY_FACTS = tuple(dict.fromkeys(name for row in SCHEMES.values() for name in row.facts))
