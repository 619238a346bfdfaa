"""Scores of multilabel targets against scikit-learn, cross-fitted thresholds against brute force, hand-made cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from pipeline_steps import metrics

pytestmark = pytest.mark.filterwarnings("error")  # what is undefined is expected, so nothing may warn of it

NAN = float("nan")


def random_multilabel_case(seed: int, n: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """What applies and how probable it is; classes may apply never or always, and probabilities tie."""
    rng = np.random.default_rng(seed)
    actual = (rng.random((n, n_classes)) < rng.choice([0, 0.3, 0.7, 1], n_classes)).astype(np.int64)
    return actual, (rng.integers(0, 9, (n, n_classes)) / 8).astype(np.float32)


multilabel_cases = st.builds(random_multilabel_case, st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 7))


def mean_or_nan(values: list[float]) -> float:
    return float(np.mean(values)) if values else NAN


@given(multilabel_cases)
@settings(max_examples=60, deadline=None)
def test_multilabel_scores_are_scikit_learns(case: tuple[np.ndarray, np.ndarray]) -> None:
    actual, probability = case
    predicted = (probability >= 0.5).astype(int)
    occurs = [number for number in range(actual.shape[1]) if actual[:, number].any()]
    divided = [number for number in occurs if not actual[:, number].all()]
    f1 = {
        average: oracle.f1_score(actual, predicted, average=average, zero_division=NAN)
        for average in ("weighted", "macro", "micro")
    }
    expected = {
        "f1_weighted": f1["weighted"],
        "f1_macro": f1["macro"],
        "accuracy": oracle.accuracy_score(actual, predicted),
        "roc_auc_macro": mean_or_nan(
            [oracle.roc_auc_score(actual[:, number], probability[:, number]) for number in divided]
        ),
        "f1_micro": f1["micro"],
        "map_macro": mean_or_nan(
            [oracle.average_precision_score(actual[:, number], probability[:, number]) for number in occurs]
        ),
    }
    found = metrics.headlines(actual, probability)
    assert found == pytest.approx(expected, nan_ok=True)
    assert tuple(found) == metrics.MULTILABEL_SCORES
    scores = metrics.class_scores(actual, predicted, actual.shape[1])
    by_class = oracle.precision_recall_fscore_support(actual, predicted, average=None, zero_division=NAN)
    for one, other in zip((scores.precision, scores.recall, scores.f1, scores.support), by_class, strict=True):
        np.testing.assert_array_equal(one, other)


def test_multilabel_scores_by_hand() -> None:
    # Class 0: 2 hits, 1 missed; class 1: 1 hit, 1 false; class 2 neither occurs nor is predicted.
    actual = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    probability = np.array([[0.9, 0.1, 0.2], [0.5, 0.8, 0.1], [0.4, 0.3, 0.0], [0.1, 0.6, 0.3]])
    found = metrics.headlines(actual, probability)
    first, second = 4 / 5, 2 / 3
    assert found["f1_weighted"] == pytest.approx((3 * first + second) / 4)
    assert found["f1_macro"] == pytest.approx((first + second) / 2)
    assert found["f1_micro"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["accuracy"] == 2 / 4  # the first two are wholly right
    assert found["roc_auc_macro"] == 1  # of classes 0 and 1; both are ranked without a mistake
    assert found["map_macro"] == 1
    np.testing.assert_array_equal(metrics.average_precision_by_class(actual, probability), [1, 1, NAN])
    never = metrics.headlines(actual, probability, predicted=np.zeros_like(actual))
    assert (never["f1_micro"], never["accuracy"], never["map_macro"]) == (0, 0.25, 1)


def test_average_precision_by_hand() -> None:
    # Ranked: hit, miss, hit, miss; precisions 1 and 2/3 at the two steps of recall, one half each.
    actual, score = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.6])
    areas = metrics.average_precision_by_class(actual, np.column_stack([1 - score, score]))
    assert areas[1] == pytest.approx((1 + 2 / 3) / 2)


def test_undefined_multilabel_cases_stay_undefined() -> None:
    nothing = metrics.headlines(np.empty((0, 2), dtype=np.int64), np.empty((0, 2)))
    assert tuple(nothing) == metrics.MULTILABEL_SCORES
    assert np.isnan(list(nothing.values())).all()
    none_applies = metrics.headlines(np.zeros((3, 2), dtype=np.int64), np.full((3, 2), 0.1))
    assert none_applies["accuracy"] == 1
    assert np.isnan([none_applies[name] for name in metrics.MULTILABEL_SCORES if name != "accuracy"]).all()
    diverged = metrics.average_precision_by_class(np.eye(2, dtype=np.int64), np.array([[0.9, NAN], [0.2, 0.3]]))
    np.testing.assert_array_equal(diverged, [1.0, NAN])


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_no_threshold_has_a_higher_f1_than_the_best(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    positive, score = rng.random(n) < 0.4, (rng.integers(0, 12, n) / 11).astype(np.float32)
    threshold = metrics.best_threshold(positive, score)
    if not positive.any():
        assert threshold == metrics.THRESHOLD
        return
    reached = oracle.f1_score(positive, score >= threshold)
    highest = max(oracle.f1_score(positive, score >= other) for other in score)
    assert reached == pytest.approx(highest)
    # As far from the scores on both its sides as it can be.
    below, above = score[score < threshold].max(initial=0.0), score[score >= threshold].min()
    assert threshold == pytest.approx((float(below) + float(above)) / 2)
    assert threshold <= min(other for other in score if oracle.f1_score(positive, score >= other) == highest)


def test_best_threshold_by_hand() -> None:
    score = np.array([0.1, 0.2, 0.6, 0.9])
    assert metrics.best_threshold(np.array([False, False, True, True]), score) == pytest.approx(0.4)
    assert metrics.best_threshold(np.array([True, True, True, True]), score) == pytest.approx(0.05)
    # From 0.1 on and from 0.9 on F1 is 2/3, between them lower: of equal ones the lowest is taken.
    assert metrics.best_threshold(np.array([True, False, False, True]), score) == pytest.approx(0.05)


def test_a_folds_thresholds_do_not_depend_on_its_own_rows() -> None:
    rng = np.random.default_rng(3)
    actual, probability = rng.integers(0, 2, (90, 4)), rng.random((90, 4))
    fold = rng.integers(0, 3, 90)
    thresholds = metrics.cross_fitted_thresholds(actual, probability, fold)
    assert thresholds.shape == (3, 4)
    for number in range(3):
        own = fold == number
        changed_actual, changed_probability = actual.copy(), probability.copy()
        changed_actual[own], changed_probability[own] = 1 - actual[own], 1 - probability[own]
        changed = metrics.cross_fitted_thresholds(changed_actual, changed_probability, fold)
        np.testing.assert_array_equal(changed[number], thresholds[number])
        assert (changed[np.arange(3) != number] != thresholds[np.arange(3) != number]).any()
        others = [metrics.best_threshold(actual[~own, one] == 1, probability[~own, one]) for one in range(4)]
        np.testing.assert_array_equal(thresholds[number], others)


def test_a_single_fold_and_a_class_that_no_other_fold_has_take_one_half() -> None:
    actual, probability = np.array([[1, 1], [0, 1], [1, 0], [0, 0]]), np.full((4, 2), 0.1)
    assert metrics.cross_fitted_thresholds(actual, probability, np.zeros(4, dtype=int)).tolist() == [[0.5, 0.5]]
    fold = np.array([0, 0, 1, 1])  # the second class occurs in fold 0 alone
    thresholds = metrics.cross_fitted_thresholds(actual, probability, fold)
    assert thresholds[0, 1] == 0.5
    assert thresholds[1, 1] != 0.5


def test_mean_of_targets_is_undefined_where_one_target_is() -> None:
    first = dict.fromkeys(metrics.MULTILABEL_SCORES, 0.4)
    second = dict.fromkeys(metrics.HEADLINES, 0.8) | {"roc_auc_macro": NAN}
    mean = metrics.mean_of_targets([first, second])
    assert tuple(mean) == metrics.HEADLINES
    assert mean == pytest.approx(dict.fromkeys(metrics.HEADLINES, 0.6) | {"roc_auc_macro": NAN}, nan_ok=True)
