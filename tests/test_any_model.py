"""Models of the user's own: .keras files with residual branches, nested models and custom layers."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from networks import digits_images
from own_layers import NormalizedConv
from test_main import run_of

import models
from core.config import Config
from core.errors import UsageError
from main import main
from models import batchnorm, cut
from run import flags

ROOT = Path(__file__).parent.parent
OBJECTS = "own_layers:NormalizedConv"


def features(inputs=None, size=16):
    """A residual branch around a custom layer, and a nested Sequential."""
    inputs = keras.Input((size, size, 3)) if inputs is None else inputs
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", name="stem")(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.Add()([x, NormalizedConv(8, name="block")(x)])
    nested = [keras.layers.Conv2D(12, 3, name="deep"), keras.layers.BatchNormalization(name="deep_bn")]
    x = keras.Sequential([*nested, keras.layers.ReLU()], name="nested")(x)
    return inputs, x


def own_model(end="softmax", num_classes=10, size=16, seed=3):
    """The network of `features` under one of several ends."""
    keras.utils.set_random_seed(seed)
    inputs, x = features(size=size)
    if end != "maps":
        x = keras.layers.GlobalAveragePooling2D(keepdims=end == "convolution")(x)
    if end not in ("maps", "vectors"):
        x = keras.layers.Dropout(0.3, name="dropout")(x)
    ends = {
        "maps": lambda x: x,
        "vectors": lambda x: x,
        "softmax": keras.layers.Dense(num_classes, activation="softmax", name="head"),
        "logits": keras.layers.Dense(num_classes, name="logits"),
        "sigmoid": keras.layers.Dense(num_classes, activation="sigmoid", name="top"),
        "softmax layer": lambda x: keras.layers.Softmax()(keras.layers.Dense(num_classes, name="top")(x)),
        "activation layer": lambda x: keras.layers.Activation("softmax")(
            keras.layers.Dense(num_classes, name="top")(x)
        ),
        "nested": keras.Sequential([keras.layers.Dense(num_classes, name="top"), keras.layers.Softmax()], name="end"),
        "convolution": lambda x: keras.layers.Softmax()(
            keras.layers.Flatten()(keras.layers.Conv2D(num_classes, 1, name="top")(x))
        ),
        "embedding": keras.layers.Dense(num_classes, activation="relu", name="top"),
    }
    return keras.Model(inputs, ends[end](x), name="mine")


@pytest.fixture
def save(tmp_path):
    def save_model(model, name="mine.keras"):
        model.save(tmp_path / name)
        return str(tmp_path / name)

    return save_model


def config(path, **settings):
    defaults = {"custom_objects": OBJECTS, "input_size": 16, "preprocessing": "none", "head_init": "glorot"}
    return Config(**{"model_name": path, **defaults, **settings})


def images(count=4, size=16):
    return digits_images(count, size)[0]


# Loading.


def test_own_model_gets_a_new_head(save):
    model = own_model()
    network = models.build(config(save(model)), 7)
    assert network.model(images()).shape == (4, 7)
    paths = [candidate.path for candidate in network.candidates]
    assert paths == ["stem", "block/inner_conv", "block/inner_norm", "deep", "deep_bn", "head"]
    assert network.candidates[-1].layer is network.head
    offered = {weight.path for candidate in network.candidates for weight in candidate.weights}
    assert {weight.path for weight in network.trainable_weights} - offered == {"block/scale"}
    penultimate = keras.Model(model.input, model.get_layer("dropout").output)(images())
    ours = network.backbone(images())
    np.testing.assert_allclose(ours, penultimate, atol=1e-6)
    assert network.provenance["source"] == "file" and network.provenance["matched_layers"] == 6
    assert network.bn_stats == "stored" and len(batchnorm.layers(network.model)) == 2


def test_weights_none_starts_from_random_weights(save):
    model = own_model()
    path = save(model)
    keras.utils.set_random_seed(8)
    network = models.build(config(path, weights="none"), 10)
    assert network.provenance["source"] == "none" and network.bn_stats == "batch"
    trained = models.build(config(path), 10)
    assert [c.path for c in network.candidates] == [c.path for c in trained.candidates]
    assert not np.allclose(network.model.get_layer("backbone").get_layer("stem").kernel, model.get_layer("stem").kernel)


def test_weights_path_replaces_the_files_weights(save):
    other = own_model(seed=4)
    network = models.build(config(save(own_model()), weights=save(other, "other.keras")), 10)
    assert network.provenance["matched_layers"] == network.provenance["backbone_layers"]
    np.testing.assert_array_equal(
        network.model.get_layer("backbone").get_layer("stem").kernel, other.get_layer("stem").kernel
    )


@pytest.mark.parametrize("end, width", [("maps", 12), ("vectors", 12), ("embedding", 10)])
def test_models_without_classifier_are_backbones(save, end, width):
    network = models.build(config(save(own_model(end))), 5)
    assert network.head.kernel.shape == (width, 5)
    assert network.model(images()).shape == (4, 5)


@pytest.mark.parametrize("end", ["softmax", "logits", "softmax layer", "activation layer", "nested", "convolution"])
def test_kept_head_gives_logits(save, end):
    model = own_model(end)
    network = models.build(config(save(model), keep_head=True), 10)
    logits = np.asarray(network.model(images()))
    expected = np.asarray(model(images()))
    ours = logits if end == "logits" else np.asarray(keras.ops.softmax(logits))
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert not np.allclose(logits.sum(axis=-1), 1.0)
    assert network.candidates[-1].layer is network.head


@pytest.mark.parametrize(
    "end, num_classes, reason", [("softmax", 9, "10 outputs"), ("sigmoid", 10, "sigmoid"), ("maps", 10, "no class")]
)
def test_unsuitable_head_is_replaced_with_a_warning(save, caplog, end, num_classes, reason):
    network = models.build(config(save(own_model(end)), keep_head=True), num_classes)
    assert network.head.name == "head" and network.model(images()).shape == (4, num_classes)
    assert "--keep_head cannot keep" in caplog.text and reason in caplog.text


@pytest.mark.parametrize(
    "preprocessing, theirs",
    [
        ("none", lambda x: x),
        ("unit", lambda x: x / 255),
        ("symmetric", keras.applications.mobilenet_v2.preprocess_input),
        ("caffe", keras.applications.resnet50.preprocess_input),
        ("torch", keras.applications.densenet.preprocess_input),
    ],
)
def test_preprocessing_is_what_the_model_expects(save, preprocessing, theirs):
    inputs = keras.Input((16, 16, 3))
    path = save(keras.Model(inputs, keras.layers.Conv2D(2, 1)(inputs)))
    network = models.build(config(path, custom_objects=None, preprocessing=preprocessing), 5)
    found = network.model.get_layer("backbone")
    expected = found(theirs(images().copy()))
    pool = network.model.get_layer("pool")
    inside = keras.Model(network.model.input, pool.input)
    np.testing.assert_allclose(inside(images()), expected, rtol=1e-4, atol=1e-4)


def test_size_fixed_in_the_file_is_the_default(save):
    path = save(own_model())
    argv = ["--model_name", path, "--custom_objects", OBJECTS]
    cfg = flags.parse(argv)
    assert cfg.input_size == 16 and cfg.preprocessing == "none"
    with pytest.raises(UsageError, match=r"must be the 16 pixels .*Received: 32"):
        flags.parse([*argv, "--input_size", "32"])
    keras.utils.set_random_seed(0)
    open_size = save(own_model("vectors", size=None), "open.keras")
    assert flags.parse(["--model_name", open_size]).input_size == 32  # of digits


def test_checking_flags_imports_no_custom_class(save):
    code = (
        "import sys; from run import flags; flags.parse(sys.argv[1:]); "
        "assert not {'own_layers', 'keras', 'tensorflow'} & set(sys.modules)"
    )
    argv = ["--model_name", save(own_model()), "--custom_objects", OBJECTS]
    subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, check=True)


# What is refused, in one line and with exit code 2.


def end_at(output):
    inputs, x = features()
    return keras.Model(inputs, output(x))


def two_inputs():
    inputs, x = features()
    other = keras.Input((12,))
    return keras.Model([inputs, other], keras.layers.Add()([keras.layers.GlobalAveragePooling2D()(x), other]))


def simple(shape, **settings):
    inputs = keras.Input(shape, **settings)
    return keras.Model(inputs, keras.layers.Conv2D(2, 1)(inputs))


def twice_the_same_path():
    inputs = keras.Input((16, 16, 3))
    first, second = (keras.Sequential([keras.layers.Conv2D(3, 1, name="same")], name=name) for name in ("a", "b"))
    return keras.Model(inputs, second(first(inputs)))


def not_a_number():
    model = own_model()
    model.get_layer("stem").bias.assign(np.full(8, np.nan, "float32"))
    return model


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = keras.layers.Conv2D(2, 1)

    def call(self, inputs):
        return self.conv(inputs)


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 16, 16, 3), "float32"))
    return model


BAD_MODELS = {
    "two inputs": (two_inputs, "one input.*with 2 inputs"),
    "two outputs": (lambda: end_at(lambda x: [x, x]), "one output of vectors"),
    "tokens": (lambda: end_at(keras.layers.Reshape((36, 12))), r"\(None, 36, 12\)"),
    "grey": (lambda: simple((16, 16, 1)), r"RGB.*\(None, 16, 16, 1\)"),
    "not square": (lambda: simple((16, 20, 3)), "square"),
    "vectors": (lambda: keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)]), r"\(None, 5\)"),
    "fixed batch": (lambda: simple((16, 16, 3), batch_size=8), r"\(8, 16, 16, 3\)"),
    "subclassed": (subclassed, "functional or Sequential.*Subclassed"),
    "paths": (twice_the_same_path, "unique paths.*same/"),
    "not finite": (not_a_number, "finite"),
}


@pytest.mark.parametrize("make, rule", BAD_MODELS.values(), ids=BAD_MODELS)
def test_unsuitable_models_are_refused(save, make, rule):
    path = save(make())
    with pytest.raises(UsageError, match=f"--model_name needs .*{rule}") as caught:
        models.build(config(path), 10)
    assert path in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>", pickle.dumps({}), "truncated", "flipped", "no config", "text"])
def test_files_that_are_no_models_are_refused(save, content):
    path = Path(save(own_model()))
    whole = path.read_bytes()
    if content == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "flipped":
        middle = whole.index(own_model().get_layer("stem").kernel.numpy().tobytes())
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif content in ("no config", "text"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json" if content == "text" else "other", "3")
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="--model_name needs an intact Keras model file"):
        models.check_input_size(str(path), 16)


def test_lambda_layers_are_refused_and_not_executed(save, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    monkeypatch.setenv("LAMBDA_MARKER", str(marker))
    bomb = keras.layers.Lambda(
        lambda x: (open(__import__("os").environ["LAMBDA_MARKER"], "w").close(), x)[1], name="bomb"
    )
    path = save(end_at(bomb))
    marker.unlink(missing_ok=True)
    assert main(["--model_name", path, "--custom_objects", OBJECTS]) == 2
    assert not marker.exists()
    with pytest.raises(UsageError, match="without Lambda layers.*bomb, not executed"):
        models.build(config(path), 10)
    assert not marker.exists()


@pytest.mark.parametrize(
    "objects, rule",
    [
        (None, "--custom_objects must name every custom class.*NormalizedConv"),
        ("own_layers", "MODULE:NAME.*'own_layers'"),
        ("absent_module:X", "Received: 'absent_module:X' .ModuleNotFoundError"),
        ("own_layers:Absent", "Received: 'own_layers:Absent' .AttributeError"),
    ],
)
def test_custom_classes_must_be_named(save, objects, rule):
    with pytest.raises(UsageError, match=rule) as caught:
        models.build(config(save(own_model()), custom_objects=objects), 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags_of_others, rule",
    [
        (["--weights", "imagenet"], "--weights imagenet needs a known"),
        (["--model_alpha", "0.5"], "--model_alpha sets the width"),
        (["--input_size", "17"], "16 pixels"),
    ],
)
def test_flags_that_do_not_fit_a_file_end_with_2(save, capsys, tmp_path, flags_of_others, rule):
    argv = ["--model_name", save(own_model()), "--log_dir", str(tmp_path / "logs"), *flags_of_others]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert rule in line and not (tmp_path / "logs").exists()


def test_missing_file_ends_with_2(capsys):
    assert main(["--model_name", "absent.keras"]) == 2
    assert "there is no such file" in capsys.readouterr().err


# Training.


@pytest.mark.parametrize("frozen_before", ["deep", "head"])
def test_own_model_can_be_cut_for_cached_features(save, frozen_before):
    network = models.build(config(save(own_model())), 10)
    paths = [candidate.path for candidate in network.candidates]
    trained = network.candidates[paths.index(frozen_before)].weights
    models.freeze(network.model, [weight.path for weight in (*trained, *network.head.weights)])
    found = cut.find_cut(network.model)
    assert found is not None and found.saved > 0.3
    np.testing.assert_allclose(found.suffix(found.prefix(images())), network.model(images()), atol=1e-5)


def test_freeze_trains_exactly_the_selected_weights():
    """`models.freeze` on a model of the user's own, under Keras' own compile and fit."""
    model = own_model("logits")
    chosen = ["block/inner_conv/kernel", "nested/deep_bn/gamma", "logits/kernel", "logits/bias"]
    for selection in (["stem/kernel", "stem/bias"], chosen):
        models.freeze(model, selection)
    assert sorted(weight.path for weight in model.trainable_weights) == sorted(chosen)
    before = {weight.path: weight.numpy() for weight in model.weights}
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*digits_images(16, 16), batch_size=8, verbose=0)
    moved = {weight.path for weight in model.weights if not np.array_equal(before[weight.path], weight.numpy())}
    assert {path for path in moved if "moving" not in path} == set(chosen)
    with pytest.raises(UsageError, match="Received: absent/kernel"):
        models.freeze(model, ["absent/kernel"])


def command(path, folder, data_dir, name, *more):
    return [
        sys.executable, "main.py", "--model_name", path, "--custom_objects", OBJECTS, "--limit_train", "160",
        "--limit_test", "40", "--batch_size", "16", "--num_epochs", "3", "--save_model", "--rho", "0.5",
        "--checkpoint_minutes", "0", "--data_dir", data_dir, "--log_dir", str(folder), "--run_name", name, *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_own_model_resumes_after_sigkill_with_equal_bits(save, tmp_path, data_dir):
    path, logs = save(own_model()), tmp_path / "logs"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    whole = subprocess.run(command(path, logs, data_dir, "whole"), **options)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(command(path, logs, data_dir, "killed"), **options)
    while process.poll() is None and not (logs / "killed" / "metrics.csv").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = subprocess.run(
        [sys.executable, "main.py", "--resume", str(logs / "killed"), "--data_dir", data_dir], **options
    )
    assert resumed.returncode == 0 and "Resuming" in resumed.stderr, resumed.stderr
    assert (logs / "killed/selection.json").read_bytes() == (logs / "whole/selection.json").read_bytes()
    code = """
