"""The classifiers of keras.applications: the table, weights, selection and training of each family."""

import gc
import re

import keras
import numpy as np
import pytest
from keras.src.initializers import random_initializers
from networks import backbone_network, digits_images
from ripser import ripser
from scipy.spatial.distance import pdist, squareform

import models
from core.config import Config
from core.errors import UsageError
from main import main
from memory import estimate
from models import imagenet, weights
from models.backbones import PREPROCESSING
from models.batchnorm import calibrate
from models.freezing import freeze
from models.layers import watching
from models.table import APPLICATIONS, BACKBONES, MODELS
from selection.activations import distance_pass
from selection.betti import betti_1_of_each

CONSTRUCTORS = {name: row.constructor for name, row in MODELS.items() if row.constructor}
MODULES = {
    "ConvNeXt": "convnext", "DenseNet": "densenet", "EfficientNetB": "efficientnet", "EfficientNetV2": "efficientnet_v2",
    "InceptionR": "inception_resnet_v2", "InceptionV": "inception_v3", "MobileNetV2": "mobilenet_v2",
    "MobileNetV3": "mobilenet_v3", "MobileNet": "mobilenet", "NASNet": "nasnet", "VGG16": "vgg16", "VGG19": "vgg19",
    "Xception": "xception",
}  # fmt: skip


def module_of(constructor):
    """The module of keras.applications that has the constructor's `preprocess_input`."""
    if constructor.startswith("ResNet"):
        name = "resnet_v2" if constructor.endswith("V2") else "resnet"
    else:
        name = next(module for start, module in MODULES.items() if constructor.startswith(start))
    return getattr(keras.applications, name)


@pytest.fixture
def zero_weights(monkeypatch):
    """Makes random initializers give zeros, which builds large networks in seconds."""
    for kind in ("VarianceScaling", "RandomNormal", "TruncatedNormal", "RandomUniform"):
        initializer = getattr(random_initializers, kind)
        monkeypatch.setattr(initializer, "__call__", lambda self, shape, dtype=None: keras.ops.zeros(shape, dtype))
    yield
    gc.collect()  # hundreds of megabytes in reference cycles


def images(count=2, size=32):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype("float32")


# The table.


def test_table_has_every_classifier_of_keras():
    theirs = {name for name in dir(keras.applications) if name[0].isupper()}
    assert set(CONSTRUCTORS.values()) == theirs
    assert all(name == constructor.lower() for name, constructor in CONSTRUCTORS.items())
    assert list(BACKBONES) == ["resnet50", "vgg16", "mobilenetv2", "vit"]


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_row_has_the_networks_candidates_and_size(zero_weights, name):
    row = MODELS[name]
    cfg = Config(model_name=name, weights="none", input_size=row.min_size)
    network = models.assemble(cfg, 5)
    assert len(network.candidates) == row.candidates
    assert f" {row.candidates} layers" in row.help
    assert network.model(images(1, row.min_size)).shape == (1, 5)
    with pytest.raises(ValueError, match="Input size must be at least"):
        getattr(keras.applications, row.constructor)(
            include_top=False, weights=None, input_shape=(row.min_size - 1, row.min_size - 1, 3)
        )


