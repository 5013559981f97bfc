"""Properties of Betti numbers, budgets and arguments that hold for any input; hypothesis searches counterexamples.

Invariances are tested with points on integer grids. Translation, rotation by 90 degrees,
reflection and scaling by powers of two are exact there, so that equal distances stay
equal. With other points, a rotation rounds every distance again, which can break ties
and change the count.
"""

import contextlib
import io
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from ripser import ripser
from scipy.spatial.distance import pdist, squareform

from core.config import Config
from core.errors import UsageError
from core.files import whole_file
from run import flags
from run import folder as run_folder
from selection.betti import betti_1_of_each
from selection.distances import pairwise_distances
from selection.elastic_budget import backward_time, most_important
from selection.ranking import layer_budget, rank, select_top


def betti_1(distances):
    return betti_1_of_each([distances])[0]


# The same examples at every run, however slow the machine is.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=150)
settings.load_profile("repeatable")


def grid_clouds(most_points=14, most_dimensions=4, side=6):
    """Clouds of integer points, float32 of shape (n, d), often with ties, duplicates and collinear points."""
    shapes = st.tuples(st.integers(1, most_points), st.integers(1, most_dimensions))
    return arrays.arrays(np.float32, shapes, elements=st.integers(-side, side).map(float))


def b1_by_ripser(distances):
    """The count of a second engine; it takes float32 distances, so these should be exact or far apart."""
    if len(distances) == 1:
        return 0
    bars = ripser(distances, maxdim=1, distance_matrix=True, coeff=2)["dgms"][1]
    return int((bars[:, 1] > bars[:, 0]).sum())


def b1(cloud):
    """What the selection counts: from points to distances to bars."""
    return betti_1(pairwise_distances(np.asarray(cloud, np.float32)))


# ---------------------------------------------------------------- Betti numbers


@pytest.mark.slow
@given(grid_clouds(), st.randoms(use_true_random=False))
def test_permutation_changes_nothing(cloud, random):
    order = list(range(len(cloud)))
    random.shuffle(order)
    assert b1(cloud[order]) == b1(cloud)


@given(grid_clouds(), st.integers(-1000, 1000))
def test_translation_changes_nothing(cloud, by):
    assert b1(cloud + np.float32(by)) == b1(cloud)


@given(grid_clouds(), st.randoms(use_true_random=False))
def test_rotations_by_90_degrees_and_reflections_change_nothing(cloud, random):
    axes = list(range(cloud.shape[1]))
    random.shuffle(axes)
    signs = np.array([random.choice((-1, 1)) for _ in axes], np.float32)
    assert b1(cloud[:, axes] * signs) == b1(cloud)


@given(st.integers(0, 10**6), st.floats(0, 2 * math.pi))
def test_any_rotation_changes_nothing_in_general_position(seed, angle):
    points = np.random.default_rng(seed).normal(size=(12, 3))
    distances = pdist(points)
    gaps = np.diff(np.sort(distances))
    if gaps.min() < 1e-4:  # general position: no rounding may exchange two distances
        return
    turn = np.eye(3)
    turn[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    assert b1(points @ turn) == b1(points) == betti_1(squareform(distances))


@given(grid_clouds(), st.integers(-120, 110))
def test_scale_changes_nothing(cloud, exponent):
    # Up to float32's ends: distances of 1e-36 and 1e34.
    assert b1(np.ldexp(cloud, exponent)) == b1(cloud)


@given(grid_clouds(), st.integers(-300, 300))
def test_the_scale_of_distances_changes_nothing(cloud, exponent):
    distances = squareform(pdist(cloud))
    assert betti_1(distances * 10.0**exponent) == betti_1(distances)


@given(grid_clouds(), st.integers(0, 3), st.integers(1, 600))
def test_empty_dimensions_change_nothing(cloud, before, after):
    assert b1(np.pad(cloud, ((0, 0), (before, after)))) == b1(cloud)


@given(grid_clouds())
def test_points_and_their_distances_agree(cloud):
    assert b1(cloud) == betti_1(squareform(pdist(cloud.astype(np.float64))))


@given(grid_clouds(most_points=20))
def test_equals_ripser_with_ties(cloud):
    # Squared distances are integers, so that both engines see the same ties.
    squared = np.rint(squareform(pdist(cloud, "sqeuclidean")))
    assert b1(cloud) == b1_by_ripser(squared)


@pytest.mark.slow
@given(st.lists(arrays.arrays(np.float64, (7, 7), elements=st.integers(0, 9).map(float)), min_size=1, max_size=4))
def test_equals_ripser_on_non_metric_matrices(matrices):
    matrices = [np.triu(matrix, 1) + np.triu(matrix, 1).T for matrix in matrices]
    assert betti_1_of_each(matrices, num_threads=2) == [b1_by_ripser(matrix) for matrix in matrices]


@given(grid_clouds(most_points=8), st.integers(1, 3))
def test_duplicates_change_nothing(cloud, copies):
    assert b1(np.repeat(cloud, 1 + copies, axis=0)) == b1(cloud)


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=20), st.integers(1, 5))
def test_collinear_points_have_no_loop(places, dimension):
    line = np.zeros((len(places), dimension), np.float32)
    line[:, 0] = places
    assert b1(line) == 0


@given(
    arrays.arrays(
        np.float32, st.tuples(st.integers(1, 3), st.integers(1, 6)), elements=st.floats(-(2**50), 2**50, width=32)
    )
)
def test_three_points_have_no_loop(cloud):
    assert b1(cloud) == 0


