"""The three memory figures of a training scheme, and measurements in a process of their own."""

import concurrent.futures.process
import multiprocessing
from collections.abc import Collection
from dataclasses import dataclass, replace

from core import environment
from core.config import Config
from core.errors import RunError
from memory.measure import Peak, measured_peak, measured_training_step


@dataclass(frozen=True)
class Figures:
    """The three figures of one training scheme, and the parts of the estimate.

    Attributes:
        measured_bytes: int or None. None if the device's allocator does not count.
        estimated_bytes: int.
        published_convention_mb: float. MB of 10^6 bytes.
        split: dict. Bytes at the estimated peak by their use.
        peak_at: str. Path of the layer at which the estimated peak occurs.
        device: str. The device of the measurement.
    """

    measured_bytes: int | None
    estimated_bytes: int
    published_convention_mb: float
    split: dict
    peak_at: str
    device: str


def figures(cfg: Config, num_classes: int) -> Figures:
    """Returns the Figures of a training step.

    Args:
        cfg: Config. Schemes that need images get digits.
        num_classes: int.
    """
    environment.load_tensorflow()
    from memory import convention, estimate

    network = build(cfg, num_classes)
    trained_weights = select(network, cfg).trained_weights
    _compile(network, trained_weights, cfg)
    predicted = estimate.of_training(network.model, _input_shape(cfg))
    measured = measure_peak(cfg, num_classes, "training", trained_weights)
    return Figures(
        measured_bytes=measured.bytes,
        estimated_bytes=predicted.bytes,
        published_convention_mb=convention.megabytes(network, trained_weights),
        split=predicted.split,
        peak_at=predicted.peak_at,
        device=measured.device,
    )


def measure_peak(
    cfg: Config, num_classes: int, what: str = "training", trained_weights: Collection[str] | None = None
) -> Peak:
    """Measures a peak in a new process, which no earlier computation can influence.

    Args:
        cfg: Config. Network, scheme, optimizer and batch size.
        num_classes: int.
        what: str. `inference`: the second forward pass on one resident batch;
            `selection`: the scheme's whole selection, on digits; `training`: a training
            step on one resident batch, as in `measured_training_step`.
        trained_weights: collection of str. Paths of the weights that train. None lets
            the scheme select.

    Raises:
        ValueError: if `what` is none of these.
        RunError: if the process is killed.
    """
    if what not in MEASUREMENTS:
        raise ValueError(f"`what` must be one of {', '.join(MEASUREMENTS)}. Received: {what!r}.")
    # A forked process would inherit what this one has allocated.
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_measure, cfg, num_classes, what, trained_weights).result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise RunError(
            f"the process that measures {what} was killed, probably for lack of memory; try a smaller --batch_size or "
            "--input_size."
        ) from error


def _measure(cfg, num_classes, what, trained_weights):
    """Runs in the new process of `measure_peak`."""
    environment.load_tensorflow()
    return MEASUREMENTS[what](build(cfg, num_classes), cfg, num_classes, trained_weights)


def _selection(network, cfg, num_classes, trained_weights):
    with measured_peak() as peak:
        select(network, cfg)
    return peak


def _inference(network, cfg, num_classes, trained_weights):
    import tensorflow as tf

    images, _ = _resident_batch(cfg, num_classes)
    forward = tf.function(lambda batch: network.model(batch, training=False), jit_compile=False)
    forward(images)
    with measured_peak() as peak:
        forward(images)
    return peak


def _training(network, cfg, num_classes, trained_weights):
    from models.freezing import changing_variables

    if trained_weights is None:
        trained_weights = select(network, cfg).trained_weights
    _compile(network, trained_weights, cfg)
    images, labels = _resident_batch(cfg, num_classes)
    peak, _ = measured_training_step(network.model, images, labels, changing_variables(network))
    return peak


MEASUREMENTS = {"selection": _selection, "inference": _inference, "training": _training}


def build(cfg: Config, num_classes: int):
    """Returns the models.Network of `cfg`, with the random weights that main.py would give it."""
    import models

    environment.seed_everything(cfg.seed)
    return models.build(cfg, num_classes)


def select(network, cfg: Config):
    """Returns the Selection of the scheme of `cfg`. Schemes that need images get digits."""
    from selection import SCHEMES

    scheme = SCHEMES[cfg.train_type]

    def batches(points, count):
        import data

        digits = data.load(replace(cfg, dataset_name="digits", num_classes=None, image_dir=None))
        return digits.selection_batches(points, count)

    scheme.measure(network, cfg, cfg.batch_size)
    scheme.check(network, cfg, cfg.batch_size)
    return scheme.select(network, batches, cfg)


def _compile(network, trained_weights, cfg):
    from models.compiling import compile_model, make_optimizer
    from models.freezing import freeze

    freeze(network.model, trained_weights)
    compile_model(network.model, make_optimizer(cfg, total_steps=100))


def _input_shape(cfg):
    return (cfg.batch_size, cfg.input_size, cfg.input_size, 3)


def _resident_batch(cfg, num_classes):
    import numpy as np
    import tensorflow as tf

    rng = np.random.default_rng(cfg.seed)
    images = tf.constant(rng.uniform(0, 255, _input_shape(cfg)).astype(np.float32))
    return images, tf.constant(rng.integers(0, num_classes, cfg.batch_size))
