"""Runs a sweep's runs on this machine, each in a process that ends with the sweep."""

import contextlib
import fcntl
import functools
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from core.errors import UsageError
from data import path_name
from models import short_name
from sweeping.board import last_line
from sweeping.plan import Run, is_done


class Busy(Exception):
    """Another sweep is running this run."""


class Finished(Exception):
    """Another sweep has finished the run."""


class Child:
    """A process whose output goes to a file, which is locked while the process lives.

    Attributes:
        console: pathlib.Path.
        process: subprocess.Popen.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log_dir: str,
        program: Sequence[str],
        more: Callable[[], list[str]] = list,
        wait: bool = False,
        environment: dict[str, str] | None = None,
    ):
        """Starts the process.

        Args:
            name: str. The name of the file.
            argv: list of str. Arguments.
            log_dir: str.
            program: sequence of str. The Python program and its first arguments.
            more: function that returns further arguments. It is called with the lock held.
            wait: bool. Whether to wait for a lock that another process holds.
            environment: dict. Variables to add to the environment.

        Raises:
            Busy: if another process holds the lock.
        """
        self.console = Path(log_dir) / "sweep" / f"{name}.log"
        self.console.parent.mkdir(parents=True, exist_ok=True)
        # Opened for appending: only the holder of the lock may empty the file.
        with open(self.console, "a") as console:
            try:
                fcntl.flock(console, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise Busy from None
            argv = [*argv, *more()]
            console.truncate(0)
            console.write(f"$ {shlex.join(['python', 'main.py', *argv])}\n")
            console.flush()
            reading, self._writing = os.pipe()  # no child inherits the writing end
            command = [sys.executable, str(Path(__file__).parent / "tied.py"), str(reading), *program, *argv]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,  # inherits the lock
                stderr=console,
                pass_fds=[reading],
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C reaches the sweep only, which then terminates its children
            )
            os.close(reading)

    def wait(self) -> int:
        """Waits for the process to end and returns its exit code."""
        code = self.process.wait()
        if self._writing is not None:
            os.close(self._writing)
            self._writing = None
        return code

    def last_line(self) -> str:
        """Returns the last line of output that is not empty."""
        return last_line(self.console)


def prepare(runs: list[Run], args, program: Sequence[str], board) -> list[Run]:
    """Prepares each data set and each network's weights once.

    Args:
        runs: list of Run.
        args: argparse.Namespace of the sweep.
        program: sequence of str, as in `sweep.main`.
        board: Board. Shows and records the runs that lack something.

    Returns:
        list of Run. The runs whose data and weights are ready.
    """
    if args.skip_prepare:
        return runs
    lacking = {}
    ready = []
    for run in runs:
        cfg = run.cfg
        data_set = {"dataset_name": cfg.dataset_name, "data_dir": cfg.data_dir, "image_dir": cfg.image_dir}
        steps = [(path_name(cfg.dataset_name), {**data_set, "weights": "none"})]
        if cfg.weights == "imagenet":
            network = {
                "model_name": cfg.model_name, "model_alpha": cfg.model_alpha, "input_size": cfg.input_size,
                "weights": cfg.weights,
            }  # fmt: skip
            steps.append((f"{short_name(cfg)}_{cfg.input_size}", {**data_set, **network}))
        for what, given in steps:
            if what not in lacking:
                argv = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
                lacking[what] = _prepare(what, ["--prepare_only", *argv], args, program, board)
            if lacking[what]:
                board.ended(run, "failed", **lacking[what])
                break
        else:
            ready.append(run)
    return ready


def _prepare(what, argv, args, program, board):
    """Returns None if all is ready, else how the preparation failed."""
    board.say(f"preparing {what}")
    child = Child(f"prepare_{what}", argv, args.log_dir, program, wait=True)
    with _stopped_with_us([child]):
        code = child.wait()
    if code == 0:
        return None
    board.say(f"preparing {what}: {child.last_line()}")
    return {"exit_code": code, "last_line": child.last_line(), "log": child.console}


def visible_gpus() -> list[str]:
    """Returns the GPUs that the sweep may use, by CUDA_VISIBLE_DEVICES or else by nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip() and gpu.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
    return [str(number) for number, _ in enumerate(line for line in listed if line.startswith("GPU "))]


def check_jobs(args) -> None:
    """Raises UsageError if there are fewer GPUs than `--jobs`."""
    gpus = visible_gpus()
    if args.launcher == "local" and gpus and (args.jobs or 1) > len(gpus):
        raise UsageError(
            f"--jobs gives each run a GPU of its own. Received: --jobs {args.jobs} with {len(gpus)} visible GPUs; "
            "lower it, or set CUDA_VISIBLE_DEVICES= to run on the CPU."
        )


def run_here(runs: list[Run], args, program: Sequence[str], board) -> None:
    """Runs on this machine, `--jobs` at a time.

    With several jobs each run sees one GPU, which no other run of the sweep has.

    Args:
        runs: list of Run.
        args: argparse.Namespace of the sweep.
        program: sequence of str, as in `sweep.main`.
        board: Board.
    """
    num_jobs = args.jobs or 1
    free_gpus = visible_gpus()[::-1] if num_jobs > 1 else []
    gpu_of: dict[Run, str] = {}
    waiting, working, ended = list(reversed(runs)), {}, queue.SimpleQueue()

    def wait_for(run, child):
        ended.put((run, child.wait()))

    with _stopped_with_us(working.values()):
        while waiting or working:
            while waiting and len(working) < num_jobs:
                run = waiting.pop()
                try:
                    environment = {"CUDA_VISIBLE_DEVICES": free_gpus[-1]} if free_gpus else None
                    more = functools.partial(_resume_if_begun, run)
                    child = Child(run.name, run.argv, args.log_dir, program, more, environment=environment)
                except Busy:
                    console = Path(args.log_dir) / "sweep" / f"{run.name}.log"
                    board.ended(run, "busy", None, "another sweep is running it", console)
                    continue
                except Finished:
                    board.ended(run, "done", 0, "", run.folder)
                    continue
                working[run] = child
                if free_gpus:
                    gpu_of[run] = free_gpus.pop()
                board.started(run)
                threading.Thread(target=wait_for, args=(run, child), daemon=True).start()
            if working:
                run, code = ended.get()
                child = working.pop(run)
                if run in gpu_of:
                    free_gpus.append(gpu_of.pop(run))
                done = code == 0 and is_done(run)
                board.ended(run, "done" if done else "failed", code, child.last_line(), child.console)


def _resume_if_begun(run):
    """Returns the flag that resumes a run which has a folder.

    Raises:
        Finished: if the run has ended since the sweep began.
    """
    if not run.folder.exists():
        return []
    if is_done(run):
        raise Finished
    return ["--resume"]


@contextlib.contextmanager
def _stopped_with_us(children) -> Iterator[None]:
    """Terminates the children if an exception leaves the block, and waits for them."""
    try:
        yield
    except BaseException:
        children = list(children)
        for child in children:
            # Not SIGINT: the children of a background job ignore it.
            child.process.terminate()
        for child in children:
            child.process.wait()
        raise
