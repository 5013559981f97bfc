"""Data sets: the table of known ones, and `load`.

TensorFlow and TFDS are imported only when `load` is called.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.config import Config
from core.errors import UsageError

if TYPE_CHECKING:
    from data.source import Source


@dataclass(frozen=True)
class Dataset:
    """One row of the table: the properties of a data set.

    Attributes:
        help: str. One line for `--help`.
        tfds: str or None. Pinned TFDS `name:version`; None for a folder of images.
        input_size: int. Default side of the square input, in pixels.
        num_epochs: int. Default number of training epochs.
        train, validation, test: str. Names of the splits. The set may lack some.
        flip: bool. Whether training mirrors images at random.
        rotation: float. The largest random rotation in training, as a fraction of a full
            turn.
        needs: tuple of (module, package) pairs that TFDS needs to prepare this set and
            does not install.
    """

    help: str
    tfds: str | None = None
    input_size: int = 224
    num_epochs: int = 40
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    flip: bool = True
    rotation: float = 0.2
    needs: tuple = ()


DATASETS = {
    # A mirrored digit is not a digit, and a rotated 6 is a 9: no flip, and at most 18 degrees.
    "digits": Dataset(
        "1,797 handwritten digits, 10 classes, 8x8 grey; ships with scikit-learn, no download",
        "digits:1.0.0",
        input_size=32,
        num_epochs=10,
        flip=False,
        rotation=0.05,
    ),
    "caltech_birds2011": Dataset(
        "11,788 photos of birds, 200 species (1.2 GB)",
        "caltech_birds2011:0.2.0",
        needs=(("cv2", "opencv-python-headless"), ("scipy", "scipy")),
    ),
    "oxford_iiit_pet": Dataset("7,349 photos of cats and dogs, 37 breeds (0.8 GB)", "oxford_iiit_pet:4.0.0"),
    "stanford_dogs": Dataset(
        "20,580 photos of dogs, 120 breeds (0.8 GB)", "stanford_dogs:0.2.0", needs=(("scipy", "scipy"),)
    ),
    "flowers102": Dataset(
        "8,189 photos of flowers, 102 kinds (0.3 GB)", "oxford_flowers102:2.1.1", needs=(("scipy", "scipy"),)
    ),
    "image_folder": Dataset("your own images, in the folder that --image_dir names"),
}

_OTHER = Dataset("any other TFDS set with an image and a label")

# name, name/config, name:version, name/config:version. Namespaces
# (huggingface:NAME) are excluded: they run code of others.
_TFDS_NAME = re.compile(r"(?P<base>[A-Za-z]\w*)(?P<rest>(/[\w.+-]+)?(:[\d.*]+)?)")


def path_name(name: str) -> str:
    """Returns a data set's name in a form that can be part of a file name."""
    return name.replace("/", "-").replace(":", "-")


def dataset_row(name: str) -> Dataset:
    """Returns the `Dataset` row of a data set's name.

    Args:
        name: str. A name of the table, or a TFDS name, possibly with `/config` or
            `:version`. TFDS names that are not in the table have the row of a photo set.
    """
    base = re.split("[/:]", name)[0]
    by_tfds_name = {row.tfds.split(":")[0]: row for row in DATASETS.values() if row.tfds}
    return DATASETS.get(base) or by_tfds_name.get(base, _OTHER)


def tfds_name(name: str) -> str:
    """Returns TFDS' name of a data set, with the version that the table pins.

    Args:
        name: str. A value of `--dataset_name` other than `image_folder`.

    Raises:
        UsageError: if `name` cannot be a TFDS name.
    """
    match = _TFDS_NAME.fullmatch(name)
    if not match or match["base"] == "image_folder":  # which has neither config nor version
        raise unknown_name(name)
    pinned = dataset_row(name).tfds
    if pinned is None:
        return name
    # A configuration or version that the user gives overrides the pinned version.
    return pinned.split(":")[0] + match["rest"] if match["rest"] else pinned


def unknown_name(name: str, more_names: Iterable[str] = ()) -> UsageError:
    """Returns the UsageError for an unknown data set, with the closest names.

    Args:
        name: str. The name that was received.
        more_names: iterable of str. Further names to suggest.
    """
    base = re.split("[/:]", name)[0].lower()
    # "pets" and "flowers" are not close to the full names in spelling, but parts of them.
    within = [known for known in DATASETS if len(base) > 2 and base.rstrip("s") in known]
    spelt = difflib.get_close_matches(base, [*DATASETS, *more_names], n=4)
    close = list(dict.fromkeys([*within, *spelt]))
    hint = f"did you mean {' or '.join(close)}?" if close else "correct the name."
    return UsageError(
        f"--dataset_name must be one of {', '.join(DATASETS)}, or a TFDS name. Received: {name!r}; {hint}"
    )


def prepare(cfg: Config) -> Source:
    """Downloads and prepares the data set of `cfg` if necessary, and returns it.

    Args:
        cfg: Config. Reads `dataset_name`, `data_dir`, `image_dir`, `num_classes`.

    Raises:
        UsageError: if the name, the flags or the folder are invalid, or the class count
            contradicts the data.
        RunError: if the data are unavailable.
    """
    check_flags(cfg)
    if cfg.dataset_name == "image_folder":
        from data import folder_source as module
    else:
        from data import tfds_source as module
    return module.open_source(cfg)


def files_to_fetch(cfg: Config) -> list:
    """Returns [(url, path)] of the files that `prepare` would download, and where each can be saved by hand.

    Args:
        cfg: Config. Reads `dataset_name` and `data_dir`.
    """
    if cfg.dataset_name == "image_folder":
        return []
    from data import tfds_source

    return tfds_source.files_to_fetch(cfg)


def load(cfg: Config):
    """Returns the `data.pipeline.Data` of `cfg`: splits, classes and batches.

    Args:
        cfg: Config. Reads `dataset_name`, `data_dir`, `image_dir`, `num_classes`,
            `protocol`, `limit_train`, `limit_test`, `input_size`, `batch_size`,
            `augment`, `seed` and `skip_bad_images`.

    Raises:
        UsageError: if the name, the flags, the folder or its images are invalid, or the
            class count contradicts the data.
        RunError: if the data are unavailable.
    """
    source = prepare(cfg)
    from data import pipeline

    return pipeline.make(source, dataset_row(cfg.dataset_name), cfg)


def check_flags(cfg: Config) -> None:
    """Raises UsageError if the flags of the data set contradict each other."""
    if cfg.dataset_name == "image_folder" and not cfg.image_dir:
        raise UsageError(
            "--dataset_name image_folder needs a folder of images. Received: no --image_dir; add --image_dir FOLDER."
        )
    for flag in ("image_dir", "skip_bad_images"):
        if cfg.dataset_name != "image_folder" and getattr(cfg, flag):
            raise UsageError(
                f"--{flag} needs --dataset_name image_folder. Received: --dataset_name {cfg.dataset_name}; change it, "
                f"or leave out --{flag}."
            )
    for flag in ("limit_train", "limit_test"):
        limit = getattr(cfg, flag)
        if limit is not None and limit < 1:
            raise UsageError(f"--{flag} must be at least 1 image. Received: {limit}; leave it out for no limit.")
