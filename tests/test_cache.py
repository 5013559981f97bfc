"""Cached features: the same training on the outputs of the frozen layers, computed once."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from networks import digits_images, network_of, small_vit_network, tiny_model

import data
import models
from core.config import Config
from core.files import PARTIAL
from main import main
from models import batchnorm, weights
from models.cut import find_cut
from models.freezing import freeze
from run.flags import parse
from training import callbacks, feature_files, features

# 144 training images: 9 steps an epoch.
FEW = ["--limit_train", "160", "--limit_test", "40", "--batch_size", "16", "--num_epochs", "3", "--save_model"]
DEEP = ["--train_type", "listed_layers", "--layers", "^deep$"]


def assemble_tiny(cfg, num_classes):
    network = network_of(tiny_model(input_size=cfg.input_size, num_classes=num_classes))
    batchnorm.calibrate(network.model, digits_images(64, cfg.input_size)[0])
    return network


@pytest.fixture(scope="module", autouse=True)
def tiny_network(tmp_path_factory):
    """Gives main() a tiny calibrated network in place of the backbone, and a cache folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "assemble", assemble_tiny)
        patch.setattr(weights, "load", lambda backbone, cfg: {"source": "none"})
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run(tmp_path, data_dir):
    """Runs main() with few images and stored statistics under a name in tmp_path."""

    def run_main(name, *argv):
        place = ["--data_dir", data_dir, "--log_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]
        try:
            return main([*FEW, *DEEP, "--bn_stats", "stored", *place, "--run_name", name, *argv])
        finally:
            feature_files.release()

    return run_main


def record(folder, name="summary.json"):
    return json.loads((folder / name).read_text())


def losses(folder):
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(row["train_loss"]), float(row["val_loss"])] for row in rows])


def trained_values(folder):
    return [np.asarray(weight) for weight in keras.models.load_model(folder / "model.keras").weights]


def assert_equal_training(one, other, tolerance=1e-4):
    np.testing.assert_allclose(losses(one), losses(other), rtol=tolerance)
    for a, b in zip(trained_values(one), trained_values(other), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-6)


# ---------------------------------------------------------------- the cut


def outputs(cut, images):
    features = keras.tree.flatten(cut.prefix(images, training=False))
    return cut.suffix(features[0] if len(features) == 1 else tuple(features), training=False)


@pytest.mark.parametrize(
    "make, layers, expected",
    [
        (tiny_model, "head", "global_average_pooling2d"),
        (tiny_model, "deep", "re_lu"),
        (tiny_model, "branch_bn", "stem + branch"),
    ],
)
def test_cut_is_before_the_first_trained_layer(make, layers, expected):
    keras.backend.clear_session()
    network = network_of(make())
    freeze(network.model, [w.path for w in network.trainable_weights if w.path.startswith((f"{layers}/", "head/"))])
    cut = find_cut(network.model)
    assert cut.name == expected
    assert {w.path for w in cut.suffix.trainable_variables} == {w.path for w in network.model.trainable_variables}
    assert not cut.prefix.trainable_variables
    images, _ = digits_images(8, 16)
    np.testing.assert_array_equal(outputs(cut, images), network.model(images, training=False))


def test_no_cut_if_the_first_layer_trains():
    network = network_of(tiny_model())
    cut = find_cut(network.model)
    assert cut is None or cut.saved < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["resnet50", "mobilenetv2"])
def test_cut_inside_a_residual_block_keeps_each_branch(model_name):
    keras.backend.clear_session()
    cfg = Config(model_name=model_name, weights="none", input_size=32, bn_stats="stored")
    from models import backbones

    network = backbones.assemble(cfg, 10)
    batchnorm.use_stored_statistics(network.model)
    layer = {"resnet50": "conv5_block3_2_conv", "mobilenetv2": "block_14_depthwise"}[model_name]
    freeze(network.model, [w.path for w in network.trainable_weights if w.path.startswith((layer, "head/"))])
    cut = find_cut(network.model)
    images, _ = digits_images(4, 32)
    assert len(cut.layers) == 2
    np.testing.assert_array_equal(outputs(cut, images), network.model(images, training=False))


@pytest.mark.slow
def test_vit_is_cut_between_its_blocks():
    network = small_vit_network()
    freeze(
        network.model,
        [w.path for w in network.trainable_weights if "transformer_block_2" in w.path or "head" in w.path],
    )
    cut = find_cut(network.model)
    images, _ = digits_images(4, 32)
    assert cut.saved > 0.2
    np.testing.assert_array_equal(outputs(cut, images), network.model(images, training=False))
    assert cut.bytes_per_image == 4 * 17 * 32


