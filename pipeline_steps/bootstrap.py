"""Scores on the holdout with intervals, from resamples of whole groups.

Shapes: `n` holdout rows in `g` groups; `c` classes that occur among them, in all `t` targets one after the other; `r`
resamples; `m` kinds of counts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline_steps.metrics import Bools, Floats, Ints

N_RESAMPLES = 2000
DRAWS_AT_ONCE = 4_000_000  # group numbers drawn before they are counted, which bounds the memory
DECIMALS = 12  # kept of a computed number: scores that are equal but for rounding are equal
Labels = tuple[str, ...]  # of a row: one, several of a multilabel target, or none where a model gave no answer
Answers = Mapping[str, Sequence[Labels]]  # of each target, each row's labels


@dataclass(frozen=True)
class Holdout:
    """The rows that no model was trained on."""

    actual: Answers
    group: list[str]  # rows of one group (near copies, one sender) are not independent

    def classes(self, target: str) -> list[str]:
        """The labels of a target that occur, sorted."""
        return sorted({label for labels in self.actual[target] for label in labels})


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class F1Weighted:
    """Weighted F1, or a gain in it: the mean over the targets, and by target."""

    mean: Estimate
    targets: dict[str, Estimate]


@dataclass(frozen=True)
class Gains:
    """How far the candidate is above the champion: in weighted F1, and by target in the recall of each class."""

    f1_weighted: F1Weighted
    recall: dict[str, dict[str, Estimate]]


def paired_bootstrap(
    holdout: Holdout, candidate: Answers, champion: Answers, confidence: float, seed: int = 0
) -> Gains:
    """The candidate's gain over the champion on the same rows, with percentile intervals.

    The percentile interval is that of Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. Both
    models are scored on every resample, so what makes a row hard for both drops out (Koehn 2004, "Statistical
    significance tests for machine translation evaluation"). Whole groups are drawn, as many as there are, because rows
    of one group are right or wrong together (the cluster bootstrap of Davison & Hinkley 1997, section 3.8). All targets
    are scored on the same resamples.

    A resample without a class shows no gain in that class's recall, 0. So an interval excludes 0 only where the class
    occurs in enough groups: at 95% in four, since four groups are all left out of e^-4 = 1.8% of the resamples.
    A single group says nothing about the spread: its intervals are the whole range, -1 to 1. With few groups the
    intervals are too narrow.

    Args:
        holdout: n >= 1 rows. A row whose group is like no other stands for itself.
        candidate: of each target n answers; a label that does not occur in the holdout is a wrong one, as is none.
        champion: the same in the same order.
        confidence: between 0 and 1, such as 0.95.
        seed: the same seed and rows give the same intervals, in whatever order the rows stand.

    Raises:
        ValueError: there are no rows, targets or lengths differ, or `confidence` is out of range.
    """
    _check_bootstrap(holdout, {"candidate": candidate, "champion": champion}, confidence)
    counts, targets = _counts_by_group(holdout, candidate, champion), list(holdout.actual)
    classes = [holdout.classes(target) for target in targets]

    def gains(sums: Floats) -> Floats:
        parts = _by_target(sums, classes)
        f1 = np.column_stack([_f1_weighted(*part[:3]) - _f1_weighted(part[0], *part[3:]) for part in parts])
        recalls = [(part[1] - part[3]) / np.maximum(part[0], 1) for part in parts]
        return np.column_stack([f1.mean(axis=1), f1, *recalls])

    mean, *rest = _estimates(counts, gains, confidence, seed, lowest=-1)
    recall = iter(rest[len(targets) :])
    return Gains(
        F1Weighted(mean, dict(zip(targets, rest, strict=False))),
        {target: {label: next(recall) for label in names} for target, names in zip(targets, classes, strict=True)},
    )


def f1_weighted_interval(holdout: Holdout, predicted: Answers, confidence: float, seed: int = 0) -> F1Weighted:
    """One model's weighted F1 with its percentile interval, over the same resamples as `paired_bootstrap`.

    Args:
        holdout: n >= 1 rows; a single group says nothing about the spread, its interval is 0 to 1.
        predicted: of each target n answers; a label that does not occur in the holdout is a wrong one, as is none.
        confidence: between 0 and 1, such as 0.95.
        seed: the same seed and rows give the same interval, in whatever order the rows stand.

    Raises:
        ValueError: as `paired_bootstrap`.
    """
    _check_bootstrap(holdout, {"predicted": predicted}, confidence)
    counts, targets = _counts_by_group(holdout, predicted), list(holdout.actual)
    classes = [holdout.classes(target) for target in targets]

    def scores(sums: Floats) -> Floats:
        f1 = np.column_stack([_f1_weighted(*part) for part in _by_target(sums, classes)])
        return np.column_stack([f1.mean(axis=1), f1])

    mean, *rest = _estimates(counts, scores, confidence, seed, lowest=0)
    return F1Weighted(mean, dict(zip(targets, rest, strict=True)))


def class_counts(actual: Sequence[Labels], predicted: Sequence[Labels], classes: Sequence[str]) -> Ints:
    """Of each class the rows that have it, those of them that are answered with it, and all answered with it.

    Returns:
        Shape (3, len(classes)).
    """
    truth, answer = _applies(actual, classes), _applies(predicted, classes)
    return np.stack([truth.sum(axis=0), (truth & answer).sum(axis=0), answer.sum(axis=0)])


def labels_of(cell: str | Iterable[str] | None) -> Labels:
    """What a model answers, or a table holds, as labels: text, several of them, or "" or None for no answer."""
    if cell is None or isinstance(cell, str):
        return (cell,) if cell else ()
    return tuple(map(str, cell))


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


def _counts_by_group(holdout: Holdout, *models: Answers) -> Floats:
    """Counts from which every score follows, shape (g, 1 + 2 * number of models, c).

    The first are the rows of the class; then for each model its right answers and all its answers of the class.
    """
    _, group = np.unique(holdout.group, return_inverse=True)  # sorted, so that the order of the rows does not matter
    parts = []
    for target, actual in holdout.actual.items():
        classes = holdout.classes(target)
        truth = _applies(actual, classes)
        kinds = [truth]
        for model in models:
            answer = _applies(model[target], classes)
            kinds += [truth & answer, answer]
        counts = np.zeros((group.max() + 1, len(kinds), len(classes)))
        for number, kind in enumerate(kinds):
            rows, columns = np.nonzero(kind)
            np.add.at(counts[:, number], (group[rows], columns), 1)
        parts.append(counts)
    return np.concatenate(parts, axis=2)


def _applies(labels: Sequence[Labels], classes: Sequence[str]) -> Bools:
    """Whether each row has each class, shape (rows, classes); other labels are passed over."""
    place = {label: number for number, label in enumerate(classes)}
    applies = np.zeros((len(labels), len(classes)), dtype=np.bool_)
    for row, names in enumerate(labels):
        for name in names:
            if name in place:
                applies[row, place[name]] = True
    return applies


def _by_target(sums: Floats, classes: Sequence[Sequence[str]]) -> list[Floats]:
    """Counts of shape (r, m, c) as one array a target, of shape (m, r, classes of the target)."""
    ends = np.cumsum([len(names) for names in classes])[:-1]
    return [part.swapaxes(0, 1) for part in np.split(sums, ends, axis=2)]


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


def _f1_weighted(support: Floats, right: Floats, answered: Floats) -> Floats:
    """Weighted F1, shape (r,), from counts of shape (r, c): the F1 of a class is 2 right / (support + answered)."""
    f1 = 2 * right / np.maximum(support + answered, 1)
    weighted: Floats = (support * f1).sum(axis=1) / support.sum(axis=1)
    return weighted


def _check_bootstrap(holdout: Holdout, models: dict[str, Answers], confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"Expected `confidence` to be between 0 and 1, but got {confidence}.")
    if not holdout.group:
        raise ValueError("Expected at least one holdout row, but got none.")
    check_holdout(holdout)
    for name, answers in models.items():
        check_answers(name, answers, holdout)


def check_holdout(holdout: Holdout) -> None:
    """Raises a ValueError where a row has no label of some target."""
    check_answers("actual", holdout.actual, holdout)
    if not all(all(rows) for rows in holdout.actual.values()):
        raise ValueError("Expected a label for every holdout row, but one has none.")


def check_answers(name: str, answers: Answers, holdout: Holdout) -> None:
    """Raises a ValueError where there is not one entry for each holdout row of each target."""
    if answers.keys() != holdout.actual.keys():
        asked, got = ", ".join(holdout.actual), ", ".join(answers)
        raise ValueError(f"Expected `{name}` to answer the targets {asked}, but it answers {got or 'none'}.")
    for target, labels in answers.items():
        if len(labels) != len(holdout.group):
            raise ValueError(
                f"Expected {len(holdout.group)} entries in `{name}`, one a row, but got {len(labels)} for {target}."
            )
