"""Makes an image folder of 16 classes from scikit-learn's two sample photographs.

    python scripts/make_photo_cells.py photo_cells
    python main.py --dataset_name image_folder --image_dir photo_cells --input_size 96

A 2 x 4 grid cuts each photograph into cells, and each cell is a class. Training images
are random crops from the top and the bottom of a cell, test images from its middle, and
gaps separate the parts: no pixel is in both. The same seed gives the same crops.
"""

import sys
from pathlib import Path

import image_folders
import numpy as np
from sklearn.datasets import load_sample_images

ROWS, COLUMNS = 2, 4
CROP = 48  # pixels
GAP = 12  # pixels between the parts of a cell
COUNTS = {"train": 60, "test": 30}  # images of each class


def images(seed):
    """Yields (split, class, uint8 array of shape (CROP, CROP, 3))."""
    samples = load_sample_images()
    for photo, file in zip(samples.images, samples.filenames):
        for cell, parts in enumerate(regions(*photo.shape[:2])):
            name = f"{Path(file).stem}_{cell}"
            for split, boxes in parts.items():
                rng = np.random.default_rng([seed, *name.encode(), *split.encode()])
                for number in range(COUNTS[split]):
                    top, left, bottom, right = boxes[number % len(boxes)]
                    y, x = rng.integers(top, bottom - CROP + 1), rng.integers(left, right - CROP + 1)
                    yield split, name, photo[y : y + CROP, x : x + CROP]


def regions(height, width):
    """Yields the parts of each cell of a photograph, row by row.

    Yields:
        dict from split to list of (top, left, bottom, right), the last two exclusive.
    """
    cell_height, cell_width = height // ROWS, width // COLUMNS
    for row in range(ROWS):
        for column in range(COLUMNS):
            top, left = row * cell_height, column * cell_width
            bottom, right = top + cell_height, left + cell_width
            middle = (top + bottom - CROP) // 2
            yield {
                "train": [(top, left, middle - GAP, right), (middle + CROP + GAP, left, bottom, right)],
                "test": [(middle, left, middle + CROP, right)],
            }


if __name__ == "__main__":
    sys.exit(image_folders.main(images, __doc__))
