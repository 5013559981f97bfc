"""Each scheme on a tiny network: what it chooses, what moves, and that its figures are right."""

import dataclasses
import itertools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from networks import backbone_network, digits_images, network_of, small_vit_network, tiny_model
from test_main import assemble_tiny, run_of, tiny  # noqa: F401  a fixture

import train
from core.config import Config
from core.errors import RunError, UsageError
from memory.measure import Peak
from models import batchnorm, channels
from models.layers import watching
from run.report import Progress
from selection import SCHEMES, elastic, elastic_budget, elastic_timing, labelled, prunetrain, spectrum
from selection.labelled import _mean_of_squares, _sum_over_channels
from selection.ranking import select_layers

pytestmark = pytest.mark.slow

NORMS_AND_BIASES = {"stem/bias", "branch/bias", "branch_bn/gamma", "branch_bn/beta", "deep/bias", "deep_bn/gamma",
                    "deep_bn/beta", "head/kernel", "head/bias"}  # fmt: skip


def tiny_network(bn_stats="stored", seed=0):
    keras.utils.set_random_seed(seed)
    network = network_of(tiny_model(), bn_stats)
    batchnorm.calibrate(network.model, digits_images(64, 16)[0])
    batchnorm.MODES[bn_stats](network.model)
    return network


def calibrated_mobilenet():
    network = backbone_network("mobilenetv2")
    batchnorm.calibrate(network.model, digits_images(64, 32)[0])
    return network


@pytest.fixture(autouse=True)
def no_step_is_measured(monkeypatch):
    """Peak memory is not what these tests are about, and a third of the loop's tracing."""
    monkeypatch.setattr(train, "measured_training_step", lambda *args: (Peak(1, "CPU:0"), 0.0))


class Images:
    """Digits in memory, in place of data.Data."""

    steps_per_epoch = 3
    batch_size = 16
    split_sizes = {"train": 64, "validation": 32, "test": 32}
    outside_bytes = 0

    def __init__(self):
        self.images, self.labels = digits_images(64, 16)

    def _batches(self, first, count):
        chosen = np.arange(first * 16, (first + count) * 16) % 64
        return tf.data.Dataset.from_tensor_slices((self.images[chosen], self.labels[chosen])).batch(16)

    def train_batches(self, first_epoch, num_epochs):
        return self._batches(3 * first_epoch, 3 * (num_epochs - first_epoch))

    def validation_batches(self):
        return self._batches(0, 2)

    test_batches = validation_batches

    def selection_batches(self, points, count):
        return self._batches(0, count)


class Folder:
    """A run folder that keeps what it is given."""

    def __init__(self, path):
        self.path, self.files = path, {}

    def write_json(self, name, content):
        self.files[name] = json.loads(json.dumps(content, allow_nan=False))

    def write_csv(self, name, rows):
        self.rows = list(rows)


def config_of(name, **flags):
    row = SCHEMES[name]
    defaults = {"train_type": name, "rho": 0.34, "batch_size": 16, "num_epochs": 2, "interval": 1, "timing": "flops",
                "learning_rate": row.learning_rate}  # fmt: skip
    return Config(**{**defaults, **flags})


def values_of(network):
    return {weight.path: weight.numpy() for weight in network.model.weights}


@pytest.fixture
def segments(monkeypatch):
    """Notes, for each segment of training, the weights before it, after it, and which should have moved."""
    noted, before = [], []

    def keep(network):
        before.append(values_of(network))
        return {}

    def note(network, trained_weights, checksums):
        noted.append((before[-1], values_of(network), set(trained_weights)))

    monkeypatch.setattr(train, "checksums", keep)
    monkeypatch.setattr(train, "check_what_moved", note)
    return noted


def moved(before, after):
    return {path for path in before if before[path].tobytes() != after[path].tobytes()}


# ---------------------------------------------------------------- all schemes


