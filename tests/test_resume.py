"""Interrupted runs: once resumed, they end like runs that were never interrupted."""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from test_main import assemble_tiny

import models
import train
from benchmarks import kills
from main import main
from models import weights
from selection import elastic_timing, topology
from training import callbacks, checkpoint
from training.segments import Segment, plan_segments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# 160 images, 144 of them for training: 9 steps an epoch, and 1 of evaluation.
FEW = ["--limit_train", "160", "--limit_test", "40", "--batch_size", "16", "--num_epochs", "2", "--save_model"]
ON_STEP, ON_TEST, ON_EPOCH = "on_train_batch_end", "on_test_batch_end", "on_epoch_end"


@pytest.fixture(scope="module", autouse=True)
def tiny_network(tmp_path_factory):
    """Gives main() a tiny network in place of the backbone, and a cache of timings of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "assemble", assemble_tiny)
        patch.setattr(weights, "load", lambda backbone, cfg: {"source": "none"})
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run(tmp_path, data_dir):
    """Runs main() with few images under a name in tmp_path."""
    return lambda name, *argv: main(
        [*FEW, "--data_dir", data_dir, "--log_dir", str(tmp_path), "--run_name", name, *argv]
    )


def resume(folder, *argv):
    return main(["--resume", str(folder), *argv])


def at(owner, name, count, what, monkeypatch):
    """Calls `what` when a function is reached for the count-th time."""
    before, met = getattr(owner, name), []

    def hooked(*args, **kwargs):
        met.append(name)
        if len(met) == count:
            what()
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, hooked)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def status(folder):
    return json.loads((folder / "summary.json").read_text())["status"]


# ---------------------------------------------------------------- resuming is exact

# Where a run is interrupted, and each time it has been resumed.
CHAIN = [
    (callbacks.Checkpointer, ON_STEP, 4),
    (callbacks.Checkpointer, ON_EPOCH, 1),
    (train, "reselect", 1),
    (callbacks.Checkpointer, ON_STEP, 9),  # the last of the epoch
    (callbacks.Checkpointer, ON_TEST, 1),
]
SCHEMES = {
    "elastic_training": ["--interval", "1", "--rho", "0.9", "--timing", "measured"],
    "prunetrain": ["--interval", "1", "--optimizer", "adam", "--checkpoint_minutes", "0"],
    "act_norm_betti_train": ["--warmup_epochs", "1", "--rho", "0.5", "--early_stopping", "2"],
    "fisher": ["--warmup_epochs", "1", "--rho", "0.5", "--memory_budget_mb", "100"],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_run_resumed_many_times_equals_uninterrupted_run(scheme, run, tmp_path, monkeypatch, capsys):
    flags = ["--train_type", scheme, *SCHEMES[scheme]]
    assert run("alone", *flags) == 0
    with monkeypatch.context() as patch:
        at(*CHAIN[0], terminate, patch)
        assert run("run", *flags) == 143
    # What was measured is in the run folder.
    monkeypatch.setattr(elastic_timing, "_known", {})
    monkeypatch.setattr(elastic_timing, "measured", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    for moment in CHAIN[1:]:
        assert status(tmp_path / "run") == "interrupted"
        with monkeypatch.context() as patch:
            at(*moment, terminate, patch)
            assert resume(tmp_path / "run") == 143
    assert resume(tmp_path / "run") == 0
    assert kills.compare(tmp_path / "alone", tmp_path / "run") == []
    places = re.findall(r"Resuming after epoch (\d), step (\d)", capsys.readouterr().err)
    assert places == [("0", "4"), ("1", "0"), ("1", "0"), ("1", "9"), ("1", "9")]


def test_early_stopping_ends_a_run_and_its_resumption(run, tmp_path, monkeypatch, capsys):
    accuracies, note = [0.9, 0.2, 0.5, 0.4, 0.3, 0.9], callbacks.BestEpoch.on_epoch_end

    def on_epoch_end(self, epoch, logs=None):
        note(self, epoch, {**logs, "val_accuracy": accuracies[epoch]})

    monkeypatch.setattr(callbacks.BestEpoch, ON_EPOCH, on_epoch_end)
    flags = ["--num_epochs", "6", "--early_stopping", "2"]
    assert run("plain", *flags) == 0
    assert run("warm", *flags, "--warmup_epochs", "2") == 0
    assert run("never", "--num_epochs", "3") == 0
    with monkeypatch.context() as patch:
        at(callbacks.StopEarly, ON_EPOCH, 3, terminate, patch)
        assert run("resumed", *flags) == 143
    assert resume(tmp_path / "resumed") == 0
    assert "Resuming after epoch 3, step 0" in capsys.readouterr().err
    # The first epoch is the best; the epochs of a warm-up do not count.
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("plain", "warm", "resumed")]
    assert [(summary["epochs"], summary["best_epoch"]) for summary in summaries] == [(3, 1), (4, 1), (3, 1)]
    assert json.loads((tmp_path / "never" / "summary.json").read_text())["epochs"] == 3
    assert kills.compare(tmp_path / "plain", tmp_path / "resumed") == []


def test_killed_processes_resume_to_the_same_result(tmp_path, data_dir, capsys):
    settings = {"act_norm_betti_train": [*FEW, "--data_dir", data_dir, "--checkpoint_minutes", "0"]}
    program = [str(ROOT / "tests" / "tiny_main.py")]
    assert kills.kill_and_compare(settings, 2, 0, tmp_path, program, ("training", "saving")) == 0, (
        capsys.readouterr().out
    )


# ---------------------------------------------------------------- --resume


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory, data_dir, tiny_network):
    """A folder with a run that was left alone, and one that was ended in its second epoch."""
    logs = tmp_path_factory.mktemp("logs")
    flags = [*FEW, "--train_type", "last_layers", "--rho", "0.34", "--checkpoint_minutes", "0", "--data_dir", data_dir]
    assert main([*flags, "--log_dir", str(logs), "--run_name", "alone"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        at(callbacks.Checkpointer, ON_STEP, 12, terminate, patch)
        assert main([*flags, "--log_dir", str(logs), "--run_name", "run"]) == 143
    return logs


@pytest.fixture
def logs(cut_off, tmp_path):
    return Path(shutil.copytree(cut_off, tmp_path / "logs"))


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--resume", "{run}", "--learning_rate", "0.5"], "--learning_rate 0.5 (was 0.01)"),
        (["--resume", "--log_dir", "{logs}", "--run_name", "run", "--seed", "1", "--batch_size", "8"], "--batch_size 8 (was 16), --seed 1"),
        (["--resume", "{run}", "--run_name", "other"], "leave these out"),
        (["--resume", "{logs}/none"], "no such folder"),
        (["--resume", "{logs}"], "with its config.json"),
        (["--resume"], "--run_name"),
        (["--resume", "{run}", "--list_layers"], "--list_layers"),
        (["--log_dir", "{logs}", "--run_name", "run"], "--resume"),
    ],
)  # fmt: skip
def test_invalid_resume_is_refused_by_name(argv, says, logs, capsys):
    before = files_of(logs)
    assert main([word.format(logs=logs, run=logs / "run") for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and files_of(logs) == before


def test_resume_accepts_neutral_flags_and_keeps_finished_run(logs, capsys):
    flags = [
        "--log_dir",
        str(logs),
        "--run_name",
        "run",
        "--resume",
        "--debug",
        "--checkpoint_minutes",
        "5",
        "--save_txt",
    ]
    assert main(flags) == 0
    assert kills.compare(logs / "alone", logs / "run") == [] and (logs / "run.txt").exists()
    capsys.readouterr()
    before = files_of(logs)
    assert resume(logs / "run") == 0
    out, err = capsys.readouterr()
    assert "already finished" in err and "Accuracy (%)" in out and files_of(logs) == before


def test_resume_refuses_another_library_version(logs, capsys):
    config = json.loads((logs / "run" / "config.json").read_text())
    config["versions"]["numpy"] = "1.0"
    (logs / "run" / "config.json").write_text(json.dumps(config))
    assert resume(logs / "run") == 2
    assert "before 1.0" in capsys.readouterr().err.splitlines()[-1]


def test_run_without_checkpoint_restarts_in_its_folder(logs, run, capsys):
    shutil.rmtree(logs / "run" / "checkpoint")
    assert resume(logs / "run") == 0
    assert kills.compare(logs / "alone", logs / "run") == [] and "Resuming" not in capsys.readouterr().err
    assert run("new", "--resume", "--select_only") == 0  # a script need not know whether it has begun


def test_checkpoints_of_an_earlier_version_are_refused(logs, capsys):
    folder = logs / "run" / "checkpoint"
    (folder / "step_0000000009").write_bytes(b"an earlier format")
    before = files_of(logs)
    assert resume(logs / "run") == 2
    assert "an earlier version" in capsys.readouterr().err.splitlines()[-1] and files_of(logs) == before


@pytest.mark.parametrize("kind", ["extra member", "missing member", "other dtype", "no record"])
def test_checkpoint_that_contradicts_its_record_is_corrupt(kind, tmp_path, caplog):
    arrays = [("variable/0", np.arange(3.0)), ("variable/1", np.array(7))]
    checkpoint.save(tmp_path, 5, {"epoch": 1}, arrays)
    saved = checkpoint.latest(tmp_path)
    assert saved.record == {"epoch": 1}
    for (_, array), read in zip(arrays, saved.read("variable/"), strict=True):
        np.testing.assert_array_equal(read, array)
    with zipfile.ZipFile(saved.path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if kind == "extra member":
        members["variable/2.npy"] = members["variable/1.npy"]
    elif kind == "missing member":
        del members["variable/1.npy"]
    elif kind == "other dtype":
        members["variable/0.npy"] = members["variable/0.npy"].replace(b"<f8", b"<i8")
    else:
        del members["record.json"]
    with zipfile.ZipFile(saved.path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert checkpoint.latest(tmp_path) is None and not saved.path.exists()


def test_flipped_bits_are_detected_or_without_effect(tmp_path):
    arrays = [("variable/0", np.arange(12, dtype="f4").reshape(3, 4)), ("variable/1", np.array(7))]
    checkpoint.save(tmp_path, 5, {"epoch": 1}, arrays)
    (path,) = (tmp_path / "checkpoint").iterdir()
    intact, detected = path.read_bytes(), 0
    for place in range(len(intact)):
        spoilt = bytearray(intact)
        spoilt[place] ^= 4
        path.write_bytes(spoilt)
        saved = checkpoint.latest(tmp_path)
        if saved is None:
            detected += 1
            continue
        assert saved.record == {"epoch": 1}
        assert [array.tobytes() for array in saved.read("variable/")] == [array.tobytes() for _, array in arrays]
    assert detected > len(intact) / 2  # the rest are dates and the like


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((4, 4), [(0, 4, False, False)]),
        ((5, 2), [(0, 2, False, False), (2, 4, True, False), (4, 5, True, False)]),
        ((5, 2, 0, 3), [(0, 2, False, True), (2, 4, True, False), (4, 5, True, False)]),
        ((5, 2, 1, 0), [(1, 2, False, True), (2, 4, True, False), (4, 5, True, False)]),
        ((5, 2, 2, 0), [(2, 2, False, True), (2, 4, True, False), (4, 5, True, False)]),  # before the new selection
        ((5, 2, 2, 1), [(2, 4, False, True), (4, 5, True, False)]),
        ((5, 2, 5, 0), [(5, 5, False, True)]),
        ((3, 3, 3, 0), [(3, 3, False, True)]),
        ((5, 5, 0, 0, 2), [(0, 2, False, False), (2, 5, True, False)]),
        ((5, 2, 0, 0, 1), [(0, 1, False, False), (1, 3, True, False), (3, 5, True, False)]),
        ((5, 5, 2, 0, 2), [(2, 2, False, True), (2, 5, True, False)]),  # before the first selection
        ((5, 5, 2, 3, 2), [(2, 5, False, True)]),
    ],
)
def test_segments_follow_from_flags_and_checkpoint(arguments, expected):
    assert plan_segments(*arguments) == [Segment(*values) for values in expected]


# ---------------------------------------------------------------- signals


def test_signal_during_selection_writes_summary(run, tmp_path, monkeypatch, capsys):
    at(topology, "betti_1_of_each", 2, terminate, monkeypatch)
    assert run("run") == 143
    assert status(tmp_path / "run") == "interrupted" and "--resume" in capsys.readouterr().err


def test_second_sigint_ends_process_within_long_operation():
    code = """