class Asked(Exception):
    """Stops keras.applications where it would download."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_row_names_the_files_of_keras(zero_weights, monkeypatch, name):
    from keras.src.utils import file_utils  # where keras.applications looks get_file up

    def get_file(fname, origin, file_hash=None, **_):
        raise Asked(origin, file_hash)

    monkeypatch.setattr(file_utils, "get_file", get_file)
    row = MODELS[name]
    for alpha in row.alphas or [None]:
        for size in [*row.imagenet.sizes, 224]:
            width = {} if alpha is None else {"alpha": alpha}
            with pytest.raises(Asked) as asked:
                getattr(keras.applications, row.constructor)(include_top=False, input_shape=(size, size, 3), **width)
            source = imagenet.source_of(Config(model_name=name, model_alpha=alpha))
            assert asked.value.args == (imagenet.weights_url(source, size), source.checksum)
            if alpha not in (None, 1.0) and row.imagenet.sizes:
                break


@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row.preprocessing != "efficientnet"])
def test_preprocessing_is_the_modules(name):
    row = MODELS[name]
    inputs = keras.Input((32, 32, 3))
    ours = keras.Model(inputs, PREPROCESSING[row.preprocessing](inputs))(images())
    theirs = module_of(row.constructor).preprocess_input(images()) if row.constructor else images() / 127.5 - 1
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_efficientnet_with_its_weights_normalizes_like_torch():
    std = np.array([0.229, 0.224, 0.225])
    normalization = keras.layers.Normalization(mean=[0.485, 0.456, 0.406], variance=std)  # as in the ImageNet files
    ours = normalization(np.asarray(PREPROCESSING["efficientnet"](images())) / 255)
    np.testing.assert_allclose(ours, PREPROCESSING["torch"](images()), atol=1e-5)


# Names and widths.


def test_list_models_prints_the_table(capsys):
    assert main(["--list_models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(MODELS) + 1
    (row,) = [line for line in lines if line.startswith("mobilenetv3small ")]
    assert row.split()[1:3] == [str(MODELS["mobilenetv3small"].candidates), "32"] and "--model_alpha 0.75, 1" in row


@pytest.mark.parametrize(
    "name, closest", [("EfficientNetV2B0", "efficientnetv2b0"), ("resnet", "resnet50"), ("mobilenet_v2", "mobilenetv2")]
)
def test_unknown_name_gets_the_closest(capsys, name, closest):
    assert main(["--model_name", name]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(rf"Received: '{name}'; the closest: .*{closest}", line)


@pytest.mark.slow
def test_model_alpha_sets_the_width():
    widths = {}
    for alpha in (None, 0.35, 1.0):
        network = models.assemble(Config(model_name="mobilenetv2", model_alpha=alpha, weights="none", input_size=32), 5)
        widths[alpha] = network.model.count_params()
        assert len(network.candidates) == 105
    assert widths[0.35] < widths[1.0] == widths[None]
    assert models.short_name(Config(model_name="mobilenetv2", model_alpha=0.35)) == "mobilenetv2_alpha0.35"


@pytest.mark.parametrize(
    "flags, rule",
    [
        ({"model_name": "mobilenetv2", "model_alpha": 0.3}, "one of 0.35, 0.5, 0.75, 1, 1.3, 1.4"),
        ({"model_name": "resnet50", "model_alpha": 0.5}, "needs a MobileNet"),
        ({"model_name": "resnet50", "keep_head": True}, "--keep_head needs --model_name PATH"),
        ({"model_name": "xception", "input_size": 70}, "at least 71"),
    ],
)
def test_flags_of_other_networks_are_refused(flags, rule):
    with pytest.raises(UsageError, match=rule):
        models.check_flags(Config(**{"input_size": 96, **flags}))


def test_default_input_size_is_at_least_the_networks():
    assert models.default_input_size("xception", 32) == 71
    assert models.default_input_size("xception", 224) == 224
    assert models.default_input_size("vit", 32) == models.default_input_size("resnet50", 32) == 32


@pytest.mark.slow
def test_automatic_names_do_not_depend_on_the_process():
    def paths():
        network = models.assemble(Config(model_name="inceptionv3", weights="none", input_size=75), 5)
        return [candidate.path for candidate in network.candidates]

    first = paths()
    keras.layers.Conv2D(1, 1)
    assert paths() == first and first[0] == "conv2d"


# ImageNet weights.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inceptionv3", "efficientnetb0", "convnexttiny", "mobilenetv3small", "densenet121"])
def test_legacy_file_gives_kerass_own_features(tmp_path, name):
    """Automatic names, a Normalization with weights, and nested models are loaded as Keras loads them."""
    row = MODELS[name]
    size = row.min_size
    keras.layers.Conv2D(1, 1)  # so that automatic names differ
    keras.utils.set_random_seed(1)
    theirs = getattr(keras.applications, row.constructor)(
        include_top=False, weights=None, input_shape=(size, size, 3), pooling="avg"
    )
    rng = np.random.default_rng(0)
    for variable in theirs.weights:
        if variable.path.endswith(("/mean", "/variance", "moving_variance")):
            variable.assign(rng.uniform(0.2, 0.5, variable.shape))
    for layer in theirs.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.weights:
            layer.finalize_state()
    theirs.save(tmp_path / "theirs.h5")
    network = models.build(Config(model_name=name, weights=str(tmp_path / "theirs.h5"), input_size=size), 5)
    assert network.provenance["matched_layers"] == network.provenance["backbone_layers"]
    assert network.provenance["note"] is None
    inputs = images(2, size)
    if row.preprocessing == "efficientnet":
        prepared = np.asarray(PREPROCESSING["efficientnet"](inputs))
    else:
        prepared = module_of(row.constructor).preprocess_input(inputs.copy())
    ours = keras.Model(network.model.input, network.head.input)(inputs)
    np.testing.assert_allclose(ours, theirs(prepared), rtol=1e-3, atol=1e-4)


def test_order_matches_all_layers_or_none():
    stored = [weights.weight_files.StoredLayer(f"other{n}", None, {"kernel": np.zeros((n, 2), "f4")}) for n in (1, 2)]
    variables = [keras.Variable(np.ones((n, 2), "f4"), name="kernel") for n in (1, 2)]
    targets = [weights.TargetLayer(f"layer{n}", "", [variable]) for n, variable in enumerate(variables)]
    assert len(weights.match(targets, stored)) == 2
    assert weights.match(targets, stored[::-1]) == [] == weights.match(targets[:1], stored)


# Selection and training.


def reference_counts(network, batch):
    """b1 of each candidate's output in an eager pass, by scipy's distances and ripser over Z/2."""
    found = {}

    def observe(layer, output):
        found.setdefault(layer.path, np.asarray(output, np.float64).reshape(len(output), -1))
        return output

    with watching([candidate.layer for candidate in network.candidates], observe):
        network.model(batch, training=False)
    counts = []
    for candidate in network.candidates:
        bars = ripser(squareform(pdist(found[candidate.path])), maxdim=1, distance_matrix=True, coeff=2)["dgms"][1]
        counts.append(int((bars[:, 1] > bars[:, 0]).sum()))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnetv2b0", "convnexttiny", "mobilenetv3small", "densenet121"])
def test_counts_equal_the_reference_and_selected_weights_move(name):
    network = backbone_network(name)
    calibrate(network.model, digits_images(64, 32, seed=9)[0])
    batch, labels = digits_images(32, 32)
    with distance_pass(network) as distances:
        counts = betti_1_of_each(distances(batch))
    assert counts == reference_counts(network, batch)
    assert sum(counts) > len(counts)

    middle = network.candidates[len(network.candidates) // 2]
    trained = {weight.path for weight in [*middle.weights, *network.head.weights]}
    freeze(network.model, trained)
    before = {variable.path: variable.numpy() for variable in network.model.weights}
    network.model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.model.train_on_batch(batch, labels)
    moved = {v.path for v in network.model.weights if not np.array_equal(before[v.path], v.numpy())}
    assert {path for path in moved if "seed_generator" not in path} == trained


@pytest.mark.slow
def test_grouped_convolutions_have_no_memory_estimate(caplog):
    """XLA computes ConvNeXt's grouped convolutions in a workspace that the estimate does not know."""
    network = backbone_network("convnexttiny")
    network.model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(UsageError, match=r"grouped convolution that Keras compiles with XLA"):
        estimate.of_training(network.model, (4, 32, 32, 3))
    assert estimate.bytes_or_none(estimate.of_training, network.model, 4) is None
    assert "cannot be estimated" in caplog.text
