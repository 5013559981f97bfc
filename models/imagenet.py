"""ImageNet weights, from the caches or by a download whose host is probed first."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import sys

import keras

from core import reachability
from models import weight_files

log = logging.getLogger("adabet")


class Unavailable(Exception):
    """ImageNet weights are unavailable; the message gives the reason."""


def file_hash(path, algorithm="sha256"):
    """Returns the hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def weights_url(source, input_size):
    """Returns the address of the weights for images of `input_size` pixels."""
    if not source.sizes:
        return source.url
    # Convolutions accept any size. A size without a file of its own uses the largest, as in Keras.
    size = input_size if input_size in source.sizes else source.sizes[-1]
    return source.url.format(size=size)


def fetch_file(source, input_size):
    """Returns the path of the ImageNet weights file in Keras's cache.

    Args:
        source: models.Imagenet with a url.
        input_size: int. Pixels.

    Raises:
        Unavailable: if not in the cache, and not to be downloaded.
    """
    url = weights_url(source, input_size)
    name = url.rpartition("/")[2]
    home = _keras_home()
    path = os.path.join(home, "models", name)
    present = os.path.isfile(path)
    if present and source.md5 in (None, file_hash(path, "md5")):
        return path
    _probe(url)
    log.info("Downloading %s", url)
    # Keras prints its progress bar on stdout.
    bar = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with _failures_unavailable(url), contextlib.redirect_stdout(bar):
        return keras.utils.get_file(
            name, url, file_hash=source.md5, cache_subdir="models", cache_dir=home, force_download=present
        )


def _keras_home():
    return os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")


def files_to_fetch(source, input_size):
    """Returns [(url, path)]: what there is to download, and where each file can be put by hand.

    Args:
        source: models.Imagenet.
        input_size: int. Pixels.
    """
    if not source.preset:
        url = weights_url(source, input_size)
        return [(url, os.path.join(_keras_home(), "models", url.rpartition("/")[2]))]
    from models import vit

    folder, page = vit.preset_folder(source.preset), vit.preset_page(source.preset)
    return [(page, os.path.join(folder, name)) for name in ("config.json", "model.weights.h5")]


def fetch_preset(source):
    """Returns the layers of a keras-hub preset and the path of its weights file.

    Args:
        source: models.Imagenet with a preset.

    Returns:
        A list of StoredLayer and a str.

    Raises:
        Unavailable: if not in the cache, and not to be downloaded.
    """
    from models import vit

    folder = vit.preset_folder(source.preset)
    path = os.path.join(folder, "model.weights.h5")
    if os.path.isfile(path) and os.path.isfile(os.path.join(folder, "config.json")):
        with _failures_unavailable(folder):
            return _variables_as_layers(vit.load_preset(folder)), path
    _probe(source.url)
    log.info("Downloading %s", source.preset)
    with _failures_unavailable(source.preset):
        return _variables_as_layers(vit.load_preset(source.preset)), path


def _variables_as_layers(backbone):
    by_layer = {}
    for variable in backbone.weights:
        layer, _, name = variable.path.rpartition("/")
        by_layer.setdefault(layer, {})[name] = variable.numpy()
    return [weight_files.StoredLayer(name, None, arrays) for name, arrays in by_layer.items()]


def _probe(url):
    reason = reachability.unreachable(url)
    if reason:
        raise Unavailable(f"{url} cannot be reached: {reason}")


@contextlib.contextmanager
def _failures_unavailable(what):
    """Turns any failure of a download or of a cached file into Unavailable.

    Keras and kagglehub raise bare Exceptions among others, so all are caught.
    """
    try:
        yield
    except Exception as error:
        raise Unavailable(f"{what}: {' '.join(str(error).split())}") from error
