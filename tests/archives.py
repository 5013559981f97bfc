"""Miniatures of the four photo sets' original archives, for the real TFDS builders to prepare.

The layout inside, down to file names and list formats, is that of the originals;
the images are a few tiny ones.
"""

import io
import tarfile

import numpy as np
import scipy.io
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

import data
from core import reachability
from core.config import Config

TRAIN_IMAGES = 12
TEST_IMAGES = 5
CLASSES_WITH_IMAGES = 3


def prepare_miniature(name, data_dir, monkeypatch, tmp_path):
    """Lets the real TFDS builder prepare a miniature of a photo set.

    Args:
        name: str. A photo set of `data.DATASETS`.
        data_dir: path. Where to prepare it, as `--data_dir`.
        monkeypatch: pytest's. Replaces downloads by local archives and the probe of
            hosts by a positive answer, for as long as the test runs.
        tmp_path: path. Where the archives are written.

    Returns:
        dict of the number of images by split.
    """
    folder = tmp_path / f"archives_{name}"
    folder.mkdir()
    archives = _MAKERS[name](folder)

    def download(manager, urls):
        return tf.nest.map_structure(lambda url: archives[url.split("?")[0].split("/")[-1]], urls)

    def download_and_extract(manager, urls):
        return manager.extract(manager.download(urls))

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download_and_extract)
    monkeypatch.setattr(reachability, "unreachable", lambda url: None)
    data.prepare(Config(dataset_name=name, data_dir=str(data_dir)))
    sizes = {"train": TRAIN_IMAGES, "test": TEST_IMAGES}
    return sizes | {"validation": TEST_IMAGES} if name == "flowers102" else sizes


def image_bytes(number, image_format="JPEG", mode="RGB", size=(20, 16)):
    """Returns a small encoded image, (width, height) = `size`; each number gives another."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, image_format)
    return stream.getvalue()


def _tar(path, members, mode):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _numbered(classes):
    """Yields (image number from 1, class number from 1, whether it trains), for a few images."""
    for number in range(1, TRAIN_IMAGES + TEST_IMAGES + 1):
        yield number, 1 + number % classes, number <= TRAIN_IMAGES


def _birds(folder):
    names = {1: "001.Black_footed_Albatross", 2: "002.Laysan_Albatross", 3: "003.Sooty_Albatross"}
    images, masks, lists = {}, {}, {"images": "", "train_test_split": "", "bounding_boxes": ""}
    for number, label, trains in _numbered(CLASSES_WITH_IMAGES):
        name = f"{names[label]}/{names[label][4:]}_{number:04d}_{number}"
        images[f"CUB_200_2011/images/{name}.jpg"] = image_bytes(number)
        masks[f"segmentations/{name}.png"] = image_bytes(number, "PNG", "L")
        lists["images"] += f"{number} {name}.jpg\n"
        lists["train_test_split"] += f"{number} {int(trains)}\n"
        lists["bounding_boxes"] += f"{number} 2.0 3.0 10.0 8.0\n"
    texts = {f"CUB_200_2011/{name}.txt": text.encode() for name, text in lists.items()}
    return {
        "CUB_200_2011.tgz": _tar(folder / "CUB_200_2011.tgz", images | texts, "w:gz"),
        "segmentations.tgz": _tar(folder / "segmentations.tgz", masks, "w:gz"),
    }


def _pets(folder):
    breeds = {1: "Abyssinian", 2: "american_bulldog", 3: "american_pit_bull_terrier"}
    box = "<xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>8</ymax>"
    xml = (
        "<annotation><size><width>20</width><height>16</height></size>"
        f"<object><bndbox>{box}</bndbox></object></annotation>"
    )
    images, notes, lists = {}, {}, {True: "", False: ""}
    for number, label, trains in _numbered(CLASSES_WITH_IMAGES):
        name = f"{breeds[label]}_{number}"
        images[f"images/{name}.jpg"] = image_bytes(number)
        notes[f"annotations/trimaps/{name}.png"] = image_bytes(number, "PNG", "L")
        if trains:
            notes[f"annotations/xmls/{name}.xml"] = xml.encode()
        lists[trains] += f"{name} {label} {1 if label == 1 else 2} 1\n"
    notes["annotations/trainval.txt"] = lists[True].encode()
    notes["annotations/test.txt"] = lists[False].encode()
    return {
        "images.tar.gz": _tar(folder / "images.tar.gz", images, "w:gz"),
        "annotations.tar.gz": _tar(folder / "annotations.tar.gz", notes, "w:gz"),
    }


def _dogs(folder):
    # The builder takes its 120 label names from the training list, so that
    # names 120 breeds; the archive has images of three.
    breeds = [f"n{2085000 + label:08d}-Breed_{label}" for label in range(120)]
    images, notes, lists = {}, {}, {True: [], False: []}
    lists[True] += [f"{breed}/{breed[:9]}_99999.jpg" for breed in breeds]
    for number, label, trains in _numbered(CLASSES_WITH_IMAGES):
        breed = breeds[label - 1]
        name = f"{breed}/{breed[:9]}_{number}"
        images[f"Images/{name}.jpg"] = image_bytes(number)
        box = "<xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>8</ymax>"
        notes[f"Annotation/{name}"] = (
            "<annotation><size><width>20</width><height>16</height></size>"
            f"<object><bndbox>{box}</bndbox></object></annotation>"
        ).encode()
        lists[trains].append(f"{name}.jpg")
    members = {}
    for file_name, names in {
        "file_list.mat": lists[True] + lists[False],
        "train_list.mat": lists[True],
        "test_list.mat": lists[False],
    }.items():
        column = np.array(names, dtype=object)[:, None]  # a cell array, as in the original
        members[file_name] = _mat({"file_list": column})
    return {
        "images.tar": _tar(folder / "images.tar", images, "w"),
        "annotation.tar": _tar(folder / "annotation.tar", notes, "w"),
        "lists.tar": _tar(folder / "lists.tar", members, "w"),
    }


def _flowers(folder):
    count = TRAIN_IMAGES + 2 * TEST_IMAGES
    images = {f"jpg/image_{number:05d}.jpg": image_bytes(number) for number in range(1, count + 1)}
    numbers = np.arange(1, count + 1)
    ends = (TRAIN_IMAGES, TRAIN_IMAGES + TEST_IMAGES)
    trains, validates, tests = np.split(numbers, ends)
    labels = 1 + numbers % CLASSES_WITH_IMAGES
    matrices = {
        "imagelabels.mat": {"labels": labels[None]},
        "setid.mat": {"trnid": trains[None], "valid": validates[None], "tstid": tests[None]},
    }
    archives = {"102flowers.tgz": _tar(folder / "102flowers.tgz", images, "w:gz")}
    for file_name, arrays in matrices.items():
        (folder / file_name).write_bytes(_mat(arrays))
        archives[file_name] = folder / file_name
    return archives


def _mat(arrays):
    stream = io.BytesIO()
    scipy.io.savemat(stream, arrays)
    return stream.getvalue()


_MAKERS = {"caltech_birds2011": _birds, "oxford_iiit_pet": _pets, "stanford_dogs": _dogs, "flowers102": _flowers}
