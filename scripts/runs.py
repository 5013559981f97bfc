"""Reads run folders, unfinished ones too, for tables and plots."""

import contextlib
import csv
import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sweeping.board import read_failures
from sweeping.plan import quiet

from core.config import Config
from core.errors import UsageError
from data import DATASETS
from models import BACKBONES
from run import flags
from run.folder import decisive
from selection import SCHEMES, SELECTION_FLAGS

_FILES = ("config.json", "summary.json", "selection.json", "metrics.csv", "log.txt")


@dataclass(frozen=True, eq=False)
class Run:
    """The content of a run folder.

    Attributes:
        folder: pathlib.Path.
        config: dict. config.json; for a run that failed before it had a folder,
            what its arguments say.
        summary: dict. summary.json; empty where there is none.
        status: str. The summary's, or unfinished.
    """

    folder: Path
    config: dict
    summary: dict
    status: str

    @property
    def pair(self):
        """(network, data set)."""
        return self.config["model_name"], self.config["dataset_name"]

    @property
    def scheme(self):
        """(scheme, rho), with rho None if the scheme does not read it."""
        return self.config["train_type"], self.config["rho"]

    @property
    def seed(self):
        return self.config["seed"]

    def selection(self):
        """Returns selection.json, or None."""
        return _json(self.folder / "selection.json")

    def metrics(self):
        """Returns metrics.csv as a list of dict of numbers, empty without a file."""
        try:
            with open(self.folder / "metrics.csv", newline="") as file:
                return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        except (OSError, ValueError, TypeError):
            return []


def read(log_dirs):
    """Reads all runs of some log folders.

    Args:
        log_dirs: list of str. Folders of run folders, or run folders themselves.

    Returns:
        runs: list of Run, in the order of the program's tables of networks, data
            sets and schemes. Those of `--select_only` are left out.
        notes: list of str. One line per folder that could not be read.

    Raises:
        UsageError: if a folder is not there.
    """
    runs, notes = [], []
    for log_dir in map(Path, log_dirs):
        if not log_dir.is_dir():
            raise UsageError(f"a log folder must exist. Received: {log_dir}; check the path.")
        itself = [log_dir] if (log_dir / "config.json").exists() else []
        for folder in itself or sorted(path for path in log_dir.iterdir() if path.is_dir()):
            if (folder / "evaluation.json").exists() or not any((folder / name).exists() for name in _FILES):
                continue  # not a run's
            config = _json(folder / "config.json")
            if not isinstance(config, dict) or not {"model_name", "dataset_name", "train_type", "rho", "seed"} <= set(
                config
            ):
                notes.append(f"{folder} is left out: it has no readable config.json")
                continue
            if config.get("select_only"):
                continue
            summary = _json(folder / "summary.json") or {}
            runs.append(Run(folder, config, summary, summary.get("status", "unfinished")))
        runs += _failed_without_a_folder(log_dir)
    return sorted(runs, key=_place), notes


def _json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _failed_without_a_folder(log_dir):
    """Returns the runs of a sweep that failed before they had a folder."""
    failed = []
    for name, failure in read_failures(log_dir).items():
        # Flags of another version are left out.
        with quiet(), contextlib.suppress(UsageError, SystemExit):
            if not (log_dir / name).exists():
                failed.append(Run(log_dir / name, asdict(flags.parse(failure["arguments"])), {}, "failed"))
    return failed


def _place(run):
    def position(name, table):
        return list(table).index(name) if name in table else len(table)

    (model, dataset), (scheme, rho) = run.pair, run.scheme
    return (
        position(model, BACKBONES), model, position(dataset, DATASETS), dataset, position(scheme, SCHEMES), scheme,
        rho or 0, run.seed, str(run.folder),
    )  # fmt: skip


def settings(run):
    """Returns the flags that change a run's results, except the seed, as hashable values."""
    names = {field.name for field in fields(Config)}
    record = {key: value for key, value in run.config.items() if key in names}
    weights = run.config.get("weights_provenance") or {}
    found = {**decisive(record), "weights": (record.get("weights"), weights.get("sha256") or weights.get("source"))}
    return {key: value for key, value in found.items() if key not in ("seed", "num_classes", "bn_stats")}


def varying(runs, ignored=()):
    """Returns the names of the flags in which some runs differ, sorted."""
    records = [settings(run) for run in runs]
    names = set().union(*records) - set(ignored)
    return sorted(name for name in names if len({record.get(name) for record in records}) > 1)


# Flags in which schemes may differ and still be compared.
BY_SCHEME = {"train_type", "learning_rate", *SELECTION_FLAGS}


def labelled(runs):
    """Groups runs into the columns of a table.

    A scheme and rho is a column. Where a network and data set has runs of it with
    different flags, they are never averaged: the flag's value joins the name.

    Args:
        runs: list of Run, from `read`.

    Returns:
        dict from a column's name to a list of Run.
    """
    by_scheme = {}
    for run in runs:
        by_scheme.setdefault(run.scheme, []).append(run)
    columns = {}
    for (scheme, rho), members in by_scheme.items():
        pairs = {run.pair for run in members}
        # What failed without a folder never saw its weights: it differs from nothing in them.
        known = [run for run in members if run.config.get("weights_provenance")]
        flags_in_name = sorted({
            name
            for pair in pairs
            if (of_pair := [run for run in known if run.pair == pair])
            for name in varying(of_pair)
        })  # fmt: skip
        for run in members:
            found = settings(run)
            name = scheme if rho is None else f"{scheme} rho={rho:g}"
            name = ", ".join([name, *(f"{flag}={plain(flag, found.get(flag))}" for flag in flags_in_name)])
            columns.setdefault(name, []).append(run)
    return columns


def plain(flag, value):
    """Returns a flag's value as text for names and notes."""
    if flag == "weights":
        asked, digest = value
        return asked if not digest or digest == asked else f"{asked}:{digest[:8]}"
    return value


def one_per_seed(runs):
    """Returns {seed: Run} of the finished runs, the last if there are several, and the number of others."""
    done = [run for run in runs if run.status == "done"]
    by_seed = {run.seed: run for run in done}
    return by_seed, len(done) - len(by_seed)
