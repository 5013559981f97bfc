"""Weights files of every kind, ImageNet with and without a network, damaged and hostile files."""

import dataclasses
import logging
import os
import pickle
import shutil
import zipfile

import h5py
import keras
import numpy as np
import pytest

import models
from core import reachability
from core.config import Config
from core.errors import RunError, UsageError
from models import imagenet, weight_files, weights

pytestmark = pytest.mark.slow

SMALL_VIT = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}


def build(path="none", model_name="mobilenetv2", **settings):
    settings = {"input_size": 32, "head_init": "glorot", **settings}
    return models.build(Config(model_name=model_name, weights=str(path), **settings), 5)


@pytest.fixture(scope="module")
def load(bare):
    """Loads a file into one and the same backbone, which saves building a network each time."""
    backbone = keras.models.clone_model(bare)

    def load_into_blank(path):
        for variable in backbone.weights:
            variable.assign(np.zeros(variable.shape))
        return backbone, weights.load(backbone, Config("mobilenetv2", weights=str(path)))

    return load_into_blank


def randomize(model):
    """Gives every weight a value of its own, moving statistics too."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.uniform(0.1, 0.2, variable.shape))
    return model


def arrays_of(model):
    return {variable.path: variable.numpy() for variable in model.weights}


def assert_holds(model, expected):
    """Asserts that the backbone of `model` has the weights in `expected`, by path."""
    found = {path: a for path, a in arrays_of(model).items() if not path.startswith("head")}
    assert found.keys() <= expected.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


@pytest.fixture(scope="module")
def bare():
    return randomize(keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(32, 32, 3)))


@pytest.fixture(scope="module")
def whole_files(bare, tmp_path_factory):
    """{kind: path} of files around the backbone `bare`."""
    folder = tmp_path_factory.mktemp("files")
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Rescaling(2.0)(inputs)
    x = keras.layers.GlobalAveragePooling2D()(bare(x))
    nested = keras.Model(inputs, keras.layers.Dense(3)(x))
    top = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), classes=7)
    for variable in top.weights:
        expected = {v.path: v for v in bare.weights}.get(variable.path)
        if expected is not None:
            variable.assign(expected)
    for name, model in {"bare": bare, "nested": nested, "top": top}.items():
        for extension in (".keras", ".h5"):
            model.save(folder / f"{name}{extension}")
        model.save_weights(folder / f"{name}.weights.h5")
    # As published without top: the legacy groups at the root.
    with h5py.File(folder / "bare.h5") as whole, h5py.File(folder / "notop.h5", "w") as notop:
        for key in whole["model_weights"]:
            whole.copy(f"model_weights/{key}", notop)
        notop.attrs.update(whole["model_weights"].attrs)
    # As written before layers' names were kept: by structure alone.
    shutil.copy(folder / "nested.weights.h5", folder / "nameless.weights.h5")
    with h5py.File(folder / "nameless.weights.h5", "r+") as file:
        strip_names(file)
    return {path.name: path for path in folder.iterdir()}


def strip_names(file):
    file.visititems(lambda _, item: item.attrs.pop("name", None) and None)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Empty caches and no network."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    probed = []
    monkeypatch.setattr(reachability, "unreachable", lambda url: probed.append(url) or "no network")
    return probed


@pytest.fixture(scope="module")
def small_vit():
    from models import vit

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL_VIT.items():
            patch.setitem(vit.HYPERPARAMETERS, name, value)
        yield vit


KINDS = [f"{n}{e}" for n in ("bare", "nested", "top") for e in (".keras", ".h5", ".weights.h5")]


@pytest.mark.parametrize("kind", [*KINDS, "notop.h5", "nameless.weights.h5"])
def test_every_kind_of_weights_file_loads(whole_files, bare, load, kind, caplog):
    caplog.set_level(logging.INFO, "adabet")
    backbone, provenance = load(whole_files[kind])
    assert_holds(backbone, arrays_of(bare))
    assert provenance == {
        "source": "file",
        "path": str(whole_files[kind]),
        "sha256": imagenet.file_hash(whole_files[kind]),
        "matched_layers": 104,
        "backbone_layers": 104,
        "note": None,
    }
    assert [record.getMessage() for record in caplog.records if record.name == "adabet"] == [
        f"Weights: 104 of 104 backbone layers matched from {whole_files[kind]}"
    ]


def test_saved_network_loads_with_a_new_head(tmp_path):
    first = build()
    randomize(first.model)
    first.model.save(tmp_path / "model.keras")
    second = build(tmp_path / "model.keras")
    assert_holds(second.model, arrays_of(first.model))
    assert not np.array_equal(second.head.kernel, first.head.kernel)
    assert second.bn_stats == "stored" and second.provenance["source"] == "file"


def test_partial_match_is_reported(whole_files, tmp_path, caplog):
    path = tmp_path / "partial.h5"
    shutil.copy(whole_files["notop.h5"], path)
    with h5py.File(path, "r+") as file:
        file["Conv1"].attrs["weight_names"] = []
    network = build(path)
    assert network.provenance["matched_layers"] == 103
    assert network.provenance["note"] == "not matched, left random: Conv1"
    assert "103 of 104" in caplog.text


def tiny():
    """A functional model with the kinds of layers that old files name differently."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="first")(inputs)
    x = keras.ops.relu(x)  # an operation that is no layer, but stands in the configuration
    x = keras.layers.DepthwiseConv2D(3, use_bias=False, name="depth")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, keras.layers.Conv2D(4, 1, name="second")(x))


