"""Reads Keras weights files as plain arrays.

Nothing in a file is executed or deserialized into layers: only arrays are read from
HDF5, and names from the configuration of a .keras archive. Links out of the file are not
followed.

The content distinguishes two layouts, because users rename files:

* legacy: groups named after the top-level layers, and in each the weights under
  their own paths; a nested model is one group with all its weights.
* structural (Keras 3, and .keras since Keras 2.12): groups named after class and
  number of the layers, as in ``layers/conv2d_3/vars/0``. Newer files carry the
  layers' names as attributes.
"""

import contextlib
import itertools
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import h5py

from core.errors import UsageError, one_line

_ARCHIVE_WEIGHTS = "model.weights.h5"
ARCHIVE_CONFIG = "config.json"
MAX_CONFIG_BYTES = 64 * 2**20  # real files have less than 1 MB

# What h5py, zipfile and json raise for damaged files.
DAMAGED = (OSError, RuntimeError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class StoredLayer:
    """The weights that one layer itself owns.

    Attributes:
        name: str. Layer names from the outermost to its own, joined by ``/``.
        structure: str or None. Its place in Keras' structural layout.
        weights: dict of arrays or h5py datasets, in the layer's order, by weight
            name, or by number if the file has no names.
    """

    name: str
    structure: str | None
    weights: dict


@contextlib.contextmanager
def open_layers(path: str) -> Iterator[list[StoredLayer]]:
    """Provides the layers of a weights file, a list of StoredLayer.

    The arrays are read on use, within the context.

    Args:
        path: str. A .keras, .weights.h5 or legacy .h5 file.

    Raises:
        UsageError: if the file is damaged or holds no weights.
    """
    try:
        with contextlib.ExitStack() as stack:
            if path.lower().endswith(".keras"):
                source, names = _open_archive(stack, path)
            else:
                source, names = path, {}
            file = stack.enter_context(h5py.File(source, "r"))
            yield _layers(file, names)
    except DAMAGED as error:
        raise UsageError(
            f"--weights needs an intact Keras weights file. Received: {path}, which is damaged or not such a file "
            f"({one_line(error)}); save or download it again."
        ) from error


def _open_archive(stack, path):
    """Returns the opened weights of a .keras archive and its layers' names by structure."""
    archive = stack.enter_context(zipfile.ZipFile(path))
    with archive.open(_ARCHIVE_WEIGHTS) as member:
        while member.read(2**20):  # reading to the end verifies the checksum
            pass
    if archive.getinfo(ARCHIVE_CONFIG).file_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{ARCHIVE_CONFIG} is too large")
    names = dict(_configured_names(json.loads(archive.read(ARCHIVE_CONFIG))))
    return stack.enter_context(archive.open(_ARCHIVE_WEIGHTS)), names


def _configured_names(config, prefix=""):
    """Yields (structural path, layer name) of a functional model's configuration.

    Bare operations are listed there too and counted here, unlike in the file;
    none of them shares its class name with a layer that has weights.
    """
    entries = config.get("config") if isinstance(config, dict) else None
    entries = entries.get("layers") if isinstance(entries, dict) else None
    if not isinstance(entries, list):
        return
    count = {}
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        structure = f"{prefix}layers/{numbered(snake_case(str(entry.get('class_name'))), count)}"
        settings = entry.get("config")
        if isinstance(settings, dict) and isinstance(settings.get("name"), str):
            yield structure, settings["name"]
        yield from _configured_names(entry, f"{structure}/")


def _layers(file, names):
    root = file
    if isinstance(file.get("model_weights", getlink=True), h5py.HardLink):
        root = file["model_weights"]
    datasets = _datasets(root)
    if any(key.startswith("layer_names") for key in root.attrs):
        layers = _legacy_layers(root, datasets)
    else:
        layers = _structural_layers(root, datasets, names)
    if not layers:
        raise ValueError("no layer weights in it")
    return layers


def _datasets(root):
    """Returns {path: dataset}; `visititems` follows hard links only, each object once."""
    datasets = {}

    def collect(path, item):
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise ValueError(f"{path} refers to data outside of the file")
            datasets[path] = item

    root.visititems(collect)
    return datasets


def _legacy_layers(root, datasets):
    layers = []
    for layer_name in _attribute_list(root, "layer_names") + ["top_level_model_weights"]:
        by_parent = {}
        group = root.get(layer_name)
        weight_names = [] if group is None else _attribute_list(group, "weight_names")
        for weight_name in weight_names:
            parent, _, own_name = weight_name.rpartition("/")
            dataset = datasets[f"{layer_name}/{weight_name}"]
            by_parent.setdefault(parent, {})[own_name.split(":")[0]] = dataset
        layers += [StoredLayer(name, None, weights) for name, weights in by_parent.items() if name]
        if len(by_parent) == 1:
            # A simple layer: its group's name counts, whatever scope its weights
            # were made in (Keras 1 has no scope, Keras 2 numbers repeated ones).
            layers.append(StoredLayer(layer_name, None, *by_parent.values()))
    return layers


def _attribute_list(group, name):
    """Returns a list of str; Keras spreads long lists over name0, name1, ..."""
    if name in group.attrs:
        chunks = [name]
    else:
        numbered_names = (f"{name}{number}" for number in itertools.count())
        chunks = itertools.takewhile(group.attrs.__contains__, numbered_names)
    values = [value for chunk in chunks for value in group.attrs[chunk]]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _structural_layers(root, datasets, names):
    by_layer = {}
    for path, dataset in datasets.items():
        structure, vars_group, key = ("/" + path).rpartition("/vars/")
        if vars_group:
            by_layer.setdefault(structure.strip("/"), {})[key] = dataset
    layers = []
    for structure, weights in by_layer.items():
        ordered = dict(sorted(weights.items(), key=lambda item: (len(item[0]), item[0])))
        # Keras 2.12 called the list of layers by another name.
        modern = structure.replace("_layer_checkpoint_dependencies", "layers")
        layers.append(StoredLayer(_stored_name(root, structure, names), modern, ordered))
    return layers


def _stored_name(root, structure, names):
    parts = structure.split("/")
    ancestry = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    found = []
    for path in ancestry:
        variables = root.get(f"{path}/vars")
        name = names.get(path)
        if variables is not None:
            name = variables.attrs.get("name", name)
        if name is not None:
            found.append(str(name))
    return "/".join(found)


def snake_case(class_name: str) -> str:
    """Returns Keras' file name of a class: BatchNormalization, batch_normalization."""
    words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", class_name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()


def numbered(name: str, count: dict) -> str:
    """Returns `name`, then `name_1` and so on; `count` holds how often each was given."""
    number = count.get(name, 0)
    count[name] = number + 1
    return f"{name}_{number}" if number else name
