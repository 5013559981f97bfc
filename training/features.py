"""Cached training: the frozen prefix of a network runs once, and training reads its features.

`choose` decides whether a run caches, `compute` runs the prefix, and `Features`
gives batches in the order of `data.pipeline.Data`. `training/feature_files.py`
keeps features on disk.
"""

import itertools
import math
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from core.config import Config
from core.environment import device_facts
from core.log import log
from core.units import GB
from core.version import VERSION
from memory import budget, estimate
from memory.measure import measured_peak
from models.cut import Cut, find_cut
from models.freezing import freeze
from training import feature_files
from training.caching import obstacle_to_caching
from training.result import Result, largest_known

MEMORY_SHARE = 0.25  # of the machine's memory that `auto` gives to features
MIN_SAVED = 0.1  # share of the operations of all epochs that `auto` must save
MIN_PREFIX = 0.01  # share of a forward pass below which a prefix is not worth a cache


@dataclass(frozen=True)
class Features:
    """The features of all images, in the order of the data set, and their batches.

    Attributes:
        cut: Cut.
        arrays: dict from `"train"` and `"held_out"` to (tensors, labels). The tensors are
            one array of shape (views * images, ...) for each tensor that crosses the cut,
            in memory or mapped from a file; labels are int64 of shape (views * images,).
        data: data.pipeline.Data.
        views: int. Augmented views of each training image.
    """

    cut: Cut
    arrays: dict
    data: object
    views: int

    @property
    def steps_per_epoch(self) -> int:
        """int. Training batches per epoch."""
        return self.data.steps_per_epoch

    @property
    def outside_bytes(self) -> int:
        """int. Size of the prefix's weights, which stay in memory while the suffix trains."""
        return self.cut.outside_bytes(self.cut.suffix)

    @property
    def num_bytes(self) -> int:
        """int. Size of all features."""
        return sum(tensor.nbytes for tensors, _ in self.arrays.values() for tensor in tensors)

    def train_batches(self, first_epoch: int, end: int, first_step: int = 0) -> tf.data.Dataset:
        """Returns the features of `Data.train_batches`, batch by batch, with labels.

        In epoch e, counted from 0, each image is seen in view e modulo `views`.
        """
        images = self.data.split_sizes["train"]
        order = self.data.train_order(first_epoch, end, first_step)
        places = order.map(lambda epoch, place: place + epoch % self.views * images)
        count = (end - first_epoch) * self.data.steps_per_epoch - first_step
        return self._batches("train", places, count)

    def held_out_batches(self) -> tf.data.Dataset:
        """Returns the features of the images that choose the epoch, in fixed order, with labels."""
        images, size = len(self.arrays["held_out"][1]), self.data.batch_size
        return self._batches("held_out", tf.data.Dataset.range(images).batch(size), math.ceil(images / size))

    def _batches(self, role, places, count):
        tensors, labels = self.arrays[role]
        types = [tf.float32] * len(tensors) + [tf.int64]

        def read(places):
            return [*(tensor[places].astype(np.float32, copy=False) for tensor in tensors), labels[places]]

        def batch(places):
            *features, targets = tf.numpy_function(read, [places], types, stateful=False)
            for feature, tensor in zip(features, tensors, strict=True):
                feature.set_shape((places.shape[0], *tensor.shape[1:]))
            # With a batch size that is known when the step is traced, as without a cache, TensorFlow
            # optimizes the step in the same way, and the results are the same bits.
            targets.set_shape(places.shape)
            return features[0] if len(features) == 1 else tuple(features), targets

        batches = places.map(batch, num_parallel_calls=2, deterministic=True).prefetch(2)
        return batches.apply(tf.data.experimental.assert_cardinality(count))


