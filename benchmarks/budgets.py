"""Trains under memory budgets, and compares the measured peak with the budget.

    python benchmarks/budgets.py                                # five budgets for each backbone
    python benchmarks/budgets.py --models resnet50 --budgets 3

The budgets are evenly spaced between the estimated peaks of training the head alone and
of training everything. Each run is a process of main.py on digits, with random weights
and seed 0; runs that exist in --log_dir are not repeated. Exits with 1 if a run failed
or measured more than 5 % over its budget.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.units import MB

MODELS = ("resnet50", "vgg16", "mobilenetv2", "vit")
TOLERANCE = 1.05


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases, prints their table, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--budgets", type=int, default=5, help="budgets per backbone (default: 5)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--log_dir", default="logs/budgets")
    parser.add_argument("more", nargs="*", help="further flags of main.py, after --")
    args = parser.parse_args(argv)
    print(
        f"{'model':<12} {'budget':>8} {'estimated':>9} {'measured':>8}  ratio  layers  next layer and its estimate",
        flush=True,
    )
    missed = 0
    for model in args.models:
        least, most = (estimate(args, model, scheme) for scheme in ("traditional_tl_training", "full_training"))
        for k in range(args.budgets):
            budget = round(1.01 * least / MB + (most - least) / MB * k / args.budgets, 1)
            summary = train(args, model, budget)
            if summary is None:
                missed += 1
                continue
            ratio = summary["peak_memory_bytes_measured"] / (budget * MB)
            missed += ratio > TOLERANCE
            following = summary["budget_next_layer"] or "none"
            if summary["budget_next_bytes_estimated"]:
                following += f" {summary['budget_next_bytes_estimated'] / MB:.1f}"
            print(
                f"{model:<12} {budget:>8.1f} {summary['peak_memory_bytes_estimated'] / MB:>9.1f} "
                f"{summary['peak_memory_bytes_measured'] / MB:>8.1f}  {ratio:.3f}  {summary['num_trained_layers']:>6}  "
                f"{following}",
                flush=True,
            )
    return int(missed > 0)


def estimate(args: argparse.Namespace, model: str, scheme: str) -> int:
    """Returns the estimated peak of a scheme's training step, in bytes."""
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "memory_utils.py"), "--model_name", model, "--train_type", scheme,
            "--num_classes", "10",
            "--batch_size", str(args.batch_size), "--input_size", str(args.input_size), "--weights", "none", "--json",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])["estimated_bytes"]


def train(args: argparse.Namespace, model: str, budget: float) -> dict | None:
    """Trains under a budget in megabytes and returns the summary, or prints why it failed and returns None."""
    name = f"{model}_{budget:g}mb"
    summary = Path(args.log_dir).resolve() / name / "summary.json"
    if not summary.exists():
        command = [
            sys.executable, str(ROOT / "main.py"), "--model_name", model, "--dataset_name", "digits",
            "--weights", "none", "--memory_budget_mb", f"{budget:g}", "--batch_size", str(args.batch_size),
            "--input_size", str(args.input_size),
            "--num_epochs", "1", "--limit_train", "48", "--limit_test", "8", "--log_dir", str(summary.parent.parent),
            "--run_name", name, *args.more,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", file=sys.stderr, flush=True)
            return None
    return json.loads(summary.read_text())


if __name__ == "__main__":
    sys.exit(main())
