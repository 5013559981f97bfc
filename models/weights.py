"""Loads weights into a backbone and records where they come from."""

import logging
import os
from dataclasses import dataclass

import keras
import numpy as np
from keras.src.saving import saving_lib

from core.config import Config
from core.errors import RunError, UsageError
from core.log import log
from models import imagenet, keras_file, weight_files

# Names of weights in older versions of Keras.
_MODERN_NAMES = {"depthwise_kernel": "kernel"}

# Patches of a 4096-pixel image. No real file has more, and a forged one must not take more
# memory.
_MAX_POSITIONS = 1 + 256**2


@dataclass(frozen=True)
class TargetLayer:
    """A layer of the network that owns weights; fields as in weight_files.StoredLayer."""

    name: str
    structure: str
    variables: list


def load(backbone: keras.Model, cfg: Config) -> dict:
    """Loads the weights of `cfg.weights` into `backbone`, moving statistics included.

    Args:
        backbone: keras.Model without head.
        cfg: Config. Reads model_name, model_alpha, input_size and weights.

    Returns:
        dict, the provenance, as in `models.Network`.

    Raises:
        UsageError: if the file is damaged, or fits less than half of the backbone.
        RunError: if `imagenet` is requested and unavailable.
    """
    if cfg.weights == "none":
        return _provenance("none", target_layers(backbone))
    if cfg.weights == "auto" and keras_file.is_path(cfg.model_name):  # its weights came with it
        targets = target_layers(backbone)
        return _provenance("file", targets, len(targets), os.path.expanduser(cfg.model_name))
    if cfg.weights not in ("auto", "imagenet"):
        path = os.path.expanduser(cfg.weights)
        with weight_files.open_layers(path) as stored:
            return _assign(backbone, stored, "file", path)
    try:
        return _imagenet(backbone, cfg)
    except imagenet.Unavailable as error:
        if cfg.weights == "imagenet":
            raise RunError(
                f"--weights imagenet needs the weights of {cfg.model_name}. Received: they are unavailable ({error}); "
                "connect to the network, or use --weights PATH, or --weights none for random weights."
            ) from error
        log.warning(
            "ImageNet weights for %s are unavailable (%s); starting from RANDOM weights. "
            "--weights PATH loads a file of your own.",
            cfg.model_name,
            error,
        )
        note = f"ImageNet weights are unavailable: {error}"
        return _provenance("none", target_layers(backbone), note=note)


def _imagenet(backbone, cfg):
    source = imagenet.source_of(cfg)
    if source.preset:
        stored, path = imagenet.fetch_preset(source)
        return _assign(backbone, stored, "imagenet", path)
    path = imagenet.fetch_file(source, cfg.input_size)
    try:
        with weight_files.open_layers(path) as stored:
            return _assign(backbone, stored, "imagenet", path)
    except UsageError as error:
        raise imagenet.Unavailable(f"{path} is damaged, delete it: {error.__cause__ or error}") from error


def _assign(backbone, stored, source, path):
    """Copies the matching stored arrays to `backbone` and returns the provenance."""
    targets = target_layers(backbone)
    matches = match(targets, stored)
    counts = f"{len(matches)} of {len(targets)} backbone layers matched"
    if 2 * len(matches) < len(targets):
        raise UsageError(
            f"--weights needs a file with at least half of the network's layers. Received: "
            f"{path}, {counts} by name or structure and shape; check --model_name."
        )
    for target, arrays in matches:
        for variable, array in zip(target.variables, arrays, strict=True):
            values = _values(array, variable)
            if not np.all(np.isfinite(values)):
                raise UsageError(
                    f"--weights needs finite weights. Received: {path}, where layer {target.name} "
                    "holds NaN or infinite values; save or download it again."
                )
            variable.assign(values)
    for layer in backbone._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with a copy of its weights
    missing = sorted({t.name for t in targets} - {t.name for t, _ in matches})
    note = f"not matched, left random: {', '.join(missing)}" if missing else None
    log.log(logging.WARNING if missing else logging.INFO, "Weights: %s from %s", counts, path)
    return _provenance(source, targets, len(matches), path, note)


def _provenance(source, targets, matched_layers=0, path=None, note=None):
    return {
        "source": source,
        "path": path,
        "sha256": imagenet.file_hash(path) if path and os.path.isfile(path) else None,
        "matched_layers": matched_layers,
        "backbone_layers": len(targets),
        "note": note,
    }


