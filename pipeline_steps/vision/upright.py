"""Any picture file to upright 8-bit RGB with Pillow; kept apart from torch so that ingestion starts fast."""

import numpy as np
from PIL import Image, ImageOps

EXIF_ORIENTATION = 0x0112


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether a JPEG needs neither rotation nor colour conversion, so that the fast decoder may take it."""
    return image.format == "JPEG" and image.mode in ("RGB", "L") and image.getexif().get(EXIF_ORIENTATION, 1) == 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """The first frame, turned upright by its EXIF orientation, as 8-bit RGB; transparency becomes white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
