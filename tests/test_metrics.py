"""metrics.py without scikit-learn as oracle: counts and pairs written out, published and hand-made cases."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps import metrics

pytestmark = pytest.mark.filterwarnings("error")  # what is undefined is expected, so nothing may warn of it

NAN = float("nan")
# t(0.975, df) for df = 1, 2, ... from a printed table of Student's distribution.
STUDENT = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622]


def random_case(seed: int, n: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers and probabilities, coarse enough that scores tie, with classes that may never occur."""
    rng = np.random.default_rng(seed)
    actual = rng.integers(0, n_classes, n)
    odds = rng.integers(1, 6, (n, n_classes)).astype(np.float32)
    return actual, odds / odds.sum(axis=1, keepdims=True)


cases = st.builds(random_case, st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 7))


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else NAN


def mean_of_defined(values: list[float]) -> float:
    defined = [value for value in values if value == value]
    return ratio(sum(defined), len(defined))


def share_of_pairs_in_order(inside: np.ndarray, outside: np.ndarray) -> float:
    """The area under the ROC curve by its meaning: a positive scores above a negative, ties count half."""
    pairs = [float(one > other) + 0.5 * float(one == other) for one, other in product(inside, outside)]
    return ratio(sum(pairs), len(pairs))


@given(cases)
@settings(max_examples=60, deadline=None)
def test_scores_follow_from_counts(case: tuple[np.ndarray, np.ndarray]) -> None:
    actual, probability = case
    n, n_classes = probability.shape
    predicted = np.array([row.index(max(row)) for row in probability.tolist()])
    scores = metrics.class_scores(actual, predicted, n_classes)
    precision, recall, f1, support = [], [], [], []
    for number in range(n_classes):
        pairs = [(one == number, other == number) for one, other in zip(actual, predicted, strict=True)]
        hits, missed, false = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
        precision.append(ratio(hits, hits + false))
        recall.append(ratio(hits, hits + missed))
        f1.append(ratio(2 * hits, 2 * hits + false + missed))
        support.append(hits + missed)
    np.testing.assert_allclose(scores.precision, precision)
    np.testing.assert_allclose(scores.recall, recall)
    np.testing.assert_allclose(scores.f1, f1)
    assert scores.support.tolist() == support
    weighted = sum(one * count for one, count in zip(f1, support, strict=True) if count) / n
    expected = {
        "f1_weighted": weighted,
        "f1_macro": mean_of_defined(f1),
        "accuracy": sum(one == other for one, other in zip(actual, predicted, strict=True)) / n,
        "roc_auc_macro": mean_of_defined(metrics.roc_auc_by_class(actual, probability).tolist()),
    }
    assert metrics.headlines(actual, probability) == pytest.approx(expected, nan_ok=True)
    assert tuple(expected) == metrics.HEADLINES


@given(cases)
@settings(max_examples=40, deadline=None)
def test_auc_is_the_share_of_pairs_in_the_right_order(case: tuple[np.ndarray, np.ndarray]) -> None:
    actual, probability = case
    areas = [
        share_of_pairs_in_order(probability[actual == number, number], probability[actual != number, number])
        for number in range(probability.shape[1])
    ]
    np.testing.assert_allclose(metrics.roc_auc_by_class(actual, probability), areas, atol=1e-12)


