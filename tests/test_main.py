"""The command line from its users' side: runs, run folders, exit codes, one-line errors."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import archives
import keras
import numpy as np
import pytest
from networks import network_of, tiny_model

import models
import train
from data import DATASETS
from main import main
from models import weights
from run import flags
from selection import SCHEMES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SUMMARY = [
    "status",
    "model_name",
    "dataset_name",
    "train_type",
    "rho",
    "seed",
    "protocol",
    "weights",
    "accuracy",
    "val_accuracy",
    "epochs",
    "best_epoch",
    "selection_s",
    "compile_s",
    "train_s",
    "epoch_s",
    "eval_s",
    "checkpoint_s",
    "peak_memory_bytes_measured",
    "selection_peak_memory_bytes",
    "peak_rss_bytes",
    "memory_device",
    "peak_memory_bytes_estimated",
    "memory_mb_published_convention",
    "num_trained_layers",
    "num_trained_weights",
    "num_weights",
    "num_layers",
    "earliest_trained_layer",
    "rho_achieved_predicted",
    "rho_achieved_measured",
    "channels",
    "channels_pruned",
    "flops_remaining",
    "memory_budget_mb",
    "budget_next_layer",
    "budget_next_bytes_estimated",
    "stayed_at_chance",
    "skipped_images",
    "cache_features",
    "cached_views",
    "cache_s",
    "cache_bytes",
    "cache_cut",
    "cache_step_share",
    "cache_full_step_share",
]


def run_of(folder):
    """The records of the one run in a log folder."""
    (run,) = [path for path in Path(folder).iterdir() if path.is_dir()]
    return run, {path.name: json.loads(path.read_text()) for path in run.glob("*.json")}


def metrics_of(run):
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assemble_tiny(cfg, num_classes):
    return network_of(tiny_model(input_size=cfg.input_size, num_classes=num_classes))


@pytest.fixture
def tiny(monkeypatch, tmp_path, data_dir):
    """Gives main() with a tiny network in place of the backbone, logging to tmp_path/logs."""

    monkeypatch.setattr(models, "assemble", assemble_tiny)
    monkeypatch.setattr(weights, "load", lambda backbone, cfg: {"source": "none"})
    few = [
        "--limit_train",
        "160",
        "--limit_test",
        "40",
        "--batch_size",
        "16",
        "--num_epochs",
        "2",
        "--data_dir",
        data_dir,
    ]
    return lambda *argv: main([*few, "--log_dir", str(tmp_path / "logs"), *argv])


# ---------------------------------------------------------------- the main job, for real


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory, data_dir):
    """The same command twice, as a user would run it, in processes of their own."""
    folders = []
    for attempt in ("first", "second"):
        folder = tmp_path_factory.mktemp(attempt)
        command = [sys.executable, "main.py", "--model_name", "mobilenetv2", "--train_type", "--train_type",
                   "act_norm_betti_train", "--rho", "0.1", "--weights", "none", "--limit_train", "90",
                   "--limit_test", "40", "--batch_size", "16", "--num_epochs", "2", "--save_model", "--save_txt", "true",
                   "--data_dir", data_dir, "--log_dir", str(folder)]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        folders.append((folder, done))
    return folders


def test_run_folder_has_all_documented_files_and_keys(real_runs):
    folder, done = real_runs[0]
    run, records = run_of(folder)
    assert run.name == "mobilenetv2_digits_act_norm_betti_train_rho0.1_seed0"
    assert {path.name for path in run.iterdir()} == {
        "config.json", "selection.json", "metrics.csv", "summary.json", "log.txt", "tensorboard", "model.keras",
    }  # fmt: skip

    config = records["config.json"]
    assert (
        config["rho"] == 0.1 and config["num_epochs"] == 2 and config["layers"] is None and config["interval"] is None
    )
    assert config["bn_stats"] == "batch" and config["num_classes"] == 10 and config["dataset_version"] == "digits:1.0.0"
    assert config["split_sizes"] == {"train": 81, "validation": 9, "test": 40}
    assert config["weights_provenance"]["source"] == "none" and config["device"] and config["versions"]["keras"]

    selection = records["selection.json"]
    assert (selection["num_layers"], selection["budget"], len(selection["selected"])) == (105, 10, 10)
    assert [row["path"] for row in selection["layers"] if row["selected"]] == selection["selected"]
    assert sorted(row["rank"] for row in selection["layers"]) == list(range(1, 106))
    for row in selection["layers"]:
        assert len(row["betti_1_per_batch"]) == 4 and row["betti_1"] == np.mean(row["betti_1_per_batch"])
        assert row["score"] == pytest.approx(row["betti_1"] / (16 * row["activation_size"]))

    summary = records["summary.json"]
    assert list(summary) == SUMMARY
    assert summary["status"] == "done" and summary["epochs"] == 2 and summary["best_epoch"] in (1, 2)
    assert 0 < summary["peak_memory_bytes_measured"] < summary["peak_rss_bytes"]
    assert summary["selection_peak_memory_bytes"] > 0 and summary["memory_device"] == "CPU:0"
    assert summary["num_trained_layers"] == 10 + selection["head_added"]
    assert summary["num_trained_weights"] < summary["num_weights"] == 2_236_682

    rows = metrics_of(run)
    assert list(rows[0]) == [
        "epoch",
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "seconds",
        "learning_rate",
    ]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert summary["train_s"] == pytest.approx(sum(float(row["seconds"]) for row in rows))
    assert float(rows[1]["learning_rate"]) == pytest.approx(0, abs=1e-9)
    assert "layers train" in (run / "log.txt").read_text().lower()

    hours, accuracy = (folder / f"{run.name}.txt").read_text().split()
    assert float(hours) == summary["train_s"] / 3600 and float(accuracy) == summary["accuracy"]


def test_console_ends_with_the_block_that_scripts_parse(real_runs):
    _, done = real_runs[0]
    lines = done.stdout.splitlines()
    assert re.fullmatch("=+", lines[0]) and re.fullmatch("=+", lines[-1])
    assert [line.split(":")[0] for line in lines[1:-1]] == [
        "Training Type", "Accuracy (%)", "Time (h)", "Time per epoch (s)", "Selection Time (s)", "Memory (MB)", "rho",
    ]  # fmt: skip
    assert all(re.fullmatch(r"[\w() %./-]+: \S+", line) for line in lines[1:-1])
    assert "\r" not in done.stderr and "Traceback" not in done.stderr  # no bars in a log
    assert not [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "I0000", "E0000"))]


def test_same_seed_gives_same_bytes(real_runs):
    (first, records), (second, again) = [run_of(folder) for folder, _ in real_runs]
    assert (first / "selection.json").read_bytes() == (second / "selection.json").read_bytes()
    for row, repeated in zip(metrics_of(first), metrics_of(second), strict=True):
        assert {**row, "seconds": ""} == {**repeated, "seconds": ""}
    assert records["summary.json"]["accuracy"] == again["summary.json"]["accuracy"]
    assert records["config.json"]["fingerprint"] == again["config.json"]["fingerprint"]
    ours, theirs = [keras.saving.load_model(run / "model.keras") for run in (first, second)]
    for weight, same in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), same.numpy())


def test_saved_model_has_the_accuracy_of_the_summary(real_runs, data_dir):
    import data
    from core.config import Config

    run, records = run_of(real_runs[0][0])
    model = keras.saving.load_model(run / "model.keras", safe_mode=True)
    test = data.load(Config(data_dir=data_dir, limit_test=40)).test_batches()
    correct = total = 0
    for images, labels in test:
        correct += int((np.argmax(model.predict(images, verbose=0), axis=1) == labels.numpy()).sum())
        total += len(labels)
    assert 100 * correct / total == pytest.approx(records["summary.json"]["accuracy"])


# ---------------------------------------------------------------- other ways to run


def test_select_only_prints_ranking_and_stops(tiny, tmp_path, capsys):
    assert tiny("--select_only") == 0
    run, records = run_of(tmp_path / "logs")
    assert set(records) == {"config.json", "selection.json"} and not (run / "metrics.csv").exists()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["rank", "1", "2", "3", "4", "5", "6"]


def test_paper_protocol_reports_best_test_epoch(tiny, tmp_path):
    assert tiny("--protocol", "paper", "--optimizer", "adam") == 0
    run, records = run_of(tmp_path / "logs")
    assert list(metrics_of(run)[0])[3:5] == ["test_loss", "test_accuracy"]
    best = max(float(row["test_accuracy"]) for row in metrics_of(run))
    summary = records["summary.json"]
    assert summary["accuracy"] == pytest.approx(100 * best) and summary["protocol"] == "paper"
    assert summary["val_accuracy"] is None and records["config.json"]["split_sizes"]["validation"] is None


def test_second_run_of_a_name_gets_a_number(tiny, tmp_path):
    assert tiny("--select_only") == tiny("--select_only") == 0
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        "resnet50_digits_act_norm_betti_train_rho0.1_seed0", "resnet50_digits_act_norm_betti_train_rho0.1_seed0_2",
    }  # fmt: skip


def test_fewer_full_batches_than_requested_are_reported(tiny, tmp_path, capsys):
    assert tiny("--select_only", "--limit_train", "60", "--num_betti_batches", "9") == 0
    assert "3 batches of 16 images" in capsys.readouterr().err
    _, records = run_of(tmp_path / "logs")
    assert len(records["selection.json"]["layers"][0]["betti_1_per_batch"]) == 3


def test_betti_points_is_independent_of_batch_size(tiny, tmp_path):
    assert tiny("--select_only", "--betti_points", "40", "--num_betti_batches", "2") == 0
    _, records = run_of(tmp_path / "logs")
    for row in records["selection.json"]["layers"]:
        assert len(row["betti_1_per_batch"]) == 2
        assert row["score"] == pytest.approx(row["betti_1"] / (40 * row["activation_size"]))


def test_unread_flag_is_warned_about_and_null(tiny, tmp_path, capsys):
    assert tiny("--train_type", "traditional_tl_training", "--rho", "0.5", "--num_betti_batches", "2") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "does not use" in line]
    assert len(warnings) == 1 and "--num_betti_batches, --rho" in warnings[0]
    run, records = run_of(tmp_path / "logs")
    assert run.name == "resnet50_digits_traditional_tl_training_seed0"
    assert records["config.json"]["rho"] is records["summary.json"]["rho"] is None


@pytest.mark.parametrize("name", ["caltech_birds2011", "oxford_iiit_pet", "stanford_dogs", "flowers102"])
def test_photo_set_of_its_real_builder_trains(name, tiny, tmp_path, monkeypatch):
    archives.prepare_miniature(name, tmp_path / "tfds", monkeypatch, tmp_path)
    argv = [
        "--dataset_name",
        name,
        "--input_size",
        "32",
        "--batch_size",
        "4",
        "--num_epochs",
        "1",
        "--data_dir",
        str(tmp_path / "tfds"),
    ]
    assert tiny(*argv, "--train_type", "act_norm_betti_train") == 0
    run, records = run_of(tmp_path / "logs")
    assert records["summary.json"]["status"] == "done" and len(metrics_of(run)) == 1
    assert records["config.json"]["dataset_version"] == DATASETS[name].tfds


def test_divergence_writes_summary_and_advice(tiny, tmp_path, capsys):
    assert tiny("--learning_rate", "1e30", "--global_clipnorm", "0") == 1
    _, records = run_of(tmp_path / "logs")
    assert records["summary.json"]["status"] == "diverged" and records["summary.json"]["accuracy"] is None
    assert "epoch 1, step" in capsys.readouterr().err.splitlines()[-1]


def test_training_at_chance_is_reported(tiny, tmp_path, capsys):
    assert tiny("--learning_rate", "1e-9") == 0
    assert "never exceeded chance" in capsys.readouterr().err
    assert run_of(tmp_path / "logs")[1]["summary.json"]["stayed_at_chance"] is True


@pytest.mark.parametrize(
    "accuracies, num_images, majority_share, stayed",
    [([], 100, 0.1, None), ([0.1], 100, 0.1, True), ([0.1, 0.19, 0.1], 100, 0.1, True), ([0.1, 0.25, 0.1], 100, 0.1, False),
     ([0.9], 1000, 0.9, True), ([0.96], 1000, 0.9, False), ([1.0], 2, 0.5, True), ([1.0], 50, 1.0, True)],
)  # fmt: skip
def test_chance_is_the_accuracy_of_guessing(accuracies, num_images, majority_share, stayed):
    from run import report

    assert report.stayed_at_chance([{"train_accuracy": a} for a in accuracies], num_images, majority_share) is stayed


def test_image_folder_trains_without_bad_images(tiny, tmp_path, capsys):
    for name in ("a class", "β"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(12):
            keras.utils.save_img(tmp_path / "set" / name / f"{number}.png", np.full((8, 8, 3), 20 * number))
    (tmp_path / "set" / "β" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "set" / "a class" / "page.png").write_text("<html>")
    argv = [*FOLDER, str(tmp_path / "set"), "--batch_size", "4"]
    assert tiny(*argv) == 2 and not (tmp_path / "logs").exists()
    assert tiny(*argv, "--skip_bad_images") == 0
    assert "leaves out 2 images" in capsys.readouterr().err
    _, records = run_of(tmp_path / "logs")
    assert records["summary.json"]["skipped_images"] == 2
    assert [(Path(entry["path"]).name, entry["reason"]) for entry in records["config.json"]["skipped_images"]] == [
        ("page.png", "not a JPEG, PNG, BMP, GIF or WebP image, or its header is damaged"),
        ("cut.jpg", "not a JPEG, PNG, BMP, GIF or WebP image, or its header is damaged"),
    ]  # fmt: skip
    assert sum(records["config.json"]["split_sizes"].values()) == 24


@pytest.mark.parametrize(
    "failure, code, status", [(KeyboardInterrupt(), 130, "interrupted"), (OSError("disk"), 1, "failed")]
)
def test_failed_run_leaves_a_summary(tiny, tmp_path, monkeypatch, capsys, failure, code, status):
    def broken_off(*args):
        raise failure

    monkeypatch.setattr(train, "fine_tune", broken_off)
    assert tiny() == code
    _, records = run_of(tmp_path / "logs")
    assert records["summary.json"]["status"] == status and records["summary.json"]["selection_s"] > 0
    assert "Traceback" not in capsys.readouterr().err


def test_list_layers_prints_only_paths(capsys):
    assert main(["--list_layers", "--model_name", "vgg16"]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert len(paths) == 14 and paths[0] == "block1_conv1" and paths[-1] == "head"


def test_layers_accepts_the_printed_list(tmp_path, tiny):
    (tmp_path / "list").write_text("deep\nbranch\n")
    assert tiny("--train_type", "listed_layers", "--layers", f"@{tmp_path}/list", "--select_only") == 0
    assert run_of(tmp_path / "logs")[1]["selection.json"]["selected"] == ["branch", "deep"]


# ---------------------------------------------------------------- bad input


FOLDER = ["--dataset_name", "image_folder", "--image_dir"]
# What is wrong -> (flags, with {tmp} for the test's folder; what the line has to say).
BAD_INPUT = {
    "unknown model": (["--model_name", "resnet"], "the closest: resnet"),
    "unknown scheme": (["--train_type", "betti"], "invalid choice: 'betti'"),
    "unknown data set": (["--dataset_name", "digit"], "digits"),
    "rho 0": (["--rho", "0"], "over 0"),
    "rho -1": (["--rho", "-1"], "over 0"),
    "rho 1.5": (["--rho", "1.5"], "at most 1"),
    "rho nan": (["--rho", "nan"], "'nan'"),
    "rho x": (["--rho", "x"], "'x'"),
    "batch size 0": (["--batch_size", "0"], "at least 1"),
    "batch size 3": (["--batch_size", "3"], "at least 4 images"),
    "abbreviation": (["--model", "vgg16"], "unrecognized"),
    "boolean": (["--save_model", "maybe"], "true or false"),
    "LiteRT's flags alone": (["--litert_batch", "4", "--litert_momentum", "0"], "needs --save_litert"),
    "input size": (["--input_size", "31"], "at least 32"),
    "input size of a ViT": (["--model_name", "vit", "--input_size", "40"], "multiple of 16"),
    "num_classes": (["--num_classes", "11"], "has 10"),
    "weights missing": (["--weights", "{tmp}/no.h5"], "no such file"),
    "weights cut short": (["--weights", "{tmp}/short.h5"], "short.h5"),
    "image folder missing": ([*FOLDER, "{tmp}/none"], "none"),
    "image folder empty": ([*FOLDER, "{tmp}/empty"], "empty"),
    "image folder of one class": ([*FOLDER, "{tmp}/one"], "class"),
    "data folder beneath a file": (["--data_dir", "{tmp}/file/x"], "--data_dir"),
    "layers match nothing": (["--train_type", "listed_layers", "--layers", "zzz"], "which matches none of"),
    "layers of another scheme": (["--layers", "conv"], "listed_layers"),
    "listed_layers without layers": (["--train_type", "listed_layers"], "--layers"),
    "run name taken": (["--run_name", "name", "--log_dir", "{tmp}/taken"], "'name'"),
    **{
        f"run name {name[:12]!r}": ([f"--run_name={name}", "--log_dir", "{tmp}/logs"], "plain folder name")
        for name in (
            "../name",
            "",
            ".",
            "..",
            "a/b",
            "/",
            "a\\b",
            "a\0b",
            "a\nb",
            "-rf",
            ".hidden",
            "\udcff",
            "x" * 201,
            "名" * 67,
        )
    },
    "run name that is a link": (["--run_name", "link", "--log_dir", "{tmp}/taken"], "'link'"),
    "log folder that is a link to nothing": (["--log_dir", "{tmp}/taken/link"], "--log_dir"),
    "log folder without a name": (["--log_dir="], "--log_dir"),
    "log folder with a NUL": (["--log_dir", "{tmp}/a\0b"], "--log_dir"),
    "weights in a pickle": (["--weights", "{tmp}/model.pkl"], "another extension"),
    "weights of PyTorch": (["--weights", "{tmp}/model.pt"], "another extension"),
    "weights in an .npz": (["--weights", "{tmp}/model.npz"], "another extension"),
    "weights that are a folder": (["--weights", "{tmp}/folder.keras"], "no such file"),
    "unknown layers in a file": (
        ["--train_type", "listed_layers", "--layers", "@{tmp}/layers"],
        "'brunch', near branch",
    ),
    "layers in a missing file": (["--train_type", "listed_layers", "--layers", "@{tmp}/none"], "readable text file"),
    "layers in a binary file": (["--train_type", "listed_layers", "--layers", "@{tmp}/binary"], "readable text file"),
    "layers in nested JSON": (["--train_type", "listed_layers", "--layers", "@{tmp}/nested"], "RecursionError"),
    "bad images": (
        [*FOLDER, "{tmp}/bad"],
        "cut.jpg (empty); repair or remove them, or leave them out with --skip_bad_images",
    ),
    "skip_bad_images without a folder": (["--skip_bad_images"], "needs --dataset_name image_folder"),
    "warm-up of all epochs": (["--warmup_epochs", "10"], "Received: 10 of 10"),
    "warm-up before a ranking alone": (["--warmup_epochs", "1", "--select_only"], "leave out one of them"),
    "early stopping on test images": (["--early_stopping", "2", "--protocol", "paper"], "needs validation images"),
    "early stopping after 0 epochs": (["--early_stopping", "0"], "at least 1"),
    "log folder beneath a file": (["--log_dir", "{tmp}/file/logs"], "--log_dir"),
}


@pytest.fixture
def bad_files(tmp_path):
    """The files that BAD_INPUT names."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "cat").mkdir(parents=True)
    keras.utils.save_img(tmp_path / "one" / "cat" / "a.png", np.zeros((8, 8, 3)))
    (tmp_path / "short.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(20))
    (tmp_path / "taken" / "name").mkdir(parents=True)
    (tmp_path / "taken" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder.keras").mkdir()
    for name in ("model.pkl", "model.pt", "model.npz"):
        (tmp_path / name).write_bytes(b"\x80\x04")
    (tmp_path / "layers").write_text("deep\nbrunch\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "nested").write_text('{"a":' * 100_000)
    for name in "ab":
        (tmp_path / "bad" / name).mkdir(parents=True)
        for number in range(5):
            keras.utils.save_img(tmp_path / "bad" / name / f"{number}.png", np.zeros((8, 8, 3)))
    (tmp_path / "bad" / "a" / "cut.jpg").touch()
    return tmp_path


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_line_and_writes_nothing(case, bad_files, monkeypatch, capsys, data_dir):
    argv, says = BAD_INPUT[case]
    argv = [word.replace("{tmp}", str(bad_files)) for word in argv]
    if case == "batch size 3" or "layers" in case:  # found on the network; a small one will do
        monkeypatch.setattr(models, "assemble", assemble_tiny)
    monkeypatch.chdir(bad_files)
    before = set(bad_files.rglob("*"))
    assert main(["--data_dir", data_dir, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err, err
    assert set(bad_files.rglob("*")) == before


def test_weights_of_another_model_are_refused(tmp_path, capsys, data_dir):
    tiny_model().save_weights(tmp_path / "tiny.weights.h5")
    argv = ["--model_name", "vgg16", "--weights", str(tmp_path / "tiny.weights.h5"), "--data_dir", data_dir]
    assert main([*argv, "--log_dir", str(tmp_path / "logs")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "logs").exists()


def test_help_lists_all_schemes_and_data_sets(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in [*SCHEMES, *DATASETS]:
        assert re.search(rf"^.* {name}  ", text, re.MULTILINE), name
    assert not re.search(r"%\(|None\)", text)


@pytest.mark.parametrize(
    "written, meant",
    [("--save_model", True), ("--save_model yes", True), ("--save_model False", False), ("--save_model 0", False),
     ("--save_model --save_model", True)],
)  # fmt: skip
def test_boolean_flags_accept_documented_words(written, meant):
    assert flags.parse(written.split()).save_model is meant


def test_defaults_come_from_the_tables():
    assert flags.parse(["--train_type", "bettitrain"]).train_type == "act_norm_betti_train"
    photos = flags.parse(["--dataset_name", "flowers102", "--train_type", "full_training"])
    assert (photos.input_size, photos.num_epochs, photos.rho, photos.learning_rate) == (224, 40, None, 1e-2)
    assert flags.parse([]).rho == 0.1


@pytest.mark.parametrize("written", ["--run_name auto", "--interval 4.0 --train_type prunetrain --run_name auto"])
def test_published_spellings_of_flags_are_accepted(written):
    cfg = flags.parse(written.split())
    assert cfg.run_name is None and cfg.interval in (None, 4)


@pytest.mark.parametrize("written", ["--interval 4.5", "--interval nan", "--interval 0.0", "--resume --run_name auto"])
def test_invalid_interval_or_resume_exits_with_2(written, capsys):
    assert main(written.split()) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_constant_schedule_keeps_the_learning_rate(tiny, tmp_path):
    assert tiny("--lr_schedule", "constant", "--momentum", "0", "--learning_rate", "0.001") == 0
    run, _ = run_of(tmp_path / "logs")
    assert [float(row["learning_rate"]) for row in metrics_of(run)] == pytest.approx([1e-3, 1e-3])


def trained_sets(monkeypatch):
    """Notes the weights of each segment of the training."""
    noted, freeze = [], train.freeze
    monkeypatch.setattr(
        train, "freeze", lambda model, chosen: noted.append(chosen.trained_weights) or freeze(model, chosen)
    )
    return noted


@pytest.mark.parametrize("more", [[], ["--memory_budget_mb", "100"]])
def test_warm_up_trains_the_head_before_the_selection(tiny, tmp_path, monkeypatch, more):
    trained = trained_sets(monkeypatch)
    assert tiny("--warmup_epochs", "1", "--rho", "0.5", "--num_epochs", "3", *more) == 0
    run, records = run_of(tmp_path / "logs")
    selection, summary = records["selection.json"], records["summary.json"]
    assert trained == [("head/kernel", "head/bias"), tuple(selection["trained_weights"])]
    assert len(selection["selected"]) == 3 and selection["reselected"] == []
    assert all(row["score"] is not None for row in selection["layers"])
    assert [row["epoch"] for row in metrics_of(run)] == ["1", "2", "3"] and summary["selection_s"] > 0
    assert (summary["budget_next_layer"] is None) == (not more)
    assert summary["num_trained_layers"] == 3 + selection["head_added"]


def test_warm_up_comes_before_the_intervals(tiny, tmp_path, monkeypatch):
    trained = trained_sets(monkeypatch)
    flags = ["--train_type", "elastic_training", "--timing", "flops", "--rho", "0.7", "--interval", "2"]
    assert tiny(*flags, "--warmup_epochs", "1", "--num_epochs", "4") == 0
    assert len(trained) == 3 and trained[0] == ("head/kernel", "head/bias")
    _, records = run_of(tmp_path / "logs")
    assert [again["epoch"] for again in records["selection.json"]["reselected"]] == [4]
    assert records["timings.json"]["source"] == "flops"
    assert records["summary.json"]["rho_achieved_predicted"] > 0
