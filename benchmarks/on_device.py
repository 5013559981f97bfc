"""Memory, time and file size of training by LiteRT alone, beside TensorFlow's.

    python benchmarks/on_device.py --weights mobilenetv2.h5
    python benchmarks/on_device.py --weights mobilenetv2.h5 --num_epochs 10     # accuracy per precision, too

For each scheme, main.py selects and exports after a short run on digits; then LiteRT's
interpreter and Keras each train the same weights in a process of their own, on one resident
batch. Memory is the growth of the process's peak resident size over its peak before the
first step, with the network loaded. With `--num_epochs`, scripts/litert_train.py trains the
first scheme's export on digits for each precision of the frozen weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.litert_train import Model, peak_rss_bytes

CASES = {
    "rho": ["--train_type", "act_norm_betti_train"],
    "full": ["--train_type", "full_training"],
    "head": ["--train_type", "traditional_tl_training"],
}
PRECISIONS = ("float32", "float16", "int8")
STEPS = 12  # the first two are left out of the median
RATE = 1e-3
MB = 10**6


def main(argv: list[str] | None = None) -> int:
    """Runs the cases and prints their table. Returns 0; a case that fails raises CalledProcessError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="mobilenetv2")
    parser.add_argument("--weights", required=True, help="a pretrained weights file, or imagenet")
    parser.add_argument("--input_size", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rho", default="0.1")
    parser.add_argument(
        "--num_epochs", type=int, default=0, help="epochs for the accuracy per precision; 0 leaves it out"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="also print all of it as one line, last")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args)))
        return 0
    with tempfile.TemporaryDirectory(prefix="adabet-on-device-") as folder:
        found = {"cases": table(args, Path(folder))}
        if args.num_epochs:
            found["precisions"] = precisions(args, Path(folder))
    if args.json:
        print(json.dumps(found))
    return 0


def table(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Returns a record for each case, and prints it."""
    print(f"{'trained':<8}{'weights':>10}{'file MB':>9}  {'LiteRT MB':>9}{'step ms':>9}  {'Keras MB':>9}{'step ms':>9}")
    records = []
    for name, flags in CASES.items():
        run = export_run(args, folder, name, [*flags, *(["--rho", args.rho] if name == "rho" else [])])
        sides = {side: measured(args, run, side) for side in MEASURES}
        summary = json.loads((run / "summary.json").read_text())
        file_bytes = (run / "model.tflite").stat().st_size
        records.append(
            {"case": name, "num_trained_weights": summary["num_trained_weights"], "file_bytes": file_bytes, **sides}
        )
        cells = "".join(f"  {side['memory_bytes'] / MB:>9.1f}{1000 * side['step_s']:>9.1f}" for side in sides.values())
        print(f"{name:<8}{summary['num_trained_weights']:>10}{file_bytes / MB:>9.1f}{cells}", flush=True)
    return records


def precisions(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Returns file size and digits accuracy after training by LiteRT, for each precision of the frozen weights."""
    print(f"{'frozen':<8}{'file MB':>9}{'accuracy %':>12}")
    records = []
    for precision in PRECISIONS:
        flags = [*CASES["rho"], "--rho", args.rho, "--litert_frozen", precision]
        model = export_run(args, folder, precision, flags) / "model.tflite"
        command = [
            str(ROOT / "scripts" / "litert_train.py"),
            str(model),
            "--json",
            "--num_epochs",
            str(args.num_epochs),
        ]
        accuracy = last_line(command)["accuracy"]
        records.append({"frozen": precision, "file_bytes": model.stat().st_size, "accuracy": accuracy})
        print(f"{precision:<8}{model.stat().st_size / MB:>9.1f}{accuracy:>12.2f}", flush=True)
    return records


def export_run(args: argparse.Namespace, folder: Path, name: str, flags: list[str]) -> Path:
    """Returns the run folder of a short run of main.py that exports."""
    fixed = {
        "model_name": args.model_name, "weights": args.weights, "input_size": args.input_size,
        "batch_size": 32, "litert_batch": args.batch_size, "num_epochs": 1, "limit_train": 160, "limit_test": 40,
        "learning_rate": RATE, "dropout": 0, "augment": False, "log_dir": folder, "run_name": name,
    }  # fmt: skip
    words = [word for flag, value in fixed.items() for word in (f"--{flag}", str(value))]
    subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *words, *flags, "--save_litert"], check=True, capture_output=True
    )
    return folder / name


def measured(args: argparse.Namespace, run: Path, side: str) -> dict:
    """Returns the record of one side, measured in a fresh process."""
    words = ["--measure", side, "--folder", str(run)]
    words += [
        f"--{flag}={getattr(args, flag)}" for flag in ("model_name", "weights", "input_size", "batch_size", "threads")
    ]
    return last_line([str(Path(__file__).resolve()), *words])


def last_line(command: list[str]) -> dict:
    """Returns the JSON in the last line that a Python script prints."""
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_litert(args: argparse.Namespace) -> dict:
    """Trains model.tflite of the run folder with LiteRT's interpreter; TensorFlow is not imported."""
    model = Model(args.folder / "model.tflite", args.threads)
    return timed(args, model.num_classes, lambda images, labels: model.step(images, labels, RATE))


def measure_keras(args: argparse.Namespace) -> dict:
    """Trains the weights that the run selected with Keras, compiled as main.py compiles."""
    from core import environment

    environment.load_tensorflow()
    import models
    from core.config import Config
    from models.compiling import compile_model, make_optimizer
    from models.freezing import freeze

    cfg = Config(
        model_name=args.model_name, weights=args.weights, input_size=args.input_size, learning_rate=RATE, dropout=0
    )
    network = models.build(cfg, 10)
    freeze(network, json.loads((args.folder / "selection.json").read_text())["trained_weights"])
    compile_model(network.model, make_optimizer(cfg, STEPS))
    return timed(args, 10, network.model.train_on_batch)


def timed(args: argparse.Namespace, num_classes: int, step) -> dict:
    """Returns the median seconds of a step and the growth of the peak resident size, in bytes."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (args.batch_size, args.input_size, args.input_size, 3)).astype(np.float32)
    labels = rng.integers(0, num_classes, args.batch_size).astype(np.int32)
    before, seconds = peak_rss_bytes(), []
    for _ in range(STEPS):
        start = time.perf_counter()
        step(images, labels)
        seconds.append(time.perf_counter() - start)
    return {"step_s": statistics.median(seconds[2:]), "memory_bytes": peak_rss_bytes() - before, "idle_bytes": before}


MEASURES = {"litert": measure_litert, "keras": measure_keras}

if __name__ == "__main__":
    sys.exit(main())
