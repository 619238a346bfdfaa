"""bootstrap.py: intervals against every possible resample, coverage by simulation, groups and pairing."""

import json
from collections import Counter
from itertools import product
from random import Random

import numpy as np
import pytest
from gate_cases import (
    ACTUAL,
    HOLDOUT,
    SETTINGS,
    actual_of,
    answers,
    bootstrap,
    interval,
    measured,
    one_target,
    random_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score

from pipeline_steps.bootstrap import N_RESAMPLES, Estimate
from pipeline_steps.gate import judge

pytestmark = pytest.mark.filterwarnings("error")


def gains_by_hand(rows: list[tuple[str, str, str]], classes: list[str]) -> list[float]:
    """Candidate less champion, in weighted F1 and in each class's recall, by counting (actual, candidate, champion)."""
    f1, recalls = [0.0, 0.0], {label: [0.0, 0.0] for label in classes}
    for label in classes:
        support = sum(row[0] == label for row in rows)
        for model in (0, 1):
            right = sum(row[0] == row[model + 1] == label for row in rows)
            answered = sum(row[model + 1] == label for row in rows)
            if support:
                f1[model] += 2 * right / (support + answered) * support / len(rows)
                recalls[label][model] = right / support
    return [one - other for one, other in (f1, *recalls.values())]


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_intervals_are_percentiles_of_all_possible_resamples(seed: int) -> None:
    """Five groups can be drawn in 5^5 ways, all equally likely; 2,000 of those must find the percentiles nearly."""
    holdout, candidate, champion = random_rows(seed, n_groups=5)
    actual = actual_of(holdout)
    classes, rows = sorted(set(actual)), list(zip(actual, candidate, champion, strict=True))
    by_group = [[row for row, of in zip(rows, holdout.group, strict=True) if of == f"g{g}"] for g in range(5)]
    every: Counter[tuple[float, ...]] = Counter()
    drawn = Counter(tuple(sorted(draw)) for draw in product(range(5), repeat=5))
    for draw, times in drawn.items():
        every[tuple(gains_by_hand([row for g in draw for row in by_group[g]], classes))] += times
    found = bootstrap(holdout, candidate, champion, confidence=0.8)
    observed = gains_by_hand(rows, classes)
    error = 5 * (0.1 * 0.9 / N_RESAMPLES) ** 0.5
    assert list(found.recall) == classes
    for place, estimate in enumerate([found.f1_weighted, *found.recall.values()]):
        assert estimate.value == pytest.approx(observed[place], abs=1e-9)
        for end, share in ((estimate.low, 0.1), (estimate.high, 0.9)):
            below = sum(times for gains, times in every.items() if gains[place] < end - 1e-9) / 5**5
            not_above = sum(times for gains, times in every.items() if gains[place] < end + 1e-9) / 5**5
            assert below <= share + error
            assert not_above >= share - error


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_the_interval_of_one_model_is_of_all_possible_resamples(seed: int) -> None:
    """Four groups can be drawn in 4^4 ways, all equally likely; each is scored by scikit-learn."""
    holdout, predicted, _ = random_rows(seed, n_groups=4)
    rows = [[row for row, of in enumerate(holdout.group) if of == f"g{g}"] for g in range(4)]

    def score(chosen: list[int]) -> float:
        actual, answers = ([labels[row] for row in chosen] for labels in (actual_of(holdout), predicted))
        return float(f1_score(actual, answers, labels=sorted(set(actual)), average="weighted", zero_division=0))

    drawn = Counter(tuple(sorted(draw)) for draw in product(range(4), repeat=4))
    every = [(score([row for g in draw for row in rows[g]]), times) for draw, times in drawn.items()]
    found = interval(holdout, predicted, confidence=0.8)
    assert found.value == pytest.approx(score(list(range(len(predicted)))))
    error = 5 * (0.1 * 0.9 / N_RESAMPLES) ** 0.5
    for end, share in ((found.low, 0.1), (found.high, 0.9)):
        assert sum(times for f1, times in every if f1 < end - 1e-9) / 4**4 <= share + error
        assert sum(times for f1, times in every if f1 < end + 1e-9) / 4**4 >= share - error


def test_the_interval_of_one_model_is_that_of_its_gain_over_no_answers() -> None:
    """A model that answers nothing has a weighted F1 of 0 on every resample, so the gain over it is the score."""
    holdout, predicted, _ = random_rows(7, n_groups=50)
    gain = bootstrap(holdout, predicted, [""] * len(predicted), 0.9, seed=5).f1_weighted
    assert interval(holdout, predicted, 0.9, seed=5) == gain
    assert 0 < gain.low < gain.value < gain.high < 1
    wider = interval(holdout, predicted, 0.99, seed=5)
    assert wider.low < gain.low < gain.high < wider.high


def test_the_interval_of_one_model_at_its_ends() -> None:
    perfect = interval(HOLDOUT, ACTUAL, 0.95)
    assert perfect == Estimate(1, 1, 1)
    one_group = one_target(["a", "b", "a"], ["same"] * 3)
    assert interval(one_group, ["a", "b", ""], 0.95) == Estimate(pytest.approx(7 / 9), 0, 1)
    with pytest.raises(ValueError, match="`confidence` to be between 0 and 1, but got 95"):
        interval(HOLDOUT, ACTUAL, 95)
    with pytest.raises(ValueError, match="Expected 320 entries in `predicted`, one a row, but got 1"):
        interval(HOLDOUT, ["coat"], 0.95)
    with pytest.raises(ValueError, match="at least one holdout row"):
        interval(one_target([], []), [], 0.95)


@given(st.integers(0, 10**6), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_scores_are_those_of_scikit_learn(seed: int, n_groups: int) -> None:
    holdout, candidate, champion = random_rows(seed, n_groups)
    evidence = judge(SETTINGS, holdout, measured(candidate), measured(champion, version="7")).evidence
    actual = actual_of(holdout)
    labels, classes = sorted(set(actual)), evidence["targets"]["label"]["classes"]
    f1 = {}
    for name, predicted in (("candidate", candidate), ("champion", champion)):
        for average in ("weighted", "macro"):
            f1[name, average] = f1_score(actual, predicted, labels=labels, average=average, zero_division=0)
            assert evidence[name][f"f1_{average}"] == pytest.approx(f1[name, average])
        recalls = recall_score(actual, predicted, labels=labels, average=None)
        for label, recall in zip(labels, recalls, strict=True):
            assert classes[label][f"{name}_recall"] == pytest.approx(recall)
    assert evidence["gain"]["value"] == pytest.approx(f1["candidate", "weighted"] - f1["champion", "weighted"])
    assert {label: of["support"] for label, of in classes.items()} == Counter(actual)
    assert (evidence["n_rows"], evidence["n_groups"]) == (len(actual), n_groups)
    json.dumps(evidence, allow_nan=False)


def simulate(random: np.random.Generator, copies: int) -> tuple[list[str], list[str], list[str], list[str]]:
    """120 senders with `copies` equal rows each; candidate right on 80%, champion on 70%, otherwise no answer."""
    actual = np.repeat(random.choice(["a", "b"], 120), copies)
    right = np.repeat(random.random(120) < 0.8, copies), np.repeat(random.random(120) < 0.7, copies)
    candidate, champion = (np.where(one, actual, "").tolist() for one in right)
    return actual.tolist(), candidate, champion, [str(row // copies) for row in range(len(actual))]


@pytest.mark.parametrize("copies", [1, 3])
def test_95_percent_of_the_intervals_hold_the_true_gain(copies: int) -> None:
    """Only right answers carry a label, so precision is 1 and the true F1 of recall r is 2 r / (1 + r)."""
    truth = 2 * 0.8 / 1.8 - 2 * 0.7 / 1.7
    random = np.random.default_rng(1)
    held, held_without_groups = 0, 0
    for _ in range(200):
        actual, candidate, champion, group = simulate(random, copies)
        gain = bootstrap(one_target(actual, group), candidate, champion, 0.95).f1_weighted
        held += gain.low <= truth <= gain.high
        single = one_target(actual, [str(row) for row in range(len(actual))])
        gain = bootstrap(single, candidate, champion, 0.95).f1_weighted
        held_without_groups += gain.low <= truth <= gain.high
    # Three standard errors of 200 intervals are 4.6%.
    assert 0.904 <= held / 200 <= 0.996
    # Where copies count as independent, intervals are sqrt(3) too narrow: 2 Phi(1.96 / sqrt 3) - 1 = 74% hold.
    assert 0.904 <= held_without_groups / 200 <= 0.996 if copies == 1 else 0.65 <= held_without_groups / 200 <= 0.83


def test_copies_in_a_group_leave_the_interval_and_as_rows_of_their_own_narrow_it() -> None:
    holdout, candidate, champion = random_rows(3, n_groups=60)
    once = bootstrap(holdout, candidate, champion, 0.95)
    copied = one_target(actual_of(holdout) * 4, holdout.group * 4)
    assert bootstrap(copied, candidate * 4, champion * 4, 0.95) == once
    loose = one_target(actual_of(copied), [f"{group} {row}" for row, group in enumerate(copied.group)])
    narrow = bootstrap(loose, candidate * 4, champion * 4, 0.95)
    assert narrow.f1_weighted.value == once.f1_weighted.value
    width = (once.f1_weighted.high - once.f1_weighted.low) / (narrow.f1_weighted.high - narrow.f1_weighted.low)
    assert width > 1.8  # sqrt(4) for equal groups of single rows


def test_the_pairing_counts() -> None:
    """Both models miss the same rows but one class's ten: what they share must not widen the interval."""
    hard = {"coat": range(50), "dress": range(50)}
    champion, candidate = answers(**hard, shirt=range(10)), answers(**hard)
    paired = bootstrap(HOLDOUT, candidate, champion, 0.95).f1_weighted
    elsewhere = answers(coat=range(50, 100), dress=range(50, 100))  # as good, with other mistakes
    unpaired = bootstrap(HOLDOUT, elsewhere, champion, 0.95).f1_weighted
    assert paired.value == unpaired.value == pytest.approx(100 / 320 * (1 - 2 * 0.9 / 1.9))
    assert paired.low > 0 > unpaired.low
    assert unpaired.high - unpaired.low > 4 * (paired.high - paired.low)


def test_where_every_resample_gains_the_same_the_interval_collapses() -> None:
    holdout = one_target(["a"] * 6, list("uvwxyz"))
    gains = bootstrap(holdout, ["a"] * 6, [""] * 6, 0.95)
    assert gains.f1_weighted == gains.recall["a"] == Estimate(1, 1, 1)
    assert bootstrap(holdout, [""] * 6, [""] * 6, 0.95).f1_weighted == Estimate(0, 0, 0)


def test_one_group_shows_no_spread() -> None:
    holdout = one_target(["a", "b", "a"], ["same"] * 3)
    gains = bootstrap(holdout, ["a", "b", "a"], ["", "b", ""], 0.95)
    assert gains.f1_weighted == Estimate(pytest.approx(2 / 3), -1, 1)
    assert gains.recall == {"a": Estimate(1, -1, 1), "b": Estimate(0, -1, 1)}
    verdict = judge(SETTINGS, holdout, measured(["a", "b", "a"]), measured(["", "b", ""], version="7"))
    assert verdict.decision == "challenger"


@pytest.mark.parametrize(("n_groups", "excludes_0"), [(1, False), (3, False), (4, True), (10, True)])
def test_a_class_in_few_groups_proves_nothing(n_groups: int, excludes_0: bool) -> None:
    """All rows of class b are lost: its groups are all left out of e^-n of the resamples, 5% for 3 and 1.8% for 4."""
    holdout = one_target(["a"] * 200 + ["b"] * n_groups, [str(row) for row in range(200 + n_groups)])
    gain = bootstrap(holdout, ["a"] * (200 + n_groups), actual_of(holdout), 0.95).recall["b"]
    assert gain == Estimate(-1, -1, -1 if excludes_0 else 0)


def test_same_seed_same_intervals_in_any_order_of_rows() -> None:
    holdout, candidate, champion = random_rows(5, n_groups=40)
    first = bootstrap(holdout, candidate, champion, 0.95, seed=3)
    order = Random(0).sample(range(len(candidate)), len(candidate))
    actual = actual_of(holdout)
    shuffled = one_target([actual[row] for row in order], [holdout.group[row] for row in order])
    again = bootstrap(shuffled, [candidate[row] for row in order], [champion[row] for row in order], 0.95, 3)
    assert again == first
    assert bootstrap(holdout, candidate, champion, 0.95, seed=4) != first
    turned = bootstrap(holdout, champion, candidate, 0.95, seed=3).f1_weighted
    gain = first.f1_weighted
    assert (turned.value, turned.low, turned.high) == pytest.approx((-gain.value, -gain.high, -gain.low))


def test_many_groups_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    holdout, candidate, champion = random_rows(5, n_groups=40)
    at_once = bootstrap(holdout, candidate, champion, 0.95)
    monkeypatch.setattr("pipeline_steps.bootstrap.DRAWS_AT_ONCE", 40 * 300 + 7)  # 2,000 is no multiple of 300
    assert bootstrap(holdout, candidate, champion, 0.95) == at_once
