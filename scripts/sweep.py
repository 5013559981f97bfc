"""Runs the whole comparison: models x data sets x schemes x rhos x seeds, each run a process of its own.

    scripts/sweep.sh --seeds 0,1,2                      the sixteen pairs, AdaBet and six baselines
    scripts/sweep.sh --dry_run                          prints the commands, and runs nothing
    scripts/sweep.sh --models mobilenetv2 --datasets digits --weights none --num_epochs 1

Flags that --help does not list are passed to every run. The run folders tell which runs
are finished, so the same command continues a sweep that was stopped, by Ctrl-C or by
SIGKILL: it skips finished runs and resumes interrupted ones. If a run fails,
LOG_DIR/sweep/RUN.json holds its last line and its log, and the other runs continue.
Exit code 0: all runs are done; 1: some are not; 2: wrong use.

Runs end with the sweep: each watches a pipe that the kernel closes when the sweep ends
(sweeping/tied.py). Jobs on Slurm belong to Slurm: Ctrl-C cancels them, but they outlive
a sweep that is killed. The next sweep finds them running.
"""

import shlex
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sweeping.board import Board
from sweeping.launch import check_jobs, prepare, run_here
from sweeping.plan import finished_records, is_finished, make_parser, plan
from sweeping.slurm import run_on_slurm

from core.errors import UsageError
from core.signals import Terminated
from run import flags


def main(argv=None, program=(str(ROOT / "main.py"),), itself=(sys.executable, __file__), cluster="slurm"):
    """Runs the command line.

    Args:
        argv: list of str. Arguments without the program's name. None uses the process's
            own.
        program: sequence of str. The Python program of a run, and its first arguments.
        itself: sequence of str. The command of this sweep, for Slurm's jobs.
        cluster: str. Submitit's name of the cluster of `--launcher slurm`.

    Returns:
        int. The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # core.signals.handled would end the process at a second Ctrl-C, without stopping runs and jobs.
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        args, extra = make_parser().parse_known_args(flags.without_doubled_flags(argv))
        runs = plan(args, extra)
        check_jobs(args)
        finished = finished_records(args.log_dir)
        todo = [run for run in runs if not is_finished(run.cfg, finished)]
        if args.dry_run:
            for run in todo:
                print(shlex.join(["python", "main.py", *run.argv]))
            print(f"{len(runs)} runs, {len(runs) - len(todo)} of them already finished", file=sys.stderr)
            return 0
        with Board(runs, todo) as board:
            ready = prepare(todo, args, program, board)
            if args.launcher == "slurm":
                run_on_slurm(ready, args, extra, itself, cluster, board)
            else:
                run_here(ready, args, program, board)
        return board.conclude(args.log_dir)
    except SystemExit as stop:
        return stop.code
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command continues the sweep.", file=sys.stderr)
        return 130
    except Terminated:
        return 143
    finally:
        signal.signal(signal.SIGTERM, before)


def terminate(signum, frame):
    """Raises Terminated, as a handler of signals."""
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
