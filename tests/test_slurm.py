"""Sweeps on a real Slurm cluster, where its packages are installed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import slurm

ROOT = Path(__file__).parent.parent
MISSING = slurm.requirements_missing()
pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


def start(folder):
    command = [sys.executable, "-m", "benchmarks.slurm", "--out", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes_of(folder):
    """Returns the processes whose environment names the cluster in a folder: its daemons, sweeps and runs."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if os.fsencode(f"{folder}/cluster") in environment.read_bytes():
                found.append(environment.parent.name)
        except OSError:  # has just ended
            continue
    return found


def test_sweeps_survive_kills_and_limits_on_slurm(tmp_path):
    script = start(tmp_path)
    out, _ = script.communicate()
    assert script.returncode == 0, out
    assert "FAILED" not in out and "checks passed" in out
    assert processes_of(tmp_path) == []


def test_killed_script_leaves_no_process(tmp_path):
    script = start(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cluster" / "slurmd.log").exists():
        assert time.monotonic() < deadline and script.poll() is None, script.stdout.read()
        time.sleep(0.1)
    assert processes_of(tmp_path)
    script.kill()
    script.communicate()
    time.sleep(1)
    assert processes_of(tmp_path) == []