@pytest.mark.parametrize("name", SCHEMES)
def test_exactly_the_promised_weights_move(name, segments, tmp_path):
    network, data = tiny_network(), Images()
    cfg = config_of(name, layers="branch", rho=0.6 if name.startswith("elastic") else 0.34)
    chosen = SCHEMES[name].select(network, data.selection_batches, cfg)
    result = train.Result()
    train.fine_tune(Progress(cfg, Folder(tmp_path), data, network, chosen, result))
    assert len(segments) == (2 if chosen.reselect else 1) and len(result.epochs) == 2
    for before, after, promised in segments:
        assert moved(before, after) == promised
    for (_, after, _), (before, _, _) in itertools.pairwise(segments):
        assert not moved(after, before)  # asking again changes nothing
    if name == "bn_plus_bias_training":
        assert segments[0][2] == NORMS_AND_BIASES
    if name.startswith("elastic"):
        assert {"head/kernel", "head/bias"} < segments[0][2] < set(values_of(network))


def test_schemes_select_as_many_layers_as_rho_allows():
    network, data = tiny_network(), Images()
    for name in (
        "act_norm_betti_train",
        "betti_train",
        "fisher",
        "fisher_channels",
        "rgn",
        "spectrum",
        "random_layers",
        "last_layers",
        "smallest_activations",
    ):
        for rho, number in ((0.1, 1), (0.34, 2), (0.5, 3), (1.0, 6)):
            chosen = SCHEMES[name].select(network, data.selection_batches, config_of(name, rho=rho))
            assert len(chosen.selected) == chosen.max_layers == number, name
            assert chosen.head_added == ("head" not in chosen.selected)


def test_controls_select_by_their_rule():
    network = tiny_network()

    def selected(name, **flags):
        return SCHEMES[name].select(network, None, config_of(name, rho=0.5, **flags)).selected

    assert selected("last_layers") == ("deep", "deep_bn", "head")
    assert selected("smallest_activations") == ("deep", "deep_bn", "head")
    assert selected("smallest_activations", exclude_layers="head") == ("branch_bn", "deep", "deep_bn")
    draws = [selected("random_layers", seed=seed) for seed in range(8)]
    assert len(set(draws)) > 3 and draws[0] == selected("random_layers", seed=0)


# ---------------------------------------------------------------- the loop's segments


def test_equal_reselection_changes_no_bit(tmp_path):
    """Momenta, learning rate and dropout go on over the new optimizer."""
    outcomes = []
    for interval in (1, 2):
        for optimizer in ("sgd", "adam"):
            network, data = tiny_network("batch"), Images()
            cfg = config_of("listed_layers", interval=interval, optimizer=optimizer, learning_rate=1e-3)
            chosen = select_layers(network, {"branch", "deep_bn"})
            if interval < 2:
                again = lambda epoch, chosen=chosen: dataclasses.replace(chosen, reselect=again)
                chosen = again(0)
            folder = Folder(tmp_path)
            train.fine_tune(Progress(cfg, folder, data, network, chosen, train.Result()))
            rows = [{key: row[key] for key in row if key != "seconds"} for row in folder.rows]
            outcomes.append((rows, values_of(network)))
    for part in (0, 1):
        for rows, values in outcomes[part::2]:
            assert rows == outcomes[part][0]
            assert not moved(values, outcomes[part][1])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_slots_of_remaining_weights_are_kept(optimizer):
    weights = [keras.Variable(np.ones(3), name=name) for name in "abc"]
    cfg = Config(optimizer=optimizer)
    old, new = (train.make_optimizer(cfg, 10) for _ in range(2))
    old.build(weights[:2])
    old.apply([tf.constant([1.0, 2, 3]), tf.constant([4.0, 5, 6])], weights[:2])
    train.carry_over(old, new, weights[1:])
    slots, kept = ({v.name: v.numpy() for v in o.variables} for o in (new, old))
    assert new.iterations == 1
    for name, value in slots.items():
        np.testing.assert_array_equal(value, kept[name] if name in kept else 0 * value)
    assert any(name.startswith("b_") and value.any() for name, value in slots.items())
    assert any(name.startswith("c_") for name in slots)


def test_best_epoch_is_restored_across_reselection(tmp_path, monkeypatch):
    network, data = tiny_network(), Images()
    then = select_layers(network, {"deep"})
    chosen = dataclasses.replace(select_layers(network, {"stem"}), reselect=lambda epoch: then)
    after_first = {}
    reselect = train.reselect
    monkeypatch.setattr(train, "reselect", lambda *args: after_first.update(values_of(network)) or reselect(*args))
    monkeypatch.setattr(train.BestEpoch, "on_epoch_end", _first_is_best(train.BestEpoch.on_epoch_end))
    result, folder = train.Result(), Folder(tmp_path)
    train.fine_tune(Progress(config_of("listed_layers"), folder, data, network, chosen, result))
    assert result.best_epoch == 1 and not moved(after_first, values_of(network))
    (again,) = folder.files["selection.json"]["reselected"]
    assert again["epoch"] == 2 and again["selected"] == ["deep"] and again["head_added"]


