"""Any picture file to upright 8-bit RGB with Pillow; kept apart from torch so that ingestion starts fast."""

import io

import numpy as np
from PIL import Image, ImageOps

EXIF_ORIENTATION = 0x0112
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def open_image(encoded: bytes) -> Image.Image:
    """Opens an image without decoding it; the caller checks the size.

    Raises:
        PIL.UnidentifiedImageError: it is none of `FORMATS`. Pillow knows more, and would hand PostScript to a program.
    """
    Image.MAX_IMAGE_PIXELS = None  # only warns below twice its value; `ingest.max_pixels` is checked instead
    return Image.open(io.BytesIO(encoded), formats=FORMATS)


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether a JPEG needs neither rotation nor colour conversion, so that the fast decoder may take it."""
    return image.format == "JPEG" and image.mode in ("RGB", "L") and image.getexif().get(EXIF_ORIENTATION, 1) == 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """The first frame, turned upright by its EXIF orientation, as 8-bit RGB; transparency becomes white."""
    image.load()  # first, because loading a TIFF file already turns it
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
