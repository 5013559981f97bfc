"""Export to LiteRT: gradients, signatures, storage, refusals, and training by the interpreter alone."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import keras
import litert_train
import numpy as np
import pytest
import tensorflow as tf
from networks import backbone_network, network_of, small_vit_network, tiny_model

import export
import models
from core.config import Config
from core.errors import UsageError
from export import convert, gradients, storage, training_module
from main import main
from models import batchnorm
from models.compiling import compile_model
from models.freezing import freeze

ROOT = Path(__file__).parent.parent
BATCH = 6
RATE = 0.05
TRAINED_LAYERS = ("branch", "deep_bn", "head")


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def gradients_of(function, *inputs):
    """Returns TensorFlow's gradients of a scalar of the function's output, and ours."""

    @tf.function(autograph=False)
    def both(*inputs):
        theirs = tf.gradients(tf.reduce_sum(tf.sin(function(*inputs))), inputs)
        with gradients.overridden(tf.compat.v1.get_default_graph()):
            output = function(*inputs)
        return theirs, tf.gradients(tf.reduce_sum(tf.sin(output)), inputs)

    return both(*map(tf.constant, inputs))


def assert_equal_gradients(function, *inputs):
    for theirs, ours in zip(*gradients_of(function, *inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


GEOMETRIES = [
    (size, window, stride, padding, dilation)
    for size, window, stride, padding, dilation in itertools.product(
        (7, 8), (1, 2, 3), (1, 2, 3), ("SAME", "VALID"), (1, 2)
    )
    if stride == 1 or dilation == 1
]


@pytest.mark.parametrize("size, window, stride, padding, dilation", GEOMETRIES)
def test_convolution_gradients_equal_tensorflow(size, window, stride, padding, dilation):
    def plain(x, kernel):
        return tf.nn.conv2d(x, kernel, stride, padding, dilations=dilation)

    def depthwise(x, kernel):
        return tf.nn.depthwise_conv2d(x, kernel, [1, stride, stride, 1], padding, dilations=[dilation] * 2)

    x = normal(2, size, size + 1, 3)
    assert_equal_gradients(plain, x, normal(window, window, 3, 4))
    for multiplier in (1, 2):
        assert_equal_gradients(depthwise, x, normal(window, window, 3, multiplier))


@pytest.mark.parametrize("size, window, stride, padding", sorted({geometry[:4] for geometry in GEOMETRIES}))
def test_pooling_gradients_equal_tensorflow(size, window, stride, padding):
    x = normal(2, size, size + 1, 3)
    assert_equal_gradients(lambda x: tf.nn.avg_pool2d(x, window, stride, padding), x)
    ties = np.round(x)  # several largest elements in a window
    assert_equal_gradients(lambda x: tf.nn.max_pool2d(x, window, stride, padding), ties)


ACTIVATIONS = {
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "leaky_relu": tf.nn.leaky_relu,
    "sigmoid": tf.sigmoid,
    "tanh": tf.tanh,
    "sqrt": lambda x: tf.sqrt(x * x + 1),
    "rsqrt": lambda x: tf.math.rsqrt(x * x + 1),
    "slice": lambda x: x[1:, 0],
    "negative_slice": lambda x: x[:-1, -2:],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_elementwise_gradients_equal_tensorflow(name):
    assert_equal_gradients(ACTIVATIONS[name], np.concatenate([4 * normal(20, 3), [[0, 6, -6]]]).astype(np.float32))


def test_gelu_gradient_equals_tensorflow_and_at_zero():
    x = tf.constant(np.append(3 * normal(100), [0, 1e-20, -12]).astype(np.float32))
    for function in (gradients.gelu, tf.nn.gelu):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        if function is gradients.gelu:
            ours = tape.gradient(y, x)
    np.testing.assert_allclose(ours, tape.gradient(y, x), atol=2e-6)


def test_grouped_convolution_is_unsupported():
    with pytest.raises(gradients.Unsupported, match="single group"):
        gradients_of(lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"), normal(2, 8, 8, 4), normal(3, 3, 2, 4))


def tiny_network(input_size=16):
    keras.utils.set_random_seed(0)
    network = network_of(tiny_model(input_size=input_size), bn_stats="stored")
    batchnorm.use_stored_statistics(network.model)
    return network


def trained_paths(network, layers=TRAINED_LAYERS):
    return [weight.path for candidate in network.candidates if candidate.path in layers for weight in candidate.weights]


def batches(count, size=16, classes=10, batch=BATCH):
    rng = np.random.default_rng(1)
    images = rng.uniform(0, 255, (count, batch, size, size, 3)).astype(np.float32)
    return images, rng.integers(0, classes, (count, batch)).astype(np.int32)


def keras_losses(network, paths, cfg, images, labels):
    """Returns the losses of training steps in Keras, without dropout; trains the network."""
    for layer in network.model._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0
    freeze(network.model, paths)
    optimizer = keras.optimizers.SGD(
        RATE, momentum=cfg.momentum, weight_decay=cfg.weight_decay or None, global_clipnorm=cfg.global_clipnorm or None
    )
    compile_model(network.model, optimizer)
    losses = []
    for batch in zip(images, labels):
        network.model.reset_metrics()
        losses.append(float(network.model.train_on_batch(*batch)[0]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("momentum, decay, clipnorm", [(0.9, 5e-3, 1.0), (0.0, 0.0, 0.0), (0.5, 0.1, 0.05)])
def test_training_step_equals_keras(momentum, decay, clipnorm):
    network = tiny_network()
    cfg = Config(litert_batch=BATCH, momentum=momentum, weight_decay=decay, global_clipnorm=clipnorm)
    paths, (images, labels) = trained_paths(network), batches(4)
    module, signatures = training_module.make(network, paths, cfg)
    ours = [float(signatures["train"](*batch, RATE)["loss"]) for batch in zip(images, labels)]
    np.testing.assert_allclose(ours, keras_losses(network, paths, cfg, images, labels), rtol=1e-5)
    names = training_module.identifiers(paths)
    for weight in network.trainable_weights:
        if weight.path in names:
            np.testing.assert_allclose(module.weights[names[weight.path]], weight.numpy(), atol=1e-6)
    assert bool(module.slots) == bool(momentum)


def test_identifiers_are_unique_and_plain():
    assert training_module.identifiers(["a/b", "a_b", "c-d/e"]) == {"a/b": "a_b", "a_b": "a_b_2", "c-d/e": "c_d_e"}


NETWORKS = {
    "resnet50": lambda: backbone_network("resnet50"),
    "vgg16": lambda: backbone_network("vgg16"),
    "mobilenetv2": lambda: backbone_network("mobilenetv2"),
    "vit": small_vit_network,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_backbone_consists_of_known_operations(name):
    export.check(NETWORKS[name](), Config(model_name=name, litert_batch=2))


def test_unknown_operation_is_refused_with_its_layer():
    images = keras.Input((8, 8, 3))
    x = keras.layers.Lambda(tf.math.digamma, name="odd")(keras.layers.Conv2D(2, 3, name="first")(images))
    model = keras.Model(images, keras.layers.Dense(2, name="head")(keras.layers.Flatten()(x)))
    with pytest.raises(UsageError, match="Digamma in layer odd"):
        export.check(network_of(model), Config())


def test_batch_statistics_are_refused():
    with pytest.raises(UsageError, match="stored statistics"):
        export.check(network_of(tiny_model(), bn_stats="batch"), Config())


@pytest.mark.parametrize("train_type", ["elastic_training", "prunetrain"])
def test_scheme_that_selects_again_is_refused(train_type):
    with pytest.raises(UsageError, match=train_type):
        export.check(tiny_network(), Config(train_type=train_type))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny network's file, its layers' state in Keras after ten steps, and these steps."""
    folder, network = tmp_path_factory.mktemp("litert"), tiny_network()
    cfg = Config(litert_batch=BATCH, save_litert=True)
    paths, (images, labels) = trained_paths(network), batches(10)
    export.write(network, paths, cfg, folder / "model.tflite")
    losses = keras_losses(network, paths, cfg, images, labels)
    logits = network.model.predict_on_batch(images[0])
    np.savez(folder / "steps.npz", images=images, labels=labels)
    return folder, losses, logits


