"""What a network is trained for: one or several targets, side by side in its outputs.

Shapes: `n` samples; `n_outputs` outputs, the classes of the first target, then those of the next; `k` columns of codes:
one with the class index for a multiclass target, one for each class with 0 or 1 for a multilabel one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from sklearn.metrics import f1_score
from torch import Tensor

from pipeline_steps.vision.losses import ClassWeights, Loss, class_weights, positive_weights

THRESHOLD = 0.5  # a class of a multilabel target is predicted from this probability on


class Output(NamedTuple):
    """The outputs of one target."""

    multilabel: bool
    n_classes: int


@dataclass(frozen=True)
class Objective:
    """The targets in the order of the network's outputs, and the loss, which is the same for each of them."""

    outputs: tuple[Output, ...]
    criterion: Loss
    class_weights: ClassWeights

    @property
    def n_outputs(self) -> int:
        """Width of the network's last layer."""
        return sum(output.n_classes for output in self.outputs)

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """Logits or probabilities (n, n_outputs) as one (n, n_classes) for each target."""
        return _parts(values, [output.n_classes for output in self.outputs])

    def split_codes(self, codes: Tensor) -> Sequence[Tensor]:
        """Codes (n, k) as (n,) for each multiclass target and (n, n_classes) for each multilabel one."""
        parts = _parts(codes, [output.n_classes if output.multilabel else 1 for output in self.outputs])
        return [part if output.multilabel else part[:, 0] for output, part in zip(self.outputs, parts, strict=True)]

    def weights(self, codes: Tensor) -> list[Tensor | None]:
        """Class weights of each target, from the codes (n, k) of the rows that are learned from."""
        return [
            positive_weights(part, self.class_weights)
            if output.multilabel
            else class_weights(part, output.n_classes, self.class_weights)
            for output, part in zip(self.outputs, self.split_codes(codes), strict=True)
        ]

    def loss(self, logits: Tensor, codes: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
        """The sum of the targets' losses, a scalar; logits (n, n_outputs), codes (n, k), weights as of `weights`."""
        losses = [
            (self.criterion.multilabel if output.multilabel else self.criterion.multiclass)(part, truth, weight)
            for output, part, truth, weight in zip(
                self.outputs, self.split(logits), self.split_codes(codes), weights, strict=True
            )
        ]
        return sum(losses[1:], start=losses[0])

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits to probabilities, both (n, n_outputs): softmax in a multiclass target, else each sigmoid."""
        parts = zip(self.outputs, self.split(logits), strict=True)
        return torch.cat([part.sigmoid() if output.multilabel else part.softmax(1) for output, part in parts], dim=1)

    def logits(self, probabilities: Tensor) -> Tensor:
        """Logits that have these probabilities, both (n, n_outputs); finite where a probability is 0 or 1 too."""
        parts = zip(self.outputs, self.split(probabilities), strict=True)
        return torch.cat(
            [part.logit(1e-7) if output.multilabel else part.clamp_min(1e-12).log() for output, part in parts], dim=1
        )

    def accuracy(self, probabilities: Tensor, codes: Tensor) -> float:
        """The mean over the targets of the share of samples that are wholly right: in a multilabel target all classes.

        Args:
            probabilities: (n, n_outputs).
            codes: (n, k).
        """
        right = [truth == found for truth, found in self._decided(probabilities, codes)]
        return fmean(float(part.reshape(len(part), -1).all(1).double().mean()) for part in right)

    def score(self, probabilities: Tensor, codes: Tensor) -> float:
        """The mean over the targets of weighted F1, in a multilabel target over the classes that apply.

        Args:
            probabilities: (n, n_outputs).
            codes: (n, k).
        """
        return fmean(
            f1_score(truth, found, average="weighted", zero_division=0.0)
            for truth, found in self._decided(probabilities, codes)
        )

    def _decided(self, probabilities: Tensor, codes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Truth and prediction of each target, on the CPU."""
        parts = zip(self.outputs, self.split(probabilities), self.split_codes(codes), strict=True)
        return [
            (truth.cpu(), ((part >= THRESHOLD).long() if output.multilabel else part.argmax(1)).cpu())
            for output, part, truth in parts
        ]


def _parts(values: Tensor, widths: list[int]) -> Sequence[Tensor]:
    """Columns of `values` as parts of these widths."""
    return values.split(widths, dim=1) if len(widths) > 1 else [values]  # a split would slow a head's quick steps
