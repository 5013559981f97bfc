"""Runs sweeps on a real Slurm cluster of one node, which this script starts and stops.

    sudo apt-get install slurm-wlm munge     # Debian
    python benchmarks/slurm.py               # as root, about five minutes

It starts munged, slurmctld and slurmd with a configuration of their own in a temporary
folder, listening on this machine, and checks that

1. a sweep of six runs with `--launcher slurm`, killed in the middle and started again,
   finds the running jobs, runs nothing twice, and finishes;
2. Ctrl-C cancels the jobs;
3. a job that reaches its time limit is reported as such, and the next sweep resumes it.

The runs are main.py itself with a tiny network (tests/tiny_main.py) on digits. Exits with
0 if all checks pass.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "squeue", "scontrol", "sbatch")
WAIT_S = 240

# A sweep whose runs are tests/tiny_main.py.
SWEEP = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import sweep
if __name__ == "__main__":
    program = [{str(ROOT / "tests" / "tiny_main.py")!r}]
    sys.exit(sweep.main(sys.argv[1:], program=program, itself=[sys.executable, __file__]))
"""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        print(f"Slurm is needed. Received: no {', '.join(missing)}; install slurm-wlm and munge.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="slurm_") as folder, cluster(Path(folder)):
        bench = Bench(Path(folder))
        for check in (killed_and_started_again, interrupted, time_limit):
            print(f"{check.__name__}: {check(bench)}", flush=True)
    return 0


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Starts a cluster of one node in a folder, and stops it."""
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir()
        (folder / name).chmod(0o755)
    folder.chmod(0o755)
    key, sock = folder / "munge" / "key", folder / "munge" / "socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    config.write_text(configuration(folder, sock, *free_ports(2)))
    os.environ["SLURM_CONF"] = str(config)
    files = {name: folder / "munge" / name for name in ("log", "pid", "seed")}
    munged = [
        "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={sock}", f"--log-file={files['log']}",
        f"--pid-file={files['pid']}", f"--seed-file={files['seed']}",
    ]  # fmt: skip
    processes: list[subprocess.Popen] = []

    def start(command):
        name = command[0]
        with open(folder / f"{name}.out", "w") as out:
            processes.append(subprocess.Popen(command, stdout=out, stderr=out))

    try:
        start(munged)
        until(sock.exists, "munged did not start")
        start(["slurmctld", "-D"])
        start(["slurmd", "-D", "-N", "node"])
        until(lambda: "idle" in output("sinfo", "--noheader", "--format=%T"), "the node did not become idle")
        yield
    finally:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", "--me"], timeout=10, capture_output=True)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()


def configuration(folder: Path, sock: Path, controller_port: int, node_port: int) -> str:
    user, host = getpass.getuser(), socket.gethostname()
    return f"""
ClusterName=bench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={sock}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=20
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=node Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Bench:
    """A folder with sweeps and their logs."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "sweep_it.py").write_text(SWEEP)

    def start(self, name: str, *more: str) -> subprocess.Popen:
        """Starts a sweep whose logs go to the folder `name`."""
        command = [
            sys.executable, str(self.folder / "sweep_it.py"), "--models", "resnet50", "--datasets", "digits",
            "--train_types", "last_layers", "--weights", "none", "--log_dir", str(self.folder / name),
            "--launcher", "slurm", "--data_dir", str(self.folder / "tfds"), "--limit_test", "40", *more,
        ]  # fmt: skip
        listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(self.folder / f"{name}.out", "a") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=listen)

    def lines(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def started(self, name: str) -> list[Path]:
        """Returns the run folders that have a first epoch."""
        return sorted(path.parent for path in (self.folder / name).glob("*/metrics.csv"))

    def summaries(self, name: str) -> list[dict]:
        return [json.loads(path.read_text()) for path in (self.folder / name).glob("*/summary.json")]


def killed_and_started_again(bench: Bench) -> str:
    flags = ["--seeds", "0,1,2,3,4,5", "--num_epochs", "4", "--limit_train", "640", "--batch_size", "16"]
    first = bench.start("six", *flags)
    until(lambda: len(bench.started("six")) >= 1, f"no run started:\n{bench.lines('six')}")
    first.kill()
    first.wait()
    before = set(output("squeue", "--noheader", "--array", "--format=%i").split())
    assert before, "the jobs must outlive the sweep"
    second = bench.start("six", *flags)
    assert second.wait(WAIT_S) == 0, bench.lines("six")
    found = re.search(r"(\d+) runs are jobs of an earlier sweep", bench.lines("six"))
    assert found, bench.lines("six")
    assert [summary["status"] for summary in bench.summaries("six")] == ["done"] * 6
    logs = [path.read_text() for path in (bench.folder / "six").glob("*/log.txt")]
    assert all(log.count("Run folder:") == 1 for log in logs), "a run ran twice"
    return f"{found[1]} of 6 jobs found after the kill; 6 done, none twice"


def interrupted(bench: Bench) -> str:
    sweep = bench.start("long", "--seeds", "0,1,2,3", "--num_epochs", "2000", "--limit_train", "640")
    until(lambda: len(bench.started("long")) >= 1, f"no run started:\n{bench.lines('long')}")
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(WAIT_S) == 130, bench.lines("long")
    until(lambda: not output("squeue", "--noheader").strip(), "Ctrl-C must cancel the jobs")
    return "exit code 130, no job left"


def time_limit(bench: Bench) -> str:
    flags = ["--seeds", "0", "--limit_train", "1400", "--batch_size", "4", "--num_epochs", "60"]
    # Slurm warns the job 90 seconds before its limit.
    first = bench.start("limit", *flags, "--slurm_parameters", "timeout_min=2")
    assert first.wait(WAIT_S) == 1, bench.lines("limit")
    assert "time limit ended the job" in bench.lines("limit"), bench.lines("limit")
    (summary,) = bench.summaries("limit")
    assert summary["status"] == "interrupted", summary
    second = bench.start("limit", *flags, "--slurm_parameters", "timeout_min=60")
    assert second.wait(2 * WAIT_S) == 0, bench.lines("limit")
    (log,) = [path.read_text() for path in (bench.folder / "limit").glob("*/log.txt")]
    assert "Resuming after epoch" in log
    return f"interrupted after {summary['epochs']} of 60 epochs, resumed, done"


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def until(condition: Callable[[], object], message: str) -> None:
    """Waits for a condition, and fails with `message` after `WAIT_S` seconds."""
    end = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(message)
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
