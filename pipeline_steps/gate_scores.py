"""A model's scores on the holdout, over the classes that occur there, as the promotion gate compares and tells them."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline_steps.bootstrap import DECIMALS, Answers, Gains, Holdout, class_counts


@dataclass(frozen=True)
class TargetScores:
    """Scores of one model in one target."""

    f1_weighted: float
    f1_macro: float
    recall: dict[str, float]  # of each class


@dataclass(frozen=True)
class Scores:
    """Scores of one model: means over the targets, and by target."""

    f1_weighted: float
    f1_macro: float
    targets: dict[str, TargetScores]

    @property
    def over(self) -> str:
        """What a sentence adds to a mean over several targets."""
        return f" (mean of {len(self.targets)} targets)" if len(self.targets) > 1 else ""


def scores_of(holdout: Holdout, predicted: Answers) -> Scores:
    """Scores of a model's answers; `holdout` has at least one row, and each of them a label."""
    targets = {}
    for target, actual in holdout.actual.items():
        classes = holdout.classes(target)
        support, right, answered = class_counts(actual, predicted[target], classes)
        f1 = 2 * right / (support + answered)
        targets[target] = TargetScores(
            f1_weighted=round(float(np.average(f1, weights=support)), DECIMALS),
            f1_macro=round(float(f1.mean()), DECIMALS),
            recall=dict(zip(classes, (right / support).tolist(), strict=True)),
        )
    found = targets.values()
    return Scores(
        f1_weighted=round(sum(scores.f1_weighted for scores in found) / len(found), DECIMALS),
        f1_macro=round(sum(scores.f1_macro for scores in found) / len(found), DECIMALS),
        targets=targets,
    )


def target_evidence(
    holdout: Holdout,
    target: str,
    candidate: Scores | None,
    champion: Scores | None,
    gains: Gains | None,
    champion_answers: Answers | None,
) -> dict[str, Any]:
    """The figures of one target, as `gate.Verdict` tells them; None for what could not be measured."""
    of_candidate, of_champion = (model.targets[target] if model else None for model in (candidate, champion))
    answered = {label for labels in champion_answers[target] for label in labels} if champion_answers else set()
    return {
        "candidate": _f1(of_candidate),
        "champion": _f1(of_champion),
        "gain": asdict(gains.f1_weighted.targets[target]) if gains else None,
        "classes": {
            label: {
                "support": support(holdout, target, label),
                "candidate_recall": of_candidate.recall[label] if of_candidate else None,
                "champion_recall": of_champion.recall[label] if of_champion else None,
                "recall_gain": asdict(gains.recall[target][label]) if gains else None,
            }
            for label in holdout.classes(target)
        },
        "never_answered_by_champion": sorted(set(holdout.classes(target)) - answered) if champion_answers else None,
    }


def support(holdout: Holdout, target: str, label: str) -> int:
    """How many rows have the label."""
    return sum(label in labels for labels in holdout.actual[target])


def _f1(scores: TargetScores | None) -> dict[str, float] | None:
    return {"f1_weighted": scores.f1_weighted, "f1_macro": scores.f1_macro} if scores else None
