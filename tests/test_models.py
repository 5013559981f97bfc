"""The networks: tables, preprocessing, architecture, batch normalization, saved files."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from own_layers import NormalizedConv

import models
from core.config import Config
from core.errors import UsageError
from models import backbones, batchnorm, weights

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL_VIT = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}


def build(model_name, num_classes=5, **settings):
    # A kernel near zero would hide differences of the logits.
    settings = {"weights": "none", "input_size": 32, "head_init": "glorot", **settings}
    return models.build(Config(model_name=model_name, **settings), num_classes)


@pytest.fixture(scope="module")
def small_vit():
    """Makes `models.build` build a ViT of two blocks instead of twelve."""
    from models import vit

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL_VIT.items():
            patch.setitem(vit.HYPERPARAMETERS, name, value)
        yield vit


@pytest.fixture(scope="module")
def networks(small_vit):
    """One small network of each kind, random weights."""
    keras.utils.set_random_seed(0)
    return {name: build(name) for name in models.BACKBONES}


def images(count=2, size=32):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype("float32")


def python(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_tables_do_not_import_tensorflow():
    code = (
        "import sys, models; models.check_input_size('vit', 32); "
        "print({'tensorflow', 'keras', 'keras_hub'} & set(sys.modules))"
    )
    assert python(code).strip() == "set()"


@pytest.mark.parametrize(
    "name, size", [("resnet50", 32), ("vgg16", 33), ("mobilenetv2", 224), ("vit", 16), ("vit", 240)]
)
def test_valid_input_sizes_are_accepted(name, size):
    models.check_input_size(name, size)


@pytest.mark.parametrize(
    "name, size, nearest", [("resnet50", 31, 32), ("vit", 0, 16), ("vit", 225, 224), ("vit", -5, 16)]
)
def test_invalid_input_sizes_are_refused_with_advice(name, size, nearest):
    with pytest.raises(UsageError, match=rf"Received: {size}; .* {nearest}.$"):
        models.check_input_size(name, size)
    with pytest.raises(UsageError, match="--input_size"):
        build(name, input_size=size)


@pytest.mark.parametrize(
    "key, theirs",
    [
        ("caffe", keras.applications.resnet50.preprocess_input),
        ("caffe", keras.applications.vgg16.preprocess_input),
        ("symmetric", keras.applications.mobilenet_v2.preprocess_input),
        ("symmetric", lambda x: (x / 255 - 0.5) / 0.5),
    ],
)
def test_preprocessing_equals_keras(key, theirs):
    inputs = keras.Input((32, 32, 3))
    model = keras.Model(inputs, backbones.PREPROCESSING[key](inputs))
    np.testing.assert_allclose(model(images()), theirs(images()), atol=1e-5)


@pytest.mark.parametrize("name, count", [("resnet50", 107), ("vgg16", 14), ("mobilenetv2", 105), ("vit", 2 * 8 + 3)])
def test_candidates_of_each_backbone(networks, name, count):
    network = networks[name]
    assert len(network.candidates) == count
    assert network.candidates[-1].layer is network.head
    offered = {weight.path for c in network.candidates for weight in c.weights}
    assert {w.path for w in network.trainable_weights} - offered == (
        {"vit_patching_and_embedding/class_token", "vit_patching_and_embedding/position_embedding/embeddings"}
        if name == "vit"
        else set()
    )


@pytest.mark.parametrize("name, num_layers", [("resnet50", 106), ("vgg16", 13), ("mobilenetv2", 104)])
def test_cnns_are_flat_and_complete(networks, name, num_layers):
    network = networks[name]
    weighted = [layer for layer in network.model.layers if layer.weights]
    assert len(weighted) == num_layers + 1  # and the head
    assert network.provenance["backbone_layers"] == num_layers
    assert not any(isinstance(layer, keras.Model) for layer in network.model.layers)


def test_any_layer_can_be_an_output(networks):
    model = networks["resnet50"].model
    part = keras.Model(model.input, model.get_layer("conv4_block1_out").output)
    assert part(images()).shape == (2, 2, 2, 1024)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(models.BACKBONES))
def test_logits_from_raw_images(networks, name):
    network = networks[name]
    logits = network.model(images())
    assert logits.shape == (2, 5) and logits.dtype == "float32"
    assert network.head.name == "head" and network.head is network.model.layers[-1]
    assert network.model.get_layer("dropout").rate == 0.2
    np.testing.assert_allclose(network.model.predict(images().astype("uint8"), verbose=0), logits, atol=1e-4)


@pytest.mark.slow
def test_other_sizes_and_class_counts(small_vit):
    for name, size in [("mobilenetv2", 45), ("vgg16", 50), ("vit", 48)]:
        network = build(name, num_classes=3, input_size=size, dropout=0.5)
        assert network.model(images(size=size)).shape == (2, 3)
        assert network.model.get_layer("dropout").rate == 0.5


@pytest.mark.parametrize("settings, low, high", [({}, 0.8e-3, 1.2e-3), ({"head_init": "glorot"}, 0.03, 0.05)])
def test_new_head_starts_small(settings, low, high):
    """So that the first steps do not undo the pretraining; not at zero, where no gradient reaches the backbone."""
    head = models.build(Config(model_name="mobilenetv2", weights="none", input_size=32, **settings), 10).head
    assert low < head.kernel.numpy().std() < high and np.all(head.bias.numpy() == 0)


def test_vit_reads_the_class_token(networks):
    model = networks["vit"].model
    tokens = model.get_layer("backbone")(model.get_layer("preprocessing")(images()))
    assert tokens.shape == (2, 1 + 4, 32)
    np.testing.assert_allclose(networks["vit"].head(tokens[:, 0]), model(images()), atol=1e-5)


def test_vit_weights_are_accounted_for(networks):
    # Per block 2 normalizations, 4 attention and 2 dense layers; beside them the
    # patches, the last normalization, the position embedding, the class token.
    assert networks["vit"].provenance["backbone_layers"] == 2 * 8 + 4


def test_bn_stats_policy(networks):
    assert [networks[name].bn_stats for name in models.BACKBONES] == ["batch", None, "batch", None]
    assert batchnorm.resolve("auto", pretrained=True) == "stored"
    assert batchnorm.resolve("auto", pretrained=False) == "batch"
    for choice in ("stored", "batch"):
        assert {batchnorm.resolve(choice, pretrained) for pretrained in (True, False)} == {choice}
    assert len(batchnorm.layers(networks["resnet50"].model)) == 53
    assert len(batchnorm.layers(networks["mobilenetv2"].model)) == 52


def test_random_mobilenet_statistics_can_catch_up(networks):
    momenta = {layer.momentum for layer in batchnorm.layers(networks["mobilenetv2"].model)}
    assert momenta == {0.99}


def small_bn_model(nested):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, use_bias=False, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="bn")(x)
    if nested:
        x = keras.Model(inputs, x)(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x))


def snapshot(model):
    return [variable.numpy() for variable in model.weights]


def moved(model, before):
    """Returns the paths of the weights that differ from `before`."""
    pairs = zip(model.weights, before, strict=True)
    return {weight.path for weight, old in pairs if not np.array_equal(weight.numpy(), old)}


def fit_two_steps(model, size):
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    labels = np.array([0, 0, 0, 1, 0, 0, 0, 1])
    model.fit(images(8, size) / 255, labels, batch_size=4, epochs=1, verbose=0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mode", ["stored", "batch"])
@pytest.mark.parametrize("frozen", [False, True])
def test_bn_mode_is_independent_of_freezing(nested, mode, frozen):
    model = small_bn_model(nested)
    batchnorm.MODES[mode](model)
    (bn,) = batchnorm.layers(model)
    for variable in (bn.gamma, bn.beta):
        variable.trainable = not frozen
    assert bn.trainable
    before = snapshot(model)
    fit_two_steps(model, 8)
    statistics = {"bn/moving_mean", "bn/moving_variance"} if mode == "batch" else set()
    affine = set() if frozen else {"bn/gamma", "bn/beta"}
    others = {"conv/kernel", "head/kernel", "head/bias"}
    assert moved(model, before) == statistics | affine | others


@pytest.mark.parametrize("mode", ["stored", "batch"])
def test_bn_mode_holds_inside_custom_layers(mode):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(NormalizedConv(4, name="block")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    assert len(batchnorm.layers(model)) == 1
    batchnorm.MODES[mode](model)
    before = snapshot(model)
    fit_two_steps(model, 8)
    statistics = {f"block/inner_norm/moving_{name}" for name in ("mean", "variance")}
    assert {path for path in moved(model, before) if "moving" in path} == (statistics if mode == "batch" else set())


def test_training_mode_uses_stored_statistics():
    model = small_bn_model(nested=False)
    (bn,) = batchnorm.layers(model)
    bn.moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    assert not np.allclose(model(images(4, 8), training=True), model(images(4, 8), training=False))
    batchnorm.use_stored_statistics(model)
    np.testing.assert_array_equal(model(images(4, 8), training=True), model(images(4, 8), training=False))


def test_statistics_kept_uses_batch_without_updates():
    model = small_bn_model(nested=True)
    (bn,) = batchnorm.layers(model)
    batch = images(4, 8)
    plain = model(batch, training=False).numpy()
    before = snapshot(model)
    with batchnorm.statistics_kept(model, "batch"):
        as_in_training = model(batch, training=False).numpy()
    assert moved(model, before) == set()
    with batchnorm.statistics_kept(model, "stored"):
        np.testing.assert_array_equal(model(batch, training=False), plain)
    np.testing.assert_array_equal(model(batch, training=False), plain)
    np.testing.assert_array_equal(model(batch, training=True), as_in_training)
    assert moved(model, before) == {"bn/moving_mean", "bn/moving_variance"}
    assert bn.momentum == 0.99


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A MobileNetV2 loaded from a file, fitted with one layer and the head unfrozen."""
    path = tmp_path_factory.mktemp("calibrated") / "model.keras"
    calibrated = build("mobilenetv2", num_classes=2)
    # Random weights on initial statistics let the signal die out.
    for layer in batchnorm.layers(calibrated.model):
        layer.momentum = 0.0
    calibrated.model(images(8), training=True)
    calibrated.model.save(path)
    network = build("mobilenetv2", num_classes=2, weights=str(path))
    unfrozen = {"block_16_project_BN/gamma", "block_16_project_BN/beta", "head/kernel", "head/bias"}
    for variable in network.model.trainable_variables:
        variable.trainable = variable.path in unfrozen
    listed = {variable.path for variable in network.model.trainable_variables}
    before = snapshot(network.model)
    fit_two_steps(network.model, 32)
    return network, unfrozen, listed, moved(network.model, before)


