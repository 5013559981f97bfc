"""Data sets of TFDS, read without decoding their images."""

import contextlib
import importlib.util
import io
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import data
from core import reachability
from core.config import Config
from core.errors import RunError, UsageError, one_line
from data import digits  # noqa: F401  (defining the builder registers it with TFDS)
from data.source import Source, check_num_classes

# Files are read one after the other, so that a position means the same image in every pass.
_READ_CONFIG = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False, skip_prefetch=True, shuffle_seed=None)

# Its warnings, of sets that are not prepared and of its own deprecations, do not help users.
logging.getLogger("absl").addFilter(lambda record: "tensorflow_datasets" not in record.pathname)


def open_source(cfg: Config) -> Source:
    """Prepares a TFDS set if necessary and returns it.

    Args:
        cfg: Config. Reads `dataset_name`, `data_dir` and `num_classes`.

    Raises:
        UsageError: if the name is unknown, the set has no image and label, `data_dir` is
            unusable, or `num_classes` contradicts the data.
        RunError: if the set cannot be downloaded or prepared.
    """
    builder = find_builder(cfg)
    image_key, label_key = image_and_label(builder.info, cfg.dataset_name)
    check_num_classes(cfg, builder.info.features[label_key].num_classes)
    builder = prepare(builder, cfg)
    label_feature = builder.info.features[label_key]
    check_num_classes(cfg, label_feature.num_classes)

    row = data.dataset_row(cfg.dataset_name)
    labels = {
        split: _read_labels(builder, split, label_key)
        for split in (row.train, row.validation, row.test)
        if split in builder.info.splits
    }

    def read(split, positions):
        wanted = np.zeros(len(labels[split]), bool)
        wanted[positions] = True
        wanted = tf.constant(wanted)
        examples = builder.as_dataset(
            split=split,
            decoders=tfds.decode.PartialDecoding(
                {image_key: True, label_key: True}, decoders={image_key: tfds.decode.SkipDecoding()}
            ),
            read_config=_READ_CONFIG,
        )
        return (
            examples.enumerate()
            .filter(lambda position, example: tf.gather(wanted, position))
            .map(lambda position, example: (position, example[image_key], example[label_key]))
            .take(len(positions))  # stop reading when all are found
        )

    return Source(
        name=cfg.dataset_name,
        version=_version(builder),
        class_names=list(label_feature.names),
        labels=labels,
        split_bytes={split: builder.info.splits[split].num_bytes for split in labels},
        read=read,
    )


