"""The form of every data set before the pipeline: labels in memory, images encoded."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core.config import Config
from core.errors import UsageError


@dataclass(frozen=True, eq=False)
class Source:
    """A data set that is ready to be read.

    Attributes:
        name: str. The name that the user wrote.
        version: str. The version that was read, e.g. `oxford_iiit_pet:4.0.0`.
        class_names: list of str, one per class, in the order of the labels.
        labels: dict from split name to int64 array of shape (images,). -1 means
            unlabelled.
        split_bytes: dict from split name to its size on disk, in bytes.
        read: function of (split name, int array of positions in that split) that returns
            a tf.data.Dataset of (position int64, encoded image string, label int64),
            always in the same order, which is unrelated to the labels.
        files: dict from split name to the list of its images' paths, or None for a set
            that does not consist of image files.
    """

    name: str
    version: str
    class_names: list[str]
    labels: dict[str, np.ndarray]
    split_bytes: dict[str, int]
    read: Callable
    files: dict | None = None


def check_num_classes(cfg: Config, found: int | None) -> None:
    """Raises UsageError if `--num_classes` is given and is not the data's class count.

    Args:
        cfg: Config.
        found: int or None. Classes of the data, or None if they are not known yet.
    """
    if cfg.num_classes is not None and found is not None and cfg.num_classes != found:
        raise UsageError(
            f"--num_classes must be the data's own class count: {cfg.dataset_name} has {found}. "
            f"Received: {cfg.num_classes}; leave the flag out."
        )
