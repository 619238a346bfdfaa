"""Losses of one target, and the weights of its classes.

timm has an asymmetric loss too, but importing it takes as long as training a head.

Shapes: a batch of `b` samples, `c` classes. A loss is a scalar: for a multiclass target the mean over the samples, for
a multilabel one the mean over samples and classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ClassWeights = Literal["none", "balanced", "inverse"]


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross entropy, or binary cross entropy of each class where a sample may have several.

    Smoothing moves targets towards 1 / c, or towards 1/2 where a sample may have several classes.
    """

    label_smoothing: float = 0.0

    def multiclass(self, logits: Tensor, codes: Tensor, weights: Tensor | None) -> Tensor:
        """Logits (b, c), class indices (b,), weights (c,); a weighted mean, so the weights' scale drops out."""
        return functional.cross_entropy(logits, codes, weights, label_smoothing=self.label_smoothing)

    def multilabel(self, logits: Tensor, applies: Tensor, weights: Tensor | None) -> Tensor:
        """Logits (b, c), whether each class applies (b, c) as 0 and 1, weights (c,) of the terms where it does."""
        wanted = applies.to(logits.dtype) * (1 - self.label_smoothing) + self.label_smoothing / 2
        # Not pos_weight: it would multiply what smoothing adds to the other samples too, and rare classes fire always.
        weight = None if weights is None else torch.where(applies.bool(), weights, 1.0)
        return functional.binary_cross_entropy_with_logits(logits, wanted, weight)


@dataclass(frozen=True)
class Focal:
    """Focal loss (Lin et al. 2017, https://arxiv.org/abs/1708.02002): -alpha (1 - p)^gamma log p.

    p is the probability of the true class (softmax), or of each right yes or no (sigmoid) where a sample may have
    several classes; alpha is the class's weight.
    """

    gamma: float

    def multiclass(self, logits: Tensor, codes: Tensor, weights: Tensor | None) -> Tensor:
        """Logits (b, c), class indices (b,), weights (c,); a plain mean, so the weights' scale counts."""
        log_p = logits.log_softmax(1).gather(1, codes[:, None])[:, 0]
        terms = -_power(-log_p.expm1(), self.gamma) * log_p
        return (terms if weights is None else weights[codes] * terms).mean()

    def multilabel(self, logits: Tensor, applies: Tensor, weights: Tensor | None) -> Tensor:
        """As `CrossEntropy.multilabel`."""
        return Asymmetric(self.gamma, self.gamma, margin=0.0).multilabel(logits, applies, weights)


@dataclass(frozen=True)
class Asymmetric:
    """Asymmetric loss for multilabel targets (Ridnik et al. 2021, https://arxiv.org/abs/2009.14119).

    -(1 - p)^gamma_positive log p where a class applies, else -q^gamma_negative log(1 - q) with
    q = max(p - margin, 0): negatives that are easy enough count nothing.
    """

    gamma_positive: float
    gamma_negative: float
    margin: float

    def multiclass(self, *_: Tensor | None) -> Tensor:
        """Is not defined."""
        raise TypeError("the asymmetric loss is only defined for multilabel targets")

    def multilabel(self, logits: Tensor, applies: Tensor, weights: Tensor | None) -> Tensor:
        """As `CrossEntropy.multilabel`; the paper has a sum in place of the mean."""
        positive = -_power((-logits).sigmoid(), self.gamma_positive) * functional.logsigmoid(logits)
        if weights is not None:
            positive = weights * positive
        shifted = (logits.sigmoid() - self.margin).clamp_min(0)
        log_rest = (1 - shifted).log() if self.margin else functional.logsigmoid(-logits)  # 1 - p may round to 0
        negative = -_power(shifted, self.gamma_negative) * log_rest
        return torch.where(applies.bool(), positive, negative).mean()


Loss = CrossEntropy | Focal | Asymmetric


def class_weights(codes: Tensor, n_classes: int, kind: ClassWeights) -> Tensor | None:
    """Weights of the classes of a multiclass target, from n class indices (n,) that are learned from.

    Returns:
        float32 (n_classes,): `balanced` n / (n_classes * count), as scikit-learn's compute_class_weight; `inverse`
        n / count. A class without a sample has 0, so that label smoothing does not make it likely. None for `none`.
    """
    if kind == "none":
        return None
    counts = torch.bincount(codes, minlength=n_classes)
    divisors = n_classes * counts.float() if kind == "balanced" else counts.float()
    return torch.where(counts > 0, len(codes) / divisors, 0.0)


def positive_weights(applies: Tensor, kind: ClassWeights) -> Tensor | None:
    """Weights of the terms of a multilabel target where a class applies, from the n rows (n, n_classes) learned from.

    Returns:
        float32 (n_classes,): `balanced` negatives / positives, the ratio of the weights that scikit-learn's
        compute_class_weight gives to yes and no; `inverse` n / positives. A class that never or always applies is
        taken to have one sample of the other kind. None for `none`.
    """
    if kind == "none":
        return None
    positives = applies.sum(0)
    counted = (len(applies) - positives).clamp_min(1) if kind == "balanced" else len(applies)
    return counted / positives.clamp_min(1).float()


def _power(base: Tensor, exponent: float) -> Tensor:
    """base^exponent for a base from 0 on, with finite gradients at 0 for exponents below 1 too."""
    return base.clamp_min(torch.finfo(base.dtype).tiny) ** exponent