def in_interpreter(folder, code):
    """Returns what `code` prints as JSON, in a process that does not import TensorFlow; `model` is the model."""
    setup = (
        "import json, sys, numpy as np\nfrom pathlib import Path\n"
        "from scripts.litert_train import Model, read_checkpoint, write_checkpoint\n"
        f"folder = Path({str(folder)!r})\nsteps = np.load(folder / 'steps.npz')\n"
        "model = Model(folder / 'model.tflite', 2)\n"
    )
    check = "\nassert not {'tensorflow', 'keras'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", setup + code + check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_interpreter_alone_trains_as_keras_and_restores(exported):
    folder, losses, logits = exported
    found = in_interpreter(
        folder,
        f"losses = [model.step(*batch, {RATE})[0] for batch in zip(steps['images'], steps['labels'])]\n"
        "write_checkpoint(folder / 'steps.weights.npz', model.save())\n"
        "print(json.dumps([losses, model.logits(steps['images'][0]).tolist()]))",
    )
    np.testing.assert_allclose(found[0], losses, rtol=1e-4)
    np.testing.assert_allclose(found[1], logits, rtol=0, atol=1e-4 * np.abs(logits).max())
    restored = in_interpreter(
        folder,
        "model.restore(read_checkpoint(folder / 'steps.weights.npz'))\n"
        "print(json.dumps(model.logits(steps['images'][0]).tolist()))",
    )
    assert restored == found[1]


