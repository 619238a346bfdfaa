"""bootstrap.py and gate.py with several targets: means, the same resamples for all, and what is said of each."""

import json
from collections import Counter
from itertools import product
from random import Random

import numpy as np
import pytest
from gate_cases import ACTUAL, HOLDOUT, SETTINGS, answers, interval, measured, one_target, single, weighted_f1
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score
from sklearn.preprocessing import MultiLabelBinarizer

from pipeline_steps.bootstrap import N_RESAMPLES, Answers, Estimate, Holdout, f1_weighted_interval, paired_bootstrap
from pipeline_steps.gate import Broken, Unlike, judge

pytestmark = pytest.mark.filterwarnings("error")

CLASSES = {"colour": ["blue", "red"], "tags": ["new", "striped", "wool"]}
UNLIKE = Unlike("7", ["label"], ["colour", "tags (multilabel)"])


def drawn(seed: int, n_groups: int) -> tuple[Holdout, Answers, Answers]:
    """Groups of one to three rows with a multiclass and a multilabel target; answers may be none."""
    random = Random(seed)
    group = [f"g{number}" for number in range(n_groups) for _ in range(random.randint(1, 3))]

    def several(least: int) -> tuple[str, ...]:
        return tuple(sorted(random.sample(CLASSES["tags"], random.randint(least, 3))))

    actual = {
        "colour": [(random.choice(CLASSES["colour"]),) for _ in group],
        "tags": [several(1) for _ in group],
    }

    def answer() -> Answers:
        return {
            "colour": [
                row if random.random() < 0.6 else random.choice([(), ("red",), ("pink",)]) for row in actual["colour"]
            ],
            "tags": [row if random.random() < 0.5 else several(0) for row in actual["tags"]],
        }

    return Holdout(actual, group), answer(), answer()


def by_scikit_learn(actual: Answers, predicted: Answers, average: str) -> dict[str, float]:
    """F1 by target over the classes that occur."""
    found = {}
    for target, rows in actual.items():
        names = sorted({label for row in rows for label in row})
        truth, answer = (table(one, names) for one in (rows, predicted[target]))
        found[target] = float(f1_score(truth, answer, average=average, zero_division=0))
    return found


def table(rows: list[tuple[str, ...]], names: list[str]) -> np.ndarray:
    known = [[label for label in row if label in names] for row in rows]
    return MultiLabelBinarizer(classes=names).fit_transform(known)


def chosen(answered: Answers, rows: list[int]) -> Answers:
    return {target: [labels[row] for row in rows] for target, labels in answered.items()}


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_scores_are_those_of_scikit_learn(seed: int) -> None:
    holdout, candidate, champion = drawn(seed, n_groups=30)
    evidence = judge(SETTINGS, holdout, measured(candidate), measured(champion, version="7")).evidence
    for name, predicted in (("candidate", candidate), ("champion", champion)):
        for average in ("weighted", "macro"):
            expected = by_scikit_learn(holdout.actual, predicted, average)
            assert evidence[name][f"f1_{average}"] == pytest.approx(np.mean(list(expected.values())))
            for target, score in expected.items():
                assert evidence["targets"][target][name][f"f1_{average}"] == pytest.approx(score)
        for target, names in CLASSES.items():
            truth, answer = (table(rows[target], names) for rows in (holdout.actual, predicted))
            recalls = recall_score(truth, answer, average=None)
            for label, recall, support in zip(names, recalls, truth.sum(axis=0), strict=True):
                of_class = evidence["targets"][target]["classes"][label]
                assert of_class[f"{name}_recall"] == pytest.approx(recall)
                assert of_class["support"] == support
    gains = [target["gain"]["value"] for target in evidence["targets"].values()]
    assert evidence["gain"]["value"] == pytest.approx(np.mean(gains))
    json.dumps(evidence, allow_nan=False)


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_intervals_are_percentiles_of_all_possible_resamples(seed: int) -> None:
    """Four groups can be drawn in 4^4 ways, all equally likely; each is scored by counting, target by target."""
    holdout, candidate, champion = drawn(seed, n_groups=4)
    rows = [[row for row, of in enumerate(holdout.group) if of == f"g{group}"] for group in range(4)]

    def gains(resample: list[int]) -> list[float]:
        actual, one, other = (chosen(answered, resample) for answered in (holdout.actual, candidate, champion))
        f1 = [counted_f1(actual[target], one[target]) - counted_f1(actual[target], other[target]) for target in actual]
        return [sum(f1) / 2, *f1]

    found = paired_bootstrap(holdout, candidate, champion, confidence=0.8).f1_weighted
    resamples = Counter(tuple(sorted(draw)) for draw in product(range(4), repeat=4))
    every = [(gains([row for group in draw for row in rows[group]]), times) for draw, times in resamples.items()]
    observed, error = gains(list(range(len(holdout.group)))), 5 * (0.1 * 0.9 / N_RESAMPLES) ** 0.5
    for place, estimate in enumerate([found.mean, found.targets["colour"], found.targets["tags"]]):
        assert estimate.value == pytest.approx(observed[place], abs=1e-9)
        for end, share in ((estimate.low, 0.1), (estimate.high, 0.9)):
            assert sum(times for gain, times in every if gain[place] < end - 1e-9) / 4**4 <= share + error
            assert sum(times for gain, times in every if gain[place] < end + 1e-9) / 4**4 >= share - error


