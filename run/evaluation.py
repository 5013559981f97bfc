"""`--evaluate`: a saved model on the test split of a data set. Nothing trains."""

import logging
import os
import time

import numpy as np

from core import environment
from core.config import Config
from core.errors import RunError, UsageError
from core.files import whole_file
from core.log import log
from run.folder import RunFolder, check_place, library_versions

MAX_LABELS = 40  # classes whose names fit into the picture


def evaluate(cfg: Config, early_log: logging.Handler) -> str:
    """Evaluates the model file `cfg.model_name` and writes LOG_DIR/NAME_evaluation/.

    Args:
        cfg: Config.
        early_log: logging.Handler, as in `RunFolder`.

    Returns:
        str. The accuracy and the folder, as text.

    Raises:
        UsageError: if the model does not have one output per class of the data.
        RunError: if an output is not finite.
    """
    check_place(cfg)
    environment.load_tensorflow()
    import data
    from models import imagenet, own_model

    images = data.load(cfg)
    model = own_model.load(cfg)
    shapes = [tuple(output.shape) for output in model.outputs]
    if shapes != [(None, images.num_classes)]:
        raise UsageError(
            f"--evaluate needs a model with one output per class, {(None, images.num_classes)} for {cfg.dataset_name}. "
            f"Received: {', '.join(map(str, shapes))}; choose the data set that the model was trained on."
        )
    folder = RunFolder(cfg, early_log)
    log.info("Evaluating %s on %d test images of %s", cfg.model_name, images.split_sizes["test"], images.version)
    start = time.perf_counter()
    confusion = confusion_matrix(model, images, cfg.preprocessing or "none")
    seconds = time.perf_counter() - start

    names, totals, correct = images.class_names, confusion.sum(axis=1), confusion.diagonal()
    accuracy = 100 * int(correct.sum()) / int(totals.sum())
    folder.write_csv(
        "per_class.csv",
        [
            {"class": name, "images": total, "correct": right, "accuracy": 100 * right / total if total else None}
            for name, total, right in zip(names, totals.tolist(), correct.tolist(), strict=True)
        ],
    )
    folder.write_csv(
        "confusion.csv",
        [
            {"true class": name, **{f"predicted {other}": count for other, count in zip(names, row, strict=True)}}
            for name, row in zip(names, confusion.tolist(), strict=True)
        ],
    )
    with whole_file(folder.path / "confusion.png") as file:
        picture(confusion, names, f"{folder.name}: accuracy {accuracy:.2f} %").savefig(file, format="png", dpi=120)
    record = {
        "model": cfg.model_name,
        "sha256": imagenet.file_hash(os.path.expanduser(cfg.model_name)),
        "dataset_name": cfg.dataset_name,
        "dataset_version": images.version,
        "images": int(totals.sum()),
        "accuracy": accuracy,
        "seconds": seconds,
        "versions": library_versions(),
    }
    folder.write_json("evaluation.json", record)
    return f"Accuracy (%): {accuracy:.2f}\nImages: {record['images']}\nFolder: {folder.path}"


def confusion_matrix(model, images, preprocessing: str) -> np.ndarray:
    """Counts the test images by true and predicted class.

    Args:
        model: keras.Model.
        images: data.pipeline.Data.
        preprocessing: str. What the model expects, a key of `models.backbones.PREPROCESSING`.

    Returns:
        int64 array of shape (classes, classes): a row per true class, a column per
        predicted one.

    Raises:
        RunError: if an output is not finite.
    """
    from models.backbones import PREPROCESSING

    confusion = np.zeros((images.num_classes, images.num_classes), np.int64)
    for batch, labels in images.test_batches():
        outputs = model.predict_on_batch(PREPROCESSING[preprocessing](batch))
        if not np.isfinite(outputs).all():
            raise RunError("a model's outputs must be finite. Received: NaN or infinity; check its --preprocessing.")
        np.add.at(confusion, (labels.numpy(), outputs.argmax(axis=1)), 1)
    return confusion


def picture(confusion: np.ndarray, names: list[str], title: str):
    """Returns a matplotlib.figure.Figure of a confusion matrix, each row as shares of its class."""
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    drawing = Figure(figsize=(8, 7), layout="tight")
    axis = drawing.subplots()
    drawing.colorbar(axis.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the true class")
    if len(names) <= MAX_LABELS:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    return drawing
