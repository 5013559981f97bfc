"""Compares the speed of main.py's training loop with the least that a step can take, and with plain Keras.

    python benchmarks/training.py --model_name mobilenetv2 --input_size 96
    python benchmarks/training.py --json

For each scheme the same network, with the same trained weights, optimizer, clipping
and batch size, trains on digits in processes of their own:

* `ours`: main.py. Its time per step is an epoch's seconds in metrics.csv over its steps.
* `bare`: a loop of `train_on_batch` on one batch that stays in memory.
* `fit`: `Model.fit` on arrays in memory, what a user would write instead.
* `fit_default`: the same with TensorFlow's own settings of oneDNN and allocator.
* `ours_augmented`: main.py with its augmentation.
* `ours_cached`: main.py on cached features, where the selection leaves a part to cache.

Batch normalization uses stored statistics, as with pretrained weights. The learning rate is so low
that random weights stay finite. The first epoch is left out. Each round runs every side, so a change in the machine's
speed affects all of them. The ratios are of medians over the rounds.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.units import MB

SCHEMES = ("full_training", "act_norm_betti_train", "traditional_tl_training")
OURS = {
    "ours": {"augment": False, "cache_features": "off"},
    "ours_augmented": {"augment": True, "cache_features": "off"},
    "ours_cached": {"augment": False, "cache_features": "memory"},
}  # fmt: skip
SIDES = ("ours", "bare", "fit", "fit_default", "ours_augmented", "ours_cached")
TENSORFLOW_SETTINGS = ("TF_ENABLE_ONEDNN_OPTS", "TF_CPU_ALLOCATOR_USE_BFC")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", action="append", help="repeatable (default: the four backbones)")
    parser.add_argument("--weights", default="none", help="as main.py takes them (default: %(default)s)")
    parser.add_argument("--input_size", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=8, help="steps per epoch (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="the first is left out (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--train_type", action="append", help="repeatable (default: full, AdaBet, head)")
    parser.add_argument("--side", action="append", choices=SIDES, help="repeatable (default: all)")
    parser.add_argument("--data_dir")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(step_times(args.child, json.loads(sys.stdin.read()))))
        return 0

    from models import BACKBONES

    rows, full_ms = [], {}
    for model_name in args.model_name or BACKBONES:
        for train_type in args.train_type or SCHEMES:
            rows.append(compared(model_name, train_type, args.side or SIDES, args))
            if train_type == "full_training":
                full_ms[model_name] = rows[-1]["step_ms"].get("ours")
            rows[-1]["over_full_training"] = over_full_training(rows[-1], full_ms.get(model_name))
            if not args.json:
                print(line(rows[-1]), flush=True)
    if args.json:
        print(json.dumps(rows))
    return 0


def compared(model_name: str, train_type: str, sides, args) -> dict:
    """Returns the median milliseconds per step of every side, ratios to our loop's, and peaks of memory."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    summaries = {}
    with tempfile.TemporaryDirectory() as folder:
        # A tenth of the images is held out for validation.
        num_images = -(-args.steps * args.batch_size * 10 // 9) + 1
        flags = {
            "model_name": model_name, "train_type": train_type, "weights": args.weights, "input_size": args.input_size,
            "batch_size": args.batch_size, "limit_train": num_images, "limit_test": args.batch_size,
            "num_epochs": args.epochs, "log_dir": folder, "data_dir": args.data_dir, "bn_stats": "stored",
            "learning_rate": 1e-6,
        }  # fmt: skip
        if train_type == "act_norm_betti_train":
            flags["rho"] = args.rho
        for number in range(args.rounds):
            for side in sides:
                task = {"flags": flags, "run_name": f"{side}{number}", "reference": str(Path(folder, "ours0"))}
                command = [sys.executable, __file__, "--child", side]
                done = subprocess.run(
                    command, input=json.dumps(task), capture_output=True, text=True, env=environment()
                )
                if done.returncode:
                    raise SystemExit(f"{model_name}, {train_type}, {side} failed:\n{done.stderr[-2000:]}")
                times[side] += json.loads(done.stdout.splitlines()[-1])
                if side in OURS:
                    summaries[side] = json.loads(Path(folder, task["run_name"], "summary.json").read_text())
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    return {
        "model_name": model_name,
        "train_type": train_type,
        "input_size": args.input_size,
        "batch_size": args.batch_size,
        "step_ms": {side: 1000 * seconds for side, seconds in medians.items()},
        "images_per_s": {side: args.batch_size / seconds for side, seconds in medians.items()},
        "ours_over": {side: medians["ours"] / seconds for side, seconds in medians.items() if side != "ours"},
        "peak_mb": {side: summary["peak_memory_bytes_measured"] / MB for side, summary in summaries.items()},
        "cached": cached_figures(summaries.get("ours_cached"), medians),
    }


def cached_figures(summary: dict | None, medians: dict[str, float]) -> dict | None:
    """Returns the share of a step's operations behind the cut and the ratio of times, or None without a cache."""
    if summary is None or summary["cache_features"] == "off":
        return None
    shares = {name: summary[name] for name in ("cache_cut", "cache_step_share", "cache_full_step_share")}
    return {**shares, "over_uncached": medians["ours_cached"] / medians["ours"]}


def over_full_training(row: dict, full_ms: float | None) -> dict | None:
    """Returns our times per step over that of full_training, or None if that was not run."""
    return full_ms and {side: row["step_ms"][side] / full_ms for side in OURS if side in row["step_ms"]}


def environment() -> dict[str, str]:
    """Returns the environment of a child process, without settings of TensorFlow's from outside."""
    return {name: value for name, value in os.environ.items() if name not in TENSORFLOW_SETTINGS}


def step_times(side: str, task: dict) -> list[float]:
    """Returns seconds per step: one per epoch after the first, or for the bare loop one per step."""
    import core.environment

    if side == "fit_default":
        for name in TENSORFLOW_SETTINGS:
            os.environ.pop(name, None)
    core.environment.load_tensorflow()
    if side in OURS:
        return our_times(task, OURS[side])
    times_of = bare_times if side == "bare" else fit_times
    return times_of(*frozen_model(task))


def our_times(task: dict, choices: dict) -> list[float]:
    flags = {**task["flags"], "run_name": task["run_name"], **choices}
    argv = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, str(ROOT / "main.py"), *argv], check=True, stdout=subprocess.DEVNULL)
    folder = Path(flags["log_dir"], flags["run_name"])
    config = json.loads((folder / "config.json").read_text())
    steps = config["split_sizes"]["train"] // config["batch_size"]
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row["seconds"]) / steps for row in csv.DictReader(file)][1:]