def counted_f1(actual: list[tuple[str, ...]], predicted: list[tuple[str, ...]]) -> float:
    total, weights = 0.0, 0
    for label in {label for row in actual for label in row}:
        support = sum(label in row for row in actual)
        answered = sum(label in row for row in predicted)
        right = sum(label in row and label in other for row, other in zip(actual, predicted, strict=True))
        total, weights = total + support * 2 * right / (support + answered), weights + support
    return total / weights


def test_every_target_is_scored_on_the_same_resamples() -> None:
    """Two targets that are copies of one: with resamples of their own, the mean's interval would be narrower."""
    holdout, candidate, champion = drawn(3, n_groups=60)
    alone = paired_bootstrap(*(only(part, "tags") for part in (holdout, candidate, champion)), 0.95)
    twice = paired_bootstrap(*(doubled(part, "tags") for part in (holdout, candidate, champion)), 0.95)
    assert twice.f1_weighted.mean == alone.f1_weighted.mean == twice.f1_weighted.targets["again"]
    assert twice.recall == {"tags": alone.recall["tags"], "again": alone.recall["tags"]}
    assert f1_weighted_interval(doubled(holdout, "tags"), doubled(candidate, "tags"), 0.95).mean == (
        f1_weighted_interval(only(holdout, "tags"), only(candidate, "tags"), 0.95).mean
    )


def only(part: Holdout | Answers, target: str) -> Holdout | Answers:
    if isinstance(part, Holdout):
        return Holdout(only(part.actual, target), part.group)
    return {target: part[target]}


def doubled(part: Holdout | Answers, target: str) -> Holdout | Answers:
    if isinstance(part, Holdout):
        return Holdout(doubled(part.actual, target), part.group)
    return {target: part[target], "again": part[target]}


def test_a_multilabel_target_of_one_label_a_row_is_as_a_multiclass_one() -> None:
    right, wrong = answers(coat=range(5)), answers(dress=range(20), sock=range(3))
    as_lists = Holdout({"tags": [(label,) for label in ACTUAL]}, HOLDOUT.group)
    found = f1_weighted_interval(as_lists, {"tags": single(right)["label"]}, 0.95)
    assert found.mean == interval(HOLDOUT, right, 0.95)
    gains = paired_bootstrap(as_lists, {"tags": single(right)["label"]}, {"tags": single(wrong)["label"]}, 0.95)
    expected = paired_bootstrap(HOLDOUT, single(right), single(wrong), 0.95)
    assert (gains.f1_weighted.mean, gains.recall["tags"]) == (expected.f1_weighted.mean, expected.recall["label"])


