"""--prepare_only: what is ready is skipped, and what is unavailable is said with the way to mend it by hand."""

import dataclasses

import pytest
import tensorflow_datasets as tfds

import data
import models
from core import reachability
from core.config import Config
from main import main


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No host answers, and the caches are empty; returns the list of addresses that were asked."""
    asked = []
    monkeypatch.setattr(reachability, "unreachable", lambda url: asked.append(url) or "no route")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    row = dataclasses.replace(data.DATASETS["oxford_iiit_pet"], needs=())
    monkeypatch.setitem(data.DATASETS, "oxford_iiit_pet", row)
    return asked


def prepare(tmp_path, *words):
    return main(["--prepare_only", "--data_dir", str(tmp_path / "tfds"), "--log_dir", str(tmp_path / "logs"), *words])


def test_local_data_are_prepared_and_then_skipped(offline, tmp_path, capsys):
    for _ in range(2):
        assert prepare(tmp_path, "--weights", "none") == 0
        assert capsys.readouterr().err == "Ready: digits\n"
    assert offline == [] and not (tmp_path / "logs").exists()


def test_both_failures_name_file_and_location(offline, tmp_path, capsys):
    assert prepare(tmp_path, "--dataset_name", "oxford_iiit_pet", "--model_name", "vgg16") == 1
    err = capsys.readouterr().err
    assert f"images.tar.gz by hand and save it as {tmp_path}/tfds/downloads/manual/images.tar.gz" in err
    file = "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert f"{file} by hand and save it as {tmp_path}/keras/models/{file}" in err
    last = err.splitlines()[-1]
    assert last.startswith("Error: oxford_iiit_pet is not prepared") and "weights of vgg16 are unavailable" in last


def test_failure_does_not_stop_other_downloads(offline, tmp_path, capsys):
    assert prepare(tmp_path, "--model_name", "mobilenetv2", "--weights", "imagenet", "--input_size", "96") == 1
    err = capsys.readouterr().err.splitlines()
    assert (
        err[0] == "Ready: digits" and "_1.0_96_no_top.h5 by hand" in err[2] and err[1].startswith("Warning: Not ready")
    )


def test_weights_saved_by_hand_are_used(offline, tmp_path):
    cfg = Config(model_name="mobilenetv2", input_size=224)
    ((_, path),) = models.files_to_fetch(cfg)
    (tmp_path / "keras" / "models").mkdir(parents=True)
    open(path, "w").close()
    assert models.prepare(cfg) == path and offline == []


@pytest.mark.slow
def test_vit_preset_is_a_folder_of_two_files(offline, tmp_path):
    files = models.files_to_fetch(Config(model_name="vit", input_size=224))
    assert [path.rsplit("/", 1)[1] for _, path in files] == ["config.json", "model.weights.h5"]
    assert all(
        path.startswith(str(tmp_path / "kaggle")) and url.startswith("https://www.kaggle.com/models/")
        for url, path in files
    )


def test_archives_saved_by_hand_are_used(offline, tmp_path, monkeypatch):
    """TFDS compares them with its checksums, so that these, which are empty, come as far as that."""
    cfg = Config(dataset_name="oxford_iiit_pet", data_dir=str(tmp_path))
    for _, path in data.files_to_fetch(cfg):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert data.files_to_fetch(cfg) == []
    with pytest.raises(Exception, match="(?i)checksum"):
        data.prepare(cfg)
    assert offline == []
    assert tfds.builder_cls("oxford_iiit_pet").url_infos
