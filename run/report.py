"""What a run says of itself: the records of its folder, and what the console shows.

Pure functions from results to dicts and text; writing is run/folder.py's.
"""

import logging
import math
import statistics
from dataclasses import asdict

from core.environment import device_facts
from core.errors import UsageError
from memory.measure import peak_rss_bytes
from run.folder import fingerprint, library_versions

log = logging.getLogger("adabet")

# Probability with which guessing may pass for learning.
_BY_CHANCE = 1e-3

# What single schemes add to summary.json; None for the others.
SCHEME_FACTS = ("rho_achieved_predicted", "rho_achieved_measured", "channels", "channels_pruned", "flops_remaining")


def config_record(cfg, images, network, folder):
    """Returns the content of config.json: what was asked for, resolved, and on what it ran.

    Args:
        cfg: Config.
        images: data.pipeline.Data.
        network: models.Network.
        folder: run_folder.RunFolder.
    """
    decisive = {
        "versions": library_versions(),
        "dataset_version": images.version,
        "weights_provenance": network.provenance,
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


def check_same_surroundings(record, before):
    """Refuses to go on with a run on what isn't the same any more: libraries, data, weights.

    Another device, or other thread counts, may change the last digits: that is warned of.

    Args:
        record: dict, from `config_record`.
        before: dict or None. The run's config.json, if it has come to one.

    Raises:
        UsageError: see there.
    """
    if before is None:
        return
    for name in ("versions", "dataset_version", "split_sizes", "class_names", "weights_provenance"):
        now, then = (_without_place(content.get(name)) for content in (record, before))
        if now != then:
            raise UsageError(
                f"a resumed run needs the {name} that it began with. Received: {_difference(now, then)}; bring that "
                "back, or start a new run."
            )
    changed = [name for name in device_facts() if record[name] != before.get(name)]
    if changed:
        log.warning(
            "The run began with another value of %s: the last digits of its results may differ.", ", ".join(changed)
        )


def _without_place(content):
    """Returns it without what only says where something lay."""
    return {k: v for k, v in content.items() if k not in ("path", "note")} if isinstance(content, dict) else content


def _difference(now, then):
    if not (isinstance(now, dict) and isinstance(then, dict)):
        return f"{now}, where it was {then}"
    return ", ".join(
        f"{key} {now.get(key)}, where it was {then.get(key)}"
        for key in {**then, **now}
        if now.get(key) != then.get(key)
    )


def selection_record(cfg, selection, later=()):
    """Returns the content of selection.json. It has no times, so that equal runs give equal bytes.

    Args:
        cfg: Config.
        selection: selection.Selection, the first.
        later: sequence of (first epoch, from 1; selection.Selection). The re-selections.
    """
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
            for epoch, chosen in later
        ],
    }


def trained_facts(network, selection):
    """Returns how much of the network trains: the summary's four counts and its earliest trained layer."""
    trained = set(selection.trained_weights)
    layers = [c.path for c in network.candidates if any(w.path in trained for w in c.weights)]
    return {
        "num_trained_layers": len(layers),
        "num_trained_weights": sum(math.prod(w.shape) for w in network.trainable_weights if w.path in trained),
        "num_weights": sum(math.prod(w.shape) for w in network.trainable_weights),
        "num_layers": len(network.candidates),
        "earliest_trained_layer": layers[0] if layers else None,
    }


