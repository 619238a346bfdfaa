"""gate.py: scores against scikit-learn, intervals against every possible resample, and one case for each decision."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score

from pipeline_steps.gate import (
    N_RESAMPLES,
    Broken,
    Estimate,
    Holdout,
    Measured,
    Verdict,
    f1_weighted_interval,
    judge,
    paired_bootstrap,
)
from pipeline_steps.params import Promotion

pytestmark = pytest.mark.filterwarnings("error")

SETTINGS = Promotion.model_validate(
    {
        "model": "pleat",
        "mode": "auto",
        "floors": {"f1_weighted": 0.5, "f1_macro": 0.4},
        "min_gain": 0.0,
        "confidence": 0.95,
        "max_class_drop": 0.2,
        "max_cost": {"latency": 1.5, "memory": 2.0, "size": 2.0},
    }
)
CLASSES = {"coat": 100, "dress": 100, "shirt": 100, "sock": 20}
ACTUAL = [label for label, n in CLASSES.items() for _ in range(n)]
HOLDOUT = Holdout(ACTUAL, [f"sender {row}" for row in range(len(ACTUAL))])
FIRST_ROW = {"coat": 0, "dress": 100, "shirt": 200, "sock": 300}


def answers(**wrong: range) -> list[str]:
    """The right labels, except that the named rows of a class (counted within it) get no answer."""
    predicted = list(ACTUAL)
    for label, rows in wrong.items():
        for row in rows:
            predicted[FIRST_ROW[label] + row] = ""
    return predicted


def weighted_f1(**wrong: range) -> float:
    """Of `answers`: nothing is taken for another class, so a class of recall r has precision 1 and F1 2 r / (1 + r)."""
    recalls = {label: 1 - len(wrong.get(label, ())) / n for label, n in CLASSES.items()}
    return sum(CLASSES[label] * 2 * r / (1 + r) for label, r in recalls.items()) / len(ACTUAL)


def measured(predicted: list[str], version: str = "candidate", **costs: float) -> Measured:
    return replace(
        Measured(version, predicted, latency_ms=4.0, memory_bytes=512_000_000, size_bytes=8_940_000), **costs
    )


def against(candidate: list[str], champion: list[str], **costs: float) -> Verdict:
    return judge(SETTINGS, HOLDOUT, measured(candidate, **costs), measured(champion, version="7"))


def random_rows(seed: int, n_groups: int) -> tuple[Holdout, list[str], list[str]]:
    """Groups of one to four rows of three classes; answers may be none or a label that never occurs."""
    random = Random(seed)
    group = [f"g{number}" for number in range(n_groups) for _ in range(random.randint(1, 4))]
    random.shuffle(group)
    actual = random.choices("abc", [6, 3, 1], k=len(group))

    def answer(label: str) -> str:
        return label if random.random() < 0.5 else random.choice(["a", "b", "c", "z", ""])

    return Holdout(actual, group), [answer(label) for label in actual], [answer(label) for label in actual]


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
    classes, rows = sorted(set(holdout.actual)), list(zip(holdout.actual, candidate, champion, strict=True))
    by_group = [[row for row, of in zip(rows, holdout.group, strict=True) if of == f"g{g}"] for g in range(5)]
    every: Counter[tuple[float, ...]] = Counter()
    drawn = Counter(tuple(sorted(draw)) for draw in product(range(5), repeat=5))
    for draw, times in drawn.items():
        every[tuple(gains_by_hand([row for g in draw for row in by_group[g]], classes))] += times
    found = paired_bootstrap(holdout, candidate, champion, confidence=0.8)
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
        actual, answers = ([labels[row] for row in chosen] for labels in (holdout.actual, predicted))
        return float(f1_score(actual, answers, labels=sorted(set(actual)), average="weighted", zero_division=0))

    drawn = Counter(tuple(sorted(draw)) for draw in product(range(4), repeat=4))
    every = [(score([row for g in draw for row in rows[g]]), times) for draw, times in drawn.items()]
    found = f1_weighted_interval(holdout, predicted, confidence=0.8)
    assert found.value == pytest.approx(score(list(range(len(predicted)))))
    error = 5 * (0.1 * 0.9 / N_RESAMPLES) ** 0.5
    for end, share in ((found.low, 0.1), (found.high, 0.9)):
        assert sum(times for f1, times in every if f1 < end - 1e-9) / 4**4 <= share + error
        assert sum(times for f1, times in every if f1 < end + 1e-9) / 4**4 >= share - error


def test_the_interval_of_one_model_is_that_of_its_gain_over_no_answers() -> None:
    """A model that answers nothing has a weighted F1 of 0 on every resample, so the gain over it is the score."""
    holdout, predicted, _ = random_rows(7, n_groups=50)
    gain = paired_bootstrap(holdout, predicted, [""] * len(predicted), 0.9, seed=5).f1_weighted
    assert f1_weighted_interval(holdout, predicted, 0.9, seed=5) == gain
    assert 0 < gain.low < gain.value < gain.high < 1
    wider = f1_weighted_interval(holdout, predicted, 0.99, seed=5)
    assert wider.low < gain.low < gain.high < wider.high


def test_the_interval_of_one_model_at_its_ends() -> None:
    perfect = f1_weighted_interval(HOLDOUT, ACTUAL, 0.95)
    assert perfect == Estimate(1, 1, 1)
    one_group = Holdout(["a", "b", "a"], ["same"] * 3)
    assert f1_weighted_interval(one_group, ["a", "b", ""], 0.95) == Estimate(pytest.approx(7 / 9), 0, 1)
    with pytest.raises(ValueError, match="`confidence` to be between 0 and 1, but got 95"):
        f1_weighted_interval(HOLDOUT, ACTUAL, 95)
    with pytest.raises(ValueError, match="Expected 320 entries in `predicted`, one a row, but got 1"):
        f1_weighted_interval(HOLDOUT, ["coat"], 0.95)
    with pytest.raises(ValueError, match="at least one holdout row"):
        f1_weighted_interval(Holdout([], []), [], 0.95)


@given(st.integers(0, 10**6), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_scores_are_those_of_scikit_learn(seed: int, n_groups: int) -> None:
    holdout, candidate, champion = random_rows(seed, n_groups)
    evidence = judge(SETTINGS, holdout, measured(candidate), measured(champion, version="7")).evidence
    labels = sorted(set(holdout.actual))
    f1 = {}
    for name, predicted in (("candidate", candidate), ("champion", champion)):
        for average in ("weighted", "macro"):
            f1[name, average] = f1_score(holdout.actual, predicted, labels=labels, average=average, zero_division=0)
            assert evidence[name][f"f1_{average}"] == pytest.approx(f1[name, average])
        recalls = recall_score(holdout.actual, predicted, labels=labels, average=None)
        for label, recall in zip(labels, recalls, strict=True):
            assert evidence["classes"][label][f"{name}_recall"] == pytest.approx(recall)
    assert evidence["gain"]["value"] == pytest.approx(f1["candidate", "weighted"] - f1["champion", "weighted"])
    assert {label: of["support"] for label, of in evidence["classes"].items()} == Counter(holdout.actual)
    assert (evidence["n_rows"], evidence["n_groups"]) == (len(holdout.actual), n_groups)
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
        gain = paired_bootstrap(Holdout(actual, group), candidate, champion, 0.95).f1_weighted
        held += gain.low <= truth <= gain.high
        single = Holdout(actual, [str(row) for row in range(len(actual))])
        gain = paired_bootstrap(single, candidate, champion, 0.95).f1_weighted
        held_without_groups += gain.low <= truth <= gain.high
    # Three standard errors of 200 intervals are 4.6%.
    assert 0.904 <= held / 200 <= 0.996
    # Where copies count as independent, intervals are sqrt(3) too narrow: 2 Phi(1.96 / sqrt 3) - 1 = 74% hold.
    assert 0.904 <= held_without_groups / 200 <= 0.996 if copies == 1 else 0.65 <= held_without_groups / 200 <= 0.83


def test_copies_in_a_group_leave_the_interval_and_as_rows_of_their_own_narrow_it() -> None:
    holdout, candidate, champion = random_rows(3, n_groups=60)
    once = paired_bootstrap(holdout, candidate, champion, 0.95)
    copied = Holdout(holdout.actual * 4, holdout.group * 4)
    assert paired_bootstrap(copied, candidate * 4, champion * 4, 0.95) == once
    loose = Holdout(copied.actual, [f"{group} {row}" for row, group in enumerate(copied.group)])
    narrow = paired_bootstrap(loose, candidate * 4, champion * 4, 0.95)
    assert narrow.f1_weighted.value == once.f1_weighted.value
    width = (once.f1_weighted.high - once.f1_weighted.low) / (narrow.f1_weighted.high - narrow.f1_weighted.low)
    assert width > 1.8  # sqrt(4) for equal groups of single rows


def test_the_pairing_counts() -> None:
    """Both models miss the same rows but one class's ten: what they share must not widen the interval."""
    hard = {"coat": range(50), "dress": range(50)}
    champion, candidate = answers(**hard, shirt=range(10)), answers(**hard)
    paired = paired_bootstrap(HOLDOUT, candidate, champion, 0.95).f1_weighted
    elsewhere = answers(coat=range(50, 100), dress=range(50, 100))  # as good, with other mistakes
    unpaired = paired_bootstrap(HOLDOUT, elsewhere, champion, 0.95).f1_weighted
    assert paired.value == unpaired.value == pytest.approx(100 / 320 * (1 - 2 * 0.9 / 1.9))
    assert paired.low > 0 > unpaired.low
    assert unpaired.high - unpaired.low > 4 * (paired.high - paired.low)


