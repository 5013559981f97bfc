"""Peak memory: the simulation against hand counts, the convention, the command line, budgets, the Python API."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from networks import network_of
from test_main import assemble_tiny, run_of, tiny  # noqa: F401  a fixture

import memory_utils
import models
from core.config import Config
from core.units import MB
from memory import budget, convention, estimate, figure
from memory.simulator import step_graph
from memory.simulator.allocator import Allocator, Chunk
from models import batchnorm
from models.compiling import compile_model, make_optimizer
from models.freezing import freeze
from training import features

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- the allocator


def test_requests_are_rounded_up_to_256_bytes():
    allocator = Allocator()
    for size, in_use in [(1, 256), (256, 512), (257, 1024)]:
        allocator.allocate(size)
        assert allocator.in_use == in_use
    assert allocator.allocate(0) is None


def test_free_chunk_is_split_from_twice_the_request():
    allocator = Allocator()
    chunk, wall = allocator.allocate(4096), allocator.allocate(256)
    allocator.release(chunk)
    assert allocator.allocate(2304).size == 4096  # the rest is too small to be split off
    allocator.release(chunk)
    assert allocator.allocate(2048).size == 2048
    assert wall.size == 256


def test_neighbours_merge_when_released():
    allocator = Allocator()
    first, second, third, wall = (allocator.allocate(1024) for _ in range(4))
    for chunk in (first, third, second):
        allocator.release(chunk)
    assert allocator.allocate(3072).address == first.address and allocator.in_use == wall.size + 3072


# ---------------------------------------------------------------- toy networks, counted by hand


BATCH = 16
SIDE = 32
MAP = BATCH * SIDE * SIDE * 8 * 4  # bytes of an activation with 8 channels, as all networks here have


class Exact(Allocator):
    """Hands out exactly the requested bytes, so that hand counts are whole numbers."""

    def allocate(self, num_bytes):
        self.in_use += num_bytes
        return Chunk(num_bytes, 0) if num_bytes else None

    def release(self, chunk):
        if chunk is not None:
            self.in_use -= chunk.size


def conv(name):
    """A convolution with a tanh, whose gradient needs the tanh's output."""
    return keras.layers.Conv2D(8, 3, padding="same", activation="tanh", name=name)


def with_head(images, x):
    x = keras.layers.GlobalAveragePooling2D()(x)
    return network_of(keras.Model(images, keras.layers.Dense(10, name="head")(x)))


def chain():
    images = keras.Input((SIDE, SIDE, 8))
    x = images
    for number in range(4):
        x = conv(f"conv{number}")(x)
    return with_head(images, x)


def residual_block():
    images = keras.Input((SIDE, SIDE, 8))
    stem = conv("stem")(images)
    x = keras.layers.Add()([stem, conv("branch")(stem)])
    return with_head(images, conv("last")(x))


def normalized(bn_stats):
    images = keras.Input((SIDE, SIDE, 8))
    x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv0")(images)
    x = keras.layers.BatchNormalization(name="bn")(x)
    network = with_head(images, conv("conv1")(x))
    batchnorm.MODES[bn_stats](network.model)
    return network


def traced(network, trained=None, **flags):
    """Returns the Step that trains the layers with these names, by default all."""
    weights = [w.path for w in network.trainable_weights if trained is None or w.path.split("/")[0] in trained]
    freeze(network.model, weights)
    compile_model(network.model, make_optimizer(Config(**flags), total_steps=10))
    return step_graph.trace(network.model, (BATCH, SIDE, SIDE, 8))


def maps(network, trained=None):
    """Returns the estimated (kept activations, temporary memory) at the peak, in maps. Weights are tiny here."""
    found = estimate.of_step(traced(network, trained), allocator=Exact())
    assert sum(found.split.values()) == found.bytes
    assert found.split["weights"] + found.split["gradients"] + found.split["optimizer"] < 0.1 * MAP
    return round(found.split["activations"] / MAP, 1), round(found.split["temporary"] / MAP, 1)


def test_chain_keeps_each_activation_once():
    # The batch and three tanh. The fourth is no longer needed; its gradient and the next one exist together.
    assert maps(chain()) == (4, 2)


def test_nothing_before_the_first_trained_layer_is_kept():
    # conv3's gradient needs its input, conv2's tanh, and its own tanh. The batch is always in memory.
    assert maps(chain(), {"conv3", "head"}) == (3, 1)
    # The classifier alone keeps no map: the batch, an input and an output of a layer.
    assert maps(chain(), {"head"}) == (1, 2)


