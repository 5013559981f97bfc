"""The Betti numbers of real networks' layers against an independent reference.

The reference takes another road at every step: activations from a Keras
extractor (ViT: from a walk by hand), flattened to float64, scipy's distances on
points, ripser over Z/2.
"""

import keras
import numpy as np
import pytest
from networks import backbone_network, digits_images, network_of, small_vit_network, tiny_model
from ripser import ripser
from scipy.spatial.distance import pdist, squareform

from core.errors import RunError
from models.batchnorm import calibrate
from models.layers import find_candidates
from selection import activations
from selection.activations import distance_pass
from selection.betti import betti_1_of_each
from selection.normalisation import normalisations_behind
from selection.topology import count_bars

BATCH = 32


def reference_count(activation):
    points = np.asarray(activation, np.float64).reshape(len(activation), -1)
    bars = ripser(squareform(pdist(points)), maxdim=1, distance_matrix=True, coeff=2)["dgms"][1]
    return int((bars[:, 1] > bars[:, 0]).sum())


def extracted_activations(network, images):
    outputs = [candidate.layer.output for candidate in network.candidates]
    return keras.Model(network.model.inputs, outputs).predict(images, verbose=0)


def walked_activations(network, images):
    """The outputs of ViT's leaf layers, in order, by its own equations."""
    model = network.model
    backbone = model.get_layer("backbone")
    found = []

    def keep(value):
        found.append(np.asarray(value))
        return value

    x = model.layers[1](images)
    embedding = backbone.get_layer("vit_patching_and_embedding")
    patches = keep(embedding.patch_embedding(x))
    tokens = np.asarray(patches).reshape(len(images), -1, patches.shape[-1])
    class_token = np.repeat(np.asarray(embedding.class_token), len(images), axis=0)
    x = np.concatenate([class_token, tokens], axis=1) + np.asarray(embedding.position_embedding.embeddings)
    encoder = backbone.get_layer("vit_encoder")
    for block in encoder.encoder_layers:
        y = keep(block.layer_norm_1(x))
        attention = block.mha
        query = np.asarray(keep(attention._query_dense(y)))
        key = np.asarray(keep(attention._key_dense(y)))
        value = np.asarray(keep(attention._value_dense(y)))
        logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("bhqk,bkhd->bqhd", weights, value)
        x = np.asarray(keep(attention._output_dense(mixed))) + x
        y = keep(block.layer_norm_2(x))
        y = keep(block.mlp.dense_1(y))
        x = x + np.asarray(keep(block.mlp.dense_2(y)))
    x = keep(encoder.layer_norm(x))
    keep(model.get_layer("head")(x[:, 0]))
    return found


def our_counts(network, images):
    with distance_pass(network) as distances:
        return betti_1_of_each(distances(images))


@pytest.mark.parametrize("model_name, num_layers", [("resnet50", 107), ("vgg16", 14), ("mobilenetv2", 105)])
@pytest.mark.parametrize("seed", [0, 1])
def test_counts_equal_the_reference(model_name, num_layers, seed):
    network = backbone_network(model_name, seed)
    calibrate(network.model, digits_images(128, 32, seed=9)[0])
    images, _ = digits_images(BATCH, 32, seed)
    expected = [reference_count(activation) for activation in extracted_activations(network, images)]
    assert our_counts(network, images) == expected
    assert len(expected) == num_layers and sum(expected) > num_layers


def test_normalisations_are_done_with_the_reading_of_their_inputs():
    # ResNet50 without its head: 53 convolutions, each with its normalisation; 33 of these with a ReLU behind.
    network = backbone_network("resnet50")
    found = normalisations_behind(network)
    assert len(found) == 53 and sum(one.clipping is not None for one in found.values()) == 33
    assert found["conv2_block1_1_conv"].layer.path == "conv2_block1_1_bn"
    assert found["conv2_block1_1_conv"].clipping.name == "conv2_block1_1_relu"
    assert found["conv2_block1_3_conv"].clipping is None  # the sum comes first


