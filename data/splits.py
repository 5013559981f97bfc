"""Which images train, validate and test. Pure NumPy.

A split depends only on the labels, the seed and the limits.
"""

import numpy as np

from core.config import Config
from core.errors import UsageError

VALIDATION_SHARE = 0.1  # of train, if the set has no validation split
TEST_SHARE = 0.2  # of train, if the set has neither a test nor a validation split

# Each draw has random numbers of its own, so one limit does not change another draw.
_DRAWS = {"test": 1, "limit_train": 2, "limit_test": 3, "validation": 4}


def stratified_sample(labels: np.ndarray, count: int, rng: np.random.Generator, spare_one: bool = False) -> np.ndarray:
    """Draws images at random, each class in proportion to its size.

    The class that is furthest below its share gives the next image, so that every class
    ends within one image of its share. With at least as many images to draw as classes,
    each class gives at least one; with fewer, no class gives two.

    Args:
        labels: int array of shape (images,).
        count: int. Images to draw; all if there are fewer.
        rng: np.random.Generator. Breaks ties, and draws within a class.
        spare_one: bool. Whether to leave at least one image in each class, which may give
            fewer than `count`.

    Returns:
        Sorted int64 array of positions in `labels`, of shape (drawn,).
    """
    classes, sizes = np.unique(labels, return_counts=True)
    available = sizes - 1 if spare_one else sizes
    count = min(count, int(available.sum()))
    share = count * sizes / max(sizes.sum(), 1)
    taken = np.zeros(len(classes), np.int64)
    if not spare_one and count >= len(classes):
        taken += 1
    order = rng.permutation(len(classes))  # argmax returns the first of equals
    while taken.sum() < count:
        missing = np.where(taken < available, share - taken, -np.inf)
        taken[order[np.argmax(missing[order])]] += 1
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:number] for label, number in zip(classes, taken)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *drawn]))


def assign(labels: dict, names: tuple, cfg: Config) -> dict:
    """Assigns images to training, validation and test.

    Args:
        labels: dict from split name to int array of shape (images,). A split with a
            negative label is unlabelled and counts as absent.
        names: tuple of str. Names of the train, validation and test split.
        cfg: Config. Reads `dataset_name`, `protocol`, `seed`, `limit_train`, `limit_test`.

    Returns:
        dict from `train`, `validation` and `test` to (split name, sorted int64 array of
        positions in that split). `validation` is None under protocol `paper`.

    Raises:
        UsageError: if there is no train split, or too few images to split.
    """
    available = [name for name in names if name in labels and len(labels[name]) and labels[name].min() >= 0]
    train_name, validation_name, test_name = names
    if train_name not in available:
        raise UsageError(
            f"A data set needs a labelled split named {train_name!r}. Received: "
            f"{cfg.dataset_name} with {', '.join(labels) or 'no split'}; choose another data set."
        )

    def rng(draw):
        return np.random.default_rng([cfg.seed, _DRAWS[draw]])

    def everything(name):
        return name, np.arange(len(labels[name]))

    def take_out(part, share, draw):
        """Splits `part` into (what stays, what is taken out)."""
        name, positions = part
        if len(positions) < 2:
            raise UsageError(
                f"Holding out {draw} images needs at least 2 training images. Received: "
                f"{len(positions)}; raise --limit_train or give more images."
            )
        own = labels[name][positions]
        count = max(1, round(share * len(positions)))
        out = stratified_sample(own, count, rng(draw), spare_one=True)
        if not len(out):  # with one image per class, a class loses it
            out = stratified_sample(own, 1, rng(draw))
        return (name, np.delete(positions, out)), (name, positions[out])

    def limited(part, limit, draw):
        name, positions = part
        if limit is None or limit >= len(positions):
            return part
        return name, positions[stratified_sample(labels[name][positions], limit, rng(draw))]

    train, validation = everything(train_name), None
    if test_name in available:
        test = everything(test_name)
        if validation_name in available:
            validation = everything(validation_name)
    elif validation_name in available:
        test = everything(validation_name)
    else:
        train, test = take_out(train, TEST_SHARE, "test")

    train = limited(train, cfg.limit_train, "limit_train")
    test = limited(test, cfg.limit_test, "limit_test")
    if cfg.protocol == "paper":
        validation = None
    elif validation is None:
        train, validation = take_out(train, VALIDATION_SHARE, "validation")
    return {"train": train, "validation": validation, "test": test}