@given(cases, cases)
@settings(max_examples=30, deadline=None)
def test_mean_roc_curve_is_the_vertical_mean_of_every_folds_rates(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> None:
    folds = [(actual == 0, probability[:, 0]) for actual, probability in (first, second)]
    folds = [(positive, score) for positive, score in folds if 0 < positive.sum() < len(positive)]
    if not folds:
        return
    grid = np.linspace(0, 1, 7)
    by_fold = []
    for positive, score in folds:
        thresholds = [np.inf, *sorted(set(score.tolist()), reverse=True)]
        false = [np.mean(score[~positive] >= threshold) for threshold in thresholds]
        true = [np.mean(score[positive] >= threshold) for threshold in thresholds]
        by_fold.append(np.interp(grid, false, true))
    np.testing.assert_allclose(metrics.mean_roc_curve(folds, grid), np.mean(by_fold, axis=0))


def test_scores_by_hand() -> None:
    # Confusion, rows actual: [3 1 0], [1 1 0], [1 0 2]; precisions 3/5, 1/2, 1; recalls 3/4, 1/2, 2/3.
    actual = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    predicted = np.array([0, 0, 0, 1, 0, 1, 0, 2, 2])
    scores = metrics.class_scores(actual, predicted, 3)
    np.testing.assert_allclose(scores.precision, [3 / 5, 1 / 2, 1])
    np.testing.assert_allclose(scores.recall, [3 / 4, 1 / 2, 2 / 3])
    np.testing.assert_allclose(scores.f1, [6 / 9, 2 / 4, 4 / 5])
    assert scores.support.tolist() == [4, 2, 3]
    found = metrics.headlines(actual, np.eye(3)[predicted])
    assert found["f1_weighted"] == pytest.approx((4 * 6 / 9 + 2 * 2 / 4 + 3 * 4 / 5) / 9)
    assert found["f1_macro"] == pytest.approx((6 / 9 + 2 / 4 + 4 / 5) / 3)
    assert found["accuracy"] == pytest.approx(6 / 9)
    # One threshold between 0 and 1, so each area is (recall + specificity) / 2: 3/5, 6/7 and 1 are the specificities.
    assert found["roc_auc_macro"] == pytest.approx(((3 / 4 + 3 / 5) / 2 + (1 / 2 + 6 / 7) / 2 + (2 / 3 + 1) / 2) / 3)


def test_area_of_hanley_and_mcneil() -> None:
    """Hanley & McNeil 1982, table I: 109 CT images in five ratings, full of ties; they print an area of 0.893."""
    normal, abnormal = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
    rating = np.repeat(np.tile(np.arange(1, 6), 2), normal + abnormal) / 5
    actual = np.repeat([0, 1], [sum(normal), sum(abnormal)])
    areas = metrics.roc_auc_by_class(actual, np.column_stack([1 - rating, rating]))
    np.testing.assert_allclose(areas, [0.893, 0.893], atol=0.0005)


def test_curve_of_fawcett() -> None:
    """Fawcett 2006, figure 3: 20 instances; the curve passes (0.1, 0.5), its most accurate point, and (0.5, 0.8)."""
    positive = np.array([letter == "p" for letter in "ppnpppnnpnpnpnnnpnpn"])
    score = [0.9, 0.8, 0.7, 0.6, 0.55, 0.54, 0.53, 0.52, 0.51, 0.505]
    score = np.array([*score, 0.4, 0.39, 0.38, 0.37, 0.36, 0.35, 0.34, 0.33, 0.30, 0.1])
    grid = np.linspace(0, 1, 11)
    curve = [0.2, 0.5, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.9, 1.0, 1.0]
    np.testing.assert_allclose(metrics.mean_roc_curve([(positive, score)], grid), curve)


def test_mean_roc_curve_by_hand() -> None:
    positive = np.array([True, False])
    perfect, guessing = (positive, np.array([0.9, 0.1])), (positive, np.array([0.5, 0.5]))
    grid = np.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(metrics.mean_roc_curve([perfect, guessing], grid), [0.5, 0.75, 1.0])


@given(st.lists(st.floats(0.3, 0.7), min_size=2, max_size=10))
def test_spread_is_students_interval(folds: list[float]) -> None:
    spread, k = metrics.spread(folds), len(folds)
    mean = sum(folds) / k
    std = (sum((fold - mean) ** 2 for fold in folds) / (k - 1)) ** 0.5
    assert (spread.mean, spread.std) == pytest.approx((mean, std), abs=1e-12)
    half = STUDENT[k - 2] * std / k**0.5
    assert (spread.ci95_low, spread.ci95_high) == pytest.approx((max(0, mean - half), min(1, mean + half)), abs=1e-4)


def test_spread_by_hand() -> None:
    spread = metrics.spread([0.7, 0.8, 0.9])
    half = 4.302652729911275 * 0.1 / 3**0.5  # t(0.975, 2) from a printed table
    assert (spread.mean, spread.std) == pytest.approx((0.8, 0.1))
    assert (spread.ci95_low, spread.ci95_high) == pytest.approx((0.8 - half, 1.0))  # 1.048 is no score


def test_spread_leaves_undefined_folds_out_and_invents_nothing() -> None:
    assert metrics.spread([0.4, NAN, 0.6]) == metrics.spread([0.4, 0.6])
    one = metrics.spread([0.4, NAN])
    assert one.mean == 0.4
    assert np.isnan([one.std, one.ci95_low, one.ci95_high]).all()
    assert np.isnan([metrics.spread([NAN]).mean, metrics.spread([]).mean]).all()


def test_paired_difference_is_the_corrected_resampled_t_test() -> None:
    first, second = [0.80, 0.83, 0.79, 0.82, 0.81], [0.78, 0.80, 0.79, 0.79, 0.80]
    lead = metrics.paired_difference(first, second)
    # The differences 0.02, 0.03, 0, 0.03, 0.01 have the mean 0.018 and the variance 0.00068 / 4.
    half = 2.776445 * (0.00068 / 4 * (1 / 5 + 1 / 4)) ** 0.5  # t(0.975, 4) from a printed table
    expected = (0.018, (0.00068 / 4) ** 0.5, 0.018 - half, 0.018 + half)
    assert (lead.mean, lead.std, lead.ci95_low, lead.ci95_high) == pytest.approx(expected)
    mirrored = metrics.paired_difference(second, first)
    assert (mirrored.mean, mirrored.ci95_low) == pytest.approx((-lead.mean, -lead.ci95_high))
    assert metrics.paired_difference(first, first).ci95_low == 0


def test_undefined_cases_stay_undefined() -> None:
    # Class 1 occurs but is never predicted, class 2 is predicted but never occurs, class 3 neither.
    actual, predicted = np.array([0, 0, 1]), np.array([0, 2, 0])
    scores = metrics.class_scores(actual, predicted, 4)
    np.testing.assert_array_equal(scores.precision, [0.5, NAN, 0.0, NAN])
    np.testing.assert_array_equal(scores.recall, [0.5, 0.0, NAN, NAN])
    np.testing.assert_array_equal(scores.f1, [0.5, 0.0, 0.0, NAN])
    found = metrics.headlines(actual, np.eye(4)[predicted])
    assert (found["f1_weighted"], found["f1_macro"]) == pytest.approx((2 / 3 * 0.5, 0.5 / 3))
    only_one_class = np.zeros(3, dtype=np.int64)
    assert np.isnan(metrics.roc_auc_by_class(only_one_class, np.full((3, 2), 0.5))).all()
    empty = np.array([], dtype=np.int64)
    scores = metrics.class_scores(empty, empty, 2)
    assert scores.support.tolist() == [0, 0]
    assert np.isnan([scores.precision, scores.recall, scores.f1]).all()
    nothing = metrics.headlines(empty, np.empty((0, 2)))
    assert tuple(nothing) == metrics.HEADLINES
    assert np.isnan(list(nothing.values())).all()


def test_counts_stay_whole_numbers_where_nothing_is_right() -> None:
    scores = metrics.class_scores(np.array([0, 0, 1]), np.array([1, 1, 0]), 2)
    assert scores.support.dtype == np.int64
    assert scores.support.tolist() == [2, 1]
    np.testing.assert_array_equal([scores.precision, scores.recall, scores.f1], np.zeros((3, 2)))


def test_probabilities_that_are_no_numbers_have_no_area() -> None:
    """A diverged fold must reach `evaluate`, which says so; the class whose scores are sound keeps its area."""
    probability = np.array([[0.9, 0.1], [0.2, NAN]], dtype=np.float32)
    np.testing.assert_array_equal(metrics.roc_auc_by_class(np.array([0, 1]), probability), [1.0, NAN])
    diverged = metrics.headlines(np.array([0, 1]), np.full((2, 2), NAN, dtype=np.float32))
    assert np.isnan(diverged["roc_auc_macro"])


def test_import_is_light() -> None:
    code = "import sys, pipeline_steps.metrics; print({'matplotlib', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