def find_builder(cfg: Config):
    """Returns the TFDS builder of `cfg.dataset_name`, without reading data or the network.

    Raises:
        UsageError: if the name, config or version is unknown, or `data_dir` is unusable.
    """
    name = data.tfds_name(cfg.dataset_name)
    data_dir = cfg.data_dir and os.path.expanduser(cfg.data_dir)
    if data_dir:
        _check_data_dir(data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        builder.info  # noqa: B018  (some sets check their configuration here)
        return builder
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        raise data.unknown_name(cfg.dataset_name, known) from error
    except (ValueError, AssertionError, RuntimeError) as error:
        cls = tfds.builder_cls(name.split("/")[0].split(":")[0])
        configs = ", ".join(cls.builder_configs) or "none"
        versions = ", ".join(str(version) for version in (cls.VERSION, *cls.SUPPORTED_VERSIONS))
        raise UsageError(
            f"--dataset_name takes NAME/CONFIG:VERSION as TFDS has them: {cls.name} has "
            f"configs {configs}, versions {versions}. Received: {cfg.dataset_name!r}; "
            "correct the name."
        ) from error
    except (ImportError, OSError) as error:  # a module that the set's own code needs is missing
        raise RunError(f"TFDS cannot load the builder of {cfg.dataset_name}: {one_line(error)}") from error


def image_and_label(info, name):
    """Returns the names of a set's image feature and of its single label.

    Args:
        info: tfds.core.DatasetInfo.
        name: str. The set's name, for the error.

    Raises:
        UsageError: if the set has no image or no single class label.
    """
    features = info.features
    for keys in (("image", "label"), info.supervised_keys):
        if not keys or not all(isinstance(key, str) and key in features for key in keys[:2]):
            continue
        image, label = features[keys[0]], features[keys[1]]
        # Float images are stored as the raw bits of a PNG, which decodes to noise.
        is_image = isinstance(image, tfds.features.Image) and image.np_dtype != np.float32
        if is_image and isinstance(label, tfds.features.ClassLabel):
            return keys[0], keys[1]
    raise UsageError(
        "--dataset_name must be a set with an image and a single class label. Received: "
        f"{name} with {', '.join(features)}; choose another set."
    )


def prepare(builder, cfg):
    """Downloads and prepares a set if it is not prepared yet.

    Two processes may do this at the same time: TFDS prepares in a folder of its own and
    renames it, so the second rename fails. That process then uses the first one's
    data.

    Args:
        builder: tfds.core.DatasetBuilder.
        cfg: Config. Reads `dataset_name` and `data_dir`.

    Returns:
        The builder of the prepared set.

    Raises:
        RunError: if a package is missing, a host cannot be reached, or TFDS fails.
    """
    if builder.is_prepared():
        return builder
    name = cfg.dataset_name
    for module, package in data.dataset_row(name).needs:
        if importlib.util.find_spec(module) is None:
            raise RunError(
                f"preparing {name} needs the module {module}, which is not installed; run pip install {package}"
            )
    _check_reachable(builder, name)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # progress bars damage log files
    # TFDS prints on stdout, which is for results. For a set without download its text is dropped.
    text_out = sys.stderr if builder.url_infos else io.StringIO()
    try:
        with contextlib.redirect_stdout(text_out):
            builder.download_and_prepare(
                # No retries on a second host.
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        return builder
    except Exception as error:
        prepared = find_builder(cfg)  # perhaps by another process
        if prepared.is_prepared():
            return prepared
        raise RunError(
            f"{name} could not be prepared in {builder.data_dir}: {one_line(error)}; "
            "solve that, or choose another --data_dir."
        ) from error


def _check_reachable(builder, name):
    """Raises RunError if a file that is still to be downloaded has no reachable host."""
    addresses = {}  # from a file's checksum to the addresses that it is registered at
    for url, info in _missing(builder):
        addresses.setdefault(info.checksum, []).append(url)
    by_host = {urlsplit(url).netloc: url for urls in addresses.values() for url in urls}
    if not by_host:
        return
    with ThreadPoolExecutor(len(by_host)) as pool:
        why = dict(zip(by_host, pool.map(reachability.unreachable, by_host.values())))
    # A file that has moved is registered at its old and new address. One of them is enough.
    lost = [urls for urls in addresses.values() if all(why[urlsplit(url).netloc] is not None for url in urls)]
    # TFDS registers the files of all configurations and versions of a set together. Sets of
    # the table need all of them, other sets perhaps only some.
    pinned = data.dataset_row(name).tfds is not None
    if lost and (pinned or len(lost) == len(addresses)):
        host = urlsplit(lost[0][0]).netloc
        raise RunError(
            f"{name} is not prepared in {builder.data_dir_root} and its host {host} cannot be "
            f"reached ({why[host]}); connect to the network, or set --data_dir to a folder "
            "where the set is prepared."
        )


def _missing(builder):
    """Yields (url, TFDS description) of registered files that are neither downloaded nor saved by hand."""
    downloads_dir = Path(builder.data_dir_root) / "downloads"
    for url, info in (builder.url_infos or {}).items():
        file_name = tfds.core.download.resource.get_dl_fname(url, info.checksum)
        # TFDS regards a file as downloaded if its description is beside it.
        there = [
            (folder / f"{file_name}{ending}").exists()
            for folder in (downloads_dir / builder.name, downloads_dir)
            for ending in ("", ".INFO")
        ]
        by_hand = info.filename and (downloads_dir / "manual" / info.filename).exists()
        if url.startswith("http") and sum(there) < 2 and not by_hand:
            yield url, info


def files_to_fetch(cfg: Config) -> list:
    """Returns [(url, path)] of the files that are still to be downloaded, and where TFDS looks for each."""
    builder = find_builder(cfg)
    if builder.is_prepared():
        return []
    manual = Path(builder.data_dir_root) / "downloads" / "manual"
    by_file = {info.checksum: (url, manual / info.filename) for url, info in _missing(builder) if info.filename}
    return list(by_file.values())


def _check_data_dir(data_dir):
    existing = Path(data_dir).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(
            f"--data_dir must be a folder, or a path where one can be created. Received: {data_dir} "
            f"({existing} is a file); choose another folder."
        )


def _read_labels(builder, split, label_key):
    """Returns the labels of a split, int64 of shape (images,), without decoding an image."""
    examples = builder.as_dataset(
        split=split, decoders=tfds.decode.PartialDecoding({label_key: True}), read_config=_READ_CONFIG
    )
    parts = [batch[label_key] for batch in examples.batch(4096).as_numpy_iterator()]
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)


def _version(builder):
    config = f"/{builder.builder_config.name}" if builder.builder_config else ""
    return f"{builder.name}{config}:{builder.version}"
