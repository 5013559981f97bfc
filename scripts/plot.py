"""Draws plots of run folders, as PNG and PDF.

    python scripts/plot.py logs --out docs/plots
    python scripts/plot.py logs --out docs/plots --only profile,tradeoff --png_only

profile    b1 and score of each layer in forward order, the selected ones marked
memory     measured peak memory per network: inference, AdaBet, full training
tradeoff   accuracy against memory and against time per epoch, with the Pareto front
rho        accuracy over rho
curves     held-out accuracy and training loss by epoch

A run does not measure inference. `memory` measures it in a new process per network, at
the run's batch and input size.
"""

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import runs as run_folders
from matplotlib.ticker import MaxNLocator

from core.config import Config
from core.errors import UsageError
from core.units import MB
from memory.fresh_process import measure_peak
from selection import SCHEMES

# The colours of Okabe and Ito, distinct for colour-blind readers; markers and dashes distinguish them in grey.
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C"
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, "#000000")
MARKERS = "osD^vPX<>*hp"
DASHES = ("-", "--", "-.", ":")
ADABET, FULL = Config.train_type, "full_training"

plt.rcParams.update({
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#E3E3E3", "figure.dpi": 150, "savefig.bbox": "tight", "legend.frameon": False, "pdf.fonttype": 42,
})  # fmt: skip


