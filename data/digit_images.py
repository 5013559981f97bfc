"""scikit-learn's handwritten digits as arrays, with the split that everybody tests on. Loads no TensorFlow."""

import numpy as np

TEST_IMAGES = 360
_BRIGHTEST = 16  # load_digits counts ink in 4x4 blocks: 0..16


def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels, uint8 of shape (1797, 8, 8), and the labels, int64 of shape (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.rint(digits.images * (255 / _BRIGHTEST)).astype(np.uint8), digits.target.astype(np.int64)


def split(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the positions of `train` and `test`. The split is stratified, and the same for every --seed."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=0)
    return {"train": train, "test": test}