def test_where_every_resample_gains_the_same_the_interval_collapses() -> None:
    holdout = Holdout(["a"] * 6, list("uvwxyz"))
    gains = paired_bootstrap(holdout, ["a"] * 6, [""] * 6, 0.95)
    assert gains.f1_weighted == gains.recall["a"] == Estimate(1, 1, 1)
    assert paired_bootstrap(holdout, [""] * 6, [""] * 6, 0.95).f1_weighted == Estimate(0, 0, 0)


def test_one_group_shows_no_spread() -> None:
    holdout = Holdout(["a", "b", "a"], ["same"] * 3)
    gains = paired_bootstrap(holdout, ["a", "b", "a"], ["", "b", ""], 0.95)
    assert gains.f1_weighted == Estimate(pytest.approx(2 / 3), -1, 1)
    assert gains.recall == {"a": Estimate(1, -1, 1), "b": Estimate(0, -1, 1)}
    verdict = judge(SETTINGS, holdout, measured(["a", "b", "a"]), measured(["", "b", ""], version="7"))
    assert verdict.decision == "challenger"


@pytest.mark.parametrize(("n_groups", "excludes_0"), [(1, False), (3, False), (4, True), (10, True)])
def test_a_class_in_few_groups_proves_nothing(n_groups: int, excludes_0: bool) -> None:
    """All rows of class b are lost: its groups are all left out of e^-n of the resamples, 5% for 3 and 1.8% for 4."""
    holdout = Holdout(["a"] * 200 + ["b"] * n_groups, [str(row) for row in range(200 + n_groups)])
    gain = paired_bootstrap(holdout, ["a"] * (200 + n_groups), holdout.actual, 0.95).recall["b"]
    assert gain == Estimate(-1, -1, -1 if excludes_0 else 0)