def load_into_tiny(path):
    model = randomize(tiny())
    with weight_files.open_layers(str(path)) as stored:
        weights._assign(model, stored, "file", str(path))
    return arrays_of(model)


@pytest.mark.parametrize("renamed", [False, True])
def test_archives_without_name_attributes(tmp_path, renamed):
    """Names come from the configuration, and where they differ, structure decides."""
    model = tiny()
    saved = keras.Model(model.inputs, model.outputs)
    saved.save(tmp_path / "named.keras")
    with zipfile.ZipFile(tmp_path / "named.keras") as archive:
        config = archive.read("config.json").decode()
        archive.extract("model.weights.h5", tmp_path)
    with h5py.File(tmp_path / "model.weights.h5", "r+") as file:
        strip_names(file)
    if renamed:
        config = config.replace('"first"', '"other"').replace('"second"', '"another"')
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as archive:
        archive.writestr("config.json", config)
        archive.write(tmp_path / "model.weights.h5", "model.weights.h5")
    with weight_files.open_layers(str(tmp_path / "old.keras")) as stored:
        names = {layer.name for layer in stored}
    outer = {"other", "another"} if renamed else {"first", "second"}
    assert names == {"depth", "norm"} | outer
    for path, array in load_into_tiny(tmp_path / "old.keras").items():
        np.testing.assert_array_equal(array, arrays_of(model)[path])


@pytest.mark.parametrize("era", ["keras1", "keras2", "chunked"])
def test_old_legacy_files(tmp_path, era):
    model = tiny()
    with h5py.File(tmp_path / "old.h5", "w") as file:
        weighted = [layer for layer in model.layers if layer.weights]
        file.attrs["layer_names"] = [layer.name.encode() for layer in weighted]
        for layer in weighted:
            group = file.create_group(layer.name)
            names = [old_name(era, layer, variable) for variable in layer.weights]
            for name, variable in zip(names, layer.weights, strict=True):
                group[name] = variable.numpy()
            if era == "chunked":
                for number, name in enumerate(names):
                    group.attrs[f"weight_names{number}"] = [name.encode()]
            else:
                group.attrs["weight_names"] = [name.encode() for name in names]
    for path, array in load_into_tiny(tmp_path / "old.h5").items():
        np.testing.assert_array_equal(array, arrays_of(model)[path])


def old_name(era, layer, variable):
    if era == "keras1":  # no scope, other names: only the order is left
        return f"{layer.name}_{variable.name[::-1]}_1:0"
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    name = "depthwise_kernel" if depthwise else variable.name
    return f"{layer.name}_7/{name}:0"  # a scope that Keras 2 numbered


# What is refused.


@pytest.mark.parametrize(
    "value, reason",
    [
        ("imagnet", "another extension"),
        ("weights.pth", "another extension"),
        ("absent.keras", "no such file"),
        ("absent.h5", "no such file"),
        (".", "another extension"),
    ],
)
def test_missing_weights_file_is_refused(value, reason):
    with pytest.raises(UsageError, match=f"--weights takes auto, .*Received: '{value}'.*{reason}"):
        build(value)


def damaged(whole_files, bare, tmp_path, how):
    kind, _, damage = how.partition(" ")
    content = bytearray(whole_files[kind].read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        # One bit of one weight, which only the archive's checksum can tell.
        content[content.index(bare.get_layer("Conv1").kernel.numpy().tobytes())] ^= 1
    elif damage == "text":
        content = b"<html>not found</html>"
    elif damage == "empty":
        content = b""
    path = tmp_path / kind
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "how",
    [
        *(f"bare{e} {d}" for e in (".keras", ".h5") for d in ("truncated", "text", "empty")),
        "bare.weights.h5 truncated",
        "bare.keras flipped",
    ],
)
def test_damaged_weights_files_are_refused(whole_files, bare, load, tmp_path, how):
    path = damaged(whole_files, bare, tmp_path, how)
    with pytest.raises(UsageError, match="--weights needs an intact") as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_without_weights_are_refused(load, tmp_path):
    h5py.File(tmp_path / "empty.h5", "w").close()
    with pytest.raises(UsageError, match="no layer weights"):
        load(tmp_path / "empty.h5")


