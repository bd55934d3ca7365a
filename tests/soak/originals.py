"""Small whole files of every kind that the readers take, as bytes."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

SIZE = (24, 16)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_images() -> dict[str, bytes]:
    """Return image files by name: every format, mode and compression that differs in how it is read."""
    noise = np.random.default_rng(0)
    ramp = np.linspace(0, 1, SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE[1], SIZE[0])
    colors = Image.fromarray(noise.integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)).resize((48, 32)).resize(SIZE)
    grey, layer = colors.convert("L"), colors.convert("RGBA")
    layer.putalpha(Image.fromarray((ramp * 255).astype(np.uint8)))
    indexed = colors.quantize(16)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a camera"
    exif.get_ifd(0x8769)[0x9286] = "comment"
    tiff: Callable[..., bytes] = lambda image, **options: encode(image, "TIFF", **options)  # noqa: E731
    return {
        "color.jpg": encode(colors, "JPEG"),
        "grey.jpg": encode(grey, "JPEG"),
        "cmyk.jpg": encode(colors.convert("CMYK"), "JPEG"),
        "progressive.jpg": encode(colors, "JPEG", progressive=True, quality=60),
        "turned.jpg": encode(colors, "JPEG", exif=exif),
        "color.png": encode(colors, "PNG"),
        "grey.png": encode(grey, "PNG"),
        "bits.png": encode(grey.convert("1"), "PNG"),
        "grey16.png": encode(Image.fromarray((ramp * 65535).astype(np.uint16)), "PNG"),
        "indexed.png": encode(indexed, "PNG"),
        "indexed_transparent.png": encode(indexed, "PNG", transparency=3),
        "layer.png": encode(layer, "PNG"),
        "grey_layer.png": encode(layer.convert("LA"), "PNG"),
        "turned.png": encode(colors, "PNG", exif=exif),
        "moving.png": encode(colors, "PNG", save_all=True, append_images=[grey.convert("RGB")]),
        "color.tif": tiff(colors),
        "float.tif": tiff(Image.fromarray(ramp)),
        "int.tif": tiff(Image.fromarray((ramp * 65535).astype(np.int32))),
        "grey16.tif": tiff(Image.fromarray((ramp * 65535).astype(np.uint16))),
        "lzw.tif": tiff(colors, compression="tiff_lzw"),
        "deflate.tif": tiff(Image.fromarray(ramp), compression="tiff_adobe_deflate"),
        "jpeg.tif": tiff(colors, compression="jpeg"),
        "packbits.tif": tiff(grey, compression="packbits"),
        "fax.tif": tiff(grey.convert("1"), compression="group4"),
        "layer.tif": tiff(layer),
        "turned.tif": tiff(colors, exif=exif),
        "pages.tif": tiff(colors, save_all=True, append_images=[grey, layer]),
        "lossy.webp": encode(colors, "WEBP"),
        "lossless.webp": encode(layer, "WEBP", lossless=True, exif=exif),
        "moving.webp": encode(colors, "WEBP", save_all=True, append_images=[grey.convert("RGB")]),
        "indexed.gif": encode(indexed, "GIF"),
        "moving.gif": encode(indexed, "GIF", save_all=True, append_images=[grey, colors], transparency=2),
        "color.bmp": encode(colors, "BMP"),
        "indexed.bmp": encode(indexed, "BMP"),
    }


def make_masks() -> dict[str, bytes]:
    """Return mask files by name: black and white, soft, as layers and inverted."""
    hole = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    hole[4:9, 5:15] = 255
    layer = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    layer.putalpha(Image.fromarray(hole))
    soft = Image.fromarray(hole).resize((48, 32), Image.Resampling.BICUBIC)
    return {
        "hard.png": encode(Image.fromarray(hole), "PNG"),
        "bits.png": encode(Image.fromarray(hole).convert("1"), "PNG"),
        "layer.png": encode(layer, "PNG"),
        "soft.png": encode(soft, "PNG"),
        "soft.jpg": encode(soft, "JPEG"),
        "layer.webp": encode(layer, "WEBP", lossless=True),
        "hard.tif": encode(Image.fromarray(hole), "TIFF"),
    }