def test_operations_of_a_step_equal_a_hand_count(monkeypatch):
    monkeypatch.setattr("models.cut.FLOPS_PER_BYTE", 0)
    images = keras.Input((2, 2, 3))
    x = keras.layers.Conv2D(7, 1, name="second")(keras.layers.Conv2D(5, 1, name="first")(images))
    model = keras.Model(images, keras.layers.Dense(2, name="head")(keras.layers.GlobalAveragePooling2D()(x)))
    freeze(model, [w.path for w in model.weights if not w.path.startswith("first")])
    cut = find_cut(model)
    # Forward: outputs plus 2 * positions * kernel. Backward: kernels again, and inputs behind what trains.
    first, second, pooling, head = 20 + 2 * 4 * 15, 28 + 2 * 4 * 35, 7, 2 + 2 * 14
    behind = (second + 2 * 4 * 35) + 2 * pooling + (2 * head + 2 * 14)
    assert cut.saved == pytest.approx(first / (first + second + pooling + head))
    assert cut.step_share == pytest.approx(behind / (first + behind))
    assert cut.full_step_share == pytest.approx(behind / (first + 2 * 4 * 15 + second + behind))


# ---------------------------------------------------------------- the same training


@pytest.mark.slow
def test_cached_batches_are_those_of_uncached_training(data_dir):
    cfg = Config(limit_train=160, limit_test=40, batch_size=16, data_dir=data_dir, num_epochs=3)
    loaded = data.load(cfg)
    views = [list(loaded.train_view(view).unbatch().as_numpy_iterator()) for view in range(3)]
    order = list(loaded.train_order(0, 3).as_numpy_iterator())
    for (epochs, places), (images, labels) in zip(order, loaded.train_batches(0, 3).as_numpy_iterator(), strict=True):
        for epoch, place, image, label in zip(epochs, places, images, labels, strict=True):
            np.testing.assert_array_equal(views[epoch][place][0], image)
            assert views[epoch][place][1] == label


def test_size_of_cached_training_batches_is_known_when_traced(data_dir):
    # Without it, TensorFlow optimizes a step in another way, and large networks get other last digits.
    loaded = data.load(Config(limit_train=160, limit_test=40, batch_size=16, data_dir=data_dir))
    network = network_of(tiny_model())
    freeze(network.model, [w.path for w in network.trainable_weights if w.path.startswith(("deep/", "head/"))])
    cut = find_cut(network.model)
    arrays = {
        "train": ([np.zeros((144, *tensor.shape[1:]), "float32") for tensor in cut.prefix.outputs], np.zeros(144))
    }
    inputs, labels = features.Features(cut, arrays, loaded, 1).train_batches(0, 1).element_spec
    assert inputs.shape[0] == labels.shape[0] == 16