def summary_record(cfg, images, network, selection, result):
    """Returns the content of summary.json; what was never reached is None.

    Args:
        cfg: Config.
        images: data.pipeline.Data.
        network: models.Network.
        selection: selection.Selection, the first, or None where the run ended before
            it. What trains is told of the last.
        result: train.Result.
    """
    from memory import convention  # loads Keras, which --help need not wait for

    seconds = [row["seconds"] for row in result.epochs]
    last = result.later[-1][1] if result.later else selection
    unknown = dict.fromkeys(
        ("num_trained_layers", "num_trained_weights", "num_weights", "num_layers", "earliest_trained_layer")
    )
    return {
        "status": result.status,
        "model_name": cfg.model_name,
        "dataset_name": cfg.dataset_name,
        "train_type": cfg.train_type,
        "rho": cfg.rho,
        "seed": cfg.seed,
        "protocol": cfg.protocol,
        "weights": network.provenance["source"],
        "accuracy": result.accuracy,
        "val_accuracy": result.val_accuracy,
        "epochs": len(result.epochs),
        "best_epoch": result.best_epoch,
        "selection_s": result.selection_s,
        "compile_s": result.compile_s,
        "train_s": sum(seconds) if seconds else None,
        "epoch_s": statistics.median(seconds) if seconds else None,
        "eval_s": result.eval_s if seconds else None,
        "checkpoint_s": result.checkpoint_s,
        "peak_memory_bytes_measured": result.peak_bytes,
        "selection_peak_memory_bytes": result.selection_peak_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "memory_device": result.device,
        "peak_memory_bytes_estimated": result.estimated_bytes,
        "memory_mb_published_convention": convention.megabytes(network, last.trained_weights) if last else None,
        **(trained_facts(network, last) if last else unknown),
        **dict.fromkeys(SCHEME_FACTS),
        **result.facts,
        "memory_budget_mb": cfg.memory_budget_mb,
        "budget_next_layer": result.budget_next_layer,
        "budget_next_bytes_estimated": result.budget_next_bytes,
        "stayed_at_chance": stayed_at_chance(
            result.epochs, images.steps_per_epoch * images.batch_size, images.majority_share
        ),
        "skipped_images": None if images.skipped_images is None else len(images.skipped_images),
    }


def stayed_at_chance(epochs, num_images, majority_share):
    """Says whether the training accuracy never left what guessing reaches.

    Guessing is to name the commonest class for every image. It reaches the count of a
    binomial distribution, if an epoch draws its images. Chance is left where an epoch
    has more right answers than guessing would reach in any of the run's epochs with
    probability 1 in 1,000.

    Args:
        epochs: list of dict with `train_accuracy`, a row an epoch.
        num_images: int. Training images an epoch.
        majority_share: float. Share of the commonest class in the training images.

    Returns:
        bool, or None before the first epoch has ended.
    """
    if not epochs:
        return None
    from scipy.stats import binom  # half a second

    most_by_chance = binom.isf(_BY_CHANCE / len(epochs), num_images, majority_share)
    best = max(epoch["train_accuracy"] for epoch in epochs)
    return bool(round(best * num_images) <= most_by_chance)


def console_block(summary):
    """Returns the block that users' scripts parse, from a summary record."""
    lines = [
        ("Training Type", summary["train_type"]),
        ("Accuracy (%)", _number(summary["accuracy"], 2)),
        ("Time (h)", _number(summary["train_s"], 6, 3600)),
        ("Time per epoch (s)", _number(summary["epoch_s"], 3)),
        ("Selection Time (s)", _number(summary["selection_s"], 3)),
        ("Memory (MB)", _number(summary["peak_memory_bytes_measured"], 1, 10**6)),
        ("rho", summary["rho"]),
    ]
    rule = "=" * 50
    return "\n".join([rule, *(f"{name}: {value}" for name, value in lines), rule])


def ranking_table(selection):
    """Returns the layers as a table, best first where they were ranked, else in forward order."""
    rows = sorted(selection.layers, key=lambda row: row["rank"] or math.inf)
    path_width = max(len(row["path"]) for row in rows)
    lines = [
        f"{'rank':>4}  {'layer':<{path_width}}  {'b1':>7}  {'activation':>10}  {'weights':>9}  {'score':>10}  trains"
    ]
    for row in rows:
        lines.append(
            f"{_or_dash(row['rank']):>4}  {row['path']:<{path_width}}  {_number(row['betti_1'], 2):>7}  "
            f"{row['activation_size']:>10}  {row['num_weights']:>9}  "
            f"{'-' if row['score'] is None else format(row['score'], '.3e'):>10}  {'yes' if row['selected'] else ''}".rstrip()
        )
    return "\n".join(lines)


def _number(value, digits, unit=1):
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _or_dash(value):
    return "-" if value is None else value