import sys, numpy as np, keras
sys.path.insert(0, "tests")
from own_layers import NormalizedConv
whole, killed = (
    keras.saving.load_model(f"{sys.argv[1]}/{name}/model.keras", custom_objects={"NormalizedConv": NormalizedConv})
    for name in ("whole", "killed")
)
for one, other in zip(whole.weights, killed.weights, strict=True):
    np.testing.assert_array_equal(one, other)
assert whole(np.zeros((2, 16, 16, 3))).shape == (2, 10) and "models" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(logs)], cwd=ROOT, check=True)


@pytest.mark.slow
def test_run_on_own_model_records_its_origin(save, tmp_path, data_dir, monkeypatch):
    path = save(own_model(), "my net.keras")
    argv = [
        "--model_name", path, "--custom_objects", OBJECTS, "--keep_head", "--limit_train", "160", "--limit_test", "40",
        "--num_epochs", "1", "--data_dir", data_dir, "--log_dir", str(tmp_path / "logs"),
    ]  # fmt: skip
    assert main(argv) == 0
    run, records = run_of(tmp_path / "logs")
    assert run.name.startswith("my_net_digits_")
    provenance = records["config.json"]["weights_provenance"]
    assert provenance["source"] == "file" and len(provenance["sha256"]) == 64
    assert records["summary.json"]["weights"] == "file"
    assert json.loads((run / "config.json").read_text())["keep_head"] is True
