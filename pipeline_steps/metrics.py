"""Scores of one target over folds: scikit-learn with every class listed, so that undefined values stay NaN.

Shapes: `n` samples, `c` classes in the order of the class list. What is actual and what is predicted are class numbers
0 .. c-1 of shape (n,); of a multilabel target they say of each class whether it applies, as 0 and 1 of shape (n, c).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NAN = float("nan")
HEADLINES = ("f1_weighted", "f1_macro", "accuracy", "roc_auc_macro")
MULTILABEL_SCORES = (*HEADLINES, "f1_micro", "map_macro")
THRESHOLD = 0.5  # of a multilabel class whose threshold no data can choose


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


def class_scores(actual: Ints, predicted: Ints, n_classes: int) -> ClassScores:
    """Precision, recall and F1 of each class; a class that occurs but is never predicted right has F1 0."""
    if not len(actual):  # scikit-learn refuses that
        undefined = np.full(n_classes, NAN)
        return ClassScores(np.zeros(n_classes, dtype=np.int64), undefined, undefined, undefined)
    precision, recall, f1, support = precision_recall_fscore_support(
        actual, predicted, labels=range(n_classes), zero_division=NAN
    )
    # scikit-learn counts in floats where no prediction is right.
    return ClassScores(support.astype(np.int64), precision, recall, f1)


def indicator(actual: Ints, n_classes: int) -> Bools:
    """Of each sample whether each class applies, shape (n, c)."""
    applies: Bools = actual.astype(bool) if actual.ndim == 2 else actual[:, np.newaxis] == np.arange(n_classes)
    return applies


def roc_auc_by_class(actual: Ints, probability: npt.NDArray[np.floating]) -> Floats:
    """ROC-AUC of each class against the rest, shape (c,).

    NaN where a class never or always occurs, and where a probability is no number: scikit-learn refuses that.

    Args:
        actual: shape (n,) or (n, c).
        probability: shape (n, c).
    """
    applies = indicator(actual, probability.shape[1])
    return np.array([_roc_auc(positive, score) for positive, score in zip(applies.T, probability.T, strict=True)])


def _roc_auc(positive: Bools, score: npt.NDArray[np.floating]) -> float:
    defined = positive.any() and not positive.all() and np.isfinite(score).all()
    return float(roc_auc_score(positive, score)) if defined else NAN


def average_precision_by_class(actual: Ints, probability: npt.NDArray[np.floating]) -> Floats:
    """Average precision of each class against the rest, shape (c,): its precisions, weighted by the steps in recall.

    NaN where a class never occurs, and where a probability is no number.

    Args:
        actual: shape (n,) or (n, c).
        probability: shape (n, c).
    """
    pairs = zip(indicator(actual, probability.shape[1]).T, probability.T, strict=True)
    return np.array([_average_precision(positive, score) for positive, score in pairs])


def _average_precision(positive: Bools, score: npt.NDArray[np.floating]) -> float:
    defined = positive.any() and np.isfinite(score).all()
    return float(average_precision_score(positive, score)) if defined else NAN


def best_threshold(positive: Bools, score: npt.NDArray[np.floating]) -> float:
    """The threshold with the highest F1 where scores that reach it count as predicted.

    F1 is the same anywhere between two neighbouring scores, so it is half-way between them (below the lowest, half-way
    to 0); of thresholds with equal F1 the lowest. `THRESHOLD` where no sample is positive: F1 says nothing then.

    Args:
        positive: shape (n,).
        score: shape (n,), not negative.
    """
    if not positive.any():
        return THRESHOLD
    scores = np.unique(score)
    n_predicted = len(score) - np.searchsorted(np.sort(score), scores)
    n_hits = positive.sum() - np.searchsorted(np.sort(score[positive]), scores)
    # From counts, not from precision and recall: their rounding would part what is equal.
    best = int((2 * n_hits / (n_predicted + positive.sum())).argmax())
    below = float(scores[best - 1]) if best else 0.0
    return (float(scores[best]) + below) / 2


def best_thresholds(actual: Ints, probability: npt.NDArray[np.floating]) -> Floats:
    """`best_threshold` of each class, shape (c,).

    Args:
        actual: shape (n, c).
        probability: shape (n, c).
    """
    applies = indicator(actual, probability.shape[1])
    return np.array([best_threshold(positive, score) for positive, score in zip(applies.T, probability.T, strict=True)])


def cross_fitted_thresholds(actual: Ints, probability: npt.NDArray[np.floating], fold: Ints) -> Floats:
    """For each fold and class the best threshold on the out-of-fold predictions of all other folds, shape (k, c).

    So no sample takes part in choosing the thresholds that it is judged with. Folds are in ascending order. A single
    fold has no others, and every threshold is `THRESHOLD`.

    Args:
        actual: shape (n, c).
        probability: shape (n, c).
        fold: each sample's fold, shape (n,).
    """
    others = [fold != number for number in np.unique(fold)]
    return np.array([best_thresholds(actual[mask], probability[mask]) for mask in others])


def answered(probability: npt.NDArray[np.floating], thresholds: Floats | None) -> Ints:
    """What is predicted: the most probable class, the first of equals, or the classes that reach their thresholds.

    Args:
        probability: shape (n, c).
        thresholds: of each class of a multilabel target, shape (c,) or (n, c); None of another target.

    Returns:
        Class numbers (n,), or 0 and 1 (n, c).
    """
    found = probability.argmax(axis=1) if thresholds is None else probability >= thresholds
    return found.astype(np.int64)


def mean_roc_curve(folds: Sequence[tuple[Bools, npt.NDArray[np.floating]]], grid: Floats) -> Floats:
    """Mean true positive rate over folds at the false positive rates in `grid` (Fawcett 2006, algorithm 3).

    Args:
        folds: which samples are of the class, and their scores; each fold needs one that is and one that is not.
        grid: ascending, from 0 to 1.
    """
    curves = [roc_curve(positive, score, drop_intermediate=False) for positive, score in folds]
    rates: Floats = np.mean([np.interp(grid, false, true) for false, true, _ in curves], axis=0)
    return rates


def headlines(actual: Ints, probability: npt.NDArray[np.floating], predicted: Ints | None = None) -> dict[str, float]:
    """The numbers a model is judged by: those of `HEADLINES`, or of `MULTILABEL_SCORES` where `actual` is (n, c).

    Weighted F1 counts each class as often as it occurs; the macro means leave out classes where they are undefined.
    The accuracy of a multilabel target is the share of samples of which every class is predicted right (exact match).

    Args:
        actual: shape (n,) or (n, c).
        probability: shape (n, c).
        predicted: shaped like `actual`. By default the most probable class, the first of equals; of a multilabel target
            the classes whose probability reaches `THRESHOLD`.
    """
    multilabel = actual.ndim == 2
    if not len(actual):
        return dict.fromkeys(MULTILABEL_SCORES if multilabel else HEADLINES, NAN)
    if predicted is None:
        predicted = answered(probability, np.full(probability.shape[1], THRESHOLD) if multilabel else None)
    found = {
        "f1_weighted": _f1(actual, predicted, probability.shape[1], "weighted"),
        "f1_macro": _f1(actual, predicted, probability.shape[1], "macro"),
        "accuracy": float(accuracy_score(actual, predicted)),
        "roc_auc_macro": _mean(_defined(roc_auc_by_class(actual, probability))),
    }
    if multilabel:
        found["f1_micro"] = _f1(actual, predicted, probability.shape[1], "micro")
        found["map_macro"] = _mean(_defined(average_precision_by_class(actual, probability)))
    return found


def _f1(actual: Ints, predicted: Ints, n_classes: int, average: str) -> float:
    return float(f1_score(actual, predicted, labels=range(n_classes), average=average, zero_division=NAN))


def mean_of_targets(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each headline score over targets; NaN where it is undefined for one of them."""
    return {name: float(np.mean([target[name] for target in scores])) for name in HEADLINES}


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
    defined = _defined(values)
    k, mean = len(defined), _mean(defined)
    if k < 2:
        return Spread(mean, NAN, NAN, NAN)
    std = float(defined.std(ddof=1))
    half = float(student.ppf(0.975, k - 1)) * std * variance_factor(k) ** 0.5
    return Spread(mean, std, max(lowest, mean - half), min(1.0, mean + half))


def _defined(values: Sequence[float] | Floats) -> Floats:
    numbers = np.asarray(values, dtype=np.float64)
    return numbers[~np.isnan(numbers)]


def _mean(defined: Floats) -> float:
    return float(defined.mean()) if len(defined) else NAN
