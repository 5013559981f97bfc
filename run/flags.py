"""The command line's flags, and their way into one frozen Config.

Defaults that hang on the data set or the scheme stand in those tables' rows;
choices and help lines are read from the tables too. No framework is loaded
here, so --help and a wrong flag answer at once.
"""

import argparse
import logging
import math
import os
from dataclasses import fields
from pathlib import Path

from core.config import Config
from core.errors import UsageError
from core.strategy import STRATEGIES
from core.strategy import check as check_strategy
from data import DATASETS, dataset_row
from export import FROZEN
from models import BACKBONES, check_input_size, check_weights
from run import folder as run_folder
from selection import ALIASES, SCHEMES, SELECTION_FLAGS
from selection.betti import MIN_POINTS

log = logging.getLogger("adabet")


def parse(argv):
    """Turns arguments into a Config.

    Args:
        argv: list of str, without the program's name.

    Returns:
        Config.

    Raises:
        SystemExit: --help, or a flag that argparse refuses, in one line on stderr.
        UsageError: flags that contradict each other, the tables, or the run that is
            to be resumed.
    """
    argv = without_doubled_flags(argv)
    args = make_parser().parse_args(argv)
    if args.resume is False:
        return resolve(args)
    folder = _folder_to_resume(args)
    record = run_folder.recorded(folder)
    known = {field.name: record[field.name] for field in fields(Config) if field.name in record} if record else {}
    if record and record.get("bn_stats") is None:
        known.pop("bn_stats", None)  # a network without normalisation
    # The run's own flags are the defaults; what is written on this command line comes on top.
    place = {"log_dir": str(folder.parent), "run_name": folder.name}
    args = make_parser().parse_args(argv, argparse.Namespace(**{**known, **place}))
    args.resume = True
    cfg = resolve(args)
    if os.path.abspath(Path(cfg.log_dir, cfg.run_name)) != os.path.abspath(folder):
        raise UsageError(
            f"--resume names the run by itself. Received: {folder}, and --run_name {cfg.run_name} in --log_dir "
            f"{cfg.log_dir}; leave these out."
        )
    changed = run_folder.differing_flags(cfg, record) if record else []
    if changed:
        told = ", ".join(f"--{name} {getattr(cfg, name)} (was {record.get(name)})" for name in changed)
        raise UsageError(
            f"a resumed run keeps every flag that changes its result. Received: {told}; leave that out, or start a new "
            "run under another --run_name."
        )
    return cfg


def _folder_to_resume(args):
    """Returns the run folder that `--resume` means, a pathlib.Path."""
    if args.list_layers or args.prepare_only:
        raise UsageError(
            "--resume goes on with a run. Received: --list_layers or --prepare_only too; leave out one of them."
        )
    if args.resume is True:
        if args.run_name is None:
            raise UsageError(
                "--resume needs the run that it is to go on with. Received: neither RUN_FOLDER nor --run_name; give one."
            )
        return Path(args.log_dir, args.run_name)
    folder = Path(os.path.abspath(args.resume)) if Path(args.resume).name in ("", "..") else Path(args.resume)
    if not (folder / "config.json").exists():
        raise UsageError(
            f"--resume takes the folder of a run, with its config.json. Received: {args.resume}; "
            + (
                "a run that ended before it wrote that is started again by its own flags, --run_name and --resume."
                if folder.is_dir()
                else "there is no such folder, check the path."
            )
        )
    return folder