def main(argv=None):
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="plot.py", description="Pictures of run folders.", allow_abbrev=False)
    parser.add_argument("log_dirs", nargs="+", metavar="LOG_DIR", help="folders of run folders")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to put the pictures")
    parser.add_argument("--only", default=",".join(PICTURES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--png_only", action="store_true", help="no PDF")
    args = parser.parse_args(argv)
    try:
        wanted = [name for name in args.only.split(",") if name]
        unknown = [name for name in wanted if name not in PICTURES]
        if unknown:
            raise UsageError(f"--only takes {', '.join(PICTURES)}. Received: {unknown[0]!r}.")
        found, notes = run_folders.read(args.log_dirs)
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    unfinished = [run for run in found if run.status != "done"]
    notes += [f"not finished ({run.status}), drawn as far as it goes: {run.folder}" for run in unfinished]
    for note in notes:
        print(note, file=sys.stderr)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for name in wanted:
        empty = True
        for stem, figure in PICTURES[name](found):
            for ending in ("png",) if args.png_only else ("png", "pdf"):
                figure.savefig(out / f"{stem}.{ending}", metadata={"CreationDate": None} if ending == "pdf" else None)
                print(out / f"{stem}.{ending}")
            plt.close(figure)
            empty, drawn = False, drawn + 1
        if empty:
            print(f"no picture {name}: the runs lack what it shows", file=sys.stderr)
    return 0 if drawn else 1


def done(found):
    """Returns the finished runs."""
    return [run for run in found if run.status == "done"]


def by_pair(found):
    """Yields ((network, data set), their runs, a stem for file names)."""
    pairs = {}
    for run in found:
        pairs.setdefault(run.pair, []).append(run)
    for pair, members in pairs.items():
        yield pair, members, "_".join(name.replace("/", "-").replace(":", "-") for name in pair)


def mean_and_sd(values):
    """Returns the mean and the sample standard deviation, 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def styles(names):
    """Returns {name: (colour, marker)}."""
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def finish(figure, axes, title, ncols=3):
    """Adds the title, and below the panels the legend of the first, a Pareto front last."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    figure.tight_layout()
    entries = sorted(zip(*axes[0].get_legend_handles_labels()), key=lambda entry: entry[1] == "Pareto front")
    figure.legend(*zip(*entries), loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=ncols, fontsize=8)


# ---------------------------------------------------------------- (a) Betti profile


def profile(found):
    """Yields a plot of b1 and score per layer for each network, data set and ranking scheme, of the first seed."""
    drawn = set()
    for run in found:
        selection = run.selection()
        if (
            not selection
            or run.pair + run.scheme in drawn
            or not any(row.get("betti_1") for row in selection["layers"])
        ):
            continue
        drawn.add(run.pair + run.scheme)
        layers = selection["layers"]
        place = np.arange(1, len(layers) + 1)
        figure, axes = plt.subplots(2, 1, figsize=(7, 3.8), sharex=True)
        chosen = np.array([row["selected"] for row in layers])
        for axis, key, label in ((axes[0], "betti_1", "b1 (H1 bars)"), (axes[1], "score", "score")):
            values = np.array([row[key] for row in layers], float)  # NaN draws nothing
            bottom = 0 if key == "betti_1" else min(values[values > 0], default=1) / 2
            axis.vlines(place, bottom, values, colors=np.where(chosen, RED, SKY), linewidth=1.2)
            for name, where, colour, marker, size in (
                ("frozen", ~chosen, SKY, "o", 9),
                ("selected", chosen, RED, "D", 18),
            ):
                axis.scatter(place[where], values[where], s=size, c=colour, marker=marker, label=name, zorder=3)
            axis.set(xlim=(0, len(layers) + 1), ylabel=label)
            axis.grid(axis="y")
        if any(row["score"] for row in layers):
            axes[1].set_yscale("log")
        axes[1].set_xlabel("layer, in forward order")
        axes[0].set_ylim(bottom=0)
        scheme, rho = run.scheme
        axes[0].set_title(
            f"{run.pair[0]} on {run.pair[1]}: {scheme}, rho {rho:g}, seed {run.seed}", loc="left", fontsize=9
        )
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(
            handles[::-1], names[::-1], loc="upper right", ncols=2, bbox_to_anchor=(0.99, 1.0), columnspacing=1
        )
        figure.align_ylabels()
        figure.tight_layout()
        yield f"profile_{'_'.join(run.pair).replace('/', '-')}_{scheme}_rho{rho:g}", figure


# ---------------------------------------------------------------- (b) memory


def memory(found):
    """Yields a plot of peak memory per data set, with three bars per network."""
    for dataset in dict.fromkeys(run.pair[1] for run in found):
        figures = {}
        for model in dict.fromkeys(run.pair[0] for run in found):
            here = [run for run in done(found) if run.pair == (model, dataset)]
            adabet = _peaks(
                [run for run in here if run.config["train_type"] == ADABET and run.config["rho"] == SCHEMES[ADABET].rho]
            )
            full = _peaks([run for run in here if run.config["train_type"] == FULL])
            if adabet and full:
                config = next(run.config for run in here if run.config["train_type"] == ADABET)
                figures[model] = (inference_peak_bytes(config), statistics.fmean(adabet), statistics.fmean(full))
        if not figures:
            continue
        figure, axis = plt.subplots(figsize=(1.6 + 1.7 * len(figures), 3))
        names = ("inference", f"AdaBet, rho {SCHEMES[ADABET].rho:g}", "full training")
        heights = dict(zip(names, np.array(list(figures.values()), float).T / MB))
        drawn = axis.grouped_bar(
            heights, tick_labels=list(figures), colors=(GREY, BLUE, ORANGE), edgecolor="white", linewidth=0
        )
        for bars, hatch in zip(drawn.bar_containers, ("", "//", "..")):
            plt.setp(bars, hatch=hatch)
            axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
        axis.set_ylabel("peak memory, measured (MB)")
        axis.grid(axis="y")
        axis.set_title(dataset, loc="left", fontsize=9, pad=24)
        axis.legend(loc="lower left", ncols=3, bbox_to_anchor=(-0.02, 1.0), columnspacing=1, handlelength=1.4)
        yield f"memory_{dataset.replace('/', '-')}", figure


def _peaks(members):
    return [
        run.summary["peak_memory_bytes_measured"] for run in members if run.summary.get("peak_memory_bytes_measured")
    ]


def inference_peak_bytes(config):
    """Returns the allocator's peak over a forward pass of one batch, in a new process, or None.

    Args:
        config: dict. A run's config.json.
    """
    names = ("model_name", "model_alpha", "custom_objects", "input_size", "batch_size")
    try:
        cfg = Config(weights="none", **{name: config[name] for name in names})
        return measure_peak(cfg, config["num_classes"], "inference").bytes
    except Exception as error:  # a network of the user's own can raise anything
        print(f"inference of {config['model_name']} cannot be measured: {error}", file=sys.stderr)
        return None


# ---------------------------------------------------------------- (c) accuracy against cost


def tradeoff(found):
    """Yields a plot for each network and data set, with one point per scheme, the mean over seeds."""
    costs = (("peak_memory_bytes_measured", MB, "peak memory, measured (MB)"), ("epoch_s", 1, "time per epoch (s)"))
    for pair, members, stem in by_pair(done(found)):
        columns = run_folders.labelled(members)
        if len(columns) < 2:
            continue
        style = styles(columns)
        figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True)
        for axis, (key, unit, label) in zip(axes, costs):
            points = {}
            for name, runs in columns.items():
                by_seed, _ = run_folders.one_per_seed(runs)
                pairs = [
                    (run.summary[key] / unit, run.summary["accuracy"])
                    for run in by_seed.values()
                    if run.summary.get(key)
                ]
                if pairs:
                    (cost, cost_sd), (accuracy, accuracy_sd) = map(mean_and_sd, zip(*pairs))
                    points[name] = (cost, accuracy)
                    colour, marker = style[name]
                    axis.errorbar(cost, accuracy, accuracy_sd or None, cost_sd or None, color=colour, marker=marker,
                                  markersize=6, linestyle="none", capsize=2, label=name, zorder=3)  # fmt: skip
            front = pareto(points.values())
            axis.plot(
                *zip(*front), color=GREY, linewidth=1, linestyle="--", drawstyle="steps-post", label="Pareto front"
            )
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
            axis.grid()
        axes[0].set_ylabel("test accuracy (%)")
        finish(figure, axes, f"{pair[0]} on {pair[1]}")
        yield f"tradeoff_{stem}", figure


def pareto(points):
    """Returns the points that no other beats in both, by rising cost.

    Args:
        points: iterable of (cost, accuracy).
    """
    front = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


# ---------------------------------------------------------------- (d) accuracy over rho


def over_rho(found):
    """Yields a plot for each network and data set with a scheme at several rhos."""
    for pair, members, stem in by_pair(done(found)):
        lines, levels = {}, {}
        for name, runs in run_folders.labelled(members).items():
            scheme, rho = runs[0].scheme
            by_seed, _ = run_folders.one_per_seed(runs)
            level = mean_and_sd([run.summary["accuracy"] for run in by_seed.values()])
            if rho is None:
                levels[name] = level
            else:
                line = name.replace(f"{scheme} rho={rho:g}", scheme)  # the flags that made it a column of its own stay
                lines.setdefault(line, []).append((rho, *level))
        lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
        if not lines:
            continue
        style = styles([*lines, *levels])
        figure, axis = plt.subplots(figsize=(4.6, 3))
        for name, points in lines.items():
            rhos, means, sds = zip(*points)
            colour, marker = style[name]
            axis.errorbar(rhos, means, sds if any(sds) else None, color=colour, marker=marker, capsize=2, label=name)
        for i, (name, (mean, _)) in enumerate(levels.items()):
            axis.axhline(mean, color=style[name][0], linestyle=DASHES[1 + i % 3], linewidth=1.2, label=name)
        axis.set_xticks(sorted({rho for points in lines.values() for rho, *_ in points}))
        axis.set_xlabel("rho")
        axis.set_ylabel("test accuracy (%)")
        axis.set_title(f"{pair[0]} on {pair[1]}", loc="left", fontsize=9)
        axis.grid()
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
        yield f"rho_{stem}", figure


# ---------------------------------------------------------------- (e) learning curves


def curves(found):
    """Yields a plot for each network and data set, with the mean over seeds per scheme and their range."""
    for pair, members, stem in by_pair(found):
        columns = {
            name: [m for run in runs if (m := run.metrics())] for name, runs in run_folders.labelled(members).items()
        }
        columns = {name: metrics for name, metrics in columns.items() if metrics}
        if not columns:
            continue
        figure, axes = plt.subplots(1, 2, figsize=(7, 3))
        style = styles(columns)
        for i, (name, metrics) in enumerate(columns.items()):
            colour, marker = style[name]
            for axis, key, unit in ((axes[0], None, 100), (axes[1], "train_loss", 1)):
                key = key or next(k for k in ("val_accuracy", "test_accuracy") if k in metrics[0][0])
                by_epoch = {}
                for rows in metrics:
                    for row in rows:
                        if key in row:
                            by_epoch.setdefault(int(row["epoch"]), []).append(unit * row[key])
                epochs = sorted(by_epoch)
                means = [statistics.fmean(by_epoch[epoch]) for epoch in epochs]
                axis.plot(epochs, means, color=colour, marker=marker, markersize=3.5, linewidth=1.2,
                          linestyle=DASHES[i // len(COLOURS) % len(DASHES)], label=name)  # fmt: skip
                if len(metrics) > 1:
                    axis.fill_between(epochs, [min(by_epoch[e]) for e in epochs], [max(by_epoch[e]) for e in epochs],
                                      color=colour, alpha=0.15, linewidth=0)  # fmt: skip
        protocols = {"validation" if "val_accuracy" in metrics[0][0] else "test" for metrics in columns.values()}
        axes[0].set_ylabel(f"{' or '.join(sorted(protocols))} accuracy (%)")
        axes[1].set_ylabel("training loss")
        for axis in axes:
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid()
        finish(figure, axes, f"{pair[0]} on {pair[1]}")
        yield f"curves_{stem}", figure


PICTURES = {"profile": profile, "memory": memory, "tradeoff": tradeoff, "rho": over_rho, "curves": curves}


if __name__ == "__main__":
    sys.exit(main())