@given(st.integers(1, 30), st.integers(1, 700), st.floats(allow_nan=False, allow_infinity=False, width=32))
@example(32, 10, 3.4e38)
@example(32, 10, 1e-45)
def test_equal_points_have_no_loop(count, dimension, value):
    assert b1(np.full((count, dimension), value, np.float32)) == 0


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=st.floats(width=32)))
def test_any_cloud_has_a_count_or_is_not_finite(cloud):
    with np.errstate(all="ignore"):  # overflow to infinity is how it shows
        distances = pairwise_distances(cloud)
    if np.isfinite(distances).all():
        assert np.isfinite(cloud).all() or len(cloud) == 1
        assert 0 <= betti_1(distances) <= len(cloud) ** 2
    else:
        with pytest.raises(ValueError, match="finite"):
            betti_1(distances)


# ---------------------------------------------------------------- budgets


@given(st.floats(1e-9, 1), st.floats(1e-9, 1), st.integers(1, 500))
def test_layer_budget_grows_with_rho(rho, other, num_layers):
    low, high = sorted((rho, other))
    assert 1 <= layer_budget(low, num_layers) <= layer_budget(high, num_layers) <= num_layers


@given(st.integers(1, 300), st.integers(1, 300))
def test_exact_share_gives_exact_number(part, num_layers):
    part = min(part, num_layers)
    assert layer_budget(part / num_layers, num_layers) == part


def line_network(sizes):
    """A network by its paths and sizes alone; the last layer is the head."""
    layers = [
        SimpleNamespace(path=f"layer{i}", type="Dense", activation_size=size, num_weights=size,
                        weights=[SimpleNamespace(path=f"layer{i}/kernel")])
        for i, size in enumerate(sizes)
    ]  # fmt: skip
    return SimpleNamespace(
        candidates=layers, head=layers[-1], trainable_weights=[weight for layer in layers for weight in layer.weights]
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.floats(1e-9, 1), st.floats(1e-9, 1))
def test_larger_rho_selects_a_superset(scores, rho, other):
    network = line_network(scores)
    few, many = (select_top(network, Config(rho=share), scores) for share in sorted((rho, other)))
    assert set(few.selected) <= set(many.selected)
    assert len(few.selected) == few.max_layers and len(many.selected) == many.max_layers
    assert set(few.trained_weights) <= set(many.trained_weights)
    worst = min(scores[int(path.removeprefix("layer"))] for path in many.selected)
    left = [score for i, score in enumerate(scores) if f"layer{i}" not in many.selected]
    assert all(score <= worst for score in left)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.data())
def test_ranks_are_a_permutation_of_eligible_layers(scores, data):
    eligible = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    ranks = rank(scores, eligible)
    assert sorted(place for place in ranks if place) == list(range(1, sum(eligible) + 1))
    assert [place is not None for place in ranks] == eligible


TENSORS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(TENSORS, st.integers(1, 120), st.integers(1, 120))
def test_larger_time_budget_gives_no_less_importance(tensors, budget, other):
    # Whole-number times, and steps of a whole budget: nothing is rounded, so the optimum is exact.
    importance, t_dw, t_dy = map(np.array, zip(*tensors))
    bought = []
    for limit in sorted((budget, other)):
        chosen = most_important(importance, t_dw, t_dy, limit, resolution=limit)
        assert backward_time(chosen, t_dw, t_dy) <= limit
        bought.append(importance[chosen].sum())
    assert bought[0] <= bought[1] + 1e-12


# ---------------------------------------------------------------- arguments

FLAGS = sorted(
    option for action in flags.make_parser()._actions for option in action.option_strings if option.startswith("--")
)
VALUES = st.one_of(
    st.sampled_from(
        ["", "0", "1", "-1", "0.1", "1e-9", "1e400", "-inf", "nan", "NaN", "0x10", "1_000", "٣", " 7 ", "9" * 400, "9" * 5000, "true", "No",
         "digits", "oxford_iiit_pet", "mnist:3.*", "a/b:1", "image_folder", "resnet50", "vit", "mobilenetv2", "full_training",
         "bettitrain", "elastic_training", "listed_layers", "measured", "flops", "paper", "validation", "mirrored", "multi_worker_mirrored",
         "none", "auto", "imagenet", "x.h5", "x.keras", "/", ".", "..", "../x", "\0", "\0.h5", "a\nb", "\udcff", "(", "[a-", "@", "@/none", "--", "-", "-x"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=12),
)  # fmt: skip
WORDS = st.one_of(st.sampled_from(FLAGS), st.tuples(st.sampled_from(FLAGS), VALUES).map("=".join), VALUES)
PAIRS = st.lists(st.tuples(st.sampled_from(FLAGS), VALUES), max_size=6).map(
    lambda pairs: [word for pair in pairs for word in pair]
)


@pytest.mark.slow
@settings(max_examples=3000)
@given(st.one_of(st.lists(WORDS, max_size=10), PAIRS))
def test_any_arguments_give_a_config_or_one_line(argv):
    logging.getLogger("adabet").handlers.clear()  # its warnings are not looked at here
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cfg = flags.parse(argv)
            run_folder.check_place(cfg)  # which only looks
    except UsageError as error:
        assert str(error)
    except SystemExit as stop:
        if stop.code == 0:
            assert {"-h", "--help", "--version"} & {word.partition("=")[0] for word in argv} or any(
                word.startswith("-h") for word in argv
            )
        else:
            assert stop.code == 2 and len(err.getvalue().splitlines()) == 1 and out.getvalue() == ""
    else:
        assert isinstance(cfg, Config)


def test_two_writers_of_a_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as first:
        with whole_file(path) as second:
            second.write(b"second")
            first.write(b"first")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
