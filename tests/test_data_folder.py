"""Image folders: both layouts, all formats, all errors."""

import numpy as np
import pytest
from archives import image_bytes

import data
from core.config import Config
from core.errors import UsageError
from data import pipeline


def write(root, files):
    """Writes images: dict from a path below `root` to (format, mode)."""
    for number, (name, (image_format, mode)) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number, image_format, mode))


def fill(root, counts):
    """Writes PNG images: dict from a class folder below `root` to how many."""
    for folder, count in counts.items():
        write(root / folder, {f"{number}.png": ("PNG", "RGB") for number in range(count)})


def load(root, **settings):
    settings = {"batch_size": 4, "input_size": 8} | settings
    return data.load(Config(dataset_name="image_folder", image_dir=str(root), **settings))


def test_train_and_test_folders(tmp_path):
    fill(tmp_path, {"train/b": 6, "train/a": 4, "test/a": 2, "test/b": 1})
    loaded = load(tmp_path)
    assert loaded.class_names == ["a", "b"]
    assert loaded.split_sizes == {"train": 9, "validation": 1, "test": 3}
    assert (loaded.version, loaded.num_classes) == ("image_folder", 2)
    labels = np.concatenate([y.numpy() for _, y in loaded.test_batches()])
    assert sorted(labels) == [0, 0, 1]


def test_own_validation_folder(tmp_path):
    fill(tmp_path, {"train/a": 4, "train/b": 4, "validation/a": 3, "test/b": 1})
    assert load(tmp_path).split_sizes == {"train": 8, "validation": 3, "test": 1}


def test_class_folders_alone_are_split(tmp_path):
    fill(tmp_path, {"a": 10, "b": 10})
    assert load(tmp_path).split_sizes == {"train": 14, "validation": 2, "test": 4}


def test_labels_belong_to_their_images(tmp_path):
    fill(tmp_path, {"a": 3, "b": 3, "c": 3})
    for label, name in enumerate("abc"):  # every class gets pixels of its own
        for number in range(3):
            content = image_bytes(label, "PNG", "RGB")
            (tmp_path / name / f"{number}.png").write_bytes(content)
    expected = [pipeline.decode_image(image_bytes(label, "PNG", "RGB"), 8).numpy() for label in range(3)]
    seen = set()
    for images, labels in load(tmp_path, augment=False).train_batches(0, 2):
        for image, label in zip(images.numpy(), labels.numpy()):
            np.testing.assert_array_equal(image, expected[label])
            seen.add(int(label))
    assert seen == {0, 1, 2}


def test_every_format_and_colour_mode_is_read(tmp_path):
    files = {
        "train/a/1.JPG": ("JPEG", "RGB"),
        "train/a/2.jpeg": ("JPEG", "L"),
        "train/a/3.Png": ("PNG", "RGBA"),
        "train/a/4.png": ("PNG", "L"),
        "train/b/5.png": ("PNG", "LA"),
        "train/b/6.bmp": ("BMP", "RGB"),
        "train/b/7.BMP": ("BMP", "L"),
        "train/b/8.png": ("PNG", "P"),
        "test/a/9.bmp": ("BMP", "RGBA"),
        "test/b/0.jpg": ("JPEG", "CMYK"),
    }
    write(tmp_path, files)
    loaded = load(tmp_path, protocol="paper", batch_size=8)
    ((images, _),) = loaded.train_batches(0, 1)
    assert images.shape == (8, 8, 8, 3)
    ((images, _),) = loaded.test_batches()
    assert images.shape == (2, 8, 8, 3)
    assert 0 <= images.numpy().min() < images.numpy().max() <= 255


def test_bmp_with_alpha_and_grey_have_the_right_pixels():
    rgb = pipeline.decode_image(image_bytes(1, "BMP", "RGB"), 16).numpy()
    np.testing.assert_array_equal(pipeline.decode_image(image_bytes(1, "BMP", "RGBA"), 16).numpy(), rgb)
    grey = pipeline.decode_image(image_bytes(1, "PNG", "L"), 16).numpy()
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    assert np.ptp(grey) > 50


def test_hidden_and_foreign_files_are_ignored(tmp_path):
    fill(tmp_path, {"train/a": 4, "train/b": 4, "test/a": 1, "train/.cache": 2, ".git/x": 1})
    write(tmp_path, {"train/a/.hidden.png": ("PNG", "RGB")})
    (tmp_path / "train/a/notes.txt").write_text("not an image")
    loaded = load(tmp_path)
    assert loaded.class_names == ["a", "b"]
    assert loaded.split_sizes == {"train": 7, "validation": 1, "test": 1}


def test_order_is_independent_of_the_folders_location(tmp_path):
    fill(tmp_path / "one", {"a": 9, "b": 9})
    fill(tmp_path / "two", {"a": 9, "b": 9})
    one, two = ([y.numpy().tolist() for _, y in load(tmp_path / name).train_batches(0, 2)] for name in ("one", "two"))
    assert one == two


def test_stored_order_mixes_classes(tmp_path):
    fill(tmp_path, {"train/a": 30, "train/b": 30, "test/a": 1})
    labels = data.prepare(Config(dataset_name="image_folder", image_dir=str(tmp_path))).labels
    assert len(set(labels["train"][:10])) == 2


ERRORS = {
    "missing": ({}, "nowhere", "existing folder.*nothing there"),
    "file": ({"train/a": 1}, "train/a/0.png", "existing folder.*a file"),
    "one class": ({"train/a": 2, "test/a": 1}, ".", "at least two class folders.*with 1"),
    "one class alone": ({"a": 2}, ".", "at least two class folders.*with 1"),
    "empty": ({}, ".", "at least two class folders.*with 0"),
    "no images in a class": ({"train/a": 2, "train/b": 0}, ".", "each class folder.*train/b"),
    "no images in test": ({"train/a": 2, "train/b": 2, "test/a": 0}, ".", "each split.*test"),
    "untrained test class": ({"train/a": 2, "train/b": 2, "test/c": 1}, ".", "same classes.*test with c"),
    "splits without classes": ({"train": 3, "test": 3}, ".", "train/CLASS/"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_invalid_folders_are_refused(tmp_path, case):
    counts, image_dir, message = ERRORS[case]
    for folder in counts:
        (tmp_path / folder).mkdir(parents=True)
    fill(tmp_path, counts)
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path / image_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_file_that_is_not_an_image_is_named(tmp_path, content):
    fill(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a" / "broken.jpg").write_bytes(content)
    with pytest.raises(UsageError, match=r"a/broken.jpg \((empty|not a JPEG)"):
        load(tmp_path)


def test_image_dir_and_image_folder_need_each_other(tmp_path):
    with pytest.raises(UsageError, match="add --image_dir FOLDER"):
        data.load(Config(dataset_name="image_folder"))
    with pytest.raises(UsageError, match="leave out --image_dir"):
        data.load(Config(dataset_name="digits", image_dir=str(tmp_path)))


def test_num_classes_is_checked(tmp_path):
    fill(tmp_path, {"a": 5, "b": 5})
    with pytest.raises(UsageError, match="has 2. Received: 3"):
        load(tmp_path, num_classes=3)
    assert load(tmp_path, num_classes=2).num_classes == 2
