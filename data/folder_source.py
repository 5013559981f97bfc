"""Images in folders, one folder per class."""

import hashlib
from pathlib import Path

import numpy as np
import tensorflow as tf

from data.source import Source, check_num_classes
from errors import UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
# How files that can be decoded begin: JPEG, PNG, BMP, and GIF, whatever they are called.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"GIF8")
SPLITS = ("train", "validation", "test")


def open_source(cfg):
    """Indexes the folder `cfg.image_dir`.

    Either `train/CLASS/` with `test/CLASS/` or `validation/CLASS/` or both, or only
    `CLASS/`. Images lie directly in the class folders. Classes are sorted by name.
    Names that start with a dot are ignored, and so are files of other types.

    Args:
        cfg: Config. Reads `image_dir` and `num_classes`.

    Returns:
        `Source`.

    Raises:
        UsageError: no such folder, fewer than two classes, a class without images, a
            file that is no image, a test class that isn't trained, or a contradicting
            `num_classes`.
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
            "put each class's images into a folder of its own",
        )
    check_num_classes(cfg, len(class_names))

    index = {
        split: _index(split_root, class_names, may_lack_classes=split != "train")
        for split, split_root in split_roots.items()
    }

    def read(split, positions):
        paths, labels = index[split]
        positions = np.asarray(positions, np.int64)
        rows = (positions, np.array(paths, dtype=object)[positions], labels[positions])
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
            split: sum(Path(path).stat().st_size for path in paths)
            for split, (paths, _) in index.items()
        },
        read=read,
    )


def _index(split_root, class_names, may_lack_classes):
    """Returns (list of path strings, int64 array of labels), in the order of a hash of the path.

    By path, all images of a class would follow each other, and a shuffle buffer smaller
    than the data would never mix the classes.
    """
    unknown = sorted(set(_folders(split_root)) - set(class_names))
    if unknown:
        raise _error(
            "must have the same classes in every split",
            f"{split_root} with {', '.join(unknown)}, which train/ lacks",
            "add these classes to train/ or remove them",
        )
    entries = []
    for label, class_name in enumerate(class_names):
        folder = split_root / class_name
        files = _images(folder) if folder.is_dir() else []
        if not files and not may_lack_classes:
            raise _error(
                f"must hold images ({' '.join(SUFFIXES)}) in each class folder",
                f"{folder} without any",
                "add images or remove the folder",
            )
        for file in files:
            _check_beginning(file)
            key = hashlib.sha256(f"{class_name}/{file.name}".encode()).hexdigest()
            entries.append((key, str(file), label))
    if not entries:
        raise _error("must hold images in each split", f"{split_root} without any", "add images")
    entries.sort()
    _, paths, labels = zip(*entries)
    return list(paths), np.array(labels, np.int64)


def _check_beginning(file):
    """Finds empty and misnamed files before the run does, which couldn't say which file it was."""
    with file.open("rb") as stream:
        if not stream.read(8).startswith(_BEGINNINGS):
            raise _error("must hold JPEG, PNG or BMP images", f"{file}, which is none", "remove it")


def _folders(root):
    return sorted(e.name for e in root.iterdir() if e.is_dir() and not e.name.startswith("."))


def _images(folder):
    return [
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in SUFFIXES and entry.is_file() and not entry.name.startswith(".")
    ]


def _error(rule, received, fix):
    return UsageError(f"--image_dir {rule}. Received: {received}; {fix}.")
