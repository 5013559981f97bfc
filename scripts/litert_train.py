"""Trains a model.tflite of `main.py --save_litert` with LiteRT's interpreter, without TensorFlow.

    python scripts/litert_train.py logs/RUN/model.tflite
    python scripts/litert_train.py model.tflite --dataset_name image_folder --image_dir photos
    python scripts/litert_train.py model.tflite --restore model.weights.npz --num_epochs 0     # tests only

Needs numpy, pillow, scikit-learn and ai-edge-litert. A tenth of the training images is held
out; the epoch with the best accuracy on it is kept in a checkpoint of the trained weights,
and the test images are read once, at the end. Learning rates decay to 0 along a cosine, as
main.py's do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
from core.config import Config
from core.errors import RunError, UsageError, one_line
from core.files import whole_file
from core.units import MB
from data import digit_images, splits
from memory.measure import peak_rss_bytes


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0 done, 1 failed while training, 2 wrong use or bad input."""
    try:
        train(parse(argv))
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except (RunError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the parsed flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.tflite")
    parser.add_argument("--dataset_name", default="digits", help="digits (default) or image_folder")
    parser.add_argument("--image_dir", help="folder of images for --dataset_name image_folder")
    parser.add_argument("--num_epochs", type=int, default=10, help="(default: %(default)s); 0 only tests")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="of the first step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the order (default: %(default)s)")
    parser.add_argument("--restore", type=Path, metavar="CHECKPOINT", help="start from the weights of a checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="file to write (default: MODEL.weights.npz)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="also print the results as one line, last")
    args = parser.parse_args(argv)
    if args.num_epochs < 0 or args.seed < 0 or args.threads < 1 or not 0 < args.learning_rate < math.inf:
        raise UsageError(
            "--num_epochs and --seed must be at least 0, --threads at least 1, and --learning_rate a number over 0. "
            f"Received: {args.num_epochs}, {args.seed}, {args.threads} and {args.learning_rate}."
        )
    if args.dataset_name not in DATASETS:
        raise UsageError(
            f"--dataset_name must be one of {', '.join(DATASETS)}. Received: {args.dataset_name!r}; other data sets "
            "need TensorFlow: write their images into folders."
        )
    args.checkpoint = args.checkpoint or args.model.with_suffix(".weights.npz")
    if not args.checkpoint.parent.is_dir():
        raise UsageError(f"--checkpoint must be in an existing folder. Received: {args.checkpoint}; create the folder.")
    if args.num_epochs and args.checkpoint.exists() and args.checkpoint != args.restore:
        raise UsageError(
            f"--checkpoint must be new, or the file of --restore. Received: {args.checkpoint}, which exists; choose "
            "another name."
        )
    return args