def test_same_seed_same_intervals_in_any_order_of_rows() -> None:
    holdout, candidate, champion = random_rows(5, n_groups=40)
    first = paired_bootstrap(holdout, candidate, champion, 0.95, seed=3)
    order = Random(0).sample(range(len(candidate)), len(candidate))
    shuffled = Holdout([holdout.actual[row] for row in order], [holdout.group[row] for row in order])
    again = paired_bootstrap(shuffled, [candidate[row] for row in order], [champion[row] for row in order], 0.95, 3)
    assert again == first
    assert paired_bootstrap(holdout, candidate, champion, 0.95, seed=4) != first
    turned = paired_bootstrap(holdout, champion, candidate, 0.95, seed=3).f1_weighted
    gain = first.f1_weighted
    assert (turned.value, turned.low, turned.high) == pytest.approx((-gain.value, -gain.high, -gain.low))


def test_many_groups_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    holdout, candidate, champion = random_rows(5, n_groups=40)
    at_once = paired_bootstrap(holdout, candidate, champion, 0.95)
    monkeypatch.setattr("pipeline_steps.gate.DRAWS_AT_ONCE", 40 * 300 + 7)  # 2,000 is no multiple of 300
    assert paired_bootstrap(holdout, candidate, champion, 0.95) == at_once


