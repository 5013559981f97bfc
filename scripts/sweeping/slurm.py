"""Runs a sweep's runs as one array job on Slurm, through submitit.

Each task is a sweep of one run. Jobs outlive a sweep that is killed: the next sweep waits
for those that have not ended instead of submitting their runs again. squeue gives the
states of jobs, because it needs no accounting; submitit's sacct does.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from core.errors import UsageError
from core.files import write_whole
from sweeping.board import FAILURES, Board, failure_file, failure_of, last_line
from sweeping.plan import Run, is_done

POLL_S = 2.0
CANCEL_S = 120.0  # Slurm sends SIGKILL 30 s after SIGTERM, unless KillWait is set
# The states of jobs that have ended, with what the sweep reports of a run that is not finished
# then; for an empty text, the last line of the run.
ENDED = {
    "COMPLETED": "",
    "FAILED": "",
    "TIMEOUT": "Slurm ended the job at its time limit; the next sweep resumes the run",
    "CANCELLED": "the job was cancelled; the next sweep resumes the run",
    "DEADLINE": "Slurm ended the job at its deadline; the next sweep resumes the run",
    "PREEMPTED": "Slurm ended the job in favour of another; the next sweep resumes the run",
    "NODE_FAIL": "the node of the job failed; the next sweep resumes the run",
    "BOOT_FAIL": "the node of the job did not boot; the next sweep resumes the run",
    "OUT_OF_MEMORY": "Slurm ended the job, which exceeded its memory; raise mem_gb in --slurm_parameters",
    "FORGOTTEN": "the job has ended and Slurm no longer lists it; the next sweep resumes the run",  # our own word
}
# What submitit raises for a parameter that it refuses, or where there is no Slurm.
REFUSALS = (AssertionError, NameError, RuntimeError, TypeError, ValueError)


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
        import submitit  # noqa: F401
    except ImportError:
        raise UsageError("--launcher slurm needs submitit, which is not installed; run pip install submitit") from None
    jobs = _jobs_of_earlier_sweeps(runs, args.log_dir) if cluster == "slurm" else {}
    try:
        if jobs:
            board.say(f"{len(jobs)} runs are jobs of an earlier sweep that Slurm still lists; waiting for them")
        new = [run for run in runs if run not in jobs.values() and not is_done(run)]
        if new:
            submitted = _submit(new, args, extra, itself, cluster)
            board.say(f"array job of {len(new)} tasks: {submitted[0].job_id}")
            jobs |= dict(zip(submitted, new, strict=True))
        for run in runs:
            if run in jobs.values():
                board.started(run)
            else:  # an earlier sweep's job has finished it just now
                board.ended(run, "done", 0, "", run.folder)
        for job, state in _as_ended(list(jobs), cluster):
            _report(jobs[job], job, state, args.log_dir, board)
    except BaseException:
        _cancel(jobs, cluster)
        raise


def _submit(runs, args, extra, itself, cluster):
    """Submits an array job, records the job of each run, and returns the jobs in the order of the runs."""
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=_folder(args.log_dir), cluster=cluster)
        # Without submitit's own signal before the time limit, which ends its command by SIGKILL:
        # Slurm's SIGTERM at the limit makes a run write a checkpoint.
        executor.update_parameters(**{"name": "adabet", "slurm_signal_delay_s": 0, **_slurm_parameters(args)})
        if cluster == "slurm":
            executor.parameters.setdefault("time", None)  # the partition's limit instead of submitit's 5 minutes
        with executor.batch():
            jobs = []
            for run in runs:
                failure_file(args.log_dir, run.name).unlink(missing_ok=True)  # of an earlier attempt
                command = [*itself, *_sweep_of_one(run, args, extra)]
                jobs.append(executor.submit(submitit.helpers.CommandFunction(command, cwd=os.getcwd())))
    except (*REFUSALS, submitit.core.utils.FailedJobError) as error:
        raise UsageError(f"--launcher slurm: {' '.join(str(error).split())}") from None
    for run, job in zip(runs, jobs, strict=True):
        write_whole(_job_file(run), f"{job.job_id}\n")
    return jobs


def _report(run, job, state, log_dir, board):
    """Records how the job of a run has ended."""
    if is_done(run):
        board.ended(run, "done", 0, "", run.folder)
        return
    record = failure_of(log_dir, run.name) or {}
    console = Path(log_dir) / FAILURES / f"{run.name}.log"
    log = record.get("log") or (console if console.exists() else job.paths.stderr)
    last = ENDED[state] or record.get("last_line") or last_line(job.paths.stderr) or "the job ended without a result"
    board.ended(run, "failed", record.get("exit_code"), last, log)


def _as_ended(jobs, cluster) -> Iterator[tuple]:
    """Yields (job, state) for each job once it has ended."""
    while jobs:
        for job, state in _states(jobs, cluster).items():
            if state in ENDED:
                jobs.remove(job)
                yield job, state
        if jobs:
            time.sleep(POLL_S)


def _states(jobs, cluster):
    """Returns {job: state} in Slurm's words, or UNKNOWN for all while Slurm does not answer."""
    if cluster != "slurm":  # submitit's local processes, in tests
        return {job: "COMPLETED" if job.done() else "RUNNING" for job in jobs}
    command = ["squeue", "--noheader", "--array", "--me", "--states=all", "--format=%i %T"]
    answer = subprocess.run(command, capture_output=True, text=True) if shutil.which("squeue") else None
    if answer is None or answer.returncode:
        return dict.fromkeys(jobs, "UNKNOWN")
    states = dict(line.split() for line in answer.stdout.splitlines())
    return {job: states.get(job.job_id, "FORGOTTEN") for job in jobs}