def _first_is_best(on_epoch_end):
    return lambda self, epoch, logs=None: on_epoch_end(self, epoch, {**logs, "val_accuracy": 1 - epoch / 10})


# ---------------------------------------------------------------- Fisher


@pytest.mark.parametrize("make", [tiny_network, small_vit_network, calibrated_mobilenet])
def test_fisher_equals_a_slow_reference(make):
    """One image at a time, eagerly, summed by hand."""
    network = make()
    images, labels = digits_images(6, network.model.input_shape[1])
    batches = [(tf.constant(images[:3]), tf.constant(labels[:3])), (tf.constant(images[3:]), tf.constant(labels[3:]))]
    expected = {reduce: np.zeros((6, len(network.candidates))) for reduce in (_mean_of_squares, _sum_over_channels)}
    for n in range(6):
        outputs = {}
        with tf.GradientTape() as tape:
            with watching(
                [c.layer for c in network.candidates], lambda layer, out: outputs.setdefault(layer.path, out)
            ):
                logits = network.model(images[n : n + 1], training=False)
            loss = -tf.nn.log_softmax(logits)[0, labels[n]]
        for i, (path, error) in enumerate(tape.gradient(loss, outputs).items()):
            product = outputs[path].numpy()[0].astype(np.float64) * error.numpy()[0]
            last = 2 if path.endswith(("query", "key", "value")) else 1
            per_channel = product.reshape(-1, *product.shape[product.ndim - last :]).sum(axis=0)
            expected[_mean_of_squares][n, i] = 0.5 * (product**2).mean()
            expected[_sum_over_channels][n, i] = 0.5 * (per_channel**2).sum()
    for reduce, reference in expected.items():
        scores = labelled.information(network, batches, 2, reduce)
        np.testing.assert_allclose(scores, reference.reshape(2, 3, -1).mean(axis=1), rtol=2e-3, atol=1e-12)


def test_fisher_names_layer_with_non_finite_score():
    network = tiny_network()
    network.model.get_layer("deep").kernel.assign(np.full((3, 3, 8, 12), np.nan))
    with pytest.raises(RunError, match="finite.* in "):
        labelled.fisher(network, Images().selection_batches, config_of("fisher"))


# ---------------------------------------------------------------- relative gradient norm, spectrum


@pytest.mark.parametrize("make", [tiny_network, calibrated_mobilenet])
def test_rgn_equals_a_slow_reference(make):
    """One image at a time, eagerly; gradients are averaged before their norm is taken."""
    network = make()
    images, labels = digits_images(6, network.model.input_shape[1])
    batches = [(tf.constant(images[:3]), tf.constant(labels[:3])), (tf.constant(images[3:]), tf.constant(labels[3:]))]
    weights = [weight for candidate in network.candidates for weight in candidate.weights]
    gradients = []
    for n in range(6):
        with tf.GradientTape() as tape:
            loss = -tf.nn.log_softmax(network.model(images[n : n + 1], training=False))[0, labels[n]]
        found = tape.gradient(loss, [weight.value for weight in weights])
        gradients.append({w.path: g.numpy().astype(np.float64) for w, g in zip(weights, found)})
    expected = np.zeros((2, len(network.candidates)))
    for batch, of_batch in enumerate((gradients[:3], gradients[3:])):
        for i, candidate in enumerate(network.candidates):
            mean = [sum(one[w.path] for one in of_batch) / 3 for w in candidate.weights]
            of_weights = np.concatenate([w.numpy().ravel() for w in candidate.weights]).astype(np.float64)
            expected[batch, i] = np.linalg.norm(np.concatenate([g.ravel() for g in mean])) / np.linalg.norm(of_weights)
    np.testing.assert_allclose(labelled.relative_gradient_norms(network, batches, 2), expected, rtol=2e-3)
    assert (expected > 0).all()