def test_file_holds_built_in_operations_alone(exported):
    model = storage.flatbuffer_utils.read_model(str(exported[0] / "model.tflite"))
    assert not [code.customCode for code in model.operatorCodes if code.customCode]


def test_trained_weights_alone_are_variables(exported):
    model = litert_train.Model(exported[0] / "model.tflite", 1)
    assert set(model.save()) == {
        "branch_kernel", "branch_bias", "deep_bn_gamma", "deep_bn_beta", "head_kernel", "head_bias",
    }  # fmt: skip


@pytest.fixture
def tiny(monkeypatch, tmp_path, data_dir):
    """Gives main() with a tiny network in place of the backbone; its run is tmp_path/run."""
    monkeypatch.setattr(models, "assemble", lambda cfg, num_classes: tiny_network(cfg.input_size))
    monkeypatch.setattr(models, "load_weights", lambda network, cfg: network)
    words = "--limit_train 160 --limit_test 40 --batch_size 16 --num_epochs 1".split()
    words += ["--data_dir", data_dir, "--log_dir", str(tmp_path), "--run_name", "run", "--save_litert"]
    return lambda *argv: main([*words, *argv])


@pytest.mark.slow
def test_main_exports_the_network_that_it_saves(tiny, tmp_path):
    assert tiny("--save_model", "--litert_batch", str(BATCH), "--momentum", "0") == 0
    model, images = litert_train.Model(tmp_path / "run" / "model.tflite", 1), batches(1, size=32)[0][0]
    wanted = keras.models.load_model(tmp_path / "run" / "model.keras").predict_on_batch(images)
    np.testing.assert_allclose(model.logits(images), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_select_only_exports_the_network_as_it_was(tiny, tmp_path):
    assert tiny("--select_only", "--litert_batch", str(BATCH)) == 0
    model, images = litert_train.Model(tmp_path / "run" / "model.tflite", 1), batches(1, size=32)[0][0]
    wanted = tiny_network(32).model.predict_on_batch(images)
    np.testing.assert_allclose(model.logits(images), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_refusal_comes_before_the_run_folder(tiny, tmp_path, capsys):
    assert tiny("--train_type", "prunetrain") == 2
    assert "--save_litert needs a scheme" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, momentum", [({}, 0.7), ({"litert_momentum": 0.0}, 0.0), ({"litert_momentum": 0.2}, 0.2)]
)
def test_momentum_is_the_runs_unless_it_is_given(given, momentum):
    network = tiny_network()
    cfg = Config(momentum=0.7, weight_decay=0.0, global_clipnorm=0.0, litert_batch=BATCH, **given)
    module, signatures = training_module.make(network, trained_paths(network, ("head",)), cfg)
    bias, changes = module.weights["head_bias"], []
    images, labels = batches(1)
    for rate in (RATE, 0.0):
        before = bias.numpy()
        signatures["train"](images[0], labels[0], rate)
        changes.append(bias.numpy() - before)
    np.testing.assert_allclose(changes[1], momentum * changes[0], atol=1e-6)


def test_int8_file_computes_what_its_quantized_kernels_do(tmp_path):
    network = tiny_network()
    paths = trained_paths(network, ("head",))
    frozen = storage.quantized_kernels(network, paths)
    content = convert.to_litert(*training_module.make(network, paths, Config(litert_batch=BATCH), frozen))
    images, labels = batches(3)
    files = {"float32": content, "int8": storage.packed(content, "int8")}
    found = {}
    for precision, file in files.items():
        path = tmp_path / f"{precision}.tflite"
        path.write_bytes(file)
        model = litert_train.Model(path, 1)
        found[precision] = [model.step(*batch, RATE)[0] for batch in zip(images, labels)]
    np.testing.assert_allclose(found["int8"], found["float32"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision, share", [("float16", 0.6), ("int8", 0.4)])
def test_smaller_storage_shrinks_the_file_and_keeps_the_loss(tmp_path, precision, share):
    keras.utils.set_random_seed(0)
    images = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(64, 3, activation="relu", name="wide")(images)
    x = keras.layers.Conv2D(64, 3, activation="relu", name="deep")(x)
    model = keras.Model(images, keras.layers.Dense(10, name="head")(keras.layers.GlobalAveragePooling2D()(x)))
    network = network_of(model)
    sizes, losses = {}, {}
    for stored in ("float32", precision):
        path = tmp_path / f"{stored}.tflite"
        export.write(network, trained_paths(network, ("head",)), Config(litert_batch=2, litert_frozen=stored), path)
        sizes[stored] = path.stat().st_size
        batch = batches(1, batch=2)
        losses[stored] = litert_train.Model(path, 1).step(batch[0][0] / 255, batch[1][0], RATE)[0]
    assert sizes[precision] < share * sizes["float32"]
    assert losses[precision] == pytest.approx(losses["float32"], rel=0.05)


@pytest.mark.parametrize("height, width", [(8, 8), (50, 31), (16, 97), (1, 1)])
def test_script_resizes_as_training_does(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    wanted = tf.image.resize(image, (24, 24), method="bilinear")
    np.testing.assert_allclose(litert_train.resized(image, 24), wanted, atol=1e-3)


def test_script_tests_on_the_images_of_main(data_dir):
    import data

    images = data.load(Config(data_dir=data_dir, input_size=8))
    theirs = {
        (image.numpy().astype(np.uint8).tobytes(), int(label))
        for batch in images.test_batches()
        for image, label in zip(*batch)
    }
    digits = litert_train.digits(None)
    ours = {
        (digits.read(image).tobytes(), int(label)) for image, label in zip(digits.images["test"], digits.labels["test"])
    }
    assert ours == theirs


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "bmp")])
def test_script_reads_files_as_training_does(tmp_path, mode, suffix):
    from PIL import Image

    from data.image_files import decode

    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels).convert(mode).save(path)
    np.testing.assert_array_equal(litert_train.read_image(path), decode(path.read_bytes()))