import hashlib, os, signal, threading
from core import signals
signal.signal(signal.SIGINT, signal.default_int_handler)
with signals.handled():
    signals.hold()
    def again_and_again():
        while True:
            os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=again_and_again, daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)  # an hour without a bytecode
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 130


# ---------------------------------------------------------------- faults


def test_corrupt_checkpoints_are_deleted_and_older_one_used(logs, capsys):
    _, before, last = sorted((logs / "run" / "checkpoint").iterdir())
    last.write_bytes(last.read_bytes()[:-100])
    spoilt = bytearray(before.read_bytes())
    spoilt[spoilt.index(b"NUMPY") + 140] ^= 4  # in the first array
    before.write_bytes(spoilt)
    assert resume(logs / "run") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "is corrupt" in line or "Resuming" in line]
    assert [last.name in lines[0], before.name in lines[1], lines[2]] == [True, True, "Resuming after epoch 0, step 0"]
    assert kills.compare(logs / "alone", logs / "run") == []


def test_full_disk_keeps_everything_written_before(logs, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = set((logs / "run" / "checkpoint").iterdir())
    with monkeypatch.context() as patch:
        at(
            callbacks.Checkpointer,
            ON_STEP,
            3,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1])),
            patch,
        )
        try:
            assert resume(logs / "run") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("Error: the disk must have room") and "--resume" in last
    assert len(set((logs / "run" / "checkpoint").iterdir())) == len(before) == 3
    assert resume(logs / "run") == 0
    assert kills.compare(logs / "alone", logs / "run") == []