def test_rgn_names_layer_with_non_finite_score():
    network = tiny_network()
    network.model.get_layer("deep").kernel.assign(np.full((3, 3, 8, 12), np.nan))
    with pytest.raises(RunError, match="finite.* in "):
        labelled.rgn(network, Images().selection_batches, config_of("rgn"))


def test_rgn_of_a_layer_of_zeros_is_finite():
    network = tiny_network()
    for weight in network.model.get_layer("branch").trainable_weights:
        weight.assign(np.zeros(weight.shape))
    chosen = labelled.rgn(network, Images().selection_batches, config_of("rgn", rho=0.1))
    assert all(np.isfinite(row["score"]) for row in chosen.layers) and chosen.selected == ("branch",)


def slow_signal_to_noise(kernel, input_axes):
    """From the eigenvalues of the smaller Gram matrix, summed by hand; quantiles by interpolation."""
    outputs = [axis for axis in range(kernel.ndim) if axis not in input_axes]
    rows = [kernel[tuple(index.get(axis, slice(None)) for axis in range(kernel.ndim))].ravel()
            for index in (dict(zip(outputs, place)) for place in np.ndindex(*(kernel.shape[a] for a in outputs)))]  # fmt: skip
    matrix = np.array(rows, np.float64)
    small, large = sorted(matrix.shape)
    gram = matrix @ matrix.T if len(matrix) == small else matrix.T @ matrix
    values = sorted(max(value, 0) ** 0.5 for value in np.linalg.eigvalsh(gram))

    def quantile(share):
        place = share * (small - 1)
        below = int(place)
        return values[below] + (place - below) * (values[min(below + 1, small - 1)] - values[below])

    threshold = (quantile(0.75) - quantile(0.25)) / 1.349 * (1 + (small / large) ** 0.5)
    signal = sum(value for value in values if value > threshold)
    return signal / sum(value for value in values if value <= threshold) / values[-1]


@pytest.mark.parametrize("make", [tiny_network, small_vit_network, calibrated_mobilenet])
def test_spectrum_equals_a_slow_reference(make):
    network = make()
    chosen = spectrum.spectrum(network, None, config_of("spectrum"))
    compared = 0
    for candidate, row in zip(network.candidates, chosen.layers):
        if not channels.output_axes(candidate.layer):
            assert row["score"] == 0
            continue
        kernel = candidate.layer.kernel.numpy()
        inputs = (0,) if candidate.path.endswith(("query", "key", "value")) else range(kernel.ndim - 1)
        inputs = (0, 1) if channels.is_depthwise(candidate.layer) else inputs
        with np.errstate(divide="ignore"):
            expected = slow_signal_to_noise(kernel, inputs)
        if np.isfinite(expected):
            assert row["score"] == pytest.approx(expected, rel=1e-5), candidate.path
            compared += row["score"] > 0
        else:
            assert row["score"] == 0, candidate.path
    assert compared > 1


def test_signal_to_noise_of_known_matrices():
    rng = np.random.default_rng(0)
    assert spectrum.signal_to_noise(np.zeros((4, 6))) == 0
    assert spectrum.signal_to_noise(np.eye(8, dtype=np.float32)) == 0
    assert spectrum.signal_to_noise(np.outer(rng.normal(size=9), rng.normal(size=20)).astype(np.float32)) == 0
    # Quartiles 1.75 and 3.25, beta 1: a threshold of 2.22, between the 2 and the 3.
    assert spectrum.signal_to_noise(np.diag([1.0, 2, 3, 4])) == pytest.approx(7 / 3 / 4)
    wide = rng.normal(size=(5, 30))
    assert spectrum.signal_to_noise(wide) == pytest.approx(spectrum.signal_to_noise(wide.T))
    assert spectrum.signal_to_noise(2 * wide) == pytest.approx(spectrum.signal_to_noise(wide) / 2)


def test_spectrum_names_kernel_that_is_not_finite():
    network = tiny_network()
    network.model.get_layer("deep").kernel.assign(np.full((3, 3, 8, 12), np.nan))
    with pytest.raises(RunError, match="NaN or infinity in deep/kernel"):
        spectrum.spectrum(network, None, config_of("spectrum"))


# ---------------------------------------------------------------- ElasticTrainer


