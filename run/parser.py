"""The command line's flags, as argparse sees them.

Choices, defaults and help lines come from the tables of models, data and schemes.
No framework is imported here, so --help and a wrong flag answer at once.
"""

import argparse
import functools
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
    _add_network(functools.partial(_flag, parser.add_argument_group("network")))
    _add_data(functools.partial(_flag, parser.add_argument_group("data")))
    _add_selection(functools.partial(_flag, parser.add_argument_group("selection")))
    _add_training(functools.partial(_flag, parser.add_argument_group("training")))
    _add_cache(functools.partial(_flag, parser.add_argument_group("cached features of the frozen layers")))
    _add_output(functools.partial(_flag, parser.add_argument_group("output")))
    return parser


def _flag(group, name, help, **settings):
    """Adds a flag with Config's default, or with `default`; one that is true or false may stand without a value."""
    settings = {"default": getattr(Config, name), **settings}
    if isinstance(settings["default"], bool) and "nargs" not in settings:
        settings |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    group.add_argument(f"--{name}", help=help, **settings)


def _add_network(flag):
    flag(
        "model_name",
        f"{_rows(BACKBONES)}\nor another classifier of keras.applications (--list_models: all {len(MODELS)}),\n"
        f"or a functional or Sequential model of your own in a .keras file\n{_DEFAULT}",
        type=_model_name,
        metavar="NAME|PATH.keras",
    )
    flag(
        "model_alpha",
        "width of a MobileNet (--list_models: which; default: 1)",
        type=_real(0, open_low=True),
        metavar="ALPHA",
    )
    flag("list_models", "print all names of --model_name, and stop")
    flag("custom_objects", "custom classes of PATH.keras; only these are imported", metavar="MODULE:NAME,...")
    flag(
        "keep_head",
        "keep the classification layer of PATH.keras, without its softmax, if it has one output\nper class "
        "(default: a new head replaces it)",
    )
    flag(
        "preprocessing",
        "what PATH.keras expects; none: RGB in 0..255; unit: 0..1; symmetric: -1..1;\ncaffe: BGR minus the mean; "
        "torch: mean 0 and standard deviation 1 (default: none)",
        choices=FILE_PREPROCESSING,
    )
    flag(
        "weights",
        "auto: ImageNet weights, or random ones with a warning if these are unavailable; PATH.keras: its own;\n"
        "imagenet: ImageNet weights, or an error; none: random; PATH: a .keras, .weights.h5 or .h5 file\n" + _DEFAULT,
        metavar="{auto,imagenet,none,PATH}",
    )
    sizes = f"{_by_data('input_size')}; at least the network's minimum; PATH.keras: the size that it fixes"
    flag("input_size", f"side of the square input in pixels\n(default: {sizes})", type=_integer(1), default=None)
    flag(
        "bn_stats",
        "statistics of batch normalization in training;\n"
        "auto: stored with pretrained weights, batch with random ones\n" + _DEFAULT,
        choices=("auto", "stored", "batch"),
    )
    flag("dropout", "dropout rate before the head\n" + _DEFAULT, type=_real(0, 1))
    flag(
        "head_init",
        "kernel of the new head; small: normal, standard deviation 0.001;\nglorot: uniform (Glorot), as published\n"
        + _DEFAULT,
        choices=("small", "glorot"),
    )


def _add_data(flag):
    flag("dataset_name", f"{_rows(DATASETS)}\nor any TFDS data set with an image and a label\n{_DEFAULT}")
    flag("image_dir", "folder of images for --dataset_name image_folder")
    flag(
        "skip_bad_images",
        "leave out and list the images of --image_dir that cannot be read,\ninstead of refusing the folder\n"
        + _DEFAULT,
    )
    flag("data_dir", "TFDS folder (default: ~/tensorflow_datasets)")
    flag("prepare_only", "download the data set and the ImageNet weights, and stop")
    flag("num_classes", "checked against the data's own class count", type=_integer(2))
    flag(
        "protocol",
        "validation: the epoch is chosen on held-out training images, and tested once;\n"
        "paper: the best test epoch is reported, as published\n" + _DEFAULT,
        choices=("validation", "paper"),
    )
    flag("augment", "random flips and rotations of training images\n" + _DEFAULT)
    flag("limit_train", "training images to use, stratified (default: all)", type=_integer(1))
    flag("limit_test", "test images to use, stratified (default: all)", type=_integer(1))


