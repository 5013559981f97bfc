"""AdaBet: layers ranked by the first Betti number of their activations (arXiv 2510.03101).

Three schemes share the counting and differ in the divisor of a count. `rank_layers` serves
them, and any Keras model from Python.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from core.config import Config
from core.environment import num_workers
from core.errors import RunError, UsageError
from core.log import log
from core.units import GB, MB
from selection.betti import MIN_POINTS, betti_1_of_each, predicted_cost
from selection.ranking import Selection, eligible_paths, kendall_stability, select_top

if TYPE_CHECKING:
    import keras

    from models import Network


# Limits of the predicted cost of a selection's Vietoris-Rips part.
MAX_RIPS_S = 1800
MAX_RIPS_BYTES = 2 * GB


# What a layer's b1 is divided by, for a candidate and the number of examples.
DIVISORS: dict[str, Callable] = {
    "act_norm_betti_train": lambda candidate, points: points * candidate.activation_size,
    "betti_train": lambda candidate, points: 1,
    "weight_norm_betti_train": lambda candidate, points: candidate.num_weights,
}


def rank_layers(
    model: keras.Model | Network,
    batches: Iterable,
    rho: float | None = 0.1,
    *,
    head: keras.Layer | None = None,
    scheme: str = "act_norm_betti_train",
    num_batches: int = 4,
    exclude_layers: str | None = None,
    bn_stats: str = "stored",
) -> Selection:
    """Ranks the layers of a Keras model by the topology of their activations, and selects the best.

    It runs forward passes without dropout, and does not change the model. The candidates
    are the leaf layers with trainable weights, except those in
    loops, such as the cells of recurrent layers.

    Args:
        model: keras.Model. main.py gives a models.Network, which has its own `head` and mode
            of batch normalization.
        batches: iterable of batches as `fit` takes them: inputs, or a tuple of inputs and
            labels, which are not used. Each has the same number B of examples.
        rho: float in (0, 1]. The share of the layers to select. None selects all.
        head: keras.Layer or None. A new classifier, which trains whatever its rank.
        scheme: str. A key of `DIVISORS`: the score is b1 / (B * activation size), b1, or
            b1 / number of weights, averaged over batches.
        num_batches: int. The number of batches to use.
        exclude_layers: str or None. A regular expression on the paths of layers that must
            not be selected.
        bn_stats: str. Batch normalization uses its `stored` statistics, as when the model
            predicts, or those of the `batch`, as when it trains.

    Returns:
        Selection. `table()` returns the ranking as text, and `models.freeze` applies it.

    Raises:
        UsageError: if an argument is invalid, if batches are missing, unequal, too small or
            too large, or if the model has no candidates or two weights with one path.
        RunError: if an activation is not finite.
    """
    import keras

    import models

    _check_arguments(rho, scheme, num_batches, bn_stats)
    inputs = (keras.utils.unpack_x_y_sample_weight(batch)[0] for batch in itertools.islice(batches, num_batches))
    first = next(inputs, None)
    if first is None:
        raise UsageError("a ranking needs a batch. Received: none; an iterator may have ended, create it again.")
    network = model if isinstance(model, models.Network) else models.wrap(model, first, head, bn_stats)
    _check_clouds(len(keras.tree.flatten(first)[0]), len(network.candidates) * num_batches)
    counts, points = count_bars(network, itertools.chain([first], inputs), num_batches)
    scores = counts / np.array([DIVISORS[scheme](candidate, points) for candidate in network.candidates], np.float64)
    columns = [{"betti_1": float(column.mean()), "betti_1_per_batch": column.tolist()} for column in counts.T]
    cfg = Config(rho=rho, exclude_layers=exclude_layers)
    return select_top(network, cfg, scores.mean(axis=0).tolist(), columns, kendall_stability(scores))


def select(network, batches: Callable, cfg: Config, scheme: str) -> Selection:
    """Returns the Selection of one of these schemes, with the arguments of every scheme."""
    num_batches = cfg.num_betti_batches or 1
    return rank_layers(
        network,
        batches(cfg.betti_points or cfg.batch_size, num_batches),
        cfg.rho,
        scheme=scheme,
        num_batches=num_batches,
        exclude_layers=cfg.exclude_layers,
    )


def check(network, cfg: Config, num_images: int) -> None:
    """Checks that point clouds have enough points, and that their cost is bearable.

    Raises:
        UsageError: if they do not, or if `--exclude_layers` matches no layer or all.
    """
    points = min(cfg.betti_points or cfg.batch_size, num_images)
    origin = f" (--batch_size {cfg.batch_size}, {num_images} training images)"
    _check_clouds(points, len(network.candidates) * (cfg.num_betti_batches or 1), origin)
    eligible_paths(network, cfg)


def _check_arguments(rho, scheme, num_batches, bn_stats):
    for name, value, valid, rule in (
        ("rho", rho, rho is None or 0 < rho <= 1, "over 0 and at most 1, or None"),
        ("scheme", scheme, scheme in DIVISORS, f"one of {', '.join(DIVISORS)}"),
        ("num_batches", num_batches, num_batches >= 1, "at least 1"),
        ("bn_stats", bn_stats, bn_stats in ("stored", "batch"), "stored or batch"),
    ):
        if not valid:
            raise UsageError(f"`{name}` must be {rule}. Received: {value!r}; change it.")


def _check_clouds(points, num_clouds, origin=""):
    """Raises UsageError if clouds of so many points have no loops or cost too much."""
    if points < MIN_POINTS:
        raise UsageError(
            f"a point cloud needs at least {MIN_POINTS} images to have a loop. Received: {points}{origin}; use larger "
            "batches (--betti_points), or choose a scheme that does not rank by Betti numbers."
        )
    seconds, peak_bytes = predicted_cost(points, num_clouds)
    if seconds > MAX_RIPS_S or peak_bytes > MAX_RIPS_BYTES:
        raise UsageError(
            f"the Vietoris-Rips part of a selection must need at most {MAX_RIPS_S} s and {MAX_RIPS_BYTES / MB:.0f} MB. "
            f"Received: clouds of {points} points, predicted at {seconds:.0f} s and {peak_bytes / MB:.0f} MB; use "
            "smaller or fewer batches (--betti_points, --num_betti_batches)."
        )


def count_bars(network, batches: Iterable, num_batches: int) -> tuple[np.ndarray, int]:
    """Counts the H1 bars of every candidate's cloud on every batch.

    Args:
        network: models.Network.
        batches: iterable of tensors of shape (B, ...), or of structures of them.
        num_batches: int. The number of batches that was requested.

    Returns:
        counts: int array of shape (batches, candidates).
        points: int. B, the same for all batches.

    Raises:
        UsageError: if a batch has another number of examples than the first.
        RunError: if an activation is not finite.
    """
    from selection.activations import distance_pass  # imports TensorFlow, which --help need not wait for

    counts: list[list[int]] = []
    points = 0
    with distance_pass(network) as distances:
        for inputs in tqdm(batches, "Selection", num_batches, unit="batch", leave=False, disable=None):
            matrices = distances(inputs)
            points = points or len(matrices[0])
            if len(matrices[0]) != points:
                raise UsageError(
                    f"every batch must have as many examples as the first. Received: {len(matrices[0])} after "
                    f"{points}; leave out the rest of the data, as `drop_remainder=True` of tf.data does."
                )
            for candidate, matrix in zip(network.candidates, matrices, strict=True):
                if not np.isfinite(matrix).all():
                    raise RunError(
                        f"activations must be finite to be ranked. Received: NaN or infinity in the output of "
                        f"{candidate.path}, batch {len(counts) + 1}; check the weights, or try --bn_stats batch."
                    )
            counts.append(betti_1_of_each(matrices, num_workers()))
    if len(counts) < num_batches:
        log.warning(
            "The ranking uses %d batches of %d images instead of %d batches: the data contain no more.",
            len(counts), points, num_batches,
        )  # fmt: skip
    return np.array(counts), points