def test_dynamic_program_equals_brute_force():
    rng = np.random.default_rng(0)
    for case in range(250):
        n = rng.integers(1, 9)
        worth = rng.normal(size=n)
        worth[rng.random(n) < 0.1] = -np.inf
        t_dw, t_dy = rng.integers(0, 12, n), rng.integers(0, 6, n)
        budget = int(rng.integers(1, 40))
        chosen = elastic_budget.most_important(worth, t_dw, t_dy, budget, resolution=budget)
        subsets = (list(s) for r in range(n + 1) for s in itertools.combinations(range(n), r))
        best = max(sum(worth[list(s)]) for s in subsets if elastic_budget.backward_time(s, t_dw, t_dy) <= budget)
        assert elastic_budget.backward_time(chosen, t_dw, t_dy) <= budget, case
        assert sum(worth[chosen]) == pytest.approx(best), case


def test_time_budget_is_used_up_for_many_tensors():
    rng = np.random.default_rng(1)
    worth, t_dw, t_dy = (rng.random(150) for _ in range(3))
    budget = 0.4 * (t_dw.sum() + t_dy.sum())
    chosen = elastic_budget.most_important(worth, t_dw, t_dy, budget)
    assert 0.97 * budget < elastic_budget.backward_time(chosen, t_dw, t_dy) < 1.01 * budget


def test_backward_share_follows_its_formula():
    assert elastic_budget.backward_share(0.533, 1, 2) == pytest.approx((0.533 - 1 / 3) * 3 / 2)
    assert elastic_budget.backward_share(1 / 3, 1, 2) == pytest.approx(0)
    assert elastic_budget.backward_share(1, 5, 2) == 1


@pytest.mark.parametrize("bn_stats", ["stored", "batch"])
def test_update_importance_equals_a_finite_recomputation(bn_stats):
    network, data = tiny_network(bn_stats), Images()
    cfg = config_of("elastic_training", num_epochs=4, learning_rate=0.02)
    images, labels = data.images[:16], data.labels[:16]
    weights, before = elastic_timing.tensors(network), values_of(network)
    importance = elastic.update_importance(network, images, labels, cfg, epoch=1)
    assert not moved(before, values_of(network))

    def loss_at(values):
        for weight, value in zip(weights, values):
            weight.assign(value)
        with batchnorm.statistics_kept(network.model, bn_stats):
            logits = network.model(images, training=False).numpy().astype(np.float64)
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(16), labels])

    with batchnorm.statistics_kept(network.model, bn_stats), tf.GradientTape() as tape:
        logits = network.model(images, training=False)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    gradients = [g.numpy() for g in tape.gradient(loss, [w.value for w in weights])]
    norm = np.sqrt(sum((g**2).sum() for g in gradients))
    rate = 0.02 * 0.5 * (1 + np.cos(np.pi / 4))  # the cosine at epoch 1 of 4
    start = [before[w.path] for w in weights]
    steps = [-rate * (g * min(1, 1 / norm) + 5e-3 * w) for g, w in zip(gradients, start)]
    there = [w + step for w, step in zip(start, steps)]
    for k, step in enumerate(steps):
        ahead, behind = (loss_at([*there[:k], there[k] + h * step, *there[k + 1 :]]) for h in (0.5, -0.5))
        assert importance[k] == pytest.approx(-(ahead - behind), rel=0.03, abs=1e-6), weights[k].path


def test_magnitude_importances_are_sums():
    network, data = tiny_network(), Images()
    cfg, batch = config_of("elastic_training"), (data.images[:16], data.labels[:16])
    by_weight = elastic.weight_magnitude(network, *batch, cfg, 0)
    assert by_weight[0] == pytest.approx(np.abs(network.model.get_layer("stem").kernel.numpy()).sum())
    assert (elastic.gradient_magnitude(network, *batch, cfg, 0) > 0).all()


