"""The accuracy benchmark and its results: the plan, the folder makers, and statistics against hand-made values."""

import csv
import itertools
import json
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import comparing
import h5py
import image_folders
import make_photo_cells
import make_shifted_digits
import numpy as np
import pytest
import results
import sweep
from networks import network_of, tiny_model

import data
from benchmarks import accuracy, other_scores
from core.config import Config
from core.errors import RunError
from selection import SCHEMES, rank_layers

pytestmark = pytest.mark.slow  # many run folders and pictures
WEIGHTS = Path("weights.h5")
TASKS = {**accuracy.TASKS, "quick": replace(accuracy.TASKS["digits"], **accuracy.SMALL)}
LAYERS = [f"layer{i}" for i in range(10)]


def make_run(folder, cfg, test=50.0, val=50.0, val_loss=1.0, status="done", memory_mb=100.0, ranks=None):
    """Writes a finished run folder with these figures; `ranks` are those of LAYERS."""
    folder.mkdir(parents=True)
    config = {
        **asdict(cfg), "bn_stats": "stored", "fingerprint": f"print-{folder.name}", "device": "CPU:0", "cpu_count": 2,
        "split_sizes": {"train": 270, "validation": 30, "test": 360}, "weights_provenance": {"source": "file", "sha256": "abc"},
        "num_classes": 10,
    }  # fmt: skip
    summary = {
        "status": status, "accuracy": test, "val_accuracy": val, "best_epoch": 2, "epoch_s": 1.0 + cfg.seed, "selection_s": 0.5,
        "peak_memory_bytes_measured": memory_mb * 1e6, "num_trained_weights": 1000,
    }  # fmt: skip
    ranks = ranks or [None] * len(LAYERS)
    layers = [
        {"path": path, "rank": rank, "betti_1": 20.0 - (rank or 0), "activation_size": 10 + i, "score": 0.1}
        for i, (path, rank) in enumerate(zip(LAYERS, ranks))
    ]
    selected = [row["path"] for row in layers if row["rank"] and row["rank"] <= 2]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "selection.json").write_text(json.dumps({"layers": layers, "selected": selected, "stability": 0.5}))
    (folder / "metrics.csv").write_text(f"epoch,val_loss\n1,9.0\n2,{val_loss}\n")
    (folder / "log.txt").write_text("2026-11-24 12:00:00,000 INFO Run folder\n")


# ---------------------------------------------------------------- the plan


@pytest.fixture(autouse=True)
def weights_file(tmp_path, monkeypatch):
    """A working directory with a weights file of one layer."""
    monkeypatch.chdir(tmp_path)
    with h5py.File(WEIGHTS, "w") as file:
        file.attrs["layer_names"] = [b"Conv1"]
        layer = file.create_group("Conv1")
        layer.attrs["weight_names"] = [b"kernel"]
        layer["kernel"] = np.ones((3, 3, 3, 32), np.float32)


def planned(sweeps):
    return [run.cfg for argv in sweeps for run in accuracy.planned(argv)]


def same_rate(task, rate=0.01):
    searched = {"seeds": list(task.search_seeds), "rhos": list(task.search_rhos)}
    return {scheme: {"learning_rate": rate, **searched} for scheme in task.schemes}


@pytest.mark.parametrize("name", TASKS)
def test_search_has_seeds_of_its_own_and_hardly_any_test_image(name):
    task = TASKS[name]
    search = planned(accuracy.search_sweeps(task, Path("task"), WEIGHTS, dict.fromkeys(task.schemes, task.rates)))
    reported = planned(accuracy.reported_sweeps(task, Path("task"), WEIGHTS, same_rate(task)))
    assert {cfg.seed for cfg in search} == set(task.search_seeds)
    assert {cfg.rho for cfg in search if cfg.train_type == "random_layers"} == set(map(float, task.search_rhos))
    assert set(task.search_rhos) <= set(task.rhos)
    for scheme in accuracy.OTHERS:  # no rate is chosen at a rho that is not reported
        assert len({frozenset(cfg.rho for cfg in part if cfg.train_type == scheme) for part in (search, reported)}) == 1
    assert {cfg.seed for cfg in reported} == set(task.seeds)
    assert not {cfg.seed for cfg in search} & {cfg.seed for cfg in reported}
    assert {cfg.limit_test for cfg in search} == {20}
    assert {cfg.limit_test for cfg in reported} == {None}
    for cfg in search + reported:
        assert cfg.protocol == "validation"
        assert (cfg.augment, cfg.input_size, cfg.num_epochs) == (False, 96, task.num_epochs)
        assert cfg.limit_train == (task.images if task.limited else None)


