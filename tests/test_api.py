"""The Python API: any Keras model ranked, frozen and measured, under the user's own compile and fit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from networks import digits_images, network_of, tiny_model
from own_layers import NormalizedConv
from test_activations import reference_count

import models
from core.config import Config
from core.errors import UsageError
from models.batchnorm import calibrate
from selection import SCHEMES, rank_layers

ROOT = Path(__file__).parent.parent
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run_example(before=""):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    return subprocess.run(
        [sys.executable, "-c", before + EXAMPLE], cwd=ROOT, capture_output=True, text=True, check=True, env=clean
    )


@pytest.mark.slow
def test_example_of_the_readme_runs():
    done = run_example()
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["rank", "layer", "b1", "activation", "weights", "score", "trains"]
    assert len([row for row in rows if row.endswith("yes")]) == 1
    measured, estimated = re.search(r"measured (\d+) bytes, estimated (\d+)", done.stdout).groups()
    assert int(estimated) == pytest.approx(int(measured), rel=0.1)


@pytest.mark.slow
def test_example_runs_where_tensorflow_came_first():
    done = run_example("import logging, tensorflow as tf; tf.zeros(1) + 1; logging.basicConfig()\n")
    assert "measured None" in done.stdout and done.stderr.count("is not measured") == 1


def own_model():
    """A residual branch around a custom layer, a nested model, and a classifier."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 3))
    stem = keras.layers.Conv2D(6, 3, strides=2, activation="relu", name="stem")(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.Add(name="sum")([stem, NormalizedConv(6, name="block")(stem)])
    x = keras.Sequential(
        [keras.layers.Conv2D(4, 3, name="deep"), keras.layers.BatchNormalization(name="norm")], name="nested"
    )(x)
    x = keras.layers.Dropout(0.5)(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(x))


def batches(count=2, size=16, points=32):
    images, labels = digits_images(count * points, size)
    return [(images[i : i + points], labels[i : i + points]) for i in range(0, count * points, points)]


def test_counts_of_a_users_model_equal_the_reference():
    model, data = own_model(), batches()
    calibrate(model, data[0][0])
    rows = {row["path"]: row for row in rank_layers(model, data, 0.4, num_batches=2).layers}
    assert list(rows) == ["stem", "block/inner_conv", "block/inner_norm", "nested/deep", "nested/norm", "logits"]
    before_nested = keras.Model(model.inputs, model.get_layer("sum").output)
    nested = model.get_layer("nested")
    inner = keras.Model(nested.inputs, [layer.output for layer in nested.layers])
    for number, (images, _) in enumerate(data):
        stem = keras.Model(model.inputs, model.get_layer("stem").output)(images)
        conv = model.get_layer("block").conv(stem)
        found = [stem, conv, model.get_layer("block").norm(conv), *inner(before_nested(images)), model(images)]
        for row, activation in zip(rows.values(), found, strict=True):
            assert row["betti_1_per_batch"][number] == reference_count(activation), row["path"]
            assert row["activation_size"] == np.asarray(activation)[0].size


def test_ranking_equals_that_of_the_command_line():
    data = batches(count=4)
    network = network_of(tiny_model(), bn_stats="batch")
    for scheme in ("act_norm_betti_train", "betti_train", "weight_norm_betti_train"):
        cfg = Config(train_type=scheme, rho=0.5, exclude_layers="bn")
        by_scheme = SCHEMES[scheme].select(network, lambda points, count: data, cfg)
        by_api = rank_layers(
            network.model, data, 0.5, head=network.head, scheme=scheme, exclude_layers="bn", bn_stats="batch"
        )
        assert by_api == by_scheme and len(by_api.selected) == 3


def test_ranking_leaves_the_model_unchanged_and_repeats():
    model, data = own_model(), batches()
    before = [weight.numpy() for weight in model.weights]
    for bn_stats in ("batch", "stored"):
        first = rank_layers(model, data, 0.4, num_batches=2, bn_stats=bn_stats)
    assert all(np.array_equal(old, weight) for old, weight in zip(before, model.weights, strict=True))
    models.freeze(model, first)
    # Frozen weights stay candidates.
    assert rank_layers(model, data, 0.4, num_batches=2) == first


def test_fit_trains_exactly_the_selection_and_the_head():
    model = own_model()
    selection = rank_layers(model, batches(), 0.2, head=model.get_layer("logits"), exclude_layers="logits")
    assert selection.head_added and len(selection.selected) == 1
    models.freeze(model, selection)
    before = {weight.path: weight.numpy() for weight in model.weights}
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    model.fit(*batches(1)[0], verbose=0)
    moved = {weight.path for weight in model.weights if not np.array_equal(before[weight.path], weight)}
    assert {path for path in moved if "moving" not in path} == set(selection.trained_weights)
    assert {"logits/kernel", "logits/bias"} < set(selection.trained_weights)


def test_layers_that_the_user_froze_are_no_candidates():
    model = own_model()
    model.get_layer("nested").trainable = False
    found = rank_layers(model, batches(1), num_batches=1)
    assert [row["path"] for row in found.layers] == ["stem", "block/inner_conv", "block/inner_norm", "logits"]


def two_inputs():
    inputs = {"image": keras.Input((8, 8, 3), name="image"), "words": keras.Input((5,), dtype="int32", name="words")}
    words = keras.layers.LSTM(4, name="lstm")(keras.layers.Embedding(9, 4, name="embedding")(inputs["words"]))
    image = keras.layers.Dense(4, name="pixels")(keras.layers.Flatten()(inputs["image"]))
    return keras.Model(inputs, keras.layers.Dense(2, name="out")(keras.layers.Concatenate()([words, image])))


def test_several_inputs_and_recurrent_layers_are_ranked():
    rng = np.random.default_rng(0)
    data = [{"image": rng.normal(size=(16, 8, 8, 3)), "words": rng.integers(0, 9, (16, 5))} for _ in range(4)]
    found = rank_layers(two_inputs(), data, 0.4)
    # The cell of the LSTM computes within a loop.
    assert {row["path"] for row in found.layers} == {"embedding", "pixels", "out"}
    assert len(found.selected) == 1 and found.stability is not None


class Subclassed(keras.Model):
    def __init__(self, *names):
        super().__init__(name="subclassed")
        self.hidden, self.out = (keras.layers.Dense(8, name=name) for name in names)

    def call(self, inputs):
        return self.out(keras.ops.relu(self.hidden(inputs)))


def test_subclassed_model_is_built_and_ranked():
    data = [np.random.default_rng(0).normal(size=(16, 4)).astype("float32")]
    found = rank_layers(Subclassed("hidden", "out"), iter(data), num_batches=1)
    assert [row["path"] for row in found.layers] == ["subclassed/hidden", "subclassed/out"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rho": 1.5}, "`rho` must be over 0 and at most 1"),
        ({"scheme": "fisher"}, "`scheme` must be one of act_norm_betti_train"),
        ({"bn_stats": "auto"}, "`bn_stats` must be stored or batch"),
        ({"num_batches": 0}, "`num_batches` must be at least 1"),
        ({"batches": []}, "Received: none"),
        ({"batches": batches(1, points=3)}, "at least 4 images to have a loop. Received: 3"),
        ({"batches": [np.zeros((6000, 16, 16, 3))]}, "Received: clouds of 6000 points"),
        ({"batches": [batches(1)[0], batches(1, points=8)[0]]}, "Received: 8 after 32"),
        ({"exclude_layers": "absent"}, "--exclude_layers must match at least one layer"),
        ({"head": keras.layers.Dense(2)}, "`head` must be a layer that can train"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"model": own_model(), "batches": batches(1), "num_batches": 2} | change
    with pytest.raises(UsageError, match=message):
        rank_layers(**arguments)


def test_model_without_candidates_is_refused():
    model = own_model()
    model.trainable = False
    with pytest.raises(UsageError, match="needs a layer that can train"):
        rank_layers(model, batches(1))


def test_two_weights_with_one_path_are_refused():
    with pytest.raises(UsageError, match="2 weights subclassed/same"):
        rank_layers(Subclassed("same", "same"), [np.zeros((16, 4), "float32")])
