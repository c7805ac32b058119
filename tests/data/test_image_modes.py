"""Every mode of image that Pillow writes: converted to the right values, or refused by name."""

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from rfdarts_fast.data import DataError
from rfdarts_fast.data.photo import check_photo, read_rgb

GREY = np.array([[0, 10, 127], [128, 200, 255]], np.uint8)
GREY16 = np.array([[0, 128, 257], [1000, 40000, 65535]], np.uint16)
# 65535 is 255: rounded, not cut off
OF_GREY16 = [[0, 0, 1], [4, 156, 255]]
COLOURS = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
ALPHA = np.array([[255, 0, 128], [255, 255, 0]], np.uint8)


def over_white(colours):
    share = ALPHA[..., None] / 255
    return colours * share + 255 * (1 - share)


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=2)


def with_alpha(mode, *channels):
    return Image.merge(mode, [Image.fromarray(np.ascontiguousarray(c)) for c in channels])


def palette_image(transparency=None):
    """Indices 0 to 5 of six colours that are not their indices."""
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).convert("P")
    image.putpalette(COLOURS.reshape(-1).tolist())
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


CMYK = np.array([[[10, 200, 60, 40], [0, 0, 0, 0], [255, 0, 0, 0]], [[0, 0, 0, 255], [9, 9, 9, 9], [99] * 4]])
OF_CMYK = (255 - CMYK[..., :3]) * (255 - CMYK[..., 3:]) / 255


def flat(mode, value, size=(16, 16)):
    return Image.new(mode, size, value)


def big_endian16():
    """A TIFF of big-endian 16-bit grey."""
    pixels = GREY16.astype(">u2").tobytes()
    return Image.frombytes("I;16B", (3, 2), pixels)


def transparent_rgb():
    image = Image.fromarray(COLOURS)
    image.info["transparency"] = tuple(int(v) for v in COLOURS[0, 1])
    return image


ONE_TRANSPARENT = COLOURS.astype(float)
ONE_TRANSPARENT[0, 1] = 255