# The decisions.


def test_clearly_worse() -> None:
    verdict = against(answers(coat=range(15), dress=range(15)), answers(coat=range(3)))
    gain = weighted_f1(coat=range(15), dress=range(15)) - weighted_f1(coat=range(3))
    assert verdict.decision == "rejected"
    assert verdict.reasons[0].startswith(
        "The candidate scores lower than champion version 7: weighted F1 "
        f"{weighted_f1(coat=range(15), dress=range(15)):.3f} against {weighted_f1(coat=range(3)):.3f} on 320 holdout "
        f"images, a gain of {gain:+.3f} with a 95% interval of -0."
    )
    assert verdict.reasons[0].endswith(", all of it below 0, so this is not noise.")
    assert verdict.evidence["gain"]["value"] == pytest.approx(gain)
    assert verdict.evidence["gain"]["high"] < 0


def test_worse_within_noise() -> None:
    verdict = against(answers(coat=range(12)), answers(dress=range(10)))
    assert verdict.decision == "rejected"
    assert "The candidate scores lower than champion version 7, though within noise: weighted F1" in verdict.reasons[0]
    assert verdict.evidence["gain"]["value"] < 0 < verdict.evidence["gain"]["high"]


def test_identical_answers() -> None:
    verdict = against(answers(coat=range(12)), answers(coat=range(12)))
    score = weighted_f1(coat=range(12))
    assert verdict.decision == "challenger"
    assert verdict.reasons[0] == (
        "The candidate gives the same answers as champion version 7 on all 320 holdout images, so it gains nothing: "
        f"weighted F1 {score:.3f} for both."
    )
    assert verdict.evidence["gain"] == {"value": 0, "low": 0, "high": 0}


def test_the_same_score_with_other_answers() -> None:
    """In floats the two scores may differ in the last digit, which is no gain and no loss."""
    candidate = answers(coat=range(1), dress=range(1), shirt=range(3))
    champion = answers(coat=range(3), dress=range(1), shirt=range(1))
    verdict = against(candidate, champion)
    assert verdict.evidence["gain"]["value"] == 0
    assert str(verdict.evidence["gain"]["value"]) == "0.0"  # not -0.0
    assert verdict.decision == "challenger"
    assert "has the same score as champion version 7, with other answers: weighted F1" in verdict.reasons[0]
    assert "a gain of 0 with a 95% interval of -0.0" in verdict.reasons[0]


def test_better_within_noise() -> None:
    verdict = against(answers(coat=range(10)), answers(dress=range(12)))
    assert verdict.decision == "challenger"
    assert verdict.reasons[0].startswith(
        "The candidate scores better than champion version 7, but within noise: weighted F1 "
        f"{weighted_f1(coat=range(10)):.3f} against {weighted_f1(dress=range(12)):.3f} on 320 holdout images, a gain"
    )
    assert verdict.reasons[0].endswith(", which is not above 0.")
    assert verdict.evidence["gain"]["low"] < 0 < verdict.evidence["gain"]["value"]


def test_clearly_better() -> None:
    verdict = against(answers(coat=range(3)), answers(coat=range(20), dress=range(10)))
    assert verdict.decision == "promoted"
    assert verdict.reasons[0].startswith(
        f"The candidate scores better than champion version 7: weighted F1 {weighted_f1(coat=range(3)):.3f} against "
    )
    assert verdict.reasons[0].endswith(", all of it above 0.")
    score = weighted_f1(coat=range(3))
    macro = (2 * 0.97 / 1.97 + 3) / 4
    assert verdict.reasons[1:] == [
        f"The candidate reaches the floors on the holdout: weighted F1 {score:.3f} (floor 0.5) and macro F1 "
        f"{macro:.3f} (floor 0.4)."
    ]


