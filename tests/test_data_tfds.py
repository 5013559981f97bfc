"""TFDS sets: names, checks before the download, offline, races, and the four photo sets."""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import archives
import pytest
import tensorflow_datasets as tfds

import data
from core import reachability
from core.config import Config
from core.errors import RunError, UsageError
from data import digits, tfds_source

PHOTO_SETS = {
    "caltech_birds2011": ("caltech_birds2011:0.2.0", 200),
    "oxford_iiit_pet": ("oxford_iiit_pet:4.0.0", 37),
    "stanford_dogs": ("stanford_dogs:0.2.0", 120),
    "flowers102": ("oxford_flowers102:2.1.1", 102),
}


@pytest.fixture(autouse=True)
def temporary_folders_beneath_the_test(monkeypatch, tmp_path_factory):
    """TFDS leaves an empty one behind for each set that it looks at unprepared."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))


@pytest.fixture
def offline(monkeypatch):
    """Every host is out of reach; returns the list of hosts that were asked."""
    asked = []

    def unreachable(url):
        asked.append(url.split("/")[2])
        return "no route"

    def no_download(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(reachability, "unreachable", unreachable)
    monkeypatch.setattr(tfds.download.DownloadManager, "download", no_download)
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", no_download)
    return asked


@pytest.mark.slow
def test_importing_the_table_imports_no_tensorflow():
    code = (
        "import sys; import data; assert data.dataset_row('mnist').input_size == 224; "
        "assert not {'tensorflow', 'tensorflow_datasets', 'keras'} & set(sys.modules)"
    )
    root = Path(data.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_table_rows_have_documented_defaults():
    assert data.DATASETS["digits"].input_size == 32
    assert data.DATASETS["digits"].num_epochs == 10
    assert data.dataset_row("oxford_flowers102") is data.DATASETS["flowers102"]
    assert data.dataset_row("stanford_dogs:0.2.0") is data.DATASETS["stanford_dogs"]
    other = data.dataset_row("mnist/config:1.0.0")
    assert (other.input_size, other.num_epochs, other.flip, other.rotation) == (224, 40, True, 0.2)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("flowers102", "oxford_flowers102:2.1.1"),
        ("oxford_flowers102", "oxford_flowers102:2.1.1"),
        ("oxford_iiit_pet:3.2.0", "oxford_iiit_pet:3.2.0"),
        ("imagenet_resized/8x8", "imagenet_resized/8x8"),
        ("cifar10", "cifar10"),
    ],
)
def test_names_are_pinned_unless_the_user_pins(name, expected):
    assert data.tfds_name(name) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", PHOTO_SETS)
def test_real_builder_prepares_a_miniature(name, monkeypatch, tmp_path):
    sizes = archives.prepare_miniature(name, tmp_path / "tfds", monkeypatch, tmp_path)
    cfg = Config(dataset_name=name, data_dir=str(tmp_path / "tfds"), batch_size=4, input_size=16)
    loaded = data.load(cfg)
    version, classes = PHOTO_SETS[name]
    assert (loaded.name, loaded.version, loaded.num_classes) == (name, version, classes)
    assert len(loaded.class_names) == classes
    if "validation" not in sizes:
        sizes |= {"train": sizes["train"] - 1, "validation": 1}
    assert loaded.split_sizes == sizes
    images, labels = next(iter(loaded.train_batches(0, 1)))
    assert images.shape == (4, 16, 16, 3)
    assert 0 <= images.numpy().min() < images.numpy().max() <= 255
    assert set(labels.numpy()) <= {0, 1, 2}
    assert sum(len(y) for _, y in loaded.test_batches()) == archives.TEST_IMAGES


@pytest.mark.parametrize("name", PHOTO_SETS)
def test_offline_is_one_line_without_a_download(name, offline, tmp_path, monkeypatch):
    monkeypatch.setitem(data.DATASETS, name, dataclasses.replace(data.DATASETS[name], needs=()))
    with pytest.raises(RunError, match=f"{name}.*host .*no route.*--data_dir") as caught:
        data.load(Config(dataset_name=name, data_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert len(offline) == len(set(offline)) > 0  # each host once


def test_moved_file_needs_one_of_its_hosts(monkeypatch, tmp_path):
    """The birds' files are registered at an old address, too."""
    tried = []

    def unreachable(url):
        return None if "caltech" in url else "no route"

    def download(manager, urls):
        tried.append(urls)
        raise OSError("full disk\nand more")

    monkeypatch.setattr(reachability, "unreachable", unreachable)
    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    row = dataclasses.replace(data.DATASETS["caltech_birds2011"], needs=())
    monkeypatch.setitem(data.DATASETS, "caltech_birds2011", row)
    with pytest.raises(RunError, match="could not be prepared.*full disk and more") as caught:
        data.load(Config(dataset_name="caltech_birds2011", data_dir=str(tmp_path)))
    assert tried
    assert isinstance(caught.value.__cause__, OSError)


