"""Runs sweeps on a real Slurm cluster of one node, which it starts and stops.

    sudo apt-get install slurm-wlm munge
    sudo .venv/bin/python benchmarks/slurm.py

The cluster (munged, slurmctld, slurmd) has a configuration of its own in a temporary
folder, and namespaces of its own: its network is a loopback device, and the kernel ends
every process when the script ends, however it ends. On this cluster, sweeps of main.py
train the head of a MobileNetV2 on digits, and the script checks what users rely on:

1. A sweep of six runs is killed in the middle. The jobs continue; the next sweep finds
   them, and no run is started twice.
2. The sweep reports a job that its user cancels. Ctrl-C cancels the others, whose runs
   write a checkpoint.
3. Slurm ends a job at its time limit. The sweep reports that, and the next one resumes
   the run with --resume.
4. A partition that does not exist is refused in one line.

One line per check; exit code 1 if one fails. It takes about five minutes on two cores.
"""

import argparse
import contextlib
import json
import os
import shlex
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
PROGRAMS = ("munged", "slurmctld", "slurmd", "squeue", "unshare", "ip")
NAMESPACES = ("--net", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child")
CPUS = 2
WAIT_S = 300

# A node is whatever machine this is. Daemons and clients bind to the address of the host name,
# which is localhost in the script's own namespaces.
SLURM_CONF = """
ClusterName=adabet
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=30
AccountingStorageType=accounting_storage/none
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# main.py, each of whose training steps takes a second longer while the file `slow` exists.
PROGRAM = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from core import environment
import keras
from main import main

here = Path(__file__).parent
take_step = keras.callbacks.CallbackList.on_train_batch_end

def slow_step(self, *args, **kwargs):
    take_step(self, *args, **kwargs)
    if (here / "slow").exists():
        time.sleep(1)

keras.callbacks.CallbackList.on_train_batch_end = slow_step
if __name__ == "__main__":
    with open(here / "starts", "a") as starts:
        print(sys.argv[sys.argv.index("--seed") + 1] if "--seed" in sys.argv else "prepare", file=starts)
    sys.exit(main())
"""

SWEEP = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "scripts")!r})
import sweep
if __name__ == "__main__":
    program = [str(Path(__file__).parent / "program.py")]
    sys.exit(sweep.main(sys.argv[1:], program=program, itself=[sys.executable, __file__]))
"""

FLAGS = [
    "--models", "mobilenetv2", "--datasets", "digits", "--train_types", "traditional_tl_training", "--weights", "none",
    "--limit_train", "150", "--limit_test", "50", "--checkpoint_minutes", "0.05", "--launcher", "slurm",
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", help="folder of the runs, kept (default: a temporary folder)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if missing := requirements_missing():
        print(f"Error: {missing}", file=sys.stderr)
        return 2
    if not args.inside:
        in_own_namespaces()
    folder = Path(args.out or tempfile.mkdtemp(prefix="slurm_")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with cluster(folder / "cluster"):
            checks, bench = Checks(), Bench(folder)
            names = [name for _, name in socket.if_nameindex()]
            checks("the only network device is the loopback device", names == ["lo"], names)
            for scenario in (killed_sweep, interrupted_sweep, time_limit, refused_partition):
                print(f"--- {scenario.__doc__}", flush=True)
                scenario(bench, checks)
    finally:
        if not args.out:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{checks.passed} of {checks.passed + checks.failed} checks passed")
    return int(checks.failed > 0)


def requirements_missing() -> str:
    """Returns what the machine lacks to run this, or an empty string."""
    search = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if lacking:
        return f"{', '.join(lacking)} must be installed; run: apt-get install slurm-wlm munge util-linux iproute2"
    if os.geteuid() != 0:
        return "a cluster must be started by root. Received: another user; use sudo."
    if not succeeds("unshare", *NAMESPACES, "true"):
        return (
            "the system must permit new namespaces. Received: unshare fails; use a machine or a privileged container."
        )
    return ""


def in_own_namespaces() -> None:
    """Starts the script again in namespaces of its own. Does not return.

    The network namespace has nothing but a loopback device. The kernel kills all of the
    process namespace when its first process ends, which `unshare` takes with it.
    """
    inside = shlex.join([sys.executable, __file__, *sys.argv[1:], "--inside"])
    # Bash is the first process: it reaps the processes that others leave.
    # The resolver ignores a machine that has loopback addresses alone, hence a second one (of RFC 5737).
    script = f"hostname localhost && ip link set lo up && ip addr add 192.0.2.1/32 dev lo && {inside}; exit $?"
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    os.execvp("unshare", ["unshare", *NAMESPACES, "bash", "-c", script])


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Runs a cluster of one node, which the programs in this process's environment use."""
    for part in (folder, folder / "state", folder / "spool"):
        part.mkdir()
    conf, key = folder / "slurm.conf", folder / "munge.key"
    conf.write_text(SLURM_CONF.format(folder=folder, cpus=CPUS))
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    os.environ["SLURM_CONF"] = str(conf)
    munge_files = [f"--{name}-file={folder / f'munge.{name}'}" for name in ("key", "pid", "log", "seed")]
    munge_socket = f"--socket={folder}/munge.socket"
    munged = ["munged", "--foreground", "--force", munge_socket, *munge_files]  # force: only root reaches the socket
    with open(folder / "daemons.log", "w") as log, contextlib.ExitStack() as stack:
        for command, is_ready in (
            (munged, lambda: succeeds("munge", "-n", munge_socket)),
            (["slurmctld", "-D"], lambda: succeeds("scontrol", "ping")),
            (["slurmd", "-D"], lambda: output("sinfo", "--noheader", "--format=%T") == "idle"),
        ):
            daemon = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            stack.callback(stop, daemon)
            wait_for(f"{command[0]} to answer", lambda: is_ready() or daemon.poll() is not None)  # noqa: B023
            if daemon.poll() is not None:
                raise RuntimeError(f"{command[0]} has ended: {(folder / 'daemons.log').read_text()[-1000:]}")
        yield


