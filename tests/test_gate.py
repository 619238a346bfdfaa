"""gate.py: one case for each decision, and the sentences that go with it."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from gate_cases import (
    ACTUAL,
    HOLDOUT,
    SETTINGS,
    against,
    answers,
    bootstrap,
    measured,
    one_target,
    weighted_f1,
)

from pipeline_steps.bootstrap import Holdout
from pipeline_steps.gate import Broken, Measured, judge

pytestmark = pytest.mark.filterwarnings("error")


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
    sock = verdict.evidence["targets"]["label"]["classes"]["sock"]
    assert (sock["support"], sock["candidate_recall"], sock["champion_recall"]) == (20, 0.4, 0.9)
    assert sock["recall_gain"]["value"] == -0.5


def test_a_class_may_fall_by_the_limit_and_by_what_may_be_chance() -> None:
    """A fall by 20 of 100 is one by the limit, one by 21 is more."""
    far_worse = {"coat": range(60), "dress": range(60)}
    at_the_limit = against(answers(shirt=range(30)), answers(shirt=range(10), **far_worse))
    assert at_the_limit.evidence["targets"]["label"]["classes"]["shirt"]["recall_gain"]["high"] < 0
    assert at_the_limit.decision == "promoted"
    beyond = against(answers(shirt=range(31)), answers(shirt=range(10), **far_worse))
    assert beyond.decision == "rejected"
    assert "Class 'shirt' collapses: its recall falls from 0.900 to 0.690 on 100" in beyond.reasons[0]
    # Eleven socks lost and six others won: 0.25 lower, but by chance perhaps.
    noisy = against(answers(sock=range(11)), answers(sock=range(11, 17), **far_worse))
    assert noisy.evidence["targets"]["label"]["classes"]["sock"]["recall_gain"]["value"] == -0.25
    assert noisy.evidence["targets"]["label"]["classes"]["sock"]["recall_gain"]["high"] >= 0
    assert noisy.decision == "promoted"


def test_collapse_counts_groups_not_rows() -> None:
    """The ten lost socks are ten pictures of one sender's."""
    group = [*HOLDOUT.group[:300], *["one sender"] * 10, *HOLDOUT.group[310:]]
    candidate, champion = measured(answers(sock=range(10))), measured(answers(coat=range(60)), version="7")
    assert judge(SETTINGS, HOLDOUT, candidate, champion).decision == "rejected"
    assert judge(SETTINGS, one_target(ACTUAL, group), candidate, champion).decision == "promoted"


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
    assert verdict.evidence["targets"]["label"]["never_answered_by_champion"] is None


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
    verdict = judge(low, one_target(actual, [str(row) for row in range(28)]), measured(predicted), None)
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
        assert verdict.evidence["targets"]["label"]["classes"]["sock"]["candidate_recall"] is None
        assert len(verdict.reasons) == 1


def test_an_empty_holdout() -> None:
    empty = one_target([], [])
    sentence = "The holdout is empty, so nothing can be judged: `split.holdout.fraction` in params.yaml is 0."
    verdict = judge(SETTINGS, empty, measured([]), None)
    assert verdict.decision == "rejected"
    assert verdict.reasons[0] == sentence
    assert verdict.evidence["targets"]["label"]["classes"] == {}
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
    assert verdict.evidence["targets"]["label"]["never_answered_by_champion"] == ["sock"]
    sock = verdict.evidence["targets"]["label"]["classes"]["sock"]
    assert (sock["support"], sock["candidate_recall"], sock["champion_recall"]) == (20, 0.75, 0)
    assert sock["recall_gain"]["value"] == 0.75
    assert verdict.evidence["champion"]["f1_weighted"] == pytest.approx((200 + 100 * 200 / 220) / 320)
    assert against(ACTUAL, answers()).evidence["targets"]["label"]["never_answered_by_champion"] == []
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
        (one_target([], []), measured([]), measured([], version="7")),
    ]
    found = [judge(SETTINGS, *case).evidence for case in cases]
    assert all(list(evidence) == list(found[0]) for evidence in found)
    assert found[0]["settings"] == SETTINGS.model_dump()
    assert found[0]["n_resamples"] == 2000
    for evidence in found:
        assert json.loads(json.dumps(evidence, allow_nan=False)) == evidence


def test_what_no_caller_may_ask() -> None:
    good = measured(ACTUAL)
    with pytest.raises(ValueError, match="Expected 319 entries in `actual`, one a row, but got 320 for label"):
        judge(SETTINGS, one_target(ACTUAL, HOLDOUT.group[1:]), good, None)
    with pytest.raises(ValueError, match="`predicted of version 7`, one a row, but got 319"):
        judge(SETTINGS, HOLDOUT, good, measured(ACTUAL[1:], version="7"))
    with pytest.raises(ValueError, match="`predicted of version candidate`"):
        judge(SETTINGS, HOLDOUT, measured([]), Broken("7", "no file"))
    with pytest.raises(ValueError, match="a label for every holdout row"):
        judge(SETTINGS, one_target(["", *ACTUAL[1:]], HOLDOUT.group), good, None)
    for cost in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`latency_ms` of version 7 to be positive"):
            judge(SETTINGS, HOLDOUT, good, measured(ACTUAL, version="7", latency_ms=cost))
    with pytest.raises(ValueError, match="`confidence` to be between 0 and 1, but got 95"):
        bootstrap(HOLDOUT, ACTUAL, ACTUAL, 95)
    with pytest.raises(ValueError, match="`champion`, one a row, but got 1"):
        bootstrap(HOLDOUT, ACTUAL, ["coat"], 0.95)
    with pytest.raises(ValueError, match="at least one holdout row"):
        bootstrap(one_target([], []), [], [], 0.95)


def test_imports_neither_mlflow_nor_torch() -> None:
    code = "import sys, pipeline_steps.gate; print(sorted({'mlflow', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