def make_parser():
    """Returns the argparse parser of the command line."""
    parser = _OneLineParser(
        prog="main.py",
        description="Fine-tune a pretrained network by training only the layers with the richest topology (AdaBet).",
        epilog="Exit codes: 0 done, 1 failed while running, 2 wrong use or bad input, 130/143 interrupted.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("network")
    group.add_argument("--model_name", choices=BACKBONES, default=Config.model_name, help=f"{_rows(BACKBONES)}\n{_D}")
    group.add_argument(
        "--weights",
        default=Config.weights,
        metavar="{auto,imagenet,none,PATH}",
        help="auto: ImageNet, or random weights with a warning where that can't be had;\n"
        "imagenet: that or an error; none: random; PATH: a .keras, .weights.h5 or .h5 file\n" + _D,
    )
    group.add_argument(
        "--input_size",
        type=_integer(1),
        help=f"side of the square input in pixels\n(default: {_by_data('input_size')})",
    )
    group.add_argument(
        "--bn_stats",
        choices=("auto", "stored", "batch"),
        default=Config.bn_stats,
        help="statistics of batch normalisation while training;\nauto: stored for pretrained weights, batch for random "
        "ones\n" + _D,
    )
    group.add_argument(
        "--dropout", type=_real(0, 1, open_high=True), default=Config.dropout, help="before the head\n" + _D
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_name",
        default=Config.dataset_name,
        help=f"{_rows(DATASETS)}\nor any TFDS name with an image and a label\n{_D}",
    )
    group.add_argument("--image_dir", help="folder of images for --dataset_name image_folder")
    group.add_argument(
        "--skip_bad_images",
        **_switch(False),
        help="leave out, and list, images of --image_dir that can't be read,\ninstead of refusing the folder\n" + _D,
    )
    group.add_argument("--data_dir", help="TFDS folder (default: TFDS's own, ~/tensorflow_datasets)")
    group.add_argument("--prepare_only", **_switch(False), help="fetch the data set and the ImageNet weights, and stop")
    group.add_argument("--num_classes", type=_integer(2), help="only checks the data, which say their own count")
    group.add_argument(
        "--protocol",
        choices=("validation", "paper"),
        default=Config.protocol,
        help="validation: the epoch is chosen on held-out training images, test is read once;\n"
        "paper: the best test epoch is reported, as published\n" + _D,
    )
    group.add_argument(
        "--augment", **_switch(Config.augment), help="random flips and rotations of training images\n" + _D
    )
    group.add_argument("--limit_train", type=_integer(1), help="training images to use, stratified (default: all)")
    group.add_argument("--limit_test", type=_integer(1), help="test images to use, stratified (default: all)")

    group = parser.add_argument_group("selection")
    group.add_argument(
        "--train_type",
        choices=[*SCHEMES, *ALIASES],
        default=Config.train_type,
        metavar="SCHEME",
        help=f"{_rows(SCHEMES)}\n{_D}",
    )
    group.add_argument(
        "--rho",
        type=_real(0, 1, open_low=True),
        help="share of the layers that train; for elastic_training, of a full step's time\n"
        f"(default: {_by_scheme('rho', lambda row: 'rho' in row.reads)})",
    )
    group.add_argument(
        "--interval",
        type=_integer(1),
        help=f"epochs between re-selections or prunings, for schemes that have them (default: {_INTERVAL})",
    )
    group.add_argument(
        "--timing",
        choices=TIMINGS,
        help="for elastic_training: what a weight's training costs, measured on this device or counted in FLOPs\n"
        f"(default: {TIMINGS[0]})",
    )
    group.add_argument(
        "--num_betti_batches",
        type=_integer(1),
        default=None,
        help=f"point clouds the ranking looks at (default: {_BATCHES})",
    )
    group.add_argument(
        "--betti_points",
        type=_integer(MIN_POINTS),
        help="images in a point cloud, whatever the batch of the training (default: --batch_size)",
    )
    group.add_argument("--layers", help="for listed_layers: a regular expression on layer paths, or @FILE with a list")
    group.add_argument("--exclude_layers", metavar="REGEX", help="layers that must not be chosen")
    group.add_argument(
        "--memory_budget_mb",
        type=_real(0, math.inf, open_low=True, open_high=True),
        metavar="MB",
        help="train the longest prefix of the ranking whose estimated peak memory fits (1 MB is 10^6 bytes);\n"
        "instead of --rho, or under it where both are given",
    )
    group.add_argument("--list_layers", **_switch(False), help="print the candidate layers' paths, and stop")
    group.add_argument("--select_only", **_switch(False), help="rank the layers, write the selection, and stop")

    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=_integer(1), default=Config.batch_size, help=_D)
    group.add_argument("--num_epochs", type=_integer(1), help=f"(default: {_by_data('num_epochs')})")
    group.add_argument(
        "--optimizer", choices=("sgd", "adam"), default=Config.optimizer, help="sgd has momentum 0.9\n" + _D
    )
    group.add_argument(
        "--learning_rate",
        type=_real(0, math.inf, open_low=True, open_high=True),
        help=f"first value of a cosine decay to 0\n(default: {_by_scheme('learning_rate')})",
    )
    group.add_argument(
        "--weight_decay", type=_real(0, math.inf, open_high=True), default=Config.weight_decay, help="decoupled\n" + _D
    )
    group.add_argument(
        "--global_clipnorm",
        type=_real(0, math.inf, open_high=True),
        default=Config.global_clipnorm,
        help="largest norm of a step's gradient; 0 is off\n" + _D,
    )
    group.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default=Config.strategy,
        help="mirrored: each batch is split over the devices of this machine\n" + _D,
    )
    group.add_argument(
        "--checkpoint_minutes",
        type=_real(0, math.inf, open_high=True),
        default=Config.checkpoint_minutes,
        metavar="MINUTES",
        help="a checkpoint is written at the end of every epoch, and so often within long ones;\n0: after every step\n"
        + _D,
    )
    group.add_argument("--seed", type=_integer(0), default=Config.seed, help=_D)

    group = parser.add_argument_group("output")
    group.add_argument("--log_dir", default=Config.log_dir, help="folder of the run folders\n" + _D)
    group.add_argument("--run_name", help="(default: made from model, data set, scheme, rho and seed)")
    group.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=Config.resume,
        metavar="RUN_FOLDER",
        help="go on with a run that was cut off, by its own flags; bare: with the run of --run_name, or start it",
    )
    group.add_argument("--save_model", **_switch(False), help="write model.keras, which plain Keras loads\n" + _D)
    group.add_argument("--save_txt", **_switch(False), help="write RUN_NAME.txt with hours and accuracy\n" + _D)
    group.add_argument(
        "--save_litert", **_switch(False), help="write model.tflite, which LiteRT trains further on a device\n" + _D
    )
    group.add_argument(
        "--litert_momentum",
        type=_real(0, 1, open_high=True),
        default=Config.litert_momentum,
        help="momentum of SGD in model.tflite; 0 leaves out its variables\n" + _D,
    )
    group.add_argument(
        "--litert_batch", type=_integer(1), help="images of a training step in model.tflite (default: --batch_size)"
    )
    group.add_argument(
        "--litert_frozen",
        choices=FROZEN,
        default=Config.litert_frozen,
        help="how model.tflite stores the large weights that do not train\n" + _D,
    )
    group.add_argument("--debug", **_switch(False), help="show tracebacks\n" + _D)
    return parser


