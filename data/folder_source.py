"""Images in folders, one folder per class.

TensorFlow is imported when images are read: `scripts/litert_train.py` lists them without it.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from core.config import Config
from core.errors import UsageError
from core.log import log
from data.source import Source, check_num_classes

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")


def open_source(cfg: Config) -> Source:
    """Indexes the folder `cfg.image_dir`.

    It holds `train/CLASS/` with `test/CLASS/` or `validation/CLASS/` or both, or only
    `CLASS/`. Images are directly in the class folders. Classes are sorted by name.
    Names that start with a dot, files of other types and folders in class folders are
    ignored; the log counts them. Links to folders and files are followed.
    `image_files.without_bad_images` checks the images that a run reads.

    Args:
        cfg: Config. Reads `image_dir` and `num_classes`.

    Raises:
        UsageError: if the folder is missing or unreadable, has fewer than two classes, a
            class without images, a name that is not Unicode, or a test class that is not
            trained, or if `num_classes` contradicts it.
    """
    root = Path(cfg.image_dir).expanduser()
    if not root.is_dir():
        what = "a file" if root.exists() else "nothing there"
        raise _error("must be an existing folder", f"{root} ({what})", "correct the path")
    if "train" in _folders(root) and _folders(root / "train"):
        split_roots = {name: root / name for name in SPLITS if name in _folders(root)}
    else:
        split_roots = {"train": root}

    class_names = _folders(split_roots["train"])
    if split_roots["train"] == root and set(class_names) & set(SPLITS):
        raise _error(
            "must hold train/CLASS/ and test/CLASS/, or CLASS/",
            f"{root} with {', '.join(class_names)} and no train/CLASS/",
            "put the images into class folders",
        )
    if len(class_names) < 2:
        raise _error(
            "must hold at least two class folders",
            f"{split_roots['train']} with {len(class_names)}",
            "put the images of each class into a folder of its own",
        )
    check_num_classes(cfg, len(class_names))

    index = {
        split: _index(split_root, class_names, may_lack_classes=split != "train")
        for split, split_root in split_roots.items()
    }

    def read(split, positions):
        import tensorflow as tf

        paths, labels = index[split]
        positions = np.asarray(positions, np.int64)
        # As bytes, because a file's name need not be Unicode.
        names = np.array([os.fsencode(path) for path in paths], dtype=object)
        rows = (positions, names[positions], labels[positions])
        return tf.data.Dataset.from_tensor_slices(rows).map(
            lambda position, path, label: (position, tf.io.read_file(path), label),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )

    return Source(
        name=cfg.dataset_name,
        version="image_folder",
        class_names=class_names,
        labels={split: labels for split, (_, labels) in index.items()},
        split_bytes={
            split: sum(os.path.getsize(path) for path in paths if os.path.exists(path))
            for split, (paths, _) in index.items()
        },
        read=read,
        files={split: paths for split, (paths, _) in index.items()},
    )


def _index(split_root, class_names, may_lack_classes):
    """Returns (list of path strings, int64 array of labels), in the order of a hash of the path.

    In the order of paths all images of a class would be consecutive, and a shuffle buffer
    smaller than the data would not mix the classes.
    """
    unknown = sorted(set(_folders(split_root)) - set(class_names))
    if unknown:
        raise _error(
            "must have the same classes in every split",
            f"{split_root} with {', '.join(unknown)}, which train/ lacks",
            "add these classes to train/ or remove them",
        )
    entries, ignored = [], 0
    for label, class_name in enumerate(class_names):
        folder = split_root / class_name
        files, others = _images(folder) if folder.is_dir() else ([], 0)
        ignored += others
        if not files and not may_lack_classes:
            raise _error(
                f"must hold images ({' '.join(SUFFIXES)}) in each class folder",
                f"{folder} without any",
                "add images or remove the folder",
            )
        for file in files:
            key = hashlib.sha256(os.fsencode(f"{class_name}/{file.name}")).hexdigest()
            entries.append((key, str(file), label))
    if ignored:
        log.warning(
            "%s: ignored %d hidden files, folders, or files of other types in the class folders", split_root, ignored
        )
    if not entries:
        raise _error("must hold images in each split", f"{split_root} without any", "add images")
    entries.sort()
    _, paths, labels = zip(*entries)
    return list(paths), np.array(labels, np.int64)


def _folders(root):
    names = sorted(entry.name for entry in _entries(root) if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        if name != printable(name):  # the run folder holds the name as Unicode
            raise _error("must have class folders with Unicode names", printable(str(root / name)), "rename it")
    return names


def _images(folder):
    """Returns (files with the suffix of an image; number of other entries)."""
    entries = _entries(folder)
    images = [
        entry
        for entry in entries
        if entry.suffix.lower() in SUFFIXES and not entry.is_dir() and not entry.name.startswith(".")
    ]
    return images, len(entries) - len(images)


def _entries(folder):
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise _error(
            "must be readable", f"{printable(str(folder))} ({error.strerror})", "change its permissions"
        ) from error


def printable(path: str) -> str:
    """Returns a path as valid Unicode: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _error(rule, received, fix):
    return UsageError(f"--image_dir {rule}. Received: {received}; {fix}.")
