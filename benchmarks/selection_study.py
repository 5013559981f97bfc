"""How the selected layers depend on the images of the selection.

    python benchmarks/selection_study.py --weights WEIGHTS.h5 --out docs/selection_stability.png

ranks a network's layers from different images (seeds), with different numbers of point
clouds per ranking and points per cloud, and plots how many of the selected layers two
rankings have in common.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from core import environment


def main(argv=None):
    """Ranks, prints the table, draws it, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--model_name", default="mobilenetv2")
    parser.add_argument("--weights", required=True, help="a weights file")
    parser.add_argument("--input_size", type=int, default=96)
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--points", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--clouds", type=int, default=8, help="largest number of clouds per ranking")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data_dir", help="TFDS folder")
    parser.add_argument("--out", default="selection_stability.png")
    args = parser.parse_args(argv)

    scores = {
        (points, seed): scores_per_cloud(args, points, seed) for points in args.points for seed in range(args.seeds)
    }
    agreement = {
        points: [
            seeds_agree([scores[points, seed] for seed in range(args.seeds)], clouds, args.rho)
            for clouds in range(1, min(len(scores[points, seed]) for seed in range(args.seeds)) + 1)
        ]
        for points in args.points
    }
    print(f"Layers in common between two seeds, % of the top {args.rho:g}, by clouds per ranking")
    for points, row in agreement.items():
        print(f"{points:>4} points: " + "  ".join(f"{100 * share:5.1f}" for share in row))
    draw(agreement, args)
    print(f"Wrote {args.out}")
    return 0


def scores_per_cloud(args, points, seed):
    """Returns AdaBet's scores, float array of shape (clouds, layers), on other images for each seed."""
    environment.load_tensorflow()
    import data
    import models
    from core.config import Config
    from selection.topology import count_bars

    cfg = Config(
        model_name=args.model_name, weights=args.weights, input_size=args.input_size, seed=seed, data_dir=args.data_dir
    )
    images = data.load(cfg)
    network = models.build(cfg, images.num_classes)
    batches = images.selection_batches(points, args.clouds)
    counts, points = count_bars(network, (batch for batch, _ in batches), len(batches))
    return counts / np.array([points * candidate.activation_size for candidate in network.candidates])


def seeds_agree(scores_of_seeds, clouds, rho):
    """Returns the share of the selected layers that two seeds have in common, as the mean over all pairs."""
    from selection.ranking import layer_budget, rank

    chosen = []
    for scores in scores_of_seeds:
        num_layers = scores.shape[1]
        ranks = rank(scores[:clouds].mean(axis=0), [True] * num_layers)
        chosen.append({i for i, place in enumerate(ranks) if place <= layer_budget(rho, num_layers)})
    return float(np.mean([len(a & b) / len(a) for a, b in itertools.combinations(chosen, 2)]))


def draw(agreement, args):
    """Draws agreement over clouds, one line per number of points."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(agreement)))
    for (points, row), colour, marker in zip(agreement.items(), colours, "osD^v<>"):
        axes.plot(
            range(1, len(row) + 1),
            [100 * share for share in row],
            marker=marker,
            color=colour,
            label=f"{points} points",
        )
    axes.set(
        xlabel="Point clouds per ranking",
        ylabel="Selected layers in common (%)",
        ylim=(0, 102),
        title=f"{args.model_name}, top {args.rho:g}, {args.seeds} seeds, digits at {args.input_size} px",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
