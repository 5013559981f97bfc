"""scikit-learn's handwritten digits as a TFDS data set: real images without a download."""

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

TEST_IMAGES = 360
_BRIGHTEST = 16  # load_digits counts ink in 4x4 blocks: 0..16


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
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        _, labels = load_digits(return_X_y=True)
        # Part of the data set, so apart from --seed: everybody tests on the same images.
        train, test = train_test_split(np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=0)
        return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

    def _generate_examples(self, positions):
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey = np.rint(digits.images * (255 / _BRIGHTEST)).astype(np.uint8)  # (1797, 8, 8)
        for position in positions.tolist():
            yield (position, {"image": grey[position][:, :, None], "label": int(digits.target[position])})