def test_labels_too_many_cost_precision() -> None:
    """By hand: of ten rows all are a and all answered a and b, b occurs once; F1 of a is 1, of b 2 / (1 + 10)."""
    holdout = Holdout({"tags": [("a", "b"), *[("a",)] * 9]}, list("0123456789"))
    found = judge(SETTINGS, holdout, measured({"tags": [("a", "b")] * 10}), None).evidence["candidate"]
    assert found["f1_weighted"] == pytest.approx((10 * 1 + 1 * 2 / 11) / 11)
    assert found["f1_macro"] == pytest.approx((1 + 2 / 11) / 2)


def two(label: list[str], other: list[str]) -> dict[str, list[tuple[str, ...]]]:
    return {"garment": single(label)["label"], "second": single(other)["label"]}


TWO = Holdout(two(ACTUAL, ACTUAL), HOLDOUT.group)


def test_a_class_that_collapses_is_named_with_its_target() -> None:
    candidate = measured(two(answers(), answers(sock=range(12))), version="8")
    champion = measured(two(answers(coat=range(40), dress=range(40)), answers(sock=range(2))), version="7")
    verdict = judge(SETTINGS, TWO, candidate, champion)
    assert verdict.decision == "rejected"
    assert verdict.reasons[0].startswith(
        "Class 'sock' of second collapses: its recall falls from 0.900 to 0.400 on 20 holdout images, by 0.500 with a "
    )
    assert len([reason for reason in verdict.reasons if "collapses" in reason]) == 1
    own = (1 + weighted_f1(sock=range(12))) / 2
    others = (weighted_f1(coat=range(40), dress=range(40)) + weighted_f1(sock=range(2))) / 2
    assert (
        f"weighted F1 {own:.3f} against {others:.3f} (mean of 2 targets) on 320 holdout images, a gain of "
        f"{own - others:+.3f} with"
    ) in verdict.reasons[1]
    assert verdict.evidence["targets"]["garment"]["classes"]["sock"]["recall_gain"]["value"] == 0


def test_a_gain_in_one_target_may_pay_for_a_loss_in_another() -> None:
    better, worse = answers(coat=range(60)), answers(coat=range(12), dress=range(12))
    verdict = judge(SETTINGS, TWO, measured(two(ACTUAL, worse)), measured(two(better, ACTUAL), version="7"))
    targets = verdict.evidence["targets"]
    assert targets["second"]["gain"]["high"] < 0 < targets["garment"]["gain"]["low"]
    assert verdict.evidence["gain"]["low"] > 0
    assert verdict.decision == "promoted"


def test_floors_are_of_the_mean() -> None:
    none = [""] * len(ACTUAL)
    half = judge(SETTINGS, TWO, measured(two(ACTUAL, none)), None)
    assert half.decision == "promoted"
    assert half.reasons[1] == (
        "The candidate reaches the floors on the holdout (mean of 2 targets): weighted F1 0.500 (floor 0.5) and macro "
        "F1 0.500 (floor 0.4)."
    )
    less = judge(SETTINGS, TWO, measured(two(answers(coat=range(1)), none)), None)
    assert less.decision == "rejected"
    assert less.reasons[0].startswith("The candidate has a weighted F1 of 0.499")
    assert less.reasons[0].endswith(" on the holdout (mean of 2 targets), below the floor of 0.5.")


def test_the_same_answers_in_every_target_gain_nothing() -> None:
    verdict = judge(SETTINGS, TWO, measured(two(ACTUAL, ACTUAL)), measured(two(ACTUAL, ACTUAL), version="7"))
    assert verdict.decision == "challenger"
    assert "gives the same answers as champion version 7 on all 320 holdout images" in verdict.reasons[0]
    other = judge(
        SETTINGS, TWO, measured(two(ACTUAL, ACTUAL)), measured(two(ACTUAL, answers(coat=range(1))), version="7")
    )
    assert "scores better" in other.reasons[0]


