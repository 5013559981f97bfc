"""Peak memory of a network: measured, estimated, and by the published convention.

    python memory_utils.py --model_name resnet50 --train_type act_norm_betti_train --rho 0.1 --batch_size 32

prints all three for one training scheme; `--json` prints them as one line, and
`--figure FILE.png` draws the published plot twice, by its convention and as
measured. The three figures are never mixed:

* Measured, here: the peak of the framework's allocator on the device in use. On
  a CPU that takes the allocator that runtime.py chooses; on a GPU every
  allocator counts. What counts is all that TensorFlow holds there: weights,
  optimizer state, activations, gradients and workspace. Memory of NumPy and
  gudhi doesn't; the process's peak resident size, beside it, has everything.
* Estimated, in memory/estimate.py: from the traced training step, before it runs.
* Published convention, in memory/convention.py: only to compare with the paper's plot.
"""

import argparse
import concurrent.futures.process
import contextlib
import gc
import json
import logging
import multiprocessing
import resource
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, replace

import runtime
from errors import RunError, UsageError

log = logging.getLogger("adabet")

MEASURED_STEPS = 3
MEASURING_S = 10.0  # no further step is begun after so many seconds


@dataclass
class Peak:
    """What a `measured_peak` block found.

    Attributes:
        bytes: int or None. The allocator's peak inside the block; None where
            this device's allocator doesn't count.
        device: str. Where, e.g. ``CPU:0``.
    """

    bytes: int | None
    device: str


@contextlib.contextmanager
def measured_peak():
    """Measures the allocator's peak over the block.

    Yields:
        Peak, filled in when the block ends.
    """
    import tensorflow as tf

    peak = Peak(None, runtime.device())
    try:
        tf.config.experimental.reset_memory_stats(peak.device)
    except ValueError as error:
        log.warning("The memory of %s can't be measured: %s", peak.device, error)
        yield peak
        return
    yield peak
    peak.bytes = tf.config.experimental.get_memory_info(peak.device)["peak"]


