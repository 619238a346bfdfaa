"""Scores on the holdout with intervals, from resamples of whole groups.

Shapes: `n` holdout rows in `g` groups, of the `c` classes that occur among them; `r` resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline_steps.metrics import Floats, Ints

N_RESAMPLES = 2000
DRAWS_AT_ONCE = 4_000_000  # group numbers drawn before they are counted, which bounds the memory
DECIMALS = 12  # kept of a computed number: scores that are equal but for rounding are equal


@dataclass(frozen=True)
class Holdout:
    """The rows that no model was trained on."""

    actual: list[str]
    group: list[str]  # rows of one group (near copies, one sender) are not independent


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gains:
    """How far the candidate is above the champion: in weighted F1, and in the recall of each class."""

    f1_weighted: Estimate
    recall: dict[str, Estimate]


def paired_bootstrap(
    holdout: Holdout, candidate: Sequence[str], champion: Sequence[str], confidence: float, seed: int = 0
) -> Gains:
    """The candidate's gain over the champion on the same rows, with percentile intervals.

    The percentile interval is that of Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. Both
    models are scored on every resample, so what makes a row hard for both drops out (Koehn 2004, "Statistical
    significance tests for machine translation evaluation"). Whole groups are drawn, as many as there are, because rows
    of one group are right or wrong together (the cluster bootstrap of Davison & Hinkley 1997, section 3.8).

    A resample without a class shows no gain in that class's recall, 0. So an interval excludes 0 only where the class
    occurs in enough groups: at 95% in four, since four groups are all left out of e^-4 = 1.8% of the resamples.
    A single group says nothing about the spread: its intervals are the whole range, -1 to 1. With few groups the
    intervals are too narrow.

    Args:
        holdout: n >= 1 rows. A row whose group is like no other stands for itself.
        candidate: n labels; one that does not occur in the holdout is a wrong answer, as is "".
        champion: n labels in the same order.
        confidence: between 0 and 1, such as 0.95.
        seed: the same seed and rows give the same intervals, in whatever order the rows stand.

    Raises:
        ValueError: there are no rows, lengths differ, or `confidence` is out of range.
    """
    _check_bootstrap(holdout, {"candidate": candidate, "champion": champion}, confidence)
    counts = _counts_by_group(holdout, candidate, champion)
    total, *by_class = _estimates(counts, _gains, confidence, seed, lowest=-1)
    return Gains(total, dict(zip(classes_of(holdout), by_class, strict=True)))


def f1_weighted_interval(holdout: Holdout, predicted: Sequence[str], confidence: float, seed: int = 0) -> Estimate:
    """One model's weighted F1 with its percentile interval, over the same resamples as `paired_bootstrap`.

    Args:
        holdout: n >= 1 rows; a single group says nothing about the spread, its interval is 0 to 1.
        predicted: n labels; one that does not occur in the holdout is a wrong answer, as is "".
        confidence: between 0 and 1, such as 0.95.
        seed: the same seed and rows give the same interval, in whatever order the rows stand.

    Raises:
        ValueError: as `paired_bootstrap`.
    """
    _check_bootstrap(holdout, {"predicted": predicted}, confidence)
    counts = _counts_by_group(holdout, predicted)
    return _estimates(counts, lambda sums: _f1_weighted(*sums.swapaxes(0, 1))[:, None], confidence, seed, lowest=0)[0]


def _estimates(
    counts: Floats, scores: Callable[[Floats], Floats], confidence: float, seed: int, lowest: float
) -> list[Estimate]:
    """Each score with its interval.

    Args:
        counts: of each group, shape (g, m, c).
        scores: from counts of shape (r, m, c) to shape (r, number of scores).
        confidence: of the intervals.
        seed: of the resamples.
        lowest: the least that a score can be; the most is 1.
    """
    observed = scores(counts.sum(axis=0, keepdims=True))[0]
    if len(counts) == 1:
        low, high = np.full_like(observed, lowest), np.full_like(observed, 1)
    else:
        resampled = scores(_resample(counts, np.random.default_rng(seed)))
        low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    numbers = (np.stack([observed, low, high], axis=1).round(DECIMALS) + 0.0).tolist()  # + 0.0: no -0.000 in a sentence
    return [Estimate(*row) for row in numbers]


def _counts_by_group(holdout: Holdout, *models: Sequence[str]) -> Floats:
    """Counts from which every score follows, shape (g, 1 + 2 * number of models, c).

    The first are the rows of the class; then for each model its right answers and all its answers of the class.
    """
    classes, groups = classes_of(holdout), sorted(set(holdout.group))
    actual, group = numbered(holdout.actual, classes), numbered(holdout.group, groups)
    # The last class: labels that do not occur in the holdout.
    counts = np.zeros((len(groups), 1 + 2 * len(models), len(classes) + 1))
    np.add.at(counts[:, 0], (group, actual), 1)
    for number, labels in enumerate(models):
        predicted = numbered(labels, classes)
        np.add.at(counts[:, 1 + 2 * number], (group, actual), predicted == actual)
        np.add.at(counts[:, 2 + 2 * number], (group, predicted), 1)
    return counts[:, :, :-1]


def _resample(counts: Floats, rng: np.random.Generator) -> Floats:
    """Sums of `counts` over g groups drawn with replacement, shape (r, m, c), from (g, m, c)."""
    n_groups = len(counts)
    at_once = max(1, DRAWS_AT_ONCE // n_groups)
    parts = []
    for start in range(0, N_RESAMPLES, at_once):
        n = min(at_once, N_RESAMPLES - start)
        drawn = rng.integers(0, n_groups, (n, n_groups)) + n_groups * np.arange(n)[:, None]
        times = np.bincount(drawn.ravel(), minlength=n * n_groups).reshape(n, n_groups)
        parts.append(times.astype(np.float64) @ counts.reshape(n_groups, -1))
    return np.concatenate(parts).reshape(N_RESAMPLES, *counts.shape[1:])


def _gains(counts: Floats) -> Floats:
    """Gains in weighted F1 and in each class's recall, shape (r, 1 + c), from counts of shape (r, 5, c)."""
    support, right, answered, champion_right, champion_answered = counts.swapaxes(0, 1)
    f1_gain = _f1_weighted(support, right, answered) - _f1_weighted(support, champion_right, champion_answered)
    recall_gain = (right - champion_right) / np.maximum(support, 1)
    return np.column_stack([f1_gain, recall_gain])


def _f1_weighted(support: Floats, right: Floats, answered: Floats) -> Floats:
    """Weighted F1, shape (r,), from counts of shape (r, c): the F1 of a class is 2 right / (support + answered)."""
    f1 = 2 * right / np.maximum(support + answered, 1)
    weighted: Floats = (support * f1).sum(axis=1) / support.sum(axis=1)
    return weighted


def classes_of(holdout: Holdout) -> list[str]:
    """The labels that occur, sorted."""
    return sorted(set(holdout.actual))


def numbered(labels: Sequence[str], order: list[str]) -> Ints:
    """The place of each label in `order`, or the number after the last for a label that is not there."""
    place = {label: number for number, label in enumerate(order)}
    return np.array([place.get(label, len(order)) for label in labels], dtype=np.int64)


def _check_bootstrap(holdout: Holdout, models: dict[str, Sequence[str]], confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"Expected `confidence` to be between 0 and 1, but got {confidence}.")
    if not holdout.actual:
        raise ValueError("Expected at least one holdout row, but got none.")
    for name, labels in ({"group": holdout.group} | models).items():
        check_length(name, labels, holdout)


def check_length(name: str, labels: Sequence[str], holdout: Holdout) -> None:
    """Raises a ValueError where there is not one entry for each holdout row."""
    if len(labels) != len(holdout.actual):
        raise ValueError(f"Expected {len(holdout.actual)} entries in `{name}`, one a row, but got {len(labels)}.")
