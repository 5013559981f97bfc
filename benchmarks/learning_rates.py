"""Finds each scheme's default learning rate: a small search on validation data.

    python benchmarks/learning_rates.py --weights mobilenetv2.h5

fine-tunes a pretrained MobileNetV2 on digits at 96 pixels, once per scheme and rate, and
prints the best validation accuracy of each and the best rate. The test split plays no
role. Every training is a process of main.py; runs that exist in --log_dir are not
repeated.

    --schemes fisher prunetrain   --rates 1e-3 1e-2   --seeds 0 1   -- --num_epochs 10

choose what to run; what follows `--` goes to main.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core import environment  # noqa: F401  before TensorFlow, as in every entry point
from selection import SCHEMES

RATES = ("1e-3", "3e-3", "1e-2", "3e-2")


def main(argv=None):
    """Runs the search, prints its table, and returns the exit code: 1 if a run failed."""
    args = make_parser().parse_args(argv)
    scores = {}  # (scheme, rate) -> validation accuracies, one per seed; None for failed runs
    for scheme in args.schemes:
        for rate in args.rates:
            scores[scheme, rate] = [run(args, scheme, rate, seed) for seed in args.seeds]
        print(row(scheme, args.rates, scores), flush=True)
    print("\n" + "\n".join([header(args.rates), *(row(scheme, args.rates, scores) for scheme in args.schemes)]))
    return int(any(score is None for found in scores.values() for score in found))


def make_parser():
    """Returns the argparse parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--weights", required=True, help="a pretrained weights file for --model_name, as main.py takes it"
    )
    parser.add_argument("--model_name", default="mobilenetv2")
    parser.add_argument("--input_size", default="96", help="pixels (default: 96)")
    tuned = [name for name in SCHEMES if name != "listed_layers"]
    parser.add_argument("--schemes", nargs="+", choices=tuned, default=tuned, metavar="SCHEME")
    parser.add_argument("--rates", nargs="+", default=RATES, metavar="RATE", help=f"(default: {' '.join(RATES)})")
    parser.add_argument("--seeds", nargs="+", default=["0"], metavar="SEED", help="(default: 0)")
    parser.add_argument("--log_dir", default="logs/learning_rates")
    parser.add_argument("more", nargs="*", help="further flags of main.py, after --")
    return parser


def run(args, scheme, rate, seed):
    """Trains unless the run exists.

    Returns:
        float, the best validation accuracy in percent, or None if the run failed or diverged.
    """
    name = f"{args.model_name}_{scheme}_lr{rate}_seed{seed}"
    summary = Path(args.log_dir) / name / "summary.json"
    if not summary.exists():
        command = [
            sys.executable, "main.py", "--model_name", args.model_name, "--weights", str(Path(args.weights).resolve()),
            "--input_size", args.input_size, "--train_type", scheme, "--learning_rate", rate, "--seed", seed,
            "--limit_test", "20", "--log_dir", str(Path(args.log_dir).resolve()), "--run_name", name, *args.more,
        ]  # fmt: skip
        if "timing" in SCHEMES[scheme].reads:
            command += ["--timing", "flops"]  # the same choice whatever else the machine does
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", file=sys.stderr, flush=True)
    return json.loads(summary.read_text())["val_accuracy"] if summary.exists() else None


def header(rates):
    """Returns the table's first two lines."""
    return f"| scheme | {' | '.join(rates)} | best |\n|---{'|---:' * (len(rates) + 1)}|"


def row(scheme, rates, scores):
    """Returns a scheme's line: mean validation accuracy in percent by rate, and the rate of the highest."""
    means = [statistics.mean(scores[scheme, rate]) if None not in scores[scheme, rate] else None for rate in rates]
    shown = " | ".join("failed" if mean is None else f"{mean:.1f}" for mean in means)
    found = [(mean, -float(rate), rate) for mean, rate in zip(means, rates) if mean is not None]
    best = max(found)[2] if found else "none"  # ties go to the lower rate
    return f"| {scheme} | {shown} | {best} |"


if __name__ == "__main__":
    sys.exit(main())