_D = "(default: %(default)s)"
_BATCHES = Config.num_betti_batches
_INTERVAL = 4  # epochs
_LARGEST = 2**31 - 1  # integer that the frameworks take everywhere
TIMINGS = ("measured", "flops")
LITERT_FLAGS = ("litert_momentum", "litert_batch", "litert_frozen")


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is what --help is for."""

    def error(self, message):
        self.exit(2, f"Error: {' '.join(message.split())} (--help lists the flags)\n")


def _rows(table):
    width = max(map(len, table))
    return "\n".join(f"{name:<{width}}  {row.help}" for name, row in table.items()).replace("%", "%%")


def _by_data(field):
    return f"{getattr(DATASETS['digits'], field)} for digits, {getattr(dataset_row(''), field)} for photos"


def _by_scheme(field, applies=lambda row: True):
    """Says a default of the schemes' rows: the commonest value, and who differs."""
    values = {name: getattr(row, field) for name, row in SCHEMES.items() if applies(row)}
    common = max(values.values(), key=list(values.values()).count)
    others = {}
    for name, value in values.items():
        if value != common:
            others.setdefault(value, []).append(name)
    return f"{common:g}" + "".join(f"; {value:g} for {', '.join(names)}" for value, names in others.items())


def _switch(default):
    return {"type": _boolean, "nargs": "?", "const": True, "default": default, "metavar": "BOOL"}


