"""Checks a .keras model file by its configuration alone: no class is imported, and nothing in it runs.

What only the loaded model shows, such as its output, `own_model.py` checks.
"""

import functools
import json
import os
import zipfile
from collections.abc import Iterator

from core.errors import UsageError, one_line

EXTENSION = ".keras"


def is_path(model_name: str) -> bool:
    """Returns whether a `--model_name` is the path of a model file."""
    return model_name.lower().endswith(EXTENSION)


def check(path: str) -> int | None:
    """Checks that a file holds a model that takes one RGB image per example.

    Args:
        path: str. A .keras file.

    Returns:
        int or None. The side of its square images in pixels; None if it takes any size.

    Raises:
        UsageError: if the file is missing, damaged or no model; if the model is neither
            functional nor Sequential, or contains a Lambda layer; if it has several
            inputs, a fixed batch size, channels other than three, or images that are not
            square.
    """
    # The checks of flags and of the network come to the same file: it is read once, unless it changes.
    file = os.stat(os.path.expanduser(path)) if os.path.isfile(os.path.expanduser(path)) else None
    return _check(path, file and (file.st_ino, file.st_size, file.st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _check(path, identity):
    config = _read_config(path)
    lambdas = sorted(set(_lambda_names(config)))
    if lambdas:
        raise UsageError(
            f"--model_name needs a model without Lambda layers, which hold code. Received: {path}, with "
            f"{', '.join(lambdas)}, not executed; replace it by a custom layer, and name that in --custom_objects."
        )
    settings = config.get("config")
    layers = settings.get("layers") if isinstance(settings, dict) else None
    if not isinstance(layers, list):
        raise UsageError(
            f"--model_name needs a functional or Sequential model. Received: {path}, a {config.get('class_name')}; "
            "save keras.Model(model.inputs, model.outputs) instead."
        )
    inputs = [layer for layer in layers if isinstance(layer, dict) and layer.get("class_name") == "InputLayer"]
    shapes = [_batch_shape(layer) for layer in inputs]
    if len(shapes) != 1:
        raise UsageError(
            f"--model_name needs a model with one input. Received: {path}, with {len(shapes) or 'no'} inputs; save a "
            "model that is built for one image per example."
        )
    batch, *image = shapes[0]
    square = len(image) == 3 and image[0] == image[1] and (image[0] is None or isinstance(image[0], int))
    if batch is not None or not square or image[2] != 3:
        raise UsageError(
            "--model_name needs a model of square RGB images, input shape (None, side, side, 3). Received: "
            f"{path}, with input shape {tuple(shapes[0])}; save a model with such an input."
        )
    return image[0]


def _read_config(path: str) -> dict:
    """Returns the configuration in an archive whose members are all intact."""
    from models.weight_files import ARCHIVE_CONFIG, DAMAGED, MAX_CONFIG_BYTES  # imports h5py

    rule = "--model_name needs an intact Keras model file (.keras)"
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise UsageError(f"{rule}. Received: {path!r}; there is no such file, check the path.")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(ARCHIVE_CONFIG).file_size > MAX_CONFIG_BYTES:
                raise ValueError(f"{ARCHIVE_CONFIG} is too large")
            config = json.loads(archive.read(ARCHIVE_CONFIG))
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} has a wrong checksum")
        if not isinstance(config, dict):
            raise ValueError(f"{ARCHIVE_CONFIG} describes no model")
    except DAMAGED as error:
        raise UsageError(
            f"{rule}. Received: {path}, which is damaged or not a Keras model file ({one_line(error)}); save it again."
        ) from None
    return config


def _lambda_names(config) -> Iterator[str]:
    """Yields the names of all Lambda layers and lambda functions in a configuration."""
    if isinstance(config, dict):
        if config.get("class_name") in ("Lambda", "__lambda__"):
            settings = config.get("config")
            yield str(settings.get("name", "a lambda")) if isinstance(settings, dict) else "a lambda"
            return
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from _lambda_names(value)


def _batch_shape(layer: dict) -> list:
    """Returns the shape of an InputLayer, None where it is open; Keras 2 has another name for it."""
    settings = layer.get("config") or {}
    return settings.get("batch_shape") or settings.get("batch_input_shape") or [None]
