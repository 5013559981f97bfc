"""Image files of unknown origin: whether training can read a file, and its pixels.

Pillow determines the format from the content, whatever the file is called, and the size
from the header, before anything is decoded. An image that passes is decoded once by
the function that training uses: the two libraries accept different files, and a run
must not meet an image that it cannot read.
"""

import io
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image, WebPImagePlugin  # noqa: F401  registers WebP
from tqdm import tqdm

from core.config import Config
from core.errors import UsageError
from core.log import log
from data.folder_source import printable
from data.source import Source

MAX_PIXELS = 10**8  # of all frames that a decoder unpacks together; 300 MB as RGB
MAX_FILE_BYTES = 2**29  # more than such an image takes as a 32-bit BMP
_MOST_NAMED = 3  # bad files in an error message
_MOST_LOGGED = 20  # bad files in the log; the run folder lists all

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
_BMP_MODES = ("BGR", "BGRX", "BGRA", "L")  # those that TensorFlow reads as they are

# Above twice this size Pillow raises an error, also before it allocates a frame.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2


def decode(encoded):
    """Decodes an image, or the first frame of an animation.

    Args:
        encoded: string tensor of shape (). JPEG, PNG, BMP, GIF or WebP.

    Returns:
        uint8 tensor of shape (height, width, 3), RGB. Grey, palettes and CMYK
        become RGB, 16 bits become 8, transparency is dropped.

    Raises:
        tf.errors.InvalidArgumentError: if it is none of these, or damaged.
    """
    # decode_image refuses transparent and animated WebP.
    image = tf.cond(
        tf.strings.substr(encoded, 8, 4) == b"WEBP",
        lambda: tf.io.decode_webp(_with_alpha_if_animated(encoded), channels=0)[0, :, :, :3],
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    image.set_shape((None, None, 3))
    return image


def _with_alpha_if_animated(encoded):
    """Returns a WebP image whose header declares transparency if it is animated.

    Frames are always unpacked as RGBA, but TensorFlow reads those of an opaque animation
    as RGB, which gives noise.
    """
    flags = tf.io.decode_raw(tf.strings.substr(encoded, 20, 1), tf.uint8)[0]
    return tf.cond(
        (tf.strings.substr(encoded, 12, 4) == b"VP8X") & (flags & 0x02 != 0),
        lambda: tf.strings.join(
            [
                tf.strings.substr(encoded, 0, 20),
                tf.gather([bytes([flag | 0x10]) for flag in range(256)], tf.cast(flags, tf.int32)),
                tf.strings.substr(encoded, 21, tf.strings.length(encoded)),
            ]
        ),
        lambda: encoded,
    )


def problem(path: str) -> str | None:
    """Returns what is wrong with an image file, in a few words, or None if training can read it."""
    try:
        if not os.path.isfile(path):  # a pipe would block
            return "a link to nothing" if os.path.islink(path) else "not a regular file"
        if os.path.getsize(path) > MAX_FILE_BYTES:
            return f"larger than {MAX_FILE_BYTES} bytes"
        content = Path(path).read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    try:
        pixels = declared_pixels(content)
    except ValueError as error:
        return str(error)
    if pixels > MAX_PIXELS:
        return f"declares {pixels} pixels, more than {MAX_PIXELS}"
    try:
        decode(content)
    except tf.errors.InvalidArgumentError:
        return "truncated or damaged"
    return None


def declared_pixels(content: bytes) -> int:
    """Returns the number of pixels that an encoded image declares, of all frames that a decoder unpacks.

    Raises:
        ValueError: if the content is not an image that `decode` reads correctly.
    """
    if not content:
        raise ValueError("empty")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.format == "BMP":
                _check_bmp(image, content)
            return _unpacked_pixels(image)
    except Image.DecompressionBombError as error:
        return int(re.search(r"\((\d+) pixels\)", str(error))[1])
    except Image.UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG, BMP, GIF or WebP image, or its header is damaged") from None
    except _Unsupported:
        raise
    except Exception as error:  # Pillow's readers raise many types for damaged files
        raise ValueError(f"truncated or damaged ({error})") from None


class _Unsupported(ValueError):
    """An intact image that TensorFlow would read wrongly."""


def _check_bmp(image, content):
    decoder, _, _, (raw_mode, *_) = image.tile[0]
    has_old_header = int.from_bytes(content[14:18], "little") < 40
    if has_old_header or decoder != "raw" or raw_mode not in _BMP_MODES:
        raise _Unsupported("a BMP with a palette, unusual masks, compression or an old header: save it as PNG")


def _unpacked_pixels(image):
    pixels = image.width * image.height
    if image.format == "WEBP":
        return pixels * image.n_frames  # each frame is drawn on a canvas of its own
    if image.format != "GIF":
        return pixels  # of an animated PNG, only the first frame is unpacked
    in_frames = 0
    for frame in range(image.n_frames):
        image.seek(frame)
        left, top, right, bottom = image.tile[0].extents  # a frame may cover a part of the canvas
        in_frames += (right - left) * (bottom - top)
        if in_frames > MAX_PIXELS:
            break
    return max(pixels, in_frames)


def without_bad_images(source: Source, parts: dict, cfg: Config) -> tuple[dict, list | None]:
    """Checks every image file that a run will read, and leaves out the bad ones if `--skip_bad_images` is set.

    The check comes after the split, so no other image changes its part.

    Args:
        source: data.source.Source.
        parts: dict from role to (split name, positions) or None, as `splits.assign`
            returns it.
        cfg: Config. Reads `skip_bad_images`.

    Returns:
        parts: the same, without bad images.
        skipped: list of {"path": str, "reason": str}, in order of the paths, or None for
            a source that does not consist of files.

    Raises:
        UsageError: if an image is bad and must not be skipped, or if a class of the
            training images or a part would be empty.
    """
    if source.files is None:
        return parts, None
    parts = dict(parts)
    skipped = []
    num_files = sum(len(part[1]) for part in parts.values() if part)
    bar = tqdm(desc="Checking images", unit="image", leave=False, disable=None, total=num_files)
    # Pillow warns of large images and of odd metadata, neither of which matters here.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for role, part in parts.items():
            if part is None:
                continue
            split, positions = part
            files = [source.files[split][position] for position in positions]
            reasons = []
            for reason in pool.map(problem, files):
                reasons.append(reason)
                bar.update()
            skipped += [{"path": printable(file), "reason": why} for file, why in zip(files, reasons) if why]
            good = positions[[why is None for why in reasons]]
            if cfg.skip_bad_images:
                _check_left(source, role, split, positions, good)
            parts[role] = split, good
    skipped.sort(key=lambda entry: entry["path"])
    if skipped and not cfg.skip_bad_images:
        raise UsageError(
            f"--image_dir must hold images that can be read. Received: {_listed(skipped, _MOST_NAMED, ', ')}; repair "
            "or remove them, or leave them out with --skip_bad_images."
        )
    if skipped:
        log.warning("--skip_bad_images leaves out %d images: %s", len(skipped), _listed(skipped, _MOST_LOGGED, "; "))
    return parts, skipped


def _check_left(source, role, split, before, after):
    """Raises UsageError if all images of a part, or of a class in training, were bad."""
    labels = source.labels[split]
    lost = np.setdiff1d(labels[before], labels[after]) if role == "train" else []
    if len(after) and not len(lost):
        return
    what = f"the training images of class {source.class_names[lost[0]]}" if len(lost) else f"the {role} images"
    raise UsageError(
        f"--skip_bad_images must leave an image in every part and every class. Received: no readable one among {what}; "
        "add images, or raise the --limit_ flag if one is set."
    )


def _listed(entries, most, separator):
    shown = separator.join(f"{entry['path']} ({entry['reason']})" for entry in entries[:most])
    return shown + (f"{separator}and {len(entries) - most} more" if len(entries) > most else "")
