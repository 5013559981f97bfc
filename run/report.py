"""What a run reports: the records of its folder and the text on the console.

Pure functions from results to dicts and text. `run/folder.py` writes them.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from core.config import Config
from core.environment import device_facts
from core.errors import UsageError
from core.log import log
from core.units import MB
from memory.measure import peak_rss_bytes
from run.folder import RunFolder, fingerprint, library_versions
from selection import SUMMARY_FACTS
from selection.ranking import Selection
from training.result import Result

# Probability that guessing passes for learning.
_BY_CHANCE = 1e-3


@dataclass
class Progress:
    """What a run has so far.

    Attributes:
        cfg: Config.
        folder: RunFolder.
        images: data.pipeline.Data.
        network: models.Network.
        selection: Selection, the first of the run, or None before it.
        result: Result.
    """

    cfg: Config
    folder: RunFolder
    images: Any
    network: Any
    selection: Selection | None = None
    result: Result = field(default_factory=Result)


def config_record(cfg: Config, images, network, folder: RunFolder, cached: bool | None = None) -> dict:
    """Returns the content of config.json: the resolved flags, and what the run runs on.

    Args:
        cfg: Config.
        images: data.pipeline.Data.
        network: models.Network.
        folder: RunFolder.
        cached: bool or None. Whether training reads cached features; None before that is decided.
    """
    decisive = {
        "versions": library_versions(),
        "dataset_version": images.version,
        "weights_provenance": network.provenance,
        "cached": cached,
    }
    return {
        **asdict(cfg),
        "run_name": folder.name,
        "num_classes": images.num_classes,
        "bn_stats": network.bn_stats,
        "fingerprint": fingerprint(cfg, decisive),
        **decisive,
        **device_facts(),
        "split_sizes": images.split_sizes,
        "skipped_images": images.skipped_images,
        "class_names": images.class_names,
    }


def check_same_surroundings(record: dict, before: dict | None) -> None:
    """Checks that a resumed run has the libraries, data and weights that it started with.

    Another device, thread count or oneDNN setting may change the last digits of the
    results. A warning names it.

    Args:
        record: dict, from `config_record`.
        before: dict or None. The run's config.json.

    Raises:
        UsageError: if versions, data or weights differ.
    """
    if before is None:
        return
    for name in ("versions", "dataset_version", "split_sizes", "class_names", "weights_provenance"):
        now, then = (_without_location(content.get(name)) for content in (record, before))
        if now != then:
            raise UsageError(
                f"a resumed run needs the {name} that it started with. Received: {_difference(now, then)}; restore "
                "that, or start a new run."
            )
    changed = [name for name in device_facts() if record[name] != before.get(name)]
    if changed:
        log.warning(
            "The run started with another value of %s; the last digits of its results may differ.", ", ".join(changed)
        )


def _without_location(content):
    """Returns the content without the entries that only say where a file was."""
    return {k: v for k, v in content.items() if k not in ("path", "note")} if isinstance(content, dict) else content


def _difference(now, then):
    if not (isinstance(now, dict) and isinstance(then, dict)):
        return f"{now}, before {then}"
    return ", ".join(
        f"{key} {now.get(key)}, before {then.get(key)}" for key in {**then, **now} if now.get(key) != then.get(key)
    )


def selection_files(cfg: Config, first: Selection, reselections: Sequence[tuple[int, Selection]]) -> dict:
    """Returns {name: content} of selection.json and the selection's other files; none before a warm-up has ended.

    selection.json contains no times, so equal runs give equal bytes.

    Args:
        cfg: Config.
        first: Selection, the first of the run.
        reselections: sequence of (int, Selection). The later selections, with the
            epoch, counted from 1, from which each holds.
    """
    if cfg.warmup_epochs:  # the first one is the head alone
        if not reselections:
            return {}
        (_, first), *reselections = reselections
    return {"selection.json": _selection_record(cfg, first, reselections), **first.files}


def _selection_record(cfg, selection, reselections):
    return {
        "scheme": cfg.train_type,
        "rho": cfg.rho,
        "num_layers": len(selection.layers),
        "budget": selection.max_layers,
        "selected": list(selection.selected),
        "head_added": selection.head_added,
        "trained_weights": list(selection.trained_weights),
        "stability": selection.stability,
        **selection.details,
        "layers": selection.layers,
        "reselected": [
            {
                "epoch": epoch,
                "selected": list(chosen.selected),
                "head_added": chosen.head_added,
                "trained_weights": list(chosen.trained_weights),
                **chosen.details,
            }
            for epoch, chosen in reselections
        ],
    }


def trained_facts(network, selection: Selection | None) -> dict:
    """Returns how much of the network trains: four counts and the earliest layer, all None without a selection."""
    trained = set(selection.trained_weights) if selection else set()
    layers = [c.path for c in network.candidates if any(w.path in trained for w in c.weights)]
    facts = {
        "num_trained_layers": len(layers),
        "num_trained_weights": sum(math.prod(w.shape) for w in network.trainable_weights if w.path in trained),
        "num_weights": sum(math.prod(w.shape) for w in network.trainable_weights),
        "num_layers": len(network.candidates),
        "earliest_trained_layer": layers[0] if layers else None,
    }
    return facts if selection else dict.fromkeys(facts)


def summary_record(run: Progress) -> dict:
    """Returns the content of summary.json. Values that the run did not reach are None.

    After re-selections, the counts of what trains are those of the last selection.
    """
    from memory import convention  # imports Keras, which --help need not wait for

    cfg, result, images = run.cfg, run.result, run.images
    seconds = [row["seconds"] for row in result.epochs]
    selection = result.latest_selection(run.selection)
    return {
        "status": result.status,
        "model_name": cfg.model_name,
        "dataset_name": cfg.dataset_name,
        "train_type": cfg.train_type,
        "rho": cfg.rho,
        "seed": cfg.seed,
        "protocol": cfg.protocol,
        "weights": run.network.provenance["source"],
        "accuracy": result.accuracy,
        "val_accuracy": result.val_accuracy,
        "epochs": len(result.epochs),
        "best_epoch": result.best_epoch,
        "selection_s": result.selection_s,
        "compile_s": result.compile_s if seconds else None,
        "train_s": sum(seconds) + (result.cache_s or 0.0) if seconds else None,
        "epoch_s": statistics.median(seconds) if seconds else None,
        "eval_s": result.eval_s if seconds else None,
        "checkpoint_s": result.checkpoint_s,
        "peak_memory_bytes_measured": result.peak_bytes,
        "selection_peak_memory_bytes": result.selection_peak_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "memory_device": result.device,
        "peak_memory_bytes_estimated": result.estimated_bytes,
        "memory_mb_published_convention": (
            convention.megabytes(run.network, selection.trained_weights) if selection else None
        ),
        **trained_facts(run.network, selection),
        **dict.fromkeys(SUMMARY_FACTS),  # those of other schemes are null
        **result.facts,
        "memory_budget_mb": cfg.memory_budget_mb,
        "budget_next_layer": result.budget_next_layer,
        "budget_next_bytes_estimated": result.budget_next_bytes,
        "stayed_at_chance": stayed_at_chance(
            result.epochs, images.steps_per_epoch * images.batch_size, images.majority_share
        ),
        "skipped_images": None if images.skipped_images is None else len(images.skipped_images),
        "cache_features": result.cached_in,
        "cached_views": cfg.cached_views,
        "cache_s": result.cache_s,
        "cache_bytes": result.cache_bytes,
        "cache_cut": result.cache_cut,
        "cache_step_share": result.cache_step_share,
        "cache_full_step_share": result.cache_full_step_share,
    }


def stayed_at_chance(epochs: Sequence[dict], num_images: int, majority_share: float) -> bool | None:
    """Returns whether the training accuracy never exceeded what guessing reaches.

    Guessing names the most frequent class for every image. If an epoch draws its
    images, the number of right answers has a binomial distribution. Training has left
    chance if an epoch has more right answers than guessing reaches in any of the
    run's epochs with probability 0.001.

    Args:
        epochs: sequence of dict with `train_accuracy`, one per epoch.
        num_images: int. Training images per epoch.
        majority_share: float. Share of the most frequent class in the training images.

    Returns:
        bool, or None before the first epoch has ended.
    """
    if not epochs:
        return None
    from scipy.stats import binom  # takes half a second to import

    most_by_chance = binom.isf(_BY_CHANCE / len(epochs), num_images, majority_share)
    best = max(epoch["train_accuracy"] for epoch in epochs)
    return bool(round(best * num_images) <= most_by_chance)


def announce(cfg: Config, images, network, device: str) -> None:
    """Logs the network, the data and the device of a run that begins."""
    sizes = ", ".join(f"{size} {split}" for split, size in images.split_sizes.items() if size)
    num_layers = len(network.candidates)
    log.info("Network: %s, %d candidate layers, %d classes", cfg.model_name, num_layers, images.num_classes)
    log.info("Data: %s, images: %s; protocol %s", images.version, sizes, cfg.protocol)
    if network.bn_stats:
        log.info("Batch normalization uses %s statistics", network.bn_stats)
    log.info("Device: %s", device)


def announce_selection(network, selection: Selection, selection_s: float | None) -> None:
    """Logs how much of the network trains; `selection_s` is None for a warm-up."""
    facts = trained_facts(network, selection)
    log.info(
        "%d of %d layers train%s: %d of %d weights, from %s on; %s",
        facts["num_trained_layers"],
        facts["num_layers"],
        " (the head in addition to the budget)" if selection.head_added else "",
        facts["num_trained_weights"],
        facts["num_weights"],
        facts["earliest_trained_layer"],
        "warm-up" if selection_s is None else f"selected in {selection_s:.1f} s",
    )


def epoch_line(row: dict, num_epochs: int) -> str:
    """Returns a row of metrics.csv as a line for the log."""
    epoch, train_loss, train_accuracy, loss, accuracy, seconds, _ = row.values()
    split = "val" if "val_loss" in row else "test"
    return (
        f"Epoch {epoch}/{num_epochs}: loss {train_loss:.4f}, accuracy {100 * train_accuracy:.2f} %, {split} loss "
        f"{loss:.4f}, {split} accuracy {100 * accuracy:.2f} %, {seconds:.1f} s"
    )


def console_block(summary: dict) -> str:
    """Returns the block that users' scripts parse, from the content of summary.json."""
    lines = [
        ("Training Type", summary["train_type"]),
        ("Accuracy (%)", _number(summary["accuracy"], 2)),
        ("Time (h)", _number(summary["train_s"], 6, 3600)),
        ("Time per epoch (s)", _number(summary["epoch_s"], 3)),
        ("Selection Time (s)", _number(summary["selection_s"], 3)),
        ("Memory (MB)", _number(summary["peak_memory_bytes_measured"], 1, MB)),
        ("rho", summary["rho"]),
    ]
    rule = "=" * 50
    return "\n".join([rule, *(f"{name}: {value}" for name, value in lines), rule])


def _number(value, digits, unit=1):
    return "-" if value is None else f"{value / unit:.{digits}f}"
