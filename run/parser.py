"""The command line's flags, as argparse sees them.

Choices, defaults and help lines come from the tables of models, data and schemes.
No framework is imported here, so that --help and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from core.config import Config
from core.strategy import STRATEGIES
from core.version import VERSION
from data import DATASETS, dataset_row
from export import FROZEN
from models import known_name
from models.table import BACKBONES, FILE_PREPROCESSING, MODELS
from selection import ALIASES, SCHEMES
from selection.betti import MIN_POINTS
from training import caching

INTERVAL = 4  # epochs
NUM_BETTI_BATCHES = Config.num_betti_batches
TIMINGS = ("measured", "flops")
TRUE = ("true", "1", "yes")

_DEFAULT = "(default: %(default)s)"
_LARGEST = 2**31 - 1  # the largest integer that every framework accepts


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = _OneLineParser(
        prog="main.py",
        description="Fine-tune a pretrained network by training only the layers with the richest topology (AdaBet).",
        epilog="Exit codes: 0 done, 1 failed while running, 2 wrong use or bad input, 130/143 interrupted.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"AdaBet in TensorFlow {VERSION}")
    _add_network(parser.add_argument_group("network"))
    _add_data(parser.add_argument_group("data"))
    _add_selection(parser.add_argument_group("selection"))
    _add_training(parser.add_argument_group("training"))
    _add_cache(parser.add_argument_group("cached features of the frozen layers"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_network(group):
    group.add_argument(
        "--model_name",
        type=_model_name,
        default=Config.model_name,
        metavar="NAME|PATH.keras",
        help=f"{_rows(BACKBONES)}\nor another classifier of keras.applications (--list_models: all {len(MODELS)}),\n"
        f"or a functional or Sequential model of your own in a .keras file\n{_DEFAULT}",
    )
    group.add_argument(
        "--model_alpha",
        type=_real(0, math.inf, open_low=True, open_high=True),
        metavar="ALPHA",
        help="width of a MobileNet (--list_models: which; default: 1)",
    )
    group.add_argument("--list_models", **_switch(False), help="print all names of --model_name, and stop")
    group.add_argument(
        "--custom_objects", metavar="MODULE:NAME,...", help="custom classes of PATH.keras; only these are imported"
    )
    group.add_argument(
        "--keep_head",
        **_switch(False),
        help="keep the classification layer of PATH.keras, without its softmax, if it is as wide as\nthe data have "
        "classes (default: a new head replaces it)",
    )
    group.add_argument(
        "--preprocessing",
        choices=FILE_PREPROCESSING,
        help="what PATH.keras expects; none: RGB in 0..255; unit: 0..1; symmetric: -1..1;\ncaffe: BGR minus the mean; "
        "torch: mean 0 and standard deviation 1 (default: none)",
    )
    group.add_argument(
        "--weights",
        default=Config.weights,
        metavar="{auto,imagenet,none,PATH}",
        help="auto: ImageNet weights, or random ones with a warning if these are unavailable; PATH.keras: its own;\n"
        "imagenet: ImageNet weights, or an error; none: random; PATH: a .keras, .weights.h5 or .h5 file\n" + _DEFAULT,
    )
    sizes = f"{_by_data('input_size')}; at least the network's minimum; PATH.keras: the size that it fixes"
    group.add_argument("--input_size", type=_integer(1), help=f"side of the square input in pixels\n(default: {sizes})")
    group.add_argument(
        "--bn_stats",
        choices=("auto", "stored", "batch"),
        default=Config.bn_stats,
        help="statistics of batch normalization in training;\n"
        "auto: stored with pretrained weights, batch with random ones\n" + _DEFAULT,
    )
    group.add_argument(
        "--dropout",
        type=_real(0, 1, open_high=True),
        default=Config.dropout,
        help="dropout rate before the head\n" + _DEFAULT,
    )


def _add_data(group):
    group.add_argument(
        "--dataset_name",
        default=Config.dataset_name,
        help=f"{_rows(DATASETS)}\nor any TFDS data set with an image and a label\n{_DEFAULT}",
    )
    group.add_argument("--image_dir", help="folder of images for --dataset_name image_folder")
    group.add_argument(
        "--skip_bad_images",
        **_switch(False),
        help="leave out and list the images of --image_dir that cannot be read,\ninstead of refusing the folder\n"
        + _DEFAULT,
    )
    group.add_argument("--data_dir", help="TFDS folder (default: ~/tensorflow_datasets)")
    group.add_argument(
        "--prepare_only", **_switch(False), help="download the data set and the ImageNet weights, and stop"
    )
    group.add_argument("--num_classes", type=_integer(2), help="checked against the data's own class count")
    group.add_argument(
        "--protocol",
        choices=("validation", "paper"),
        default=Config.protocol,
        help="validation: held-out training images choose the epoch, and the test split is read once;\n"
        "paper: the best test epoch is reported, as published\n" + _DEFAULT,
    )
    group.add_argument(
        "--augment", **_switch(Config.augment), help="random flips and rotations of training images\n" + _DEFAULT
    )
    group.add_argument("--limit_train", type=_integer(1), help="training images to use, stratified (default: all)")
    group.add_argument("--limit_test", type=_integer(1), help="test images to use, stratified (default: all)")


def _add_selection(group):
    group.add_argument(
        "--train_type",
        choices=[*SCHEMES, *ALIASES],
        default=Config.train_type,
        metavar="SCHEME",
        help=f"{_rows(SCHEMES)}\n{_DEFAULT}",
    )
    group.add_argument(
        "--rho",
        type=_real(0, 1, open_low=True),
        help="share of the layers that train; for elastic_training, of the time of a full step\n"
        f"(default: {_by_scheme('rho', lambda row: 'rho' in row.reads)})",
    )
    group.add_argument(
        "--interval",
        type=_integer(1, accept_float=True),
        help=f"epochs between re-selections or prunings, for schemes that have them (default: {INTERVAL})",
    )
    group.add_argument(
        "--timing",
        choices=TIMINGS,
        help="for elastic_training: the cost of training a weight, measured on this device or counted in FLOPs\n"
        f"(default: {TIMINGS[0]})",
    )
    group.add_argument(
        "--num_betti_batches", type=_integer(1), help=f"batches that the ranking uses (default: {NUM_BETTI_BATCHES})"
    )
    group.add_argument(
        "--betti_points", type=_integer(MIN_POINTS), help="images per point cloud (default: --batch_size)"
    )
    group.add_argument("--layers", help="for listed_layers: a regular expression on layer paths, or @FILE with a list")
    group.add_argument("--exclude_layers", metavar="REGEX", help="layers that must not be selected")
    group.add_argument(
        "--memory_budget_mb",
        type=_real(0, math.inf, open_low=True, open_high=True),
        metavar="MB",
        help="train the longest prefix of the ranking whose estimated peak memory fits (1 MB is 10^6 bytes);\n"
        "replaces --rho, or bounds it if both are given",
    )
    group.add_argument("--list_layers", **_switch(False), help="print the paths of the candidate layers, and stop")
    group.add_argument("--select_only", **_switch(False), help="rank the layers, write the selection, and stop")


def _add_training(group):
    group.add_argument("--batch_size", type=_integer(1), default=Config.batch_size, help=_DEFAULT)
    group.add_argument("--num_epochs", type=_integer(1), help=f"(default: {_by_data('num_epochs')})")
    group.add_argument(
        "--warmup_epochs",
        type=_integer(0),
        default=Config.warmup_epochs,
        help="epochs of --num_epochs that train the head alone; the selection follows\n" + _DEFAULT,
    )
    group.add_argument(
        "--early_stopping",
        type=_integer(1),
        metavar="PATIENCE",
        help="stop after this many epochs without a better validation accuracy, not counting the warm-up\n"
        "(default: never)",
    )
    group.add_argument("--optimizer", choices=("sgd", "adam"), default=Config.optimizer, help=_DEFAULT)
    group.add_argument(
        "--learning_rate",
        type=_real(0, math.inf, open_low=True, open_high=True),
        help=f"initial learning rate\n(default: {_by_scheme('learning_rate')})",
    )
    group.add_argument(
        "--lr_schedule",
        choices=("cosine", "constant"),
        default=Config.lr_schedule,
        help="cosine: decay to 0 over the run; constant: no decay\n" + _DEFAULT,
    )
    group.add_argument(
        "--momentum",
        type=_real(0, 1, open_high=True),
        default=Config.momentum,
        help="momentum of sgd; 0 keeps no momentum slots in memory\n" + _DEFAULT,
    )
    group.add_argument(
        "--weight_decay",
        type=_real(0, math.inf, open_high=True),
        default=Config.weight_decay,
        help="decoupled weight decay\n" + _DEFAULT,
    )
    group.add_argument(
        "--global_clipnorm",
        type=_real(0, math.inf, open_high=True),
        default=Config.global_clipnorm,
        help="largest norm of a step's gradient; 0 is off\n" + _DEFAULT,
    )
    group.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default=Config.strategy,
        help="mirrored: each batch is split over the devices of this machine\n" + _DEFAULT,
    )
    group.add_argument(
        "--checkpoint_minutes",
        type=_real(0, math.inf, open_high=True),
        default=Config.checkpoint_minutes,
        metavar="MINUTES",
        help="a checkpoint is written after every epoch, and at this interval within long ones;\n0: after every step\n"
        + _DEFAULT,
    )
    group.add_argument("--seed", type=_integer(0), default=Config.seed, help=_DEFAULT)


def _add_cache(group):
    group.add_argument(
        "--cache_features",
        choices=caching.PLACES,
        default=Config.cache_features,
        help="compute the layers before the first one that trains only once, and train on their outputs;\n"
        "auto: in memory or on disk if the result is the same and time is saved\n" + _DEFAULT,
    )
    group.add_argument(
        "--cached_views",
        type=_integer(1),
        metavar="V",
        help="augmented views of each image to cache and use in turn (needed to cache with --augment)",
    )
    group.add_argument(
        "--cache_dtype",
        choices=caching.DTYPES,
        default=Config.cache_dtype,
        help="float16: half the size, features rounded to 11 bits\n" + _DEFAULT,
    )
    group.add_argument(
        "--cache_dir", help="folder of features on disk (default: adabet/features in XDG_CACHE_HOME or ~/.cache)"
    )
    group.add_argument(
        "--cache_limit_gb",
        type=_real(0, math.inf, open_low=True, open_high=True),
        default=Config.cache_limit_gb,
        metavar="GB",
        help="largest total size of the features in --cache_dir; the least recently used are deleted\n"
        "(1 GB is 10^9 bytes) " + _DEFAULT,
    )
    group.add_argument("--clear_cache", **_switch(False), help="delete the features that no run uses, and stop")


def _add_output(group):
    group.add_argument("--log_dir", default=Config.log_dir, help="folder that contains the run folders\n" + _DEFAULT)
    group.add_argument("--run_name", help="auto: made from model, data set, scheme, rho and seed (default: auto)")
    group.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=Config.resume,
        metavar="RUN_FOLDER",
        help="continue an interrupted run with its own flags;\n"
        "without RUN_FOLDER: continue the run of --run_name, or start it",
    )
    group.add_argument(
        "--evaluate",
        metavar="RUN_FOLDER|PATH.keras",
        help="evaluate a saved model on the test split, write LOG_DIR/NAME_evaluation/, and stop;\n"
        "a run is evaluated on its own data",
    )
    group.add_argument("--save_model", **_switch(False), help="write model.keras, which plain Keras loads\n" + _DEFAULT)
    group.add_argument("--save_txt", **_switch(False), help="write RUN_NAME.txt with hours and accuracy\n" + _DEFAULT)
    group.add_argument(
        "--save_litert",
        **_switch(False),
        help="write model.tflite, which LiteRT trains further on a device\n" + _DEFAULT,
    )
    group.add_argument(
        "--litert_momentum",
        type=_real(0, 1, open_high=True),
        help="momentum of SGD in model.tflite; 0 leaves out its variables (default: --momentum)",
    )
    group.add_argument(
        "--litert_batch", type=_integer(1), help="images of a training step in model.tflite (default: --batch_size)"
    )
    group.add_argument(
        "--litert_frozen",
        choices=FROZEN,
        default=Config.litert_frozen,
        help="how model.tflite stores the large weights that do not train\n" + _DEFAULT,
    )
    group.add_argument("--debug", **_switch(False), help="show tracebacks\n" + _DEFAULT)


class _OneLineParser(argparse.ArgumentParser):
    """Reports what is wrong in one line, without the usage."""

    def error(self, message):
        self.exit(2, f"Error: {' '.join(message.split())} (--help lists the flags)\n")


def _rows(table):
    width = max(map(len, table))
    return "\n".join(f"{name:<{width}}  {row.help}" for name, row in table.items()).replace("%", "%%")


def _by_data(field):
    return f"{getattr(DATASETS['digits'], field)} for digits, {getattr(dataset_row(''), field)} for photos"


def _by_scheme(field, applies=lambda row: True):
    """Returns a default of the schemes' rows as text: the most frequent value, then the exceptions."""
    values = {name: getattr(row, field) for name, row in SCHEMES.items() if applies(row)}
    common = max(values.values(), key=list(values.values()).count)
    others: dict[float, list[str]] = {}
    for name, value in values.items():
        if value != common:
            others.setdefault(value, []).append(name)
    return f"{common:g}" + "".join(f"; {value:g} for {', '.join(names)}" for value, names in others.items())


def _switch(default):
    return {"type": _boolean, "nargs": "?", "const": True, "default": default, "metavar": "BOOL"}


def _boolean(text):
    if text.lower() not in (*TRUE, "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"must be true or false (also 1, yes, 0, no). Received: {text!r}")
    return text.lower() in TRUE


def _model_name(text):
    try:
        return known_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _integer(least: int, accept_float: bool = False) -> Callable[[str], int]:
    """Returns a parser of whole numbers. With `accept_float`, "4.0" is 4, as in the published program."""

    def parse(text):
        try:
            value = float(text) if accept_float else int(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= _LARGEST and value == int(value)):
            raise argparse.ArgumentTypeError(
                f"must be a whole number at least {least} and at most {_LARGEST}. Received: {text!r}"
            )
        return int(value)

    return parse


def _real(low: float, high: float, open_low: bool = False, open_high: bool = False) -> Callable[[str], float]:
    """Returns a parser of numbers in an interval."""
    rule = f"{'over' if open_low else 'at least'} {low:g}"
    if math.isfinite(high):
        rule += f" and {'under' if open_high else 'at most'} {high:g}"

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
        if not inside:
            raise argparse.ArgumentTypeError(f"must be a number {rule}. Received: {text!r}")
        return value

    return parse
