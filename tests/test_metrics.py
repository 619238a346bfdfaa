"""metrics.py against independent oracles: scikit-learn, scipy.stats, definitions written out."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as oracle

from pipeline_steps import metrics

NAN = float("nan")


def random_case(seed: int, n: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers and probabilities, coarse enough that scores tie, with classes that may never occur."""
    rng = np.random.default_rng(seed)
    actual = rng.integers(0, n_classes, n)
    odds = rng.integers(1, 6, (n, n_classes)).astype(np.float32)
    return actual, odds / odds.sum(axis=1, keepdims=True)


cases = st.builds(random_case, st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 7))


@given(cases)
@settings(max_examples=60, deadline=None)
def test_scores_agree_with_scikit_learn(case: tuple[np.ndarray, np.ndarray]) -> None:
    actual, probability = case
    labels = list(range(probability.shape[1]))
    predicted = probability.argmax(axis=1)
    confusion = metrics.confusion_matrix(actual, predicted, len(labels))
    assert (confusion == oracle.confusion_matrix(actual, predicted, labels=labels)).all()
    precision, recall, f1, support = oracle.precision_recall_fscore_support(
        actual, predicted, labels=labels, zero_division=np.nan
    )
    scores = metrics.class_scores(confusion)
    np.testing.assert_allclose(scores.precision, precision)
    np.testing.assert_allclose(scores.recall, recall)
    np.testing.assert_allclose(scores.f1, f1)
    assert (scores.support == support).all()
    weighted = oracle.f1_score(actual, predicted, labels=labels, average="weighted", zero_division=np.nan)
    macro = oracle.f1_score(actual, predicted, labels=labels, average="macro", zero_division=np.nan)
    assert metrics.f1_weighted(confusion) == pytest.approx(weighted)
    assert metrics.f1_macro(confusion) == pytest.approx(macro)
    assert metrics.accuracy(confusion) == pytest.approx(oracle.accuracy_score(actual, predicted))


@given(cases)
@settings(max_examples=40, deadline=None)
def test_auc_is_the_share_of_pairs_in_the_right_order(case: tuple[np.ndarray, np.ndarray]) -> None:
    actual, probability = case
    areas = metrics.roc_auc_by_class(actual, probability)
    for number, area in enumerate(areas):
        inside, outside = probability[actual == number, number], probability[actual != number, number]
        if not len(inside) or not len(outside):
            assert np.isnan(area)
            continue
        pairs = [float(one > other) + 0.5 * float(one == other) for one, other in product(inside, outside)]
        assert area == pytest.approx(np.mean(pairs))
        assert area == pytest.approx(oracle.roc_auc_score(actual == number, probability[:, number]))
    expected = np.nanmean(areas) if not np.isnan(areas).all() else NAN
    assert metrics.headlines(actual, probability)["roc_auc_macro"] == pytest.approx(expected, nan_ok=True)


@given(cases)
@settings(max_examples=30, deadline=None)
def test_roc_curve_agrees_with_scikit_learn_and_with_the_area(case: tuple[np.ndarray, np.ndarray]) -> None:
    actual, probability = case
    positive, score = actual == 0, probability[:, 0]
    if not 0 < positive.sum() < len(positive):
        return
    false, true = metrics.roc_curve(positive, score)
    expected = oracle.roc_curve(positive, score, drop_intermediate=False)
    np.testing.assert_allclose(false, expected[0])
    np.testing.assert_allclose(true, expected[1])
    assert np.trapezoid(true, false) == pytest.approx(metrics.roc_auc(positive, score))


def test_mean_roc_curve_is_the_vertical_mean() -> None:
    perfect = np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0])
    guessing = np.array([0.0, 1.0]), np.array([0.0, 1.0])
    grid = np.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(metrics.mean_roc_curve([perfect, guessing], grid), [0.5, 0.75, 1.0])


@given(st.lists(st.floats(0.3, 0.7), min_size=2, max_size=10))
def test_spread_agrees_with_scipy(folds: list[float]) -> None:
    spread = metrics.spread(folds)
    assert spread.mean == pytest.approx(np.mean(folds))
    assert spread.std == pytest.approx(np.std(folds, ddof=1), abs=1e-12)
    if spread.std > 1e-9:
        low, high = stats.t.interval(0.95, len(folds) - 1, loc=np.mean(folds), scale=stats.sem(folds))
        assert (spread.ci95_low, spread.ci95_high) == pytest.approx((max(0, low), min(1, high)))


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
    differences = np.subtract(first, second)
    scale = np.std(differences, ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    low, high = stats.t.interval(0.95, 4, loc=differences.mean(), scale=scale)
    assert (lead.mean, lead.ci95_low, lead.ci95_high) == pytest.approx((0.018, low, high))
    mirrored = metrics.paired_difference(second, first)
    assert (mirrored.mean, mirrored.ci95_low) == pytest.approx((-lead.mean, -lead.ci95_high))
    assert metrics.paired_difference(first, first).ci95_low == 0


def test_undefined_cases_stay_undefined() -> None:
    # Class 1 occurs but is never predicted, class 2 is predicted but never occurs, class 3 neither.
    scores = metrics.class_scores(metrics.confusion_matrix(np.array([0, 0, 1]), np.array([0, 2, 0]), 4))
    np.testing.assert_array_equal(scores.precision, [0.5, NAN, 0.0, NAN])
    np.testing.assert_array_equal(scores.recall, [0.5, 0.0, NAN, NAN])
    np.testing.assert_array_equal(scores.f1, [0.5, 0.0, 0.0, NAN])
    only_one_class = np.zeros(3, dtype=np.int64)
    assert np.isnan(metrics.roc_auc_by_class(only_one_class, np.full((3, 2), 0.5))).all()
    nothing = metrics.confusion_matrix(np.array([], dtype=np.int64), np.array([], dtype=np.int64), 2)
    assert np.isnan([metrics.accuracy(nothing), metrics.f1_weighted(nothing), metrics.f1_macro(nothing)]).all()


def test_import_is_light() -> None:
    code = "import sys, pipeline_steps.metrics; print({'matplotlib', 'sklearn', 'pandas', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