def train(args: argparse.Namespace) -> None:
    """Trains, keeps the best epoch's weights, tests them, and prints the results."""
    model = Model(args.model, args.threads)
    cfg = Config(dataset_name=args.dataset_name, image_dir=args.image_dir, seed=args.seed)
    data.check_flags(cfg)
    source = DATASETS[args.dataset_name](cfg)
    if source.num_classes != model.num_classes:
        raise UsageError(
            f"the data must have the model's classes, labels 0 to {model.num_classes - 1}. Received: "
            f"{source.num_classes} classes; export a model that was trained on these data."
        )
    parts = splits.assign(source.labels, ("train", "validation", "test"), cfg)
    steps_per_epoch = len(parts["train"][1]) // model.batch_size
    if not steps_per_epoch and args.num_epochs:
        raise UsageError(
            f"training needs at least the {model.batch_size} images of a batch. Received: {len(parts['train'][1])}; "
            "export with a smaller --litert_batch."
        )
    if args.restore:
        model.restore(read_checkpoint(args.restore))

    best_accuracy, best, steps_s = evaluate(model, source, *parts["validation"]), model.save(), []
    if args.num_epochs:
        write_checkpoint(args.checkpoint, best)
    for epoch in range(args.num_epochs):
        losses, hits = [], []
        order = np.random.default_rng([args.seed, epoch]).permutation(parts["train"][1])
        for step in range(steps_per_epoch):
            positions = order[step * model.batch_size : (step + 1) * model.batch_size]
            images, labels = source.batch(parts["train"][0], positions, model.image_size)
            done = (epoch * steps_per_epoch + step) / (args.num_epochs * steps_per_epoch)
            start = time.perf_counter()
            loss, accuracy = model.step(images, labels, args.learning_rate * (1 + math.cos(math.pi * done)) / 2)
            steps_s.append(time.perf_counter() - start)
            if not math.isfinite(loss):
                raise RunError(
                    f"the loss must stay finite. Received: {loss} in epoch {epoch + 1}, step {step + 1}; "
                    "lower --learning_rate."
                )
            losses.append(loss)
            hits.append(accuracy)
        held_out = evaluate(model, source, *parts["validation"])
        print(
            f"epoch {epoch + 1}/{args.num_epochs}: loss {np.mean(losses):.4f}, accuracy {100 * np.mean(hits):.2f} %, "
            f"held out {100 * held_out:.2f} %, {model.batch_size / np.median(steps_s):.1f} images/s",
            flush=True,
        )
        if held_out > best_accuracy:
            best_accuracy, best = held_out, model.save()
            write_checkpoint(args.checkpoint, best)
    model.restore(best)
    results = {
        "accuracy": 100 * evaluate(model, source, *parts["test"]),
        "val_accuracy": 100 * best_accuracy,
        "step_s": float(np.median(steps_s)) if steps_s else None,
        "images_per_s": float(model.batch_size / np.median(steps_s)) if steps_s else None,
        "peak_rss_bytes": peak_rss_bytes(),
        "checkpoint": str(args.checkpoint) if args.num_epochs else None,
    }
    print(f"test accuracy {results['accuracy']:.2f} %, peak memory {results['peak_rss_bytes'] / MB:.1f} MB resident")
    if results["checkpoint"]:
        print(f"trained weights: {results['checkpoint']}")
    if args.json:
        print(json.dumps(results))


def evaluate(model: Model, source: Images, split: str, positions: np.ndarray) -> float:
    """Returns the share of the images that the model classifies correctly."""
    hits = 0
    for start in range(0, len(positions), model.batch_size):
        images, labels = source.batch(split, positions[start : start + model.batch_size], model.image_size)
        hits += int((model.logits(images).argmax(1) == labels).sum())
    return hits / len(positions)


class Model:
    """A model.tflite in LiteRT's interpreter.

    Attributes:
        batch_size: int. Images of a training step.
        image_size: int. Side of the square images, in pixels.
        num_classes: int.
    """

    def __init__(self, path: Path, threads: int):
        """Loads the file. Raises UsageError if it is not a complete file of `main.py --save_litert`."""
        from ai_edge_litert.interpreter import Interpreter

        rule = "MODEL.tflite must be a complete file that main.py --save_litert wrote"
        if not path.is_file():
            raise UsageError(f"{rule}. Received: {path}, which is not a file; check the path.")
        try:
            self._interpreter = Interpreter(str(path), num_threads=threads)
            runners = {name: self._interpreter.get_signature_runner(name) for name in _SIGNATURES}
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"{rule}. Received: {path} ({one_line(error)}); export it again.") from error
        self._train, self._infer, self._save, self._restore = runners.values()
        self.batch_size, self.image_size = (
            int(size) for size in self._train.get_input_details()["images"]["shape"][:2]
        )
        self.num_classes = int(self._infer.get_output_details()["logits"]["shape"][1])

    def step(self, images: np.ndarray, labels: np.ndarray, learning_rate: float) -> tuple[float, float]:
        """Trains on a batch. Returns the loss and the accuracy from before the step.

        Raises:
            UsageError: if a label is not a class, or a shape differs from the file's.
        """
        shape = (self.batch_size, self.image_size, self.image_size, 3)
        if (
            images.shape != shape
            or labels.shape != shape[:1]
            or not set(labels.tolist()) <= set(range(self.num_classes))
        ):
            raise UsageError(
                f"a training step takes images of shape {shape} and as many labels of 0 to {self.num_classes - 1}. "
                f"Received: images of shape {images.shape} and labels {labels.tolist()}; correct them."
            )
        found = self._train(images=images, labels=labels, learning_rate=np.float32(learning_rate))
        return float(found["loss"]), float(found["accuracy"])

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns float32 (images, classes) of at most a batch of images."""
        missing = self.batch_size - len(images)
        padded = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.float32)])
        return self._infer(images=padded)["logits"][: len(images)]

    def save(self) -> dict[str, np.ndarray]:
        """Returns the trained weights by name."""
        return {name: np.array(value) for name, value in self._save().items()}

    def restore(self, weights: dict[str, np.ndarray]) -> None:
        """Sets the trained weights and zeroes the momentum. Raises UsageError if they are another model's."""
        expected = {name: tuple(details["shape"]) for name, details in self._restore.get_input_details().items()}
        given = {name: value.shape for name, value in weights.items() if value.dtype == np.float32}
        if given != expected or len(given) != len(weights):
            wrong = sorted(name for name in {*given, *expected, *weights} if given.get(name) != expected.get(name))
            raise UsageError(
                f"a checkpoint must hold this model's {len(expected)} trained weights, float32. Received: another "
                f"shape, type or name of {', '.join(wrong[:3])}; give the checkpoint of this model."
            )
        self._restore(**weights)