def test_script_reads_16_bits_as_training_does(tmp_path):
    from PIL import Image

    from data.image_files import decode

    path = tmp_path / "deep.png"
    Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)).save(path)
    np.testing.assert_array_equal(litert_train.read_image(path), decode(path.read_bytes()))


def test_script_trains_saves_and_restores(exported, capsys, tmp_path):
    checkpoint = tmp_path / "weights.npz"
    command = [str(exported[0] / "model.tflite"), "--checkpoint", str(checkpoint), "--json"]
    assert litert_train.main([*command, "--num_epochs", "1"]) == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert litert_train.main([*command, "--num_epochs", "0", "--restore", str(checkpoint)]) == 0
    restored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert trained["accuracy"] == restored["accuracy"]
    assert trained["images_per_s"] > 0 and trained["peak_rss_bytes"] > 0


def test_script_keeps_an_existing_checkpoint(exported, capsys, tmp_path):
    checkpoint = tmp_path / "weights.npz"
    checkpoint.write_bytes(b"something else")
    command = [str(exported[0] / "model.tflite"), "--checkpoint", str(checkpoint)]
    assert litert_train.main(command) == 2
    assert "must be new" in capsys.readouterr().err
    assert checkpoint.read_bytes() == b"something else"


def test_worse_epochs_do_not_replace_the_restored_weights(exported, capsys, tmp_path):
    model, checkpoint = str(exported[0] / "model.tflite"), str(tmp_path / "weights.npz")
    assert litert_train.main([model, "--checkpoint", checkpoint, "--num_epochs", "1"]) == 0
    before = litert_train.read_checkpoint(Path(checkpoint))
    again = [model, "--checkpoint", checkpoint, "--restore", checkpoint, "--num_epochs", "1", "--learning_rate", "5"]
    assert litert_train.main(again) == 0
    after = litert_train.read_checkpoint(Path(checkpoint))
    assert all((before[name] == after[name]).all() for name in before)


