"""Schemes that look at no image: fixed sets of weights, and control rankings."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from core.config import Config
from core.errors import UsageError
from selection.ranking import Selection, eligible_paths, matching, select_layers, select_top, select_weights


def everything(network, batches: Callable, cfg: Config) -> Selection:
    """Trains all weights, including those of no candidate layer (class token, position embedding)."""
    eligible = set(eligible_paths(network, cfg))
    in_candidates = {w.path for c in network.candidates for w in c.weights}
    return select_layers(
        network, eligible, other_weights=[w.path for w in network.trainable_weights if w.path not in in_candidates]
    )


def head_only(network, batches: Callable, cfg: Config) -> Selection:
    """Trains the classification head, the new last layer."""
    return select_layers(network, {network.head.path})


def norms_and_biases(network, batches: Callable, cfg: Config) -> Selection:
    """Trains scales, shifts and biases (gamma, beta, bias) of all layers, and the head."""
    eligible = set(eligible_paths(network, cfg))
    chosen = {
        weight.path
        for candidate in network.candidates
        if candidate.path in eligible
        for weight in candidate.weights
        if any(weight is getattr(candidate.layer, name, None) for name in ("gamma", "beta", "bias"))
    }
    return select_weights(network, chosen | {weight.path for weight in network.head.weights})


def listed(network, batches: Callable, cfg: Config) -> Selection:
    """Trains the layers that `--layers` names, and the head."""
    return select_layers(network, _listed_paths(network, cfg))


def check_nothing(network, cfg: Config, num_images: int) -> None:
    """Accepts everything."""


def check_eligible(network, cfg: Config, num_images: int) -> None:
    """Raises UsageError if `--exclude_layers` matches no layer or all."""
    eligible_paths(network, cfg)


def check_listed(network, cfg: Config, num_images: int) -> None:
    """Raises UsageError if `--layers` names no layer, or one that the network does not have."""
    _listed_paths(network, cfg)


def _listed_paths(network, cfg):
    eligible = eligible_paths(network, cfg)
    if not cfg.layers.startswith("@"):
        return matching(eligible, cfg.layers, "--layers")
    named = _read_list(cfg.layers[1:])
    unknown = [path for path in named if path not in eligible]
    if unknown or not named:
        shown = ", ".join(_with_nearest(path, eligible) for path in unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        raise UsageError(
            f"the layers in a --layers file must be candidates of this network. Received: "
            f"{f'{len(unknown)} others ({shown})' if unknown else 'an empty list'} in {cfg.layers[1:]}; "
            "--list_layers prints the candidates."
        )
    return set(named)


def _with_nearest(path, paths):
    close = difflib.get_close_matches(path, paths, n=2)
    return repr(path) + (f", near {' and '.join(close)}" if close else "")


def _read_list(path):
    """Reads layer paths from a selection.json, or from a text with one a line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the path
        raise UsageError(f"--layers @FILE takes a readable text file. Received: {path} ({error}); check it.") from error
    if not text.lstrip().startswith("{"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        selected = json.loads(text)["selected"]
    except (ValueError, KeyError, RecursionError) as error:
        raise UsageError(
            f"--layers @FILE takes a selection.json with a list `selected`, or paths, one a line. "
            f"Received: {path} ({error!r}); check the file."
        ) from error
    if not isinstance(selected, list) or not all(isinstance(entry, str) for entry in selected):
        raise UsageError(
            f"`selected` in a selection.json is a list of layer paths. Received: {path} with another value; check it."
        )
    return selected


# Control rankings, which AdaBet has to beat. The last two test whether the topology
# matters, or only the small activations near the output.

_DRAW = 7  # separates these random numbers from those of the data


def at_random(network, batches: Callable, cfg: Config) -> Selection:
    """Ranks the layers by random numbers drawn from the seed."""
    rng = np.random.default_rng([cfg.seed, _DRAW])
    return select_top(network, cfg, rng.random(len(network.candidates)).tolist())


def nearest_the_output(network, batches: Callable, cfg: Config) -> Selection:
    """Ranks the layers by their position in the forward pass, the last first."""
    return select_top(network, cfg, list(range(len(network.candidates))))


def smallest_activation(network, batches: Callable, cfg: Config) -> Selection:
    """Ranks the layers by the elements of their output, the fewest first."""
    return select_top(network, cfg, [-candidate.activation_size for candidate in network.candidates])
