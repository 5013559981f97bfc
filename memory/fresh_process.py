"""A training scheme's three figures, and measurements that nothing before can have touched."""

import concurrent.futures.process
import multiprocessing
from dataclasses import dataclass, replace

from core import environment
from core.errors import RunError
from memory.measure import measured_peak, measured_training_step


@dataclass(frozen=True)
class Figures:
    """The three figures of one training scheme, and what the estimate is made of.

    Attributes:
        measured_bytes: int or None. None where the device's allocator doesn't count.
        estimated_bytes: int.
        published_convention_mb: float. MB of 10^6 bytes.
        split: dict. Bytes at the estimated peak, by what they are for.
        peak_at: str. Path of the layer at which the estimated peak stands.
        device: str. Where the measurement was made.
    """

    measured_bytes: int | None
    estimated_bytes: int
    published_convention_mb: float
    split: dict
    peak_at: str
    device: str


def figures(cfg, num_classes):
    """Returns the Figures of a training step.

    Args:
        cfg: Config. Schemes that look at images see digits.
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


def measure_peak(cfg, num_classes, what="training", trained_weights=None):
    """Measures a peak in a fresh process, which nothing before can have touched.

    Args:
        cfg: Config. Network, scheme, optimizer and batch size.
        num_classes: int.
        what: str. ``inference``: the second forward pass on one resident batch;
            ``selection``: the scheme's whole selection, on digits; ``training``: a
            training step on one resident batch, see `measured_training_step`.
        trained_weights: collection of str. Paths of the weights that train; None
            lets the scheme select.

    Returns:
        Peak.
    """
    # Spawned, not forked: a fork would inherit what this process has allocated.
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_measure, cfg, num_classes, what, trained_weights).result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise RunError(
            f"the process that measured {what} was ended from outside, as a system does that runs out of memory; "
            "try a smaller --batch_size or --input_size."
        ) from error


def _measure(cfg, num_classes, what, trained_weights):
    """What `measure_peak` runs in the fresh process."""
    environment.load_tensorflow()
    network = build(cfg, num_classes)
    if what == "selection":
        with measured_peak() as peak:
            select(network, cfg)
        return peak
    images, labels = _resident_batch(cfg, num_classes)
    if what == "inference":
        import tensorflow as tf

        forward = tf.function(lambda batch: network.model(batch, training=False), jit_compile=False)
        forward(images)
        with measured_peak() as peak:
            forward(images)
        return peak
    if what != "training":
        raise ValueError(f"inference, selection or training can be measured. Received: {what!r}")
    if trained_weights is None:
        trained_weights = select(network, cfg).trained_weights
    _compile(network, trained_weights, cfg)
    from models.freezing import changing_variables

    peak, _ = measured_training_step(network.model, images, labels, changing_variables(network))
    return peak


def build(cfg, num_classes):
    """Returns the models.Network of `cfg`, seeded as main.py seeds it."""
    import models

    environment.seed_everything(cfg.seed)
    return models.build(cfg, num_classes)


def select(network, cfg):
    """Returns what the scheme of `cfg` selects; one that looks at images sees digits."""
    from selection import SCHEMES

    scheme = SCHEMES[cfg.train_type]

    def batches(points, count):
        import data

        # Which classes the digits have plays no role: a selection reads no label's value.
        digits = data.load(replace(cfg, dataset_name="digits", num_classes=None, image_dir=None))
        return digits.selection_batches(points, count)

    scheme.measure(network, cfg, cfg.batch_size)
    scheme.check(network, cfg, cfg.batch_size)
    return scheme.select(network, batches, cfg)


def _compile(network, trained_weights, cfg):
    from models.compiling import compile_model, make_optimizer
    from models.freezing import freeze

    freeze(network, trained_weights)
    compile_model(network.model, make_optimizer(cfg, total_steps=100))


def _input_shape(cfg):
    return (cfg.batch_size, cfg.input_size, cfg.input_size, 3)


def _resident_batch(cfg, num_classes):
    import numpy as np
    import tensorflow as tf

    rng = np.random.default_rng(cfg.seed)
    images = tf.constant(rng.uniform(0, 255, _input_shape(cfg)).astype(np.float32))
    return images, tf.constant(rng.integers(0, num_classes, cfg.batch_size))