def test_what_others_need_is_not_normalised_in_place():
    inputs = keras.Input((8, 8, 3))
    shared = keras.layers.Conv2D(4, 1, name="shared")(inputs)
    alone = keras.layers.Conv2D(4, 1, name="alone")(keras.layers.BatchNormalization(name="bn_of_shared")(shared))
    normal = keras.layers.BatchNormalization(name="bn_of_alone")(alone)
    last = keras.layers.Conv2D(4, 1, name="last")(keras.layers.Add()([keras.layers.ReLU()(normal), normal, shared]))
    head = keras.layers.BatchNormalization(name="head")(last)
    found = normalisations_behind(network_of(keras.Model(inputs, [head, last]), bn_stats="stored"))
    assert {path: (one.layer.name, one.clipping) for path, one in found.items()} == {"alone": ("bn_of_alone", None)}


def test_only_clipping_at_zero_is_done_in_place():
    clippings = {  # what stands behind a normalisation -> the bounds it is taken for, or None
        "relu": (keras.layers.ReLU(), (0, np.inf)),
        "relu6": (keras.layers.ReLU(6), (0, 6)),
        "leaky": (keras.layers.ReLU(negative_slope=0.1), None),
        "threshold": (keras.layers.ReLU(threshold=0.5), None),
        "act_relu": (keras.layers.Activation("relu"), (0, np.inf)),
        "act_relu6": (keras.layers.Activation("relu6"), (0, 6)),
        "act_tanh": (keras.layers.Activation("tanh"), None),
    }
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Rescaling(1 / 255)(inputs)

    def branch(name, clipping, channels=8, axis=-1):
        y = keras.layers.Conv2D(channels, 3, name=name)(x)
        return keras.layers.Flatten()(clipping(keras.layers.BatchNormalization(axis, name=f"{name}_bn")(y)))

    branches = [branch(name, layer) for name, (layer, _) in clippings.items()]
    branches.append(branch("six_channels", keras.layers.ReLU(), channels=6))
    branches.append(branch("rows", keras.layers.ReLU(), channels=6, axis=1))
    head = keras.layers.Dense(10, name="head")(keras.layers.Concatenate()(branches))
    network = network_of(keras.Model(inputs, head), bn_stats="stored")
    images, _ = digits_images(BATCH, 8)
    calibrate(network.model, images)
    found = normalisations_behind(network)
    assert {path: one.bounds if one.clipping else None for path, one in found.items()} == {
        name: bounds for name, (_, bounds) in clippings.items()
    }
    activations_ = extracted_activations(network, images)
    with distance_pass(network) as distances:
        matrices = distances(images)
    assert betti_1_of_each(matrices) == [reference_count(activation) for activation in activations_]
    np.testing.assert_allclose(matrices[-1], squareform(pdist(activations_[-1].astype(np.float64))), rtol=1e-6)


def test_a_model_that_is_called_twice_counts_at_its_first_call():
    keras.utils.set_random_seed(0)
    inner_inputs = keras.Input((8, 8, 4))
    y = keras.layers.Conv2D(4, 3, padding="same", name="conv")(inner_inputs)
    inner = keras.Model(inner_inputs, keras.layers.ReLU()(keras.layers.BatchNormalization(name="bn")(y)), name="inner")
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 1, name="stem")(keras.layers.Rescaling(1 / 255)(inputs))
    once = inner(x)
    head = keras.layers.Dense(10, name="head")(keras.layers.Flatten()(inner(once)))
    network = network_of(keras.Model(inputs, head), bn_stats="stored")
    images, _ = digits_images(BATCH, 8)
    calibrate(network.model, images)
    assert [one.layer.name for one in normalisations_behind(network).values()] == ["bn"]  # in place, both times
    parts = keras.Model(inner_inputs, [inner.get_layer("conv").output, inner.get_layer("bn").output])
    stem = keras.Model(inputs, x)(images)
    expected = [stem, *parts(stem), network.model(images)]
    assert our_counts(network, images) == [reference_count(activation) for activation in expected]


