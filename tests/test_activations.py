"""The Betti numbers of real networks' layers against an independent reference.

The reference differs at every step: activations from a Keras
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
from selection.activations import distance_pass
from selection.betti import betti_1_of_each
from selection.topology import count_bars

pytestmark = pytest.mark.slow

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
def test_counts_of_backbones_equal_the_reference(model_name, num_layers, seed):
    network = backbone_network(model_name, seed)
    calibrate(network.model, digits_images(128, 32, seed=9)[0])
    images, _ = digits_images(BATCH, 32, seed)
    expected = [reference_count(activation) for activation in extracted_activations(network, images)]
    assert our_counts(network, images) == expected
    assert len(expected) == num_layers and sum(expected) > num_layers


def test_layer_called_twice_counts_at_its_first_call():
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
    parts = keras.Model(inner_inputs, [inner.get_layer("conv").output, inner.get_layer("bn").output])
    stem = keras.Model(inputs, x)(images)
    expected = [stem, *parts(stem), network.model(images)]
    assert our_counts(network, images) == [reference_count(activation) for activation in expected]


def test_counts_inside_vit_equal_the_reference():
    network = small_vit_network()
    images, _ = digits_images(BATCH, 32)
    expected = [reference_count(activation) for activation in walked_activations(network, images)]
    assert our_counts(network, images) == expected
    assert len(expected) == 1 + 2 * 8 + 2 and sum(expected) > len(expected)


def test_batch_statistics_are_used_and_not_updated():
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


def test_device_path_gives_the_same_distances(monkeypatch):
    network = network_of(tiny_model())
    images, _ = digits_images(BATCH, 16)
    with distance_pass(network) as distances:
        on_cpu = distances(images)
    monkeypatch.setattr("core.environment.device", lambda: "GPU:0")
    with distance_pass(network) as distances:
        on_device = distances(images)
    for ours, theirs in zip(on_cpu, on_device, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)


def test_selection_leaves_the_network_unchanged():
    network = network_of(tiny_model())
    images, _ = digits_images(BATCH, 16)
    before = network.model.predict(images, verbose=0)
    our_counts(network, images)
    assert not [layer for layer in network.model.layers if "call" in vars(layer)]
    np.testing.assert_array_equal(network.model.predict(images, verbose=0), before)


def test_candidates_are_in_forward_order_with_sizes():
    network = network_of(tiny_model())
    assert [(c.path, c.type, c.activation_size, c.num_weights) for c in network.candidates] == [
        ("stem", "Conv2D", 8 * 8 * 8, 3 * 3 * 3 * 8 + 8),
        ("branch", "Conv2D", 8 * 8 * 8, 3 * 3 * 8 * 8 + 8),
        ("branch_bn", "BatchNormalization", 8 * 8 * 8, 16),
        ("deep", "Conv2D", 4 * 4 * 12, 3 * 3 * 8 * 12 + 12),
        ("deep_bn", "BatchNormalization", 4 * 4 * 12, 24),
        ("head", "Dense", 10, 12 * 10 + 10),
    ]


def test_layer_without_batch_axis_is_no_candidate():
    paths = [candidate.path for candidate in find_candidates(small_vit_network().model)]
    assert not [path for path in paths if "position" in path]
    assert len(paths) == len(set(paths)) == 19


def test_layer_with_non_finite_activations_is_named():
    network = network_of(tiny_model())
    network.model.get_layer("branch").bias.assign(np.full(8, np.inf))
    images, _ = digits_images(BATCH, 16)
    with pytest.raises(RunError, match="branch, batch 1"):
        count_bars(network, [images], 1)
