"""Sweeps on a real Slurm cluster, where its packages are installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import slurm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MISSING = [name for name in slurm.PROGRAMS if shutil.which(name) is None]


@pytest.mark.slurm
@pytest.mark.skipif(bool(MISSING), reason=f"needs slurm-wlm and munge: no {', '.join(MISSING)}")
def test_sweeps_survive_kills_and_limits_on_slurm():
    done = subprocess.run([sys.executable, "-m", "benchmarks.slurm"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 3
