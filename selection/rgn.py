"""Layers ranked by relative gradient norm, with labels and gradients (arXiv 2210.11466).

The score is the norm of the gradient of a layer's weights over the norm of the weights
(Lee et al. 2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts").

What differs from the source:

* There the ratio scales each layer's learning rate and is computed again during training
  (Auto-RGN). Here it is computed once, and the top rho of the layers train at one rate.
* The weights of one layer count as one vector: a kernel and its bias have one score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from tqdm import tqdm

from core.config import Config
from core.errors import RunError
from selection.elastic_timing import gradient_function, tensors
from selection.ranking import Selection, kendall_stability, select_top

_LEAST_NORM = 1e-12  # of weights; keeps the score of a layer of zeros finite


def rgn(network, batches: Callable, cfg: Config) -> Selection:
    """Selects by gradient norm / weight norm, averaged over batches."""
    num_batches = cfg.num_betti_batches or 1
    scores = relative_gradient_norms(network, batches(cfg.batch_size, num_batches), num_batches)
    return select_top(network, cfg, scores.mean(axis=0).tolist(), stability=kendall_stability(scores))


def relative_gradient_norms(network, batches: Iterable, num_batches: int) -> np.ndarray:
    """Returns ||dL/dw|| / ||w|| of every candidate on every batch, for the mean loss L.

    Dropout is off, batch normalization runs by the network's policy, and nothing is
    updated.

    Args:
        network: models.Network.
        batches: iterable of (images, labels).
        num_batches: int. The largest number of batches, for the progress bar.

    Returns:
        float64 array of shape (batches, candidates).

    Raises:
        RunError: if a score is not finite.
    """
    from models.batchnorm import statistics_kept  # loads Keras

    weight_norms = np.maximum(_layer_norms(network, [weight.numpy() for weight in tensors(network)]), _LEAST_NORM)
    rows: list[np.ndarray] = []
    with statistics_kept(network.model, network.bn_stats):
        gradients_of = gradient_function(network, tensors(network))
        for images, labels in tqdm(batches, "Selection", num_batches, unit="batch", leave=False, disable=None):
            gradients = [gradient.numpy() for gradient in gradients_of(images, labels)]
            rows.append(_layer_norms(network, gradients) / weight_norms)
            for candidate, score in zip(network.candidates, rows[-1], strict=True):
                if not np.isfinite(score):
                    raise RunError(
                        f"relative gradient norms must be finite. Received: {score} in {candidate.path}, batch "
                        f"{len(rows)}; check the weights, or try --bn_stats batch."
                    )
    return np.array(rows)


def _layer_norms(network, arrays):
    """Returns the Euclidean norm of every candidate, from one array per tensor: float64 of shape (candidates,)."""
    squares = iter([np.sum(np.square(array, dtype=np.float64)) for array in arrays])
    return np.sqrt([sum(next(squares) for _ in candidate.weights) for candidate in network.candidates])
