"""Runs that are cut off and gone on with: they end like runs that were left alone."""

import json
import os
import shutil
import signal

import pytest
from benchmarks import kills
from test_main import run_of, tiny  # noqa: F401  a fixture

import checkpoint
import train
from main import main
from selection import timing

# Scheme -> its flags: one that ranks once, one that selects anew, one that prunes.
SCHEMES = {
    "last_layers": ["--rho", "0.34"],
    "elastic_training": ["--interval", "1", "--rho", "0.9", "--timing", "measured"],
    "prunetrain": ["--interval", "1", "--optimizer", "adam"],
}


@pytest.fixture(autouse=True)
def own_timings(monkeypatch, tmp_path_factory):
    """Measured timings are kept for these tests alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def at(moment, callback, monkeypatch, signum=signal.SIGTERM):
    """Sends this process a signal when a callback's hook is reached for the nth time."""
    hook, count = moment
    before, met = getattr(callback, hook), []

    def hooked(self, *args, **kwargs):
        met.append(hook)
        if len(met) == count:
            os.kill(os.getpid(), signum)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(callback, hook, hooked)


# 160 images, 144 of them for training: 9 steps an epoch, and 1 of evaluation.
MOMENTS = {
    "in the first epoch": ("on_train_batch_end", 4),
    "at the last step of an epoch": ("on_train_batch_end", 9),
    "during the evaluation": ("on_test_batch_end", 1),
    "at the end of an epoch": ("on_epoch_end", 1),
    "in the second epoch": ("on_train_batch_end", 12),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_that_was_ended_at_any_moment_ends_like_one_that_was_not(scheme, tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    flags = ["--train_type", scheme, "--save_model", *SCHEMES[scheme]]
    logs = tmp_path / "logs"
    assert tiny(*flags, "--run_name", "alone") == 0
    assert not (logs / "alone" / "checkpoint").exists()
    for number, moment in enumerate(MOMENTS.values()):
        name = f"run{number}"
        with monkeypatch.context() as patch:
            at(moment, checkpoint.Checkpointer, patch)
            assert tiny(*flags, "--run_name", name) == 143
            summary = json.loads((logs / name / "summary.json").read_text())
            assert summary["status"] == "interrupted" and summary["epochs"] == (moment[1] > 9 or moment[0] == "on_epoch_end")
        with monkeypatch.context() as patch:  # what was measured is in the run folder
            patch.setattr(timing, "_known", {})
            patch.setattr(timing, "measured", None)
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
            assert main(["--resume", str(logs / name)]) == 0
        assert kills.compare(logs / "alone", logs / name) == []
        assert not (logs / name / "checkpoint").exists()
    assert "Goes on after epoch 1, step 3" in capsys.readouterr().err


def test_a_signal_between_two_selections_costs_neither(tiny, tmp_path, monkeypatch):  # noqa: F811
    flags = ["--train_type", "elastic_training", "--timing", "flops", "--rho", "0.9", "--interval", "1", "--save_model"]
    assert tiny(*flags, "--run_name", "alone") == 0

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train, "reselect", interrupted)
        assert tiny(*flags, "--run_name", "run") == 130
    assert main(["--resume", str(tmp_path / "logs" / "run")]) == 0
    assert kills.compare(tmp_path / "logs" / "alone", tmp_path / "logs" / "run") == []
