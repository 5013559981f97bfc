"""Writes generated images as a folder for --dataset_name image_folder."""

import argparse
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

from PIL import Image


def main(make, document, argv=None):
    """Runs the command line of a script that makes images, and returns the exit code.

    Args:
        make: function from a seed to an iterable of (split, class, uint8 array of shape
            (height, width, 3)).
        document: str. The script's docstring.
        argv: list of str. None uses the process's own arguments.
    """
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", metavar="DIR", type=Path, help="the folder to make")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args(argv)
    if args.out.exists():
        print(f"Error: DIR must not exist yet. Received: {args.out}; delete it or choose another.", file=sys.stderr)
        return 2
    counts = write(make(args.seed), args.out)
    print(", ".join(f"{count} {split}" for split, count in counts.items()), f"images in {args.out}")
    return 0


def write(images, out):
    """Writes OUT/SPLIT/CLASS/NUMBER.png. The folder has its name only once it is complete.

    Args:
        images: iterable as `make` of `main` returns it.
        out: pathlib.Path that does not exist.

    Returns:
        collections.Counter of the images of each split.
    """
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts, in_class = Counter(), Counter()
    for split, name, pixels in images:
        folder = partial / split / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{in_class[split, name]:05d}.png")
        in_class[split, name] += 1
        counts[split] += 1
    os.rename(partial, out)
    return counts