def test_non_finite_weights_are_refused(whole_files, load, tmp_path):
    path = tmp_path / "nan.h5"
    shutil.copy(whole_files["notop.h5"], path)
    with h5py.File(path, "r+") as file:
        file["bn_Conv1/bn_Conv1/gamma"][3] = np.nan
    with pytest.raises(UsageError, match="finite .* bn_Conv1 "):
        load(path)


@pytest.mark.parametrize("extension", [".keras", ".h5", ".weights.h5"])
def test_weights_of_other_networks_are_refused(whole_files, extension):
    path = whole_files[f"bare{extension}"]
    with pytest.raises(UsageError, match=r"0 of 13 backbone layers.*--model_name"):
        build(path, model_name="vgg16")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_pickles_are_never_loaded(load, tmp_path):
    marker = tmp_path / "executed"
    for name in ("bomb.h5", "bomb.keras", "bomb.weights.h5"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(marker)))
        with pytest.raises(UsageError, match="intact"):
            load(tmp_path / name)
    assert not marker.exists()
    pickle.loads((tmp_path / "bomb.h5").read_bytes())
    assert marker.exists()  # the bomb was live


def test_lambda_layers_are_never_run(bare, load, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    monkeypatch.setenv("LAMBDA_MARKER", str(marker))
    bomb = keras.layers.Lambda(
        lambda x: (open(__import__("os").environ["LAMBDA_MARKER"], "w").close(), x)[1], output_shape=(1, 1, 1280)
    )
    path = tmp_path / "lambda.keras"
    keras.Model(bare.inputs, bomb(bare.output)).save(path)
    marker.unlink(missing_ok=True)
    _, provenance = load(path)
    assert provenance["matched_layers"] == 104
    assert not marker.exists()
    keras.saving.load_model(path, safe_mode=False)(np.zeros((1, 32, 32, 3), "float32"))
    assert marker.exists()  # the layer was live


def test_links_out_of_a_file_are_not_followed(whole_files, load, tmp_path):
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["model_weights"] = h5py.ExternalLink(str(whole_files["bare.h5"]), "/model_weights")
    with pytest.raises(UsageError, match="no layer weights"):
        load(tmp_path / "link.h5")
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        group = file.create_group("layers/conv2d/vars")
        group.create_dataset("0", (2,), "f4", external=str(whole_files["bare.h5"]))
    with pytest.raises(UsageError, match="outside of the file"):
        load(tmp_path / "raw.h5")


# ImageNet.


def test_auto_offline_warns_once_and_records_it(offline, caplog):
    network = build("auto")
    (warning,) = [r for r in caplog.records if r.levelno >= logging.WARNING and r.name == "adabet"]
    assert "RANDOM" in warning.getMessage() and "no network" in warning.getMessage()
    assert network.provenance["source"] == "none" and "no network" in network.provenance["note"]
    assert network.provenance["matched_layers"] == 0 and network.bn_stats == "batch"
    (url,) = offline
    assert url.endswith("/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5")


@pytest.mark.parametrize("model_name", ["vgg16", "vit"])
def test_imagenet_offline_is_an_error(offline, small_vit, model_name):
    with pytest.raises(RunError, match=f"{model_name}[.] Received: they are unavailable .*no network.*--weights none"):
        build("imagenet", model_name=model_name)
    assert len(offline) == 1


def cache(offline_home, whole_files, name="1.0_224_no_top"):
    folder = offline_home / "keras" / "models"
    folder.mkdir(parents=True)
    path = folder / f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{name}.h5"
    shutil.copy(whole_files["notop.h5"], path)
    return path


def test_cached_imagenet_needs_no_network(offline, whole_files, bare, tmp_path):
    path = cache(tmp_path, whole_files)
    network = build("auto")
    assert_holds(network.model, arrays_of(bare))
    assert network.provenance["source"] == "imagenet" and network.provenance["matched_layers"] == 104
    assert network.provenance["path"] == str(path) and network.bn_stats == "stored"
    assert offline == []


def test_cached_file_with_a_wrong_checksum_is_not_used(offline, whole_files, tmp_path, monkeypatch):
    path = cache(tmp_path, whole_files)
    row = models.MODELS["mobilenetv2"]
    for md5, source in [("0" * 32, "none"), (imagenet.file_hash(path, "md5"), "imagenet")]:
        changed = dataclasses.replace(row, alphas={1.0: ("1.0", md5)})
        monkeypatch.setitem(models.MODELS, "mobilenetv2", changed)
        assert build("auto").provenance["source"] == source


def test_damaged_cached_file_is_named(offline, whole_files, tmp_path):
    path = cache(tmp_path, whole_files)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match="1.0_224_no_top.h5 is damaged, delete it"):
        build("imagenet")


