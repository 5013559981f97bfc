"""The pipeline on digits: sizes, order, repeatability, resumption, augmentation."""

import math

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

import data
from core.config import Config
from data import pipeline


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def load(data_dir):
    defaults = {"data_dir": data_dir, "input_size": 8}
    return lambda **settings: data.load(Config(**defaults | settings))


def arrays(batches):
    return [(images.numpy(), labels.numpy()) for images, labels in batches]


def same(one, two):
    return len(one) == len(two) and all(
        np.array_equal(a, b) for first, second in zip(one, two) for a, b in zip(first, second)
    )


def images_of(batches):
    """Returns the images as a sorted list of bytes: a multiset, whatever the order."""
    return sorted(image.tobytes() for images, _ in batches for image in images)


def test_sizes_and_types(load):
    loaded = load(input_size=32)
    assert loaded.name == "digits"
    assert loaded.version == "digits:1.0.0"
    assert loaded.num_classes == 10
    assert loaded.class_names == [str(digit) for digit in range(10)]
    assert loaded.split_sizes == {"train": 1293, "validation": 144, "test": 360}
    assert loaded.steps_per_epoch == 40
    images, labels = next(iter(loaded.train_batches(0, 1)))
    assert images.shape == (32, 32, 32, 3) and images.dtype == tf.float32
    assert labels.shape == (32,) and labels.dtype == tf.int64
    assert images.numpy().min() >= 0 and 200 < images.numpy().max() <= 255


def test_digits_equal_those_of_scikit_learn(load):
    plain = load(protocol="paper", batch_size=1437, augment=False)
    read = arrays(plain.train_batches(0, 1)) + arrays(plain.test_batches())
    pixels = np.concatenate([images for images, _ in read])[..., 0]
    labels = np.concatenate([labels for _, labels in read])
    original = load_digits()
    expected = np.rint(original.images * 255 / 16)

    def key(rows, targets):
        return sorted((row.astype(np.uint8).tobytes(), int(t)) for row, t in zip(rows, targets))

    assert key(pixels, labels) == key(expected, original.target)


def test_splits_are_stratified_and_disjoint(load):
    loaded = load(augment=False, batch_size=3)  # divides the sizes of all splits
    parts = {
        "train": arrays(loaded.train_batches(0, 1)),
        "validation": arrays(loaded.validation_batches()),
        "test": arrays(loaded.test_batches()),
    }
    for name, expected in {"train": 129.3, "validation": 14.4, "test": 36.0}.items():
        counts = np.bincount(np.concatenate([labels for _, labels in parts[name]]), minlength=10)
        assert np.abs(counts - expected).max() < 0.05 * expected + 1.5, name
    original = load_digits()
    together = sum((images_of(part) for part in parts.values()), [])
    expected = np.rint(original.images * 255 / 16).astype(np.float32)
    expected = np.repeat(expected[..., None], 3, axis=-1)
    assert sorted(together) == sorted(image.tobytes() for image in expected)


def test_batches_depend_on_the_seed(load):
    first = arrays(load(seed=3, limit_train=200).train_batches(0, 1))
    assert same(first, arrays(load(seed=3, limit_train=200).train_batches(0, 1)))
    assert not same(first, arrays(load(seed=4, limit_train=200).train_batches(0, 1)))


def test_other_seeding_does_not_change_batches(load):
    loaded = load(limit_train=200)
    tf.random.set_seed(1)
    first = arrays(loaded.train_batches(0, 1))
    tf.random.set_seed(2)
    assert same(first, arrays(loaded.train_batches(0, 1)))