_SIGNATURES = ("train", "infer", "save", "restore")


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint. Raises UsageError if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"--restore must be a complete checkpoint of this script. Received: {path}, "
            f"{'which is damaged or another file' if path.is_file() else 'which is not a file'}; give another one."
        ) from error


def write_checkpoint(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Writes the trained weights; the file has its name once it is complete."""
    with whole_file(path) as file:
        np.savez(file, **weights)


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        labels: dict of {split: int64 (images,)}.
        images: dict of {split: list}. What `read` takes.
        read: function that returns an image as uint8 (height, width, 3), RGB.
        num_classes: int.
    """

    labels: dict
    images: dict
    read: object
    num_classes: int

    def batch(self, split: str, positions: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns float32 images (B, size, size, 3), RGB in 0..255, and int32 labels (B,)."""
        images = [resized(self.read(self.images[split][position]), size) for position in positions]
        return np.stack(images), self.labels[split][positions].astype(np.int32)


def digits(cfg: Config) -> Images:
    """Returns scikit-learn's digits, with the test images of main.py's digits."""
    grey, labels = digit_images.load()
    parts = digit_images.split(labels)
    return Images(
        labels={name: labels[part] for name, part in parts.items()},
        images={name: list(grey[part]) for name, part in parts.items()},
        read=lambda image: np.repeat(image[:, :, None], 3, axis=2),
        num_classes=10,
    )


def image_folder(cfg: Config) -> Images:
    """Returns the images of `cfg.image_dir`, in main.py's order, after each has been read once.

    Raises:
        UsageError: if the folder has fewer than two classes, an image without a known class, or one that is damaged.
    """
    source = data.prepare(cfg)
    for file in itertools.chain(*source.files.values()):
        read_image(file)
    return Images(source.labels, source.files, read_image, len(source.class_names))


def read_image(path: Path) -> np.ndarray:
    """Returns an image file as uint8 (height, width, 3), RGB: 16 bits become 8, transparency is dropped.

    Raises:
        UsageError: if it is damaged, or not an image.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
                grey = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's readers raise many types for damaged files
        raise UsageError(f"images must be readable. Received: {path} ({error}); remove or replace it.") from error


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """Returns float32 (size, size, 3): the image stretched to a square as `tf.image.resize` does, bilinear.

    Args:
        image: uint8 (height, width, 3).
        size: int. Pixels.
    """
    image = image.astype(np.float32)
    rows, row_share = _neighbours(image.shape[0], size)
    columns, column_share = _neighbours(image.shape[1], size)
    upper, lower = image[rows[0]], image[rows[1]]  # (size, width, 3)
    image = upper + (lower - upper) * row_share[:, None, None]
    left, right = image[:, columns[0]], image[:, columns[1]]
    return left + (right - left) * column_share[None, :, None]


def _neighbours(before, after):
    """Returns the two pixels on either side of each new pixel's centre, int (2, after), and the second one's share."""
    centres = (np.arange(after, dtype=np.float32) + np.float32(0.5)) * np.float32(before / after) - np.float32(0.5)
    below = np.floor(centres)
    first, second = below.clip(0).astype(int), np.ceil(centres).clip(max=before - 1).astype(int)
    return np.stack([first, second]), centres - below


DATASETS = {"digits": digits, "image_folder": image_folder}


if __name__ == "__main__":
    sys.exit(main())