def test_download_goes_through_keras(offline, whole_files, bare, monkeypatch, capsys):
    monkeypatch.setattr(reachability, "unreachable", lambda url: None)
    asked = []

    def get_file(name, url, **options):
        print("a progress bar")
        asked.append((url, options))
        return str(whole_files["notop.h5"])

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    assert_holds(build("imagenet", input_size=96).model, arrays_of(bare))
    assert asked[0][0].endswith("1.0_96_no_top.h5")  # a size with a file of its own
    assert capsys.readouterr().out == ""


def test_failing_download_is_like_no_network(offline, monkeypatch):
    monkeypatch.setattr(reachability, "unreachable", lambda url: None)

    def get_file(*arguments, **options):
        raise Exception("URL fetch failure: 503")  # what Keras raises

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    assert build("auto").provenance["source"] == "none"
    with pytest.raises(RunError, match="503"):
        build("imagenet")


# ViT.


def test_position_embedding_of_the_same_size_is_kept(small_vit):
    embedding = np.random.default_rng(0).normal(size=(10, 4)).astype("float32")
    np.testing.assert_array_equal(small_vit.resize_position_embedding(embedding, 10), embedding)


def test_position_embedding_is_resized_in_space(small_vit):
    y, x = np.mgrid[0:4, 0:4] + 0.5
    embedding = np.concatenate([[[7.0, 7.0]], np.stack([y.ravel(), x.ravel()], axis=1)])
    resized = small_vit.resize_position_embedding(embedding, 1 + 8 * 8)
    np.testing.assert_array_equal(resized[0], [7.0, 7.0])  # the class token's
    grid = resized[1:].reshape(8, 8, 2)
    # A ramp stays a ramp, at half the step, but for the edge pixels.
    np.testing.assert_allclose(np.diff(grid[1:-1, 0, 0]), 0.5)
    np.testing.assert_allclose(np.diff(grid[0, 1:-1, 1]), 0.5)
    np.testing.assert_allclose(grid[..., 0].mean(), 2.0)
    smaller = small_vit.resize_position_embedding(embedding, 1 + 2 * 2)
    np.testing.assert_allclose(smaller[1:, 0], [1.0, 1.0, 3.0, 3.0])


def test_position_embedding_needs_square_grids(small_vit):
    assert small_vit.resize_position_embedding(np.zeros((8, 4)), 10) is None
    assert small_vit.resize_position_embedding(np.zeros((10, 4)), 11) is None


@pytest.mark.parametrize("extension", [".keras", ".h5", ".weights.h5", "-bare.weights.h5"])
def test_vit_files_load_at_another_size(small_vit, tmp_path, extension):
    saved = randomize(build(model_name="vit", input_size=64).model)
    path = tmp_path / f"vit{extension}"
    if extension == "-bare.weights.h5":
        saved.get_layer("backbone").save_weights(path)
        with h5py.File(path, "r+") as file:
            strip_names(file)
    elif extension == ".weights.h5":
        saved.save_weights(path)
    else:
        saved.save(path)
    network = build(path, model_name="vit", input_size=32)
    assert network.provenance["matched_layers"] == network.provenance["backbone_layers"] == 20
    expected = arrays_of(saved)
    key = "vit_patching_and_embedding/position_embedding/embeddings"
    expected[key] = small_vit.resize_position_embedding(expected[key], 5)
    assert_holds(network.model, expected)


def preset_in_cache(vit, input_size, **other):
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(image_shape=(input_size, input_size, 3), **{**vit.HYPERPARAMETERS, **other})
    folder = vit.preset_folder(models.BACKBONES["vit"].imagenet.preset)
    randomize(backbone).save_to_preset(folder)
    return backbone, folder


def test_cached_vit_preset_needs_no_network(offline, small_vit, tmp_path):
    backbone, folder = preset_in_cache(small_vit, 48)
    assert folder.startswith(str(tmp_path / "kagglehub" / "models" / "keras" / "vit"))
    network = build("imagenet", model_name="vit", input_size=32)
    assert network.provenance["source"] == "imagenet"
    assert network.provenance["matched_layers"] == network.provenance["backbone_layers"]
    assert network.provenance["sha256"] == imagenet.file_hash(os.path.join(folder, "model.weights.h5"))
    np.testing.assert_array_equal(
        network.model.get_layer("backbone").get_layer("vit_encoder").layer_norm.gamma,
        backbone.get_layer("vit_encoder").layer_norm.gamma,
    )
    assert offline == []


def test_vit_preset_with_other_hyperparameters_is_refused(offline, small_vit):
    preset_in_cache(small_vit, 32, layer_norm_epsilon=1e-3)
    with pytest.raises(RunError, match="layer_norm_epsilon 0.001 instead of 1e-06"):
        build("imagenet", model_name="vit")