def test_downloaded_files_need_no_host(offline, tmp_path):
    cls = tfds.builder_cls("oxford_iiit_pet")
    folder = tmp_path / "downloads" / "oxford_iiit_pet"
    folder.mkdir(parents=True)
    for url, info in cls.url_infos.items():
        name = tfds.core.download.resource.get_dl_fname(url, info.checksum)
        (folder / name).touch()
        (folder / f"{name}.INFO").write_text("{}")
    with pytest.raises(RunError, match="a download was tried"):  # TFDS itself would find the files
        data.load(Config(dataset_name="oxford_iiit_pet", data_dir=str(tmp_path)))
    assert offline == []


def test_failing_builder_gives_one_line(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise FileNotFoundError("labels.txt\nis missing")

    monkeypatch.setattr(tfds, "builder", broken)
    with pytest.raises(RunError, match="cannot load the builder of cifar10: labels.txt is missing"):
        data.load(Config(dataset_name="cifar10", data_dir=str(tmp_path)))


def test_missing_package_is_named_before_the_download(offline, monkeypatch, tmp_path):
    row = dataclasses.replace(data.DATASETS["oxford_iiit_pet"], needs=(("no_such_module", "pkg"),))
    monkeypatch.setitem(data.DATASETS, "oxford_iiit_pet", row)
    with pytest.raises(RunError, match="no_such_module.*pip install pkg"):
        data.load(Config(dataset_name="oxford_iiit_pet", data_dir=str(tmp_path)))
    assert offline == []


@pytest.mark.parametrize(
    "name, hint",
    [
        ("pets", "oxford_iiit_pet"),
        ("flowers", "flowers102"),
        ("digit", "digits"),
        ("cifar11", "cifar10"),
        ("huggingface:mnist", "correct the name"),
        ("image_folder:1", "image_folder"),
        ("", "correct the name"),
    ],
)
def test_unknown_names_get_the_closest(name, hint, tmp_path):
    with pytest.raises(UsageError, match=f"digits, .*or a TFDS name. Received: .*{hint}") as caught:
        data.load(Config(dataset_name=name, data_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["oxford_iiit_pet:9.9.9", "cifar10/nothing"])
def test_unknown_config_lists_existing_ones(name, tmp_path):
    with pytest.raises(UsageError, match="configs none, versions [34].0"):
        data.load(Config(dataset_name=name, data_dir=str(tmp_path)))


def test_set_without_single_label_is_refused(offline, tmp_path):
    with pytest.raises(UsageError, match="an image and a single class label. Received: coco with"):
        data.load(Config(dataset_name="coco", data_dir=str(tmp_path)))
    assert offline == []


def test_num_classes_is_checked_before_the_download(offline, tmp_path):
    with pytest.raises(UsageError, match="oxford_iiit_pet has 37. Received: 120"):
        data.load(Config(dataset_name="oxford_iiit_pet", num_classes=120, data_dir=str(tmp_path)))
    assert offline == []
    assert list(tmp_path.iterdir()) == []


def test_data_dir_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--data_dir must be a folder.*is a file"):
        data.load(Config(data_dir=str(tmp_path / "file" / "tfds")))


@pytest.mark.parametrize("flag", ["limit_train", "limit_test"])
def test_limits_are_positive(flag):
    with pytest.raises(UsageError, match=f"--{flag} must be at least 1.*Received: 0"):
        data.load(Config(**{flag: 0}))


def test_second_of_two_preparations_reads_the_first(monkeypatch, tmp_path):
    cfg = Config(data_dir=str(tmp_path))
    generate = digits.Digits._split_generators
    winners = []

    def generate_late(builder, manager):
        if not winners:  # in the middle of our preparation another process finishes its own
            winners.append(digits.Digits(data_dir=str(tmp_path)))
            winners[0].download_and_prepare()
        return generate(builder, manager)

    monkeypatch.setattr(digits.Digits, "_split_generators", generate_late)
    assert data.load(cfg).split_sizes["test"] == 360
    assert winners
    assert [p.name for p in (tmp_path / "digits").iterdir()] == ["1.0.0"]  # no debris


def test_preparation_keeps_stdout_clean(tmp_path, capsys):
    data.prepare(Config(data_dir=str(tmp_path)))
    assert capsys.readouterr().out == ""


def test_prepared_sets_need_no_network(offline, tmp_path):
    cfg = Config(data_dir=str(tmp_path))
    data.prepare(cfg)
    builder = tfds_source.find_builder(cfg)
    assert builder.is_prepared()
    assert tfds_source.prepare(builder, cfg) is builder
    assert offline == []
