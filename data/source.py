"""What every data set looks like before the pipeline: labels in memory, images still encoded."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core.errors import UsageError


@dataclass(frozen=True, eq=False)
class Source:
    """A data set that is ready to be read.

    Attributes:
        name: str. As the user wrote it.
        version: str. What was read, e.g. `oxford_iiit_pet:4.0.0`.
        class_names: list of str, one per class, in the order of the labels.
        labels: dict from split name to int64 array of shape (images,). -1 is unlabelled.
        split_bytes: dict from split name to its size on disk, in bytes.
        read: function of (split name, int array of positions in that split) that returns
            a tf.data.Dataset of (position int64, encoded image string, label int64),
            always in the same order, which is unrelated to the labels.
        files: dict from split name to a list of its images' paths, by position; None
            for a set that isn't made of image files.
    """

    name: str
    version: str
    class_names: list[str]
    labels: dict[str, np.ndarray]
    split_bytes: dict[str, int]
    read: Callable
    files: dict | None = None


def check_num_classes(cfg, found):
    """Raises UsageError where `--num_classes` was given and isn't the data's class count.

    Args:
        cfg: Config.
        found: int or None. Classes of the data; None where not known yet.
    """
    if cfg.num_classes is not None and found is not None and cfg.num_classes != found:
        raise UsageError(
            f"--num_classes must be the data's own class count: {cfg.dataset_name} has {found}. "
            f"Received: {cfg.num_classes}; leave the flag out."
        )
