"""Betti numbers against known answers, ripser and invariances; distances against scipy."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ripser import ripser
from scipy.spatial.distance import pdist, squareform

from selection import betti
from selection.betti import betti_1_of_each
from selection.distances import from_gram, pairwise_distances


def betti_1(distances):
    return betti_1_of_each([distances])[0]


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
def test_known_point_clouds_have_their_betti_number(points, loops):
    assert betti_1(distances_of(points)) == loops


def test_short_bars_count():
    # Two squares, one ten thousand times smaller: no threshold on a bar's length.
    points = np.concatenate([SQUARE, 1e-4 * SQUARE + 100])
    assert betti_1(distances_of(points)) == 2


def test_large_clouds_are_counted_by_threads_in_order():
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
def test_scale_permutation_and_translation_are_invariances(scale):
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
def test_invalid_distance_matrix_is_refused(matrix, rule):
    with pytest.raises(ValueError, match=rule):
        betti_1(matrix)


@pytest.mark.parametrize("shape", [(1, 9), (4, 3), (5, 2049), (32, 10), (32, 40_000), (7, 100_001), (33, 30_000)])
def test_distances_equal_numpys_and_scipys(shape):
    cloud = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    points = cloud.astype(np.float64)
    expected = distances_of(points)
    with ThreadPoolExecutor(3) as pool:
        found = pairwise_distances(cloud, pool)
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    plain = np.stack([np.sqrt(((points - point) ** 2).sum(axis=1)) for point in points])
    np.testing.assert_allclose(found, plain, rtol=1e-13)
    centred = cloud.astype(np.float64) - cloud[0]
    np.testing.assert_allclose(from_gram(centred @ centred.T), expected, rtol=1e-9, atol=1e-6)
    upper = np.triu_indices(len(cloud), 1)
    np.testing.assert_array_equal(np.argsort(found[upper]), np.argsort(expected[upper]))


@pytest.mark.parametrize("shape", [(5, 2049), (33, 30_000), (32, 70_001)])
def test_distances_do_not_depend_on_threads(shape):
    cloud = np.random.default_rng(12).normal(size=shape).astype(np.float32)
    expected = pairwise_distances(cloud)
    for num_threads in (1, 2, 3, 5):
        with ThreadPoolExecutor(num_threads) as pool:
            np.testing.assert_array_equal(pairwise_distances(cloud, pool), expected)


def test_distances_of_clouds_without_columns_are_zero():
    np.testing.assert_array_equal(pairwise_distances(np.empty((3, 0), np.float32)), np.zeros((3, 3)))


def test_distances_keep_digits_far_away_and_in_tight_clusters():
    rng = np.random.default_rng(2)
    far = (1e4 + 1e-3 * rng.normal(size=(16, 500))).astype(np.float32)
    # Two clusters at distance 1 whose inner distances are a millionth of that.
    tight = rng.normal(size=(16, 500)).astype(np.float32) * 1e-6
    tight[8:, 0] += 1
    for cloud in (far, tight):
        expected = distances_of(cloud.astype(np.float64))
        found = pairwise_distances(cloud)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        upper = np.triu_indices(len(cloud), 1)
        np.testing.assert_array_equal(np.argsort(found[upper]), np.argsort(expected[upper]))


def test_duplicate_points_have_distance_zero():
    cloud = np.random.default_rng(3).normal(size=(10, 3000)).astype(np.float32)
    cloud[7] = cloud[2]
    distances = pairwise_distances(cloud)
    assert distances[2, 7] == distances[7, 2] == 0
    np.testing.assert_array_equal(np.delete(distances[2], [2, 7]), np.delete(distances[7], [2, 7]))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_distances_at_the_limits_of_float32(scale):
    cloud = (np.random.default_rng(4).normal(size=(8, 100)) * scale).astype(np.float32)
    np.testing.assert_allclose(pairwise_distances(cloud), distances_of(cloud.astype(np.float64)), rtol=1e-12)


def test_distances_beyond_float32_precision_are_ordered():
    # Points on a line, so that every pair of neighbours has nearly the same distance.
    steps = 1 + 1e-6 * np.random.default_rng(6).permutation(15)
    cloud = np.zeros((16, 5000), np.float32)
    cloud[1:, 0] = np.cumsum(steps)
    cloud += np.float32(0.5)
    expected = distances_of(cloud.astype(np.float64))[np.triu_indices(16, 1)]
    found = pairwise_distances(cloud)[np.triu_indices(16, 1)]
    np.testing.assert_array_equal(np.argsort(found, kind="stable"), np.argsort(expected, kind="stable"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_clouds_give_non_finite_distances(value):
    cloud = np.ones((5, 6000), np.float32)
    cloud[3, 5999] = value
    assert not np.isfinite(pairwise_distances(cloud)).all()


@pytest.mark.parametrize("apart", [0, 1e-5])
@pytest.mark.parametrize("near", [slice(0, 60), slice(60, 120)])
def test_near_duplicates_among_ordinary_images_are_ordered(near, apart):
    cloud = np.random.default_rng(10).normal(size=(120, 240)).astype(np.float32)
    cloud[near] = cloud[near.start] + apart * np.random.default_rng(11).normal(size=(60, 240)).astype(np.float32)
    (_, ranks), (_, expected_ranks) = (
        np.unique(values.astype(np.float32), return_inverse=True)
        for values in (pairwise_distances(cloud), distances_of(cloud.astype(np.float64)))
    )
    np.testing.assert_array_equal(ranks, expected_ranks)


@pytest.mark.parametrize("num_points", [40, 150])
def test_concentrated_distances_are_ordered(num_points):
    # Thousands of pairs within a few per cent of one distance.
    cloud = np.random.default_rng(9).normal(size=(num_points, 20_000)).astype(np.float32)
    exact = distances_of(cloud.astype(np.float64))[np.triu_indices(num_points, 1)]
    found = pairwise_distances(cloud)[np.triu_indices(num_points, 1)]
    np.testing.assert_array_equal(np.argsort(found), np.argsort(exact))
