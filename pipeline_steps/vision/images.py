"""Encoded bytes to uint8 tensors, the same way for every file format and colour mode."""

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
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


def resize_crop(pixels: torch.Tensor, resize: int, crop: int, interpolation: str = "bilinear") -> torch.Tensor:
    """The centre of an image at a network's input size.

    Args:
        pixels: uint8 (3, height, width).
        resize: length of the shorter side after antialiased resizing, in pixels.
        crop: side of the central square that is cut out, in pixels; at most `resize`.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 (3, crop, crop).
    """
    # The ends of a very long image are cut off before they are enlarged; the centre does not depend on them.
    height, width = pixels.shape[-2:]
    longest = 2 * min(height, width)
    if max(height, width) > longest:
        pixels = transforms.center_crop(pixels, [min(height, longest), min(width, longest)])
    resized = transforms.resize(pixels, [resize], InterpolationMode(interpolation), antialias=True)
    return transforms.center_crop(resized, [crop])