def test_a_champion_that_answers_other_targets_is_not_compared() -> None:
    """However slow: nothing it costs is a limit either, as for a broken one."""
    verdict = judge(SETTINGS, TWO, measured(two(ACTUAL, ACTUAL), version="8", latency_ms=1e6), UNLIKE)
    assert verdict.decision == "challenger"
    not_compared = (
        "Champion version 7 answers other targets (label) than are asked for now (colour, tags (multilabel)), so the "
        "two cannot be compared"
    )
    assert verdict.reasons[0] == (f"{not_compared}, and only a person can promote it: with `pleat approve 8`.")
    dry = judge(SETTINGS, TWO, measured(two(ACTUAL, ACTUAL)), UNLIKE)
    assert dry.reasons[0] == f"{not_compared}, and only a person can promote the candidate."
    broken = judge(SETTINGS, TWO, Broken("8", "it does not load"), UNLIKE)
    assert (broken.decision, broken.reasons[1]) == ("rejected", f"{not_compared}.")
    assert "reaches the floors on the holdout (mean of 2 targets)" in verdict.reasons[1]
    assert verdict.evidence["champion"] == {
        "version": "7", "answers": ["label"], "asked": ["colour", "tags (multilabel)"],
    }  # fmt: skip
    assert verdict.evidence["gain"] is verdict.evidence["cost_ratios"] is None
    assert verdict.evidence["targets"]["second"]["never_answered_by_champion"] is None
    json.dumps(verdict.evidence, allow_nan=False)


def test_beside_a_champion_of_other_targets_the_floors_hold() -> None:
    verdict = judge(SETTINGS, TWO, measured(two([""] * 320, [""] * 320)), UNLIKE)
    assert verdict.decision == "rejected"
    assert ["floor of 0.5" in verdict.reasons[0], "floor of 0.4" in verdict.reasons[1]] == [True, True]
    assert not any("pleat approve" in reason for reason in verdict.reasons), "nobody can approve it"


def test_a_class_the_champion_never_answers_is_told_by_target() -> None:
    champion = two(["shirt" if label == "sock" else label for label in ACTUAL], ACTUAL)
    evidence = judge(SETTINGS, TWO, measured(two(ACTUAL, ACTUAL)), measured(champion, version="7")).evidence
    never = {name: target["never_answered_by_champion"] for name, target in evidence["targets"].items()}
    assert never == {"garment": ["sock"], "second": []}


def test_an_empty_holdout_has_its_targets() -> None:
    empty = Holdout({"garment": [], "second": []}, [])
    verdict = judge(SETTINGS, empty, measured({"garment": [], "second": []}), None)
    assert "The holdout is empty" in verdict.reasons[0]
    assert verdict.evidence["targets"]["second"] == {
        "candidate": None, "champion": None, "gain": None, "classes": {}, "never_answered_by_champion": None,
    }  # fmt: skip


def test_what_no_caller_may_ask() -> None:
    with pytest.raises(ValueError, match="to answer the targets garment, second, but it answers label"):
        judge(SETTINGS, TWO, measured(ACTUAL), None)
    with pytest.raises(ValueError, match="Expected 320 entries in `candidate`, one a row, but got 319 for second"):
        paired_bootstrap(TWO, two(ACTUAL, ACTUAL[1:]), two(ACTUAL, ACTUAL), 0.95)
    with pytest.raises(ValueError, match="a label for every holdout row"):
        judge(SETTINGS, Holdout({"tags": [("a",), ()]}, ["0", "1"]), measured({"tags": [(), ()]}), None)
    one_group = one_target(["a", "b"], ["same", "same"])
    assert interval(one_group, ["a", "b"], 0.95) == Estimate(1, 0, 1)