def target_layers(backbone: keras.Model) -> list[TargetLayer]:
    """Returns a TargetLayer for every layer of `backbone` that itself owns weights."""
    layers = []
    claimed: set[int] = set()
    # Innermost first: the variables that remain for an outer layer are its own.
    for structure, layer in reversed(list(_structure(backbone, "", set()))):
        own = [v for v in layer.weights if id(v) not in claimed]
        claimed.update(id(v) for v in own)
        if own:
            layers.append(TargetLayer(own[0].path.rpartition("/")[0], structure, own))
    return layers[::-1]


def _structure(layer, path, seen):
    """Yields (path, layer) for `layer` and all below it, outermost first.

    The paths are those of Keras' own files: a model's layers are numbered per class, and
    an inner layer has the name of the attribute that holds it, public ones first.
    """
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield path, layer
    prefix = f"{path}/" if path else ""
    for name, child in saving_lib._walk_saveable(layer):
        if isinstance(child, keras.layers.Layer):
            yield from _structure(child, prefix + name, seen)
        elif isinstance(child, (list, tuple)):
            count = {}
            for item in child:
                if isinstance(item, keras.layers.Layer):
                    item_name = weight_files.numbered(weight_files.snake_case(type(item).__name__), count)
                    yield from _structure(item, f"{prefix}{name}/{item_name}", seen)


def match(targets: list[TargetLayer], stored: list[weight_files.StoredLayer]) -> list:
    """Pairs layers with stored ones, by name, by structure or by order, whichever finds most.

    Args:
        targets: list of TargetLayer.
        stored: list of StoredLayer.

    Returns:
        list of (TargetLayer, list of arrays in the order of its variables).
    """
    return max((find(targets, stored) for find in (_match_names, _match_structure, _match_order)), key=len)


def _match_names(targets, stored):
    by_own_name = {}
    for layer in stored:
        by_own_name.setdefault(layer.name.rpartition("/")[2], []).append(layer)
    matches = []
    for target in targets:
        for layer in by_own_name.get(target.name.rpartition("/")[2], []):
            # A whole model puts its own name before ours.
            same = f"/{layer.name}".endswith(f"/{target.name}")
            arrays = _arrays(target.variables, layer.weights) if same else None
            if arrays is not None:
                matches.append((target, arrays))
                break
    return matches


def _match_structure(targets, stored):
    by_structure = {layer.structure: layer for layer in stored if layer.structure}
    first = targets[0].structure
    outer_paths = {path.removesuffix(first) for path in by_structure if f"/{path}".endswith(f"/{first}")}
    best = []
    for outer in sorted(outer_paths):
        matches = []
        for target in targets:
            layer = by_structure.get(outer + target.structure)
            arrays = _arrays(target.variables, layer.weights) if layer else None
            if arrays is not None:
                matches.append((target, arrays))
        best = max(best, matches, key=len)
    return best


def _match_order(targets, stored):
    """Pairs the layers of a legacy file in its order, all or none, as Keras itself reads it.

    Some networks of keras.applications have automatic names, which differ from file to file.
    """
    in_order = list({id(layer.weights): layer for layer in stored if not layer.structure}.values())
    if len(in_order) != len(targets):
        return []
    pairs = [(target, _arrays(target.variables, layer.weights)) for target, layer in zip(targets, in_order)]
    return pairs if all(arrays is not None for _, arrays in pairs) else []


def _arrays(variables, weights):
    """Returns the stored arrays in the order of `variables`, or None where they do not fit."""
    named = {_MODERN_NAMES.get(name, name): array for name, array in weights.items()}
    if all(variable.name in named for variable in variables):
        arrays = [named[variable.name] for variable in variables]
    elif len(weights) == len(variables):
        arrays = list(weights.values())  # files without usable names keep the order
    else:
        return None
    fits = all(_fits(array, variable) for array, variable in zip(arrays, variables, strict=True))
    return arrays if fits else None


def _fits(array, variable):
    if array.dtype.kind != "f" and not (array.dtype.kind in "iu" and "int" in variable.dtype):
        return False
    if array.shape == tuple(variable.shape):
        return True
    if not variable.path.endswith("position_embedding/embeddings") or array.ndim != 2:
        return False
    from models import vit

    # Another input size: only the number of positions differs.
    positions, width = array.shape
    return width == variable.shape[1] and positions <= _MAX_POSITIONS and vit.grid_side(positions) is not None


def _values(array, variable):
    values = np.asarray(array)
    if values.shape == tuple(variable.shape):
        return values
    from models import vit

    return vit.resize_position_embedding(values, variable.shape[0])
