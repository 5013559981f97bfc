"""Peak memory of a network: measured, estimated, and by the published convention.

    python memory_utils.py --model_name resnet50 --train_type act_norm_betti_train --rho 0.1 --batch_size 32

prints all three for one training scheme. `--json` prints them as one line of JSON, and
`--figure FILE.png` draws the published plot twice, by its convention and as measured.
The three figures are never mixed:

* Measured (`memory/measure.py`): the peak of TensorFlow's allocator on the device in
  use, in a new process (`memory/fresh_process.py`).
* Estimated (`memory/estimate.py`): from the traced training step, before it runs.
* Published convention (`memory/convention.py`): only for comparison with the paper's plot.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Sequence

from core import environment  # noqa: F401  (before TensorFlow is imported)
from core.config import Config
from core.errors import RunError, UsageError
from core.units import MB
from memory.fresh_process import Figures, figures, measure_peak
from memory.measure import measured_peak, measured_training_step, peak_rss_bytes

__all__ = [
    "Figures", "figures", "main", "measure_peak", "measured_peak", "measured_training_step", "parse", "peak_rss_bytes",
    "table",
]  # fmt: skip

log = logging.getLogger("adabet")


# The flags of main.py that the memory of a step depends on. The defaults that differ are
# those of the published plot.
_FLAGS = [
    "model_name",
    "train_type",
    "rho",
    "batch_size",
    "input_size",
    "num_classes",
    "layers",
    "exclude_layers",
    "num_betti_batches",
    "optimizer",
    "weights",
    "bn_stats",
    "dropout",
    "global_clipnorm",
    "weight_decay",
    "seed",
    "data_dir",
    "debug",
]
_DEFAULTS = {"input_size": 224, "num_classes": 37}


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
        if "--debug" in argv:
            traceback.print_exc()
        known = isinstance(error, (UsageError, RunError))
        log.error("%s%s", "" if known else f"{type(error).__name__}: ", " ".join(str(error).split()))
        return 2 if isinstance(error, UsageError) else 1
    print(json.dumps(found.__dict__) if own.json else table(cfg, found))
    return 0


def table(cfg: Config, found: Figures) -> str:
    """Returns the figures as text."""
    from memory.convention import BATCH  # imports Keras

    measured = "not measured" if found.measured_bytes is None else f"{found.measured_bytes / MB:,.1f} MB"
    lines = [
        f"{cfg.model_name}, {cfg.train_type}, batch {cfg.batch_size}, {cfg.input_size} px, {cfg.optimizer}",
        f"  measured              {measured:>14}  on {found.device}, a step in a fresh process",
        f"  estimated             {found.estimated_bytes / MB:>11,.1f} MB  peak at {found.peak_at}",
        *(f"    {part:<19} {size / MB:>11,.1f} MB" for part, size in found.split.items()),
        f"  published convention  {found.published_convention_mb:>11,.1f} MB  (plot of the paper, batch {BATCH})",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
