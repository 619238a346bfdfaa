"""The effective receptive field: which pixels really move the middle of the last feature map, on real images.

That map is the output of the last layer that gives one. The gradient of its middle position, summed over channels, with
respect to the image is squared and summed over colours, and averaged over images (after Luo, Li, Urtasun and Zemel,
"Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", 2016). Its sum over an area is that
area's energy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline_steps.complexity.field import Field
from pipeline_steps.complexity.operations import tensors
from pipeline_steps.errors import PleatError
from pipeline_steps.formats import listing

SHARES = (0.5, 0.9)
MAX_IMAGES = 16


class NoEffectiveFieldError(PleatError):
    """The network has no effective receptive field that could be measured."""


@dataclass(frozen=True)
class Effective:
    """The field of the middle position of a layer.

    Attributes:
        layer: its name.
        energy: (height, width), sums to 1.
        middle: row and column of the image, in pixels, around which the theoretical field lies.
        theoretical_px: its longer side; may be larger than the image.
        area_px: the fewest pixels that hold each share of the energy.
        side_px: side of the square around the middle that holds each share.
        images: uint8 (3, height, width), those used.
        weights: where they are from, in words.
    """

    layer: str
    energy: np.ndarray[Any, np.dtype[np.float64]]
    middle: tuple[float, float]
    theoretical_px: int
    area_px: dict[float, int]
    side_px: dict[float, int]
    images: Sequence[Tensor]
    weights: str


def measure(
    network: nn.Module, local_output: tuple[str, Field], inputs: Tensor, images: Sequence[Tensor], weights: str
) -> Effective:
    """The effective field of the last feature map that a layer gives.

    Args:
        network: on the CPU, in evaluation.
        local_output: of `Trace`.
        inputs: what the network takes, float (n, 3, height, width).
        images: the same as uint8, to be shown.
        weights: where they are from, in words.

    Raises:
        NoEffectiveFieldError: nothing comes back from that position.
    """
    layer, sees = local_output
    assert sees.rows is not None
    assert sees.columns is not None
    network.requires_grad_(False)
    energy = torch.zeros(inputs.shape[-2:], dtype=torch.float64)
    for image in inputs.split(1):
        energy += _energy(network, layer, sees, image)
    if not 0 < float(energy.sum()) < float("inf"):
        raise NoEffectiveFieldError(
            f"No gradient comes back from the middle of {layer}, so these images show no effective receptive field; "
            "use other images or other weights."
        )
    shares = (energy / energy.sum()).numpy()
    rows, columns = (
        reach.jump * (reach.size // 2) + (reach.low + reach.high) / 2 for reach in (sees.rows, sees.columns)
    )
    return Effective(
        layer,
        shares,
        (rows, columns),
        int(sees.pixels or 0),
        areas(shares),
        sides(shares, (rows, columns)),
        images,
        weights,
    )


def _energy(network: nn.Module, layer: str, sees: Field, image: Tensor) -> Tensor:
    """Energy of one image (1, channels, height, width) at each pixel (height, width)."""
    made: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        made.append(next(tensors(output)).clone())  # the network may write into its own later

    hook = network.get_submodule(layer).register_forward_hook(keep)
    image = image.clone().requires_grad_()
    try:
        network(image)
    finally:
        hook.remove()
    middle = _middle(made[-1], sees).sum()
    gradient = torch.autograd.grad(middle, image, allow_unused=True)[0] if middle.requires_grad else None
    return torch.zeros(image.shape[-2:]) if gradient is None else gradient[0].double().square().sum(0)


def _middle(output: Tensor, sees: Field) -> Tensor:
    """All channels of the position in the middle."""
    assert sees.axes is not None
    assert sees.rows is not None
    assert sees.columns is not None
    row, column = sees.rows.size // 2, sees.columns.size // 2
    if sees.axes[0] == sees.axes[1]:
        return output.select(sees.axes[0], row * sees.columns.size + column)
    # The later dimension first, so that the other one keeps its place.
    (last, place), (first, other) = sorted(zip(sees.axes, (row, column), strict=True), reverse=True)
    return output.select(last, place).select(first, other)


def areas(energy: np.ndarray[Any, np.dtype[np.float64]]) -> dict[float, int]:
    """The fewest pixels that hold each of `SHARES` of energy (height, width), which sums to 1."""
    held = np.cumsum(np.sort(energy, axis=None)[::-1])
    return {share: int(np.searchsorted(held, share * (1 - 1e-9)) + 1) for share in SHARES}


def sides(energy: np.ndarray[Any, np.dtype[np.float64]], middle: tuple[float, float]) -> dict[float, int]:
    """Side of the smallest square around `middle` that holds each of `SHARES`; outside of the image is nothing."""
    rows, columns = np.indices(energy.shape)
    distance = np.maximum(np.abs(rows - middle[0]), np.abs(columns - middle[1])).ravel()
    order = np.argsort(distance, kind="stable")
    held = np.cumsum(energy.ravel()[order])
    places = {share: int(np.searchsorted(held, share * (1 - 1e-9))) for share in SHARES}
    return {share: int(np.ceil(2 * distance[order[place]] + 1)) for share, place in places.items()}


def image_files(folder: Path) -> list[Path]:
    """Up to 16 images of a folder and the folders in it, evenly spread over their sorted names.

    Raises:
        PleatError: the folder does not exist, cannot be read or holds no image.
    """
    if not folder.is_dir():
        raise PleatError(f"{folder} is no folder; `--images` takes a folder of images.")
    found = listing.image_files(folder)
    if not found:
        raise PleatError(
            f"{folder} holds no image ({', '.join(listing.IMAGE_SUFFIXES)}); `--images` takes a folder of images."
        )
    return [folder / found[place] for place in np.linspace(0, len(found) - 1, min(MAX_IMAGES, len(found))).astype(int)]