def test_better_but_not_surely_by_as_much_as_asked() -> None:
    asked = SETTINGS.model_copy(update={"min_gain": 0.03})
    candidate, champion = measured(answers(coat=range(3)), version="8"), measured(answers(coat=range(20)), version="7")
    verdict = judge(asked, HOLDOUT, candidate, champion)
    assert 0 < verdict.evidence["gain"]["low"] < 0.03
    assert verdict.decision == "challenger"
    assert verdict.reasons[0].startswith(
        "Version 8 scores better than champion version 7, but not surely by more than the required 0.03: weighted F1"
    )
    surer = judge(asked.model_copy(update={"confidence": 0.995}), HOLDOUT, candidate, champion)
    assert surer.evidence["gain"]["low"] < verdict.evidence["gain"]["low"]
    assert " with a 99.5% interval of " in surer.reasons[0]
    asked = SETTINGS.model_copy(update={"min_gain": verdict.evidence["gain"]["low"] - 1e-6})
    enough = judge(asked, HOLDOUT, candidate, champion)
    assert enough.decision == "promoted"
    assert f", all of it above {asked.min_gain:.10g}." in enough.reasons[0]


def test_better_but_more_than_twice_as_slow() -> None:
    verdict = against(answers(coat=range(3)), answers(coat=range(20), dress=range(10)), latency_ms=8.4)
    assert verdict.decision == "challenger"
    assert verdict.reasons[0] == (
        "The candidate takes 2.1 times the champion's 4.0 ms an image, more than the limit of 1.5."
    )
    assert "scores better than champion version 7: " in verdict.reasons[1]
    assert verdict.evidence["cost_ratios"] == {"latency": pytest.approx(2.1), "memory": 1, "size": 1}


def test_every_cost_has_its_limit() -> None:
    better, champion = answers(coat=range(3)), answers(coat=range(20), dress=range(10))
    at_the_limits = {"latency_ms": 6.0, "memory_bytes": 1_024_000_000, "size_bytes": 17_880_000}
    assert against(better, champion, **at_the_limits).decision == "promoted"
    verdict = against(better, champion, memory_bytes=1_536_000_000, size_bytes=17_900_000)
    assert verdict.decision == "challenger"
    assert verdict.reasons[:2] == [
        "The candidate needs 3.0 times the champion's 512 MB of memory, more than the limit of 2.",
        "The candidate fills 2.002 times the champion's 8.9 MB on disk, more than the limit of 2.",
    ]
    # 1.05 / 0.7 is 1.5000000000000002 in floats.
    slow = replace(measured(better), latency_ms=1.05)
    assert judge(SETTINGS, HOLDOUT, slow, replace(measured(champion), latency_ms=0.7)).decision == "promoted"


def test_a_class_collapses_although_the_total_is_better() -> None:
    verdict = against(answers(sock=range(12)), answers(coat=range(40), dress=range(40), sock=range(2)))
    assert verdict.evidence["gain"]["low"] > 0
    assert verdict.decision == "rejected"
    assert verdict.reasons[0].startswith(
        "Class 'sock' collapses: its recall falls from 0.900 to 0.400 on 20 holdout images, by 0.500 with a 95% "
        "interval of 0."
    )
    assert verdict.reasons[0].endswith(", more than the limit of 0.2.")
    assert "scores better than champion version 7: " in verdict.reasons[1]
    sock = verdict.evidence["classes"]["sock"]
    assert (sock["support"], sock["candidate_recall"], sock["champion_recall"]) == (20, 0.4, 0.9)
    assert sock["recall_gain"]["value"] == -0.5


def test_a_class_may_fall_by_the_limit_and_by_what_may_be_chance() -> None:
    """A fall by 20 of 100 is one by the limit, one by 21 is more."""
    far_worse = {"coat": range(60), "dress": range(60)}
    at_the_limit = against(answers(shirt=range(30)), answers(shirt=range(10), **far_worse))
    assert at_the_limit.evidence["classes"]["shirt"]["recall_gain"]["high"] < 0
    assert at_the_limit.decision == "promoted"
    beyond = against(answers(shirt=range(31)), answers(shirt=range(10), **far_worse))
    assert beyond.decision == "rejected"
    assert "Class 'shirt' collapses: its recall falls from 0.900 to 0.690 on 100" in beyond.reasons[0]
    # Eleven socks lost and six others won: 0.25 lower, but by chance perhaps.
    noisy = against(answers(sock=range(11)), answers(sock=range(11, 17), **far_worse))
    assert noisy.evidence["classes"]["sock"]["recall_gain"]["value"] == -0.25
    assert noisy.evidence["classes"]["sock"]["recall_gain"]["high"] >= 0
    assert noisy.decision == "promoted"


