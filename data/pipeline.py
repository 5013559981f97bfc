"""From encoded images to batches, the same for every data set.

Shuffling and augmentation are functions of (seed, epoch, image): a run that resumes at
epoch 3 sees the images that it would have seen.
"""

import functools
import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf

from core.config import Config
from data import image_files, splits
from data.source import Source

SHUFFLE_IMAGES = 2048  # largest number of encoded images in the shuffle buffer
HELD_BYTES = 256 * 2**20  # encoded subsets up to this size stay in memory; also bounds the buffer
_SELECTION_DRAW = 5  # separates the selection's random numbers from those of `splits`


@dataclass(frozen=True, eq=False)
class Data:
    """A data set with its splits, readable in batches.

    Batches are pairs of images, float32 of shape (B, S, S, 3), RGB in 0..255, and
    labels, int64 of shape (B,).

    Attributes:
        name: str. The name that the user wrote.
        version: str. The version that is read, e.g. `oxford_iiit_pet:4.0.0`.
        num_classes: int.
        class_names: list of str.
        split_sizes: dict from `train`, `validation` and `test` to a number of images;
            None for `validation` under protocol `paper`.
        batch_size: int. Images per training batch, at most all training images.
        steps_per_epoch: int. Training batches per epoch.
        majority_share: float. Share of the most frequent class in the training images,
            which is the accuracy of always guessing it.
        skipped_images: list of {"path": str, "reason": str}, the files that
            `--skip_bad_images` left out, or None for a set that does not consist of files.
    """

    name: str
    version: str
    num_classes: int
    class_names: list[str]
    split_sizes: dict[str, int | None]
    batch_size: int
    steps_per_epoch: int
    majority_share: float
    skipped_images: list | None
    _source: Source = field(repr=False)
    _parts: dict = field(repr=False)  # role -> (split name, positions), see splits.assign
    _row: object = field(repr=False)  # data.Dataset
    _cfg: object = field(repr=False)

    def train_batches(self, first_epoch: int, num_epochs: int, first_step: int = 0) -> tf.data.Dataset:
        """Returns the training batches of the epochs `first_epoch` to `num_epochs` - 1.

        Every epoch shuffles the images and drops its last, partial batch, so that all
        batches have one shape.

        Args:
            first_epoch: int, counted from 0.
            num_epochs: int. The epoch after the last.
            first_step: int. The number of batches of the first epoch to skip.

        Returns:
            tf.data.Dataset of (num_epochs - first_epoch) * steps_per_epoch - first_step
            batches.
        """
        cfg, row = self._cfg, self._row

        def decode(epoch, position, encoded, label):
            return decode_image(encoded, cfg.input_size), label, draw(cfg.seed, epoch, position)

        def finish(images, labels, draws):
            if cfg.augment:
                images = augment(images, draws, row.flip, row.rotation)
            return images, labels

        batches = (
            self._shuffled(self._train_records, first_epoch, num_epochs, first_step)
            .map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            .batch(self.batch_size, drop_remainder=True)
            .map(finish)
            .prefetch(2)
        )
        count = (num_epochs - first_epoch) * self.steps_per_epoch - first_step
        return batches.apply(tf.data.experimental.assert_cardinality(count))

    @property
    def outside_bytes(self):
        """int. Size of the weights outside the model that trains: 0, as no prefix is cached."""
        return 0

    def train_order(self, first_epoch, num_epochs, first_step=0):
        """Returns where `train_batches` finds its images among those of `train_view`.

        Returns:
            tf.data.Dataset of (epochs, places), int64 of shape (B,) each, one pair for each
            batch of `train_batches` with the same arguments.
        """
        images, _ = self._size("train")
        places = tf.data.Dataset.range(images).map(lambda place: (place,))
        shuffled = self._shuffled(places, first_epoch, num_epochs, first_step)
        return shuffled.batch(self.batch_size, drop_remainder=True)

    def train_view(self, epoch):
        """Returns all training images once, in the order of the data set.

        Args:
            epoch: int or None. The epoch whose augmentation the images have; None for none.

        Returns:
            tf.data.Dataset of batches; the last one may be smaller.
        """
        images = self._plain_batches(self._train_records, "train")
        if epoch is None:
            return images
        cfg, row = self._cfg, self._row
        draws = self._train_records.map(lambda position, *_: draw(cfg.seed, tf.constant(epoch, tf.int64), position))
        pairs = tf.data.Dataset.zip(images, draws.batch(cfg.batch_size))
        return pairs.map(lambda batch, draws: (augment(batch[0], draws, row.flip, row.rotation), batch[1]))

    def digest(self):
        """Returns the SHA-256 of the training and held-out images as they are stored, their places and labels."""
        total = hashlib.sha256()
        held_out = "test" if self._parts["validation"] is None else "validation"
        for role in ("train", held_out):
            for position, encoded, label in self._records(role).as_numpy_iterator():
                total.update(f"{role} {position} {label} {len(encoded)} ".encode() + encoded)
        return total.hexdigest()

    def _shuffled(self, records, first_epoch, num_epochs, first_step):
        """Returns (epoch, *record) in the order in which the epochs train; arguments as in `train_batches`."""
        cfg = self._cfg
        per_epoch = self.steps_per_epoch * self.batch_size
        buffer = _shuffle_buffer(*self._size("train"))
        epochs = np.arange(first_epoch, num_epochs, dtype=np.int64)
        states = [np.random.SeedSequence([cfg.seed, int(epoch)]).generate_state(1)[0] for epoch in epochs]
        shuffle_seeds = np.array(states, np.int64)
        left_out = np.where(epochs == first_epoch, first_step * self.batch_size, 0)

        def one_epoch(epoch, shuffle_seed, left_out):
            # `shuffle` also uses the global seed. Set within this traced function, it holds for
            # the function alone. It must not be 0: TensorFlow would compare the tensor seed as
            # a Python bool.
            tf.random.set_seed(1)
            shuffled = records.shuffle(buffer, seed=shuffle_seed, reshuffle_each_iteration=False)
            return shuffled.take(per_epoch).skip(left_out).map(lambda *record: (epoch, *record))

        return tf.data.Dataset.from_tensor_slices((epochs, shuffle_seeds, left_out)).flat_map(one_epoch)

    def validation_batches(self) -> tf.data.Dataset | None:
        """Returns all validation images, in fixed order, as a tf.data.Dataset of batches.

        The last batch may be smaller. None under protocol `paper`.
        """
        if self._parts["validation"] is None:
            return None
        return self._plain_batches(self._validation_records, "validation")

    def test_batches(self) -> tf.data.Dataset:
        """Returns all test images, in fixed order, as a tf.data.Dataset of batches.

        The last batch may be smaller.
        """
        return self._plain_batches(self._source.read(*self._parts["test"]), "test")

    def selection_batches(self, points: int, count: int) -> tf.data.Dataset:
        """Returns full batches of training images without augmentation, in seeded order.

        Args:
            points: int. Images per batch.
            count: int. The largest number of batches.

        Returns:
            tf.data.Dataset of known length, with as many full batches, up to `count`, as
            there are different training images for; one batch of all images if there are
            fewer than `points`. Every call returns the same batches.
        """
        split, positions = self._parts["train"]
        points = min(points, len(positions))
        rng = np.random.default_rng([self._cfg.seed, _SELECTION_DRAW])
        chosen = rng.permutation(positions)[: points * count]
        records = _all_of(self._source.read(split, chosen), len(chosen))
        # A source reads in an order of its own.
        by_position = np.argsort(records[0])
        order = by_position[np.searchsorted(records[0], chosen, sorter=by_position)]
        held = tf.data.Dataset.from_tensor_slices(tuple(tf.gather(part, order) for part in records))
        return self._decoded(held).batch(points, drop_remainder=True).prefetch(1)

    @functools.cached_property
    def _train_records(self):
        return self._records("train")

    @functools.cached_property
    def _validation_records(self):
        return self._records("validation")

    def _records(self, role):
        """Returns (position, encoded image, label) records, which every epoch reads.

        A small part is kept in memory: reading it from a large set takes a pass over all.
        """
        records = self._source.read(*self._parts[role])
        images, total_bytes = self._size(role)
        if total_bytes > HELD_BYTES:
            return records
        return tf.data.Dataset.from_tensor_slices(_all_of(records, images))

    def _size(self, role):
        """Returns (images, estimated encoded bytes) of a part."""
        split, positions = self._parts[role]
        mean = self._source.split_bytes[split] / len(self._source.labels[split])
        return len(positions), math.ceil(mean * len(positions))

    def _plain_batches(self, records, role):
        images, _ = self._size(role)
        count = math.ceil(images / self._cfg.batch_size)
        batches = self._decoded(records).batch(self._cfg.batch_size).prefetch(2)
        return batches.apply(tf.data.experimental.assert_cardinality(count))

    def _decoded(self, records):
        return records.map(
            lambda position, encoded, label: (decode_image(encoded, self._cfg.input_size), label),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )


