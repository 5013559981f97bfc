"""Estimated against measured peak memory of a training step, case by case.

    python benchmarks/memory.py                                  # all 48 cases; an hour or two on a laptop
    python benchmarks/memory.py --models resnet50 --batch_sizes 8

A case is one process of memory_utils.py with random weights and seed 0, which measures in
another new process. The ratio is estimate / measurement.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.units import MB

MODELS = ("resnet50", "vgg16", "mobilenetv2", "vit")
SCHEMES = ("full_training", "act_norm_betti_train", "traditional_tl_training")
BATCH_SIZES = (8, 32)
OPTIMIZERS = ("sgd", "adam")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases, prints their table, and returns 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--json", action="store_true", help="also print one line of JSON, last")
    args = parser.parse_args(argv)

    print(
        f"{'model':<12} {'scheme':<24} {'batch':>5} {'opt':<5} {'measured':>9} {'estimated':>9}  ratio  peak at",
        flush=True,
    )
    cases, failed = [], 0
    for model, batch_size, optimizer, scheme in itertools.product(
        args.models, args.batch_sizes, args.optimizers, args.schemes
    ):
        case = run(model, scheme, batch_size, optimizer, args.input_size)
        if case is None or case["measured_bytes"] is None:
            failed += 1
            continue
        cases.append(case)
        print(
            f"{model:<12} {scheme:<24} {batch_size:>5} {optimizer:<5} {case['measured_bytes'] / MB:>9.1f} "
            f"{case['estimated_bytes'] / MB:>9.1f}  {case['ratio']:.3f}  {case['peak_at']}",
            flush=True,
        )
    errors = [abs(case["ratio"] - 1) for case in cases]
    found = {
        "median_error": statistics.median(errors) if errors else None,
        "worst_error": max(errors, default=None),
        "failed": failed,
        "cases": cases,
    }
    if errors:
        print(f"{len(cases)} cases: median error {found['median_error']:.1%}, worst {found['worst_error']:.1%}")
    if failed:
        print(f"{failed} cases failed", file=sys.stderr)
    if args.json:
        print(json.dumps(found))
    return 1 if failed else 0


def run(model: str, scheme: str, batch_size: int, optimizer: str, input_size: int) -> dict | None:
    """Returns the record of one case, or prints why it failed and returns None."""
    flags = {
        "model_name": model,
        "train_type": scheme,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "input_size": input_size,
    }
    if scheme == "act_norm_betti_train":
        flags["rho"] = 0.1
    command = [sys.executable, str(ROOT / "memory_utils.py"), "--weights", "none", "--seed", "0", "--json"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}", file=sys.stderr)
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    ratio = found["estimated_bytes"] / found["measured_bytes"] if found["measured_bytes"] else None
    return {**flags, **found, "ratio": ratio}


if __name__ == "__main__":
    sys.exit(main())