def test_activations_of_a_frozen_tail_are_kept():
    # The batch, all four tanh, and the gradient of the last one.
    assert maps(chain(), {"conv0", "head"}) == (5, 1)


def test_residual_block_keeps_inputs_of_its_branch():
    # The batch, stem, branch and their sum, which is the input of `last`; two gradients at `last`.
    assert maps(residual_block()) == (4, 2)
    # Nothing reads stem and branch after their sum: the batch, sum, last; one gradient.
    assert maps(residual_block(), {"last", "head"}) == (3, 1)


@pytest.mark.parametrize("bn_stats", ["stored", "batch"])
def test_trained_batch_normalization_keeps_its_input(bn_stats):
    # The batch, bn's input and output; two gradients at conv1.
    assert maps(normalized(bn_stats)) == (3, 2)


def test_frozen_batch_normalization_costs_by_mode():
    # Stored statistics only scale the gradient: the batch, conv1's tanh; one gradient.
    assert maps(normalized("stored"), {"conv0", "head"}) == (2, 1)
    # Batch statistics depend on bn's input, so that three gradients exist together.
    assert maps(normalized("batch"), {"conv0", "head"}) == (2, 3)


@pytest.mark.parametrize(
    "flags, slots", [({"optimizer": "sgd"}, 1), ({"optimizer": "adam"}, 2), ({"optimizer": "sgd", "momentum": 0.0}, 0)]
)
def test_optimizer_keeps_slots_of_trained_weights_only(flags, slots):
    network = chain()
    weights = sum(w.numpy().nbytes for w in network.trainable_weights if w.path.split("/")[0] in ("conv3", "head"))
    few = estimate.of_step(traced(network, {"conv3", "head"}, **flags), allocator=Exact())
    assert few.split["optimizer"] == pytest.approx(slots * weights, abs=64)  # and its counters
    assert few.split["weights"] == pytest.approx(sum(w.numpy().nbytes for w in network.model.weights), abs=64)


def test_peak_is_assigned_to_a_layer():
    assert estimate.of_step(traced(chain())).peak_at.startswith(("conv", "global_average"))


# ---------------------------------------------------------------- the published convention


@pytest.mark.parametrize(
    "model_name, inference, full",
    [("resnet50", 243, 777), ("vit", 84, 387), ("mobilenetv2", 315, 375), ("vgg16", 935, 987)],
)
def test_convention_gives_the_published_figures(model_name, inference, full):
    network = models.assemble(Config(model_name=model_name, input_size=224), 37)
    everything = [weight.path for weight in network.trainable_weights]
    assert convention.megabytes(network, []) == pytest.approx(inference, abs=3)
    assert convention.megabytes(network, everything) == pytest.approx(full, abs=3)


# ---------------------------------------------------------------- the command line


