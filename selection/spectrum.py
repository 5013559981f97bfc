"""Layers ranked by the signal-to-noise ratio of their kernels' singular values (arXiv 2406.06623).

Weights alone decide: no image, label or gradient is used (Hartford et al. 2024,
"Spectrum: Targeted Training on Signal to Noise Ratio").

From the source: singular values above a Marchenko-Pastur threshold are signal, the others
noise, and the score is sum(signal) / sum(noise) / largest value. For a matrix of m x n with
m <= n, the threshold is sigma * (1 + sqrt(m / n)), where sigma is the interquartile range
of the singular values over 1.349.

What differs:

* The source ranks language models' matrices within each kind of layer. Here one ranking
  holds all layers, and a convolution's kernel is a matrix of inputs x output channels.
* A layer without a kernel (a normalization) has the score 0. So has a kernel whose singular
  values show no noise, such as one of rank 1, where the source has infinity.
"""

from collections.abc import Callable

import numpy as np

from core.config import Config
from core.errors import RunError
from selection.ranking import Selection, select_top

_IQR_OF_NORMAL = 1.349  # interquartile range of a normal distribution, in standard deviations


def spectrum(network, batches: Callable, cfg: Config) -> Selection:
    """Selects by the signal-to-noise ratio of kernels."""
    return select_top(network, cfg, [_score(candidate) for candidate in network.candidates])


def signal_to_noise(matrix: np.ndarray) -> float:
    """Returns the signal-to-noise ratio of a matrix's singular values, over the largest of them.

    Args:
        matrix: float array of shape (m, n), finite.

    Returns:
        float. 0 if no singular value is above the threshold, or if those below it are zero
        within float32's rounding.
    """
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    low, high = np.quantile(values, (0.25, 0.75))
    threshold = (high - low) / _IQR_OF_NORMAL * (1 + np.sqrt(min(matrix.shape) / max(matrix.shape)))
    signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
    rounding = max(matrix.shape) * np.finfo(np.float32).eps * values[0]
    return float(signal / noise / values[0]) if noise > rounding else 0.0


def _score(candidate):
    from models.channels import num_channels, output_axes  # loads TensorFlow

    axes = output_axes(candidate.layer)
    if not axes:
        return 0.0
    kernel = candidate.layer.kernel.numpy()
    if not np.isfinite(kernel).all():
        raise RunError(
            f"weights must be finite to be ranked. Received: NaN or infinity in {candidate.layer.kernel.path}; check "
            "the weights."
        )
    outputs_last = np.moveaxis(kernel, axes, range(-len(axes), 0))
    return signal_to_noise(outputs_last.reshape(-1, num_channels(candidate.layer)))