def frozen_model(task: dict):
    """Returns the network of the reference run, compiled, with its trained weights; images and labels of an epoch."""
    import dataclasses

    import numpy as np

    import data
    import models
    from core import environment
    from core.config import Config
    from models.compiling import compile_model, make_optimizer
    from models.freezing import freeze

    reference = Path(task["reference"])
    record = json.loads((reference / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(Config)}
    cfg = Config(**{name: value for name, value in record.items() if name in names and value is not None})
    batches = data.load(cfg)
    environment.seed_everything(cfg.seed)
    network = models.build(cfg, batches.num_classes)
    freeze(network.model, json.loads((reference / "selection.json").read_text())["trained_weights"])
    compile_model(network.model, make_optimizer(cfg, cfg.num_epochs * batches.steps_per_epoch))
    parts = list(batches.train_batches(0, 1))
    images, labels = (np.concatenate([part[i].numpy() for part in parts]) for i in (0, 1))
    return network.model, images, labels, batches.batch_size, cfg.num_epochs


def bare_times(model, images, labels, batch_size: int, num_epochs: int) -> list[float]:
    import tensorflow as tf

    steps = len(images) // batch_size
    batch = tf.constant(images[:batch_size]), tf.constant(labels[:batch_size])
    times = []
    for _ in range(num_epochs * steps):
        start = time.perf_counter()
        model.train_on_batch(*batch)
        times.append(time.perf_counter() - start)
    return times[steps:]


def fit_times(model, images, labels, batch_size: int, num_epochs: int) -> list[float]:
    import keras

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.start = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            times.append((time.perf_counter() - self.start) / self.params["steps"])

    times: list[float] = []
    model.fit(images, labels, batch_size=batch_size, epochs=num_epochs, verbose=0, callbacks=[Clock()])
    return times[1:]


def line(row: dict) -> str:
    """Returns a row as text."""
    times = ", ".join(f"{side} {milliseconds:.0f}" for side, milliseconds in row["step_ms"].items())
    ratios = ", ".join(f"{side} {ratio:.2f}" for side, ratio in row["ours_over"].items())
    peaks = ", ".join(f"{side} {megabytes:.0f}" for side, megabytes in row["peak_mb"].items())
    text = (
        f"{row['model_name']:<12} {row['train_type']:<24} ms per step: {times}; ours over: {ratios}; peak MB: {peaks}"
    )
    if row["over_full_training"]:
        text += "; over full training: " + ", ".join(f"{s} {r:.2f}" for s, r in row["over_full_training"].items())
    if row["cached"]:
        text += (
            "; cached: {over_uncached:.2f} of uncached with {cache_step_share:.2f} of its operations, "
            "{cache_full_step_share:.2f} of full training's".format(**row["cached"])
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
