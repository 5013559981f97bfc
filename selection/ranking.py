"""From a score per layer to the weights that train: one budget of layers, one ranking, one record."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from core.config import Config
from core.errors import UsageError


@dataclass(frozen=True)
class Selection:
    """Which weights train, and why.

    Attributes:
        trained_weights: tuple of str. Paths of the weights that train, the head's
            included, in forward order.
        selected: tuple of str. Paths of the selected layers, in forward order.
        head_added: bool. Whether the head trains without having been selected.
        max_layers: int or None. Layers that the ranking may choose.
        layers: list of dict. One row per candidate, for selection.json.
        stability: float or None. Mean Kendall tau between the rankings by
            single batches.
        details: dict. Further entries of selection.json, without times.
        files: dict from file name to JSON-ready content, further files of the run folder.
        reselect: function (epoch, counted from 0) -> Selection for the epochs from there
            on, or None. It is called every `--interval` epochs.
        penalties: dict from weight path to a function of the weight, whose value is
            added to the training loss.
        constraints: dict from weight path to a function from value to value, applied
            before the first step and after every step.
        facts: function () -> dict, or None. Entries of summary.json, with the names of
            the scheme's row.
        state: dict, JSON-ready. What the scheme's `restore` needs for a selection from a
            checkpoint.
    """

    trained_weights: tuple[str, ...]
    selected: tuple[str, ...]
    head_added: bool
    max_layers: int | None
    layers: list
    stability: float | None = None
    details: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    reselect: Callable | None = None
    penalties: dict = field(default_factory=dict)
    constraints: dict = field(default_factory=dict)
    facts: Callable | None = None
    state: dict = field(default_factory=dict)

    def to_record(self) -> dict:
        """Returns everything except the functions, as a JSON-ready dict."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _FUNCTIONS}

    def table(self) -> str:
        """Returns the layers as text: by rank if they are ranked, else in forward order."""
        rows = sorted(self.layers, key=lambda row: row["rank"] or math.inf)
        width = max(len(row["path"]) for row in rows)
        lines = [
            f"{'rank':>4}  {'layer':<{width}}  {'b1':>7}  {'activation':>10}  {'weights':>9}  {'score':>10}  trains"
        ]
        for row in rows:
            rank, b1, score = (
                "-" if row[name] is None else format(row[name], form)
                for name, form in (("rank", "d"), ("betti_1", ".2f"), ("score", ".3e"))
            )
            lines.append(
                f"{rank:>4}  {row['path']:<{width}}  {b1:>7}  {row['activation_size']:>10}  {row['num_weights']:>9}  "
                f"{score:>10}  {'yes' if row['selected'] else ''}".rstrip()
            )
        return "\n".join(lines)

    @classmethod
    def from_record(cls, record: dict) -> Selection:
        """Returns the Selection of such a dict, without functions."""
        tuples = {name: tuple(record[name]) for name in ("trained_weights", "selected")}
        return cls(**{**record, **tuples})


_FUNCTIONS = {"reselect", "penalties", "constraints", "facts"}


def layer_budget(rho: float, num_layers: int) -> int:
    """Returns how many of `num_layers` layers the share `rho` allows: floor(rho * num_layers), at least one.

    The small addend corrects binary rounding: 0.29 * 100 is 28.999999999999996.
    """
    return max(1, math.floor(rho * num_layers + 1e-9))


def rank(scores: Sequence[float], eligible: Sequence[bool]) -> list[int | None]:
    """Ranks layers by score, highest first. Ties go to the layer nearer the output.

    Args:
        scores: sequence of float, one per layer, in forward order.
        eligible: sequence of bool. Which layers are ranked.

    Returns:
        list of int or None. The rank of each layer, counted from 1; None for the others.
    """
    order = sorted((i for i, takes_part in enumerate(eligible) if takes_part), key=lambda i: (-scores[i], -i))
    ranks: list[int | None] = [None] * len(scores)
    for position, i in enumerate(order, 1):
        ranks[i] = position
    return ranks


def kendall_stability(scores_per_batch: np.ndarray) -> float | None:
    """Returns the mean Kendall tau-b between the rankings by single batches.

    Args:
        scores_per_batch: array of shape (batches, layers).

    Returns:
        float, or None for fewer than two batches or for constant scores.
    """
    from scipy.stats import kendalltau

    taus = [kendalltau(a, b).statistic for a, b in itertools.combinations(scores_per_batch, 2)]
    if not taus or not np.isfinite(taus).all():
        return None
    return float(np.mean(taus))


