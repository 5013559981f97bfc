"""Runs a sweep's runs as one array job on Slurm, through submitit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from core.errors import UsageError
from sweeping.board import Board, failure_of
from sweeping.plan import Run, is_done


def run_on_slurm(
    runs: list[Run], args, extra: Sequence[str], itself: Sequence[str], cluster: str, board: Board
) -> None:
    """Runs one array job. Each of its tasks is a sweep of one run.

    Args:
        runs: list of Run.
        args: argparse.Namespace of the sweep.
        extra: list of str. Flags for every run.
        itself, cluster: as in `sweep.main`.
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
            record = failure_of(args.log_dir, run.name) or {}
            if is_done(run):
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
    argv += ["--seeds", str(cfg.seed), "--weights", args.weights, "--log_dir", args.log_dir, "--skip_prepare"]
    return [*argv, *extra]
