"""Makes an image folder of scikit-learn's digits on textured backgrounds: a larger domain shift than plain digits.

    python scripts/make_shifted_digits.py digits_shifted
    python main.py --dataset_name image_folder --image_dir digits_shifted --input_size 96

Each of the 1,797 digits is scaled, rotated and coloured, and laid on a random crop of
scikit-learn's two sample photographs. Half of them are inverted: dark ink on a bright
background instead of bright ink on a dark one. The split is that of `--dataset_name
digits`, 1,437 train and 360 test. The same seed gives the same pixels.
"""

import sys
from pathlib import Path

import image_folders
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import digit_images

SIZE = 96  # pixels
SCALE = (0.7, 1)  # side of a digit with its margin, of SIZE
MARGIN = 2  # pixels of the original around a digit, so that rotation cuts nothing off
ROTATION = 30  # degrees, both ways
DARK, BRIGHT = (0, 110), (145, 255)  # ranges that do not meet, so that every digit can be seen


def images(seed):
    """Yields (split, class, uint8 array of shape (SIZE, SIZE, 3)) of every digit."""
    digits, photos = load_digits(), load_sample_images().images
    in_test = set(digit_images.split(digits.target)["test"].tolist())
    for place, (grey, label) in enumerate(zip(digits.images, digits.target)):
        rng = np.random.default_rng([seed, place])
        yield "test" if place in in_test else "train", str(label), shifted(grey, photos, rng)


def shifted(grey, photos, rng):
    """Returns a digit on a textured background.

    Args:
        grey: float array of shape (8, 8), from 0 to 16.
        photos: list of uint8 arrays of shape (height, width, 3).
        rng: np.random.Generator.

    Returns:
        uint8 array of shape (SIZE, SIZE, 3).
    """
    side = round(SIZE * rng.uniform(*SCALE))
    digit = Image.fromarray(np.pad(grey * (255 / 16), MARGIN).astype(np.uint8))
    digit = digit.resize((side, side), Image.Resampling.BICUBIC)
    digit = digit.rotate(rng.uniform(-ROTATION, ROTATION), Image.Resampling.BICUBIC)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(digit, tuple(int(corner) for corner in rng.integers(0, SIZE - side + 1, 2)))
    ink = np.asarray(mask, np.float64)[:, :, None] / 255  # (SIZE, SIZE, 1)

    photo = photos[rng.integers(len(photos))]
    top, left = (int(rng.integers(0, extent - SIZE + 1)) for extent in photo.shape[:2])
    behind, front = (DARK, BRIGHT) if rng.random() < 0.5 else (BRIGHT, DARK)
    background = np.interp(photo[top : top + SIZE, left : left + SIZE], (0, 255), behind)
    colour = rng.uniform(*front, 3)
    return np.rint(background * (1 - ink) + colour * ink).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(image_folders.main(images, __doc__))