def _cancel(jobs, cluster):
    """Cancels the jobs, and waits until they have ended: their runs write a checkpoint on Slurm's SIGTERM."""
    if cluster != "slurm":
        for job in jobs:
            job.cancel(check=False)
    elif jobs:
        # It fails for jobs that have ended, and still cancels the others.
        subprocess.run(["scancel", "--quiet", *(job.job_id for job in jobs)], capture_output=True)
        deadline = time.monotonic() + CANCEL_S
        while time.monotonic() < deadline and not set(_states(jobs, cluster).values()) <= set(ENDED):
            time.sleep(POLL_S)


def _jobs_of_earlier_sweeps(runs, log_dir):
    """Returns {job: run} for the runs whose recorded jobs have not ended."""
    import submitit

    jobs = {}
    for run in runs:
        if _job_file(run).exists():
            jobs[submitit.SlurmJob(_folder(log_dir), _job_file(run).read_text().strip())] = run
    states = _states(jobs, "slurm") if jobs else {}
    return {job: run for job, run in jobs.items() if states[job] not in {*ENDED, "UNKNOWN"}}


def _folder(log_dir):
    return Path(log_dir) / FAILURES / "slurm"


def _job_file(run):
    return _folder(run.cfg.log_dir) / f"{run.name}.job"


def _slurm_parameters(args):
    parameters = {} if args.jobs is None else {"slurm_array_parallelism": args.jobs}
    for setting in filter(None, args.slurm_parameters.split(",")):
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--slurm_parameters takes NAME=VALUE,... Received: {setting!r}.")
        parameters[name.strip()] = _number(value.strip())
    return parameters


def _number(text):
    """Returns the text as an int or a float if it is a decimal number, else the text."""
    if re.fullmatch(r"\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else text


def _sweep_of_one(run, args, extra):
    """Returns the arguments of the sweep that consists of this run."""
    cfg = run.cfg
    argv = ["--models", cfg.model_name, "--datasets", cfg.dataset_name, "--train_types", cfg.train_type]
    if cfg.rho is not None:
        argv += ["--rhos", f"{cfg.train_type}={run.arguments[run.arguments.index('--rho') + 1]}"]
    argv += ["--seeds", str(cfg.seed), "--weights", args.weights, "--log_dir", os.path.abspath(args.log_dir)]
    return [*argv, "--skip_prepare", *extra]
