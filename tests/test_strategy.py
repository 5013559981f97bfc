"""--strategy: two devices compute what one does, and what cannot work is refused."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from core import strategy
from core.errors import UsageError
from main import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

# The command line on two virtual CPUs, once with each strategy, on a tiny network without dropout.
# A small clipping norm, so that clipping each device's part by itself would show.
TWO_DEVICES = """
import sys
from core import environment
environment.load_tensorflow()
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, models
from main import main
from models import weights
from networks import network_of, tiny_model

def assemble(cfg, num_classes):
    model = tiny_model(input_size=cfg.input_size, num_classes=num_classes)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return network_of(model)

models.assemble = assemble
weights.load = lambda backbone, cfg: {"source": "file"}  # so that the statistics are the stored ones
argv = ["--limit_train", "72", "--limit_test", "33", "--batch_size", "16", "--num_epochs", "2", "--augment", "false",
        "--train_type", "full_training", "--learning_rate", "0.1", "--global_clipnorm", "0.05", *sys.argv[1:]]
for strategy in ("none", "mirrored"):
    assert main([*argv, "--strategy", strategy, "--run_name", strategy]) == 0
assert main([*argv, "--strategy", "mirrored", "--batch_size", "15"]) == 2
"""


def in_process(code, *argv):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run([sys.executable, "-c", code, *argv], env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True)  # fmt: skip


def test_two_devices_give_the_losses_of_one(tmp_path, data_dir):
    logs = tmp_path / "logs"
    done = in_process(TWO_DEVICES, "--log_dir", str(logs), "--data_dir", data_dir)
    assert done.returncode == 0, done.stderr
    assert "--batch_size must be a multiple of the 2 devices" in done.stderr
    metrics, summaries = [], []
    for name in ("none", "mirrored"):
        with open(logs / name / "metrics.csv", newline="") as file:
            metrics.append(list(csv.DictReader(file)))
        summaries.append(json.loads((logs / name / "summary.json").read_text()))
        assert json.loads((logs / name / "config.json").read_text())["bn_stats"] == "stored"
    for one, two in zip(*metrics, strict=True):
        for column in ("train_loss", "val_loss"):
            assert float(two[column]) == pytest.approx(float(one[column]), rel=1e-5), (column, one, two)
        assert two["train_accuracy"] == one["train_accuracy"] and two["learning_rate"] == one["learning_rate"]
    assert metrics[0][0]["train_loss"] != metrics[0][1]["train_loss"]
    assert [summary["peak_memory_bytes_estimated"] is None for summary in summaries] == [False, True]
    assert summaries[0]["accuracy"] == pytest.approx(summaries[1]["accuracy"], rel=1e-6)
    assert {path.name for path in logs.iterdir()} == {"none", "mirrored"}


# As TensorFlow documents it: a process a worker, TF_CONFIG, the network built in the strategy's scope.
# One worker's failure ends the other, which would wait for it for ever.
TWO_WORKERS = """
import json, os, sys
index, *ports = map(int, sys.argv[1:])
workers = [f"127.0.0.1:{port}" for port in ports]
os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})
from core import environment
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
import keras
keras.config.disable_traceback_filtering()
with strategy.scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
data = tf.data.Dataset.from_tensor_slices((tf.ones((8, 4)), tf.zeros(8, tf.int64))).batch(4)

def failure():
    try:
        model.fit(data, epochs=1, verbose=0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"

print(json.dumps(failure()[:500]))
with strategy.scope():
    model._symbolic_build(data_batch=(tf.ones((4, 4)), tf.zeros(4, tf.int64)))
model._maybe_symbolic_build = lambda **_: None  # goes round the first failure, and meets the second
print(json.dumps(failure()[:500]), flush=True)
os._exit(0)  # no waiting for the other worker
"""


def test_keras_fit_fails_under_multi_worker_mirrored():
    """The reason for refusing multi_worker_mirrored. Should this fail, Keras can: lift the refusal."""
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in (one, two)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_WORKERS, str(index), *ports],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for index in range(2)
    ]
    try:
        out, err = workers[0].communicate(timeout=100)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    first, second = [json.loads(line) for line in out.splitlines()[-2:]]
    assert first.startswith("ValueError: Attempt to convert a value (PerReplica"), err
    assert second.startswith("ValueError: Invalid reduction dimension 0 for input with 0 dimensions"), err


@pytest.mark.parametrize(
    "flags, says",
    [("multi_worker_mirrored", "fails under MultiWorkerMirroredStrategy"), ("mirrored", "at least two devices"),
     ("mirrored --train_type prunetrain", "select once"), ("mirrored --memory_budget_mb 300", "leave out one of them")],
)  # fmt: skip
def test_impossible_strategy_is_refused_in_one_line(flags, says, tmp_path, capsys, data_dir):
    assert main(["--strategy", *flags.split(), "--log_dir", str(tmp_path / "logs"), "--data_dir", data_dir]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "images, batch_size, devices, size",
    [(64, 16, 2, 16), (33, 16, 2, 12), (360, 32, 4, 28), (7, 16, 8, None), (8, 16, 8, 8), (7, 16, 2, 4)],
)
def test_every_device_gets_part_of_every_batch(images, batch_size, devices, size):
    found = strategy._even_batch_size(images, batch_size, devices)
    assert found == size
    if size:
        share = size // devices
        left = images % size or size
        assert [min(share, max(0, left - share * i)) for i in range(devices)].count(0) == 0


def test_uneven_split_is_refused():
    devices = SimpleNamespace(num_replicas_in_sync=8)
    with pytest.raises(UsageError, match="Received: 7 test images"):
        strategy.check_batches(devices, 16, {"validation": None, "test": 7})
    strategy.check_batches(None, 15, {"validation": 1, "test": 7})