def make(source: Source, row, cfg: Config) -> Data:
    """Splits a source and returns its `Data`.

    Args:
        source: Source.
        row: data.Dataset. Split names and augmentation.
        cfg: Config. Reads `protocol`, `limit_train`, `limit_test`, `input_size`,
            `batch_size`, `augment`, `seed` and `skip_bad_images`.

    Raises:
        UsageError: if there is no train split, too few images to split, or bad images.
    """
    parts = splits.assign(source.labels, (row.train, row.validation, row.test), cfg)
    parts, skipped_images = image_files.without_bad_images(source, parts, cfg)
    sizes = {role: part and len(part[1]) for role, part in parts.items()}
    batch_size = min(cfg.batch_size, sizes["train"])
    train_split, train_positions = parts["train"]
    train_labels = source.labels[train_split][train_positions]
    return Data(
        name=source.name,
        version=source.version,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        split_sizes=sizes,
        batch_size=batch_size,
        steps_per_epoch=sizes["train"] // batch_size,
        majority_share=float(np.bincount(train_labels).max() / sizes["train"]),
        skipped_images=skipped_images,
        _source=source,
        _parts=parts,
        _row=row,
        _cfg=cfg,
    )


def decode_image(encoded, size: int):
    """Decodes and resizes one image.

    Args:
        encoded: string tensor of shape (), as in `image_files.decode`.
        size: int. Pixels.

    Returns:
        float32 tensor of shape (size, size, 3), RGB in 0..255. The whole image is resized
        to a square without cropping.
    """
    image = tf.image.resize(image_files.decode(encoded), (size, size), method="bilinear")
    return tf.clip_by_value(image, 0.0, 255.0)


