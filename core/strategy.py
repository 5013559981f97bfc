"""Training on several devices of one machine: the strategy, and what it needs to compute the same.

Model.fit splits each global batch over the devices and sums their gradients.
What stays as on one device: the data and their order, the losses (to rounding),
the clipping (of the summed gradient). What can't: dropout's draws, and batch
statistics, which each device takes of its own part.
"""

import contextlib

from core.errors import UsageError

STRATEGIES = ("none", "mirrored", "multi_worker_mirrored")


def check(cfg, reselects):
    """Refuses what the pinned Keras can't do.

    Its `fit` fails under MultiWorkerMirroredStrategy in two places: building the
    metrics reduces a batch that has one value a worker, and every step takes
    the mean of its scalar metrics along axis 0. tests/test_strategy.py has the
    minimal case, which fails on the day that this is mended.

    Args:
        cfg: Config. Reads strategy, train_type and memory_budget_mb.
        reselects: bool. The scheme selects anew while it trains.

    Raises:
        UsageError: a strategy that can't work.
    """
    if cfg.strategy == "multi_worker_mirrored":
        raise UsageError(
            "--strategy must be none or mirrored: Model.fit of Keras 3.15.1 fails under MultiWorkerMirroredStrategy, "
            "reducing scalar metrics along axis 0. Received: multi_worker_mirrored; use several machines with one run "
            "each (scripts/sweep.sh --launcher slurm)."
        )
    if cfg.strategy != "none" and reselects:
        raise UsageError(
            f"--strategy goes with schemes that select once. Received: {cfg.train_type}, which selects anew every "
            "--interval epochs; leave out --strategy."
        )
    if cfg.strategy != "none" and cfg.memory_budget_mb is not None:
        raise UsageError(
            "--memory_budget_mb is of one device's training step. Received: --strategy mirrored with "
            f"--memory_budget_mb {cfg.memory_budget_mb:g}; leave out one of them."
        )


def make(cfg):
    """Returns the tf.distribute.Strategy of `cfg`, or None for one device.

    Raises:
        UsageError: there are no several devices.
    """
    if cfg.strategy == "none":
        return None
    import tensorflow as tf

    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    devices = [f"{kind}:{number}" for number in range(len(tf.config.list_logical_devices(kind)))]
    if len(devices) < 2:
        raise UsageError(
            f"--strategy mirrored needs at least two devices. Received: a machine with {devices[0]} alone; leave out "
            "--strategy."
        )
    return tf.distribute.MirroredStrategy(devices)


def check_batches(strategy, batch_size, split_sizes):
    """Raises UsageError where the devices can't share out the images.

    Args:
        strategy: tf.distribute.Strategy or None.
        batch_size: int. Images of a training batch.
        split_sizes: dict from a split's name to its number of images.
    """
    if strategy is None:
        return
    devices = strategy.num_replicas_in_sync
    if batch_size % devices:
        raise UsageError(
            f"--batch_size must be a multiple of the {devices} devices. Received: batches of {batch_size} images; choose "
            "a multiple."
        )
    for split in ("validation", "test"):
        if split_sizes[split] and _even_batch_size(split_sizes[split], batch_size, devices) is None:
            raise UsageError(
                f"--strategy mirrored must be able to share out the images over {devices} devices. Received: "
                f"{split_sizes[split]} {split} images; change --limit_test or --batch_size."
            )


def even_batches(strategy, batches, images, batch_size):
    """Returns batches for evaluation of which every device gets a part.

    A device with no image at all fails: some operations refuse empty batches.

    Args:
        strategy: tf.distribute.Strategy.
        batches: tf.data.Dataset of batches.
        images: int. How many images there are.
        batch_size: int. At most so many a batch.
    """
    if strategy.num_replicas_in_sync == 1:
        return batches
    size = _even_batch_size(images, batch_size, strategy.num_replicas_in_sync)
    count = -(-images // size)
    return batches.unbatch().batch(size).apply(_cardinality(count))


def _cardinality(count):
    import tensorflow as tf

    return tf.data.experimental.assert_cardinality(count)


def _even_batch_size(images, batch_size, devices):
    """Returns the largest multiple of `devices` whose last batch reaches the last device too, or None.

    The first batch is a full one: Keras averages it over the devices, which takes equal parts.
    """
    for size in range(min(batch_size, images) // devices * devices, 0, -devices):
        last = images % size
        if last == 0 or last > size // devices * (devices - 1):  # the devices are filled one after the other
            return size
    return None


def scope(strategy):
    """Returns the context in which a network has to be built."""
    return strategy.scope() if strategy else contextlib.nullcontext()


def clip_the_sum(optimizer):
    """Lets an optimizer sum the devices' gradients before it clips them, rather than after.

    Keras clips each device's part by itself: with a global norm of 1, two
    devices would take steps of up to 2.
    """
    import tensorflow as tf

    clip = optimizer._clip_gradients

    def sum_and_clip(gradients):
        return clip(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, gradients))

    optimizer._clip_gradients = sum_and_clip
    optimizer._all_reduce_sum_gradients = lambda pairs: pairs  # they are summed by now
    return optimizer
