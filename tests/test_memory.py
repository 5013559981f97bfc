"""Peak memory: the simulated allocator and step against hand counts, the convention, the command line, the budget."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from networks import network_of
from test_main import assemble_tiny, run_of, tiny  # noqa: F401  a fixture

import memory_utils
import models
from core.config import Config
from memory import budget, convention, estimate, figure
from memory.simulator import step_graph
from memory.simulator.allocator import Allocator, Chunk
from models import batchnorm
from models.compiling import compile_model, make_optimizer
from models.freezing import freeze

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MB = 10**6


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
    assert allocator.allocate(2304).size == 4096  # too small a rest: wasted
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
MAP = BATCH * SIDE * SIDE * 8 * 4  # bytes of an activation with 8 channels; all of these toys' have them


class Exact(Allocator):
    """Hands out what is asked for, without waste, so that hand counts come out whole."""

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
    """The Step that trains the layers with these names, all by default."""
    weights = [w.path for w in network.trainable_weights if trained is None or w.path.split("/")[0] in trained]
    freeze(network, weights)
    compile_model(network.model, make_optimizer(Config(**flags), total_steps=10))
    return step_graph.trace(network.model, (BATCH, SIDE, SIDE, 8))


def maps(network, trained=None):
    """Estimated (kept activations, temporary memory) at the peak, in maps; weights are next to nothing here."""
    found = estimate.of_step(traced(network, trained), allocator=Exact())
    assert sum(found.split.values()) == found.bytes
    assert found.split["weights"] + found.split["gradients"] + found.split["optimizer"] < 0.1 * MAP
    return round(found.split["activations"] / MAP, 1), round(found.split["temporary"] / MAP, 1)


def test_chain_keeps_each_activation_once():
    # The batch and three tanh. The fourth is used up; its error and what that becomes stand side by side.
    assert maps(chain()) == (4, 2)


def test_nothing_before_the_first_trained_layer_is_kept():
    # conv3's gradient needs its input, conv2's tanh, and its own tanh. The batch is there all the time.
    assert maps(chain(), {"conv3", "head"}) == (3, 1)
    # The classifier alone keeps no map: the batch, an input and an output of a layer.
    assert maps(chain(), {"head"}) == (1, 2)


def test_activations_of_a_frozen_tail_are_kept():
    # The batch, all four tanh, and the error before the last of them.
    assert maps(chain(), {"conv0", "head"}) == (5, 1)


def test_residual_block_keeps_inputs_of_its_branch():
    # The batch, stem, branch and their sum, which is last's input; last's error and what it becomes.
    assert maps(residual_block()) == (4, 2)
    # Stem and branch are read by nobody once their sum is there: the batch, sum, last; the error.
    assert maps(residual_block(), {"last", "head"}) == (3, 1)


@pytest.mark.parametrize("bn_stats", ["stored", "batch"])
def test_trained_batch_normalization_keeps_its_input(bn_stats):
    # The batch, bn's input and output; conv1's error and what it becomes.
    assert maps(normalized(bn_stats)) == (3, 2)


def test_frozen_batch_normalization_costs_by_mode():
    # Stored statistics scale the error: the batch, conv1's tanh; the error.
    assert maps(normalized("stored"), {"conv0", "head"}) == (2, 1)
    # Those of the batch hang on bn's input, and the error comes back on three ways at once.
    assert maps(normalized("batch"), {"conv0", "head"}) == (2, 3)


@pytest.mark.parametrize("optimizer, slots", [("sgd", 1), ("adam", 2)])
def test_optimizer_keeps_slots_of_trained_weights_only(optimizer, slots):
    network = chain()
    weights = sum(w.numpy().nbytes for w in network.trainable_weights if w.path.split("/")[0] in ("conv3", "head"))
    few = estimate.of_step(traced(network, {"conv3", "head"}, optimizer=optimizer), allocator=Exact())
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


def test_table_names_the_convention():
    found = memory_utils.Figures(None, 2 * MB, 3.0, dict.fromkeys(estimate.PARTS, 0), "conv", "CPU:0")
    text = memory_utils.table(Config(), found)
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
    """Estimates by count of weights instead of traces, 1 MB each; the lists of weights that were asked about."""
    asked = []

    def count(network, weights, cfg, batch_size):
        asked.append(list(weights))
        return len(weights) * MB

    monkeypatch.setattr(budget, "peak_bytes", count)
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
    assert len(steps) <= 5  # bisection, not a walk


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
    alone, everything = (
        budget.peak_bytes(network, [w.path for w in weights], cfg, batch_size=16) / MB
        for weights in (network.head.weights, network.trainable_weights)
    )
    assert alone < everything
    middle = (alone + everything) / 2
    assert tiny("--memory_budget_mb", str(middle), "--num_epochs", "1", "--input_size", "64") == 0
    summary = summary_of(tmp_path / "logs")
    assert summary["peak_memory_bytes_estimated"] <= middle * MB < summary["budget_next_bytes_estimated"]
    assert summary["budget_next_layer"]


# ---------------------------------------------------------------- the figure


def test_figure_shows_convention_and_measurement(tmp_path, monkeypatch):
    # Each bar's figures are made up here: the real ones are memory_utils' and the convention's own tests.
    monkeypatch.setattr(figure, "_figures", lambda cfg, bar: (100.0, 200.0 if bar == "inference" else None))
    text = figure.draw(Config(batch_size=8), str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(text.splitlines()) == 1 + 4 * 3 + 2 and "777" in text and "ImageNet" in text


def test_estimates_release_their_slots():
    import tensorflow as tf

    images = keras.Input((16, 16, 3))
    wide = keras.layers.Dense(1000, name="wide")(keras.layers.Flatten()(images))
    network = network_of(keras.Model(images, keras.layers.Dense(10, name="head")(wide)))
    slot_bytes = 4 * 768 * 1000
    before = tf.config.experimental.get_memory_info("CPU:0")["current"]
    for _ in range(3):
        budget.peak_bytes(network, [w.path for w in network.trainable_weights], Config(), batch_size=4)
    assert tf.config.experimental.get_memory_info("CPU:0")["current"] - before < slot_bytes