def _add_selection(flag):
    flag("train_type", f"{_rows(SCHEMES)}\n{_DEFAULT}", choices=[*SCHEMES, *ALIASES], metavar="SCHEME")
    flag(
        "rho",
        "share of the layers that train; for elastic_training, of the time of a full step\n"
        f"(default: {_by_scheme('rho', lambda row: 'rho' in row.reads)})",
        type=_real(0, 1, open_low=True, open_high=False),
        default=None,
    )
    flag(
        "interval",
        f"epochs between re-selections or prunings, for schemes that have them (default: {INTERVAL})",
        type=_integer(1, accept_float=True),
    )
    flag(
        "timing",
        "for elastic_training: the cost of training a weight, measured on this device or counted in FLOPs\n"
        f"(default: {TIMINGS[0]})",
        choices=TIMINGS,
    )
    flag(
        "num_betti_batches",
        f"batches that the ranking uses (default: {NUM_BETTI_BATCHES})",
        type=_integer(1),
        default=None,
    )
    flag("betti_points", "images per point cloud (default: --batch_size)", type=_integer(MIN_POINTS))
    flag("layers", "for listed_layers: a regular expression on layer paths, or @FILE with a list")
    flag("exclude_layers", "layers that must not be selected", metavar="REGEX")
    flag(
        "memory_budget_mb",
        "train the longest prefix of the ranking whose estimated peak memory fits (1 MB is 10^6 bytes);\n"
        "replaces --rho, or bounds it if both are given",
        type=_real(0, open_low=True),
        metavar="MB",
    )
    flag("list_layers", "print the paths of the candidate layers, and stop")
    flag("select_only", "rank the layers, write the selection, and stop")


def _add_training(flag):
    flag("batch_size", _DEFAULT, type=_integer(1))
    flag("num_epochs", f"(default: {_by_data('num_epochs')})", type=_integer(1), default=None)
    flag(
        "warmup_epochs",
        "epochs of --num_epochs that train the head alone; the selection follows\n" + _DEFAULT,
        type=_integer(0),
    )
    flag(
        "early_stopping",
        "stop after this many epochs without a better validation accuracy, not counting the warm-up\n(default: never)",
        type=_integer(1),
        metavar="PATIENCE",
    )
    flag("optimizer", _DEFAULT, choices=("sgd", "adam"))
    flag(
        "learning_rate",
        f"initial learning rate\n(default: {_by_scheme('learning_rate')})",
        type=_real(0, open_low=True),
        default=None,
    )
    flag(
        "lr_schedule",
        "cosine: decay to 0 over the run; constant: no decay\n" + _DEFAULT,
        choices=("cosine", "constant"),
    )
    flag("momentum", "momentum of sgd; 0 keeps no momentum slots in memory\n" + _DEFAULT, type=_real(0, 1))
    flag("weight_decay", "decoupled weight decay\n" + _DEFAULT, type=_real(0))
    flag("global_clipnorm", "largest norm of a step's gradient; 0 is off\n" + _DEFAULT, type=_real(0))
    flag("strategy", "mirrored: each batch is split over the devices of this machine\n" + _DEFAULT, choices=STRATEGIES)
    flag(
        "checkpoint_minutes",
        "a checkpoint is written after every epoch, and at this interval within long ones;\n0: after every step\n"
        + _DEFAULT,
        type=_real(0),
        metavar="MINUTES",
    )
    flag("seed", _DEFAULT, type=_integer(0))


def _add_cache(flag):
    flag(
        "cache_features",
        "compute the layers before the first one that trains only once, and train on their outputs;\n"
        "auto: in memory or on disk if the result is the same and time is saved\n" + _DEFAULT,
        choices=caching.PLACES,
    )
    flag(
        "cached_views",
        "augmented views of each image to cache and use in turn (needed to cache with --augment)",
        type=_integer(1),
        metavar="V",
    )
    flag("cache_dtype", "float16: half the size, features rounded to 11 bits\n" + _DEFAULT, choices=caching.DTYPES)
    flag("cache_dir", "folder of features on disk (default: adabet/features in XDG_CACHE_HOME or ~/.cache)")
    flag(
        "cache_limit_gb",
        "largest total size of the features in --cache_dir; the least recently used are deleted\n"
        "(1 GB is 10^9 bytes) " + _DEFAULT,
        type=_real(0, open_low=True),
        metavar="GB",
    )
    flag("clear_cache", "delete the features that no run uses, and stop")


def _add_output(flag):
    flag("log_dir", "folder that contains the run folders\n" + _DEFAULT)
    flag("run_name", "auto: made from model, data set, scheme, rho and seed (default: auto)")
    flag(
        "resume",
        "continue an interrupted run with its own flags;\n"
        "without RUN_FOLDER: continue the run of --run_name, or start it",
        nargs="?",
        const=True,
        metavar="RUN_FOLDER",
    )
    flag(
        "evaluate",
        "evaluate a saved model on the test split, write LOG_DIR/NAME_evaluation/, and stop;\n"
        "a run is evaluated on its own data",
        metavar="RUN_FOLDER|PATH.keras",
    )
    flag("save_model", "write model.keras, which plain Keras loads\n" + _DEFAULT)
    flag("save_txt", "write RUN_NAME.txt with hours and accuracy\n" + _DEFAULT)
    flag("save_litert", "write model.tflite, which LiteRT continues to train on a device\n" + _DEFAULT)
    flag(
        "litert_momentum",
        "momentum of SGD in model.tflite; 0 leaves out its variables (default: --momentum)",
        type=_real(0, 1),
    )
    flag("litert_batch", "images of a training step in model.tflite (default: --batch_size)", type=_integer(1))
    flag("litert_frozen", "how model.tflite stores the large weights that do not train\n" + _DEFAULT, choices=FROZEN)
    flag("debug", "show tracebacks\n" + _DEFAULT)


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


def _real(low: float, high: float = math.inf, open_low: bool = False, open_high: bool = True) -> Callable[[str], float]:
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
