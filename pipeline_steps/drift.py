"""How far a delivery lies from the training data: distances between distributions, and whether chance explains them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp

LABEL_SHARES = "label shares"
# A limit counts as broken only where samples of one distribution would differ so much more rarely than this. Six
# statistics and the shares of each label column are looked at, so a delivery like the training data is set aside by
# chance less often than once in 140 where there is one label column, and once in 80 where there are six.
CHANCE = 0.001
N_PERMUTATIONS = 9_999
SEED = 17


@dataclass(frozen=True)
class Distance:
    """One comparison.

    Attributes:
        name: what was compared.
        distance: between 0 (alike) and 1.
        limit: of params.yaml.
        p_value: how often samples of these sizes from one distribution differ at least so much.
        training: mean of the training data; None for label shares.
        delivery: mean of the delivery; None for label shares.
    """

    name: str
    distance: float
    limit: float
    p_value: float
    training: float | None = None
    delivery: float | None = None

    @property
    def broken(self) -> bool:
        """Whether the distance is over its limit and not explained by chance."""
        return self.distance > self.limit and self.p_value < CHANCE


def total_variation(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """Half the sum of the absolute differences of two sets of shares, between 0 and 1.

    Levin, Peres & Wilmer, Markov Chains and Mixing Times (2017), proposition 4.2.

    Args:
        first: label to number of images; at least one image.
        second: likewise.
    """
    n_first, n_second = sum(first.values()), sum(second.values())
    names = {*first, *second}  # in any order: fsum rounds once
    return 0.5 * fsum(abs(first.get(name, 0) / n_first - second.get(name, 0) / n_second) for name in names)


def label_distance(
    training: Mapping[str, int], delivery: Mapping[str, int], limit: float, name: str = LABEL_SHARES
) -> Distance:
    """Compares label shares; the p-value is a permutation test's, with a fixed seed.

    Where labels do not depend on which side an image is on, every division of all images into two sides of these sizes
    is as likely as any other: the delivery's counts are then multivariate hypergeometric. The observed division is
    counted as one of them (Phipson & Smyth 2010), so the p-value is never 0.
    """
    names = sorted({*training, *delivery})
    first = np.array([training.get(name, 0) for name in names])
    second = np.array([delivery.get(name, 0) for name in names])
    pooled, size = first + second, int(second.sum())
    drawn = np.random.default_rng(SEED).multivariate_hypergeometric(pooled, size, N_PERMUTATIONS, method="marginals")
    gaps = np.abs((pooled - drawn) / first.sum() - drawn / size).sum(axis=1) / 2
    distance = total_variation(training, delivery)
    # Equal divisions may differ in the last bit.
    p_value = (1 + np.count_nonzero(gaps >= distance - 1e-12)) / (1 + N_PERMUTATIONS)
    return Distance(name, distance, limit, float(p_value))


def statistic_distance(
    name: str, training: NDArray[np.float64], delivery: NDArray[np.float64], limit: float
) -> Distance:
    """Compares one statistic of images: the largest gap between the two empirical distribution functions.

    The two-sample test of Kolmogorov and Smirnov (Hodges 1958), as scipy computes it; with ties, which statistics such
    as a side in pixels have, its p-value is rather too large.

    Args:
        name: of the statistic.
        training: its value for each image, shape (n,).
        delivery: shape (m,).
        limit: of params.yaml.
    """
    found = ks_2samp(training, delivery)
    means = float(np.mean(training)), float(np.mean(delivery))
    return Distance(name, float(found.statistic), limit, float(found.pvalue), *means)
