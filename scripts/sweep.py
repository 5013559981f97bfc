"""Runs the whole comparison: models x data sets x schemes x rhos x seeds, each run a process of its own.

    scripts/sweep.sh --seeds 0,1,2                      the sixteen pairs, AdaBet and six baselines
    scripts/sweep.sh --dry_run                          prints the commands, and runs nothing
    scripts/sweep.sh --models mobilenetv2 --datasets digits --weights none --num_epochs 1

Flags that aren't listed by --help go to every run. What is done is read from
the run folders, so a sweep that was stopped, by Ctrl-C or by SIGKILL, is taken
up again by the same command: finished runs are skipped. A run that fails is
listed in LOG_DIR/sweep/failures.json with its last line and its log, and the
others go on. Exit code 0: all are done; 1: some aren't; 2: wrong use.

Runs die with the sweep: each watches a pipe that the kernel closes with the
sweep's end (tied.py). Jobs on Slurm are Slurm's own: Ctrl-C cancels them, but
they outlive a sweep that is killed; the next sweep finds them at work.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.config import Config
from core.errors import UsageError
from core.files import write_whole
from data import DATASETS
from models import BACKBONES
from run import flags
from run.folder import decisive, differing_flags, finished_summary, recorded
from selection import ALIASES, SCHEMES

ADABET_AND_BASELINES = (
    "act_norm_betti_train", "full_training", "traditional_tl_training", "bn_plus_bias_training", "fisher",
    "elastic_training", "prunetrain",
)  # fmt: skip
# What the sweep sets for each run, and what leaves no finished run behind.
NOT_PASSED_ON = {
    "--model_name": "--models", "--dataset_name": "--datasets", "--train_type": "--train_types", "--rho": "--rhos",
    "--seed": "--seeds", "--run_name": None, "--select_only": None, "--list_layers": None, "--prepare_only": None,
    "--resume": None,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of main.py.

    Attributes:
        cfg: Config. What main.py makes of the arguments.
        arguments: tuple of str. Without the log folder and the run's name.
    """

    cfg: Config
    arguments: tuple

    @property
    def name(self):
        """The run folder's name, different for different flags: the last part is their digest."""
        cfg, plain = self.cfg, Config()
        differing = {key: value for key, value in decisive(asdict(cfg)).items() if value != getattr(plain, key)}
        digest = hashlib.sha256(json.dumps(differing, sort_keys=True, default=str).encode()).hexdigest()[:6]
        rho = [] if cfg.rho is None else [f"rho{cfg.rho:g}"]
        return "_".join([cfg.model_name, _file_name(cfg.dataset_name), cfg.train_type, *rho, f"seed{cfg.seed}", digest])

    @property
    def words(self):
        """The arguments of main.py, all of them."""
        return [*self.arguments, "--log_dir", self.cfg.log_dir, "--run_name", self.name]

    @property
    def folder(self):
        return Path(self.cfg.log_dir) / self.name


