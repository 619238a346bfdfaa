"""Encoded bytes to uint8 tensors, the same way for every file format and colour mode."""

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as transforms

from pipeline_steps.vision.upright import open_image, upright_rgb


def decode(encoded: bytes, plain_jpeg: bool) -> torch.Tensor:
    """Decodes one image.

    Args:
        encoded: the file's bytes.
        plain_jpeg: what `upright.is_plain_jpeg` said of it.

    Returns:
        uint8 tensor of shape (3, height, width).
    """
    if plain_jpeg:
        return decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)
    with open_image(encoded) as image:
        pixels = np.array(upright_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize_crop(pixels: torch.Tensor, resize: int, crop: int) -> torch.Tensor:
    """Shorter side to `resize` (antialiased bilinear), then the central `crop` x `crop`; uint8 (3, crop, crop)."""
    return transforms.center_crop(transforms.resize(pixels, [resize], antialias=True), [crop])