def choose(network, data, cfg: Config) -> tuple[str, str, Cut | None]:
    """Decides where a run caches features.

    The decision depends on the flags, the network as it is frozen, the sizes of the
    data and the machine's total memory, not on what happens to be free.

    Args:
        network: models.Network, frozen as it will train.
        data: data.pipeline.Data.
        cfg: Config. Reads cache_features, cached_views, cache_dtype, cache_limit_gb, augment,
            num_epochs, strategy and interval.

    Returns:
        where: str. `"off"`, `"memory"` or `"disk"`.
        message: str. One line for the log.
        cut: models.cut.Cut or None. Where the network is cut; None if nothing is cached.
    """
    if cfg.cache_features == "off":
        return "off", "Features are not cached (--cache_features off).", None
    is_auto = cfg.cache_features == "auto"
    if is_auto and (obstacle := obstacle_to_caching(cfg, network.bn_stats)):
        return "off", f"Features are not cached: {obstacle}.", None
    cut = find_cut(network.model)
    if cut is None or cut.saved < MIN_PREFIX:
        return "off", "Features are not cached: the first layers train, so there is nothing to cache.", None
    num_bytes = total_bytes(cut, data, cfg)
    saved = (1 - cut.step_share) * (1 - (cfg.cached_views or 1) / cfg.num_epochs)
    size = f"{num_bytes / GB:.2f} GB after {cut.name}"
    where = cfg.cache_features
    if is_auto:
        where = "memory" if num_bytes <= MEMORY_SHARE * machine_memory_bytes() else "disk"
        if saved < MIN_SAVED:
            saving = f"{size} would save only {100 * saved:.0f} % of the operations"
            return "off", f"Features are not cached: {saving}.", None
        if where == "disk" and num_bytes > cfg.cache_limit_gb * GB:
            limits = f"a quarter of the memory and --cache_limit_gb {cfg.cache_limit_gb:g}"
            return "off", f"Features are not cached: {size} exceeds {limits}.", None
    views = f", {cfg.cached_views} views of each image" if cfg.cached_views else ""
    place = "in memory" if where == "memory" else "on disk"
    message = (
        f"Features are cached {place}: {size}{views}. A step on them takes {100 * cut.step_share:.0f} % of the "
        f"operations of an uncached step, {100 * cut.full_step_share:.0f} % of those of full training."
    )
    return where, message, cut


def peak_bytes(network, data, cfg: Config, trained_weights: Collection[str], batch_size: int | None = None) -> int:
    """Freezes all but the given weights, and returns the estimated peak of training in bytes.

    Where the run would cache features, that is the larger of a pass over the frozen part and
    of a step after it.

    Args:
        network: models.Network, its mode of batch normalization set.
        data: data.pipeline.Data.
        cfg: Config.
        trained_weights: collection of str. Paths.
        batch_size: int or None. Images per batch; None for that of `data`.
    """
    batch_size = batch_size or data.batch_size
    freeze(network.model, trained_weights)
    _, _, cut = choose(network, data, cfg)
    if cut is None:
        return budget.step_bytes(network.model, cfg, batch_size)
    return max(
        estimate.of_inference(cut.prefix, estimate.batch_shape(cut.prefix, batch_size)).bytes
        + cut.outside_bytes(cut.prefix),
        budget.step_bytes(cut.suffix, cfg, batch_size) + cut.outside_bytes(cut.suffix),
    )


def total_bytes(cut: Cut, data, cfg: Config) -> int:
    """Returns the size of all cached features, of training and held-out images."""
    images = data.split_sizes["train"] * (cfg.cached_views or 1) + data.split_sizes[held_out_split(cfg)]
    return images * cut.bytes_per_image * np.dtype(cfg.cache_dtype).itemsize // 4


def held_out_split(cfg: Config) -> str:
    """Returns the split that chooses the epoch: `"validation"`, or `"test"` under protocol paper."""
    return "validation" if cfg.protocol == "validation" else "test"


