"""Writes docs/results.md from the run folders of benchmarks/accuracy.py.

    python scripts/results.py logs/accuracy
    python scripts/results.py logs/accuracy_quick --out /tmp/docs

Each task is a folder LOG_DIR/TASK with `search/`, `runs/`, learning_rates.json and task.json,
and, after benchmarks/other_scores.py, `scores/`.
Its page and picture are results/TASK.md and .svg. results.csv lists every run folder with
the fingerprint of its config.json. It keeps the tasks that LOG_DIR does not hold, and
results.md is made from it. The first sentence of results.md follows from the figures, by
the rule that stands below it.
"""

import argparse
import csv
import io
import json
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import matplotlib
import plot
import runs as run_folders
from results_page import ACCURACY, ADABET, B1_ONLY, COLUMNS, MEMORY, OPPONENTS, TIMES, date, report, task_page
from table import Cell

from core.errors import UsageError
from core.files import write_whole

CSV_COLUMNS = (
    "task", "part", "run", "fingerprint", "date", "status", "train_type", "rho", "seed", "learning_rate", "accuracy",
    "val_accuracy", "peak_memory_bytes_measured", "epoch_s", "selection_s", "num_trained_weights", "timed",
    "num_classes", "test_images",
)  # fmt: skip

SCORE = "score:"  # before a score's name, in the column `part`


@dataclass(frozen=True)
class Task:
    """The runs of one task.

    Attributes:
        name: str.
        runs: list of runs.Run. Those whose results are reported.
        timed_seed: int or None. The seed whose runs had the machine to themselves.
        search: list of runs.Run. Those of the search for learning rates.
        rates: dict. The content of learning_rates.json.
        scores: dict from a score's name to a list of runs.Run: those of
            benchmarks/other_scores.py.
    """

    name: str
    runs: list
    timed_seed: int | None
    search: list = field(default_factory=list)
    rates: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)

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
    table, pages = args.out / "results.csv", args.out / "results"
    try:
        tasks = read(args.log_dir)
        rows = {**read_table(table), **{task.name: rows_of(task) for task in tasks}}
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    pages.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        save(picture(task), pages / f"{task.name}.svg")
        write_whole(pages / f"{task.name}.md", task_page(task))
    write_whole(table, as_csv(row for name in sorted(rows) for row in rows[name]))
    write_whole(args.out / "results.md", report([task_of(*task) for task in read_table(table).items()]))
    print(f"Wrote {args.out / 'results.md'} and results.csv, and in {pages}: {', '.join(task.name for task in tasks)}")
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
        scores = {path.name: run_folders.read([path])[0] for path in sorted(folder.glob("scores/*/"))}
        task = Task(folder.name, runs, facts["timed_seed"], search, rates, scores)
        every = [("", run) for run in runs] + [(name, run) for name, found in scores.items() for run in found]
        # What failed without a folder never saw its weights: it differs from nothing in them.
        known = [run for _, run in every if run.config.get("weights_provenance")]
        unlike = run_folders.varying(known, ignored=run_folders.BY_SCHEME)
        places = {}
        for score, run in every:
            place = (score or run.config["train_type"], run.config["rho"], run.seed)
            places.setdefault(place, []).append(run.folder.name)
        twice = [
            f"two runs of {place}, {' and '.join(names)}; keep the one with the rate of learning_rates.json"
            for place, names in places.items()
            if len(names) > 1
        ]
        if unlike or twice:
            what = f"different {', '.join(unlike)}" if unlike else twice[0]
            raise UsageError(f"a task's runs must differ in scheme, rho and seed only. Received: {folder} with {what}.")
        if task.cells:
            tasks.append(task)
    if not tasks:
        raise UsageError(
            f"LOG_DIR must hold tasks of benchmarks/accuracy.py. Received: {log_dir}, with no finished run."
        )
    return tasks


def rows_of(task):
    """Returns the lines of results.csv for a task, one dict for each run folder."""
    parts = {"runs": task.runs, "search": task.search, **{SCORE + name: runs for name, runs in task.scores.items()}}
    return [
        {
            **run.config, **run.summary, "task": task.name, "part": part, "run": run.folder.name, "date": date(run),
            "status": run.status, "timed": part == "runs" and run.seed == task.timed_seed,
            "test_images": (run.config.get("split_sizes") or {}).get("test"),
        }
        for part, runs in parts.items()
        for run in runs
    ]  # fmt: skip


def as_csv(rows):
    """Returns the text of results.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_table(path):
    """Returns {task: rows} of a results.csv; {} if there is none.

    Raises:
        UsageError: if the file has other columns.
    """
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != CSV_COLUMNS:
            raise UsageError(f"{path} must have the columns of this version. Received: others; move the file away.")
        rows = {}
        for row in reader:
            rows.setdefault(row["task"], []).append(row)
    return rows


def task_of(name, rows):
    """Returns the Task that rows of results.csv describe, without what only its run folders hold."""
    runs, scores, timed_seed = [], {}, None
    for row in rows:
        config = {"train_type": row["train_type"], "rho": value(row["rho"]), "seed": int(row["seed"]),
                  "learning_rate": value(row["learning_rate"]), "num_classes": value(row["num_classes"]),
                  "split_sizes": {"test": value(row["test_images"])}}  # fmt: skip
        summary = {metric.key: value(row[metric.key]) for metric in COLUMNS}
        run = run_folders.Run(Path(row["run"]), config, summary, row["status"])
        if row["part"] == "runs":
            runs.append(run)
        elif row["part"].startswith(SCORE):
            scores.setdefault(row["part"].removeprefix(SCORE), []).append(run)
        if row["timed"] == "True":
            timed_seed = run.seed
    return Task(name, runs, timed_seed, scores=scores)


def value(text):
    """Returns the number of an entry of results.csv, or None for an empty one."""
    return float(text) if text else None


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
