"""What a network is trained on: arrays prepared once, read by row, plain or mirrored."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Frozen features, float32 (n, 2, n_features): view 0 plain, view 1 of the mirrored image."""

    values: Tensor

    def batch(self, rows: Tensor, mirrored: Tensor) -> Tensor:
        """Rows (batch,) and mirrored (batch,) bool to float32 (batch, n_features)."""
        return self.values[rows, mirrored.long()]


@dataclass(frozen=True)
class Pixels:
    """Pixels, uint8 (n, 3, size, size)."""

    values: Tensor

    def batch(self, rows: Tensor, mirrored: Tensor) -> Tensor:
        """Rows (batch,) and mirrored (batch,) bool to uint8 (batch, 3, size, size)."""
        pixels = self.values[rows]
        return torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)


Inputs = Features | Pixels
