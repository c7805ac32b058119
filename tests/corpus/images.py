"""Image files and folders of them: each format cut short and overwritten, special files, links, bombs."""

import os
import struct
import zlib
from functools import partial
from io import BytesIO

import numpy as np
from PIL import Image

from rfdarts_fast.data import load
from rfdarts_fast.data.photo import read_rgb

from .case import Case, damaged

FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "gif": "GIF",
    "bmp": "BMP",
    "ppm": "PPM",
    "tif": "TIFF",
    "webp": "WEBP",
}


def photo(width=24, height=20, seed=0):
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image, form, **options):
    content = BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, *chunks, bits=8, colours=2):
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    parts = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bmp_header(width, height):
    return b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def image_case(name, content, suffix="png", accepted=False):
    def run(folder):
        path = folder / f"a.{suffix}"
        path.write_bytes(content)
        return read_rgb(path)

    return Case("images", name, run, accepted, f"a.{suffix}")


def image_cases():
    for suffix, form in FORMATS.items():
        content = saved(photo(), form)
        yield image_case(f"{form}, good", content, suffix, True)
        yield image_case(f"{form} by another suffix", content, "jpg" if suffix == "png" else "png", True)
        for name, bad in damaged(content, 6, 8):
            # a viewer's tolerance of the last bytes is no concern of ours
            sure = name.startswith("cut to") and int(name[7]) < 3
            yield image_case(f"{form}, {name}", bad, suffix, False if sure else None)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"):
        image = Image.new(mode, (4, 4)) if mode in ("I;16", "LAB") else photo().convert(mode)
        yield image_case(
            f"mode {mode}", saved(image, "TIFF" if mode not in ("1", "P") else "PNG"), "tif", True
        )
    for mode in ("F", "I"):
        yield image_case(f"mode {mode}", saved(Image.new(mode, (4, 4)), "TIFF"), "tif")
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        frames = {"save_all": True, "append_images": [photo(seed=i) for i in (1, 2)]}
        yield image_case(f"animated {form}", saved(photo(), form, **frames), "png")
    for form in ("EPS", "ICO", "PDF", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "IM", "SPIDER"):
        size = photo(32, 32).convert("F") if form == "SPIDER" else photo(32, 32)
        yield image_case(f"{form} for a PNG", saved(size, form), "png")
    noise = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    for name, content in {
        "empty": b"", "text": b"no image", "zeros": bytes(500), "signature alone": b"\x89PNG\r\n\x1a\n",
        "a bomb": png(60_000, 60_000, noise), "a wide bomb": png(2**31 - 1, 1, noise),
        "a huge one": png(9500, 9500, noise),
        "no pixels": png(0, 0, noise), "no height": png(4, 0, noise), "no data": png(4, 4),
        "too little data": png(400, 400, noise), "negative": png(2**31, 4, noise),
        "depth 3": png(4, 4, noise, bits=3), "colours 5": png(4, 4, noise, colours=5),
        "palette missing": png(4, 4, noise, colours=3),
        "text bomb": png(4, 4, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "profile bomb": png(4, 4, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "pgm bomb": b"P5 100000 100000 255\n", "pgm of text": b"P2 a b c",
        "pgm without end": b"P2 4 4 255 1",
        "pgm of no colours": b"P5 4 4 0\n" + bytes(16),
        "pgm of many colours": b"P5 4 4 65536\n" + bytes(32),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n(evil) (w) file\n",
        "tiff loop": b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "tiff beyond": b"II*\0\xff\xff\xff\xff",
        "bmp of negative size": bmp_header(-4, -4),
        "bmp bomb": bmp_header(10**5, 10**5),
        "gif without end": b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(3) + b",",
        "jpeg of markers": b"\xff\xd8" + b"\xff\xe0\0\2" * 1000,
    }.items():  # fmt: skip
        yield image_case(name, content)


def good_folder(root):
    for part in ("train", "val"):
        for label in ("ant", "bee"):
            (root / part / label).mkdir(parents=True)
            photo().save(root / part / label / "0.png")
    return root


def folder_case(name, change, accepted=False, names="train"):
    def run(folder):
        change(good_folder(folder / "data"))
        return load("imagefolder", root=folder / "data", image_size=8)

    return Case("folders", name, run, accepted, names)


def emptied(folder):
    for file in folder.iterdir():
        file.unlink()


def folder_cases():
    yield folder_case("good", lambda root: None, True)
    ant = "train/ant"
    accepted = {
        "other files": lambda r: (r / ant / "notes.txt").write_text("x"),
        "a link to itself": lambda r: (r / ant / "loop").symlink_to(r / ant),
        "a link to the root": lambda r: (r / ant / "loop").symlink_to(r),
        "a link to the parent": lambda r: (r / ant / "loop").symlink_to(".."),
        "a link to a file": lambda r: (r / ant / "1.png").symlink_to("0.png"),
        "a folder called x.png": lambda r: (r / ant / "x.png").mkdir(),
        "two links to each other": lambda r: [(r / ant / a).symlink_to(r / ant / b) for a, b in ("xy", "yx")],
        "deep folders": lambda r: (r / ant / "/".join("d" * 100)).mkdir(parents=True),
        "a name of bytes": lambda r: photo().save(os.fsencode(r / ant) + b"/\xff.png"),
        "a name of lines": lambda r: photo().save(r / ant / "a\nb.png"),
        "hidden classes": lambda r: (r / "train" / ".git").mkdir(),
        "many files": lambda r: [
            (r / ant / f"{i}.png").hardlink_to(r / ant / "0.png") for i in range(1, 300)
        ],
        "no test images": lambda r: (r / "val").rename(r / "unused"),
    }
    for name, change in accepted.items():
        yield folder_case(name, change, True)
    refused = {
        "a FIFO": lambda r: os.mkfifo(r / ant / "x.png"),
        "a device": lambda r: (r / ant / "x.png").symlink_to("/dev/zero"),
        "an endless file": lambda r: (r / ant / "x.jpg").symlink_to("/dev/random"),
        "a broken link": lambda r: (r / ant / "x.png").symlink_to("gone"),
        "a link of a file to itself": lambda r: (r / ant / "x.png").symlink_to("x.png"),
        "an empty class": lambda r: emptied(r / ant),
        "an empty file": lambda r: (r / ant / "x.png").touch(),
        "text": lambda r: (r / ant / "x.png").write_text("no image"),
        "a name of lines that is no image": lambda r: (r / ant / "a\n\x1b[1m.png").write_text("x"),
        "a name of bytes that is no image": lambda r: (r / ant / "\udcff.png").write_text("x"),
        "a truncated image": lambda r: (r / ant / "x.png").write_bytes(saved(photo(), "PNG")[:-40]),
        "a bomb": lambda r: (r / ant / "x.png").write_bytes(png(60_000, 60_000)),
        "an animation": lambda r: photo().save(
            r / ant / "x.gif", save_all=True, append_images=[photo(seed=1)]
        ),
        "floats": lambda r: Image.new("F", (4, 4)).save(r / ant / "x.tif"),
        "a thousand bad files": lambda r: [(r / ant / f"x{i}.png").touch() for i in range(1000)],
        "a class that is a link to all": lambda r: (r / "train" / "loop").symlink_to(r / "train"),
        "train is a file": lambda r: [(r / "train").rename(r / "old"), (r / "train").touch()],
        "train is a FIFO": lambda r: [(r / "train").rename(r / "old"), os.mkfifo(r / "train")],
        "no train": lambda r: (r / "train").rename(r / "old"),
        "no classes": lambda r: [(r / "train").rename(r / "old"), (r / "train").mkdir()],
        "other classes to test": lambda r: (r / "val" / "ant").rename(r / "val" / "cat"),
    }
    for name, change in refused.items():
        yield folder_case(name, change)
    yield folder_case("an empty class to test", lambda r: emptied(r / "val" / "ant"), names="val")
    for name, root in {
        "nothing": "gone", "a file": __file__, "a device": "/dev/null", "a long name": "x" * 300,
        "null": "a\0b",
        "deep": "a/" * 3000,
    }.items():  # fmt: skip

        def read(_, root=root, dataset="imagefolder"):
            return load(dataset, root=root)

        yield Case("folders", f"root: {name}", read, False, "expected a folder")
        yield Case("npz", f"root: {name}", partial(read, dataset="npz"), False, "expected a")


def cases():
    yield from image_cases()
    yield from folder_cases()
