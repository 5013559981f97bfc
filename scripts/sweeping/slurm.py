"""Runs a sweep's runs as one array job on Slurm, through submitit.

Each task is a sweep of one run. A task that reaches its time limit is terminated in time
for a checkpoint. Jobs outlive a sweep that is killed: the next sweep waits for those
that Slurm still lists instead of submitting their runs again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from core.errors import UsageError
from core.files import write_whole
from sweeping.board import FAILURES, Board, failure_of
from sweeping.plan import Run, is_done

POLL_S = 2.0


def run_on_slurm(
    runs: list[Run], args, extra: Sequence[str], itself: Sequence[str], cluster: str, board: Board
) -> None:
    """Runs one array job, and waits for it and for the jobs of earlier sweeps.

    Args:
        runs: list of Run.
        args: argparse.Namespace of the sweep.
        extra: list of str. Flags for every run.
        itself: sequence of str. The command of this sweep.
        cluster: str. Submitit's name of the cluster.
        board: Board.

    Raises:
        UsageError: if submitit or Slurm is missing or refuses a parameter.
    """
    try:
        import submitit
    except ImportError:
        raise UsageError(
            "--launcher slurm needs submitit. Received: it is not installed; run pip install submitit"
        ) from None
    if not runs:
        return
    folder = Path(args.log_dir) / FAILURES / "slurm"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(name="adabet", **_slurm_parameters(args))
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise UsageError(f"--launcher slurm: {' '.join(str(error).split())}") from None

    jobs = _still_queued(runs, folder)
    if jobs:
        board.say(f"{len(jobs)} runs are jobs of an earlier sweep that Slurm still lists; waiting for them")
    new = [run for run in runs if run not in jobs.values() and not is_done(run)]
    if new:
        with executor.batch():
            submitted = [executor.submit(_task(), [*itself, *_sweep_of_one(run, args, extra)]) for run in new]
        for run, job in zip(new, submitted, strict=True):
            write_whole(_job_file(folder, run), job.job_id)
            jobs[job] = run
        board.say(f"array job of {len(new)} tasks: {submitted[0].job_id}")
    for run in runs:
        if run in jobs.values():
            board.started(run)
        else:  # an earlier sweep's job has finished it just now
            board.ended(run, "done", 0, "", run.folder)
    try:
        for job in _as_ended(list(jobs)):
            _report(jobs[job], job, args.log_dir, board)
    except BaseException:
        for job in jobs:
            job.cancel()
        raise


def _task():
    """Returns the function that a task runs; a nested function is pickled by value, so that jobs need no path."""

    def task(command):
        import signal
        import subprocess

        # Slurm sends USR2 to every process of the task shortly before the time limit. Submitit then
        # raises here, and the child gets SIGTERM instead, which makes it write a checkpoint.
        signal_before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # inherits the ignored signal
        signal.signal(signal.SIGUSR2, signal_before)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code:
            raise RuntimeError(f"exit code {code}")

    return task


def _report(run, job, log_dir, board):
    """Records how the job of a run has ended."""
    if is_done(run):
        board.ended(run, "done", 0, "", run.folder)
        return
    error = str(job.exception() or "").strip().splitlines() or ["the job ended without a result"]
    timed_out = any("timed-out" in line for line in error)
    record = failure_of(log_dir, run.name) or {}
    last = "Slurm's time limit ended the job; the next sweep resumes it" if timed_out else record.get("last_line")
    board.ended(run, "failed", record.get("exit_code"), last or error[-1], record.get("log") or job.paths.stderr)


def _as_ended(jobs) -> Iterator:
    """Yields each job once it has a result, or once Slurm no longer lists it."""
    missing: set = set()  # not listed at the last look: their result may take a moment to appear
    while jobs:
        queued = _queued()
        for job in list(jobs):
            gone = queued is not None and job.job_id not in queued
            if job.paths.result_pickle.exists() or (job in missing and gone) or (queued is None and job.done()):
                jobs.remove(job)
                yield job
            elif gone:
                missing.add(job)
        if jobs:
            time.sleep(POLL_S)


def _queued() -> set[str] | None:
    """Returns the ids of this user's jobs that wait or run, or None if Slurm does not answer."""
    if shutil.which("squeue") is None:
        return None
    found = subprocess.run(["squeue", "--noheader", "--array", "--me", "--format=%i"], capture_output=True, text=True)
    return None if found.returncode else set(found.stdout.split())


def _still_queued(runs, folder):
    """Returns {job: run} for the runs that are jobs of an earlier sweep."""
    from submitit.slurm.slurm import SlurmJob

    queued, found = _queued() or set(), {}
    for run in runs:
        file = _job_file(folder, run)
        if file.exists() and (job_id := file.read_text().strip()) in queued:
            found[SlurmJob(folder=folder, job_id=job_id)] = run
    return found


def _job_file(folder, run):
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{run.name}.job"


def _slurm_parameters(args):
    parameters = {} if args.jobs is None else {"slurm_array_parallelism": args.jobs}
    for setting in filter(None, args.slurm_parameters.split(",")):
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--slurm_parameters takes NAME=VALUE,... Received: {setting!r}.")
        parameters[name.strip()] = int(value) if value.strip().isdigit() else value.strip()
    return parameters


def _sweep_of_one(run, args, extra):
    """Returns the arguments of the sweep that consists of this run."""
    cfg = run.cfg
    argv = ["--models", cfg.model_name, "--datasets", cfg.dataset_name, "--train_types", cfg.train_type]
    if cfg.rho is not None:
        argv += ["--rhos", f"{cfg.train_type}={run.arguments[run.arguments.index('--rho') + 1]}"]
    argv += ["--seeds", str(cfg.seed), "--weights", args.weights, "--log_dir", os.path.abspath(args.log_dir)]
    return [*argv, "--skip_prepare", *extra]
