"""Writes docs/results.md from the run folders of benchmarks/accuracy.py.

    python scripts/results.py logs/accuracy                         docs/results.md, .csv and pictures
    python scripts/results.py logs/accuracy_quick --out /tmp/docs

Each task is a folder LOG_DIR/TASK with `search/`, `runs/`, learning_rates.json and task.json.
results.csv lists every run folder with the fingerprint of its config.json. The first
sentence of results.md follows from the figures, by the rule that stands below it.
"""

import argparse
import csv
import io
import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
import plot
import runs as run_folders
from results_page import ACCURACY, ADABET, B1_ONLY, MEMORY, OPPONENTS, TIMES, date, report
from table import Cell

from core.errors import UsageError
from core.files import write_whole

CSV_COLUMNS = (
    "task", "part", "run", "fingerprint", "date", "status", "train_type", "rho", "seed", "learning_rate", "accuracy",
    "val_accuracy", "peak_memory_bytes_measured", "epoch_s", "selection_s", "num_trained_weights",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """The runs of one task.

    Attributes:
        name: str.
        runs: list of runs.Run. Those whose results are reported.
        search: list of runs.Run. Those of the search for learning rates.
        rates: dict. The content of learning_rates.json.
        timed_seed: int or None. The seed whose runs had the machine to themselves.
    """

    name: str
    runs: list
    search: list
    rates: dict
    timed_seed: int | None

    @cached_property
    def cells(self):
        """dict from (scheme, rho) to dict from seed to finished Run."""
        found = {}
        for run in self.runs:
            if run.status == "done":
                found.setdefault(run.scheme, {})[run.seed] = run
        return found

    def curve(self, scheme):
        """Returns {rho: {seed: (measured peak in bytes, accuracy)}} of a scheme."""
        return {
            rho: {seed: (run.summary[MEMORY.key], run.summary[ACCURACY.key]) for seed, run in by_seed.items()}
            for (name, rho), by_seed in self.cells.items()
            if name == scheme
        }

    def mean(self, place, metric):
        """Returns the mean over seeds of the cell (scheme, rho), or the timed seed's figure; None without one."""
        runs = [run for seed, run in self.cells[place].items() if metric not in TIMES or seed == self.timed_seed]
        return Cell(runs, "").mean(metric)


def main(argv=None):
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="results.py", description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("log_dir", type=Path, metavar="LOG_DIR", help="of benchmarks/accuracy.py")
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR", help="(default: docs)")
    args = parser.parse_args(argv)
    try:
        tasks = read(args.log_dir)
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    pictures = args.out / "results"
    pictures.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        save(picture(task), pictures / f"{task.name}.svg")
    write_whole(args.out / "results.csv", run_table(tasks))
    write_whole(args.out / "results.md", report(tasks))
    print(f"Wrote {args.out / 'results.md'}, results.csv, and {len(tasks)} pictures in {pictures}")
    return 0


def read(log_dir):
    """Reads the tasks of a log folder.

    Raises:
        UsageError: if there are none, or runs of a task cannot be compared.
    """
    tasks = []
    for folder in sorted(path.parent for path in log_dir.glob("*/learning_rates.json")):
        if not (folder / "runs").is_dir():
            continue
        runs, search = run_folders.read([folder / "runs"])[0], run_folders.read([folder / "search"])[0]
        rates, facts = (json.loads((folder / name).read_text()) for name in ("learning_rates.json", "task.json"))
        task = Task(folder.name, runs, search, rates, facts["timed_seed"])
        unlike = run_folders.varying(runs, ignored=run_folders.BY_SCHEME)
        twice = [key for key, count in Counter((*run.scheme, run.seed) for run in runs).items() if count > 1]
        if unlike or twice:
            what = f"different {', '.join(unlike)}" if unlike else f"two runs of {twice[0]}"
            raise UsageError(f"a task's runs must differ in scheme, rho and seed only. Received: {folder} with {what}.")
        if task.cells:
            tasks.append(task)
    if not tasks:
        raise UsageError(
            f"LOG_DIR must hold tasks of benchmarks/accuracy.py. Received: {log_dir}, with no finished run."
        )
    return tasks


def run_table(tasks):
    """Returns CSV text with one line for each run folder."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for task in tasks:
        for part, runs in (("runs", task.runs), ("search", task.search)):
            for run in runs:
                facts = {"task": task.name, "part": part, "run": run.folder.name, "date": date(run)}
                writer.writerow({**run.config, **run.summary, **facts, "status": run.status})
    return text.getvalue()


def picture(task):
    """Returns the matplotlib figure of accuracy over memory and over rho, mean and standard deviation over seeds.

    AdaBet, what it is compared with, and the schemes without rho have colours; others are grey.
    """
    coloured = [s for s in (ADABET, B1_ONLY, *OPPONENTS) if task.curve(s)]
    style = plot.styles(coloured)
    figure, axes = plot.plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
    for scheme in dict.fromkeys(scheme for scheme, _ in task.cells):
        curve = {rho: list(by_seed.values()) for rho, by_seed in task.curve(scheme).items()}
        accuracy = [plot.mean_and_sd([a for _, a in points]) for points in curve.values()]
        memory = [plot.mean_and_sd([m / plot.MB for m, _ in points]) for points in curve.values()]
        rhos = [(rho, 0.0) for rho in curve if rho is not None]
        colour, marker = style.get(scheme, (plot.GREY, "."))
        label, layer = (scheme, 3) if scheme in style else (None, 1)
        for axis, places in ((axes[0], memory), (axes[1], rhos)):
            if places:
                (x, x_sd), (y, y_sd) = zip(*places), zip(*accuracy)
                axis.errorbar(x, y, y_sd, x_sd, color=colour, marker=marker, markersize=4, linewidth=1, capsize=2,
                              label=label, zorder=layer)  # fmt: skip
        if curve.keys() == {None}:
            axes[0].annotate(scheme, (memory[0][0], accuracy[0][0]), (4, 3), textcoords="offset points",
                             fontsize=6, color=plot.GREY)  # fmt: skip
    axes[0].set(xlabel="peak memory of a training step, measured (MB)", ylabel="test accuracy (%)")
    axes[1].set(xlabel="rho")
    for axis in axes:
        axis.grid()
    plot.finish(figure, axes, task.name, ncols=4)
    return figure


def save(figure, path):
    """Writes a figure as SVG whose bytes depend on nothing but the figure."""
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    plot.plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