def test_collapse_counts_groups_not_rows() -> None:
    """The ten lost socks are ten pictures of one sender's."""
    group = [*HOLDOUT.group[:300], *["one sender"] * 10, *HOLDOUT.group[310:]]
    candidate, champion = measured(answers(sock=range(10))), measured(answers(coat=range(60)), version="7")
    assert judge(SETTINGS, HOLDOUT, candidate, champion).decision == "rejected"
    assert judge(SETTINGS, Holdout(ACTUAL, group), candidate, champion).decision == "promoted"


def test_the_first_model() -> None:
    verdict = judge(SETTINGS, HOLDOUT, measured(answers(coat=range(10)), version="1"), None)
    assert verdict.decision == "promoted"
    assert verdict.reasons == [
        "There is no champion to compare it with: this is the first model.",
        f"Version 1 reaches the floors on the holdout: weighted F1 {weighted_f1(coat=range(10)):.3f} (floor 0.5) and "
        f"macro F1 {(2 * 0.9 / 1.9 + 3) / 4:.3f} (floor 0.4).",
    ]
    assert verdict.evidence["champion"] is None
    assert verdict.evidence["gain"] is None
    assert verdict.evidence["never_answered_by_champion"] is None


def test_the_first_model_below_the_floors() -> None:
    missing = {"coat": range(100), "dress": range(100), "shirt": range(60), "sock": range(20)}
    verdict = judge(SETTINGS, HOLDOUT, measured(answers(**missing)), None)
    f1 = 2 * 0.4 / 1.4
    assert verdict.decision == "rejected"
    assert verdict.reasons == [
        f"The candidate has a weighted F1 of {100 / 320 * f1:.3f} on the holdout, below the floor of 0.5.",
        f"The candidate has a macro F1 of {f1 / 4:.3f} on the holdout, below the floor of 0.4.",
        "There is no champion to compare it with: this is the first model.",
    ]


def test_a_floor_holds_however_bad_the_champion() -> None:
    """Only macro F1 misses: its floor counts every class alike."""
    candidate, champion = answers(sock=range(20)), answers(coat=range(50), sock=range(20))
    floors = SETTINGS.floors.model_copy(update={"f1_macro": 0.7504})
    strict = SETTINGS.model_copy(update={"floors": floors})
    verdict = judge(strict, HOLDOUT, measured(candidate), measured(champion, version="7"))
    assert verdict.decision == "rejected"
    assert verdict.reasons[0] == "The candidate has a macro F1 of 0.750 on the holdout, below the floor of 0.7504."
    assert "scores better than champion version 7: " in verdict.reasons[1]
    reached = strict.model_copy(update={"floors": floors.model_copy(update={"f1_macro": 0.75})})
    assert judge(reached, HOLDOUT, measured(candidate), measured(champion, version="7")).decision == "promoted"


def test_a_number_just_beyond_its_limit_is_not_shown_as_the_limit() -> None:
    floors = SETTINGS.floors.model_copy(update={"f1_macro": 0.9856})
    strict = SETTINGS.model_copy(update={"floors": floors})
    verdict = judge(strict, HOLDOUT, measured(answers(sock=range(2), coat=range(1))), None)
    assert 0.985585 < (2 * 0.9 / 1.9 + 2 * 0.99 / 1.99 + 2) / 4 < 0.985595
    assert "a macro F1 of 0.98559 on the holdout, below the floor of 0.9856." in verdict.reasons[0]
    slow = against(answers(coat=range(3)), answers(coat=range(20), dress=range(10)), latency_ms=6.04)
    assert "takes 1.51 times the champion's 4.0 ms" in slow.reasons[0]