@pytest.mark.parametrize("held_bytes", [pipeline.HELD_BYTES, 20_000], ids=["held", "streamed"])
def test_resumed_run_sees_the_same_batches(load, monkeypatch, held_bytes):
    monkeypatch.setattr(pipeline, "HELD_BYTES", held_bytes)
    settings = {"limit_train": 230, "batch_size": 32}
    whole = arrays(load(**settings).train_batches(0, 5))
    loaded = load(**settings)
    assert len(whole) == 5 * loaded.steps_per_epoch == 5 * 6
    next(iter(loaded.train_batches(0, 5)))  # a run that stopped midway leaves no trace
    assert same(whole[18:], arrays(loaded.train_batches(3, 5)))
    assert not same(whole[12:18], whole[18:24])


def test_streaming_and_holding_see_the_same_images(load, monkeypatch):
    settings = {"limit_train": 100, "batch_size": 90, "augment": False}
    held = arrays(load(**settings).train_batches(0, 1))
    monkeypatch.setattr(pipeline, "HELD_BYTES", 1000)
    streamed = arrays(load(**settings).train_batches(0, 1))
    assert images_of(held) == images_of(streamed)


def test_streamed_set_passes_through_a_small_buffer(load, monkeypatch):
    monkeypatch.setattr(pipeline, "HELD_BYTES", 0)
    monkeypatch.setattr(pipeline, "SHUFFLE_IMAGES", 7)
    loaded = load(limit_train=50, protocol="paper", batch_size=25, augment=False)
    assert len(set(images_of(arrays(loaded.train_batches(0, 1))))) == 50


def test_each_epoch_has_an_order_of_its_own(load):
    loaded = load(limit_train=50, protocol="paper", batch_size=50, augment=False)
    one, two = arrays(loaded.train_batches(0, 2))
    assert images_of([one]) == images_of([two])
    assert not same([one], [two])


def test_every_image_is_seen_over_the_epochs(load):
    loaded = load(limit_train=50, protocol="paper", batch_size=16, augment=False)
    assert loaded.steps_per_epoch == 3
    one = set(images_of(arrays(loaded.train_batches(0, 1))))
    many = set(images_of(arrays(loaded.train_batches(0, 8))))
    assert len(one) == 48 and len(many) == 50


def test_fewer_images_than_a_batch_are_one_batch(load):
    loaded = load(limit_train=10, protocol="paper", batch_size=32)
    assert (loaded.steps_per_epoch, loaded.batch_size) == (1, 10)
    assert [images.shape[0] for images, _ in loaded.train_batches(0, 2)] == [10, 10]


def test_lengths_are_known(load):
    loaded = load()
    assert len(loaded.train_batches(2, 5)) == 3 * loaded.steps_per_epoch
    assert len(loaded.train_batches(5, 5)) == 0
    assert arrays(loaded.train_batches(5, 5)) == []
    assert len(loaded.test_batches()) == math.ceil(360 / 32)


@pytest.mark.slow
def test_evaluation_keeps_partial_batches_in_fixed_order(load):
    loaded = load(limit_test=50)
    test = arrays(loaded.test_batches())
    assert [len(labels) for _, labels in test] == [32, 18]
    assert same(test, arrays(loaded.test_batches()))
    validation = arrays(loaded.validation_batches())
    assert [len(labels) for _, labels in validation] == [32, 32, 32, 32, 16]
    assert same(validation, arrays(load(limit_test=50).validation_batches()))


def test_paper_protocol_has_no_validation(load):
    loaded = load(protocol="paper")
    assert loaded.validation_batches() is None
    assert loaded.split_sizes == {"train": 1437, "validation": None, "test": 360}


def test_selection_batches_are_full_seeded_training_images(load):
    loaded = load(seed=5)
    batches = arrays(loaded.selection_batches(32, 4))
    assert [images.shape for images, _ in batches] == [(32, 8, 8, 3)] * 4
    next(iter(loaded.train_batches(0, 1)))
    assert same(batches, arrays(loaded.selection_batches(32, 4)))
    assert not same(batches, arrays(load(seed=6).selection_batches(32, 4)))
    plain = load(seed=5, augment=False, batch_size=431)  # a third of the training images
    assert set(images_of(batches)) <= set(images_of(arrays(plain.train_batches(0, 1))))
    assert len(set(images_of(batches))) == 128