def main(argv=None, program=(str(ROOT / "main.py"),), itself=(sys.executable, __file__), cluster="slurm"):
    """Runs the command line.

    Args:
        argv: list of str. Arguments without the program's name; None takes the
            process's own.
        program: sequence of str. The Python program that a run is, and its first
            arguments.
        itself: sequence of str. The command that is this sweep, for Slurm's jobs.
        cluster: str. What submitit calls the place where `--launcher slurm` runs.

    Returns:
        int. The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        args, extra = make_parser().parse_known_args(flags.without_doubled_flags(argv))
        runs = plan(args, extra)
        finished = finished_records(args.log_dir)
        todo = [run for run in runs if not is_finished(run.cfg, finished)]
        if args.dry_run:
            for run in todo:
                print(shlex.join(["python", "main.py", *run.words]))
            print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done already", file=sys.stderr)
            return 0
        with Board(runs, todo) as board:
            ready = prepare(todo, args, program, board)
            if args.launcher == "slurm":
                run_on_slurm(ready, args, extra, itself, cluster, board)
            else:
                run_here(ready, args, program, board)
        return board.conclude(args.log_dir)
    except SystemExit as stop:  # argparse has explained it
        return stop.code
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command takes the sweep up again.", file=sys.stderr)
        return 130
    except Terminated:
        return 143
    finally:
        signal.signal(signal.SIGTERM, before)


def make_parser():
    """Returns the argparse parser; unknown flags are main.py's."""
    parser = argparse.ArgumentParser(
        prog="sweep.sh",
        description="Run models x data sets x schemes x rhos x seeds. Other flags go to every run.",
        allow_abbrev=False,
    )
    photos = [name for name, row in DATASETS.items() if row.tfds and name != Config.dataset_name]
    names = [name for name in ADABET_AND_BASELINES if name in SCHEMES]
    common = f"{SCHEMES[Config.train_type].rho:g}"
    own = ", ".join(f"{name} {rho:g}" for name, rho in _own_rhos().items())
    parser.add_argument("--models", default=",".join(BACKBONES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--datasets", default=",".join(photos), help="comma-separated (default: %(default)s)")
    parser.add_argument("--train_types", default=",".join(names), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--rhos",
        default=common,
        help="comma-separated, for the schemes that read rho. Those with a default of their own "
        f"({own or 'none'}) keep it unless they are named, as in 0.1,0.2,SCHEME=0.5 (default: %(default)s)",
    )
    parser.add_argument("--seeds", default="0", help="comma-separated (default: %(default)s)")
    parser.add_argument("--weights", default="imagenet", help="as main.py takes it (default: %(default)s)")
    parser.add_argument("--log_dir", default=Config.log_dir, help="folder of the run folders (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=None, help="runs at a time (default here: 1; on Slurm: its own choice)"
    )
    parser.add_argument(
        "--launcher", choices=("local", "slurm"), default="local", help="slurm: one array job, through submitit"
    )
    parser.add_argument(
        "--slurm_parameters",
        default="",
        metavar="NAME=VALUE,...",
        help="for submitit, e.g. slurm_partition=gpu,timeout_min=600",
    )
    parser.add_argument(
        "--skip_prepare", action="store_true", help="data sets and weights are ready: don't look after them"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands of the runs that aren't done")
    return parser


def plan(args, extra):
    """Returns the runs that the arguments ask for, every one checked by main.py's own parser.

    Seeds come last to last: the first of them is compared everywhere before the second begins.

    Args:
        args: argparse.Namespace.
        extra: list of str. Flags for every run.

    Raises:
        UsageError: a flag that isn't for a sweep, or that main.py refuses.
        SystemExit: likewise, already explained.
    """
    for word in extra:
        if word.split("=")[0] in NOT_PASSED_ON:
            instead = NOT_PASSED_ON[word.split("=")[0]]
            raise UsageError(f"a sweep can't pass on {word}. {f'Use {instead}.' if instead else 'Leave it out.'}")
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs must be at least 1. Received: {args.jobs}.")
    schemes = [ALIASES.get(name, name) for name in _listed("train_types", args)]
    unknown = [name for name in schemes if name not in SCHEMES]
    if unknown:
        raise UsageError(f"--train_types takes {', '.join(SCHEMES)}. Received: {unknown[0]!r}.")
    rhos = _rhos_by_scheme(schemes, _listed("rhos", args))
    runs = {}
    with _quiet():  # main.py warns of flags that a scheme doesn't read, in each run's own log
        for seed, dataset, model, scheme in itertools.product(
            _listed("seeds", args), _listed("datasets", args), _listed("models", args), schemes
        ):
            for rho in rhos[scheme]:
                arguments = ["--model_name", model, "--dataset_name", dataset, "--train_type", scheme]
                arguments += [] if rho is None else ["--rho", rho]
                arguments += ["--seed", seed, "--weights", args.weights, *extra]
                run = Run(flags.parse([*arguments, "--log_dir", args.log_dir]), tuple(arguments))
                runs.setdefault(run.name, run)
    return list(runs.values())


def _listed(flag, args):
    words = [word.strip() for word in getattr(args, flag).split(",") if word.strip()]
    if not words:
        raise UsageError(f"--{flag} needs at least one value, or a comma-separated list.")
    return words


def _own_rhos():
    """Returns {scheme: rho} of those whose default is not the common one."""
    common = SCHEMES[Config.train_type].rho
    return {name: row.rho for name, row in SCHEMES.items() if "rho" in row.reads and row.rho != common}


def _rhos_by_scheme(schemes, words):
    """Returns {scheme: list of rhos as text}, [None] for schemes that don't read rho."""
    own, common, named = _own_rhos(), [], {}
    for word in words:
        scheme, equals, rho = word.rpartition("=")
        scheme = ALIASES.get(scheme, scheme)
        if equals and (scheme not in SCHEMES or "rho" not in SCHEMES[scheme].reads):
            readers = ", ".join(name for name, row in SCHEMES.items() if "rho" in row.reads)
            raise UsageError(f"--rhos takes RHO or SCHEME=RHO, SCHEME one of {readers}. Received: {word!r}.")
        (named.setdefault(scheme, []) if equals else common).append(rho)
    rhos = {}
    for scheme in schemes:
        if "rho" not in SCHEMES[scheme].reads:
            rhos[scheme] = [None]
        elif scheme in named:
            rhos[scheme] = named[scheme]
        elif scheme in own:
            rhos[scheme] = [f"{own[scheme]:g}"]
        elif common:
            rhos[scheme] = common
        else:
            raise UsageError(f"--rhos must have a value for {scheme}. Received: {','.join(words)}; add one.")
    return rhos


@contextlib.contextmanager
def _quiet():
    log = logging.getLogger("adabet")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


# ---------------------------------------------------------------- what is done, from the run folders


def finished_records(log_dir):
    """Returns the config.json records of all finished runs in a log folder."""
    return [record for folder in sorted(Path(log_dir).glob("*/")) if (record := _finished_record(folder))]


def _finished_record(folder):
    """Returns a run folder's config.json where its summary says done, else None."""
    try:
        return recorded(folder) if finished_summary(folder) else None
    except UsageError:
        return None  # something else's


def is_finished(cfg, records):
    """Says whether one of the finished runs had the same flags, as far as they change results."""
    return any(not differing_flags(cfg, record) for record in records)


def flags_to_go_on(run):
    """Returns what main.py needs to take up a run that didn't finish.

    Only ever called with the run locked.

    Raises:
        Finished: it has come to an end since the sweep looked.
    """
    if not run.folder.exists():
        return []
    if _finished_record(run.folder):
        raise Finished
    return ["--resume"]


# ---------------------------------------------------------------- processes


class Terminated(BaseException):
    """SIGTERM arrived."""


def _terminate(signum, frame):
    raise Terminated


class Busy(Exception):
    """Another sweep runs this very run."""


class Finished(Exception):
    """The run has been finished by another sweep."""


class Child:
    """A process with its console in a file, which is locked as long as the process lives.

    Attributes:
        console: pathlib.Path.
        process: subprocess.Popen.
    """

    def __init__(self, name, words, log_dir, program, before=lambda: [], wait=False):
        """Starts it.

        Args:
            name: str. What the console's file is called.
            words: list of str. Arguments.
            log_dir: str.
            program: sequence of str. The Python program and its first arguments.
            before: function, called when the lock is had; its words are added.
            wait: bool. Wait for the lock where another process has it.

        Raises:
            Busy: another process has the lock.
        """
        self.console = Path(log_dir) / "sweep" / f"{name}.log"
        self.console.parent.mkdir(parents=True, exist_ok=True)
        # Appending, so that the file can be emptied only once it is ours.
        with open(self.console, "a") as console:
            try:
                fcntl.flock(console, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise Busy from None
            words = [*words, *before()]
            console.truncate(0)
            console.write(f"$ {shlex.join(['python', 'main.py', *words])}\n")
            console.flush()
            reading, self._writing = os.pipe()  # the writing end is no child's
            command = [sys.executable, str(Path(__file__).parent / "tied.py"), str(reading), *program, *words]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,  # the lock goes with it
                stderr=console,
                pass_fds=[reading],
                start_new_session=True,  # a terminal's Ctrl-C is for the sweep, which tells its children once
            )
            os.close(reading)

    def wait(self):
        """Returns the exit code, when there is one."""
        code = self.process.wait()
        if self._writing is not None:
            os.close(self._writing)
            self._writing = None
        return code

    def last_line(self):
        """Returns the last line of the console that isn't empty."""
        lines = self.console.read_text(errors="replace").split("\n")[1:]
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def prepare(runs, args, program, board):
    """Fetches each data set and each network's weights once.

    Args:
        runs: list of Run that aren't done.
        args: argparse.Namespace.
        program: as in `main`.
        board: Board, which is told of the runs that lack something.

    Returns:
        list of Run. Those that have all they need.
    """
    if args.skip_prepare:
        return runs
    lacking = {}
    ready = []
    for run in runs:
        cfg = run.cfg
        data_set = {"dataset_name": cfg.dataset_name, "data_dir": cfg.data_dir, "image_dir": cfg.image_dir}
        steps = [(_file_name(cfg.dataset_name), {**data_set, "weights": "none"})]
        if cfg.weights == "imagenet":
            network = {"model_name": cfg.model_name, "input_size": cfg.input_size, "weights": cfg.weights}
            steps.append((f"{cfg.model_name}_{cfg.input_size}", {**data_set, **network}))
        for what, given in steps:
            if what not in lacking:
                words = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
                lacking[what] = _prepare(what, ["--prepare_only", *words], args, program, board)
            if lacking[what]:
                board.ended(run, "failed", **lacking[what])
                break
        else:
            ready.append(run)
    return ready


def _prepare(what, words, args, program, board):
    """Returns None where all is ready, else what there is to say."""
    board.say(f"preparing {what}")
    child = Child(f"prepare_{what}", words, args.log_dir, program, wait=True)
    with _stopped_with_us([child]):
        code = child.wait()
    if code == 0:
        return None
    board.say(f"preparing {what}: {child.last_line()}")
    return {"exit_code": code, "last_line": child.last_line(), "log": child.console}


def _file_name(dataset_name):
    return dataset_name.replace("/", "-").replace(":", "-")


def run_here(runs, args, program, board):
    """Runs on this machine, `--jobs` at a time; returns when none is left.

    Args:
        runs: list of Run.
        args: argparse.Namespace.
        program: as in `main`.
        board: Board.
    """
    waiting, working, ended = list(reversed(runs)), {}, queue.SimpleQueue()

    def wait_for(run, child):
        ended.put((run, child.wait()))

    with _stopped_with_us(working.values()):
        while waiting or working:
            while waiting and len(working) < (args.jobs or 1):
                run = waiting.pop()
                try:
                    child = working[run] = Child(
                        run.name, run.words, args.log_dir, program, lambda: flags_to_go_on(run)
                    )
                except Busy:
                    console = Path(args.log_dir) / "sweep" / f"{run.name}.log"
                    board.ended(run, "busy", None, "another sweep is at it", console)
                    continue
                except Finished:
                    board.ended(run, "done", 0, "", run.folder)
                    continue
                board.started(run)
                threading.Thread(target=wait_for, args=(run, child), daemon=True).start()
            if working:
                run, code = ended.get()
                child = working.pop(run)
                done = code == 0 and _finished_record(run.folder)
                board.ended(run, "done" if done else "failed", code, child.last_line(), child.console)


@contextlib.contextmanager
def _stopped_with_us(children):
    """Ends the children, as gently as they can, when the block is left by an exception."""
    try:
        yield
    except BaseException:
        children = list(children)
        for child in children:
            # SIGTERM: whoever starts a sweep in the background has SIGINT ignored, and its children too.
            child.process.terminate()
        for child in children:
            child.process.wait()
        raise


def run_on_slurm(runs, args, extra, itself, cluster, board):
    """Runs as one array job through submitit; each of its tasks is a sweep of one run.

    Args:
        runs: list of Run.
        args: argparse.Namespace.
        extra: list of str. Flags for every run.
        itself, cluster: as in `main`.
        board: Board.

    Raises:
        UsageError: submitit or Slurm isn't there, or refuses a parameter.
    """
    try:
        import submitit
    except ImportError:
        raise UsageError("--launcher slurm needs submitit, which isn't installed; run: pip install submitit") from None
    if not runs:
        return
    try:
        executor = submitit.AutoExecutor(folder=Path(args.log_dir) / "sweep" / "slurm", cluster=cluster)
        executor.update_parameters(name="adabet", **_slurm_parameters(args))
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise UsageError(f"--launcher slurm: {' '.join(str(error).split())}") from None
    with executor.batch():
        jobs = {}
        for run in runs:
            command = [*itself, *_sweep_of_one(run, args, extra)]
            jobs[executor.submit(submitit.helpers.CommandFunction(command, cwd=os.getcwd()))] = run
    for run in runs:
        board.started(run)
    board.say(f"array job of {len(runs)} tasks: {next(iter(jobs)).job_id}")
    try:
        for job in submitit.helpers.as_completed(list(jobs)):
            run = jobs[job]
            error = job.exception()
            record = read_failures(args.log_dir).get(run.name) or {}
            if _finished_record(run.folder):
                board.ended(run, "done", 0, "", run.folder)
            else:
                last = record.get("last_line") or (str(error).strip().splitlines() or [""])[-1]
                board.ended(run, "failed", record.get("exit_code"), last, record.get("log") or job.paths.stderr)
    except BaseException:
        for job in jobs:
            job.cancel()
        raise


def _slurm_parameters(args):
    parameters = {} if args.jobs is None else {"slurm_array_parallelism": args.jobs}
    for word in filter(None, args.slurm_parameters.split(",")):
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--slurm_parameters takes NAME=VALUE,... Received: {word!r}.")
        parameters[name.strip()] = int(value) if value.strip().isdigit() else value.strip()
    return parameters


def _sweep_of_one(run, args, extra):
    """Returns the arguments of the sweep that is this run alone."""
    cfg = run.cfg
    words = ["--models", cfg.model_name, "--datasets", cfg.dataset_name, "--train_types", cfg.train_type]
    if cfg.rho is not None:
        words += ["--rhos", f"{cfg.train_type}={run.arguments[run.arguments.index('--rho') + 1]}"]
    words += ["--seeds", str(cfg.seed), "--weights", args.weights, "--log_dir", args.log_dir, "--skip_prepare"]
    return [*words, *extra]


# ---------------------------------------------------------------- telling of it


class Board:
    """What the sweep shows and records: a live table on a terminal, plain lines in a log."""

    def __init__(self, runs, todo):
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
        self.say(f"{len(self.runs)} runs, {len(self.skipped)} of them done already")
        return self

    def __exit__(self, *exception):
        if self.live:
            self.live.stop()

    def say(self, text):
        """Prints a line, above the table where there is one."""
        if self.live:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def started(self, run):
        """Takes down that a run is at work."""
        self.states[run] = "running"

    def ended(self, run, state, exit_code, last_line, log):
        """Takes down how a run ended, in failures.json too.

        Args:
            run: Run.
            state: str. done, failed, or busy.
            exit_code: int or None.
            last_line: str. The last thing that it said.
            log: pathlib.Path.
        """
        self.states[run] = state
        self.ended_count += 1
        failure = {
            "state": state,
            "exit_code": exit_code,
            "last_line": last_line,
            "log": str(log),
            "arguments": run.words,
        }
        _write_failure(run.cfg.log_dir, run.name, None if state == "done" else failure)
        note = _result(run) if state == "done" else f"{last_line} ({log})"
        self.say(f"[{self.ended_count}/{len(self.runs)}] {run.name}: {state}{note and ', '}{note}")

    def table(self):
        """Returns the rich table: a line a pair of network and data set."""
        from rich.table import Table

        columns = ("done", "running", "failed", "open")
        table = Table(title=f"{self.ended_count} of {len(self.runs)} runs")
        for name in ("model", "data set", *columns, "at work"):
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

    def conclude(self, log_dir):
        """Prints the result of the sweep on stdout; returns the exit code."""
        open_runs = [run for run, state in self.states.items() if state != "done"]
        print(f"{len(self.runs) - len(open_runs)} of {len(self.runs)} runs are done in {log_dir}")
        if open_runs:
            print(f"{len(open_runs)} are not: {_failures_file(log_dir)}")
        return 1 if open_runs else 0


def _result(run):
    summary = json.loads((run.folder / "summary.json").read_text())
    accuracy, seconds = summary.get("accuracy"), summary.get("train_s")
    return ", ".join(
        ([] if accuracy is None else [f"accuracy {accuracy:.2f} %"])
        + ([] if seconds is None else [f"{seconds:.1f} s of training"])
    )


def _failures_file(log_dir):
    return Path(log_dir) / "sweep" / "failures.json"


def read_failures(log_dir):
    """Returns {run name: record} of the runs that failed when they were last tried."""
    try:
        return json.loads(_failures_file(log_dir).read_text())
    except FileNotFoundError:
        return {}


def _write_failure(log_dir, name, failure):
    path = _failures_file(log_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:  # other sweeps, and the tasks of an array job, write here too
        fcntl.flock(lock, fcntl.LOCK_EX)
        failures = {key: value for key, value in read_failures(log_dir).items() if key != name}
        if failure:
            failures[name] = failure
        if failures:
            write_whole(path, json.dumps(failures, indent=2) + "\n")
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