@pytest.mark.slow
def test_cached_training_equals_uncached_training(run, tmp_path):
    assert run("plain", "--augment", "False", "--cache_features", "off") == 0
    assert run("memory", "--augment", "False", "--cache_features", "memory") == 0
    assert run("disk", "--augment", "False", "--cache_features", "disk") == 0
    assert_equal_training(tmp_path / "memory", tmp_path / "plain")
    np.testing.assert_array_equal(losses(tmp_path / "memory")[:, 0], losses(tmp_path / "plain")[:, 0])
    assert_equal_training(tmp_path / "disk", tmp_path / "memory", tolerance=0)
    summary = record(tmp_path / "disk")
    assert summary["cache_features"] == "disk" and summary["cache_cut"].startswith("re_lu")
    assert summary["cache_bytes"] == 160 * 4 * 8 * 8 * 8 * (32 // 16) ** 2
    assert summary["train_s"] > summary["cache_s"] > 0
    assert record(tmp_path / "plain")["cache_s"] is None
    prints = [record(tmp_path / name, "config.json")["fingerprint"] for name in ("plain", "memory", "disk")]
    assert prints[0] != prints[1] == prints[2]


def test_as_many_views_as_epochs_equal_uncached_training(run, tmp_path):
    assert run("plain", "--cache_features", "off") == 0
    assert run("views", "--cache_features", "memory", "--cached_views", "3") == 0
    assert_equal_training(tmp_path / "views", tmp_path / "plain")


def test_frozen_to_the_head_only_the_pooled_features_are_cached(run, tmp_path):
    assert run("head", "--augment", "False", "--cache_features", "memory", "--layers", "head") == 0
    assert record(tmp_path / "head")["cache_bytes"] == 160 * 4 * 12


# ---------------------------------------------------------------- resuming


def at(owner, name, count, what, monkeypatch):
    """Calls `what` when a function is reached for the count-th time."""
    before, met = getattr(owner, name), []

    def hooked(*args, **kwargs):
        met.append(name)
        if len(met) == count:
            what()
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, hooked)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_cached_run_resumed_within_an_epoch_ends_the_same(where, run, tmp_path, monkeypatch):
    flags = ["--augment", "False", "--cache_features", where]
    assert run("alone", *flags) == 0
    with monkeypatch.context() as patch:
        at(callbacks.Checkpointer, "on_train_batch_end", 13, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        assert run("run", *flags) == 143
    feature_files.release()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    feature_files.release()
    assert_equal_training(tmp_path / "run", tmp_path / "alone", tolerance=0)
    assert record(tmp_path / "run", "config.json")["cached"] is True


def test_prefix_that_changes_ends_the_run(run, tmp_path, monkeypatch, capsys):
    def change():
        stem = next(weight for weight in networks[0].model.weights if weight.path == "stem/kernel")
        stem.assign(stem + 1)

    networks, load = [], features.load
    monkeypatch.setattr(features, "load", lambda network, *args: networks.append(network) or load(network, *args))
    at(callbacks.Checkpointer, "on_train_batch_end", 3, change, monkeypatch)
    assert run("moved", "--augment", "False", "--cache_features", "memory") == 1
    assert "must not change frozen weights. Received: changes in ['stem/kernel']" in capsys.readouterr().err


def test_memory_budget_prices_what_the_run_estimates(run, tmp_path, data_dir):
    priced = {}
    for where in ("off", "memory"):
        flags = ["--augment", "False", "--bn_stats", "stored", "--cache_features", where]
        assert run(where, *flags) == 0
        cfg = parse([*FEW, *DEEP, *flags, "--data_dir", data_dir])
        network = models.load_weights(models.assemble(cfg, 10), cfg)
        trained = record(tmp_path / where, "selection.json")["trained_weights"]
        priced[where] = features.peak_bytes(network, data.load(cfg), cfg, trained)
        estimated = record(tmp_path / where)["peak_memory_bytes_estimated"]
        assert priced[where] == pytest.approx(estimated, rel=0.02)  # scalars of the schedule
    assert priced["memory"] < priced["off"]


# ---------------------------------------------------------------- which runs cache


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cache_features", "memory"], "augmentation"),
        (["--cache_features", "disk", "--augment", "False", "--strategy", "mirrored"], "--strategy"),
        (["--cache_features", "disk", "--augment", "False", "--bn_stats", "batch"], "batch statistics"),
        (["--cached_views", "2"], "--cached_views needs"),
        (["--cache_features", "memory", "--cached_views", "4"], "at most --num_epochs"),
    ],
)
def test_caching_that_changes_the_result_is_refused(flags, message, run, tmp_path, capsys):
    assert run("refused", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, where",
    [
        (["--augment", "False"], "memory"),
        ([], "off"),
        (["--augment", "False", "--bn_stats", "batch"], "off"),
        (["--augment", "False", "--layers", "^stem$"], "off"),
        (["--augment", "False", "--num_epochs", "1"], "off"),
    ],
)
def test_auto_caches_if_the_result_stays_and_time_is_saved(flags, where, run, tmp_path):
    assert run("chosen", *flags) == 0
    assert record(tmp_path / "chosen")["cache_features"] == where
    assert record(tmp_path / "chosen", "config.json")["cached"] is (where != "off")


@pytest.mark.slow
def test_first_layers_that_train_leave_nothing_to_cache(run, tmp_path, capsys):
    assert run("first", "--augment", "False", "--cache_features", "memory", "--layers", "^stem$") == 0
    assert "there is nothing to cache" in capsys.readouterr().err
    assert record(tmp_path / "first")["cache_features"] == "off"


# ---------------------------------------------------------------- features on disk


