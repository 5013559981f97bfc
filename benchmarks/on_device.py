"""Memory, time and file size of training by LiteRT alone, beside TensorFlow's.

    python benchmarks/on_device.py --weights mobilenetv2.h5
    python benchmarks/on_device.py --weights mobilenetv2.h5 --num_epochs 10     # accuracy per precision, too

For each scheme, main.py selects on digits and exports; then LiteRT's
interpreter and Keras each train the same weights in a process of their own, on one resident
batch. Memory is the growth of the process's peak resident size over its peak before the
first step, with the network loaded. With `--num_epochs`, scripts/litert_train.py trains the
first scheme's export on digits for each precision of the frozen weights.
"""

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

from core.units import MB
from memory.measure import peak_rss_bytes
from scripts.litert_train import Model

CASES = {
    "rho": ["--train_type", "act_norm_betti_train"],
    "full": ["--train_type", "full_training"],
    "head": ["--train_type", "traditional_tl_training"],
}
PRECISIONS = ("float32", "float16", "int8")
STEPS = 12  # the first two are left out of the median
RATE = 1e-3


def main(argv: list[str] | None = None) -> int:
    """Runs the cases, prints their table and returns 0. Exits at the first case that fails."""
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
        file_bytes = (run / "model.tflite").stat().st_size
        trained = sides["litert"].pop("num_trained_weights")
        records.append({"case": name, "num_trained_weights": trained, "file_bytes": file_bytes, **sides})
        cells = "".join(f"  {side['memory_bytes'] / MB:>9.1f}{1000 * side['step_s']:>9.1f}" for side in sides.values())
        print(f"{name:<8}{trained:>10}{file_bytes / MB:>9.1f}{cells}", flush=True)
    return records


def precisions(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Returns file size and digits accuracy after training by LiteRT, for each precision of the frozen weights."""
    print(f"{'frozen':<8}{'file MB':>9}{'accuracy %':>12}")
    records = []
    for precision in PRECISIONS:
        flags = [*CASES["rho"], "--rho", args.rho, "--litert_frozen", precision]
        model = export_run(args, folder, precision, flags) / "model.tflite"
        words = [str(model), "--json", "--num_epochs", str(args.num_epochs)]
        accuracy = json.loads(last_line("scripts/litert_train.py", *words))["accuracy"]
        records.append({"frozen": precision, "file_bytes": model.stat().st_size, "accuracy": accuracy})
        print(f"{precision:<8}{model.stat().st_size / MB:>9.1f}{accuracy:>12.2f}", flush=True)
    return records


def export_run(args: argparse.Namespace, folder: Path, name: str, flags: list[str]) -> Path:
    """Returns the run folder of a run of main.py that selects and exports."""
    fixed = {
        "model_name": args.model_name, "weights": args.weights, "input_size": args.input_size,
        "litert_batch": args.batch_size, "log_dir": folder, "run_name": name,
    }  # fmt: skip
    words = [word for flag, value in fixed.items() for word in (f"--{flag}", str(value))]
    last_line("main.py", *words, *flags, "--select_only", "--save_litert")
    return folder / name


def measured(args: argparse.Namespace, run: Path, side: str) -> dict:
    """Returns the record of one side, measured in a fresh process."""
    flags = ("model_name", "weights", "input_size", "batch_size", "threads")
    words = [f"--{flag}={getattr(args, flag)}" for flag in flags]
    return json.loads(last_line("benchmarks/on_device.py", *words, "--measure", side, "--folder", str(run)))


def last_line(script: str, *words: str) -> str:
    """Runs a Python script and returns the last line that it prints. Exits if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {' '.join(words)} failed: {done.stderr}")
    return done.stdout.splitlines()[-1]


def measure_litert(args: argparse.Namespace) -> dict:
    """Trains model.tflite of the run folder with LiteRT's interpreter; TensorFlow is not imported."""
    model = Model(args.folder / "model.tflite", args.threads)
    record = timed(args, model.num_classes, lambda images, labels: model.step(images, labels, RATE))
    return {**record, "num_trained_weights": sum(weight.size for weight in model.save().values())}


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
    freeze(network.model, json.loads((args.folder / "selection.json").read_text())["trained_weights"])
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
