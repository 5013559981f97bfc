"""Kills runs with SIGKILL at random moments, resumes them, and compares them with uninterrupted runs.

    python benchmarks/kills.py --kills 20 --seed 0

For each of a few schemes one run is not interrupted. Runs with the same flags are killed
in turn during the selection, the tracing of the first step, the training, and the
writing of a checkpoint. Each is resumed with `--resume` and must end with the same bytes
in selection.json, the same metrics apart from times, and the same weights. It prints one
line per kill, and exits with 1 if any run differs; the run folders are then kept.
"""

import argparse
import csv
import io
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parent.parent

COMMON = [
    "--weights",
    "none",
    "--input_size",
    "32",
    "--limit_train",
    "120",
    "--limit_test",
    "40",
    "--batch_size",
    "16",
    "--num_epochs",
    "3",
    "--num_betti_batches",
    "2",
    "--checkpoint_minutes",
    "0",
    "--save_model",
]
# One scheme that ranks once, one that selects again, one that prunes, and two slots per weight.
SETTINGS = {
    "act_norm_betti_train": ["--model_name", "mobilenetv2"],
    "elastic_training": ["--model_name", "vgg16", "--interval", "1", "--rho", "0.8"],
    "prunetrain": ["--model_name", "vgg16", "--interval", "2"],
    "full_training": ["--model_name", "mobilenetv2", "--optimizer", "adam"],
}
# Moments of a kill. The first two are between the appearance of two files of the run folder;
# the others follow the checkpoint of a random step.
PHASES = {
    "selection": ("config.json", "selection.json"),
    "tracing": ("selection.json", "metrics.csv"),
    "training": None,
    "saving": None,
}
# Endings of the measured entries of summary.json: times and memory.
MEASURED = ("_s", "_measured", "_memory_bytes", "_rss_bytes")
DEADLINE_S = 900


def main(argv=None):
    """Runs the comparison and returns the exit code: 1 if a resumed run differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: %(default)s)")
    parser.add_argument("--data_dir", help="TFDS folder")
    parser.add_argument("--out", help="folder of the runs (default: a temporary one)")
    args = parser.parse_args(argv)
    out = Path(args.out or tempfile.mkdtemp(prefix="kills_"))
    common = [*COMMON, *(["--data_dir", args.data_dir] if args.data_dir else [])]
    settings = {name: ["--train_type", name, *common, *own] for name, own in SETTINGS.items()}
    differing = kill_and_compare(settings, args.kills, args.seed, out)
    print(f"{args.kills - differing} of {args.kills} killed runs ended like the uninterrupted one")
    if not differing and not args.out:
        shutil.rmtree(out)
    return int(differing > 0)


def kill_and_compare(settings, kills, seed, out, program=(str(ROOT / "main.py"),), phases=tuple(PHASES)):
    """Kills runs, resumes them, and prints a line for each.

    Args:
        settings: dict from a name to its flags, used in turn.
        kills: int. The number of runs to kill.
        seed: int. Seed of the random moments.
        out: pathlib.Path. The runs' log folder.
        program: sequence of str. The Python program of a run, and its first arguments.
        phases: sequence of str, of PHASES, used in turn.

    Returns:
        int. The number of runs that differ.
    """
    rng, differing = random.Random(seed), 0
    alone = {}
    for number, (phase, name) in enumerate(
        itertools.islice(itertools.cycle(itertools.product(phases, settings)), kills)
    ):
        command = [sys.executable, *program, *settings[name], "--log_dir", str(out), "--run_name"]
        if name not in alone:
            alone[name] = uninterrupted([*command, f"{name}_alone"], out / f"{name}_alone")
        folder = out / f"{name}_{number}"
        moment = killed([*command, folder.name], folder, phase, alone[name], rng)
        found = subprocess.run([sys.executable, *program, "--resume", str(folder)], capture_output=True, text=True)
        if found.returncode:
            differences = [f"exit code {found.returncode}: {found.stderr.strip().splitlines()[-1]}"]
        else:
            differences = compare(out / f"{name}_alone", folder)
        differing += bool(differences)
        resumed = next((line for line in found.stderr.splitlines() if line.startswith("Resuming")), "restarted")
        print(f"{number + 1:3d} {name}, {phase}, {moment}: {resumed}; {'; '.join(differences) or 'equal'}", flush=True)
    return differing


def uninterrupted(command, folder):
    """Runs to the end and returns {phase: its seconds, or the number of training steps}."""
    process, seen = start(command), {}
    files = {name for pair in PHASES.values() if pair for name in pair}
    while process.poll() is None:
        seen |= {name: time.monotonic() for name in files - set(seen) if (folder / name).exists()}
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {process.stderr.read().strip()}")
    seen |= {name: time.monotonic() for name in files - set(seen)}
    config = json.loads((folder / "config.json").read_text())
    steps = config["num_epochs"] * (config["split_sizes"]["train"] // config["batch_size"])
    return {phase: seen[pair[1]] - seen[pair[0]] if pair else steps for phase, pair in PHASES.items()}


def killed(command, folder, phase, lasts, rng):
    """Runs, and kills the run at a random moment of a phase.

    Args:
        command: list of str.
        folder: pathlib.Path. The run folder.
        phase: str, of PHASES. `saving` waits after its moment until a checkpoint is being written.
        lasts: dict, from `uninterrupted`.
        rng: random.Random.

    Returns:
        str. The moment, for the printed line.
    """
    process = start(command)
    if PHASES[phase]:
        moment = rng.random() * lasts[phase]
        until(lambda: (folder / PHASES[phase][0]).exists() or process.poll() is not None)
        time.sleep(moment)
        place = f"after {moment:.2f} s"
    else:
        moment = rng.randrange(lasts[phase])
        until(lambda: last_step(folder) >= moment or process.poll() is not None)
        if phase == "saving":
            until(lambda: any(folder.glob("checkpoint/.partial-*")) or process.poll() is not None, every_s=0.0002)
        place = f"after step {last_step(folder)}"
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = any(folder.glob("checkpoint/.partial-*"))
    return place + (", after its end" if process.returncode == 0 else ", while saving" if half else "")


def last_step(folder):
    """Returns the step of the newest checkpoint, or -1."""
    return max((int(path.stem.removeprefix("step_")) for path in folder.glob("checkpoint/step_*.zip")), default=-1)


def start(command):
    """Starts a process whose stderr is captured."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def until(condition, every_s=0.005):
    """Waits for a condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited for {DEADLINE_S} s")
        time.sleep(every_s)


def compare(one, other):
    """Returns the names of what differs between two finished run folders, apart from times and measured memory."""
    differing = [name for name in ("selection.json", "timings.json") if _bytes(one / name) != _bytes(other / name)]
    differing += [
        name for name, read in (("metrics.csv", metrics), ("summary.json", summary)) if read(one) != read(other)
    ]
    ours, theirs = weights(one / "model.keras"), weights(other / "model.keras")
    differing += [name for name in {**ours, **theirs} if not np.array_equal(ours.get(name), theirs.get(name))]
    left_over = {path.name for path in other.iterdir()} - {path.name for path in one.iterdir()}
    return differing + sorted(left_over)


def _bytes(path):
    return path.read_bytes() if path.exists() else None


def metrics(folder):
    """Returns metrics.csv as a list of dict, without the seconds."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def summary(folder):
    """Returns summary.json without its measured entries."""
    record = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in record.items() if not key.endswith(MEASURED)}


def weights(path):
    """Returns {name: array} of a .keras file."""
    found = {}
    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


if __name__ == "__main__":
    sys.exit(main())