def peak_rss_bytes():
    """Returns the largest resident size that this process has had so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # kibibytes everywhere but on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured_training_step(model, images, labels, changing):
    """Measures training steps on one resident batch, and undoes them.

    The first step traces and warms up; the second to fourth are measured, fewer
    where they take long, and their median counts. One step alone can be far off:
    which chunks it gets hangs on how threads happened to interleave, and the head of
    ResNet50 took 185 MB in one process and 233 MB in the next. Afterwards every
    weight, statistic, random state and optimizer slot has its former value, to the
    last bit.

    Args:
        model: compiled keras.Model.
        images: float32 tensor of shape (B, S, S, 3).
        labels: int tensor of shape (B,).
        changing: list of keras.Variable. All of the model's that a training
            step can change.

    Returns:
        peak: Peak, the median of the measured steps.
        first_step_s: float. Seconds of the first step, tracing included.
    """
    gc.collect()  # the optimizers and traces of earlier compilations, such as a budget's, are in cycles
    with model.distribute_strategy.scope():
        model.optimizer.build(model.trainable_variables)
    state = [*changing, *model.optimizer.variables]
    before = [variable.numpy() for variable in state]

    start = time.perf_counter()
    model.train_on_batch(images, labels)
    first_step_s = time.perf_counter() - start
    peaks, start = [], time.perf_counter()
    while len(peaks) < MEASURED_STEPS and (not peaks or time.perf_counter() - start < MEASURING_S):
        with measured_peak() as peak:
            model.train_on_batch(images, labels)
        peaks.append(peak)

    for variable, value in zip(state, before):
        variable.assign(value)
    model.reset_metrics()
    if peak.bytes is not None:
        peak = Peak(statistics.median_low(one.bytes for one in peaks), peak.device)
    return peak, first_step_s


def estimated_training_step(model, input_shape):
    """Returns the estimated peak of a training step in bytes, before any has run; None where there is no estimate.

    What a run reports besides is not worth ending it: a step that can't be traced
    or followed is said, and leaves no figure.
    """
    from memory import estimate

    try:
        return estimate.of_training(model, tuple(input_shape)).bytes
    except Exception as error:
        log.warning("The peak memory can't be estimated: %s", " ".join(str(error).split()))
        return None


def convention_mb(network, trained_weights):
    """Returns the peak memory by the published convention, in MB of 10^6 bytes."""
    from memory import convention

    return convention.megabytes(network, trained_weights)


# ---------------------------------------------------------------- a scheme's three figures


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
    runtime.load_tensorflow()
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
    runtime.load_tensorflow()
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
    from train import changing_variables

    peak, _ = measured_training_step(network.model, images, labels, changing_variables(network))
    return peak


def build(cfg, num_classes):
    """Returns the models.Network of `cfg`, seeded as main.py seeds it."""
    import models

    runtime.seed_everything(cfg.seed)
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

    scheme.check(network, cfg, cfg.batch_size)
    return scheme.select(network, batches, cfg)


def _compile(network, trained_weights, cfg):
    import train
    from optimizers import compile_model, make_optimizer

    train.freeze(network, trained_weights)
    compile_model(network.model, make_optimizer(cfg, total_steps=100))


def _input_shape(cfg):
    return (cfg.batch_size, cfg.input_size, cfg.input_size, 3)


def _resident_batch(cfg, num_classes):
    import numpy as np
    import tensorflow as tf

    rng = np.random.default_rng(cfg.seed)
    images = tf.constant(rng.uniform(0, 255, _input_shape(cfg)).astype(np.float32))
    return images, tf.constant(rng.integers(0, num_classes, cfg.batch_size))


# ---------------------------------------------------------------- the command line


# The flags of main.py that a step's memory hangs on, with main.py's meaning; the
# defaults that differ are those of the published figure.
_FLAGS = (
    "model_name train_type rho batch_size input_size num_classes layers exclude_layers num_betti_batches optimizer "
    "weights bn_stats dropout global_clipnorm weight_decay seed data_dir debug"
).split()
_DEFAULTS = {"input_size": 224, "num_classes": 37}


def parse(argv):
    """Returns (Config, what else was asked for) of the command line.

    Args:
        argv: list of str, without the program's name.
    """
    import flags

    everything = flags.make_parser()
    parser = type(everything)(
        prog="memory_utils.py",
        description="Peak memory of a training step: measured in a fresh process, estimated before running it, and "
        "by the published convention.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    for action in everything._actions:
        if action.dest in _FLAGS:
            parser._add_action(action)
    parser.set_defaults(**_DEFAULTS)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--figure", metavar="FILE.png", help="draw the published plot, by convention and as measured")
    args = parser.parse_args(flags.without_doubled_flags(argv), everything.parse_args([]))
    own = argparse.Namespace(json=args.json, figure=args.figure)
    del args.json, args.figure
    return flags.resolve(args), own


def main(argv=None):
    """Runs the command line; returns the exit code: 0, 2 for wrong use, 1 for a failure."""
    import run_folder

    argv = sys.argv[1:] if argv is None else argv
    run_folder.set_up_logging()
    try:
        cfg, own = parse(argv)
        if own.figure:
            from memory import figure

            print(figure.draw(cfg, own.figure))
            return 0
        found = figures(cfg, cfg.num_classes)
    except SystemExit as stop:
        return stop.code
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        known = isinstance(error, (UsageError, RunError))
        log.error("%s%s", "" if known else f"{type(error).__name__}: ", " ".join(str(error).split()))
        return 2 if isinstance(error, UsageError) else 1
    print(json.dumps(found.__dict__) if own.json else table(cfg, found))
    return 0


def table(cfg, found):
    """Returns Figures as text for people."""
    unit = 10**6
    measured = "not measured" if found.measured_bytes is None else f"{found.measured_bytes / unit:,.1f} MB"
    lines = [
        f"{cfg.model_name}, {cfg.train_type}, batch {cfg.batch_size}, {cfg.input_size} px, {cfg.optimizer}",
        f"  measured              {measured:>14}  on {found.device}, a step in a fresh process",
        f"  estimated             {found.estimated_bytes / unit:>11,.1f} MB  peak at {found.peak_at}",
        *(f"    {part:<19} {size / unit:>11,.1f} MB" for part, size in found.split.items()),
        f"  published convention  {found.published_convention_mb:>11,.1f} MB  (the paper's plot; not what a step needs)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    # Not this copy of the module: a fresh process has to find what it runs by name.
    import memory_utils

    sys.exit(memory_utils.main())
