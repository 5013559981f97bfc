"""Image files of unknown origin: what each format declares, whether a file is good, and its pixels.

A file is believed in nothing: its format is read from its first bytes, whatever
it is called, and its size from its header, before anything is decoded. What
passes is then decoded once by the same function that training uses, so that a
run never meets an image that it can't read.
"""

import logging
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from core.errors import UsageError

log = logging.getLogger("adabet")

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
# Of all frames together, since the decoders of animations unpack them all. As RGB
# that is 300 MB, a third of what a small device has.
MAX_PIXELS = 10**8
MAX_FILE_BYTES = 2**29  # such an image as a 32-bit BMP, and room to spare
_MOST_NAMED = 3  # bad files that an error names
_MOST_LOGGED = 20  # and that the log does; the run folder has all


def decode(encoded):
    """Decodes one image, the first frame of an animation.

    Args:
        encoded: string tensor of shape (). JPEG, PNG, BMP, GIF or WebP.

    Returns:
        uint8 tensor of shape (height, width, 3), RGB. Grey, palettes and CMYK
        become RGB, 16 bits become 8, transparency is dropped.

    Raises:
        tf.errors.InvalidArgumentError: it is none of these, or damaged.
    """
    # Its own operation: decode_image refuses transparent and animated WebP.
    image = tf.cond(
        tf.strings.substr(encoded, 8, 4) == b"WEBP",
        lambda: tf.io.decode_webp(_with_alpha_if_animated(encoded), channels=0)[0, :, :, :3],
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    image.set_shape((None, None, 3))
    return image


def _with_alpha_if_animated(encoded):
    """Returns a WebP image whose header, if it is animated, says that it has transparency.

    Frames are always unpacked as RGBA, but of an opaque animation TensorFlow takes
    them for RGB, and gives noise.
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


def problem(path):
    """Returns what is wrong with an image file, in a few words; None where nothing is.

    Args:
        path: str.
    """
    try:
        if not os.path.isfile(path):  # a pipe would block, a broken link has nothing
            return "a link to nothing" if os.path.islink(path) else "no regular file"
        if os.path.getsize(path) > MAX_FILE_BYTES:
            return f"larger than {MAX_FILE_BYTES} bytes"
        content = Path(path).read_bytes()
    except OSError as error:
        return f"can't be read: {error.strerror}"
    try:
        pixels = declared_pixels(content)
    except ValueError as error:
        return str(error)
    except (struct.error, IndexError):
        return "cut short in its header"
    if pixels > MAX_PIXELS:
        return f"declares {pixels} pixels, more than {MAX_PIXELS}"
    try:
        decode(content)
    except tf.errors.InvalidArgumentError:
        return "cut short or damaged"
    return None


def declared_pixels(content):
    """Returns how many pixels an encoded image says that it has, all frames together.

    Args:
        content: bytes.

    Raises:
        ValueError: the content is no image that `decode` reads right.
        struct.error, IndexError: it ends within its header.
    """
    if not content:
        raise ValueError("empty")
    for beginning, pixels in _FORMATS.items():
        if content.startswith(beginning):
            return pixels(content)
    raise ValueError("no JPEG, PNG, BMP, GIF or WebP image")


def _jpeg_pixels(content):
    place = 2
    while True:  # over the segments, up to the one that describes the frame
        if content[place] != 0xFF:
            raise ValueError("a JPEG with damaged segments")
        marker = content[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if marker in (0xD9, 0xDA):  # end of image, start of scan
            raise ValueError("a JPEG without a frame header")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables share that range
            height, width = struct.unpack_from(">HH", content, place + 5)
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these have no length
            place += 2
        else:
            place += 2 + struct.unpack_from(">H", content, place + 2)[0]
    if content.rfind(b"\xff\xd9", place) < 0:
        raise ValueError("a JPEG that is cut short")
    return width * height


def _png_pixels(content):
    width, height = struct.unpack_from(">II", content, 16)
    return width * height


def _bmp_pixels(content):
    (header,) = struct.unpack_from("<I", content, 14)
    if header < 40:
        raise ValueError("a BMP of a kind older than 1990")
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", content, 18)
    (colours,) = struct.unpack_from("<I", content, 46)
    start = 14 + header
    # Read as they are, without palette or masks: others would have wrong colours.
    if bits == 8 and compression == 0:
        colours = colours or 256
        palette = content[start : start + 4 * colours]
        if palette[::4] != bytes(range(min(colours, 256))) or not palette[::4] == palette[1::4] == palette[2::4]:
            raise ValueError("a BMP with a colour palette: save it as PNG")
    elif (bits, compression) == (32, 3):
        if struct.unpack_from("<III", content, 54) != (0xFF0000, 0xFF00, 0xFF):
            raise ValueError("a BMP with unusual colour masks: save it as PNG")
    elif bits not in (24, 32) or compression != 0:
        raise ValueError(f"a BMP with {bits} bits a pixel or compressed: save it as PNG")
    return abs(width * height)


def _gif_pixels(content):
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    place = 13 + _colour_table_bytes(flags)
    frames = []
    while place < len(content) and content[place] != 0x3B:
        if content[place] == 0x2C:  # a frame
            if place + 9 >= len(content):
                break
            frame_width, frame_height, flags = struct.unpack_from("<HHB", content, place + 5)
            frames.append(frame_width * frame_height)
            place += 11 + _colour_table_bytes(flags)  # and the code size
        else:  # an extension
            place += 2
        while place < len(content) and content[place]:  # sub-blocks, up to an empty one
            place += 1 + content[place]
        place += 1
    return max(width * height, sum(frames))  # a frame may be larger than the canvas claims


def _colour_table_bytes(flags):
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _webp_pixels(content):
    if content[8:12] != b"WEBP":
        raise ValueError("no JPEG, PNG, BMP, GIF or WebP image")
    kind = content[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return (width & 0x3FFF) * (height & 0x3FFF)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise ValueError("a WebP of an unknown kind")
    sides = [1 + int.from_bytes(content[place : place + 3], "little") for place in (24, 27)]
    frames, place = 0, 12
    while place + 8 <= len(content):  # over the chunks
        frames += content[place : place + 4] == b"ANMF"
        length = struct.unpack_from("<I", content, place + 4)[0]
        place += 8 + length + length % 2
    return sides[0] * sides[1] * max(1, frames)  # every frame is drawn on a whole canvas


# How files begin -> function of their content, see `declared_pixels`.
_FORMATS = {
    b"\xff\xd8\xff": _jpeg_pixels,
    b"\x89PNG\r\n\x1a\n": _png_pixels,
    b"BM": _bmp_pixels,
    b"GIF87a": _gif_pixels,
    b"GIF89a": _gif_pixels,
    b"RIFF": _webp_pixels,
}


def without_bad_images(source, parts, cfg):
    """Checks every image file that a run will read, and leaves the bad ones out if that is allowed.

    This comes after the split, so that leaving an image out moves no other one.

    Args:
        source: data.source.Source.
        parts: dict from role to (split name, positions) or None, see `splits.assign`.
        cfg: Config. Reads `skip_bad_images`.

    Returns:
        parts: the same, without bad images.
        skipped: list of {"path": str, "reason": str}, in order of the paths; None
            for a source that isn't made of files.

    Raises:
        UsageError: an image is bad, and not to be skipped; or a class of the training
            images, or a part, would be left without any.
    """
    if source.files is None:
        return parts, None
    parts = dict(parts)
    skipped = []
    bar = tqdm(desc="Checking images", unit="image", leave=False, disable=None,
               total=sum(len(part[1]) for part in parts.values() if part))  # fmt: skip
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
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
            f"--image_dir must hold images that can be read. Received: {_listed(skipped, _MOST_NAMED, ', ')}; mend or "
            "remove them, or leave such files out with --skip_bad_images."
        )
    if skipped:
        log.warning("--skip_bad_images leaves out %d images: %s", len(skipped), _listed(skipped, _MOST_LOGGED, "; "))
    return parts, skipped


def printable(path):
    """Returns a path as text that can be written anywhere: bytes that are no UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _check_left(source, role, split, before, after):
    """Raises UsageError where bad images were all of a part, or all of a class in training."""
    labels = source.labels[split]
    lost = np.setdiff1d(labels[before], labels[after]) if role == "train" else []
    if len(after) and not len(lost):
        return
    what = f"the training images of class {source.class_names[lost[0]]}" if len(lost) else f"the {role} images"
    raise UsageError(
        f"--skip_bad_images must leave an image in every part and every class. Received: no good one among {what}; add "
        "good images, or raise the --limit_ flag, if one is set."
    )


def _listed(entries, most, separator):
    shown = separator.join(f"{entry['path']} ({entry['reason']})" for entry in entries[:most])
    return shown + (f"{separator}and {len(entries) - most} more" if len(entries) > most else "")
