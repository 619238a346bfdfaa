"""A holdout of four classes and models that answer it with known mistakes."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

from pipeline_steps.bootstrap import Answers, Estimate, Holdout, Labels, f1_weighted_interval, paired_bootstrap
from pipeline_steps.gate import Measured, Verdict, judge
from pipeline_steps.params import Promotion

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
FIRST_ROW = {"coat": 0, "dress": 100, "shirt": 200, "sock": 300}


def single(labels: Sequence[str]) -> dict[str, list[Labels]]:
    """Answers of one multiclass target; "" is no answer."""
    return {"label": [(one,) if one else () for one in labels]}


def one_target(actual: Sequence[str], group: Sequence[str]) -> Holdout:
    """A holdout of one multiclass target."""
    return Holdout(single(actual), list(group))


def actual_of(holdout: Holdout) -> list[str]:
    """The labels of `one_target`."""
    return [label for (label,) in holdout.actual["label"]]


HOLDOUT = one_target(ACTUAL, [f"sender {row}" for row in range(len(ACTUAL))])


class Gained(NamedTuple):
    """The gain in weighted F1, and those in recall by class."""

    f1_weighted: Estimate
    recall: dict[str, Estimate]


def bootstrap(
    holdout: Holdout, candidate: Sequence[str], champion: Sequence[str], confidence: float, seed: int = 0
) -> Gained:
    """`paired_bootstrap` of one multiclass target."""
    gains = paired_bootstrap(holdout, single(candidate), single(champion), confidence, seed)
    assert gains.f1_weighted.targets == {"label": gains.f1_weighted.mean}
    return Gained(gains.f1_weighted.mean, gains.recall["label"])


def interval(holdout: Holdout, predicted: Sequence[str], confidence: float, seed: int = 0) -> Estimate:
    """`f1_weighted_interval` of one multiclass target."""
    found = f1_weighted_interval(holdout, single(predicted), confidence, seed)
    assert found.targets == {"label": found.mean}
    return found.mean


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


def measured(predicted: Sequence[str] | Answers, version: str = "candidate", **costs: float) -> Measured:
    """A model with these answers, in a list those of one multiclass target."""
    given = predicted if isinstance(predicted, dict) else single(predicted)
    return replace(Measured(version, given, latency_ms=4.0, memory_bytes=512_000_000, size_bytes=8_940_000), **costs)


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

    return one_target(actual, group), [answer(label) for label in actual], [answer(label) for label in actual]