@pytest.mark.slow
def test_fit_moves_exactly_the_unfrozen_variables(fitted):
    network, unfrozen, listed, moved_paths = fitted
    assert network.bn_stats == "stored"
    assert listed == unfrozen
    assert moved_paths == unfrozen
    assert all(layer.trainable for layer in network.model.layers)


@pytest.mark.slow
def test_saved_networks_load_with_keras_alone(fitted, networks, tmp_path):
    saved = {"stored": fitted[0], "vgg16": networks["vgg16"], "vit": networks["vit"]}
    for name, network in saved.items():
        network.model.save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name}.npy", network.model.predict(images(), verbose=0))
    np.save(tmp_path / "images.npy", images())
    code = """
import os, sys
sys.path = [path for path in sys.path if path not in ("", os.getcwd())]
import keras, numpy as np
folder = sys.argv[1]
for name in ("stored", "vgg16", "vit"):
    if name == "vit":
        import keras_hub
    model = keras.saving.load_model(f"{folder}/{name}.keras", safe_mode=True)
    logits = model.predict(np.load(f"{folder}/images.npy"), verbose=0)
    np.testing.assert_allclose(logits, np.load(f"{folder}/{name}.npy"), rtol=1e-4, atol=1e-4)
    plain = {type(l).__module__.split(".")[0] for l in model.layers}
    assert plain <= {"keras", "keras_hub"}, plain
assert "models" not in sys.modules
"""
    python(code, tmp_path)


def test_target_layers_have_the_paths_of_keras_files(networks, tmp_path):
    import h5py

    for name in ("mobilenetv2", "vit"):
        model = networks[name].model
        model.save_weights(tmp_path / f"{name}.weights.h5")
        stored = set()
        with h5py.File(tmp_path / f"{name}.weights.h5") as file:
            file.visit(lambda path: stored.add(path.rpartition("/vars/")[0]))
        assert {layer.structure for layer in weights.target_layers(model)} == stored - {""}
