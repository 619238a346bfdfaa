"""Scores of one classifier over folds: pure functions of arrays, undefined values as NaN, nothing invented.

Shapes: `n` samples, `c` classes; classes are numbered 0 .. c-1 in the order of the class list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

HEADLINES = ("f1_weighted", "f1_macro", "accuracy", "roc_auc_macro")


@dataclass(frozen=True)
class ClassScores:
    """Scores of each class, each of shape (c,).

    `precision` is NaN where the class was never predicted, `recall` where it never occurs, `f1` where it neither
    occurs nor is predicted.
    """

    support: Ints
    precision: Floats
    recall: Floats
    f1: Floats


@dataclass(frozen=True)
class Spread:
    """A mean over folds with its spread; what the number of defined folds does not allow is NaN."""

    mean: float
    std: float
    ci95_low: float
    ci95_high: float


def confusion_matrix(actual: Ints, predicted: Ints, n_classes: int) -> Ints:
    """Counts of shape (c, c): rows are the actual class, columns the predicted one."""
    cells = np.bincount(actual * n_classes + predicted, minlength=n_classes * n_classes)
    return cells.reshape(n_classes, n_classes).astype(np.int64)


def class_scores(confusion: Ints) -> ClassScores:
    """Precision, recall and F1 = 2 TP / (2 TP + FP + FN) (van Rijsbergen 1979) of each class.

    A class that occurs but is never predicted right has F1 0; scikit-learn agrees with `zero_division=nan`.
    """
    hits = np.diagonal(confusion).astype(np.float64)
    support, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    return ClassScores(
        support=support,
        precision=_ratio(hits, predicted),
        recall=_ratio(hits, support),
        f1=_ratio(2 * hits, support + predicted),
    )


def f1_weighted(confusion: Ints) -> float:
    """Mean F1 of the classes, each weighted by how often it occurs."""
    scores = class_scores(confusion)
    occurs = scores.support > 0
    return float(np.average(scores.f1[occurs], weights=scores.support[occurs])) if occurs.any() else float("nan")


def f1_macro(confusion: Ints) -> float:
    """Plain mean of the classes' F1, without classes that neither occur nor are predicted."""
    return _nanmean(class_scores(confusion).f1)


def accuracy(confusion: Ints) -> float:
    """Share of samples whose class was predicted right."""
    total = confusion.sum()
    return float(np.trace(confusion) / total) if total else float("nan")


def roc_auc(positive: Bools, score: npt.NDArray[np.floating]) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half.

    Computed from mean ranks, (R - P (P + 1) / 2) / (P N) (Hanley & McNeil 1982, Mann-Whitney U).

    Args:
        positive: shape (n,), which samples are of the class.
        score: shape (n,), the higher the more likely.

    Returns:
        A number from 0 to 1, or NaN where there is no positive or no negative.
    """
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    _, place, ties = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(ties) - (ties - 1) / 2
    rank_sum = mean_rank[place][positive].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def roc_auc_by_class(actual: Ints, probability: npt.NDArray[np.floating]) -> Floats:
    """ROC-AUC of each class against the rest, shape (c,); NaN where a class never or always occurs.

    Args:
        actual: shape (n,), class numbers.
        probability: shape (n, c).
    """
    return np.array([roc_auc(actual == one, probability[:, one]) for one in range(probability.shape[1])])


def roc_curve(positive: Bools, score: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1) (Fawcett 2006, algorithm 1).

    Needs at least one positive and one negative; where `roc_auc` is NaN there is no curve.
    """
    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.diff(score[order]) != 0, True)
    true = np.cumsum(positive[order])[last_of_tie]
    false = np.cumsum(~positive[order])[last_of_tie]
    return np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1])


def mean_roc_curve(curves: Sequence[tuple[Floats, Floats]], grid: Floats) -> Floats:
    """Mean true positive rate of several curves at the false positive rates in `grid` (Fawcett 2006, algorithm 3)."""
    rates: Floats = np.mean([np.interp(grid, false, true) for false, true in curves], axis=0)
    return rates


def headlines(actual: Ints, probability: npt.NDArray[np.floating]) -> dict[str, float]:
    """The four numbers a model is judged by, named as in `HEADLINES`.

    Args:
        actual: shape (n,), class numbers.
        probability: shape (n, c); the predicted class is the most probable one, the first of equals.
    """
    confusion = confusion_matrix(actual, probability.argmax(axis=1), probability.shape[1])
    return {
        "f1_weighted": f1_weighted(confusion),
        "f1_macro": f1_macro(confusion),
        "accuracy": accuracy(confusion),
        "roc_auc_macro": _nanmean(roc_auc_by_class(actual, probability)),
    }


def spread(folds: Sequence[float] | Floats) -> Spread:
    """Mean, sample standard deviation s (ddof 1) and 95% confidence interval of a score over k folds.

    The interval is Student's mean ± t(0.975, k-1) s / sqrt(k), cut to the score's range 0 .. 1; undefined folds are
    left out. It is approximate and rather too narrow: any two folds share most of their training data, so their
    scores are not independent, and no unbiased estimate of their variance exists (Bengio & Grandvalet 2004).
    Nadeau & Bengio 2003, "Inference for the generalization error", Machine Learning 52, give the usual remedy,
    s² (1/k + 1/(k-1)) in place of s²/k; `paired_difference` uses it, because there a decision hangs on it.
    """
    return _spread(folds, variance_factor=lambda k: 1 / k, lowest=0.0)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Spread:
    """How far `first` is above `second`, fold by fold, with a 95% interval fit for a decision.

    Both scored the same folds, so what makes a fold hard for both drops out. The interval is that of the corrected
    resampled t-test of Nadeau & Bengio 2003: mean ± t(0.975, k-1) s sqrt(1/k + 1/(k-1)), where s is the sample standard
    deviation of the differences and 1/(k-1) the ratio of a fold's size to that of its training data.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return _spread(difference, variance_factor=lambda k: 1 / k + 1 / (k - 1), lowest=-1.0)


def _spread(values: Sequence[float] | Floats, variance_factor: Callable[[int], float], lowest: float) -> Spread:
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    k = len(defined)
    if k < 2:
        return Spread(_nanmean(defined), float("nan"), float("nan"), float("nan"))
    mean, std = float(defined.mean()), float(defined.std(ddof=1))
    half = float(stdtrit(k - 1, 0.975)) * std * variance_factor(k) ** 0.5
    return Spread(mean, std, max(lowest, mean - half), min(1.0, mean + half))


def _ratio(part: Floats, whole: Ints) -> Floats:
    ratio: Floats = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    return ratio


def _nanmean(values: Floats) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