def test_a_score_on_the_floor_reaches_it() -> None:
    """A recall of 1/4 in each class is an F1 of 0.4, but summed in floats 0.39999999999999997."""
    actual = [label for label, n in (("a", 4), ("b", 4), ("c", 20)) for _ in range(n)]
    predicted = [label if row % 4 == 0 else "" for row, label in enumerate(actual)]
    low = SETTINGS.model_copy(update={"floors": SETTINGS.floors.model_copy(update={"f1_weighted": 0.4})})
    verdict = judge(low, Holdout(actual, [str(row) for row in range(28)]), measured(predicted), None)
    assert verdict.decision == "promoted"
    assert "weighted F1 0.400 (floor 0.4) and macro F1 0.400 (floor 0.4)" in verdict.reasons[1]


def test_a_gain_whose_interval_begins_at_the_least_is_not_above_it() -> None:
    """One row better of 320: no resample shows a loss, but 37% no gain."""
    verdict = against(answers(), answers(coat=range(1)))
    assert verdict.evidence["gain"]["low"] == 0
    assert verdict.evidence["gain"]["value"] > 0
    assert verdict.decision == "challenger"
    assert "but within noise: weighted F1 1.000 against 0.998 on 320" in verdict.reasons[0]
    candidate, champion = measured(answers()), measured(answers(coat=range(20)), version="7")
    low = judge(SETTINGS, HOLDOUT, candidate, champion).evidence["gain"]["low"]
    asked = SETTINGS.model_copy(update={"min_gain": low})
    assert judge(asked, HOLDOUT, candidate, champion).decision == "challenger"


def test_the_champion_is_broken() -> None:
    broken = Broken("7", "model.onnx is missing")
    verdict = judge(SETTINGS, HOLDOUT, measured(ACTUAL), broken)
    sentence = "Champion version 7 is broken, so it could not be compared with: model.onnx is missing."
    assert verdict.decision == "promoted"
    assert verdict.reasons[0] == sentence
    assert "reaches the floors on the holdout: weighted F1 1.000" in verdict.reasons[1]
    assert verdict.evidence["champion"] == {"version": "7", "broken": "model.onnx is missing"}
    poor = judge(SETTINGS, HOLDOUT, measured([""] * 320), broken)
    assert poor.decision == "rejected"
    assert poor.reasons == [
        "The candidate has a weighted F1 of 0.000 on the holdout, below the floor of 0.5.",
        "The candidate has a macro F1 of 0.000 on the holdout, below the floor of 0.4.",
        sentence,
    ]


@pytest.mark.parametrize("champion", [None, Broken("7", "no file"), measured(ACTUAL, version="7")])
def test_the_candidate_is_broken(champion: Measured | Broken | None) -> None:
    verdict = judge(SETTINGS, HOLDOUT, Broken("candidate", "torch could not be imported"), champion)
    assert verdict.decision == "rejected"
    assert verdict.reasons[0] == "The candidate is broken: torch could not be imported."
    assert verdict.evidence["candidate"] == {"version": "candidate", "broken": "torch could not be imported"}
    assert verdict.evidence["gain"] is None
    if isinstance(champion, Measured):
        assert verdict.evidence["champion"]["f1_weighted"] == 1
        assert verdict.evidence["classes"]["sock"]["candidate_recall"] is None
        assert len(verdict.reasons) == 1


def test_an_empty_holdout() -> None:
    empty = Holdout([], [])
    sentence = "The holdout is empty, so nothing can be judged: `split.holdout.fraction` in params.yaml is 0."
    verdict = judge(SETTINGS, empty, measured([]), None)
    assert verdict.decision == "rejected"
    assert verdict.reasons[0] == sentence
    assert verdict.evidence["classes"] == {}
    against_champion = judge(SETTINGS, empty, measured([], latency_ms=8.4), measured([], version="7"))
    assert against_champion.reasons == [
        sentence,
        "The candidate takes 2.1 times the champion's 4.0 ms an image, more than the limit of 1.5.",
    ]
    assert judge(SETTINGS, empty, Broken("8", "no file"), None).reasons[:2] == [
        "Version 8 is broken: no file.",
        sentence,
    ]


