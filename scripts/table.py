"""Turns run folders into tables.

    python scripts/table.py logs                    Markdown on stdout
    python scripts/table.py logs more_logs --out docs/results

Accuracy is the mean +- the sample standard deviation over seeds, the best of a
row in bold; beside it are measured peak memory, time per epoch and selection time.
`--out` writes table.csv (one line per cell), table.md and table.tex.
"""

import argparse
import csv
import io
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import runs as run_folders

from core.errors import UsageError
from core.files import write_whole
from core.units import MB


@dataclass(frozen=True)
class Metric:
    """An entry of summary.json and its format."""

    title: str
    key: str
    unit: float
    digits: int
    csv_name: str


ACCURACY = Metric("Accuracy (%)", "accuracy", 1, 2, "accuracy_percent")
METRICS = (
    ACCURACY,
    Metric("Peak memory of a training step, measured (MB)", "peak_memory_bytes_measured", MB, 1, "peak_memory_bytes"),
    Metric("Time per epoch (s)", "epoch_s", 1, 2, "epoch_s"),
    Metric("Selection time (s)", "selection_s", 1, 2, "selection_s"),
)


@dataclass(frozen=True)
class Cell:
    """The runs of one network, data set and column.

    Attributes:
        runs: list of Run. The finished runs, one per seed.
        lacking: str. A note on missing runs; empty if none is missing.
    """

    runs: list
    lacking: str

    def mean(self, metric):
        """Returns the mean over seeds, or None without a value."""
        values = self._values(metric)
        return statistics.fmean(values) if values else None

    def sd(self, metric):
        """Returns the sample standard deviation over seeds, or None for fewer than two."""
        values = self._values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, metric):
        values = [run.summary.get(metric.key) for run in self.runs]
        return [value for value in values if value is not None]


def main(argv=None):
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(prog="table.py", description="Tables of run folders.", allow_abbrev=False)
    parser.add_argument("log_dirs", nargs="+", metavar="LOG_DIR", help="folders of run folders")
    parser.add_argument("--out", metavar="DIR", help="also write table.csv, table.md and table.tex there")
    args = parser.parse_args(argv)
    try:
        found, notes = run_folders.read(args.log_dirs)
        if not found:
            raise UsageError(f"there must be runs to show. Received: {', '.join(args.log_dirs)}, with none.")
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    table = Table(found, notes)
    print(table.markdown(), end="")
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for name, text in (("table.csv", table.csv()), ("table.md", table.markdown()), ("table.tex", table.latex())):
            write_whole(out / name, text)
    return 0


class Table:
    """Rows are networks and data sets, columns schemes with their rho.

    Attributes:
        pairs: list of (network, data set).
        columns: list of str.
        schemes: dict from a column to its scheme and rho.
        cells: dict from (pair, column) to Cell.
        notes: list of str. What a reader has to know.
    """

    def __init__(self, found, notes=()):
        """Sorts runs into cells.

        Args:
            found: list of runs.Run.
            notes: list of str. What the reading has to say.
        """
        by_column = run_folders.labelled(found)
        seeds = {run.seed for run in found}
        self.pairs = list(dict.fromkeys(run.pair for run in found))
        self.columns = list(by_column)
        self.schemes = {column: members[0].scheme for column, members in by_column.items()}
        self.cells, repeated = {}, 0
        for pair in self.pairs:
            for column, members in by_column.items():
                here = [run for run in members if run.pair == pair]
                by_seed, left_out = run_folders.one_per_seed(here)
                repeated += left_out
                self.cells[pair, column] = Cell(list(by_seed.values()), _lacking(here, by_seed, seeds))
        self.notes = [*_about(found, seeds), *_unlike(found), *notes]
        if repeated:
            self.notes.append(f"{repeated} repeated runs of a seed are left out; the last of each counts.")

    def complete_pairs(self, metric):
        """Returns the rows in which every column has the figure, so that means are comparable."""
        return [p for p in self.pairs if all(self.cells[p, c].mean(metric) is not None for c in self.columns)]

    def best(self, pair):
        """Returns the columns with a row's highest accuracy, as it is printed."""
        means = {c: self.cells[pair, c].mean(ACCURACY) for c in self.columns}
        shown = {c: round(mean, ACCURACY.digits) for c, mean in means.items() if mean is not None}
        return {c for c, mean in shown.items() if mean == max(shown.values())} if len(self.columns) > 1 else set()

    def rows(self, metric, bold, plus_minus):
        """Returns the text of a metric's table, a list of cells a row, the row of means last.

        Args:
            metric: Metric.
            bold: function str -> str.
            plus_minus: str.
        """
        rows = []
        for pair in self.pairs:
            best = self.best(pair) if metric is ACCURACY else set()
            texts = []
            for column in self.columns:
                cell = self.cells[pair, column]
                mean, sd = cell.mean(metric), cell.sd(metric) if metric is ACCURACY else None
                if mean is None:
                    texts.append(cell.lacking or "not measured")
                    continue
                text = f"{mean / metric.unit:.{metric.digits}f}"
                text += "" if sd is None else f" {plus_minus} {sd / metric.unit:.{metric.digits}f}"
                text = bold(text) if column in best else text
                texts.append(f"{text} ({cell.lacking})" if cell.lacking else text)
            rows.append([*pair, *texts])
        complete = self.complete_pairs(metric)
        means = [
            f"{statistics.fmean(self.cells[p, c].mean(metric) for p in complete) / metric.unit:.{metric.digits}f}"
            if complete
            else "-"
            for c in self.columns
        ]
        which = (
            f"{len(complete)} of {len(self.pairs)} rows, those complete"
            if len(complete) < len(self.pairs)
            else f"all {len(complete)} rows"
        )
        return [*rows, ["mean", which, *means]]

    def markdown(self):
        """Returns all tables as Markdown."""
        lines = []
        for metric in METRICS:
            head = ["model", "data set", *self.columns]
            lines += [f"### {metric.title}", "", bar(head), bar(["---", "---", *["---:"] * len(self.columns)])]
            lines += [bar(row) for row in self.rows(metric, lambda text: f"**{text}**", "±")]
            lines += [""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)]) + "\n"

    def latex(self):
        """Returns all tables as LaTeX, for the booktabs package."""
        lines = ["% \\usepackage{booktabs}"]
        for metric in METRICS:
            lines += [
                "\\begin{table}", "\\centering", f"\\caption{{{_tex(metric.title)}}}",
                f"\\begin{{tabular}}{{ll{'r' * len(self.columns)}}}", "\\toprule",
                _tex_row(map(_tex, ["model", "data set", *self.columns])), "\\midrule",
            ]  # fmt: skip
            *rows, means = self.rows(metric, lambda text: f"\\textbf{{{text}}}", "$\\pm$")
            # The figures are TeX already, names and notes are not.
            lines += [_tex_row([_tex(row[0]), _tex(row[1]), *row[2:]]) for row in rows]
            lines += ["\\midrule", _tex_row(means), "\\bottomrule", "\\end{tabular}", "\\end{table}", ""]
        return "\n".join([*lines, *(f"% {note}" for note in self.notes)]) + "\n"

    def csv(self):
        """Returns one tidy table with a line per cell; undefined figures are empty."""
        text = io.StringIO()
        names = ["model_name", "dataset_name", "train_type", "rho", "column", "runs"]
        names += [f"{m.csv_name}_{part}" for m in METRICS for part in ("mean", "sd")]
        writer = csv.DictWriter(text, [*names, "best", "lacking"], lineterminator="\n")
        writer.writeheader()
        for (pair, column), cell in self.cells.items():
            scheme, rho = self.schemes[column]
            row = {"model_name": pair[0], "dataset_name": pair[1], "train_type": scheme, "rho": rho, "column": column}
            for m in METRICS:
                row |= {f"{m.csv_name}_mean": cell.mean(m), f"{m.csv_name}_sd": cell.sd(m)}
            writer.writerow(
                {**row, "runs": len(cell.runs), "best": int(column in self.best(pair)), "lacking": cell.lacking}
            )
        return text.getvalue()