def machine_memory_bytes() -> int:
    """Returns the total memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load(network, data, cfg: Config, result: Result) -> Features:
    """Returns the features of a frozen network, read from disk or computed, and accounts for their cost.

    The memory of the pass over the prefix counts like that of a training step.

    Args:
        network: models.Network, frozen as it will train.
        data: data.pipeline.Data.
        cfg: Config.
        result: Result. Says where features are cached, and receives their time, size and memory.

    Raises:
        RunError: if the disk cannot take the features.
    """
    cut = find_cut(network.model)
    views = cfg.cached_views or 1
    prefix = _Prefix(cut, np.dtype(cfg.cache_dtype))
    train = [data.train_view(view if cfg.augment else None) for view in range(views)]
    held_out = data.validation_batches() if cfg.protocol == "validation" else data.test_batches()
    sizes = {"train": views * data.split_sizes["train"], "held_out": data.split_sizes[held_out_split(cfg)]}
    parts = {
        "train": lambda: itertools.chain.from_iterable(map(prefix.batches, train)),
        "held_out": lambda: prefix.batches(held_out),
    }
    start = time.perf_counter()
    if result.cached_in == "memory":
        arrays = {role: _in_memory(parts[role](), sizes[role], prefix) for role in parts}
    else:
        arrays = feature_files.load(cfg, _key(cut, data, cfg), parts, sizes, prefix.shapes, prefix.dtype)
    features = Features(cut, arrays, data, views)
    result.cache_s = (result.cache_s or 0.0) + time.perf_counter() - start
    result.cache_bytes, result.cache_cut = features.num_bytes, cut.name
    result.cache_step_share, result.cache_full_step_share = cut.step_share, cut.full_step_share
    log.info("Features: ready in %.1f s", time.perf_counter() - start)
    batch, _ = next(iter(train[0]))
    result.peak_bytes = largest_known(result.peak_bytes, prefix.measured_bytes(batch))
    estimated = estimate.bytes_or_none(estimate.of_inference, cut.prefix, data.batch_size)
    if estimated is not None:
        result.estimated_bytes = largest_known(result.estimated_bytes, estimated + cut.outside_bytes(cut.prefix))
    return features


class _Prefix:
    """Computes the features of batches."""

    def __init__(self, cut: Cut, dtype: np.dtype):
        self.dtype = dtype
        self.shapes = [tuple(tensor.shape[1:]) for tensor in cut.prefix.outputs]
        self._compute = tf.function(
            lambda images: tf.nest.flatten(cut.prefix(images, training=False)), reduce_retracing=True
        )

    def batches(self, images: tf.data.Dataset) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """Yields (features, labels) of each batch."""
        for batch, labels in images:
            features = self._compute(batch)
            yield [np.asarray(feature).astype(self.dtype, copy=False) for feature in features], np.asarray(labels)

    def measured_bytes(self, batch: tf.Tensor) -> int | None:
        """Returns the allocator's peak over a pass of one resident batch, as for a training step."""
        self._compute(batch)  # traces
        with measured_peak() as peak:
            self._compute(batch)
        return peak.bytes


def _in_memory(batches, num_images, prefix):
    """Returns (tensors, labels) of all batches as arrays in memory."""
    tensors = [np.empty((num_images, *shape), prefix.dtype) for shape in prefix.shapes]
    all_labels, done = np.empty(num_images, np.int64), 0
    for features, labels in batches:
        for tensor, feature in zip(tensors, features, strict=True):
            tensor[done : done + len(labels)] = feature
        all_labels[done : done + len(labels)] = labels
        done += len(labels)
    return tensors, all_labels


def _key(cut: Cut, data, cfg: Config) -> dict:
    """Returns all that the features depend on, JSON-ready."""
    return {
        "program": VERSION,
        "weights": feature_files.digest(variable.numpy() for variable in cut.prefix.variables),
        "operations": len(cut.prefix.operations),  # where the cut is; names may be numbered differently
        "model": cfg.model_name,
        "dataset": data.name,
        "input_size": cfg.input_size,
        "images": data.digest(),
        "batch_size": data.batch_size,  # another batch size may round differently
        "views": cfg.cached_views if cfg.augment else None,
        "seed": cfg.seed if cfg.augment else None,
        "protocol": cfg.protocol,
        "dtype": cfg.cache_dtype,
        "versions": feature_files.versions(),
        **device_facts(),
    }
