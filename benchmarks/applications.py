"""Runs networks of keras.applications through main.py, and prints what each costs.

    python benchmarks/applications.py                                    # one network of each family
    python benchmarks/applications.py --model_name densenet121 --json

Each network has its minimum input size, random weights and digits. It is ranked once with
`--select_only` and trained for one epoch. If either fails, the network's row says FAILED
and the exit code is 1. `selection/forward` is the time of a selection over that of plain
forward passes (benchmarks/selection.py); peaks are those of a training step, measured and
estimated, in MB of 10^6 bytes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.units import MB
from models import MODELS

# The smallest of each family.
FAMILIES = (
    "mobilenet", "mobilenetv2", "mobilenetv3small", "efficientnetb0", "efficientnetv2b0", "nasnetmobile", "densenet121",
    "resnet50", "resnet50v2", "convnexttiny", "xception", "inceptionv3", "inceptionresnetv2", "vgg16", "vgg19",
)  # fmt: skip


def main(argv=None) -> int:
    """Runs the networks, prints their table, and returns 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", action="append", choices=MODELS, help="repeatable (default: one per family)")
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--data_dir", help="TFDS folder")
    parser.add_argument("--json", action="store_true", help="also print one line of JSON, last")
    args = parser.parse_args(argv)

    print(
        f"{'model':<18} {'px':>3} {'layers':>6} {'budget':>6} {'selection/forward':>17} {'measured':>9} "
        f"{'estimated':>9} {'error':>6}",
        flush=True,
    )
    rows = []
    for model_name in args.model_name or FAMILIES:
        row = measured(model_name, args)
        rows.append(row)
        print(line(row), flush=True)
    errors = [abs(row["error"]) for row in rows if row.get("error") is not None]
    if errors:
        print(f"{len(errors)} estimates: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    if args.json:
        print(json.dumps(rows))
    return 1 if any("failure" in row for row in rows) else 0


def measured(model_name: str, args) -> dict:
    """Returns the figures of one network, or what failed."""
    size = MODELS[model_name].min_size
    network = ["--model_name", model_name, "--input_size", str(size), "--batch_size", str(args.batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        run = [
            *network, "--weights", "none", "--rho", str(args.rho), "--num_epochs", "1", "--limit_train", "160",
            "--limit_test", "40", "--log_dir", folder,
        ]  # fmt: skip
        run += ["--data_dir", args.data_dir] if args.data_dir else []
        commands = [
            ["main.py", *run, "--run_name", "ranked", "--select_only"],
            ["main.py", *run, "--run_name", "trained"],
            ["benchmarks/selection.py", *network, "--no-collect", "--json"],
        ]
        for command in commands:
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                return {"model_name": model_name, "input_size": size, "failure": done.stderr.strip().split("\n")[-1]}
        selection = json.loads(Path(folder, "trained", "selection.json").read_text())
        summary = json.loads(Path(folder, "trained", "summary.json").read_text())
    peak, estimate = summary["peak_memory_bytes_measured"], summary["peak_memory_bytes_estimated"]
    return {
        "model_name": model_name,
        "input_size": size,
        "num_layers": selection["num_layers"],
        "budget": selection["budget"],
        "selection_over_forward": json.loads(done.stdout.splitlines()[-1])["ratio_to_forward"],
        "measured_bytes": peak,
        "estimated_bytes": estimate,
        "error": estimate / peak - 1 if peak and estimate else None,
    }


def line(row: dict) -> str:
    """Returns a row of the table."""
    start = f"{row['model_name']:<18} {row['input_size']:>3}"
    if "failure" in row:
        return f"{start} FAILED: {row['failure']}"
    peaks = [f"{size / MB:>9.1f}" if size else f"{'-':>9}" for size in (row["measured_bytes"], row["estimated_bytes"])]
    error = "-" if row["error"] is None else f"{row['error']:+.1%}"
    return (
        f"{start} {row['num_layers']:>6} {row['budget']:>6} {row['selection_over_forward']:>17.2f} {' '.join(peaks)} "
        f"{error:>6}"
    )


if __name__ == "__main__":
    sys.exit(main())