def test_times_belong_to_the_tensor_they_reach():
    network = tiny_network()
    cost = elastic_timing.counted(network, 2)
    conv = 2 * 2 * 4 * 4 * (3 * 3 * 8 * 12) + 2 * 4 * 4 * 12  # deep: two images, 4 x 4 positions, and its bias
    assert cost.t_dw["deep/kernel"] == conv and cost.t_dw["deep/bias"] == 2 * 4 * 4 * 12
    assert cost.t_dy["branch_bn/beta"] == conv and cost.t_dy["branch_bn/gamma"] == cost.t_dy["head/bias"] == 0
    assert cost.backward == pytest.approx(sum(cost.t_dw.values()) + sum(cost.t_dy.values()))
    paths = [weight.path for weight in elastic_timing.tensors(network)]
    everything = elastic_budget.backward_time(
        list(range(len(paths))), *([times[path] for path in paths[::-1]] for times in (cost.t_dw, cost.t_dy))
    )
    assert everything == pytest.approx(cost.backward)


def test_measured_times_are_kept_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(elastic_timing, "_known", {})
    network, cfg = tiny_network(), config_of("elastic_training", timing="measured")
    before = values_of(network)
    cost = elastic_timing.timings(network, cfg, 8)
    assert not moved(before, values_of(network))
    (file,) = (tmp_path / "adabet" / "timings").iterdir()
    assert sum(cost.t_dw.values()) + sum(cost.t_dy.values()) == pytest.approx(cost.backward)
    assert min(cost.t_dw.values()) > 0 and cost.unit == "s" and cost.conditions["batch_size"] == 8
    monkeypatch.setattr(elastic_timing, "measured", None)  # would fail
    elastic_timing._known.clear()
    assert elastic_timing.timings(network, cfg, 8) == cost
    whole = file.read_bytes()
    for damaged in (
        b"",
        b"{",
        b"\xff\0",
        b"[]",
        b"3",
        whole[:-3],
        whole[: len(whole) // 2],
        whole.replace(b"0.", b"1."),
    ):
        file.write_bytes(damaged)
        elastic_timing._known.clear()
        with pytest.raises(TypeError):  # measured again
            elastic_timing.timings(network, cfg, 8)


def test_time_budget_for_head_alone_warns(caplog):
    network = tiny_network()
    cost = elastic_timing.counted(network, 16)
    least = cost.forward / (cost.forward + cost.backward)
    cfg = config_of("elastic_training", rho=least + 1e-6)
    elastic.check(network, cfg, 100)
    chosen = elastic.select(network, Images().selection_batches, cfg, elastic.update_importance)
    assert chosen.trained_weights == ("head/kernel", "head/bias")
    with pytest.raises(UsageError, match=rf"over {least:.3f} here.*Received: 0.2"):
        elastic.check(network, config_of("elastic_training", rho=0.2), 100)


def test_excluded_layers_pass_the_error_and_stay_frozen():
    cfg = config_of("elastic_training", rho=1.0, exclude_layers="branch")
    chosen = elastic.select(tiny_network(), Images().selection_batches, cfg, elastic.gradient_magnitude)
    assert chosen.selected == ("stem", "deep", "deep_bn", "head")


def test_elastic_training_from_the_command_line(tiny, tmp_path, capsys):  # noqa: F811
    flags = ["--train_type", "elastic_training", "--timing", "flops", "--interval", "1"]
    assert tiny(*flags, "--rho", "0.3") == 2 and "--rho must leave time" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
    assert tiny(*flags) == 0
    run, records = run_of(tmp_path / "logs")
    assert run.name.endswith("elastic_training_rho0.533_seed0")
    selection, summary = records["selection.json"], records["summary.json"]
    assert [again["epoch"] for again in selection["reselected"]] == [2]
    assert {row["path"] for row in selection["tensors"] if row["selected"]} == set(selection["trained_weights"])
    assert max(abs(row["importance"]) for row in selection["tensors"]) == 1
    assert 1 / 3 < summary["rho_achieved_predicted"] < 0.54 and summary["rho_achieved_measured"] > 0
    assert summary["channels_pruned"] is None and summary["selection_peak_memory_bytes"] > 0
    assert records["timings.json"]["source"] == "flops" and records["config.json"]["timing"] == "flops"


# ---------------------------------------------------------------- PruneTrain


@pytest.mark.parametrize("bn_stats", ["stored", "batch"])
def test_pruned_channels_give_zero_and_stay_pruned(bn_stats, tmp_path, segments):
    network, data = tiny_network(bn_stats), Images()
    for name, few in (("stem", [1]), ("branch", [0, 5]), ("deep", [2, 3, 11])):
        kernel = network.model.get_layer(name).kernel
        value = kernel.numpy()
        value[..., few] *= 1e-9 / np.abs(value[..., few]).max()
        kernel.assign(value)
    cfg = config_of("prunetrain", num_epochs=3, learning_rate=1e-5)
    chosen = prunetrain.prunetrain(network, data.selection_batches, cfg)
    folder, result = Folder(tmp_path), train.Result()
    before = values_of(network)
    train.fine_tune(Progress(cfg, folder, data, network, chosen, result))
    dead = {"stem": 1, "branch": 2, "deep": 3}
    assert result.facts["channels_pruned"] == 6 and result.facts["channels"] == 28
    assert [again["pruned_channels"] for again in folder.files["selection.json"]["reselected"]] == [dead] * 2
    assert 0.7 < result.facts["flops_remaining"] < 1

    outputs = {}
    with watching([c.layer for c in network.candidates], lambda layer, out: outputs.setdefault(layer.path, out)):
        network.model(data.images[:16], training=bn_stats == "batch")
    zero = {name: (out.numpy().reshape(-1, out.shape[-1]) == 0).all(axis=0).sum() for name, out in outputs.items()}
    assert zero == {"stem": 1, "branch": 2, "branch_bn": 2, "deep": 3, "deep_bn": 3, "head": 0}
    for _, after, _ in segments[1:]:
        assert not after["branch/kernel"][..., [0, 5]].any() and not after["deep_bn/beta"][[2, 3, 11]].any()
        assert after["branch/kernel"][..., 1].any()
    assert moved(before, values_of(network)) >= {"branch/kernel", "head/kernel"}
    assert all(weight.constraint is None and weight.regularizer is None for weight in network.trainable_weights)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_momentum_does_not_revive_pruned_channels(optimizer, tmp_path, monkeypatch):
    """Every other channel is pruned while in full motion."""
    network, data = tiny_network(), Images()
    for name in ("stem", "branch", "deep"):
        kernel = network.model.get_layer(name).kernel
        kernel.assign(kernel.numpy() * np.where(np.arange(kernel.shape[-1]) % 2, 1, 3))
    monkeypatch.setattr(prunetrain, "THRESHOLD", 0.3)
    cfg = config_of("prunetrain", num_epochs=2, interval=1, learning_rate=1e-3, optimizer=optimizer)
    chosen = prunetrain.prunetrain(network, data.selection_batches, cfg)
    folder, result = Folder(tmp_path), train.Result()
    monkeypatch.setattr(train.BestEpoch, "restore", lambda self: None)  # the last epoch's weights
    train.fine_tune(Progress(cfg, folder, data, network, chosen, result))
    (again,) = folder.files["selection.json"]["reselected"]
    assert again["pruned_channels"] == {"stem": 4, "branch": 4, "deep": 6}
    for path, count in again["pruned_channels"].items():
        layer = network.model.get_layer(path)
        zero = (layer.kernel.numpy() == 0).all(axis=(0, 1, 2))
        assert zero.sum() == count and not layer.bias.numpy()[zero].any()


def test_penalty_has_its_share_and_only_in_training(tmp_path):
    network, data = tiny_network(), Images()
    images, labels = data.images[:16], data.labels[:16]
    chosen = prunetrain.prunetrain(network, data.selection_batches, config_of("prunetrain"))
    assert set(chosen.penalties) == {"stem/kernel", "branch/kernel", "deep/kernel", "head/kernel"}
    weights = {weight.path: weight for weight in network.trainable_weights}
    penalty = sum(float(chosen.penalties[path](weights[path])) for path in chosen.penalties)
    logits = network.model(images, training=False)
    loss = float(np.mean(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)))
    assert penalty / (penalty + loss) == pytest.approx(prunetrain.PENALTY_SHARE, rel=1e-4)

    folder = Folder(tmp_path)
    cfg = config_of("prunetrain", num_epochs=1, learning_rate=1e-9, weight_decay=0)
    train.fine_tune(Progress(cfg, folder, data, network, chosen, train.Result()))
    (row,) = folder.rows
    held_out = keras.losses.sparse_categorical_crossentropy(
        data.labels[:32], network.model(data.images[:32], training=False), from_logits=True
    )
    assert row["val_loss"] == pytest.approx(float(np.mean(held_out)), rel=1e-4)
    assert row["train_loss"] > row["val_loss"] + penalty / 2


