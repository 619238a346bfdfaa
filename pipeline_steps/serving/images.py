"""Encoded bytes to uint8 tensors, the same way for every file format and colour mode.

Of torchvision only the compiled JPEG decoder is used: importing all of it takes as long as importing torch, and every
process that answers images would wait for that.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from .upright import open_image, upright_rgb

AS_RGB = 3  # torchvision.io.ImageReadMode.RGB


def decode(encoded: bytes, plain_jpeg: bool) -> torch.Tensor:
    """Decodes one image.

    Args:
        encoded: the file's bytes.
        plain_jpeg: what `upright.is_plain_jpeg` said of it.

    Returns:
        uint8 tensor of shape (3, height, width).
    """
    if plain_jpeg:
        decoded: torch.Tensor = _jpeg_decoder()(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), AS_RGB)
        return decoded
    with open_image(encoded) as image:
        pixels = np.array(upright_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize_crop(pixels: torch.Tensor, resize: int, crop: int, interpolation: str = "bilinear") -> torch.Tensor:
    """The centre of an image at a network's input size, as torchvision's `resize` and `center_crop` make it.

    Args:
        pixels: uint8 (3, height, width).
        resize: length of the shorter side after antialiased resizing, in pixels.
        crop: side of the central square that is cut out, in pixels; at most `resize`.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 (3, crop, crop).
    """
    # The ends of a very long image are cut off before they are enlarged; the centre does not depend on them.
    shorter = min(pixels.shape[-2:])
    pixels = _centre(pixels, 2 * shorter, 2 * shorter)
    height, width = (int(resize * side / shorter) for side in pixels.shape[-2:])
    if (height, width) != pixels.shape[-2:]:
        # With the stride of a batch, torch keeps the order of colours in memory that the decoder left; without, it
        # copies twice.
        batch = pixels.as_strided((1, *pixels.shape), (pixels.numel(), *pixels.stride()))
        pixels = interpolate(batch, [height, width], mode=interpolation, align_corners=False, antialias=True)[0]
    return _centre(pixels, crop, crop)


def _centre(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The central part of an image, or all of it along a side that is not longer."""
    rows, columns = pixels.shape[-2:]
    top, left = max(0, round((rows - height) / 2)), max(0, round((columns - width) / 2))
    return pixels[..., top : top + height, left : left + width]


@cache
def _jpeg_decoder() -> Callable[..., Any]:
    found = find_spec("torchvision")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for library in Path(folder).glob("image*.so"):  # its name differs between versions of torchvision
            with suppress(OSError):
                torch.ops.load_library(library)
    if not hasattr(torch.ops.image, "decode_jpeg"):
        import torchvision.io  # noqa: F401

    return torch.ops.image.decode_jpeg  # type: ignore[no-any-return]
