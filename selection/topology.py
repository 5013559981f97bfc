"""AdaBet: layers ranked by the first Betti number of their activations (arXiv 2510.03101).

Three schemes share the counting and differ in the divisor of a count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
from tqdm import tqdm

from core.config import Config
from core.environment import num_workers
from core.errors import RunError, UsageError
from selection.betti import MIN_POINTS, betti_1_of_each, predicted_cost
from selection.ranking import Selection, eligible_paths, kendall_stability, select_top

log = logging.getLogger("adabet")

# Limits of the predicted cost of a selection's Vietoris-Rips part.
MAX_RIPS_S = 1800
MAX_RIPS_BYTES = 2 * 10**9


def by_activation_size(network, batches: Callable, cfg: Config) -> Selection:
    """Scores a layer b1 / (B * d), for B images per batch and d elements of activation per image."""
    return _select(network, batches, cfg, lambda candidate, points: points * candidate.activation_size)


def by_count(network, batches: Callable, cfg: Config) -> Selection:
    """Scores a layer b1."""
    return _select(network, batches, cfg, lambda candidate, points: 1)


def by_num_weights(network, batches: Callable, cfg: Config) -> Selection:
    """Scores a layer b1 / (elements of its trainable weights)."""
    return _select(network, batches, cfg, lambda candidate, points: candidate.num_weights)


def check(network, cfg: Config, num_images: int) -> None:
    """Checks that point clouds have enough points and that their cost is within the limits.

    Raises:
        UsageError: if they do not, or if `--exclude_layers` matches no layer or all.
    """
    points = min(cfg.betti_points or cfg.batch_size, num_images)
    if points < MIN_POINTS:
        raise UsageError(
            f"a point cloud needs at least {MIN_POINTS} images to have a loop. Received: {points} "
            f"(--batch_size {cfg.batch_size}, {num_images} training images); set --betti_points, or choose "
            "a scheme that does not rank by Betti numbers."
        )
    seconds, peak_bytes = predicted_cost(points, len(network.candidates) * (cfg.num_betti_batches or 1))
    if seconds > MAX_RIPS_S or peak_bytes > MAX_RIPS_BYTES:
        raise UsageError(
            f"the Vietoris-Rips part of a selection may take {MAX_RIPS_S} s and {MAX_RIPS_BYTES / 1e6:.0f} MB. "
            f"Received: clouds of {points} points, predicted at {seconds:.0f} s and {peak_bytes / 1e6:.0f} MB; lower "
            "--betti_points or --num_betti_batches."
        )
    eligible_paths(network, cfg)


def count_bars(network, images_of_each_batch: Iterable, num_batches: int) -> tuple[np.ndarray, int]:
    """Counts the H1 bars of every candidate's cloud on every batch.

    Args:
        network: models.Network.
        images_of_each_batch: iterable of float32 images of shape (B, S, S, 3).
        num_batches: int. The number of batches that was requested.

    Returns:
        counts: int array of shape (batches, candidates).
        points: int. B, the same for all batches.

    Raises:
        RunError: if an activation is not finite.
    """
    from selection.activations import distance_pass  # imports TensorFlow, which --help need not wait for

    counts: list[list[int]] = []
    with distance_pass(network) as distances:
        for images in tqdm(images_of_each_batch, "Selection", num_batches, unit="batch", leave=False, disable=None):
            matrices = distances(images)
            for candidate, matrix in zip(network.candidates, matrices, strict=True):
                if not np.isfinite(matrix).all():
                    raise RunError(
                        f"activations must be finite to be ranked. Received: NaN or infinity in the output of "
                        f"{candidate.path}, batch {len(counts) + 1}; check the weights, or try --bn_stats batch."
                    )
            counts.append(betti_1_of_each(matrices, num_workers()))
    points = int(images.shape[0])
    if len(counts) < num_batches:
        log.warning(
            "The training data hold %d batches of %d images for the selection instead of %d; the ranking uses these.",
            len(counts), points, num_batches,
        )  # fmt: skip
    return np.array(counts), points


def _select(network, batches, cfg, divisor):
    num_batches = cfg.num_betti_batches or 1
    point_clouds = (images for images, _ in batches(cfg.betti_points or cfg.batch_size, num_batches))
    counts, points = count_bars(network, point_clouds, num_batches)
    scores = counts / np.array([divisor(candidate, points) for candidate in network.candidates], np.float64)
    columns = [{"betti_1": float(column.mean()), "betti_1_per_batch": column.tolist()} for column in counts.T]
    return select_top(network, cfg, scores.mean(axis=0).tolist(), columns, kendall_stability(scores))
