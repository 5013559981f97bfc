"""Image files of every kind, good and bad: right pixels, or a reason; never a hang, a crash, or a wrong image."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from archives import image_bytes
from PIL import Image
from test_data_folder import fill, load

from core.errors import UsageError
from data import image_files

HEIGHT, WIDTH = 40, 60
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
RGB = np.stack([COLUMNS * 4, ROWS * 6, (COLUMNS + ROWS) * 2], axis=-1).astype(np.uint8)  # smooth, so that JPEG is close
IMAGE = Image.fromarray(RGB)
SIXTEEN_BITS = (COLUMNS * 1000).astype(np.uint16)


def encoded(image, image_format, **options):
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def transparent():
    image = IMAGE.copy()
    image.putalpha(Image.fromarray((COLUMNS * 4).astype(np.uint8)))
    return image


def animated(image_format, **options):
    more = [IMAGE.rotate(180), IMAGE.rotate(180).crop((0, 0, 30, 20)).resize((WIDTH, HEIGHT))]
    return encoded(IMAGE, image_format, save_all=True, append_images=more, **options)


# What it is -> (file, largest difference from Pillow's pixels).
GOOD = {
    "JPEG": (encoded(IMAGE, "JPEG", quality=95), 6),
    "progressive JPEG": (encoded(IMAGE, "JPEG", quality=95, progressive=True), 6),
    "grey JPEG": (encoded(IMAGE.convert("L"), "JPEG", quality=95), 3),
    "CMYK JPEG": (encoded(IMAGE.convert("CMYK"), "JPEG", quality=95), 4),
    "PNG": (encoded(IMAGE, "PNG"), 0),
    "grey PNG": (encoded(IMAGE.convert("L"), "PNG"), 0),
    "grey PNG with transparency": (encoded(transparent().convert("LA"), "PNG"), 0),
    "black and white PNG": (encoded(IMAGE.convert("1"), "PNG"), 0),
    "palette PNG": (encoded(IMAGE.quantize(64), "PNG"), 0),
    "palette PNG of 3 bits": (encoded(IMAGE.quantize(8), "PNG", bits=4), 0),
    "palette PNG with transparency": (encoded(IMAGE.quantize(64), "PNG", transparency=3), 0),
    "RGBA PNG": (encoded(transparent(), "PNG"), 0),
    "animated PNG": (animated("PNG"), 0),
    "BMP": (encoded(IMAGE, "BMP"), 0),
    "grey BMP": (encoded(IMAGE.convert("L"), "BMP"), 0),
    "RGBA BMP": (encoded(transparent(), "BMP"), 0),
    "GIF": (encoded(IMAGE, "GIF"), 0),
    "animated GIF": (animated("GIF"), 0),
    "WebP": (encoded(IMAGE, "WEBP"), 1),
    "lossless WebP": (encoded(IMAGE, "WEBP", lossless=True), 0),
    "transparent WebP": (encoded(transparent(), "WEBP", lossless=True), 0),
    "lossy transparent WebP": (encoded(transparent(), "WEBP"), 1),
    "animated WebP": (animated("WEBP", lossless=True), 0),
    "transparent animated WebP": (
        encoded(transparent(), "WEBP", lossless=True, save_all=True, append_images=[IMAGE]),
        0,
    ),
    "1x1": (encoded(IMAGE.crop((5, 5, 6, 6)), "PNG"), 0),
    "1 pixel high": (encoded(IMAGE.crop((0, 5, WIDTH, 6)), "JPEG", quality=95), 6),
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_images_have_pillows_pixels(kind, tmp_path):
    content, tolerance = GOOD[kind]
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    found = image_files.decode(content).numpy()
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance
    (tmp_path / "image.jpg").write_bytes(content)  # whatever it is called
    assert image_files.problem(str(tmp_path / "image.jpg")) is None
    # Of a PNG only the first frame is unpacked.
    frames = {"animated GIF": 3, "animated WebP": 3, "transparent animated WebP": 2}.get(kind, 1)
    assert image_files.declared_pixels(content) == frames * expected[..., 0].size


@pytest.mark.parametrize("kind", ["animated GIF", "animated WebP"])
def test_pixels_of_all_frames_are_limited(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 3 * WIDTH * HEIGHT - 1)
    (tmp_path / "image.png").write_bytes(GOOD[kind][0])
    assert image_files.problem(str(tmp_path / "image.png")) == "declares 7200 pixels, more than 7199"


def test_small_frames_of_a_gif_count_by_their_area():
    frames = [IMAGE.convert("P") for _ in range(3)]
    for place, frame in enumerate(frames):
        frame.putpixel((place, 0), 7 + place)
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert WIDTH * HEIGHT <= image_files.declared_pixels(content) < 1.1 * WIDTH * HEIGHT


@pytest.mark.parametrize("kind", ["a second picture", "a video"])
def test_data_after_a_jpeg_is_ignored(kind, tmp_path):
    two = encoded(IMAGE, "MPO", save_all=True, append_images=[IMAGE], quality=95)
    content = two if kind == "a second picture" else JPEG + b"\0\0\0\x18ftypmp42\xff\xd9\xff\xda" + bytes(99)
    (tmp_path / "image.jpg").write_bytes(content)
    assert image_files.problem(str(tmp_path / "image.jpg")) is None
    np.testing.assert_array_equal(image_files.decode(content), image_files.decode(JPEG))


def test_a_truncated_jpeg_with_a_thumbnail_is_found(tmp_path):
    thumbnail = encoded(IMAGE.resize((16, 10)), "JPEG")
    content = encoded(IMAGE, "JPEG", exif=b"Exif\0\0" + thumbnail)  # which ends by itself
    (tmp_path / "image.jpg").write_bytes(content[:-40])
    assert "truncated" in image_files.problem(str(tmp_path / "image.jpg"))


@pytest.mark.parametrize("grey", [True, False])
def test_16_bit_images_keep_their_high_byte(grey):
    if grey:
        content = encoded(Image.fromarray(SIXTEEN_BITS), "PNG")
        expected = np.repeat(SIXTEEN_BITS[..., None], 3, axis=-1) / 257
    else:  # which Pillow cannot write
        wide = np.stack([SIXTEEN_BITS, SIXTEEN_BITS[:, ::-1], SIXTEEN_BITS // 2], axis=-1)
        lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in wide)
        content, expected = png(WIDTH, HEIGHT, lines, bits=16), wide / 257
    assert np.abs(image_files.decode(content).numpy() - expected).max() < 1


def png(width, height, lines, bits=8):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def with_bytes(content, place, replacement):
    return content[:place] + replacement + content[place + len(replacement) :]


JPEG, BMP, GIF, WEBP = (GOOD[kind][0] for kind in ("JPEG", "BMP", "GIF", "WebP"))
FRAME = JPEG.index(b"\xff\xc0")  # where a JPEG's size is
OLD_BMP = struct.pack("<2sIIIIHHHH", b"BM", 26 + 12, 0, 26, 12, 2, 2, 1, 24) + bytes(16)  # of OS/2
# A GIF whose canvas is small, with many frames of the largest size that hold nothing.
GIF_OF_LARGE_FRAMES = (
    b"GIF89a\1\0\1\0\0\0\0" + 3 * (b"\x2c\0\0\0\0" + struct.pack("<HH", 20_000, 20_000) + b"\0\2\1\0\0") + b"\x3b"
)
WEBP_CANVAS = b"RIFF\0\0\0\0WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + b"\xff\xff\0" * 2

# What it is -> (file, what the reason has to say).
BAD = {
    "nothing": (b"", "empty"),
    "one byte": (b"\xff", "not a JPEG, PNG"),
    "text": (b"<html>not found</html>", "not a JPEG, PNG"),
    "a video in the same container": (b"RIFF\0\0\0\0AVI LIST", "not a JPEG, PNG"),
    "TIFF": (encoded(IMAGE, "TIFF"), "not a JPEG, PNG"),
    "huge PNG": (png(50_000, 50_000, b""), "declares 2500000000 pixels, more than 100000000"),
    "huge JPEG": (with_bytes(JPEG, FRAME + 5, b"\xff\xff\xff\xff"), "declares 4294836225 pixels"),
    "huge BMP": (with_bytes(BMP, 18, struct.pack("<ii", 2**30, -(2**30))), "pixels, more than 100000000"),
    "huge GIF": (with_bytes(GIF, 6, b"\xff\xff\xff\xff"), "declares 4294836225 pixels"),
    "GIF of huge frames": (GIF_OF_LARGE_FRAMES, "declares 400000000 pixels"),
    "huge WebP": (with_bytes(WEBP, 26, b"\xff\x3f\xff\x3f"), "declares 268402689 pixels"),
    "WebP of a huge canvas": (WEBP_CANVAS, "declares 4294967296 pixels"),
    "WebP of many frames": (
        with_bytes(WEBP_CANVAS, 24, b"\xff\x0f\0" * 2) + 9 * (b"ANMF" + bytes(4)), "damaged",
    ),
    "JPEG without a frame": (b"\xff\xd8\xff\xd9" + bytes(30), "not a JPEG"),
    "JPEG of noise": (b"\xff\xd8\xff\xe0\0\4ab" + bytes(30), "not a JPEG"),
    "PNG of noise": (b"\x89PNG\r\n\x1a\n" + bytes(100), "damaged"),
    "PNG with a flipped bit": (with_bytes(GOOD["PNG"][0], 60, b"\x55"), "damaged"),
    "palette BMP": (encoded(IMAGE.quantize(64), "BMP"), "a BMP with a palette"),
    "black and white BMP": (encoded(IMAGE.convert("1"), "BMP"), "a BMP with a palette"),
    "old BMP": (OLD_BMP, "old header"),
    "BMP of other masks": (with_bytes(with_bytes(BMP, 28, struct.pack("<HI", 32, 3)), 54, struct.pack("<III", 0xFF, 0xFF00, 0xFF0000)), "bitfields"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_have_a_reason(kind, tmp_path):
    content, reason = BAD[kind]
    (tmp_path / "image.png").write_bytes(content)
    assert reason in image_files.problem(str(tmp_path / "image.png"))


@pytest.mark.parametrize("kind", [kind for kind in GOOD if "animated" not in kind])
def test_truncated_images_are_found_at_any_length(kind, tmp_path):
    content, _ = GOOD[kind]
    for length in {*range(0, 60, 3), *np.linspace(60, len(content) - 4, 8).astype(int)} - {len(content)}:
        if length < len(content):
            (tmp_path / "image.png").write_bytes(content[:length])
            assert image_files.problem(str(tmp_path / "image.png")), length


def test_random_damage_never_crashes(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "image.png"
    for content, _ in GOOD.values():
        for _ in range(20):
            noisy = np.frombuffer(content, np.uint8).copy()
            places = rng.integers(0, len(noisy), 3)
            noisy[places] = rng.integers(0, 256, 3)
            path.write_bytes(noisy.tobytes())
            reason = image_files.problem(str(path))
            if reason is None:
                assert image_files.decode(path.read_bytes()).shape[-1] == 3


def test_special_files_are_bad_and_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("nowhere", tmp_path / "link.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(image_files.MAX_FILE_BYTES + 1)
    reasons = {name: image_files.problem(str(tmp_path / f"{name}.png")) for name in ("pipe", "link", "loop", "large")}
    assert reasons == {
        "pipe": "not a regular file", "link": "a link to nothing", "loop": "a link to nothing",
        "large": "larger than 536870912 bytes",
    }  # fmt: skip


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    """Two classes of 10 images, and three bad ones."""
    fill(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "a" / "cut.jpg").write_bytes(JPEG[:300])
    (tmp_path / "b" / "bomb.png").write_bytes(BAD["huge PNG"][0])
    (tmp_path / "b" / "page.jpg").write_bytes(b"<html>")
    return tmp_path


def test_bad_images_are_named_with_advice(folder):
    with pytest.raises(
        UsageError, match=r"a/cut.jpg \(.*b/bomb.png \(declares.*b/page.jpg \(not.*--skip_bad_images"
    ) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_skipped_images_are_listed_and_move_no_other(folder):
    skipping = load(folder, skip_bad_images=True)
    assert [os.path.basename(entry["path"]) for entry in skipping.skipped_images] == ["cut.jpg", "bomb.png", "page.jpg"]
    assert sum(skipping.split_sizes.values()) == 20
    for batches in (skipping.train_batches(0, 1), skipping.validation_batches(), skipping.test_batches()):
        assert all(np.isfinite(images.numpy()).all() for images, _ in batches)


def test_only_images_of_the_run_are_checked(folder, monkeypatch):
    checked = []
    monkeypatch.setattr(image_files, "problem", checked.append)
    load(folder, limit_train=8, limit_test=2)
    assert len(checked) == len(set(checked)) == 10


def test_skipping_must_not_empty_a_class_or_part(tmp_path):
    fill(tmp_path, {"train/a": 4, "test/a": 1})
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "train" / "b" / "bad.jpg").write_bytes(b"bad")
    with pytest.raises(UsageError, match="class b"):
        load(tmp_path, skip_bad_images=True, protocol="paper")
    (tmp_path / "train" / "b" / "good.png").write_bytes(image_bytes(1, "PNG", "RGB"))
    (tmp_path / "test" / "a" / "0.png").write_bytes(b"bad")
    with pytest.raises(UsageError, match="the test images"):
        load(tmp_path, skip_bad_images=True, protocol="paper")


def test_skip_bad_images_needs_image_folder():
    import data
    from core.config import Config

    with pytest.raises(UsageError, match="needs --dataset_name image_folder"):
        data.load(Config(skip_bad_images=True))


def test_names_with_spaces_unicode_and_quotes_work(tmp_path):
    names = ["a class", "κλάση 类 🐈", 'it\'s "quoted"', "-dash", "100%"]
    fill(tmp_path, dict.fromkeys(names, 6))
    (tmp_path / "a class" / "Ünï cødé.png").write_bytes(image_bytes(1, "PNG", "RGB"))
    with open(os.fsencode(tmp_path / "a class") + b"/latin\xe9.png", "wb") as file:  # no UTF-8
        file.write(image_bytes(2, "PNG", "RGB"))
    loaded = load(tmp_path)
    assert loaded.class_names == sorted(names) and sum(loaded.split_sizes.values()) == 32
    assert sum(len(labels) for _, labels in loaded.train_batches(0, 1)) > 0


def test_bad_image_without_unicode_name_is_reported(tmp_path):
    fill(tmp_path, {"a": 5, "b": 5})
    with open(os.fsencode(tmp_path / "a") + b"/\xff.png", "wb") as file:
        file.write(b"bad")
    with pytest.raises(UsageError, match=r"a/\\xff.png"):
        load(tmp_path)
    os.mkdir(os.fsencode(tmp_path) + b"/\xe9")
    with pytest.raises(UsageError, match=r"Unicode names.*\\xe9"):
        load(tmp_path)


def test_links_are_followed_and_loops_ignored(tmp_path):
    fill(tmp_path / "elsewhere", {"cats": 6})
    fill(tmp_path / "set", {"dogs": 6})
    os.symlink(tmp_path / "elsewhere" / "cats", tmp_path / "set" / "cats")
    os.symlink(tmp_path / "elsewhere" / "cats" / "0.png", tmp_path / "set" / "dogs" / "linked.png")
    os.symlink(tmp_path / "set", tmp_path / "set" / "dogs" / "up")  # a folder in a class folder: ignored
    os.symlink("circle", tmp_path / "set" / "circle")  # leads to no folder: ignored
    loaded = load(tmp_path / "set")
    assert loaded.class_names == ["cats", "dogs"] and sum(loaded.split_sizes.values()) == 13
    os.symlink("nowhere.png", tmp_path / "set" / "dogs" / "broken.png")
    with pytest.raises(UsageError, match=r"broken.png .a link to nothing"):
        load(tmp_path / "set")


def test_training_reads_every_kind_of_image(tmp_path):
    from data import pipeline

    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        fill(tmp_path, {f"test/{name}": 1})
    for number, (content, _) in enumerate(GOOD.values()):
        (tmp_path / "train" / "ab"[number % 2] / f"{number}.webp").write_bytes(content)
    loaded = load(tmp_path, protocol="paper", augment=False, batch_size=len(GOOD))
    ((images, _),) = loaded.train_batches(0, 1)
    expected = [pipeline.decode_image(content, 8).numpy() for content, _ in GOOD.values()]
    assert sorted(image.tobytes() for image in images.numpy()) == sorted(image.tobytes() for image in expected)