def draw(seed: int, epoch, position):
    """Returns the two random numbers in [0, 1) of an image in an epoch, float32 of shape (2,)."""
    key = tf.stack([tf.constant(seed, tf.int64), epoch])
    key = tf.random.experimental.stateless_fold_in(key, position)
    return tf.random.stateless_uniform((2,), key)


def augment(images, draws, flip: bool, rotation: float):
    """Mirrors and rotates each image by its two random numbers.

    Args:
        images: float32 tensor of shape (B, S, S, 3).
        draws: float32 tensor of shape (B, 2), in [0, 1): for the flip, for the angle.
        flip: bool. Whether to mirror half of the images, left to right.
        rotation: float. The largest rotation, as a fraction of a full turn.

    Returns:
        float32 tensor of shape (B, S, S, 3). Reflection fills the corners.
    """
    if flip:
        # Reversing rows, with one condition per image, is several times faster than four axes.
        size = images.shape[1]
        mirrored = tf.reshape(tf.reverse(tf.reshape(images, (-1, size, 3)), axis=[1]), (-1, size, size, 3))
        images = tf.raw_ops.Select(condition=draws[:, 0] < 0.5, x=mirrored, y=images)
    if rotation:
        angle = (2 * draws[:, 1] - 1) * (rotation * 2 * math.pi)  # (B,), radians
        size = images.shape[1]
        images = tf.raw_ops.ImageProjectiveTransformV3(
            images=images,
            transforms=_rotation_about_centre(angle, (size - 1) / 2),
            output_shape=(size, size),
            interpolation="BILINEAR",
            fill_mode="REFLECT",
            fill_value=0.0,
        )
    return images


def _rotation_about_centre(angle, centre):
    """Returns float32 rows a0..a7 of shape (B, 8).

    The pixel at (x, y) comes from (a0 x + a1 y + a2, a3 x + a4 y + a5).
    """
    cos, sin, zero = tf.cos(angle), tf.sin(angle), tf.zeros_like(angle)
    to_x = centre - (cos * centre - sin * centre)
    to_y = centre - (sin * centre + cos * centre)
    return tf.stack([cos, -sin, to_x, sin, cos, to_y, zero, zero], axis=1)


def _all_of(records, count):
    """Reads `count` records. Returns tensors (positions, encoded, labels), each (count,)."""
    return records.batch(count).get_single_element()


def _shuffle_buffer(images, total_bytes):
    """Returns the size of the shuffle buffer in images, bounded in number and in bytes."""
    if total_bytes <= HELD_BYTES:
        return images  # which are in memory
    return max(1, min(SHUFFLE_IMAGES, int(HELD_BYTES / (total_bytes / images))))