def test_a_class_that_is_new_since_the_champion() -> None:
    """The champion takes every sock for a shirt: wrong rows for it, whatever the candidate does with them."""
    champion = ["shirt" if label == "sock" else label for label in ACTUAL]
    verdict = against(answers(sock=range(5)), champion)
    assert verdict.decision == "promoted"
    assert verdict.evidence["never_answered_by_champion"] == ["sock"]
    sock = verdict.evidence["classes"]["sock"]
    assert (sock["support"], sock["candidate_recall"], sock["champion_recall"]) == (20, 0.75, 0)
    assert sock["recall_gain"]["value"] == 0.75
    assert verdict.evidence["champion"]["f1_weighted"] == pytest.approx((200 + 100 * 200 / 220) / 320)
    assert against(ACTUAL, answers()).evidence["never_answered_by_champion"] == []
    assert against(champion, champion).decision == "challenger"


def test_all_reasons_are_named_the_deciding_ones_first() -> None:
    missing = {"coat": range(100), "dress": range(60), "shirt": range(60), "sock": range(18)}
    verdict = against(answers(**missing), answers(coat=range(5)), latency_ms=8.4, size_bytes=89_400_000)
    assert verdict.decision == "rejected"
    keys = ["weighted F1 of", "macro F1 of", "scores lower", "'coat'", "'sock'", "'dress'", "'shirt'", "ms an image"]
    assert [key in reason for key, reason in zip(keys, verdict.reasons, strict=False)] == [True] * len(keys)
    assert verdict.reasons[-1].startswith("The candidate fills 10.0 times the champion's 8.9 MB on disk")
    assert len(verdict.reasons) == len(keys) + 1
    for reason in verdict.reasons:
        assert reason[0].isupper()
        assert reason.endswith(".")


def test_evidence_always_has_the_same_keys() -> None:
    cases: list[tuple[Holdout, Any, Any]] = [
        (HOLDOUT, measured(ACTUAL), measured(answers(coat=range(9)), version="7")),
        (HOLDOUT, measured(ACTUAL), None),
        (HOLDOUT, Broken("8", "no file"), Broken("7", "no file")),
        (Holdout([], []), measured([]), measured([], version="7")),
    ]
    found = [judge(SETTINGS, *case).evidence for case in cases]
    assert all(list(evidence) == list(found[0]) for evidence in found)
    assert found[0]["settings"] == SETTINGS.model_dump()
    assert found[0]["n_resamples"] == 2000
    for evidence in found:
        assert json.loads(json.dumps(evidence, allow_nan=False)) == evidence


def test_what_no_caller_may_ask() -> None:
    good = measured(ACTUAL)
    with pytest.raises(ValueError, match="Expected 320 entries in `group`, one a row, but got 319"):
        judge(SETTINGS, Holdout(ACTUAL, HOLDOUT.group[1:]), good, None)
    with pytest.raises(ValueError, match="`predicted of version 7`, one a row, but got 319"):
        judge(SETTINGS, HOLDOUT, good, measured(ACTUAL[1:], version="7"))
    with pytest.raises(ValueError, match="`predicted of version candidate`"):
        judge(SETTINGS, HOLDOUT, measured([]), Broken("7", "no file"))
    with pytest.raises(ValueError, match="a label for every holdout row"):
        judge(SETTINGS, Holdout(["", *ACTUAL[1:]], HOLDOUT.group), good, None)
    for cost in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`latency_ms` of version 7 to be positive"):
            judge(SETTINGS, HOLDOUT, good, measured(ACTUAL, version="7", latency_ms=cost))
    with pytest.raises(ValueError, match="`confidence` to be between 0 and 1, but got 95"):
        paired_bootstrap(HOLDOUT, ACTUAL, ACTUAL, 95)
    with pytest.raises(ValueError, match="`champion`, one a row, but got 1"):
        paired_bootstrap(HOLDOUT, ACTUAL, ["coat"], 0.95)
    with pytest.raises(ValueError, match="at least one holdout row"):
        paired_bootstrap(Holdout([], []), [], [], 0.95)


def test_imports_neither_mlflow_nor_torch() -> None:
    code = "import sys, pipeline_steps.gate; print(sorted({'mlflow', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