def _boolean(text):
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be true or false (also 1, yes, 0, no). Received: {text!r}")
    return values[text.lower()]


def _integer(least):
    rule = f"at least {least} and at most {_LARGEST}"

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= _LARGEST:
            raise argparse.ArgumentTypeError(f"must be a whole number {rule}. Received: {text!r}")
        return value

    return parse


def _real(low, high, open_low=False, open_high=False):
    rule = f"{'over' if open_low else 'at least'} {low:g}"
    if math.isfinite(high):
        rule += f" and {'under' if open_high else 'at most'} {high:g}"

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
        if not inside:  # NaN is inside of nothing
            raise argparse.ArgumentTypeError(f"must be a number {rule}. Received: {text!r}")
        return value

    return parse


def without_doubled_flags(argv):
    """Drops a flag that is at once followed by itself, as the published example has it.

    Args:
        argv: list of str.
    """
    return [
        word for word, following in zip(argv, [*argv[1:], None]) if not (word.startswith("--") and word == following)
    ]


def resolve(args):
    """Fills in the defaults that hang on the data set and the scheme, and checks what can be checked at once.

    Args:
        args: argparse.Namespace.

    Returns:
        Config.

    Raises:
        UsageError: flags that contradict each other or the tables.
    """
    given = dict(vars(args))
    given["train_type"] = ALIASES.get(args.train_type, args.train_type)
    scheme, dataset = SCHEMES[given["train_type"]], dataset_row(args.dataset_name)
    if args.layers is not None and "layers" not in scheme.reads:
        raise UsageError(
            f"--layers goes with --train_type listed_layers. Received: --train_type {given['train_type']}; change "
            "one of them."
        )
    if args.layers is None and "layers" in scheme.reads:
        raise UsageError(
            f"{given['train_type']} trains the layers that --layers names. Received: no --layers; give a regular "
            "expression or @FILE."
        )
    unread = sorted(flag for flag in SELECTION_FLAGS - scheme.reads if given[flag] is not None)
    if unread:
        log.warning("%s does not read %s: ignored.", given["train_type"], ", ".join(f"--{flag}" for flag in unread))
    defaults = {
        "rho": scheme.rho,
        "num_betti_batches": _BATCHES,
        "interval": _INTERVAL,
        "timing": TIMINGS[0],
        "learning_rate": scheme.learning_rate,
        "input_size": dataset.input_size,
        "num_epochs": dataset.num_epochs,
    }
    for flag in SELECTION_FLAGS - scheme.reads:
        given[flag] = defaults[flag] = None
    if given["memory_budget_mb"] is not None:
        defaults["rho"] = None  # the budget takes its place
    given.update({flag: value for flag, value in defaults.items() if given[flag] is None})
    check_input_size(args.model_name, given["input_size"])
    check_weights(args.weights)
    litert = [f"--{flag}" for flag in LITERT_FLAGS if given[flag] != getattr(Config, flag)]
    if litert and not args.save_litert:
        raise UsageError(f"{', '.join(litert)} needs --save_litert. Received: no --save_litert; add it.")
    cfg = Config(**given)
    check_strategy(cfg, reselects="interval" in scheme.reads)
    return cfg