def _lacking(here, by_seed, seeds):
    """Returns a note on the runs that a cell lacks, empty if it lacks none."""
    missing = len(seeds) - len(by_seed)
    if not missing:
        return ""
    latest = {run.seed: run.status for run in here if run.seed not in by_seed}
    reasons = [f"{list(latest.values()).count(status)} {status}" for status in sorted(set(latest.values()))]
    if not by_seed and not reasons:
        return "no run"
    count = f"{len(by_seed)} of {len(seeds)} seeds" if by_seed else "no result"
    return ": ".join([count, *([", ".join(reasons)] if reasons else [])])


def _about(found, seeds):
    """Returns notes on the runs behind the table."""
    done = [run for run in found if run.status == "done"]
    notes = [
        f"{len(done)} finished runs; seeds {', '.join(map(str, sorted(seeds)))}. Accuracy is that on the test split, "
        "with several seeds as mean and sample standard deviation; the best of a row is bold."
    ]
    values = {
        key: sorted({str(run.summary.get(key)) for run in done}) for key in ("protocol", "weights", "memory_device")
    }
    if done:
        weights = [{"none": "none (random)"}.get(name, name) for name in values["weights"]]
        notes.append(f"Protocol: {', '.join(values['protocol'])}. Pretrained weights: {', '.join(weights)}. "
                     f"Memory measured on: {', '.join(values['memory_device'])}.")  # fmt: skip
    pruned = [run.summary for run in done if run.summary.get("channels_pruned") is not None]
    if pruned:
        shares = ", ".join(f"{summary['channels_pruned']} of {summary['channels']}" for summary in pruned)
        notes.append(f"Channels pruned by prunetrain: {shares}. The masked network is neither smaller nor faster.")
    unfinished = [run for run in found if run.status != "done"]
    notes += [f"Not finished ({run.status}): {run.folder}" for run in unfinished]
    return notes


def _unlike(found):
    """Returns a note for each row whose columns differ by more than the scheme."""
    notes = []
    done = [run for run in found if run.status == "done"]
    for pair in dict.fromkeys(run.pair for run in done):
        here = [run for run in done if run.pair == pair]
        for flag in run_folders.varying(here, ignored=run_folders.BY_SCHEME):
            values = sorted({str(run_folders.plain(flag, run_folders.settings(run).get(flag))) for run in here})
            notes.append(f"{pair[0]} on {pair[1]}: runs differ in {flag} ({', '.join(values)}).")
    return notes


def bar(texts):
    """Returns a row of a Markdown table."""
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _tex(text):
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "_%&#${}" else c) for c in text)


def _tex_row(texts):
    return " & ".join(texts) + r" \\"


if __name__ == "__main__":
    sys.exit(main())
