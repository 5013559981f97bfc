"""Training on several devices of one machine: the strategy, and what it needs for equal results.

`Model.fit` splits each global batch over the devices and sums their gradients.
The data and their order, the losses (to rounding) and the clipping of the summed
gradient are as on one device. Dropout's draws and batch statistics are not: each
device has its own.
"""

import contextlib

from core.config import Config
from core.errors import UsageError

STRATEGIES = ("none", "mirrored", "multi_worker_mirrored")


def check(cfg: Config, reselects: bool) -> None:
    """Checks that the pinned Keras can train under the strategy.

    Its `fit` fails under MultiWorkerMirroredStrategy in two places: building the
    metrics reduces a batch that has one value per worker, and every step takes the
    mean of its scalar metrics along axis 0. tests/test_strategy.py holds the minimal
    case and fails once Keras has fixed it.

    Args:
        cfg: Config. Reads strategy, train_type and memory_budget_mb.
        reselects: bool. Whether the run selects while it trains.

    Raises:
        UsageError: if the strategy cannot work.
    """
    if cfg.strategy == "multi_worker_mirrored":
        raise UsageError(
            "--strategy must be none or mirrored: Model.fit of Keras 3.15.1 fails under MultiWorkerMirroredStrategy, "
            "reducing scalar metrics along axis 0. Received: multi_worker_mirrored; use several machines with one run "
            "each (scripts/sweep.sh --launcher slurm)."
        )
    if cfg.strategy != "none" and reselects:
        raise UsageError(
            f"--strategy goes with runs that select once, before training. Received: {cfg.train_type}, --interval "
            f"{cfg.interval}, --warmup_epochs {cfg.warmup_epochs}; leave out --strategy."
        )
    if cfg.strategy != "none" and cfg.memory_budget_mb is not None:
        raise UsageError(
            "--memory_budget_mb applies to a training step on one device. Received: --strategy mirrored with "
            f"--memory_budget_mb {cfg.memory_budget_mb:g}; leave out one of them."
        )


def make(cfg: Config):
    """Returns the tf.distribute.Strategy of `cfg`, or None for one device.

    Raises:
        UsageError: if the machine has only one device.
    """
    if cfg.strategy == "none":
        return None
    import tensorflow as tf

    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    devices = [f"{kind}:{number}" for number in range(len(tf.config.list_logical_devices(kind)))]
    if len(devices) < 2:
        raise UsageError(
            f"--strategy mirrored needs at least two devices. Received: a machine with only {devices[0]}; leave out "
            "--strategy."
        )
    return tf.distribute.MirroredStrategy(devices)


def check_batches(strategy, batch_size: int, split_sizes: dict) -> None:
    """Checks that the devices can share the images evenly.

    Args:
        strategy: tf.distribute.Strategy or None.
        batch_size: int. Images of a training batch.
        split_sizes: dict from the name of a split to its number of images.

    Raises:
        UsageError: if they cannot.
    """
    if strategy is None:
        return
    devices = strategy.num_replicas_in_sync
    if batch_size % devices:
        raise UsageError(
            f"--batch_size must be a multiple of the {devices} devices. Received: {batch_size}; choose a multiple."
        )
    for split in ("validation", "test"):
        if split_sizes[split] and _even_batch_size(split_sizes[split], batch_size, devices) is None:
            raise UsageError(
                f"--strategy mirrored must be able to share the images over {devices} devices. Received: "
                f"{split_sizes[split]} {split} images; change --limit_test or --batch_size."
            )


def even_batches(strategy, batches, num_images: int, batch_size: int):
    """Returns batches for evaluation that give every device at least one image.

    Some operations fail on an empty batch.

    Args:
        strategy: tf.distribute.Strategy.
        batches: tf.data.Dataset of batches.
        num_images: int. Images in all batches together.
        batch_size: int. The largest batch.
    """
    if strategy.num_replicas_in_sync == 1:
        return batches
    import tensorflow as tf

    size = _even_batch_size(num_images, batch_size, strategy.num_replicas_in_sync)
    return batches.unbatch().batch(size).apply(tf.data.experimental.assert_cardinality(-(-num_images // size)))


def _even_batch_size(images, batch_size, devices):
    """Returns the largest multiple of `devices` whose last batch reaches the last device, or None.

    The first batch must be full: Keras averages it over the devices, which needs equal parts.
    """
    for size in range(min(batch_size, images) // devices * devices, 0, -devices):
        last = images % size
        if last == 0 or last > size // devices * (devices - 1):  # the devices are filled one after the other
            return size
    return None


def scope(strategy):
    """Returns the context in which the network must be built."""
    return strategy.scope() if strategy else contextlib.nullcontext()


def clip_the_sum(optimizer):
    """Makes an optimizer sum the devices' gradients before it clips them.

    Keras clips each device's part: with a global norm of 1, two devices would take
    steps with a norm of up to 2.
    """
    import tensorflow as tf

    clip = optimizer._clip_gradients

    def sum_and_clip(gradients):
        return clip(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, gradients))

    optimizer._clip_gradients = sum_and_clip
    optimizer._all_reduce_sum_gradients = lambda pairs: pairs  # already summed
    return optimizer