def cached_folders(tmp_path):
    return [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def on_disk(run, name, *flags):
    assert run(name, "--augment", "False", "--cache_features", "disk", "--num_epochs", "2", *flags) == 0


def test_features_on_disk_are_reused_and_keyed(run, tmp_path, capsys):
    on_disk(run, "one")
    (first,) = cached_folders(tmp_path)
    before = (first / "train_0.npy").stat().st_mtime_ns
    on_disk(run, "same")
    assert cached_folders(tmp_path) == [first]
    assert (first / "train_0.npy").stat().st_mtime_ns == before
    on_disk(run, "seed", "--seed", "1")  # other weights, and another split
    on_disk(run, "size", "--input_size", "48")
    on_disk(run, "type", "--cache_dtype", "float16")
    on_disk(run, "head", "--layers", "head")
    assert len(cached_folders(tmp_path)) == 5
    assert main(["--clear_cache", "--cache_dir", str(tmp_path / "cache")]) == 0
    assert not cached_folders(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x99"),
        lambda path: path.unlink(),
        lambda path: (path.parent / "record.json").write_text("{}"),
    ],
    ids=["cut short", "changed", "missing", "no record"],
)
def test_damaged_features_are_computed_again(damage, run, tmp_path, capsys):
    on_disk(run, "one")
    (folder,) = cached_folders(tmp_path)
    damage(folder / "train_0.npy")
    on_disk(run, "two")
    assert "corrupt" in capsys.readouterr().err
    assert_equal_training(tmp_path / "one", tmp_path / "two", tolerance=0)


def test_full_disk_ends_the_run_and_leaves_no_features(run, tmp_path, monkeypatch, capsys):
    def full(self, array):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feature_files._Writer, "append", full)
        assert run("full", "--augment", "False", "--cache_features", "disk") == 1
    assert "the disk of --cache_dir must have room" in capsys.readouterr().err
    assert not cached_folders(tmp_path)
    assert main(["--resume", str(tmp_path / "full")]) == 0


def test_features_over_the_limit_are_refused(run, tmp_path, capsys):
    assert run("limit", "--augment", "False", "--cache_features", "disk", "--cache_limit_gb", "0.0001") == 1
    assert "--cache_limit_gb" in capsys.readouterr().err


def test_disk_without_room_is_refused_before_writing(run, tmp_path, monkeypatch, capsys):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(feature_files.shutil, "disk_usage", lambda path: usage)
    assert run("room", "--augment", "False", "--cache_features", "disk") == 1
    assert "must have room" in capsys.readouterr().err


def test_old_features_make_room_for_new_ones(run, tmp_path):
    on_disk(run, "one")
    (first,) = cached_folders(tmp_path)
    limit = 1.5 * sum(file.stat().st_size for file in first.iterdir()) / 1e9
    on_disk(run, "two", "--seed", "1", "--cache_limit_gb", str(limit))
    (second,) = cached_folders(tmp_path)
    assert second != first


WRITER = """
import itertools, os, signal, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from core.config import Config
from core.files import PARTIAL
from training import feature_files

def batches():
    for number in range(4):
        yield [np.full((2, 3), number, np.float32)], np.full(2, number)
        print("computed", flush=True)
        if sys.argv[3] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[3] == "waiting" and number == 0:
            sys.stdin.readline()

cfg = Config(cache_dir=sys.argv[2])
found = feature_files.load(cfg, {"key": 1}, {"train": batches}, {"train": 8}, [(3,)], np.dtype(np.float32))
assert found["train"][0][0][:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] == found["train"][1].tolist()
"""


def writer(tmp_path, how):
    root = str(Path(__file__).parent.parent)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", WRITER, root, str(tmp_path), how], **pipes)


def test_features_cut_short_by_sigkill_are_computed_again(tmp_path):
    killed = writer(tmp_path, "killed")
    assert killed.wait() == -signal.SIGKILL
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(PARTIAL)]
    following = writer(tmp_path, "complete")
    assert following.communicate()[0].count("computed") == 4 and following.returncode == 0
    assert not list(tmp_path.glob(f"{PARTIAL}*"))


def test_features_are_written_alone_and_computed_once(tmp_path):
    first = writer(tmp_path, "waiting")
    assert first.stdout.readline() == "computed\n"
    (lock_file,) = tmp_path.glob("*.lock")
    with open(lock_file) as lock, pytest.raises(BlockingIOError):  # no other run reads or writes now
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    second = writer(tmp_path, "complete")
    first.stdin.write("\n")
    outputs = [one.communicate()[0] for one in (first, second)]
    assert [one.returncode for one in (first, second)] == [0, 0]
    assert [output.count("computed") for output in outputs] == [3, 0]