def test_strong_penalty_prunes_channels_that_stay_zero(tmp_path, monkeypatch, segments):
    network, data = tiny_network(), Images()
    monkeypatch.setattr(prunetrain, "PENALTY_SHARE", 0.95)
    flags = {"num_epochs": 24, "learning_rate": 0.05, "global_clipnorm": 0, "momentum": 0.0}
    cfg = config_of("prunetrain", **flags)
    chosen = prunetrain.prunetrain(network, data.selection_batches, cfg)
    folder, result = Folder(tmp_path), train.Result()
    monkeypatch.setattr(train.BestEpoch, "restore", lambda self: None)  # the last epoch's weights
    train.fine_tune(Progress(cfg, folder, data, network, chosen, result))
    last = folder.files["selection.json"]["reselected"][-1]
    assert sum(last["pruned_channels"].values()) == result.facts["channels_pruned"] > 0
    assert sum(last["pruned_inputs"].values()) > 0 and result.facts["flops_remaining"] < 1
    for path, count in last["pruned_channels"].items():
        assert (network.model.get_layer(path).kernel.numpy() == 0).all(axis=(0, 1, 2)).sum() == count
    for path, count in last["pruned_inputs"].items():
        kernel = network.model.get_layer(path).kernel.numpy()
        others = tuple(axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2)
        assert (kernel == 0).all(axis=others).sum() >= count


