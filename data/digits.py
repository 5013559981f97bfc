"""scikit-learn's handwritten digits as a TFDS data set: real images without a download."""

from typing import ClassVar

import tensorflow_datasets as tfds

from data import digit_images


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 grey images of 8x8 pixels, 10 classes, split into 1,437 train and 360 test."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Stratified split, fixed for good."}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits (test part of the UCI optical recognition set).",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        pixels, labels = digit_images.load()
        return {
            name: self._generate_examples(positions, pixels, labels)
            for name, positions in digit_images.split(labels).items()
        }

    def _generate_examples(self, positions, pixels, labels):
        for position in positions.tolist():
            yield (position, {"image": pixels[position][:, :, None], "label": int(labels[position])})