@pytest.mark.parametrize("model_name", ["resnet50", "mobilenetv2"])
@pytest.mark.parametrize("bn_stats", ["stored", "batch"])
def test_normalising_in_place_gives_the_bits_of_the_framework(bn_stats, model_name, monkeypatch):
    network = backbone_network(model_name, bn_stats=bn_stats)
    calibrate(network.model, digits_images(128, 32, seed=9)[0])
    images, _ = digits_images(BATCH, 32)
    with distance_pass(network) as distances:
        in_place = distances(images)
    assert activations._numpy_sees_tensors()
    monkeypatch.setattr(activations, "_numpy_sees_tensors", lambda: False)
    with distance_pass(network) as distances:
        by_framework = distances(images)
    # On the way the sums are other ones; in the head's output any other bit would show.
    for ours, theirs in zip(in_place, by_framework, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_array_equal(in_place[-1], by_framework[-1])


def test_counts_equal_the_reference_inside_a_vit():
    network = small_vit_network()
    images, _ = digits_images(BATCH, 32)
    expected = [reference_count(activation) for activation in walked_activations(network, images)]
    assert our_counts(network, images) == expected
    assert len(expected) == 1 + 2 * 8 + 2 and sum(expected) > len(expected)


def test_batch_statistics_are_used_and_kept():
    network = network_of(tiny_model(), bn_stats="batch")
    images, _ = digits_images(BATCH, 16)
    moving = [w.numpy() for w in network.model.non_trainable_weights]
    counts, points = count_bars(network, [images], 1)
    for before, after in zip(moving, network.model.non_trainable_weights, strict=True):
        np.testing.assert_array_equal(before, after.numpy())
    assert points == BATCH
    # The same, with the batch's statistics made the stored ones.
    calibrate(network.model, images)
    stored = network_of(network.model, bn_stats="stored")
    assert counts[0].tolist() == our_counts(stored, images)


def test_the_device_path_gives_the_same_distances(monkeypatch):
    network = network_of(tiny_model())
    images, _ = digits_images(BATCH, 16)
    with distance_pass(network) as distances:
        on_cpu = distances(images)
    monkeypatch.setattr("core.environment.device", lambda: "GPU:0")
    with distance_pass(network) as distances:
        on_device = distances(images)
    for ours, theirs in zip(on_cpu, on_device, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)


def test_the_network_is_left_as_it_was():
    network = network_of(tiny_model())
    images, _ = digits_images(BATCH, 16)
    before = network.model.predict(images, verbose=0)
    our_counts(network, images)
    assert not [layer for layer in network.model.layers if "call" in vars(layer)]
    np.testing.assert_array_equal(network.model.predict(images, verbose=0), before)


def test_candidates_stand_in_forward_order_with_their_sizes():
    network = network_of(tiny_model())
    assert [(c.path, c.type, c.activation_size, c.num_weights) for c in network.candidates] == [
        ("stem", "Conv2D", 8 * 8 * 8, 3 * 3 * 3 * 8 + 8),
        ("branch", "Conv2D", 8 * 8 * 8, 3 * 3 * 8 * 8 + 8),
        ("branch_bn", "BatchNormalization", 8 * 8 * 8, 16),
        ("deep", "Conv2D", 4 * 4 * 12, 3 * 3 * 8 * 12 + 12),
        ("deep_bn", "BatchNormalization", 4 * 4 * 12, 24),
        ("head", "Dense", 10, 12 * 10 + 10),
    ]


def test_a_layer_whose_output_has_no_batch_axis_is_no_candidate():
    paths = [candidate.path for candidate in find_candidates(small_vit_network().model)]
    assert not [path for path in paths if "position" in path]
    assert len(paths) == len(set(paths)) == 19


def test_activations_that_are_not_finite_are_named():
    network = network_of(tiny_model())
    network.model.get_layer("branch").bias.assign(np.full(8, np.inf))
    images, _ = digits_images(BATCH, 16)
    with pytest.raises(RunError, match="branch, batch 1"):
        count_bars(network, [images], 1)