WRONG_BATCHES = {
    "label": (np.zeros((BATCH, 16, 16, 3), np.float32), np.full(BATCH, 10, np.int32)),
    "negative label": (np.zeros((BATCH, 16, 16, 3), np.float32), np.full(BATCH, -1, np.int32)),
    "size": (np.zeros((BATCH, 17, 16, 3), np.float32), np.zeros(BATCH, np.int32)),
    "number": (np.zeros((BATCH, 16, 16, 3), np.float32), np.zeros(BATCH - 1, np.int32)),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_step_refuses_a_wrong_batch_and_changes_nothing(exported, name):
    model = litert_train.Model(exported[0] / "model.tflite", 1)
    before = model.save()
    with pytest.raises(UsageError, match=r"images of shape \(6, 16, 16, 3\)"):
        model.step(*WRONG_BATCHES[name], RATE)
    after = model.save()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.fixture
def photo_folder(tmp_path):
    from PIL import Image

    for number in range(40):
        folder = tmp_path / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (number, 0, 0)).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_script_refuses_another_number_of_classes(exported, photo_folder, capsys):
    command = [str(exported[0] / "model.tflite"), "--dataset_name", "image_folder", "--image_dir", str(photo_folder)]
    assert litert_train.main(command) == 2
    assert "labels 0 to 9" in capsys.readouterr().err


def test_script_refuses_a_damaged_image_by_name(exported, photo_folder, capsys):
    (photo_folder / "cat" / "bad.png").write_bytes(b"\x89PNG\r\n")
    command = [str(exported[0] / "model.tflite"), "--dataset_name", "image_folder", "--image_dir", str(photo_folder)]
    assert litert_train.main(command) == 2
    assert "bad.png" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--dataset_name", "oxford_iiit_pet"], "oxford_iiit_pet"),
    (["--dataset_name", "image_folder"], "--image_dir"),
    (["--image_dir", "photos"], "--image_dir"),
    (["--num_epochs", "-1"], "--num_epochs"),
    (["--restore", "nowhere.npz"], "nowhere.npz"),
])  # fmt: skip
def test_script_refuses_wrong_flags(exported, capsys, arguments, message):
    assert litert_train.main([str(exported[0] / "model.tflite"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_script_refuses_a_truncated_checkpoint(exported, capsys, tmp_path, share):
    model, path = litert_train.Model(exported[0] / "model.tflite", 1), tmp_path / "weights.npz"
    litert_train.write_checkpoint(path, model.save())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert litert_train.main([str(exported[0] / "model.tflite"), "--restore", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_script_refuses_another_models_checkpoint(exported, tmp_path, capsys):
    path = tmp_path / "weights.npz"
    litert_train.write_checkpoint(path, {"head_bias": np.zeros(10, np.float32)})
    assert litert_train.main([str(exported[0] / "model.tflite"), "--restore", str(path)]) == 2
    assert "trained weights" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_script_refuses_a_truncated_model(exported, tmp_path, share):
    content = (exported[0] / "model.tflite").read_bytes()
    path = tmp_path / "model.tflite"
    path.write_bytes(content[: int(share * len(content))])
    command = [sys.executable, str(ROOT / "scripts" / "litert_train.py"), str(path), "--num_epochs", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "complete file" in done.stderr
