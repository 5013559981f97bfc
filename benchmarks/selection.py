"""The cost of a selection beside plain inference, and beside the usual implementation.

    python benchmarks/selection.py --model_name resnet50 --batch_size 32 --input_size 224

measures in turn, in one process, on real images (enlarged digits):

(a) plain inference;
(b) our selection: forward passes with each layer's distances, then Betti numbers;
(c) collecting: a Keras extractor predicts every layer's activation, which is flattened,
    then distances and ripser. This is the published way, on the true graph. It is not
    available for vit, whose layers an extractor does not reach.

It prints medians and their ratios. "Cold" includes tracing, over all batches. Peaks are
those of the allocator, weights included. The memory of (c) is compared in two ways: by
the allocator's peaks beyond the weights, and by the growth of the resident size of a new
process, which includes the NumPy arrays in which (c) keeps activations and points.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from core import environment

CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 makes the highest resident size count from here


def main(argv=None):
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--model_name", default="resnet50", choices=("resnet50", "vgg16", "mobilenetv2", "vit"))
    parser.add_argument("--weights", default="none", help="none, or the path of a weights file (default: none)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--num_betti_batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--bn_stats", default="stored", choices=("stored", "batch"),
        help="statistics of batch normalization; (c) needs stored ones (default: stored)",
    )  # fmt: skip
    parser.add_argument(
        "--collect", action=argparse.BooleanOptionalAction, default=True, help="measure (c) too (default: yes)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one line of JSON, last")
    args = parser.parse_args(argv)
    if args.collect and not os.access(CLEAR_REFS, os.W_OK):
        parser.error(f"the growth of a process can only be read on Linux ({CLEAR_REFS}); use --no-collect")
    figures = measure(args)
    for name, value in figures.items():
        print(f"{name:<32} {value:.4g}" if isinstance(value, float) else f"{name:<32} {value}")
    if args.json:
        print(json.dumps(figures))
    return 0


def measure(args):
    """Returns {name of a figure: value}; seconds end in _s, bytes in _bytes."""
    network, batches = prepare(args)

    from memory.measure import measured_peak
    from models.batchnorm import calibrate
    from selection.topology import count_bars

    calibrate(network.model, batches[0][:32])  # eagerly: Keras keeps all activations

    def plain():
        forward = inference(network)
        for images in batches:
            forward(images)

    def select():
        count_bars(network, batches, len(batches))

    with steady_ways(network, batches[0], args) as turns:
        turns |= {"forward_cold": plain, "selection_cold": select}
        for turn in turns.values():  # loads and compiles what a process needs once
            turn()
        times = {name: [] for name in turns}
        peaks = {name: [] for name in turns}
        for _ in range(args.repeats):
            for name, turn in turns.items():
                start = time.perf_counter()
                with measured_peak() as peak:
                    turn()
                times[name].append(time.perf_counter() - start)
                peaks[name].append(peak.bytes)

    weights_bytes = sum(weight.numpy().nbytes for weight in network.model.weights)
    time_s = {name: statistics.median(values) for name, values in times.items()}
    peak_bytes = {name: int(statistics.median(values)) for name, values in peaks.items()}
    figures = {f"{name}_s": value for name, value in time_s.items()}
    figures |= {f"{name}_peak_bytes": value for name, value in peak_bytes.items()}
    figures |= {
        "weights_bytes": weights_bytes,
        "ratio_to_forward": time_s["selection"] / time_s["forward"],
        "ratio_to_forward_cold": time_s["selection_cold"] / time_s["forward_cold"],
        "peak_ratio_to_inference": peak_bytes["selection"] / peak_bytes["forward"],
    }
    if "collect" in turns:
        with tempfile.TemporaryDirectory() as folder:
            network.model.save_weights(weights := f"{folder}/calibrated.weights.h5")
            grown = {way: grown_bytes(args, weights, way) for way in ("forward", "selection", "collect")}
        figures |= {f"{way}_grown_bytes": value for way, value in grown.items()}
        figures |= {
            "speedup_over_collect": time_s["collect"] / time_s["selection"],
            "allocator_saving_over_collect": (peak_bytes["collect"] - weights_bytes)
            / (peak_bytes["selection"] - weights_bytes),
            "memory_saving_over_collect": grown["collect"] / grown["selection"],
        }
    return figures


def prepare(args):
    """Returns the models.Network, before calibration, and the batches of images."""
    environment.load_tensorflow()
    import models
    from core.config import Config

    environment.seed_everything(args.seed)
    network = models.build(
        Config(model_name=args.model_name, weights=args.weights, input_size=args.input_size, bn_stats=args.bn_stats), 10
    )
    return network, [digits(args.batch_size, args.input_size, seed) for seed in range(args.num_betti_batches)]


@contextlib.contextmanager
def steady_ways(network, images, args):
    """Provides {name: function} of the measured ways to process `images`, traced at their first call."""
    import keras

    from selection.activations import distance_pass
    from selection.betti import betti_1_of_each

    forward = inference(network)
    with distance_pass(network) as distances:
        ways = {
            "forward": lambda: forward(images),
            "selection": lambda: betti_1_of_each(distances(images), environment.num_workers()),
        }
        if args.collect and args.model_name != "vit" and args.bn_stats == "stored":
            extractor = keras.Model(network.model.inputs, [candidate.layer.output for candidate in network.candidates])
            ways["collect"] = lambda: [published_count(a) for a in extractor.predict(images, verbose=0)]
        yield ways


def inference(network):
    """Returns a function from images to logits, not traced yet, in the network's mode of batch normalization."""
    import tensorflow as tf

    from models.batchnorm import statistics_kept

    def forward(images):
        with statistics_kept(network.model, network.bn_stats):
            return network.model(images, training=False)

    return tf.function(forward, jit_compile=False)


def grown_bytes(args, weights, way):
    """Returns the largest growth of a new process' resident size."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_grown_here, args, weights, way).result()


def _grown_here(args, weights, way):
    network, batches = prepare(args)
    network.model.load_weights(weights)

    import gudhi.sklearn.rips_persistence  # noqa: F401  loaded before the measurement
    import scipy.spatial.distance  # noqa: F401

    from selection.distances import pairwise_distances

    published_count(np.random.default_rng(0).normal(size=(8, 3)))
    pairwise_distances(np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32))

    status = Path("/proc/self/status")

    def bytes_of(name):
        [line] = [line for line in status.read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) * 1024

    with steady_ways(network, batches[0], args) as ways:
        before = bytes_of("VmRSS")
        CLEAR_REFS.write_text("5")
        ways[way]()
        return bytes_of("VmHWM") - before


def digits(num_images, size, seed):
    """Returns real digits as a float32 tensor of shape (num_images, size, size, 3), RGB in 0..255."""
    import tensorflow as tf
    from sklearn.datasets import load_digits

    images = load_digits().images
    chosen = np.random.default_rng(seed).permutation(len(images))[:num_images]
    grey = images[np.resize(chosen, num_images)][..., None] * (255 / 16)
    return tf.image.resize(tf.constant(np.repeat(grey, 3, axis=-1), tf.float32), (size, size))


def published_count(activation):
    """Returns b1 as published: points, their distances, ripser over Z/2."""
    from ripser import ripser
    from scipy.spatial.distance import pdist, squareform

    points = activation.reshape(len(activation), -1)
    bars = ripser(squareform(pdist(points)), maxdim=1, distance_matrix=True, coeff=2)["dgms"][1]
    return int((bars[:, 1] > bars[:, 0]).sum())


if __name__ == "__main__":
    sys.exit(main())
