"""What choosing the layers costs, next to plain inference and to the road usually taken.

    python benchmarks/selection.py --model_name resnet50 --batch_size 32 --input_size 224

measures, turn by turn in one process, on real images (digits, enlarged):

(a) plain inference: forward passes and nothing else;
(b) our selection: forward passes that leave each layer's distances, then Betti numbers;
(c) collecting: a Keras extractor predicts every layer's activation, each is
    flattened, distances between the points, ripser; what is published, but on
    the true graph. Not for vit, whose layers an extractor doesn't reach.

It prints medians, and their ratios. "Cold" is all batches with a newly traced
function. Memory is the allocator's peak, weights included; (c) over (b) is the
peak over the weights, without the copies that (c) makes in NumPy.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime

import numpy as np


def main(argv=None):
    """Measures and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--model_name", default="resnet50", choices=("resnet50", "vgg16", "mobilenetv2", "vit"))
    parser.add_argument("--weights", default="none", help="none, or the path of a weights file (default: none)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--num_betti_batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--collect", action=argparse.BooleanOptionalAction, default=True, help="measure (c) too (default: yes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one line of JSON, last")
    args = parser.parse_args(argv)
    figures = measure(args)
    for name, value in figures.items():
        print(f"{name:<32} {value:.4g}" if isinstance(value, float) else f"{name:<32} {value}")
    if args.json:
        print(json.dumps(figures))
    return 0


def measure(args):
    """Returns {name of a figure: value}; seconds end in _s, bytes in _bytes."""
    runtime.load_tensorflow()
    import keras
    import tensorflow as tf

    import models
    from config import Config
    from memory.measure import measured_peak
    from models.batchnorm import calibrate
    from selection.betti import betti_1_of_each
    from selection.topology import count_bars

    runtime.seed_everything(args.seed)
    network = models.build(
        Config(model_name=args.model_name, weights=args.weights, input_size=args.input_size, bn_stats="stored"), 10
    )
    batches = [digits(args.batch_size, args.input_size, seed) for seed in range(args.num_betti_batches)]
    calibrate(network.model, batches[0][:32])  # eagerly, where Keras keeps all activations

    def plain_pass():
        return tf.function(lambda images: network.model(images, training=False), jit_compile=False)

    def plain():
        forward = plain_pass()
        for images in batches:
            forward(images)

    def select():
        count_bars(network, batches, len(batches))

    from selection.activations import distance_pass
    from selection.distances import num_workers

    collecting = args.collect and args.model_name != "vit"
    if collecting:
        extractor = keras.Model(network.model.inputs, [candidate.layer.output for candidate in network.candidates])

    def collect():
        return [published_count(activation) for activation in extractor.predict(batches[0], verbose=0)]

    steady_plain = plain_pass()
    with distance_pass(network) as distances:

        def steady_select():
            return betti_1_of_each(distances(batches[0]), num_workers())

        turns = {
            "forward": lambda: steady_plain(batches[0]),
            "selection": steady_select,
            "forward_cold": plain,
            "selection_cold": select,
        }
        if collecting:
            turns["collect"] = collect
        for turn in turns.values():  # whatever is loaded or compiled once a process
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
    if collecting:
        figures |= {
            "speedup_over_collect": time_s["collect"] / time_s["selection"],
            "memory_saving_over_collect": (peak_bytes["collect"] - weights_bytes)
            / (peak_bytes["selection"] - weights_bytes),
        }
    return figures


def digits(num_images, size, seed):
    """Returns real digits as a float32 tensor of shape (num_images, size, size, 3), RGB in 0..255."""
    import tensorflow as tf
    from sklearn.datasets import load_digits

    images = load_digits().images
    chosen = np.random.default_rng(seed).permutation(len(images))[:num_images]
    grey = images[np.resize(chosen, num_images)][..., None] * (255 / 16)
    return tf.image.resize(tf.constant(np.repeat(grey, 3, axis=-1), tf.float32), (size, size))


def published_count(activation):
    """Returns b1 by the published road: points, their distances, ripser over Z/2."""
    from ripser import ripser
    from scipy.spatial.distance import pdist, squareform

    points = activation.reshape(len(activation), -1)
    bars = ripser(squareform(pdist(points)), maxdim=1, distance_matrix=True, coeff=2)["dgms"][1]
    return int((bars[:, 1] > bars[:, 0]).sum())


if __name__ == "__main__":
    sys.exit(main())
