"""What a sweep shows and records: a live table on a terminal, plain lines in a log, one file per failure."""

import json
import sys
from pathlib import Path

from core.files import write_whole
from sweeping.plan import Run

FAILURES = "sweep"  # folder inside the log folder


class Board:
    """Shows the states of a sweep's runs and records its failures.

    Attributes:
        runs: list of Run.
        states: dict from Run to open, running, done, failed or busy; runs that were
            finished before the sweep are not in it.
    """

    def __init__(self, runs: list[Run], todo: list[Run]):
        self.states = dict.fromkeys(todo, "open")
        self.runs = runs
        self.skipped = [run for run in runs if run not in self.states]
        self.ended_count = len(self.skipped)
        self.live = None

    def __enter__(self):
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(get_renderable=self.table, console=Console(stderr=True), refresh_per_second=2)
            self.live.start()
        self.say(f"{len(self.runs)} runs, {len(self.skipped)} of them already finished")
        return self

    def __exit__(self, *exception):
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """Prints a line, above the table if there is one."""
        if self.live:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def started(self, run: Run) -> None:
        """Records that a run has started."""
        self.states[run] = "running"

    def ended(self, run: Run, state: str, exit_code: int | None, last_line: str, log: Path) -> None:
        """Records how a run has ended.

        Args:
            run: Run.
            state: str. done, failed or busy.
            exit_code: int or None.
            last_line: str. The last line of its output.
            log: pathlib.Path.
        """
        self.states[run] = state
        self.ended_count += 1
        failure = {
            "state": state,
            "exit_code": exit_code,
            "last_line": last_line,
            "log": str(log),
            "arguments": run.argv,
        }
        file = failure_file(run.cfg.log_dir, run.name)
        if state == "done":
            file.unlink(missing_ok=True)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(failure, indent=2) + "\n")
        note = _result(run) if state == "done" else f"{last_line} ({log})"
        self.say(f"[{self.ended_count}/{len(self.runs)}] {run.name}: {state}{note and ', '}{note}")

    def table(self):
        """Returns the rich.table.Table with one line per pair of network and data set."""
        from rich.table import Table

        columns = ("done", "running", "failed", "open")
        table = Table(title=f"{self.ended_count} of {len(self.runs)} runs")
        for name in ("model", "data set", *columns, "running now"):
            table.add_column(name, justify="right" if name in columns else "left")
        pairs = {}
        for run in self.runs:
            pairs.setdefault((run.cfg.model_name, run.cfg.dataset_name), []).append(run)
        for pair, runs in pairs.items():
            states = [{"busy": "open"}.get(state, state) for state in (self.states.get(run, "done") for run in runs)]
            working = [f"{r.cfg.train_type} seed {r.cfg.seed}" for r in runs if self.states.get(r) == "running"]
            counts = [str(states.count(column) or "") for column in columns]
            table.add_row(*pair, *counts, ", ".join(working[:2]) + (" ..." if len(working) > 2 else ""))
        return table

    def conclude(self, log_dir: str) -> int:
        """Prints the result of the sweep on stdout and returns the exit code."""
        open_runs = [run for run, state in self.states.items() if state != "done"]
        print(f"{len(self.runs) - len(open_runs)} of {len(self.runs)} runs are done in {log_dir}")
        if open_runs:
            print(f"{len(open_runs)} are not; see {Path(log_dir) / FAILURES}")
        return 1 if open_runs else 0


def _result(run):
    summary = json.loads((run.folder / "summary.json").read_text())
    accuracy, seconds = summary.get("accuracy"), summary.get("train_s")
    return ", ".join(
        ([] if accuracy is None else [f"accuracy {accuracy:.2f} %"])
        + ([] if seconds is None else [f"{seconds:.1f} s of training"])
    )


def last_line(path: Path) -> str:
    """Returns the last line of a program's output that is not empty, without the command before it."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("$ ")), "")


def failure_file(log_dir: str | Path, name: str) -> Path:
    """Returns the file that describes how a run failed when it was last tried."""
    return Path(log_dir) / FAILURES / f"{name}.json"


def failure_of(log_dir: str | Path, name: str) -> dict | None:
    """Returns the record of a run that failed when it was last tried, or None."""
    try:
        return json.loads(failure_file(log_dir, name).read_text())
    except (OSError, ValueError):
        return None


def read_failures(log_dir: str | Path) -> dict[str, dict]:
    """Returns {run name: record} of the runs that failed when they were last tried."""
    names = sorted(file.stem for file in (Path(log_dir) / FAILURES).glob("*.json"))
    return {name: record for name in names if (record := failure_of(log_dir, name))}