# what is written, as what, with which options, the mode that Pillow reads, the values in RGB, how near
CONVERTED = {
    "1-png": (lambda: Image.fromarray(GREY > 100), "png", {}, "1", grey(255 * (GREY > 100)), 0),
    "1-tiff": (lambda: Image.fromarray(GREY > 100), "tiff", {}, "1", grey(255 * (GREY > 100)), 0),
    "1-group4": (
        lambda: Image.fromarray(GREY > 100), "tiff", {"compression": "group4"}, "1",
        grey(255 * (GREY > 100)), 0,
    ),
    "1-pbm": (lambda: Image.fromarray(GREY > 100), "ppm", {}, "1", grey(255 * (GREY > 100)), 0),
    "L-png": (lambda: Image.fromarray(GREY), "png", {}, "L", grey(GREY), 0),
    "L-jpeg": (lambda: flat("L", 77), "jpeg", {"quality": 100}, "L", np.full((16, 16, 3), 77), 1),
    "L-transparent": (
        lambda: Image.fromarray(GREY), "png", {"transparency": 10}, "L",
        grey(np.where(GREY == 10, 255, GREY)), 0,
    ),
    "LA-png": (
        lambda: with_alpha("LA", GREY, ALPHA), "png", {}, "LA", over_white(grey(GREY)), 1,
    ),
    "RGB-png": (lambda: Image.fromarray(COLOURS), "png", {}, "RGB", COLOURS, 0),
    "RGB-bmp": (lambda: Image.fromarray(COLOURS), "bmp", {}, "RGB", COLOURS, 0),
    "RGB-webp": (lambda: Image.fromarray(COLOURS), "webp", {"lossless": True}, "RGB", COLOURS, 0),
    "RGB-transparent": (transparent_rgb, "png", {}, "RGB", ONE_TRANSPARENT, 0),
    "RGBA-png": (
        lambda: with_alpha("RGBA", *COLOURS.transpose(2, 0, 1), ALPHA), "png", {}, "RGBA",
        over_white(COLOURS), 1,
    ),
    "RGBA-tiff": (
        lambda: with_alpha("RGBA", *COLOURS.transpose(2, 0, 1), ALPHA), "tiff", {}, "RGBA",
        over_white(COLOURS), 1,
    ),
    "RGBA-webp": (
        lambda: with_alpha("RGBA", *COLOURS.transpose(2, 0, 1), ALPHA), "webp",
        {"lossless": True, "exact": True}, "RGBA", over_white(COLOURS), 1,
    ),
    "P-png": (palette_image, "png", {}, "P", COLOURS, 0),
    "P-bmp": (palette_image, "bmp", {}, "P", COLOURS, 0),
    "P-tiff": (palette_image, "tiff", {}, "P", COLOURS, 0),
    "P-gif": (palette_image, "gif", {}, "P", COLOURS, 0),
    "P-gif-transparent": (lambda: palette_image(1), "gif", {}, "P", ONE_TRANSPARENT, 0),
    "P-png-transparent": (lambda: palette_image(1), "png", {}, "P", ONE_TRANSPARENT, 0),
    "P-png-alphas": (
        lambda: palette_image(bytes(ALPHA.reshape(-1).tolist())), "png", {}, "P", over_white(COLOURS), 1,
    ),
    "CMYK-tiff": (lambda: Image.fromarray(CMYK.astype(np.uint8), "CMYK"), "tiff", {}, "CMYK", OF_CMYK, 1),
    # Adobe's JPEGs are inverted
    "CMYK-jpeg": (
        lambda: flat("CMYK", (10, 200, 60, 40)), "jpeg", {"quality": 100}, "CMYK",
        np.broadcast_to(OF_CMYK[0, 0], (16, 16, 3)), 2,
    ),
    # ITU-R BT.601, as in JFIF
    "YCbCr-tiff": (
        lambda: flat("YCbCr", (100, 90, 160)), "tiff", {}, "YCbCr",
        np.broadcast_to(
            [100 + 1.402 * 32, 100 - 0.344136 * -38 - 0.714136 * 32, 100 + 1.772 * -38], (16, 16, 3)
        ), 1,
    ),
    "YCbCr-jpeg": (
        lambda: flat("RGB", (200, 30, 90)).convert("YCbCr"), "jpeg", {"quality": 100}, "RGB",
        np.broadcast_to([200, 30, 90], (16, 16, 3)), 3,
    ),
    # sRGB's red is L* 54.29, a* 80.81, b* 69.89 under D50
    "LAB-tiff": (
        lambda: flat("LAB", (round(54.29 * 2.55), 128 + 81, 128 + 70)), "tiff", {}, "LAB",
        np.broadcast_to([255, 0, 0], (16, 16, 3)), 5,
    ),
    "I;16-png": (lambda: Image.fromarray(GREY16), "png", {}, "I;16", grey(OF_GREY16), 0),
    "I;16-tiff": (lambda: Image.fromarray(GREY16), "tiff", {}, "I;16", grey(OF_GREY16), 0),
    "I;16B-tiff": (big_endian16, "tiff", {}, "I;16B", grey(OF_GREY16), 0),
    "I;16-pgm": (lambda: Image.fromarray(GREY16), "ppm", {}, "I", grey(OF_GREY16), 0),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERTED)
def test_converted(tmp_path, case):
    make, suffix, options, mode, expected, tolerance = CONVERTED[case]
    path = tmp_path / f"a.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        make().save(path, **options)
    with Image.open(path) as image:
        assert image.mode == mode
    check_photo(path, decode=True)
    read = np.asarray(read_rgb(path))
    assert read.dtype == np.uint8
    assert np.abs(read - np.asarray(expected, float)).max() <= tolerance