def test_command_line_prints_three_figures(tmp_path):
    command = [sys.executable, str(ROOT / "memory_utils.py"), "--model_name", "mobilenetv2", "--train_type",
               "traditional_tl_training", "--batch_size", "8", "--input_size", "64", "--weights", "none", "--json"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["measured_bytes", "estimated_bytes", "published_convention_mb", "split", "peak_at", "device"]
    assert found["estimated_bytes"] == pytest.approx(found["measured_bytes"], rel=0.1)
    assert list(found["split"]) == list(estimate.PARTS) and sum(found["split"].values()) == found["estimated_bytes"]
    assert found["peak_at"] and found["device"] and "Traceback" not in done.stderr


def test_measured_peak_follows_the_scheme_unless_weights_are_given():
    cfg = Config(model_name="mobilenetv2", weights="none", input_size=32, batch_size=32, train_type="full_training")
    selection, head, full = (
        memory_utils.measure_peak(cfg, 10, *arguments).bytes for arguments in (["selection"], ["training", ()], [])
    )
    assert 0 < head < full / 2
    assert selection < head


def test_table_names_the_convention():
    found = memory_utils.Figures(None, 2 * MB, 3.0, dict.fromkeys(estimate.PARTS, 0), "conv", "CPU:0")
    text = memory_utils.table(Config(), found)
    assert "here 32." in text and "here" not in memory_utils.table(Config(batch_size=8), found)
    assert "not measured" in text and "2.0 MB  peak at conv" in text and "published convention" in text


@pytest.mark.parametrize("flag", [["--num_epochs", "3"], ["--model", "vgg16"], ["--rho", "2"]])
def test_command_line_refuses_unknown_flags(flag, capsys):
    assert memory_utils.main(flag) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------- budgets


def summary_of(folder):
    return run_of(folder)[1]["summary.json"]


def test_every_run_reports_three_figures(tiny, tmp_path):  # noqa: F811
    assert tiny("--train_type", "full_training", "--num_epochs", "1") == 0
    summary = summary_of(tmp_path / "logs")
    assert summary["peak_memory_bytes_estimated"] > 0 and summary["memory_mb_published_convention"] > 0
    assert summary["memory_budget_mb"] is summary["budget_next_layer"] is summary["budget_next_bytes_estimated"] is None


@pytest.fixture
def steps(monkeypatch):
    """Replaces each estimate by 1 MB per weight, and returns the lists of weights that were estimated."""
    asked = []

    def count(network, data, cfg, weights):
        asked.append(list(weights))
        return len(weights) * MB

    monkeypatch.setattr(features, "peak_bytes", count)
    return asked


def test_longest_prefix_that_fits_trains(tiny, tmp_path, steps):  # noqa: F811
    # Six layers of two weights each: head and three more layers are eight.
    assert tiny("--memory_budget_mb", "8", "--num_epochs", "1") == 0
    run, records = run_of(tmp_path / "logs")
    selection, summary = records["selection.json"], records["summary.json"]
    assert len(selection["trained_weights"]) == 8 and records["config.json"]["rho"] is None
    ranked = sorted(selection["layers"], key=lambda row: row["rank"])
    length = len(selection["selected"])
    assert {row["path"] for row in ranked[:length]} == set(selection["selected"]) and selection["budget"] == length
    assert summary["memory_budget_mb"] == 8 and summary["num_trained_layers"] == 4
    assert summary["budget_next_layer"] == ranked[length]["path"] and summary["budget_next_bytes_estimated"] > 8 * MB
    assert len(steps) <= 5  # a bisection


def test_memory_budget_applies_within_rho(tiny, tmp_path, steps):  # noqa: F811
    assert tiny("--memory_budget_mb", "100", "--rho", "0.34", "--select_only") == 0
    assert len(run_of(tmp_path / "logs")[1]["selection.json"]["selected"]) == 2


def test_budget_for_all_layers_has_no_next_layer(tiny, tmp_path, steps):  # noqa: F811
    assert tiny("--memory_budget_mb", "12", "--num_epochs", "1") == 0
    summary = summary_of(tmp_path / "logs")
    assert summary["num_trained_layers"] == 6 and summary["budget_next_layer"] is None


def test_budget_below_the_head_is_refused(tiny, tmp_path, capsys):  # noqa: F811
    assert tiny("--memory_budget_mb", "0.001") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--memory_budget_mb" in line and "MB. Received: 0.001" in line
    assert not (tmp_path / "logs").exists()


def test_measured_peak_is_within_the_budget(tiny, tmp_path):  # noqa: F811
    cfg = Config(input_size=64)
    network = assemble_tiny(cfg, 10)
    batchnorm.use_batch_statistics(network.model)

    def peak_mb(weights):
        freeze(network.model, [w.path for w in weights])
        return budget.step_bytes(network.model, cfg, batch_size=16) / MB

    alone, everything = peak_mb(network.head.weights), peak_mb(network.trainable_weights)
    assert alone < everything
    middle = (alone + everything) / 2
    assert tiny("--memory_budget_mb", str(middle), "--num_epochs", "1", "--input_size", "64") == 0
    summary = summary_of(tmp_path / "logs")
    assert summary["peak_memory_bytes_estimated"] <= middle * MB < summary["budget_next_bytes_estimated"]
    assert summary["budget_next_layer"]


# ---------------------------------------------------------------- the figure


def test_figure_shows_convention_and_measurement(tmp_path, monkeypatch):
    # The figures of each bar are replaced; other tests check the real ones.
    monkeypatch.setattr(figure, "_figures", lambda cfg, bar: (100.0, 200.0 if bar == "inference" else None))
    text = figure.draw(Config(batch_size=8), str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(text.splitlines()) == 1 + 4 * 3 + 2 and "777" in text and "ImageNet" in text


# ---------------------------------------------------------------- the Python API


# A model of a user: residual branches, nested models, custom layers, a loss on one-hot labels.
OWN_MODEL = """
import logging
import keras, numpy as np

class Scale(keras.layers.Layer):
    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")

    def call(self, x):
        return x * self.factor

def own_model(**settings):
    images = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(16, 3, padding="same", activation="relu")(images)
    for _ in range(4):
        nested = keras.Sequential([keras.Input((None, None, 16)), keras.layers.Conv2D(16, 3, padding="same"),
                                   keras.layers.BatchNormalization()])
        x = keras.layers.Add()([x, Scale()(nested(x))])
    x = keras.layers.Dropout(0.5)(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(images, keras.layers.Dense(5)(x))
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, **{"jit_compile": False} | settings)
    return model

def own_batch(size=16, side=96):
    labels = np.eye(5, dtype="float32")[np.arange(size) % 5]
    return np.random.default_rng(0).normal(size=(size, side, side, 3)).astype("float32"), labels
"""


def run_code(code, **environment):
    """Returns the completed process of Python code that starts with the user's model."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=clean | environment
    )


def test_api_measures_and_estimates_any_model():
    done = run_code(
        "import memory_utils\n" + OWN_MODEL + """
model, batch = own_model(), own_batch()
estimated = memory_utils.estimate_training_peak(model, batch[0].shape)
before = [v.numpy() for v in model.variables]
measured = memory_utils.measure_training_peak(model, batch)
assert all((v.numpy() == b).all() for v, b in zip(model.variables, before, strict=True))
assert not model.optimizer.iterations.numpy()
model.fit(*batch, batch_size=8, epochs=1, verbose=0)
assert sum(estimated.split.values()) == estimated.bytes
print(measured.bytes, estimated.bytes, estimated.peak_at)
memory_utils.estimate_training_peak(own_model(jit_compile=True), batch[0].shape)
"""
    )  # fmt: skip
    assert done.stderr.count("jit_compile=False") == 1
    measured, estimated, peak_at = done.stdout.split(maxsplit=2)
    assert int(estimated) == pytest.approx(int(measured), rel=0.1) and peak_at


def test_api_works_after_tensorflow_was_imported():
    done = run_code(
        "import tensorflow as tf\ntf.zeros(1) + 1\nimport memory_utils\n" + OWN_MODEL + """
logging.basicConfig(format="%(message)s", level="WARNING")
model, batch = own_model(), own_batch(4, 16)
for _ in range(2):
    assert memory_utils.measure_training_peak(model, batch).bytes is None
print(memory_utils.estimate_training_peak(model, batch[0].shape).bytes)
"""
    )  # fmt: skip
    assert int(done.stdout) > 0
    assert done.stderr.count("is not measured") == 1


@pytest.mark.parametrize("unbuilt", [True, False])
def test_api_builds_sequential_models_and_takes_class_indices(unbuilt):
    layers = [keras.layers.Flatten(), keras.layers.Dense(3)]
    model = keras.Sequential(layers if unbuilt else [keras.Input((4, 4, 1)), *layers])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    assert memory_utils.estimate_training_peak(model, (8, 4, 4, 1)).bytes > 0
    peak = memory_utils.measure_training_peak(model, (np.ones((8, 4, 4, 1), "float32"), np.zeros(8, "int64")))
    assert peak.bytes > 0


def test_api_estimates_models_with_several_inputs():
    inputs = [keras.Input((6,)), keras.Input((4,))]
    outputs = keras.layers.Dense(1)(keras.layers.Concatenate()(inputs))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse", jit_compile=False)
    assert memory_utils.estimate_training_peak(model, [(8, 6), (8, 4)]).bytes > 0


def test_api_refuses_models_that_are_not_compiled():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    for call in (memory_utils.estimate_training_peak, memory_utils.measure_training_peak):
        with pytest.raises(ValueError, match="must be compiled"):
            call(model, (8, 4))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="tuple \\(inputs, labels\\)"):
        memory_utils.measure_training_peak(model, np.zeros((8, 4)))


def test_estimates_release_their_slots():
    import tensorflow as tf

    images = keras.Input((16, 16, 3))
    wide = keras.layers.Dense(1000, name="wide")(keras.layers.Flatten()(images))
    network = network_of(keras.Model(images, keras.layers.Dense(10, name="head")(wide)))
    slot_bytes = 4 * 768 * 1000
    before = tf.config.experimental.get_memory_info("CPU:0")["current"]
    for _ in range(3):
        budget.step_bytes(network.model, Config(), batch_size=4)
    assert tf.config.experimental.get_memory_info("CPU:0")["current"] - before < slot_bytes
