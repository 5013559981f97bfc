"""Which weights train: the table of schemes.

A scheme looks at the network, and some also at training images, and returns a
`Selection`. It never trains: train.py does that in the same way for all schemes. To add
one, write a function with the arguments of those here and give it a row.

No module here imports TensorFlow before a scheme runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from selection import baselines, elastic, fisher, prunetrain, rgn, spectrum, topology
from selection.ranking import Selection

__all__ = ["ALIASES", "SCHEMES", "SELECTION_FLAGS", "SUMMARY_FACTS", "Scheme", "Selection"]


@dataclass(frozen=True)
class Scheme:
    """One row of the table.

    Attributes:
        help: str. One line for `--help`.
        select: function (network, batches, cfg) -> Selection, where
            `batches(points, count)` gives batches of (images, labels).
        check: function (network, cfg, num_images) that raises UsageError for what the
            scheme cannot work with, before anything is written. It only compares.
        reads: frozenset of str. The flags of selection that the scheme reads.
        learning_rate: float. Default of `--learning_rate`.
        rho: float. Default of `--rho`, for schemes that read it.
        measure: function (network, cfg, num_images) that measures what `check` and
            `select` compare, and keeps it for this process.
        restore: function (network, batches, cfg, Selection) -> Selection that gives a
            selection from a checkpoint its functions.
        facts: tuple of str. What the scheme adds to summary.json.
    """

    help: str
    select: Callable[..., Selection]
    check: Callable[..., None]
    reads: frozenset[str]
    learning_rate: float
    rho: float = 0.1
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


def _topology(select, help):
    return Scheme(help, select, topology.check, _RANKING | {"betti_points"}, learning_rate=1e-2)


def _labelled(select, help):
    return Scheme(help, select, baselines.check_eligible, _RANKING, learning_rate=1e-2)


def _elastic(select, importance, help):
    restore = partial(elastic.restore, importance=importance)
    return Scheme(
        help,
        select,
        elastic.check,
        _ELASTIC,
        learning_rate=1e-2,
        rho=0.533,
        measure=elastic.measure,
        restore=restore,
        facts=elastic.FACTS,
    )


def _control(select, help, learning_rate):
    return Scheme(help, select, baselines.check_eligible, _CONTROL, learning_rate)


SCHEMES = {
    "act_norm_betti_train": _topology(
        topology.by_activation_size, "AdaBet: the top rho of the layers by b1 / activation size"
    ),
    "betti_train": _topology(topology.by_count, "the top rho by b1"),
    "weight_norm_betti_train": _topology(topology.by_num_weights, "the top rho by b1 / number of weights"),
    "full_training": Scheme("every weight", baselines.everything, baselines.check_eligible, _EXCLUDE, 1e-2),
    "traditional_tl_training": Scheme(
        "the head alone", baselines.head_only, baselines.check_nothing, frozenset(), 1e-2
    ),
    "bn_plus_bias_training": Scheme(
        "scales, shifts and biases of all layers, and the head",
        baselines.norms_and_biases,
        baselines.check_eligible,
        _EXCLUDE,
        learning_rate=3e-2,
    ),
    "fisher": _labelled(fisher.fisher, "the top rho by mean (activation x gradient)^2 / 2, as published; uses labels"),
    "fisher_channels": _labelled(
        fisher.fisher_channels, "the top rho by Fisher information of channels (Theis et al.); uses labels"
    ),
    # The learning rates of rgn and spectrum are those of similar schemes; they were not searched.
    "rgn": _labelled(rgn.rgn, "the top rho by gradient norm / weight norm; uses labels"),
    "spectrum": _control(
        spectrum.spectrum, "the top rho by signal-to-noise of the kernels' singular values; uses no image", 1e-2
    ),
    "elastic_training": _elastic(
        elastic.by_update,
        elastic.update_importance,
        "ElasticTrainer: weights by importance and time, selected again; rho is a share of time",
    ),
    "elastic_training_weight_magnitude": _elastic(
        elastic.by_weight_magnitude, elastic.weight_magnitude, "the same; importance is the weights' magnitude"
    ),
    "elastic_training_grad_magnitude": _elastic(
        elastic.by_gradient_magnitude, elastic.gradient_magnitude, "the same; importance is the gradients' magnitude"
    ),
    "prunetrain": Scheme(
        "PruneTrain: every weight, under group lasso; emptied channels are pruned",
        prunetrain.prunetrain,
        baselines.check_eligible,
        _EXCLUDE | {"interval"},
        learning_rate=1e-2,
        restore=prunetrain.restore,
        facts=prunetrain.FACTS,
    ),
    "random_layers": _control(baselines.at_random, "control: rho of the layers, at random by --seed", 3e-2),
    "last_layers": _control(baselines.nearest_the_output, "control: the rho of the layers nearest the output", 3e-2),
    "smallest_activations": _control(
        baselines.smallest_activation, "control: the rho of the layers with the smallest activations", 1e-2
    ),
    "listed_layers": Scheme(
        "the layers of --layers", baselines.listed, baselines.check_listed, _EXCLUDE | {"layers"}, learning_rate=1e-2
    ),
}

# Other names for the same scheme, as published.
ALIASES = {"bettitrain": "act_norm_betti_train"}

# Every name that a scheme may add to summary.json, in the order of the table.
SUMMARY_FACTS = tuple(dict.fromkeys(name for row in SCHEMES.values() for name in row.facts))
