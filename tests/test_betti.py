"""Betti numbers against known answers, against ripser, and under moves that change nothing."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ripser import ripser
from scipy.spatial.distance import pdist, squareform

from selection import betti
from selection.betti import betti_1, betti_1_of_each
from selection.distances import normalised_distances, pairwise_distances

UNBOUNDED = (np.float32(-np.inf), np.float32(np.inf))
SQUARE = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])


def circle(n, radius=1.0, centre=(0.0, 0.0)):
    angle = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius + np.asarray(centre)


def distances_of(points):
    return squareform(pdist(points))


KNOWN = {
    "square: one loop": (SQUARE, 1),
    "triangle: filled as it closes": (circle(3), 0),
    "circle of 12: one loop": (circle(12), 1),
    "two circles far apart: two loops": (np.concatenate([circle(12), circle(12, centre=(50, 0))]), 2),
    "line: no loop": (np.stack([np.arange(9.0) ** 1.5, np.zeros(9)], axis=1), 0),
    "one point": (np.zeros((1, 2)), 0),
    "two points": (np.eye(2), 0),
    "all points equal": (np.ones((8, 3)), 0),
    "two clusters of equal points": (np.repeat(np.eye(2), 5, axis=0), 0),
    "square with every corner twice": (np.repeat(SQUARE, 2, axis=0), 1),
    "octahedron's corners: a sphere has no loop": (np.concatenate([np.eye(3), -np.eye(3)]), 0),
}


@pytest.mark.parametrize("points, loops", KNOWN.values(), ids=KNOWN.keys())
def test_known_answers(points, loops):
    assert betti_1(distances_of(points)) == loops


def test_every_short_bar_counts():
    # Two squares, one ten thousand times smaller: no threshold on a bar's length.
    points = np.concatenate([SQUARE, 1e-4 * SQUARE + 100])
    assert betti_1(distances_of(points)) == 2


def test_clouds_that_are_worth_threads_are_counted_on_them_in_their_order():
    rng = np.random.default_rng(6)
    matrices = [distances_of(rng.normal(size=(num_points, 3))) for num_points in (280, 340, 300, 320)]
    assert sum(betti.predicted_cost(len(matrix), 1)[0] for matrix in matrices) > betti._WORTH_THREADS_S
    counts = betti_1_of_each(matrices, num_threads=2)
    assert counts == [betti_1_of_each([matrix])[0] for matrix in matrices] and len(set(counts)) == 4


@pytest.mark.parametrize("dimension", [2, 3, 50])
def test_equals_ripser_on_random_clouds(dimension):
    rng = np.random.default_rng(dimension)
    clouds = [rng.normal(size=(32, dimension)) for _ in range(20)]
    expected = []
    for cloud in clouds:
        bars = ripser(distances_of(cloud), maxdim=1, distance_matrix=True, coeff=2)["dgms"][1]
        expected.append(int((bars[:, 1] > bars[:, 0]).sum()))
    assert betti_1_of_each([distances_of(cloud) for cloud in clouds], num_threads=2) == expected
    assert sum(expected) > 0


def test_coefficients_are_z2():
    # Six points whose complex, at middle scale, is the real projective plane:
    # over Z/2 it has a loop that bounds twice itself, over Z/11 none.
    triangles = [
        (0, 1, 4),
        (0, 1, 5),
        (0, 2, 3),
        (0, 2, 5),
        (0, 3, 4),
        (1, 2, 3),
        (1, 2, 4),
        (1, 3, 5),
        (2, 4, 5),
        (3, 4, 5),
    ]
    # Barycentric subdivision, so that the complex is a flag complex: its
    # vertices are the faces, an edge joins a face and one that contains it.
    faces = {face for t in triangles for face in [t, *[(v,) for v in t], t[:2], t[1:], (t[0], t[2])]}
    faces = sorted(faces, key=lambda face: (len(face), face))
    assert len(faces) == 31
    distances = np.array([[1.0 if set(a) < set(b) or set(b) < set(a) else 2.0 for b in faces] for a in faces])
    np.fill_diagonal(distances, 0)
    assert betti_1(distances) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e25])
def test_scale_permutation_and_translation_change_nothing(scale):
    rng = np.random.default_rng(5)
    points = rng.normal(size=(24, 4))
    expected = betti_1(distances_of(points))
    assert expected > 0
    assert betti_1(distances_of(points) * scale) == expected
    assert betti_1(distances_of(rng.permutation(points) + 7.0)) == expected


@pytest.mark.parametrize(
    "matrix, rule",
    [
        (np.zeros((2, 3)), "square"),
        (np.array([[0, np.nan], [np.nan, 0]]), "finite"),
        (np.array([[0, -1.0], [-1.0, 0]]), "negative"),
        (np.array([[1.0, 1.0], [1.0, 0]]), "diagonal"),
        (np.array([[0, 1.0], [2.0, 0]]), "symmetric"),
    ],
)
def test_what_is_no_distance_matrix_is_refused(matrix, rule):
    with pytest.raises(ValueError, match=rule):
        betti_1(matrix)


@pytest.mark.parametrize("shape", [(4, 3), (32, 10), (32, 40_000), (7, 100_001)])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_distances_equal_scipys(shape, num_parts):
    cloud = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected = distances_of(cloud.astype(np.float64))
    found = pairwise_distances(cloud, num_parts=num_parts)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    upper = np.triu_indices(len(cloud), 1)
    np.testing.assert_array_equal(np.argsort(found[upper]), np.argsort(expected[upper]))


def test_distances_keep_their_digits_far_from_the_origin_and_in_tight_clusters():
    rng = np.random.default_rng(2)
    far = (1e4 + 1e-3 * rng.normal(size=(16, 500))).astype(np.float32)
    # Two clusters at distance 1 whose inner distances are a millionth of that.
    tight = rng.normal(size=(16, 500)).astype(np.float32) * 1e-6
    tight[8:, 0] += 1
    for cloud in (far, tight):
        expected = distances_of(cloud.astype(np.float64))
        found = pairwise_distances(cloud)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        upper = np.triu_indices(len(cloud), 1)
        np.testing.assert_array_equal(np.argsort(found[upper]), np.argsort(expected[upper]))


def test_a_point_that_is_there_twice_has_distance_zero():
    cloud = np.random.default_rng(3).normal(size=(10, 3000)).astype(np.float32)
    cloud[7] = cloud[2]
    distances = pairwise_distances(cloud)
    assert distances[2, 7] == distances[7, 2] == 0
    np.testing.assert_array_equal(np.delete(distances[2], [2, 7]), np.delete(distances[7], [2, 7]))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_distances_at_the_ends_of_float32(scale):
    cloud = (np.random.default_rng(4).normal(size=(8, 100)) * scale).astype(np.float32)
    np.testing.assert_allclose(pairwise_distances(cloud), distances_of(cloud.astype(np.float64)), rtol=1e-12)


def test_distances_that_float32_can_not_order_are_ordered():
    # Points on a line, so that every pair of neighbours has nearly the same distance.
    steps = 1 + 1e-6 * np.random.default_rng(6).permutation(15)
    cloud = np.zeros((16, 5000), np.float32)
    cloud[1:, 0] = np.cumsum(steps)
    cloud += np.float32(0.5)
    expected = distances_of(cloud.astype(np.float64))[np.triu_indices(16, 1)]
    found = pairwise_distances(cloud)[np.triu_indices(16, 1)]
    np.testing.assert_array_equal(np.argsort(found, kind="stable"), np.argsort(expected, kind="stable"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows(value):
    cloud = np.ones((5, 6000), np.float32)
    cloud[3, 5999] = value
    assert not np.isfinite(pairwise_distances(cloud)).all()


def same_order(found, expected):
    upper = np.triu_indices(len(expected), 1)
    np.testing.assert_allclose(found[upper], expected[upper], rtol=1e-4)
    np.testing.assert_array_equal(np.argsort(found[upper]), np.argsort(expected[upper]))


@pytest.mark.parametrize(
    "shape, channels",
    [((32, 24), 24), ((3, 7 * 24), 24), ((7, 49 * 160), 160), ((33, 5001 * 12), 12), ((70, 900 * 96), 96)],
)
@pytest.mark.parametrize("num_parts", [1, 3])
def test_one_reading_gives_the_distances_before_and_after_a_normalisation(shape, channels, num_parts):
    rng = np.random.default_rng(7)
    cloud = rng.normal(size=shape).astype(np.float32)
    scale, shift = rng.normal(size=(2, channels)).astype(np.float32)
    normalised = (cloud.reshape(-1, channels) * scale + shift).reshape(shape)
    expected = [distances_of(points.astype(np.float64)) for points in (cloud, normalised)]
    with ThreadPoolExecutor(num_parts) as pool:
        found = normalised_distances(cloud, scale, shift, (np.float32(0), np.float32(1.5)), pool, num_parts)
    for ours, theirs in zip(found, expected, strict=True):
        same_order(ours, theirs)
    np.testing.assert_array_equal(cloud, np.clip(normalised, 0, 1.5))


def test_a_normalisations_rounding_is_reckoned_with():
    # Images that share nearly all of their content: rounding weighs most there.
    rng = np.random.default_rng(8)
    images = (rng.normal(size=(1, 200, 16)) + 1e-4 * rng.normal(size=(24, 200, 16))).astype(np.float32)
    scale = (1 + rng.random(16)).astype(np.float32)
    shift = (rng.normal(size=16) - images.mean((0, 1)) * scale).astype(np.float32)
    unrounded = images * scale.astype(np.float64) + shift
    expected = distances_of((images * scale + shift).reshape(24, -1).astype(np.float64))
    upper = np.triu_indices(24, 1)
    wrong = np.argsort(distances_of(unrounded.reshape(24, -1))[upper]) != np.argsort(expected[upper])
    assert wrong.any()
    _, found = normalised_distances(images.reshape(24, -1), scale, shift, UNBOUNDED)
    same_order(found, expected)


@pytest.mark.parametrize("scale, shift", [(3e38, 0), (1, np.nan), (1, np.inf)])
def test_what_a_normalisation_makes_infinite_shows(scale, shift):
    cloud = np.random.default_rng(5).normal(size=(4, 800)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        before, after = normalised_distances(
            cloud, np.full(8, scale, np.float32), np.full(8, shift, np.float32), UNBOUNDED
        )
    assert np.isfinite(before).all() and not np.isfinite(after).all()


def test_an_image_that_is_there_twice_stays_so_when_normalised():
    rng = np.random.default_rng(10)
    cloud = rng.normal(size=(12, 4000)).astype(np.float32)
    cloud[9] = cloud[4]
    scale, shift = rng.normal(size=(2, 16)).astype(np.float32)
    for found in normalised_distances(cloud, scale, shift, UNBOUNDED):
        assert found[4, 9] == found[9, 4] == 0 and np.count_nonzero(found == 0) == 12 + 2


@pytest.mark.parametrize("scale", [0, 1e-9])
def test_what_a_normalisation_levels_is_one_point(scale):
    cloud = np.random.default_rng(11).normal(size=(32, 1000)).astype(np.float32)
    _, after = normalised_distances(cloud, np.full(8, scale, np.float32), np.ones(8, np.float32), UNBOUNDED)
    assert not after.any() and (cloud == 1).all()


@pytest.mark.parametrize("apart", [0, 1e-5])
@pytest.mark.parametrize("near", [slice(0, 60), slice(60, 120)])
def test_near_duplicates_among_ordinary_images_are_ordered(near, apart):
    # Pairs of both kinds in doubt: what is known of the far ones says nothing of the near ones.
    rng = np.random.default_rng(10)
    cloud = rng.normal(size=(120, 240)).astype(np.float32)
    scale, shift = (1 + rng.random(8)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    cloud[near] = cloud[near.start] + apart * rng.normal(size=(60, 240)).astype(np.float32)
    before = distances_of(cloud.astype(np.float64))
    after = distances_of((cloud.reshape(-1, 8) * scale + shift).reshape(cloud.shape).astype(np.float64))
    for found, expected in zip(normalised_distances(cloud, scale, shift, UNBOUNDED), (before, after), strict=True):
        (_, ranks), (_, expected_ranks) = (
            np.unique(values.astype(np.float32), return_inverse=True) for values in (found, expected)
        )
        np.testing.assert_array_equal(ranks, expected_ranks)


@pytest.mark.parametrize("cloud", [np.zeros((4, 16)), np.zeros((16, 4), np.float32).T, np.zeros((4, 12), np.float32)])
def test_a_cloud_that_can_not_be_normalised_is_refused(cloud):
    with pytest.raises(ValueError, match="must be"):
        normalised_distances(cloud, *np.ones((2, 8), np.float32), UNBOUNDED)


@pytest.mark.parametrize("num_points", [40, 150])
def test_distances_that_concentrate_are_ordered(num_points):
    # Thousands of pairs within a few per cent of one distance: most are in doubt at first.
    cloud = np.random.default_rng(9).normal(size=(num_points, 20_000)).astype(np.float32)
    exact = distances_of(cloud.astype(np.float64))[np.triu_indices(num_points, 1)]
    found = pairwise_distances(cloud)[np.triu_indices(num_points, 1)]
    np.testing.assert_array_equal(np.argsort(found), np.argsort(exact))
