"""Peak memory of a network: measured, estimated, and by the published convention.

    python memory_utils.py --model_name resnet50 --train_type act_norm_betti_train --rho 0.1 --batch_size 32

prints all three for one training scheme. `--json` prints them as one line of JSON, and
`--figure FILE.png` draws the published plot twice, by its convention and as measured.
The three figures are never mixed:

* Measured (`memory/measure.py`): the peak of TensorFlow's allocator on the device in
  use, in a new process (`memory/fresh_process.py`).
* Estimated (`memory/estimate.py`): from the traced training step, before it runs.
* Published convention (`memory/convention.py`): only for comparison with the paper's plot.

`measure_training_peak` and `estimate_training_peak` do the first two for any compiled Keras
model, in the calling process:

    from memory_utils import estimate_training_peak, measure_training_peak

    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
    print(estimate_training_peak(model, (32, 224, 224, 3)).bytes)
    print(measure_training_peak(model, (images, labels)).bytes)
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core import environment  # noqa: F401  (before TensorFlow is imported)
from core.config import Config
from core.errors import RunError, UsageError
from core.log import log
from core.units import MB
from memory.fresh_process import Figures, figures, measure_peak
from memory.measure import Peak, measured_peak, measured_training_step, peak_rss_bytes

if TYPE_CHECKING:
    import keras

    from memory.estimate import Estimate

__all__ = [
    "Figures", "Peak", "estimate_training_peak", "figures", "main", "measure_peak", "measure_training_peak",
    "measured_peak", "measured_training_step", "parse", "peak_rss_bytes", "table",
]  # fmt: skip


# The flags of main.py that the memory of a step depends on. The defaults that differ are
# those of the published plot.
_FLAGS = [
    "model_name",
    "model_alpha",
    "custom_objects",
    "keep_head",
    "preprocessing",
    "train_type",
    "rho",
    "batch_size",
    "input_size",
    "num_classes",
    "layers",
    "exclude_layers",
    "num_betti_batches",
    "optimizer",
    "momentum",
    "weights",
    "bn_stats",
    "dropout",
    "head_init",
    "global_clipnorm",
    "weight_decay",
    "seed",
    "data_dir",
    "debug",
]
_DEFAULTS = {"input_size": 224, "num_classes": 37}


def measure_training_peak(model: keras.Model, batch: tuple[Any, Any]) -> Peak:
    """Measures the allocator's peak over training steps on one batch, and undoes the steps.

    Up to four steps run, and the median of all except the first counts. Afterwards every
    weight, statistic, random state and optimizer slot has its former value; metrics are
    reset. The peak contains all that TensorFlow holds on the device, other models of the
    process included.

    Args:
        model: keras.Model. Compiled, and frozen as it will train.
        batch: tuple (inputs, labels) of arrays or tensors with B entries each, or of
            structures of them.

    Returns:
        Peak. Its `bytes` is None if the device's allocator does not count, which one
        warning reports. A CPU's counts if this module is imported before TensorFlow.

    Raises:
        ValueError: if the model is not compiled or `batch` is not such a tuple.
    """
    import tensorflow as tf

    _check_compiled(model)
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"`batch` must be a tuple (inputs, labels). Received: {type(batch).__name__}.")
    inputs, labels = (tf.nest.map_structure(tf.convert_to_tensor, part) for part in batch)
    model._symbolic_build(data_batch=(inputs, labels))  # creates the variables, as `fit` does
    peak, _ = measured_training_step(model, inputs, labels, model.variables)
    return peak


def estimate_training_peak(model: keras.Model, batch_shape: tuple | list[tuple]) -> Estimate:
    """Estimates the peak memory of a training step without running it.

    The estimate contains the model and its optimizer, but no other model of the process.
    It describes TensorFlow's own kernels on a CPU. Keras compiles a step with XLA unless
    the model was compiled with `jit_compile=False`, and XLA plans its memory differently:
    one warning reports that. Labels are class indices for a sparse loss; otherwise they
    have the shape of the output.

    Args:
        model: keras.Model. Compiled, and frozen as it will train, with one output.
        batch_shape: tuple (B, ...), the shape of the inputs; or a list of such tuples, one
            per input of the model.

    Returns:
        Estimate: `bytes`, `split` (bytes at the peak by their use) and `peak_at` (path of
        the layer at which the peak occurs).

    Raises:
        ValueError: if the model is not compiled or has several outputs.
    """
    from memory import estimate

    _check_compiled(model)
    if model.jit_compile:
        log.warning("The estimate describes a step without XLA, which jit_compile=False turns off.")
    return estimate.of_training(model, batch_shape)


def _check_compiled(model):
    if not model.compiled or model.optimizer is None:
        raise ValueError(f"`model` must be compiled. Received: {model.name}; call its `compile` first.")


def parse(argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """Returns the Config of the command line, and its flags `json` and `figure`.

    Args:
        argv: list of str, without the program's name.
    """
    from run import flags

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 2 for wrong use, 1 for a failure."""
    from run import flags
    from run import folder as run_folder

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
        if flags.is_debug(argv):
            traceback.print_exc()
        known = isinstance(error, (UsageError, RunError))
        log.error("%s%s", "" if known else f"{type(error).__name__}: ", " ".join(str(error).split()))
        return 2 if isinstance(error, UsageError) else 1
    print(json.dumps(found.__dict__) if own.json else table(cfg, found))
    return 0


def table(cfg: Config, found: Figures) -> str:
    """Returns the figures as text."""
    from memory import convention  # imports Keras

    measured = "not measured" if found.measured_bytes is None else f"{found.measured_bytes / MB:,.1f} MB"
    lines = [
        f"{cfg.model_name}, {cfg.train_type}, batch {cfg.batch_size}, {cfg.input_size} px, {cfg.optimizer}",
        f"  measured              {measured:>14}  on {found.device}, a step in a fresh process",
        f"  estimated             {found.estimated_bytes / MB:>11,.1f} MB  peak at {found.peak_at}",
        *(f"    {part:<19} {size / MB:>11,.1f} MB" for part, size in found.split.items()),
        f"  published convention  {found.published_convention_mb:>11,.1f} MB  (the plot, batch {convention.BATCH})",
    ]
    note = convention.note(cfg.batch_size)
    return "\n".join([*lines, *([f"  {note}"] if note else [])])


if __name__ == "__main__":
    sys.exit(main())
