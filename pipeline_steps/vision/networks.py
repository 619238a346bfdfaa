"""Networks that are trained here: a plain CNN on pixels and the head on pooled features."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Of ImageNet, in [0, 1]; only used to centre pixels, so they need not be measured on each dataset.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


class Head(nn.Module):
    """Standardises features, then one linear layer, or two with GELU between where `hidden` > 0."""

    def __init__(self, n_features: int, n_classes: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))
        layers: list[nn.Module] = [nn.Dropout(dropout)]
        if hidden:
            layers += [nn.Linear(n_features, hidden), nn.GELU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden or n_features, n_classes))

    def standardise_by(self, features: Tensor) -> None:
        """Takes mean and standard deviation from features of shape (..., n_features)."""
        flat = features.reshape(-1, features.shape[-1])
        self.mean = flat.mean(0)
        self.std = flat.std(0).clamp_min(1e-6)

    def forward(self, features: Tensor) -> Tensor:
        """Float features (batch, n_features) to logits (batch, n_classes)."""
        logits: Tensor = self.layers((features - self.mean) / self.std)
        return logits


class Block(NamedTuple):
    """One block of `CustomCnn`; "valid" padding takes `kernel` - 1 pixels off each side's length, "same" none."""

    filters: int
    kernel: int
    pool: int
    padding: str = "same"


class CustomCnn(nn.Module):
    """Blocks of convolution, batch norm, ReLU and max pooling; global average pooling; a head.

    Args:
        blocks: the fields of `Block`, in their order, a block.
        batch_norm: without, each convolution has a bias instead.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[int, int, int] | tuple[int, int, int, str]],
        n_classes: int,
        hidden: int,
        dropout: float,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1) * 255)
        layers: list[nn.Module] = []
        channels = 3
        for filters, kernel, pool, padding in (Block(*block) for block in blocks):
            layers.append(nn.Conv2d(channels, filters, kernel, padding=padding, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(filters))
            layers.append(nn.ReLU(inplace=True))
            if pool > 1:
                layers.append(nn.MaxPool2d(pool))
            channels = filters
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = Head(channels, n_classes, hidden, dropout)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels of shape (batch, 3, size, size), 0 to 255, to logits (batch, n_classes)."""
        logits: Tensor = self.head(self.body((pixels.float() - self.pixel_mean) / self.pixel_std))
        return logits