def test_fewer_selection_batches_are_the_first_of_more(load):
    """So the order is the drawn one, not that in which the files hold the images."""
    loaded = load()
    more = arrays(loaded.selection_batches(10, 4))
    assert same(more[:1], arrays(loaded.selection_batches(10, 1)))


def test_selection_labels_belong_to_their_images(load):
    loaded = load(augment=False, batch_size=1)
    truth = {images.tobytes(): labels[0] for images, labels in arrays(loaded.train_batches(0, 1))}
    for images, labels in arrays(loaded.selection_batches(50, 2)):
        assert [truth[image.tobytes()] for image in images] == labels.tolist()


def test_fewer_selection_images_than_requested(load):
    loaded = load(limit_train=50, protocol="paper")
    assert [len(y) for _, y in arrays(loaded.selection_batches(20, 4))] == [20, 20]
    assert [len(y) for _, y in arrays(loaded.selection_batches(64, 4))] == [50]


@pytest.mark.slow
def test_only_training_images_are_augmented(load):
    settings = {"limit_train": 64, "protocol": "paper", "input_size": 16, "batch_size": 64}
    augmented, plain = load(**settings), load(**settings, augment=False)
    assert same(arrays(augmented.selection_batches(64, 1)), arrays(plain.selection_batches(64, 1)))
    assert same(arrays(augmented.test_batches()), arrays(plain.test_batches()))
    ((one, labels),) = arrays(augmented.train_batches(0, 1))
    ((two, plain_labels),) = arrays(plain.train_batches(0, 1))
    assert np.array_equal(labels, plain_labels)
    assert np.abs(one - two).max(axis=(1, 2, 3)).min() > 1  # every image is turned a little


def test_digits_are_never_mirrored_and_photos_are():
    rows = {name: (row.flip, row.rotation) for name, row in data.DATASETS.items()}
    assert rows.pop("digits") == (False, 0.05)
    assert set(rows.values()) == {(True, 0.2)}


def test_augmentation_follows_its_random_numbers():
    images = tf.constant(np.random.default_rng(0).uniform(0, 255, (2, 9, 9, 3)), tf.float32)
    no_turn = tf.constant([[0.2, 0.5], [0.8, 0.5]])  # the first is mirrored, neither is turned
    flipped = pipeline.augment(images, no_turn, True, 0.0).numpy()
    np.testing.assert_array_equal(flipped[0], images.numpy()[0, :, ::-1])
    np.testing.assert_array_equal(flipped[1], images.numpy()[1])
    np.testing.assert_allclose(pipeline.augment(images, no_turn, False, 0.2), images, atol=1e-3)
    quarter = tf.constant([[0.9, 1.0], [0.9, 0.0]])  # a quarter of a turn either way
    turned = pipeline.augment(images, quarter, False, 0.25).numpy()
    np.testing.assert_allclose(turned[0], np.rot90(images.numpy()[0], 1), atol=1e-2)
    np.testing.assert_allclose(turned[1], np.rot90(images.numpy()[1], -1), atol=1e-2)


def test_draws_depend_on_seed_epoch_and_image_alone():
    def numbers(seed, epoch, position):
        key = [tf.constant(value, tf.int64) for value in (epoch, position)]
        return tuple(pipeline.draw(seed, *key).numpy())

    assert numbers(0, 1, 2) == numbers(0, 1, 2)
    keys = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (1, 0, 2), (0, 2, 1)]
    assert len({numbers(*key) for key in keys}) == len(keys)


def test_images_are_resized_without_cropping():
    left, right = np.zeros((4, 6, 3), np.uint8), np.full((4, 6, 3), 255, np.uint8)
    wide = tf.io.encode_png(np.concatenate([left, right], axis=1))  # 4 x 12
    square = pipeline.decode_image(wide, 4).numpy()
    assert square[:, 0].max() == 0 and square[:, 3].min() == 255