def test_channels_of_depthwise_convolutions_and_attention():
    network = backbone_network("mobilenetv2")
    norms = channels.following_norms(network.model)
    kernels = [c for c in network.candidates if channels.output_axes(c.layer)]
    assert len(kernels) == 53 and {c.path for c in kernels} - set(norms) == {"head"}
    assert channels.output_axes(network.model.get_layer("expanded_conv_depthwise")) == (2, 3)
    groups = prunetrain.channel_groups(network, {w.path for w in network.trainable_weights})
    outputs = [group for group in groups if group.is_output]
    assert all(group.largest.size == channels.num_channels(group.candidate.layer) for group in outputs)
    # 35 convolutions that are not depthwise; the head has inputs only, the first convolution outputs only.
    assert len(outputs) == 35 and len(groups) - len(outputs) == 35
    assert not any("depthwise" in group.path for group in groups)
    first, last = groups[0], groups[-1]
    assert (first.path, first.axes, last.path, last.axes) == ("Conv1", (3,), "head", (0,)) and not last.is_output

    vit = small_vit_network()
    by_name = {c.path.rsplit("/", 1)[-1]: c.layer for c in vit.candidates}
    assert [len(channels.output_axes(by_name[name])) for name in ("query", "attention_output", "head")] == [2, 1, 1]
    groups = prunetrain.channel_groups(vit, {w.path for w in vit.trainable_weights})
    assert all(g.largest.size == channels.num_channels(g.candidate.layer) for g in groups if g.is_output)
    axes = {g.path.rsplit("/", 1)[-1]: g.axes for g in groups if not g.is_output}
    assert axes["query"] == (0,) and axes["attention_output"] == (0, 1)


def test_flops_of_mobilenetv2_equal_the_known_count():
    """MobileNetV2 at 224 pixels takes 300 million multiply-adds without its classifier."""
    network = backbone_network("mobilenetv2", input_size=224)
    convolutions = [c for c in network.candidates if channels.output_axes(c.layer)]
    assert sum(channels.forward_flops(c) for c in convolutions) / 2 == pytest.approx(300e6, rel=0.01)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("name", ["fisher", "rgn", "spectrum", "prunetrain"])
def test_schemes_run_from_the_command_line(name, tiny, tmp_path):  # noqa: F811
    assert tiny("--train_type", name, "--interval", "1") == 0
    run, records = run_of(tmp_path / "logs")
    summary = records["summary.json"]
    assert summary["status"] == "done" and summary["train_type"] == name
    assert records["config.json"]["interval"] == (1 if name == "prunetrain" else None)
    assert (summary["channels"] is None) == (name != "prunetrain")
    assert len(records["selection.json"]["reselected"]) == (name == "prunetrain")