def stop(process: subprocess.Popen) -> None:
    """Ends a process, by SIGKILL if SIGTERM does not."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def output(*command: str) -> str:
    """Returns what a command prints, without surrounding white space."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def succeeds(*command: str) -> bool:
    """Returns whether a command's exit code is 0."""
    return subprocess.run(command, capture_output=True).returncode == 0


def happens(condition: Callable[[], object], within_s: float) -> bool:
    """Waits for a condition, and returns whether it came true in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def wait_for(what: str, condition: Callable[[], object]) -> None:
    """Waits for a condition.

    Raises:
        TimeoutError: if it takes too long.
    """
    if not happens(condition, WAIT_S):
        raise TimeoutError(f"waited {WAIT_S} s for {what}")


class Checks:
    """Counts checks and prints a line for each."""

    def __init__(self):
        self.passed = self.failed = 0

    def __call__(self, text: str, passed: object, found: object = "") -> None:
        """Counts a check. `found` is shown if it fails."""
        self.passed += bool(passed)
        self.failed += not passed
        print(f"{'ok    ' if passed else 'FAILED'} {text}{'' if passed else f': {found}'}", flush=True)


class Bench:
    """The folder of the sweeps.

    Attributes:
        logs: pathlib.Path. Their log folder.
    """

    def __init__(self, folder: Path):
        self.folder, self.logs = folder, folder / "logs"
        (folder / "program.py").write_text(PROGRAM)
        (folder / "sweep_it.py").write_text(SWEEP)

    def start(self, *flags: str) -> subprocess.Popen:
        """Starts a sweep."""
        argv = [*FLAGS, "--log_dir", str(self.logs), "--data_dir", str(self.folder / "tfds"), *flags]
        command = [sys.executable, str(self.folder / "sweep_it.py"), *argv]
        listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore SIGINT
        with open(self.folder / "output", "w") as out:
            return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, preexec_fn=listen)

    def output(self) -> str:
        """Returns what the last sweep has printed."""
        return (self.folder / "output").read_text()

    def end(self, sweep: subprocess.Popen) -> str:
        """Waits for a sweep to end. Returns and prints its output."""
        sweep.wait(WAIT_S)
        text = self.output()
        print("".join(f"       | {line}\n" for line in text.replace(f"{self.folder}/", "").splitlines()), end="")
        return text

    def slow(self, is_slow: bool) -> None:
        """Makes the steps of all runs slow, or fast again."""
        if is_slow:
            (self.folder / "slow").touch()
        else:
            (self.folder / "slow").unlink()

    def starts(self) -> list[str]:
        """Returns the seeds of the runs that were started since the last call, sorted."""
        path = self.folder / "starts"
        seeds = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return sorted(seed for seed in seeds if seed != "prepare")

    def folders(self, num_epochs: int) -> list[Path]:
        """Returns the run folders of runs with a number of epochs."""
        records = [(path.parent, json.loads(path.read_text())) for path in sorted(self.logs.glob("*/config.json"))]
        return [folder for folder, record in records if record["num_epochs"] == num_epochs]

    def statuses(self, num_epochs: int) -> list[str | None]:
        """Returns the status of each of these runs, None for one without a summary."""
        files = [folder / "summary.json" for folder in self.folders(num_epochs)]
        return [json.loads(file.read_text())["status"] if file.exists() else None for file in files]

    def epochs(self, num_epochs: int) -> list[list[int]]:
        """Returns the epochs in metrics.csv of each of these runs."""
        files = [folder / "metrics.csv" for folder in self.folders(num_epochs)]
        texts = [file.read_text() if file.exists() else "" for file in files]
        return [[int(line.split(",")[0]) for line in text.splitlines()[1:]] for text in texts]

    def commands(self, num_epochs: int) -> list[str]:
        """Returns the last command line of each of these runs."""
        return [(self.logs / "sweep" / f"{folder.name}.log").read_text().splitlines()[0]
                for folder in self.folders(num_epochs)]  # fmt: skip


def jobs(*states: str) -> list[str]:
    """Returns the jobs that Slurm has in some states, or in all."""
    return output("squeue", "--noheader", "--array", f"--states={','.join(states) or 'all'}", "--format=%i").split()


def killed_sweep(bench: Bench, check: Checks) -> None:
    """A sweep of six runs is killed in the middle and started again"""
    flags = ("--seeds", "0,1,2,3,4,5", "--num_epochs", "2")
    bench.slow(True)
    sweep = bench.start(*flags)
    wait_for("a run to finish", lambda: "done" in bench.statuses(2))
    sweep.kill()
    bench.end(sweep)
    check("the jobs outlive the sweep", len(jobs("RUNNING", "PENDING", "COMPLETING")) >= 4, jobs())
    limits = set(output("squeue", "--noheader", "--format=%l").split())
    check("without timeout_min the partition sets the time limit", limits == {"UNLIMITED"}, limits)
    bench.slow(False)
    sweep = bench.start(*flags)
    text = bench.end(sweep)
    check("the next sweep finds them", "jobs of an earlier sweep that Slurm still lists" in text)
    submitted = output(
        "grep", "-c", "_slurm_rpc_submit_batch_job: JobId", str(bench.folder / "cluster" / "slurmctld.log")
    )
    check("it submits no others", submitted == "1", submitted)
    check("all six runs are done", sweep.returncode == 0 and bench.statuses(2) == ["done"] * 6, bench.statuses(2))
    starts = bench.starts()
    check("each was started once", starts == list("012345"), starts)


def interrupted_sweep(bench: Bench, check: Checks) -> None:
    """A waiting job of a sweep of three is cancelled by its user, then Ctrl-C cancels the others"""
    bench.slow(True)
    sweep = bench.start("--seeds", "0,1,2", "--num_epochs", "30")
    wait_for("two epochs of two runs", lambda: [len(epochs) >= 2 for epochs in bench.epochs(30)] == [True] * 2)
    (waiting,) = jobs("PENDING")
    output("scancel", waiting)
    reported = happens(lambda: "seed2" in bench.output(), 60)
    check("the sweep reports the cancelled job", reported)
    sweep.send_signal(signal.SIGINT)
    text = bench.end(sweep)
    check("the sweep ends with exit code 130", sweep.returncode == 130 and "Traceback" not in text, sweep.returncode)
    running = jobs("RUNNING", "PENDING", "COMPLETING")
    check("no job is left", running == [], running)
    check("both runs are interrupted", bench.statuses(30) == ["interrupted"] * 2, bench.statuses(30))
    check("both have a checkpoint", all(any(folder.glob("checkpoint/step_*")) for folder in bench.folders(30)))


def time_limit(bench: Bench, check: Checks) -> None:
    """A time limit of one minute ends the jobs of the same two runs; the next sweep resumes them"""
    flags = ("--seeds", "0,1", "--num_epochs", "30")
    sweep = bench.start(*flags, "--slurm_parameters", "timeout_min=1")
    text = bench.end(sweep)
    check("the sweep ends with exit code 1", sweep.returncode == 1, sweep.returncode)
    check("it reports the time limit of both", text.count("at its time limit") == 2)
    check("both had resumed", all("--resume" in command for command in bench.commands(30)), bench.commands(30))
    check("both are interrupted", bench.statuses(30) == ["interrupted"] * 2, bench.statuses(30))
    bench.slow(False)
    sweep = bench.start(*flags)
    bench.end(sweep)
    check("the next sweep finishes them", sweep.returncode == 0 and bench.statuses(30) == ["done"] * 2)
    check("with --resume", all("--resume" in command for command in bench.commands(30)), bench.commands(30))
    check("and every epoch once", bench.epochs(30) == [list(range(1, 31))] * 2, bench.epochs(30))


def refused_partition(bench: Bench, check: Checks) -> None:
    """A partition that does not exist"""
    sweep = bench.start("--seeds", "9", "--num_epochs", "2", "--slurm_parameters", "slurm_partition=nowhere")
    text = bench.end(sweep)
    last = text.splitlines()[-1]
    check("is refused in one line", sweep.returncode == 2 and last.startswith("Error: --launcher slurm"), last)
    check("that names what sbatch said", "partition" in last and "Traceback" not in text, last)


if __name__ == "__main__":
    sys.exit(main())
