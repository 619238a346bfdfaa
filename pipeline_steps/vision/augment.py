"""Augmentation of whole batches of pixels, on the device that holds them.

Every draw is made on the CPU from one given generator, so that a resumed training goes on with the same bits, and only
small tensors of draws are copied to the device: nothing here waits for a GPU.

Shapes: a batch of `b` images, uint8 (b, 3, size, size).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

GREY = 128.0  # of what a change of shape leaves empty
ASPECTS = (3 / 4, 4 / 3)  # of random crops, width / height
TRIES = 10  # at a crop that fits into the image; else the whole image
STRONGEST = 30  # magnitude

Operation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mixture:
    """What a batch was mixed of: its loss is share * loss(codes) + (1 - share) * loss(codes[partners]).

    Attributes:
        partners: int64 (b,), a permutation: which image was mixed into each.
        share: of an image's own pixels.
    """

    partners: Tensor
    share: float


@dataclass(frozen=True)
class Augmentation:
    """What is done to pixels in training; as it stands: nothing.

    Attributes:
        min_crop: the smallest share of the image's area that a random crop keeps; 1: no crops.
        operations: of RandAugment (Cubuk et al. 2020, https://arxiv.org/abs/1909.13719), in a row; 0: none.
        magnitude: of these, 0 to 30.
        mixup: alpha of the Beta distribution that two images are blended by (Zhang et al. 2018,
            https://arxiv.org/abs/1710.09412); 0: none are.
        cutmix: alpha of the one that a cut-out part's area is drawn from (Yun et al. 2019,
            https://arxiv.org/abs/1905.04899); 0: none are cut. With both, each batch takes one of them by chance.
    """

    min_crop: float = 1.0
    operations: int = 0
    magnitude: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0

    def views(self, pixels: Tensor, random: torch.Generator) -> Tensor:
        """Each image's own random crop, scaled back to the image's size, and then its own operations of RandAugment.

        Args:
            pixels: uint8 (b, 3, size, size), on any device; not changed.
            random: on the CPU; no number is drawn where there is nothing to do.

        Returns:
            As `pixels`; the same tensor where there is nothing to do.
        """
        if self.min_crop < 1:
            pixels = crop(pixels, random_boxes(len(pixels), pixels.shape[-1], self.min_crop, random))
        for _ in range(self.operations):
            pixels = rand_augment(pixels, self.magnitude, random)
        return pixels

    def mixed(self, pixels: Tensor, random: torch.Generator) -> tuple[Tensor, Mixture | None]:
        """The batch with each image mixed with the one before it, all in the same way; None where nothing is mixed.

        Args:
            pixels, random: as in `views`.
        """
        if not self.mixup and not self.cutmix:
            return pixels, None
        # torch's Beta distribution takes no generator.
        draws = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=random)))
        cut = bool(self.cutmix) and (not self.mixup or draws.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(draws.beta(alpha, alpha))
        # Batches are shuffled, so the image before is as random as any, and it needs neither draws nor copies.
        partners = torch.arange(len(pixels), device=pixels.device).roll(1)
        if not cut:
            blended = pixels.float().mul_(share).add_(pixels.roll(1, 0), alpha=1 - share)
            return blended.round_().to(torch.uint8), Mixture(partners, share)
        size = pixels.shape[-1]
        side = size * math.sqrt(1 - share)
        (left, right), (top, bottom) = (
            [round(min(max(centre + edge, 0), size)) for edge in (-side / 2, side / 2)]
            for centre in draws.uniform(0, size, 2)
        )
        pixels = pixels.clone()
        pixels[..., top:bottom, left:right] = pixels[..., top:bottom, left:right].roll(1, 0)
        return pixels, Mixture(partners, 1 - (right - left) * (bottom - top) / size**2)


def random_boxes(n: int, size: int, min_area: float, random: torch.Generator) -> Tensor:
    """Boxes of random crops of square images, drawn as by torchvision's RandomResizedCrop.

    The area is uniform between `min_area` and 1 of the image's, the logarithm of the aspect ratio between those of 3/4
    and 4/3, and the place uniform among those where the box fits. A box that fits nowhere is drawn again, at most
    `TRIES` times; after that it is the whole image.

    Returns:
        float64 (n, 4) whole pixels: left, top, width, height.
    """
    draws = torch.rand(2, n, TRIES, generator=random, dtype=torch.float64)
    area = min_area + (1 - min_area) * draws[0]
    aspect = (math.log(ASPECTS[0]) + math.log(ASPECTS[1] / ASPECTS[0]) * draws[1]).exp()
    tries = (size * torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()])).round().clamp_min(1)
    tries = torch.cat([tries, torch.full((2, n, 1), size)], dim=2)
    first = (tries <= size).all(0).int().argmax(1)
    sides = tries[:, torch.arange(n), first]
    corners = (torch.rand(2, n, generator=random, dtype=torch.float64) * (size - sides + 1)).floor()
    return torch.cat([corners, sides]).T


def crop(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Each image's box (b, 4), as of `random_boxes`, scaled to the image's size as by torchvision's resized_crop.

    A GPU takes the batch at once; a CPU one image after the other, which takes a third of the time there.
    """
    return crop_one_by_one(pixels, boxes) if pixels.device.type == "cpu" else crop_at_once(pixels, boxes)


def crop_one_by_one(pixels: Tensor, boxes: Tensor) -> Tensor:
    """`crop` in torch's 8 bit arithmetic."""
    size = pixels.shape[-2:]
    parts = (
        image[None, :, top : top + height, left : left + width]
        for image, (left, top, width, height) in zip(pixels, boxes.int().tolist(), strict=True)
    )
    # `antialias` changes no value where nothing shrinks, but has the quicker code.
    return torch.cat([functional.interpolate(part, size, mode="bilinear", antialias=True) for part in parts])


def crop_at_once(pixels: Tensor, boxes: Tensor) -> Tensor:
    """`crop` as one sampling of all images."""
    size = pixels.shape[-1]
    left, top, width, height = _sent(boxes.float(), pixels).T[:, :, None]
    steps = (torch.arange(size, device=pixels.device) + 0.5) / size
    # No further out than the centres of the box's outermost pixels, so that what lies beyond the box has no part in it.
    x = left + (steps * width).clamp_min(0.5).minimum(width - 0.5)
    y = top + (steps * height).clamp_min(0.5).minimum(height - 0.5)
    return _sampled(pixels, (x * 2 / size - 1)[:, None, :], (y * 2 / size - 1)[:, :, None])


def rand_augment(pixels: Tensor, magnitude: int, random: torch.Generator) -> Tensor:
    """One operation of RandAugment on each image, with the strengths of torchvision's; see `matrices` and `colours`."""
    shapes, operations = matrices(pixels.shape[-1], magnitude), colours(magnitude)
    # 14 kinds, equally likely, each in two directions; for the last 5 both are the same.
    kinds = torch.randint(28, (len(pixels),), generator=random)
    kinds = torch.where(kinds < 23, kinds, kinds - 5)
    # Sorted by kind, so that each operation takes one slice of the batch, and all changes of shape together another.
    order = kinds.argsort()
    counts = kinds.bincount(minlength=23).tolist()
    n_shaped = sum(counts[: len(shapes)])
    shaped, *groups = pixels[_sent(order, pixels)].split([n_shaped, *counts[len(shapes) :]])
    done = [operation(group) for operation, group in zip(operations, groups, strict=True) if len(group)]
    if n_shaped:
        done.insert(0, warped(shaped, shapes[kinds[order[:n_shaped]]]))
    return torch.cat(done)[_sent(order.argsort(), pixels)]


def matrices(size: int, magnitude: int) -> Tensor:
    """RandAugment's changes of shape, for `warped`; float32 (10, 2, 3).

    Shear along x and y (about the top left corner), shift along x and y, rotation; and the same in the other direction.
    """
    strength = magnitude / STRONGEST
    found = []
    for sign in (1, -1):
        shear = sign * 0.3 * strength
        shift = -sign * int(150 / 331 * size * strength) * 2 / size
        sine, cosine = math.sin(sign * math.radians(30 * strength)), math.cos(math.radians(30 * strength))
        found += [
            [[1, shear, shear], [0, 1, 0]],
            [[1, 0, 0], [shear, 1, shear]],
            [[1, 0, shift], [0, 1, 0]],
            [[1, 0, 0], [0, 1, shift]],
            [[cosine, -sine, 0], [sine, cosine, 0]],
        ]
    return torch.tensor(found, dtype=torch.float32)


def warped(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Images whose every point shows what lies at `matrix` times (x, y, 1), x and y from -1 to 1; bilinear.

    Args:
        matrix: float32 (b, 2, 3), on the CPU.
    """
    size = pixels.shape[-1]
    steps = (torch.arange(size, device=pixels.device) * 2 + 1) / size - 1
    rows = _sent(matrix, pixels)[..., None, None]  # not by affine_grid: its matrix product may be of low precision
    x, y = (row[:, 0] * steps + row[:, 1] * steps[:, None] + row[:, 2] for row in rows.unbind(1))
    return _sampled(pixels, x, y)


def colours(magnitude: int) -> list[Operation]:
    """RandAugment's changes of colour, 13 of them.

    They are more and less brightness, saturation, contrast and sharpness; then fewer bits, inverted highlights,
    stretched and equalized histograms, and no change at all.
    """
    from torchvision.transforms.v2 import functional as library  # late: only some trainings need it

    strength = magnitude / STRONGEST
    fades = (library.adjust_brightness, library.adjust_saturation, library.adjust_contrast, sharpened)
    factors = (1 + 0.9 * strength, 1 - 0.9 * strength)
    return [
        *(lambda pixels, fade=fade, factor=factor: fade(pixels, factor) for fade in fades for factor in factors),
        lambda pixels: library.posterize(pixels, 8 - round(4 * strength)),
        lambda pixels: library.solarize(pixels, 255 * (1 - strength)),
        library.autocontrast,
        library.equalize,
        lambda pixels: pixels,
    ]


def sharpened(pixels: Tensor, factor: float) -> Tensor:
    """As torchvision's adjust_sharpness, which waits for the GPU to make its kernel."""
    plain = pixels.float()
    inner = plain[..., 1:-1, 1:-1]
    rows = plain[..., :-2, :] + plain[..., 1:-1, :] + plain[..., 2:, :]
    blocks = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    # What Pillow blends with is 1 / 13 of each neighbour and 5 / 13 of the pixel itself.
    inner += (1 - factor) / 13 * (blocks - 9 * inner)
    return plain.round_().clamp_(0, 255).to(torch.uint8)


def _sampled(pixels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear samples at x and y, from -1 to 1, which broadcast to (b, size, size); grey outside the image."""
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
    found = functional.grid_sample(pixels.float().sub_(GREY), grid, align_corners=False)
    return found.add_(GREY).round_().to(torch.uint8)


def _sent(values: Tensor, to: Tensor) -> Tensor:
    """A small tensor of the CPU on the device of another one, without waiting for it."""
    return values.to(to.device, non_blocking=True)
