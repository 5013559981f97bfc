"""ImageNet weights, from the caches or by a download whose host is probed first."""

import contextlib
import hashlib
import io
import os
import sys
from dataclasses import replace

import keras

from core import reachability
from core.config import Config
from core.log import log
from models import weight_files
from models.table import MODELS, Imagenet


class Unavailable(Exception):
    """ImageNet weights are unavailable; the message gives the reason."""


def file_hash(path: str, algorithm: str = "sha256") -> str:
    """Returns the hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def source_of(cfg: Config) -> Imagenet:
    """Returns where the ImageNet weights of a known network come from, at its width."""
    row = MODELS[cfg.model_name]
    if not row.alphas:
        return row.imagenet
    text, checksum = row.alphas[cfg.model_alpha or 1.0]
    return replace(row.imagenet, url=row.imagenet.url.replace("{alpha}", text), checksum=checksum)


def weights_url(source: Imagenet, input_size: int) -> str:
    """Returns the address of the weights for images of `input_size` pixels."""
    if not source.sizes:
        return source.url
    # Convolutions accept any size. A size without a file of its own uses the largest, as in Keras.
    size = input_size if input_size in source.sizes else source.sizes[-1]
    return source.url.replace("{size}", str(size))


def fetch_file(source: Imagenet, input_size: int) -> str:
    """Returns the path of the ImageNet weights file in Keras' cache.

    Args:
        source: Imagenet with the address of a file.
        input_size: int. Pixels.

    Raises:
        Unavailable: if the file is not in the cache and cannot be downloaded.
    """
    url = weights_url(source, input_size)
    name = url.rpartition("/")[2]
    home = _keras_home()
    path = os.path.join(home, "models", name)
    present = os.path.isfile(path)
    algorithm = "sha256" if len(source.checksum or "") == 64 else "md5"
    if present and (source.checksum is None or source.checksum == file_hash(path, algorithm)):
        return path
    _probe(url)
    log.info("Downloading %s", url)
    # Keras prints its progress bar on stdout.
    bar = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with _failures_unavailable(url), contextlib.redirect_stdout(bar):
        return keras.utils.get_file(
            name, url, file_hash=source.checksum, cache_subdir="models", cache_dir=home, force_download=present
        )


def _keras_home():
    return os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")


def files_to_fetch(source: Imagenet, input_size: int) -> list[tuple[str, str]]:
    """Returns [(url, path)] of the files to download, and where each can be saved by hand.

    Args:
        source: Imagenet.
        input_size: int. Pixels.
    """
    if not source.preset:
        url = weights_url(source, input_size)
        return [(url, os.path.join(_keras_home(), "models", url.rpartition("/")[2]))]
    from models import vit

    folder, page = vit.preset_folder(source.preset), vit.preset_page(source.preset)
    return [(page, os.path.join(folder, name)) for name in ("config.json", "model.weights.h5")]


def fetch_preset(source: Imagenet) -> tuple[list, str]:
    """Returns the layers of a keras-hub preset and the path of its weights file.

    Args:
        source: Imagenet with a preset.

    Returns:
        A list of StoredLayer and a str.

    Raises:
        Unavailable: if the preset is not in the cache and cannot be downloaded.
    """
    from models import vit

    preset = str(source.preset)
    folder = vit.preset_folder(preset)
    path = os.path.join(folder, "model.weights.h5")
    present = os.path.isfile(path) and os.path.isfile(os.path.join(folder, "config.json"))
    if not present:
        _probe(source.url)
        log.info("Downloading %s", preset)
    with _failures_unavailable(folder if present else preset):
        return _variables_as_layers(vit.load_preset(folder if present else preset)), path


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