def matching(paths: Collection[str], pattern: str, flag: str) -> set[str]:
    """Returns the layer paths that contain a match of the regular expression `pattern`.

    Raises:
        UsageError: if the pattern is invalid or matches nothing.
    """
    try:
        found = {path for path in paths if re.search(pattern, path)}
    except re.error as error:
        raise UsageError(f"{flag} takes a regular expression. Received: {pattern!r} ({error}); correct it.") from error
    if not found:
        raise UsageError(
            f"{flag} must match at least one layer path. Received: {pattern!r}, which matches none of "
            f"{len(paths)}; --list_layers prints them."
        )
    return found


def eligible_paths(network, cfg: Config) -> list[str]:
    """Returns the paths of the candidates that `--exclude_layers` does not match, in forward order.

    Raises:
        UsageError: if the expression is invalid, or matches no layer or all.
    """
    paths = [candidate.path for candidate in network.candidates]
    if cfg.exclude_layers is None:
        return paths
    excluded = matching(paths, cfg.exclude_layers, "--exclude_layers")
    left = [path for path in paths if path not in excluded]
    if not left:
        raise UsageError(
            f"--exclude_layers must leave a layer to train. Received: {cfg.exclude_layers!r}, "
            f"which matches all {len(paths)}; --list_layers prints them."
        )
    return left


def select_top(
    network, cfg: Config, scores: Sequence[float], columns: Sequence[dict] = (), stability: float | None = None
) -> Selection:
    """Returns the Selection of the layers with the highest scores within the budget `cfg.rho`.

    Args:
        network: models.Network.
        cfg: Config.
        scores: sequence of float, one per candidate.
        columns: sequence of dict. Further entries for each candidate's row in selection.json.
        stability: float or None, as in `Selection`.
    """
    eligible = set(eligible_paths(network, cfg))
    ranks = rank(scores, [candidate.path in eligible for candidate in network.candidates])
    # With only a memory budget, all layers are selected; memory/budget.py keeps the first that fit.
    max_layers = layer_budget(1.0 if cfg.rho is None else cfg.rho, len(network.candidates))
    chosen = {c.path for c, place in zip(network.candidates, ranks) if place is not None and place <= max_layers}
    return _selection(network, chosen, scores, ranks, columns, max_layers, stability)


def with_first_layers(network, selection: Selection, length: int) -> Selection:
    """Returns the Selection of the first `length` layers of another selection's ranking."""
    chosen = {row["path"] for row in selection.layers if row["rank"] is not None and row["rank"] <= length}
    scores = [row["score"] for row in selection.layers]
    ranks = [row["rank"] for row in selection.layers]
    return _selection(network, chosen, scores, ranks, selection.layers, length, selection.stability)


def select_layers(network, chosen: set[str], other_weights: Collection[str] = ()) -> Selection:
    """Returns the Selection of the named layers, without a ranking.

    Args:
        network: models.Network.
        chosen: set of layer paths.
        other_weights: collection of str. Paths of further weights that train.
    """
    unranked = [None] * len(network.candidates)
    return _selection(network, chosen, unranked, unranked, other_weights=other_weights)


def select_weights(network, chosen: set[str], scores: Sequence[float] | None = None, **more) -> Selection:
    """Returns the Selection of single weights and all weights of the head.

    A layer counts as selected if any of its weights is.

    Args:
        network: models.Network.
        chosen: set of weight paths.
        scores: sequence of float, one per candidate, for selection.json.
        **more: further fields of the Selection.
    """
    layers = {c.path for c in network.candidates if any(w.path in chosen for w in c.weights)}
    unranked = [None] * len(network.candidates)
    trained = chosen | {weight.path for weight in network.head.weights}
    return replace(
        _selection(network, layers, scores or unranked, unranked),
        trained_weights=tuple(w.path for w in network.trainable_weights if w.path in trained),
        **more,
    )


def _selection(network, chosen, scores, ranks, columns=(), max_layers=None, stability=None, other_weights=()):
    head = {network.head.path} if network.head else set()
    trained = chosen | head
    weights = {w.path for c in network.candidates if c.path in trained for w in c.weights}
    weights.update(other_weights)
    return Selection(
        trained_weights=tuple(w.path for w in network.trainable_weights if w.path in weights),
        selected=tuple(c.path for c in network.candidates if c.path in chosen),
        head_added=not head <= chosen,
        max_layers=max_layers,
        layers=[
            {
                "path": c.path,
                "type": c.type,
                "activation_size": c.activation_size,
                "num_weights": c.num_weights,
                "betti_1": None,
                "betti_1_per_batch": None,
                **column,
                "score": score,
                "rank": place,
                "selected": c.path in chosen,
            }
            for c, column, score, place in zip(
                network.candidates, columns or [{}] * len(network.candidates), scores, ranks
            )
        ],
        stability=stability,
    )