@pytest.mark.parametrize(
    ("best", "tried"),
    [(0.003, [0.003, 0.01, 0.03]), (0.01, [0.003, 0.01, 0.03]), (0.03, [0.01, 0.03, 0.1]), (0.1, [0.01, 0.03, 0.1])],
)
def test_search_tries_rates_until_the_best_has_worse_neighbours(tmp_path, monkeypatch, best, tried):
    def train(argv):
        for run in accuracy.planned(argv):
            if not run.folder.exists():
                make_run(run.folder, run.cfg, val_loss=abs(np.log(run.cfg.learning_rate / best)))
        return 0

    monkeypatch.setattr(sweep, "main", train)
    task = replace(TASKS["digits"], search_seeds=(100, 101))
    found = accuracy.search(task, tmp_path / "task", WEIGHTS)
    assert found.keys() == SCHEMES.keys() - {"listed_layers"}
    for row in found.values():
        assert row["learning_rate"] == best
        assert list(map(float, row["val_loss"])) == tried


def test_rate_at_which_a_higher_rho_collapses_is_not_chosen(tmp_path, monkeypatch):
    def train(argv):
        for run in accuracy.planned(argv):
            collapses = run.cfg.rho == 0.4 and run.cfg.learning_rate > 0.01
            loss = 2.3 if collapses else abs(np.log(run.cfg.learning_rate / 0.03))
            if not run.folder.exists():
                make_run(run.folder, run.cfg, val_loss=loss)
        return 0

    monkeypatch.setattr(sweep, "main", train)
    task = replace(TASKS["digits"], schemes=("random_layers", "full_training"))
    found = accuracy.search(task, tmp_path / "task", WEIGHTS)
    assert {scheme: row["learning_rate"] for scheme, row in found.items()} == {
        "random_layers": 0.01, "full_training": 0.03,
    }  # fmt: skip
    assert accuracy.unsearched(task, found) == []


@pytest.mark.parametrize("other", [{"seeds": [100]}, {"rhos": ["0.1"]}])
def test_rates_of_another_search_are_searched_again(other):
    task = TASKS["digits"]
    rates = same_rate(task)
    assert accuracy.unsearched(task, rates) == []
    rates["fisher"] |= other
    assert accuracy.unsearched(task, rates) == ["fisher"]