def test_deleted_run_folder_is_reported(logs, monkeypatch, capsys):
    at(callbacks.Checkpointer, ON_EPOCH, 1, lambda: shutil.rmtree(logs / "run"), monkeypatch)
    assert resume(logs / "run") == 1
    assert "which is gone" in capsys.readouterr().err.splitlines()[-1] and not (logs / "run").exists()


def test_second_process_in_run_folder_is_refused(logs, capsys):
    with open(logs / "run" / "log.txt", "a") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        assert resume(logs / "run") == 2
    assert "another process" in capsys.readouterr().err


def test_missing_data_file_is_named_and_run_resumes(run, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    rng = np.random.default_rng(0)
    for split, kind, number in [(s, k, n) for s in ("train", "test") for k in ("cat", "dog") for n in range(40)]:
        (images / split / kind).mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(images / split / kind / f"{number}.png", rng.integers(0, 255, (8, 8, 3)), scale=False)
    lost = images / "test" / "cat" / "7.png"
    flags = ["--dataset_name", "image_folder", "--image_dir", str(images), "--input_size", "32", "--limit_train", "64"]
    flags += ["--train_type", "last_layers"]
    with monkeypatch.context() as patch:
        at(callbacks.Checkpointer, ON_EPOCH, 2, lambda: lost.rename(tmp_path / "elsewhere"), patch)
        assert run("run", *flags, "--limit_test", "80") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{lost}, which is gone" in last and status(tmp_path / "run") == "failed"
    (tmp_path / "elsewhere").rename(lost)
    assert resume(tmp_path / "run") == 0 and status(tmp_path / "run") == "done"


def test_out_of_memory_names_batch_size_that_fits(tmp_path, data_dir):
    command = [sys.executable, str(ROOT / "tests" / "tiny_main.py"), *FEW, "--train_type", "full_training", "--input_size", "512",
               "--batch_size", "64", "--data_dir", data_dir, "--log_dir", str(tmp_path), "--run_name", "run"]  # fmt: skip
    limited = {**os.environ, "TF_CPU_BFC_MEM_LIMIT_IN_MB": "700"}
    found = subprocess.run(command, capture_output=True, text=True, env=limited)
    last = found.stderr.splitlines()[-1]
    assert found.returncode == 1 and "out of memory: a training step on 64 images" in last, found.stderr
    needed, had, fitting, needs = map(
        int, re.search(r"needs (\d+) MB .* (\d+) MB were .* (\d+), estimated at (\d+)", last).groups()
    )
    assert needs <= had < needed and needs * 64 > needed * fitting / 2  # about in proportion to the batch
    assert status(tmp_path / "run") == "failed" and (tmp_path / "run" / "selection.json").exists()


def test_corrupt_timings_are_not_used(tmp_path, caplog):
    cost = elastic_timing.Timings("measured", "s", 1.0, 2.0, {"a": 0.5}, {"a": 0.25}, {"host": "here"})
    file = tmp_path / "timings.json"
    elastic_timing._write(file, cost)
    assert elastic_timing._read(file, cost.conditions) == cost
    file.write_text(file.read_text().replace("0.5", "0.7"))
    assert elastic_timing._read(file, cost.conditions) is None