def png(width, height, bits, colours, rows):
    """A PNG made by hand, of rows of bytes that may be fewer than it says."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_sixteen_bits_of_colour_keep_their_high_byte(tmp_path):
    rows = [np.stack([row, 255 - row], axis=-1).tobytes() for row in COLOURS.reshape(2, 9)]
    (tmp_path / "a.png").write_bytes(png(3, 2, 16, 2, rows))
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png")), COLOURS)


def frames(count=3):
    return [Image.new("RGB", (4, 4), (60 * i, 0, 0)) for i in range(count)]


def save_all(path):
    first, *rest = frames()
    first.save(path, save_all=True, append_images=rest)


def patched_tiff(path, tag, value, pixels=GREY16):
    """A TIFF of 16-bit grey whose tag, a short, says something else."""
    content = BytesIO()
    Image.fromarray(pixels).save(content, "TIFF")
    raw = bytearray(content.getvalue())
    at = raw.find(tag.to_bytes(2, "little") + b"\3\0\1\0\0\0")
    raw[at + 8 : at + 10] = value.to_bytes(2, "little")
    path.write_bytes(raw)


REFUSED = {
    "F-tiff": (lambda p: Image.fromarray(GREY / np.float32(255)).save(p), "f.tiff", r"mode F \(TIFF\)"),
    "F-pfm": (
        lambda p: Image.fromarray(GREY / np.float32(255)).save(p, "PPM"), "f.ppm", r"mode F \(PPM\)",
    ),
    "F-nan": (lambda p: Image.fromarray(np.full((2, 2), np.nan, "f")).save(p), "f.tiff", r"mode F \(TIFF\)"),
    "I-tiff": (lambda p: Image.fromarray(GREY.astype(np.int32)).save(p), "i.tiff", r"mode I \(TIFF\)"),
    "I;16-signed": (lambda p: Image.fromarray(GREY.astype(np.int32)).save(p), "s.tiff", r"mode I \(TIFF\)"),
    "I;16-white-is-zero": (
        lambda p: patched_tiff(p, 262, 0), "w.tiff", r"mode I;16 \(TIFF, white is zero\)",
    ),
    "I;12": (lambda p: patched_tiff(p, 258, 12), "t.tiff", r"mode I;16 \(TIFF, 12 bits\)"),
    "I;16-transparent": (
        lambda p: Image.fromarray(GREY16).save(p, transparency=128), "t.png",
        r"mode I;16 \(PNG, a transparent grey\)",
    ),
    "animated-gif": (save_all, "a.gif", r"an animation or several pages \(GIF, mode P\)"),
    "animated-png": (save_all, "a.png", r"an animation or several pages \(PNG, mode RGB\)"),
    "animated-webp": (save_all, "a.webp", r"an animation or several pages \(WEBP, mode RGB\)"),
    "pages-tiff": (save_all, "a.tiff", r"an animation or several pages \(TIFF, mode RGB\)"),
    "wide": (lambda p: p.write_bytes(png(100_000, 900, 1, 0, [])), "wide.png", "100000 x 900 pixels, more"),
    "bomb": (lambda p: p.write_bytes(png(60_000, 60_000, 1, 0, [])), "bomb.png", "exceeds limit"),
    # these decoders of Pillow are never asked; that of EPS would start a program
    "eps": (lambda p: Image.new("RGB", (4, 4)).save(p, "EPS"), "e.jpg", "expected a readable image"),
    "ico": (lambda p: Image.new("RGB", (16, 16)).save(p, "ICO"), "i.png", "expected a readable image"),
}  # fmt: skip


# Pillow's own warning about large images
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    write, name, message = REFUSED[case]
    path = tmp_path / name
    write(path)
    for read in (read_rgb, lambda path: check_photo(path, decode=False)):
        with pytest.raises(DataError, match=message) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: expected ")


def test_the_first_picture_of_a_jpeg_with_several_is_read(tmp_path):
    first, *rest = frames()
    first.paste((10, 20, 200), (0, 0, 4, 4))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=rest, quality=100)
    assert np.abs(np.asarray(read_rgb(tmp_path / "a.jpg")) - np.array([10, 20, 200.0])).max() <= 2


def test_a_jpeg_in_progress_or_cut_short(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for options in ({}, {"progressive": True}):
        photo.save(tmp_path / "a.jpg", **options)
        check_photo(tmp_path / "a.jpg", decode=True)
        content = (tmp_path / "a.jpg").read_bytes()
        (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
        check_photo(tmp_path / "a.jpg", decode=False)
        with pytest.raises(DataError, match=r"a\.jpg: expected a readable image"):
            check_photo(tmp_path / "a.jpg", decode=True)