def test_known_schemes_are_not_searched_again(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(accuracy, "search", lambda task, *others: started.append(task.schemes) or same_rate(task))
    monkeypatch.setattr(sweep, "main", lambda argv: 0)
    command = ["--weights", str(WEIGHTS), "--task", "digits", "--log_dir", "logs", "--schemes", "fisher"]
    for more in ([], ["rgn"], ["rgn", "full_training"]):
        assert accuracy.main([*command, *more]) == 0
    assert started == [["fisher"], ["rgn"], ["full_training"]]
    assert json.loads(Path("logs/digits/learning_rates.json").read_text()).keys() == {"fisher", "rgn", "full_training"}
    assert json.loads(Path("logs/digits/task.json").read_text()) == {"timed_seed": 0}


def test_only_timed_runs_have_the_machine_to_themselves():
    task = TASKS["digits"]
    for argv in accuracy.reported_sweeps(task, Path("task"), WEIGHTS, same_rate(task)):
        seeds, jobs = (argv[argv.index(flag) + 1] for flag in ("--seeds", "--jobs"))
        assert (seeds, jobs) in [("0", "1"), ("1,2,3,4", "2")]


def test_each_scheme_trains_with_its_rate_at_its_rhos():
    task = replace(TASKS["digits"], seeds=(0,), other_rhos=("0.1",))
    rates = {scheme: {"learning_rate": 0.001 * (1 + i % 3)} for i, scheme in enumerate(task.schemes)}
    rhos = {}
    for cfg in planned(accuracy.reported_sweeps(task, Path("task"), WEIGHTS, rates)):
        assert cfg.learning_rate == rates[cfg.train_type]["learning_rate"]
        rhos.setdefault(cfg.train_type, []).append(cfg.rho)
    assert rhos.keys() == set(task.schemes)
    assert rhos["act_norm_betti_train"] == rhos["random_layers"] == [0.05, 0.1, 0.2, 0.4]
    assert rhos["elastic_training"] == [0.4, 0.533, 0.7]
    assert rhos["rgn"] == [0.1]
    assert rhos["full_training"] == [None]


def searched(folder, figures):
    """Runs of a search by act_norm_betti_train, with {(rate, seed): figures of make_run}; those of None are missing."""
    argv = ["--models", "mobilenetv2", "--datasets", "digits", "--train_types", "act_norm_betti_train",
            "--weights", "none", "--log_dir", str(folder)]  # fmt: skip
    runs = []
    for (rate, seed), given in figures.items():
        (run,) = accuracy.planned([*argv, "--learning_rate", rate, "--seeds", str(seed)])
        runs.append(run)
        if given is not None:
            make_run(run.folder, run.cfg, **given)
    return runs


def test_rate_is_chosen_by_validation_and_not_by_test(tmp_path):
    runs = searched(tmp_path / "search", {
        ("0.01", 100): {"val_loss": 0.5, "test": 99.0}, ("0.01", 101): {"val_loss": 0.7, "test": 99.0},
        ("0.03", 100): {"val_loss": 0.25, "test": 10.0}, ("0.03", 101): {"val_loss": 0.75, "test": 10.0},
        ("0.1", 100): {"val_loss": 0.1}, ("0.1", 101): {"status": "diverged"},
    })  # fmt: skip
    assert accuracy.choose_rates(runs) == {
        "act_norm_betti_train": {
            "learning_rate": 0.03, "seeds": [100, 101], "val_loss": {"0.01": 0.6, "0.03": 0.5, "0.1": None},
        }
    }  # fmt: skip


@pytest.mark.parametrize("given", [None, {"status": "failed"}, {"status": "interrupted"}])
def test_no_rate_is_chosen_before_the_search_is_finished(tmp_path, given):
    runs = searched(tmp_path / "search", {("0.01", 100): {}, ("0.03", 100): given})
    with pytest.raises(RunError, match="needs all its runs"):
        accuracy.choose_rates(runs)


def test_written_rates_are_read_and_not_searched_again(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(sweep, "main", lambda argv: started.append(argv) or 0)
    folder = tmp_path / "logs" / "digits_all"
    folder.mkdir(parents=True)
    rates = same_rate(TASKS["digits_all"], 0.07)
    (folder / "learning_rates.json").write_text(json.dumps(rates))
    assert accuracy.main(["--weights", str(WEIGHTS), "--task", "digits_all", "--log_dir", "logs"]) == 0
    assert len(started) == 2  # the first seed, and the others; all rates are equal
    assert {argv[argv.index("--learning_rate") + 1] for argv in started} == {"0.07"}
    assert all(argv[argv.index("--log_dir") + 1].endswith("runs") for argv in started)


def test_missing_weights_are_refused_before_anything_runs(tmp_path, capsys):
    assert accuracy.main(["--weights", "nowhere.h5", "--log_dir", "logs"]) == 2
    assert "Received: " in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_estimate_leaves_out_finished_runs(tmp_path):
    task = TASKS["quick"]
    before = accuracy.estimate({"quick": task}, tmp_path, WEIGHTS)
    rates = dict.fromkeys(task.schemes, task.rates)
    first = accuracy.planned(accuracy.search_sweeps(task, tmp_path / "quick", WEIGHTS, rates)[0])
    for run in first:
        make_run(run.folder, run.cfg)
    after = accuracy.estimate({"quick": task}, tmp_path, WEIGHTS)
    count = lambda line: int(line.split("quick ")[1].split(".")[0])
    assert count(before) - count(after) == len(first) == len(task.schemes)


# ---------------------------------------------------------------- the folder makers


@pytest.mark.parametrize("maker", [make_shifted_digits, make_photo_cells])
def test_same_seed_gives_the_same_images(maker):
    first, again, other = (list(itertools.islice(maker.images(seed), 40)) for seed in (3, 3, 4))
    assert all(np.array_equal(a[2], b[2]) and a[:2] == b[:2] for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a[2], b[2]) for a, b in zip(first, other))


def test_shifted_digits_keep_the_split_and_are_visible():
    counts, contrasts = Counter(), []
    for split, name, pixels in make_shifted_digits.images(0):
        assert pixels.shape == (96, 96, 3) and pixels.dtype == np.uint8
        counts[split] += 1
        counts[name] += 1
        contrasts.append(np.ptp(pixels.mean(axis=2)))
    assert (counts["train"], counts["test"]) == (1437, 360)
    assert all(174 <= counts[str(digit)] <= 183 for digit in range(10))  # scikit-learn's counts
    assert min(contrasts) > 30


def test_photo_cells_are_sixteen_equal_classes():
    counts = Counter((split, name) for split, name, pixels in make_photo_cells.images(0) if pixels.shape == (48, 48, 3))
    assert len({name for _, name in counts}) == 16
    assert {count for (split, _), count in counts.items() if split == "train"} == {60}
    assert {count for (split, _), count in counts.items() if split == "test"} == {30}


def test_train_and_test_parts_of_cells_are_apart():
    owner = np.full((427, 640), "", dtype="U5")
    for parts in make_photo_cells.regions(427, 640):
        for split, boxes in parts.items():
            for top, left, bottom, right in boxes:
                assert bottom - top >= make_photo_cells.CROP and right - left >= make_photo_cells.CROP
                assert (owner[top:bottom, left:right] == "").all()
                owner[top:bottom, left:right] = split
    gap = make_photo_cells.GAP
    for top in range(427 - gap):  # inside a cell, no train row is within the gap of a test row
        near = owner[top : top + gap + 1]
        assert top % 213 > 213 - gap - 1 or not ((near == "train").any(0) & (near == "test").any(0)).any()


def test_folder_is_complete_or_absent(tmp_path, capsys):
    def broken(seed):
        yield "train", "a", np.zeros((4, 4, 3), np.uint8)
        raise OSError("disk full")

    with pytest.raises(OSError):
        image_folders.main(broken, "doc", [str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    pixels = np.full((4, 4, 3), 7, np.uint8)
    assert image_folders.main(lambda seed: [("test", "b", pixels)], "doc", [str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "test" / "b" / "00000.png").exists()
    assert image_folders.main(broken, "doc", [str(tmp_path / "out")]) == 2
    assert "must not exist" in capsys.readouterr().err


# ---------------------------------------------------------------- statistics


def test_difference_has_mean_interval_and_verdict():
    assert comparing.Difference((1.0, 2.0, 3.0)).mean == 2.0
    # 27 equally likely resamples of three: 1/27 > 2.5 % have the mean 1, and 1/27 the mean 3.
    assert comparing.Difference((1.0, 2.0, 3.0)).interval == (1.0, 3.0)
    assert comparing.Difference((1.0, 2.0, 3.0)).verdict == "ahead"
    assert comparing.Difference((-1.0, -2.0, -3.0)).verdict == "behind"
    assert comparing.Difference((-1.0, 2.0, 3.0)).verdict == "undecided"
    for few in ((5.0,), (5.0, 6.0)):
        assert comparing.Difference(few).interval is None
        assert comparing.Difference(few).verdict == "undecided"


def test_same_rho_pairs_seeds_and_averages_over_rhos():
    ours = {0.1: {0: (1, 80.0), 1: (1, 82.0)}, 0.2: {0: (1, 90.0), 1: (1, 91.0), 2: (1, 0.0)}, 0.4: {0: (1, 5.0)}}
    theirs = {0.1: {0: (9, 70.0), 1: (9, 80.0)}, 0.2: {0: (9, 94.0), 1: (9, 90.0)}}
    found = comparing.at_same_rho(ours, theirs)
    assert {rho: difference.values for rho, difference in found.items()} == {
        0.1: (10.0, 2.0), 0.2: (-4.0, 1.0), None: (3.0, 1.5),
    }  # fmt: skip


def test_same_memory_interpolates_and_never_extrapolates():
    theirs = {None: {0: (100, 50.0), 1: (100, 40.0)}, 0.1: {0: (200, 70.0), 1: (200, 80.0)}}
    ours = {0.1: {0: (150, 65.0), 1: (125, 50.0)}, 0.2: {0: (200, 72.0), 1: (300, 99.0)}}
    difference, compared = comparing.at_same_memory(ours, theirs)
    # Seed 0: 65 - 60 and 72 - 70. Seed 1: 50 - 50; 300 is outside.
    assert difference.values == (3.5, 0.0)
    assert compared == 3
    assert comparing.at_same_memory({0.1: {0: (94, 1.0)}}, theirs) == (None, 0)
    difference, _ = comparing.at_same_memory({0.1: {0: (96, 60.0), 1: (209, 70.0)}}, theirs)  # within 5 %
    assert difference.values == (10.0, -10.0)


def test_agreement_by_hand():
    assert comparing.jaccard(["ab", "bc", "ab"]) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert comparing.jaccard(["ab"]) is None
    assert comparing.spearman([1, 2, 3], [10, 20, 25]) == pytest.approx(1)
    assert comparing.spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert comparing.spearman([1, 1, 1], [1, 2, 3]) is None
    assert comparing.mean_spearman([[1, 2, 3], [3, 2, 1], [1, 2, 3]]) == pytest.approx(-1 / 3)


# ---------------------------------------------------------------- other scores


def test_directions_are_distances_of_centred_unit_points():
    points = np.random.default_rng(0).normal(size=(12, 5)) * np.geomspace(1, 100, 12)[:, None]
    centred = points - points.mean(axis=0)
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    distances = lambda cloud: np.linalg.norm(cloud[:, None] - cloud, axis=2)
    assert np.allclose(other_scores.directions(distances(points)), distances(units), atol=1e-6)


def test_mean_place_is_minus_the_mean_rank():
    assert other_scores.mean_place(np.array([[3, 1, 2], [30, 20, 10]])).tolist() == [-1, -2.5, -2.5]


def test_each_score_trains_its_layers_like_adabet(tmp_path, monkeypatch, capsys):
    command = ["--weights", str(WEIGHTS), "--task", "photo_cells", "--log_dir", "logs", "--seeds", "2"]
    assert other_scores.main(command) == 2
    assert "Received: logs/photo_cells" in capsys.readouterr().err
    (tmp_path / "logs" / "photo_cells" / "images").mkdir(parents=True)
    (tmp_path / "logs" / "photo_cells" / "learning_rates.json").write_text(
        json.dumps({"act_norm_betti_train": {"learning_rate": 0.07}})
    )
    layers = lambda function, cfg, scores: {score: [f"{score}{cfg.seed}", "last"] for score in scores}
    monkeypatch.setattr(other_scores, "in_new_process", layers)
    started = []
    monkeypatch.setattr(sweep, "main", lambda argv: started.append(argv) or 0)
    assert other_scores.main(command) == 0
    (like,) = accuracy.planned(
        [*accuracy.arguments(TASKS["photo_cells"], Path("logs/photo_cells"), WEIGHTS), "--seeds", "1",
         "--learning_rate", "0.07", "--train_types", "act_norm_betti_train", "--rhos", "0.1"]
    )  # fmt: skip
    found = {}
    for argv in started:
        (run,) = accuracy.planned([word for word in argv if word != "--skip_prepare"])
        file = Path(run.cfg.layers.removeprefix("@"))
        found[file.parent.name, run.cfg.seed] = file.read_text().split()
        if run.cfg.seed == 1:
            only = {"train_type", "rho", "layers", "log_dir", "run_name", "num_betti_batches"}
            assert {k: v for k, v in asdict(run.cfg).items() if k not in only} == {
                k: v for k, v in asdict(like.cfg).items() if k not in only
            }
    assert found == {(s, n): [f"{s}{n}", "last"] for s in other_scores.SCORES for n in (0, 1)}


def test_scores_of_a_network_by_hand(data_dir):
    cfg = Config(dataset_name="digits", input_size=16, data_dir=data_dir, batch_size=8, limit_train=40)
    network = network_of(tiny_model(), "stored")
    images = data.load(cfg)
    clouds = other_scores.Clouds(cfg, images, network)
    selection = rank_layers(network, images.selection_batches(8, cfg.num_betti_batches), rho=0.5)
    assert clouds.betti_1.T.tolist() == [row["betti_1_per_batch"] for row in selection.layers]
    assert clouds.sizes.tolist() == [8 * row["activation_size"] for row in selection.layers]
    # Layer sizes are 8 x 8 x 8 three times, 4 x 4 x 12 twice, and 10.
    assert clouds.bytes_to_train.tolist() == [4 * 8 * n for n in (1930, 1418, 906, 394, 202, 10)]
    for lengths, counts in zip(clouds.bar_lengths.ravel(), clouds.betti_1.ravel()):
        assert (lengths > 0) == (counts > 0)
    # A square of side 1 has one bar, from 1 to the diagonal; seen from its centre its corners have length 1.
    corners = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])
    clouds.distances = [[np.linalg.norm(corners[:, None] - corners, axis=2)]]
    for name in ("betti_1", "bar_lengths", "betti_1_of_directions"):
        vars(clouds).pop(name, None)
    assert clouds.bar_lengths == pytest.approx(np.sqrt(2) - 1)
    assert clouds.betti_1_of_directions.tolist() == [[1]]


# ---------------------------------------------------------------- the page


def make_task(root, adabet=80.0, others=70.0):
    """A task with AdaBet, its opponents, b1 alone, the head alone and full training, two rhos, three seeds."""
    schemes = {"act_norm_betti_train": (adabet, 120), "betti_train": (others, 150), "random_layers": (others, 150),
               "last_layers": (others, 150), "smallest_activations": (others, 150), "fisher": (others, 150),
               "elastic_training": (others, 300), "full_training": (others, 400),
               "traditional_tl_training": (others - 20, 100)}  # fmt: skip
    for (scheme, (level, memory)), seed in itertools.product(schemes.items(), range(3)):
        reads_rho = "rho" in SCHEMES[scheme].reads
        ranks = [1 + (i + seed) % 10 for i in range(10)] if scheme == "random_layers" else list(range(1, 11))
        for rho in (0.1, 0.4) if reads_rho else (None,):
            cfg = Config(model_name="mobilenetv2", train_type=scheme, rho=rho, seed=seed, num_betti_batches=None)
            made = {"ranks": ranks} if reads_rho and scheme != "elastic_training" else {}
            figures = {"test": level + seed, "memory_mb": memory + 100 * (rho or 0)}
            make_run(root / "runs" / f"{scheme}_{rho}_{seed}", cfg, **figures, **made)
    make_run(root / "search" / "searched", Config(model_name="mobilenetv2", seed=100))
    rates = {
        s: {"learning_rate": 0.01, "seeds": [100], "rhos": ["0.1"], "val_loss": {"0.01": 0.777, "0.1": None}}
        for s in schemes
    }
    (root / "learning_rates.json").write_text(json.dumps(rates))
    (root / "task.json").write_text(json.dumps({"timed_seed": 0}))


def page(tmp_path, out="docs"):
    assert results.main([str(tmp_path / "logs"), "--out", str(tmp_path / out)]) == 0
    return (tmp_path / out / "results.md").read_text()


@pytest.mark.parametrize(
    ("adabet", "sentence"),
    [
        (80.0, "is ahead of the simpler choices by more than the spread over seeds: at the same rho it is ahead in 4, behind in 0"),
        (60.0, "is not ahead of the simpler choices by more than the spread over seeds: at the same rho it is ahead in 0, behind in 4"),
        (70.0, "is not ahead of the simpler choices by more than the spread over seeds: at the same rho it is ahead in 0, behind in 0"),
    ],
)  # fmt: skip
def test_first_sentence_follows_from_the_figures(tmp_path, adabet, sentence):
    make_task(tmp_path / "logs" / "digits", adabet=adabet)
    first = page(tmp_path).splitlines()[2]
    assert sentence in first


def test_page_has_the_figures_of_the_runs(tmp_path):
    make_task(tmp_path / "logs" / "digits")
    overall, text = page(tmp_path), (tmp_path / "docs" / "results" / "digits.md").read_text()
    assert (
        "| digits | AdaBet | act_norm_betti_train | 0.1 | 0.01 | 3 | 81.00 ± 1.00 | 130.0 | 1.00 | 0.50 | 1.0 |"
        in overall
    )
    assert "| digits | random_layers | rho | +10.00 | +10.00 to +10.00 | 3 | ahead | all |" in overall
    assert "| random_layers | 0.4 | 71.00 ± 1.00 |" in overall
    assert "| act_norm_betti_train | 0.1 | 0.01 | 3 | 81.00 ± 1.00 | 130.0 | 1.00 | 0.50 | 1.0 |" in text
    assert "| random_layers | rho | +10.00 | +10.00 to +10.00 | 3 | ahead | all |" in text
    assert "| elastic_training | rho" not in text  # a share of time
    # At 130 MB: between the head alone, 50 points at 100 MB, and 70 points at 160 MB, lie 60 points.
    # At 160 MB: 70 points.
    assert "| random_layers | memory | +15.00 | +15.00 to +15.00 | 3 | ahead | 6 of 6 |" in text
    assert "b1 1.00 (1.00 to 1.00), small activation 1.00 (1.00 to 1.00)" in text
    assert "| act_norm_betti_train | 1.00 | 1.00 | 0.50 | 1.00 |" in text  # stability
    assert "| fisher | 0.777 | - | 0.01 |" in text  # learning rates
    assert (tmp_path / "docs" / "results" / "digits.svg").stat().st_size < 200_000


@pytest.mark.parametrize(("correct", "guessed"), [(46, True), (47, False)])
def test_run_at_chance_is_one_that_guessing_reaches(tmp_path, correct, guessed):
    # Of 360 guesses among ten classes, 46 are right with a probability of 5.1 %, 47 with one of 3.6 %.
    make_task(tmp_path / "logs" / "digits")
    make_run(
        tmp_path / "logs" / "digits" / "runs" / "poor",
        Config(train_type="prunetrain", seed=0, rho=None, num_betti_batches=None, model_name="mobilenetv2"),
        test=100 * correct / 360,
    )
    chance = f"{100 * correct / 360:.2f} (1 at chance)"
    assert (chance in page(tmp_path)) == guessed


def test_same_runs_give_the_same_files(tmp_path):
    make_task(tmp_path / "logs" / "digits")
    page(tmp_path), page(tmp_path, "again")
    for name in ("results.md", "results.csv", "results/digits.md", "results/digits.svg"):
        assert (tmp_path / "docs" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_csv_lists_every_run_with_its_fingerprint(tmp_path):
    make_task(tmp_path / "logs" / "digits")
    page(tmp_path)
    with open(tmp_path / "docs" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    folders = {path.parent.name for path in (tmp_path / "logs").rglob("summary.json")}
    assert {row["run"] for row in rows} == folders
    assert all(row["fingerprint"] == f"print-{row['run']}" for row in rows)
    assert Counter(row["part"] for row in rows) == {"runs": len(folders) - 1, "search": 1}


def test_tasks_of_other_log_folders_are_kept(tmp_path):
    make_task(tmp_path / "logs" / "digits")
    make_task(tmp_path / "logs" / "photo_cells", adabet=60.0)
    together = page(tmp_path, "together")
    (tmp_path / "logs" / "photo_cells").rename(tmp_path / "elsewhere")
    page(tmp_path)
    shutil.rmtree(tmp_path / "logs" / "digits")
    (tmp_path / "elsewhere").rename(tmp_path / "logs" / "photo_cells")
    assert page(tmp_path) == together
    for name in ("results.csv", "results/digits.md", "results/photo_cells.md"):
        assert (tmp_path / "docs" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


def test_other_scores_are_compared_with_adabet(tmp_path):
    make_task(tmp_path / "logs" / "digits")
    for seed in range(3):
        cfg = Config(model_name="mobilenetv2", train_type="listed_layers", rho=None, layers="@l", seed=seed)
        make_run(tmp_path / "logs" / "digits" / "scores" / "persistence" / f"run{seed}", cfg, test=82.0 + 2 * seed)
    (tmp_path / "logs" / "digits" / "scores" / "persistence" / "layers_0123.txt").write_text("layer1\n")
    text = page(tmp_path)
    assert "benchmarks/other_scores.py --weights WEIGHTS.h5 --task digits" in text
    assert "| digits | persistence | 84.00 ± 2.00 | +3.00 | +2.00 to +4.00 | 3 | ahead |" in text
    assert "| digits | betti_train | 71.00 ± 1.00 | -10.00 | -10.00 to -10.00 | 3 | behind |" in text
    assert "listed_layers" not in text
    shutil.rmtree(tmp_path / "logs" / "digits")
    make_task(tmp_path / "logs" / "photo_cells")
    assert "| digits | persistence | 84.00 ± 2.00 | +3.00 | +2.00 to +4.00 | 3 | ahead |" in page(tmp_path)


def test_scores_that_cannot_be_compared_are_refused(tmp_path, capsys):
    make_task(tmp_path / "logs" / "digits")
    for name, epochs in (("again", 10), ("longer", 99)):
        for run in ("run", "twice"):
            cfg = Config(model_name="mobilenetv2", train_type="listed_layers", rho=None, layers="@l", num_epochs=epochs)
            make_run(tmp_path / "logs" / "digits" / "scores" / name / run, cfg)
    assert results.main([str(tmp_path / "logs"), "--out", str(tmp_path / "docs")]) == 2
    assert "different num_epochs" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "logs" / "digits" / "scores" / "longer")
    assert results.main([str(tmp_path / "logs"), "--out", str(tmp_path / "docs")]) == 2
    assert "two runs of ('again', None, 0)" in capsys.readouterr().err


def test_quick_copies_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "search", lambda task, *others: same_rate(task))
    monkeypatch.setattr(sweep, "main", lambda argv: 0)
    assert accuracy.main(["--weights", str(WEIGHTS), "--task", "digits", "--quick", "--log_dir", "made"]) == 0
    assert [path.name for path in Path("made").iterdir()] == ["digits_quick"]
    make_task(tmp_path / "logs" / "digits_quick")
    assert "    python benchmarks/accuracy.py --weights WEIGHTS.h5 --task digits --quick\n" in page(tmp_path)


def test_run_that_failed_without_a_folder_is_counted(tmp_path):
    make_task(tmp_path / "logs" / "digits")
    failures = tmp_path / "logs" / "digits" / "runs" / "sweep"
    failures.mkdir()
    arguments = "--model_name mobilenetv2 --train_type rgn --rho 0.1 --weights none --seed 0".split()
    (failures / "lost.json").write_text(json.dumps({"arguments": arguments, "exit_code": 1}))
    page(tmp_path)
    assert "Not finished: 1 failed." in (tmp_path / "docs" / "results" / "digits.md").read_text()


def test_table_of_another_version_is_refused(tmp_path, capsys):
    make_task(tmp_path / "logs" / "digits")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.csv").write_text("task,accuracy\n")
    assert results.main([str(tmp_path / "logs"), "--out", str(tmp_path / "docs")]) == 2
    assert "must have the columns" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["results.csv"]


@pytest.mark.parametrize("part", [["--seeds", "0"], ["--task", "photo_cells", "--schemes", "rgn"]])
def test_part_without_runs_is_refused(tmp_path, capsys, part):
    assert accuracy.main(["--weights", str(WEIGHTS), "--log_dir", "logs", *part]) == 2
    assert "Received: " in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys):
    make_task(tmp_path / "logs" / "digits")
    cfg = Config(model_name="mobilenetv2", train_type="fisher", rho=0.1, seed=0, num_betti_batches=None, num_epochs=99)
    make_run(tmp_path / "logs" / "digits" / "runs" / "other", cfg)
    assert results.main([str(tmp_path / "logs"), "--out", str(tmp_path / "docs")]) == 2
    assert "num_epochs" in capsys.readouterr().err
